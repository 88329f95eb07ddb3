"""SIGTERM and SIGINT in every phase of a run: one line, the shell's exit code, and the same result in the end."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, check_same_run, restore_latest

from flax_dlvc import data, loop, rundir, setup
from flax_dlvc.checkpoint import Checkpoints
from flax_dlvc.errors import STOP_SIGNALS, run_command
from flax_dlvc.report import TensorBoard

pytestmark = pytest.mark.usefixtures('quick_compilation', 'process_as_it_was')

CHANGES = {'num_epochs': 2, 'dropout_rate': 0.3, 'augment.random_mirror': True}


@pytest.fixture(scope='module')
def config(small_vit_config):
    config = small_vit_config.copy_and_resolve_references()
    config.update_from_flattened_dict(CHANGES)
    return config


@pytest.fixture
def arguments(tmp_path, small_vit_flags):
    """The same run as a command, in the directory `run`."""
    changes = [f'--config.{field}={value}' for field, value in CHANGES.items()]
    return ['--config', ROOT / 'configs' / 'vit.py', '--workdir', tmp_path / 'run', *small_vit_flags, *changes]


@pytest.fixture(scope='module')
def programs(config):
    """What the runs in this process have compiled."""
    return setup.set_up(config)


@pytest.fixture(autouse=True)
def shared_programs(programs, monkeypatch):
    """Sets runs up without compiling anew; the data are loaded as ever."""

    def set_up(config):
        data.load(config)
        return programs.variant()

    monkeypatch.setattr(loop, 'set_up', set_up)


@pytest.fixture(scope='module')
def whole_run(config, tmp_path_factory):
    """The directory of a run that nothing stopped."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    loop.run(config, workdir)
    return workdir


def run(config, workdir, capsys):
    """Runs as the command does; returns the exit code and what is on stderr."""
    with pytest.raises(SystemExit) as ended:
        run_command(lambda _: loop.run(config, workdir))
    return ended.value.code, capsys.readouterr().err


def signal_at(monkeypatch, owner, name, call, *numbers):
    """Sends this process signals, one after the other, at the beginning of the given call of a function."""
    function = getattr(owner, name)
    calls = []

    def signalling(*arguments, **keywords):
        calls.append(name)
        if len(calls) == call:
            for number in numbers:
                signal.raise_signal(number)
        return function(*arguments, **keywords)

    monkeypatch.setattr(owner, name, signalling)


# Phase: the function, which call of it, and the step that is saved when it stops, if any is.
PHASES = {
    'loading the data': (data, 'load', 1, None),
    'TensorBoard, begun': (TensorBoard, 'begin', 1, None),
    'initialisation': (setup.Setup, 'create_state', 1, None),
    'the first line': (loop, 'announce', 1, None),
    'placing the data': (setup.Setup, 'place', 1, None),
    'the first steps, compiled': (loop.Monitor, 'note', 1, 1),
    'training': (loop.Monitor, 'note', 3, 3),
    'the last step of an epoch': (loop.Monitor, 'note', 4, 4),
    'validation': (loop, 'evaluate', 1, 4),
    'the last validation': (loop, 'evaluate', 2, 8),
    'saving': (Checkpoints, 'save', 1, 4),
    'metrics': (rundir, 'write_history', 1, 4),
    'TensorBoard': (TensorBoard, 'epoch', 2, 8),
    'waiting for the last save': (Checkpoints, 'wait', 1, 8),
    'restoring the best': (Checkpoints, 'restore', 1, 8),
    'the final test': (loop, 'evaluate', 3, 8),
    'curves': (loop, 'plot_curves', 1, 8),
    'TensorBoard, ended': (TensorBoard, 'end', 1, 8),
    'the result': (rundir, 'write_result', 1, 8),
}


@pytest.mark.parametrize('phase', PHASES)
def test_a_signal_in_every_phase(config, whole_run, tmp_path, monkeypatch, capsys, phase):
    owner, name, call, step = PHASES[phase]
    number = STOP_SIGNALS[list(PHASES).index(phase) % 2]
    with monkeypatch.context() as patch:
        signal_at(patch, owner, name, call, number)
        code, complaint = run(config, tmp_path / 'run', capsys)
    assert code == 128 + number, complaint
    assert complaint.startswith(f'stopped by {number.name}')
    assert complaint.count('\n') == 1, complaint
    assert [path.name for path in tmp_path.glob('run/.*')] in ([], ['.lock'])
    if step is not None:
        assert int(restore_latest(tmp_path / 'run').step) == step

    assert run(config, tmp_path / 'run', capsys) == (0, '')
    check_same_run(tmp_path / 'run', whole_run)


IN_ANOTHER_PROCESS = """
import signal, sys
import pytest, test_signals
from flax_dlvc import main
from flax_dlvc.errors import run_command

phase, first, second = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
owner, name, call, _ = test_signals.PHASES[phase]
del sys.argv[1:4]
with pytest.MonkeyPatch.context() as patch:
    test_signals.signal_at(patch, owner, name, call, first, second)
    run_command(main.main)
"""
# Those in which a first signal waits for something; all of them by hand, when FLAX_DLVC_KILLS is set.
ABRUPT_PHASES = tuple(PHASES)[4:16] if 'FLAX_DLVC_KILLS' in os.environ else ('validation', 'saving', 'the final test')


@pytest.mark.parametrize('phase', ABRUPT_PHASES)
def test_a_second_signal_in_every_phase(config, whole_run, tmp_path, arguments, capsys, phase):
    """It ends the process there and then, by its own default, and the run goes on from what was saved before."""
    first, second = STOP_SIGNALS[:2] if list(PHASES).index(phase) % 2 else STOP_SIGNALS[1::-1]
    done = subprocess.run(
        [sys.executable, '-c', IN_ANOTHER_PROCESS, phase, str(int(first)), str(int(second)), *arguments],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == -second, done.stderr
    assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'run' / 'result.json').exists()
    assert run(config, tmp_path / 'run', capsys) == (0, '')
    check_same_run(tmp_path / 'run', whole_run)


def test_a_signal_while_jax_is_imported(tmp_path, start, arguments):
    process = start('main', *arguments, PYTHONVERBOSE='1')
    for line in process.stderr:
        if line.startswith("import 'jax._src"):
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert 'stopped by SIGINT\n' in stderr and 'Traceback' not in stderr
    assert not (tmp_path / 'run').exists()


def test_a_second_signal_ends_the_process_at_once_and_the_run_goes_on(whole_run, tmp_path, start, command, arguments):
    """The two arrive together: the second one while the first waits for the end of a step."""
    process = start('main', *arguments)
    for line in process.stdout:
        if line.startswith('epoch   1/'):
            break
    process.send_signal(signal.SIGTERM)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
    assert process.wait(10) in (-signal.SIGINT, 143)  # 143: it was quicker
    done = command('main', *arguments)
    assert (done.returncode, done.stderr) == (0, '')
    check_same_run(tmp_path / 'run', whole_run)
