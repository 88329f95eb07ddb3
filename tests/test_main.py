"""The command line: what users type, how it ends, what it leaves behind; in real processes, most refusals apart."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, check_same_run

CONFIG = ROOT / 'configs' / 'cnn_dropout_augment.py'


@pytest.fixture(scope='module')
def small_run_flags(small_run_flags):
    """With averaging, as in tests/torture/test_kills.py, so that both have the same programs."""
    return [*small_run_flags, '--config.ema_decay=0.9']


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory, command, small_run_flags):
    """A run of `CONFIG` that nothing interrupted."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    done = command('main', '--config', CONFIG, '--workdir', workdir, *small_run_flags)
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_a_run_says_what_it_is_and_ends_with_score_and_picture(whole_run):
    workdir, done = whole_run
    lines = done.stdout.splitlines()
    assert any('cnn with 620,362 parameters on digits (299 train, 299 validation, 300 test)' in line for line in lines)
    assert [line.split()[1] for line in lines if line.startswith('epoch ')] == ['1/3', '2/3', '3/3']
    assert lines[-3] == 'cnn_dropout_augment on digits ended after epoch 3'
    accuracy = json.loads((workdir / 'result.json').read_text())['test']['accuracy']
    assert f'accuracy {accuracy:.4f}' in lines[-2]
    assert lines[-1] == f'curves: {workdir / "curves.png"}'
    assert done.stderr == '' and 'without effect' not in done.stdout


def test_the_quickstart_knows_digits(tmp_path, command):
    """As `./launch.sh` runs it: the whole of a training, by which a recipe that learns no more would be seen."""
    done = command('main', '--config', ROOT / 'configs' / 'quickstart.py', '--workdir', tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / 'result.json').read_text())['test']['accuracy'] >= 0.97


def test_tensorflow_is_never_imported(whole_run):
    code = (
        'import sys, pkgutil, importlib, flax_dlvc\n'
        'for module in pkgutil.walk_packages(flax_dlvc.__path__, "flax_dlvc."):\n'
        '    importlib.import_module(module.name)\n'
        'sys.exit("tensorflow" in sys.modules)'
    )
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False).returncode == 0


def test_a_run_that_is_interrupted_three_times_goes_on_to_the_same_bits(
    whole_run, tmp_path, start, command, small_run_flags
):
    arguments = ('main', '--config', CONFIG, '--workdir', tmp_path / 'run', *small_run_flags)
    for number, begin in (
        (signal.SIGTERM, 'epoch   1/'),
        (signal.SIGKILL, 'going on after step'),
        (signal.SIGINT, 'epoch   2/'),
    ):
        process = start(*arguments)
        try:
            assert any(begin in line for line in process.stdout), process.stderr.read()
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
        assert not (tmp_path / 'run' / 'result.json').exists()
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 128 + number
            assert stderr.startswith(f'stopped by {number.name}, saved at step ')
            assert stderr.count('\n') == 1

    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    check_same_run(tmp_path / 'run', whole_run[0])


def test_what_the_environment_says_of_other_things_changes_nothing(
    whole_run, tmp_path, command, small_run_flags, monkeypatch
):
    """Double precision; the pictures of a notebook and of a paper."""
    monkeypatch.setenv('JAX_ENABLE_X64', '1')
    monkeypatch.setenv('MPLBACKEND', 'module://a_notebooks_own')
    (tmp_path / 'matplotlibrc').write_text('text.usetex: True\nfont.size: 20\n')
    monkeypatch.setenv('MATPLOTLIBRC', str(tmp_path / 'matplotlibrc'))
    done = command('main', '--config', CONFIG, '--workdir', tmp_path / 'run', *small_run_flags)
    assert (done.returncode, done.stderr) == (0, '')
    check_same_run(tmp_path / 'run', whole_run[0])
    assert (tmp_path / 'run' / 'curves.png').read_bytes() == (whole_run[0] / 'curves.png').read_bytes()


def test_another_package_of_the_configs_name_is_noticed(tmp_path):
    """Python puts the directory that a command is started in before all others."""
    (tmp_path / 'configs').mkdir()
    arguments = ['-m', 'flax_dlvc.main', '--config', ROOT / 'configs' / 'cnn.py', '--config.seed=many']
    for content, telling in ((None, "not 'many'"), ('', f'{tmp_path}/configs/default.py takes the place of {ROOT}')):
        if content is not None:
            (tmp_path / 'configs' / 'default.py').write_text(content)
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert_refused(done, tmp_path / 'runs')
        assert telling in done.stderr
    done = subprocess.run([sys.executable, '-P', *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "not 'many'" in done.stderr


def test_a_run_whose_terminal_is_closed_is_saved(whole_run, tmp_path, command, small_run_flags):
    arguments = ['main', '--config', CONFIG, '--workdir', tmp_path / 'run', *small_run_flags]
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have these tests ignore it
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, '-m', f'flax_dlvc.{arguments[0]}', *map(str, arguments[1:])])
    shown = b''
    while b'epoch   1/' not in shown:
        shown += os.read(terminal, 65536)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP
    assert not (tmp_path / 'run' / 'result.json').exists()
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert 'going on after step' in done.stdout
    check_same_run(tmp_path / 'run', whole_run[0])


BAD_CONFIGS = {
    'syntax.py': 'def get_config(:\n',
    'raises.py': 'raise RuntimeError("first line\\nsecond line")\n',
    'no_function.py': 'x = 1\n',
    'unknown_field.py': (
        'from configs import cnn\ndef get_config():\n    config = cnn.get_config()\n    config.colour = 3\n'
        '    return config\n'
    ),
    'not_a_config.py': 'def get_config():\n    return 3\n',
    'wrong_type.py': (
        'from configs import cnn\ndef get_config():\n    config = cnn.get_config()\n    config.batch_size = "many"\n'
        '    return config\n'
    ),
}


@pytest.mark.parametrize('name', BAD_CONFIGS)
def test_a_config_file_with_an_error_is_one_line(tmp_path, command, name):
    (tmp_path / name).write_text(BAD_CONFIGS[name])
    assert_refused(command('main', '--config', tmp_path / name, '--workdir', tmp_path / 'run'), tmp_path / 'run')


@pytest.mark.parametrize(
    ('flags', 'telling'),
    [
        (['--config.colour=3'], 'colour'),
        (['--config.batch_size=many'], 'batch_size'),
        (['--config.batch_size=0'], 'batch_size must be at least 1'),
        (['--config.augment.random_resized_crop_scale=(0.5,0.1)'], 'random_resized_crop_scale must be'),
        (['--config.dropout_rate=nan'], 'dropout_rate must be in'),
        (['--nonsense=1'], 'nonsense'),
        (['surplus'], 'surplus'),
        (['--config.dataset=nonsense'], "'nonsense' is neither 'digits', folder:PATH nor a TFDS dataset"),
        (['--config.splits.validation=train[:30%]'], 'share examples'),
        (['--config.splits.test=test[:0]'], 'holds no examples'),
        (['--config.splits.test=exam'], 'not a slice'),
        (['--config.batch_size=512'], 'larger than the training split'),
        (['--config.batch_size=31', '--config.num_devices=2'], 'not divisible'),
        (['--config.num_devices=5'], 'there are 2 devices'),
        (['--config.init_from=/nowhere'], '/nowhere'),
        (['--config.model.name=vit', '--config.model.patch_size=5'], 'does not divide'),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(tmp_path, command_here, small_run_flags, flags, telling):
    workdir = tmp_path / 'run'
    done = command_here('main', '--config', CONFIG, '--workdir', workdir, *small_run_flags, *flags)
    assert_refused(done, workdir)
    assert telling in done.stderr


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path, command, small_run_flags):
    (tmp_path / 'file').write_text('')
    done = command('main', '--config', CONFIG, '--workdir', tmp_path / 'file' / 'run', *small_run_flags)
    assert_refused(done, tmp_path / 'file' / 'run')
    done = command('main', '--config', CONFIG, '--workdir', tmp_path / 'file', *small_run_flags)
    assert_refused(done)
    assert 'not a directory' in done.stderr


@pytest.mark.parametrize('module', ['main', 'evaluate', 'verify', 'data'])
def test_help_is_given(command, module):
    done = command(module, '--help')
    assert (done.returncode, done.stderr) == (0, '')
    assert ('--config.batch_size=128' if module == 'main' else '--help') in done.stdout


def test_a_missing_config_is_one_line(tmp_path, command):
    done = command('main', '--workdir', tmp_path / 'run')
    assert_refused(done, tmp_path / 'run')
    assert '--config' in done.stderr
    assert_refused(command('main', '--config', tmp_path / 'none.py'))


def test_a_dataset_that_is_not_there_names_what_to_do(tmp_path, command):
    began = time.monotonic()
    done = command(
        'main',
        '--config',
        ROOT / 'configs' / 'cnn.py',
        '--workdir',
        tmp_path / 'run',
        TFDS_DATA_DIR=str(tmp_path / 'tfds'),
        https_proxy='http://127.0.0.1:9',  # no network, wherever this runs
    )
    assert_refused(done, tmp_path / 'run')
    assert time.monotonic() - began < 40  # 15 seconds to give up, and the imports on a busy machine
    for part in (str(tmp_path / 'tfds'), '--archive', '--config.dataset=digits'):
        assert part in done.stderr


def test_a_diverging_run_exits_with_3(tmp_path, command, small_run_flags):
    flags = ('--config.optimizer.name=sgd', '--config.learning_rate=1e8')
    arguments = ('--config', CONFIG, '--workdir', tmp_path / 'run', *small_run_flags, *flags)
    done = command('main', *arguments, JAX_DISABLE_MOST_OPTIMIZATIONS='1')
    assert done.returncode == 3
    assert 'learning rate 1e+08' in done.stderr
    assert done.stderr.count('\n') == 1


def test_evaluate_prints_and_writes(whole_run, command):
    workdir, _ = whole_run
    done = command('evaluate', '--workdir', workdir)
    assert done.returncode == 0, done.stderr
    written = json.loads((workdir / 'evaluation-test.json').read_text())
    result = json.loads((workdir / 'result.json').read_text())['test']
    assert {key: written[key] for key in result} == result
    assert f'accuracy {result["accuracy"]:.4f}' in done.stdout
    assert 'digits test' in done.stdout


@pytest.mark.parametrize(
    'damage',
    [
        lambda workdir: (workdir / 'config.json').unlink(),
        lambda workdir: (workdir / 'config.json').write_text('{'),
        lambda workdir: (workdir / 'config.json').write_text('{"seed": 1}'),
        lambda workdir: (workdir / 'checkpoints').rename(workdir / 'elsewhere'),
        lambda workdir: [path.write_bytes(b'') for path in (workdir / 'checkpoints').rglob('*') if path.is_file()],
    ],
)
def test_evaluating_a_damaged_directory_is_one_line(whole_run, tmp_path, command_here, damage):
    workdir = shutil.copytree(whole_run[0], tmp_path / 'run')
    (workdir / 'evaluation-test.json').unlink(missing_ok=True)
    damage(workdir)
    assert_refused(command_here('evaluate', '--workdir', workdir))
    assert not (workdir / 'evaluation-test.json').exists()


@pytest.mark.parametrize('module', ['main', 'study', 'evaluate'])
def test_a_directory_without_a_name_is_not_the_current_one(command, small_run_flags, tmp_path, module):
    flags = ['--config', ROOT / 'configs' / 'cnn.py', *small_run_flags] if module == 'main' else []
    done = command(module, *flags, '--workdir', '')
    assert_refused(done)
    assert 'empty name; is a shell variable not set?' in done.stderr


@pytest.mark.parametrize('flags', [['--workdir', '/nowhere'], [], ['--workdir', '.', '--split', 'exam'], ['--help me']])
def test_evaluate_refuses_bad_arguments_in_one_line(command_here, flags):
    assert_refused(command_here('evaluate', *flags))


def assert_refused(done, workdir=None):
    """Exit code 2, one line on stderr, no traceback, no directory made."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith('error: ')
    assert done.stderr.count('\n') == 1, done.stderr
    assert 'Traceback' not in done.stderr
    assert workdir is None or not workdir.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint of the CNN; `grow()` makes room for all."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mounted = subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=12m', 'tmpfs', disk], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip('a small disk needs the right to mount a tmpfs')
    yield disk, lambda: subprocess.run(['mount', '-o', 'remount,size=200m', disk], check=True)
    subprocess.run(['umount', disk], check=True)


def test_a_full_disk_ends_the_run_with_4_and_it_goes_on_when_there_is_space(
    whole_run, small_disk, command, small_run_flags
):
    disk, grow = small_disk
    arguments = ('main', '--config', CONFIG, '--workdir', disk / 'run', *small_run_flags)
    done = command(*arguments)
    assert done.returncode == 4, done.stdout + done.stderr
    assert done.stderr.startswith('error: cannot save to ')
    assert 'free space' in done.stderr
    assert done.stderr.count('\n') == 1, done.stderr
    assert (disk / 'run' / 'checkpoints' / '4').is_dir()

    grow()
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert 'going on after step 4' in done.stdout
    check_same_run(disk / 'run', whole_run[0])


def test_a_second_process_on_a_run_directory_is_refused(tmp_path, start, command, small_run_flags):
    arguments = ('main', '--config', CONFIG, '--workdir', tmp_path / 'run', *small_run_flags)
    first = start(*arguments, '--config.num_epochs=200')
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / 'run' / '.lock').exists():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        done = command(*arguments, '--config.num_epochs=200')
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    assert_refused(done)
    assert 'another process is training in' in done.stderr


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_ends_as_ever(
    whole_run, tmp_path, command, small_run_flags
):
    workdir = shutil.copytree(whole_run[0], tmp_path / 'run')
    (workdir / 'result.json').unlink()
    for path in (workdir / 'checkpoints' / '12' / 'state').rglob('*'):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-20])
    done = command('main', '--config', CONFIG, '--workdir', workdir, *small_run_flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith('warning: the checkpoint of step 12 is damaged')
    assert done.stderr.count('\n') == 1, done.stderr
    assert (workdir / 'damaged' / '12').is_dir()
    check_same_run(workdir, whole_run[0])
