"""The study, as a command: real small studies, on a terminal, in parallel, stopped and killed."""

import contextlib
import itertools
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, read_history

from flax_dlvc import rundir, study
from flax_dlvc.errors import CommandError, ConfigError
from flax_dlvc.grid import Planned, plan


@pytest.mark.parametrize(
    'arguments',
    [
        ['--models', 'cnn,mlp'],
        ['--regularizations', 'some'],
        ['--seeds', '0'],
        ['--vary', 'learning_rate'],
        ['--vary', 'learning_rat=1,2'],
        ['--vary', 'augment.random_resized_crop_scale_min=x'],
        ['--vary', 'seed=1,2'],
        ['--config.seed=1'],
        ['--config.nothing=1'],
        ['--config.num_epochs=0'],
        ['--unknown'],
        ['--vary', 'num_devices=1,2'],
        ['--config.dataset=folder:/nowhere'],
        ['--config.dataset=digits', '--models', 'vit', '--config.model.patch_size=5', '--parallel-runs', '2'],
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_nothing_is_written(tmp_path, arguments):
    with pytest.raises(ConfigError) as error:
        study.main(['study', '--workdir', str(tmp_path / 'study'), *arguments])
    assert '\n' not in str(error.value).strip()
    assert not (tmp_path / 'study').exists()


def test_python_may_leave_docstrings_out():
    arguments = [sys.executable, '-OO', '-m', 'flax_dlvc.study', '--help']
    assert 'error bars' in subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout


SMALL_STUDY = ['--models', 'cnn', '--regularizations', 'none,dropout', '--seeds', '2']


@pytest.fixture(scope='module')
def whole_study(tmp_path_factory, small_run_flags):
    """A study that is left alone, on a terminal: its directory, and the pictures of its live table."""
    directory = tmp_path_factory.mktemp('whole')
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, '-m', 'flax_dlvc.study', '--workdir', directory, *SMALL_STUDY, *small_run_flags],
        cwd=ROOT,
        env=os.environ | {'TERM': 'xterm', 'COLUMNS': '120', 'LINES': '40'},
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b''
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    text = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', shown.decode())
    assert process.wait(timeout=60) == 0, text
    return directory, text


def test_a_terminal_shows_a_line_per_run(whole_study):
    """With epoch, best validation accuracy and the time left; in the end what the runs' files say."""
    directory, text = whole_study
    assert re.search(r'at most about \d+ seconds left', text)
    assert re.search(r'cnn +│ 0 +│ running +│ [12]/3 +│ 0\.\d{4}', text)
    assert re.search(r'cnn_dropout +│ 1 +│ waiting +│ 0/3 +│ +│', text)
    last = text[text.rindex('best validation') :]
    for cell in ('cnn', 'cnn_dropout'):
        for seed in (0, 1):
            best = max(r['validation_accuracy'] for r in read_history(directory / cell / f'seed_{seed}'))
            assert re.search(rf'│ {cell} +│ {seed} +│ finished +│ 3/3 +│ {best:.4f} ', last), last
    assert '[1/4]' not in text


def test_parallel_runs_are_bit_for_bit_the_serial_ones(whole_study, command, small_run_flags, tmp_path):
    serial, _ = whole_study
    devices = {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
    done = command('study', '--workdir', tmp_path, *SMALL_STUDY, '--parallel-runs', 2, *small_run_flags, **devices)
    assert done.returncode == 0, done.stderr
    assert re.search(r'\[4/4\] cnn\w* seed ', done.stdout)
    began = {}
    for cell, seed in itertools.product(('cnn', 'cnn_dropout'), (0, 1)):
        ours, theirs = tmp_path / cell / f'seed_{seed}', serial / cell / f'seed_{seed}'
        assert read_history(ours) == read_history(theirs)
        assert rundir.read_result(ours)['test'] == rundir.read_result(theirs)['test']
        began[cell, seed] = (ours / 'config.json').stat().st_mtime_ns
    # Every cell's first seed before any second one, which finds the first one's programs.
    assert [seed for _, seed in sorted(began, key=began.get)] == [0, 0, 1, 1]


def test_parallel_runs_have_a_device_each_and_share_them_where_there_are_fewer(monkeypatch):
    fractions = ['XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION']
    for name in [*fractions, 'JAX_CUDA_VISIBLE_DEVICES', 'JAX_ROCM_VISIBLE_DEVICES']:
        monkeypatch.delenv(name, raising=False)

    def seen(parallel_runs, num_devices):
        slots = [study.placement(slot, parallel_runs, num_devices) for slot in range(parallel_runs)]
        assert all(slot['JAX_ROCM_VISIBLE_DEVICES'] == slot['JAX_CUDA_VISIBLE_DEVICES'] for slot in slots)
        return [(slot['JAX_CUDA_VISIBLE_DEVICES'], slot.get('XLA_CLIENT_MEM_FRACTION')) for slot in slots]

    assert seen(2, 4) == [('0', None), ('1', None)]
    assert seen(2, 2) == [('0', None), ('1', None)]
    assert seen(3, 1) == [('0', '0.300')] * 3
    assert seen(3, 2) == [('0', '0.450'), ('1', '0.450'), ('0', '0.450')]
    monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', '.2')  # JAX refuses both
    assert seen(2, 1) == [('0', None)] * 2
    for name in ('JAX_CUDA_VISIBLE_DEVICES', 'JAX_ROCM_VISIBLE_DEVICES'):
        monkeypatch.setenv(name, '5,7')  # the user's choice of devices, which are the two that the runs see
    assert seen(3, 2) == [('5', None), ('7', None), ('5', None)]


def test_a_dry_run_writes_nothing_and_knows_the_time(whole_study, small_run_flags, tmp_path, capsys):
    """Within a factor of ten of the runs' own speed: other work on the machine moves both."""
    serial, _ = whole_study
    arguments = ['study', '--workdir', str(tmp_path / 'study'), '--models', 'cnn', '--regularizations', 'none']
    study.main([*arguments, '--seeds', '2', *small_run_flags, '--config.num_epochs=300', '--dry-run'])
    shown = capsys.readouterr().out
    assert not (tmp_path / 'study').exists()
    assert 'cnn: 2 seeds, 0 finished' in shown
    milliseconds = float(re.search(r'([\d.]+) ms a step', shown)[1])
    speed = rundir.read_history(serial / 'cnn' / 'seed_1')[-1]['images_per_second']
    assert 0.1 < milliseconds / (1000 * 64 / speed) < 10
    begin = float(re.search(r'([\d.]+) s to begin', shown)[1])
    # 4 steps an epoch and the validation split's 290 examples; in the end the test split's 360.
    expected = begin + milliseconds / 1000 * ((4 + 290 / 64 / 3) * 300 + 360 / 64 / 3) * 2
    number, unit = re.search(r'2 runs; about ([\d.]+) (seconds|minutes|hours)', shown).groups()
    total = float(number) * {'seconds': 1, 'minutes': 60, 'hours': 3600}[unit]
    assert total == pytest.approx(expected, rel=0.25)


def test_a_study_that_is_killed_and_started_again_ends_with_the_same_table(
    whole_study, start, command, small_run_flags, tmp_path
):
    """Stopped by SIGTERM within its first run, then killed when that one is finished, then left alone."""
    flags = [*SMALL_STUDY, *small_run_flags]

    def wait_for(path):
        deadline = time.monotonic() + 240
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert path.exists(), process.communicate()

    process = start('study', '--workdir', tmp_path, *flags)
    wait_for(tmp_path / 'cnn' / 'seed_0' / 'metrics.jsonl')
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143, process.communicate()
    process.communicate()
    process = start('study', '--workdir', tmp_path, *flags)
    wait_for(tmp_path / 'cnn' / 'seed_0' / 'result.json')
    process.kill()
    process.communicate()
    finished = (tmp_path / 'cnn' / 'seed_0' / 'result.json').stat().st_mtime_ns
    last = command('study', '--workdir', tmp_path, *flags)
    assert last.returncode == 0, last.stderr
    assert '[4/4] ' in last.stdout
    assert (tmp_path / 'cnn' / 'seed_0' / 'result.json').stat().st_mtime_ns == finished
    for name in ('table.md', 'table.csv', 'table.tex', 'answers.md'):
        assert (tmp_path / name).read_bytes() == (whole_study[0] / name).read_bytes()
    assert 'digits' in (tmp_path / 'table.md').read_text()


def test_more_epochs_are_given_to_all_rows_or_to_none(tmp_path):
    def cells(num_epochs):
        return plan(
            tmp_path,
            models=['cnn'],
            regularizations=['none'],
            seeds=1,
            vary=['schedule.name=exponential,cosine'],
            overrides=['--config.dataset=digits', f'--config.num_epochs={num_epochs}'],
        )

    test = {'accuracy': 0.5, 'mean_class_accuracy': 0.5, 'cross_entropy': 1.0, 'per_class_accuracy': [0.5] * 10}
    for planned in cells(30):
        rundir.create(planned.directory, planned.config)
        ended = {'config_name': 'cnn', 'dataset': 'digits', 'best_epoch': 2, 'epochs_run': 12, 'stopped_early': True}
        rundir.write_result(planned.directory, ended | {'test': test})
    study.carry_out(cells(30), 1)
    with pytest.raises(ConfigError, match=r'cosine.* differs in num_epochs'):  # its rates depend on it
        study.carry_out(cells(60), 1)
    study.carry_out(cells(30), 1)


@pytest.mark.parametrize(
    ('script', 'reason'),
    [
        ('import jax; jax.jit(lambda x: x.foo)(1)', 'AttributeError: .* no attribute foo'),
        ('import os; os.write(2, b"a warning\\n"); os.kill(os.getpid(), 9)', 'ended by a signal: Killed'),
        ('raise SystemExit(7)', 'exit code 7'),
    ],
)
def test_a_run_that_fails_in_a_process_of_its_own_says_why(tmp_path, monkeypatch, script, reason):
    (planned,) = grid = plan(tmp_path, models=['cnn'], regularizations=['none'], seeds=1)
    monkeypatch.setattr(Planned, 'command', ['-c', script])
    monkeypatch.setattr(study.data, 'load', lambda _: None)
    study.carry_out(grid, 2)
    assert planned.state == 'failed'
    assert re.search(reason, rundir.read_failure(planned.directory)[0])


def test_without_devices_it_ends_in_one_line(tmp_path, monkeypatch, command, small_run_flags):
    monkeypatch.setenv('JAX_PLATFORMS', 'bogus')
    with pytest.raises(ConfigError, match=r'JAX finds no devices: .*bogus'):
        study._slots(2)
    done = command('main', '--config', ROOT / 'configs' / 'cnn.py', *small_run_flags, '--workdir', tmp_path / 'run')
    assert (done.returncode, done.stderr.count('\n')) == (2, 1)
    assert done.stderr.startswith('error: JAX finds no devices: ')
    assert not (tmp_path / 'run').exists()


def test_a_run_that_another_process_trains_is_left_to_it(tmp_path, small_run_flags, capsys):
    first, _ = plan(tmp_path, models=['cnn'], regularizations=['none'], seeds=2, overrides=small_run_flags)
    theirs = first.directory
    rundir.create(theirs, first.config)
    arguments = ['study', '--workdir', str(tmp_path), '--models', 'cnn', '--regularizations', 'none', '--seeds', '2']
    message = '1 of 2 runs left to another process that trains them: cnn seed 0; start again when it has ended'
    with rundir.lock(theirs), pytest.raises(CommandError, match=message) as error:
        study.main([*arguments, *small_run_flags])
    assert error.value.exit_code == 1
    assert sorted(path.name for path in theirs.iterdir()) == ['.lock', 'config.json']
    shown = capsys.readouterr().out
    assert f'cnn seed 0 elsewhere after epoch 0: another process is training in {theirs};' in shown
    assert 'cnn seed 1 finished after epoch 3' in shown
    assert 'seed 0 not finished, 0 epochs' in (tmp_path / 'table.md').read_text()


def test_what_holds_no_study_is_left_alone(tmp_path):
    (tmp_path / 'table.md').write_text('mine')
    with pytest.raises(ConfigError, match='is no study'):
        study.main(['study', '--workdir', str(tmp_path), '--rebuild'])
    assert (tmp_path / 'table.md').read_text() == 'mine'


def test_ctrl_c_in_a_terminal_saves_parallel_runs(tmp_path, small_run_flags):
    """It is sent to every process of the terminal; runs are saved in mid-epoch, of 149 steps.

    Unsaved, both would be where their last epochs ended; saved, one may be there by chance.
    """
    flags = ['--models', 'cnn', '--regularizations', 'none', '--seeds', '2', '--parallel-runs', '2', *small_run_flags]
    flags += ['--config.batch_size=8', '--config.splits.train=train[:80%]', '--config.num_epochs=50']
    flags += ['--config.splits.validation=train[99%:]']
    process = subprocess.Popen(
        [sys.executable, '-m', 'flax_dlvc.study', '--workdir', tmp_path, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    runs = [tmp_path / 'cnn' / f'seed_{seed}' for seed in (0, 1)]
    deadline = time.monotonic() + 240
    while not all((run / 'metrics.jsonl').exists() for run in runs):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    time.sleep(0.5)  # some way into the second epoch
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=200)
    assert process.returncode == 130, complaint
    assert complaint.count('\n') == 1, complaint
    saved = [max(int(path.name) for path in run.glob('checkpoints/*') if path.name.isdecimal()) for run in runs]
    assert any(step % 149 for step in saved), saved
    assert not any((run / 'result.json').exists() for run in runs)


def test_a_signal_while_a_run_is_started_leaves_no_run_behind(tmp_path, small_run_flags):
    """The study has not heard of its process yet."""
    script = """
import os, signal
from flax_dlvc import errors, study
start = study._start
def start_and_stop(*arguments):
    process = start(*arguments)
    print(process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    return process
study._start = start_and_stop
errors.run_command(study.main)
"""
    flags = ['--models', 'cnn', '--regularizations', 'none', '--seeds', '2', '--parallel-runs', '2', *small_run_flags]
    done = subprocess.run(
        [sys.executable, '-c', script, '--workdir', tmp_path, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (143, 'stopped by SIGTERM\n')
    (started,) = map(int, done.stdout.split('\n')[0].split())
    with pytest.raises(ProcessLookupError):
        os.kill(started, 0)


def test_a_run_that_diverges_is_reported_and_the_others_go_on(tmp_path, small_run_flags, capsys):
    vary = ['--vary', 'learning_rate=1e30,0.001', '--config.optimizer.name=sgd', '--config.num_epochs=1']
    arguments = ['study', '--workdir', str(tmp_path), '--models', 'cnn', '--regularizations', 'none', '--seeds', '1']
    with pytest.raises(CommandError, match='1 of 2 runs failed') as error:
        study.main([*arguments, *small_run_flags, *vary])
    assert error.value.exit_code == 1
    assert 'loss is nan' in (tmp_path / 'table.md').read_text()
    assert 'cnn seed 0 finished after epoch 1' in capsys.readouterr().out
