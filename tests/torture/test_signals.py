"""SIGTERM and SIGINT in every phase of a run: one line, the shell's exit code, and the same result in the end."""

import signal

import jax
import numpy as np
import pytest
from conftest import read_history, restore_latest

from flax_dlvc import data, loop, rundir, setup
from flax_dlvc.checkpoint import Checkpoints
from flax_dlvc.errors import STOP_SIGNALS, run_command
from flax_dlvc.report import TensorBoard


@pytest.fixture
def config(small_config):
    small_config.num_epochs = 2
    small_config.dropout_rate = 0.3
    small_config.augment.random_mirror = True
    return small_config


@pytest.fixture(autouse=True)
def own_handlers():
    """Whatever a run does to the handlers ends with the test."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory):
    """The directory of a run that nothing stopped, by name of its config."""
    return tmp_path_factory.mktemp('whole') / 'run'


def run(config, workdir, capsys):
    """Runs as the command does; returns the exit code and what is on stderr."""
    with pytest.raises(SystemExit) as ended:
        run_command(lambda _: loop.run(config, workdir))
    return ended.value.code, capsys.readouterr().err


def signal_at(monkeypatch, owner, name, call, number, *, after=False):
    """Sends this process a signal at the beginning, or the end, of the given call of a function."""
    function = getattr(owner, name)
    calls = []

    def signalling(*arguments, **keywords):
        calls.append(name)
        if len(calls) == call and not after:
            signal.raise_signal(number)
        result = function(*arguments, **keywords)
        if len(calls) == call and after:
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(owner, name, signalling)


# Phase: the function, which call of it, and the step that is saved when it stops, if any is.
PHASES = {
    'loading the data': (data, 'load', 1, None),
    'initialisation': (setup.Setup, 'create_state', 1, None),
    'the first line': (loop, 'announce', 1, None),
    'placing the data': (setup.Setup, 'place', 1, None),
    'the first steps, compiled': (loop.Monitor, 'note', 1, 1),
    'training': (loop.Monitor, 'note', 3, 3),
    'the last step of an epoch': (loop.Monitor, 'note', 4, 4),
    'validation': (loop, 'evaluate', 1, 4),
    'saving': (Checkpoints, 'save', 1, 4),
    'metrics': (rundir, 'write_history', 1, 4),
    'TensorBoard': (TensorBoard, 'epoch', 2, 8),
    'waiting for the last save': (Checkpoints, 'wait', 1, 8),
    'restoring the best': (Checkpoints, 'restore', 1, 8),
    'the final test': (loop, 'evaluate', 3, 8),
    'curves': (loop, 'plot_curves', 1, 8),
    'the result': (rundir, 'write_result', 1, 8),
}


@pytest.mark.parametrize('after', [False, True], ids=['begins', 'ends'])
@pytest.mark.parametrize('phase', PHASES)
def test_a_signal_in_every_phase(config, whole_run, tmp_path, monkeypatch, capsys, phase, after):
    if not (whole_run / 'result.json').exists():
        loop.run(config, whole_run)
    owner, name, call, step = PHASES[phase]
    number = signal.SIGTERM if after else signal.SIGINT
    with monkeypatch.context() as patch:
        signal_at(patch, owner, name, call, number, after=after)
        code, complaint = run(config, tmp_path / 'run', capsys)
    assert code == 128 + number, complaint
    assert complaint.startswith(f'stopped by {number.name}')
    assert complaint.count('\n') == 1, complaint
    left = [path.name for path in tmp_path.glob('run/*') if path.name.startswith('.') or '.tmp' in path.name]
    assert left in ([], ['.lock'])
    if step is not None:
        assert int(restore_latest(tmp_path / 'run').step) in (step, step + 1)
    if 'saved at step' in complaint:
        assert f'saved at step {int(restore_latest(tmp_path / "run").step)} in' in complaint

    assert run(config, tmp_path / 'run', capsys) == (0, '')
    check(whole_run, tmp_path / 'run')


def check(whole, workdir):
    assert read_history(workdir) == read_history(whole)
    assert (workdir / 'result.json').read_text() == (whole / 'result.json').read_text()
    jax.tree.map(np.testing.assert_array_equal, restore_latest(workdir), restore_latest(whole))
