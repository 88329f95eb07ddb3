"""Disks that are full, read-only or gone, for real: exit code 4, one line, and the run goes on when they are mended."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, read_events, read_history

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture
def mount(tmp_path):
    """Mounts a tmpfs of a size at a directory; returns how to mount it again with other options."""
    mounted = []

    def mount(directory, size):
        directory.mkdir(parents=True, exist_ok=True)
        command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', directory]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip('a small disk needs the right to mount a tmpfs')
        mounted.append(directory)
        return lambda options: subprocess.run(['mount', '-o', f'remount,{options}', directory], check=True)

    yield mount
    for directory in mounted:
        subprocess.run(['umount', '-l', directory], check=True)


@pytest.fixture
def arguments(tmp_path, small_vit_flags):
    workdir = tmp_path / 'run'
    flags = (*small_vit_flags, '--config.num_epochs=2')
    return 'main', '--config', ROOT / 'configs' / 'vit.py', '--workdir', workdir, *flags


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory, command, small_vit_flags):
    """A run of one epoch on a disk with space."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    flags = (*small_vit_flags, '--config.num_epochs=1')
    done = command('main', '--config', ROOT / 'configs' / 'vit.py', '--workdir', workdir, *flags)
    assert done.returncode == 0, done.stderr
    return workdir


def assert_ends_with_4(done, *parts):
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith('error: cannot ')
    assert done.stderr.count('\n') == 1, done.stderr
    for part in parts:
        assert part in done.stderr


# Beside config.json and dataset.json there is room for nothing; for the begin of TensorBoard's events; for all of them
# but the last, for metrics.jsonl and evaluation-test.json too. What does not fit takes more pages than are left.
@pytest.mark.parametrize(
    ('events', 'pages', 'part'), [(False, 0, 'tensorboard'), (True, 0, 'metrics.jsonl'), (True, 5, 'curves.png')]
)
def test_no_space_for_a_log(tmp_path, mount, command, arguments, whole_run, events, pages, part):
    """The checkpoints are on a disk with space."""
    if events:  # the version, the session, the hyperparameters, the images
        begin = sum(event.ByteSize() + 16 for event in read_events(whole_run)[:4])
        pages += -(-begin // 4096)
    remount = mount(tmp_path / 'run', f'{4 * (2 + pages)}k')
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'run' / 'checkpoints').symlink_to(tmp_path / 'checkpoints')
    shutil.copy(whole_run / 'config.json', tmp_path / 'run')
    arguments = (*arguments, '--config.num_epochs=1')
    assert_ends_with_4(command(*arguments), part)
    assert not (tmp_path / 'run' / 'result.json').exists()

    remount('size=10m')
    done = command(*arguments)
    assert (done.returncode, done.stderr) == (0, '')
    assert read_history(tmp_path / 'run') == read_history(whole_run)


def test_a_run_directory_that_became_read_only(tmp_path, mount, start, command, arguments):
    remount = mount(tmp_path / 'run', '100m')
    process = start(*arguments)
    for line in process.stdout:
        if ' parameters on digits ' in line:
            break
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 143
    remount('ro')
    assert_ends_with_4(command(*arguments), str(tmp_path / 'run'))
    remount('rw')
    assert command(*arguments).returncode == 0


def test_a_run_directory_that_becomes_read_only_under_a_run(tmp_path, start, command, arguments):
    """What is opened from then on is refused, by a read-only mount over the directory."""
    workdir = tmp_path / 'run'
    arguments = (*arguments, '--config.num_epochs=30', '--config.early_stopping.patience=0')
    process = start(*arguments)
    for line in process.stdout:
        if line.startswith('epoch   2/'):
            break
    if subprocess.run(['mount', '--bind', workdir, workdir], capture_output=True, check=False).returncode:
        process.kill()
        process.communicate()
        pytest.skip('a read-only directory needs the right to mount')
    try:
        # Refused while a file that was opened through this mount is being written.
        again = f'until mount -o remount,bind,ro {workdir}; do sleep 0.01; done 2> /dev/null'
        subprocess.run(['bash', '-c', again], check=True, timeout=60)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        subprocess.run(['umount', '-l', workdir], check=True)
    assert_ends_with_4(subprocess.CompletedProcess([], process.returncode, stdout, stderr), str(workdir))
    done = command(*arguments)
    assert (done.returncode, done.stderr) == (0, '')
    assert [record['epoch'] for record in read_history(workdir)] == list(range(1, 31))


def test_a_run_directory_that_is_removed(tmp_path, start, arguments):
    process = start(*arguments, '--config.num_epochs=1000', '--config.early_stopping.patience=0')
    for line in process.stdout:
        if line.startswith('epoch   2/'):
            break
    (tmp_path / 'run').rename(tmp_path / 'elsewhere')  # at once; removing file by file is a matter of luck
    shutil.rmtree(tmp_path / 'elsewhere')
    stdout, stderr = process.communicate(timeout=60)
    assert_ends_with_4(subprocess.CompletedProcess([], process.returncode, stdout, stderr), str(tmp_path / 'run'))


def test_output_that_cannot_be_written(arguments):
    """A log on a full disk."""
    with Path('/dev/full').open('w') as full:
        done = subprocess.run(
            [sys.executable, '-m', f'flax_dlvc.{arguments[0]}', *map(str, arguments[1:])],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=120,
        )
    assert_ends_with_4(done, 'No space left on device')
