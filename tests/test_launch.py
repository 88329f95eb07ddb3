"""launch.sh: what it runs, and how it fails; the installation itself is what CI begins with."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT


def launch(directory, *arguments, **environment):
    return subprocess.run(
        [directory / 'launch.sh', *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture
def installed(tmp_path):
    """A checkout whose environment is a stand-in that prints what it is asked to run."""
    for name in ('launch.sh', 'pyproject.toml'):
        shutil.copy(ROOT / name, tmp_path / name)
    binaries = tmp_path / '.venv' / 'bin'
    binaries.mkdir(parents=True)
    (binaries / 'python').write_text('#!/bin/sh\necho "python $*"\n')
    (binaries / 'pytest').write_text('#!/bin/sh\necho "pytest $*"; exit 7\n')
    for path in binaries.iterdir():
        path.chmod(0o755)
    return tmp_path


def fake_python(directory, body):
    path = directory / 'fake-python'
    path.write_text(f'#!/bin/sh\n{body}\n')
    path.chmod(0o755)
    return str(path)


def make_venv_that_installs(directory):
    """An interpreter whose `-m venv` does nothing and counts, as the environment stands there already."""
    return fake_python(directory, f'case "$*" in *venv*) echo x >> {directory}/count ;; esac')


@pytest.mark.parametrize(
    ('arguments', 'runs'),
    [
        ([], 'python -m flax_dlvc.main --config configs/quickstart.py'),
        (['configs/vit.py'], 'python -m flax_dlvc.main --config configs/vit.py'),
        (['configs/vit.py', '--config.seed=1'], 'python -m flax_dlvc.main --config configs/vit.py --config.seed=1'),
        (['python', '-m', 'x'], 'python -m x'),
    ],
)
def test_what_is_run(installed, arguments, runs):
    done = launch(installed, *arguments, PYTHON=make_venv_that_installs(installed))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == runs


def test_the_exit_code_is_the_commands(installed):
    done = launch(installed, 'pytest', '-q', 'a b', PYTHON=make_venv_that_installs(installed))
    assert done.returncode == 7
    assert done.stdout.splitlines()[-1] == 'pytest -q a b'


def test_it_installs_once_and_again_when_something_changed(installed):
    python = make_venv_that_installs(installed)
    count = installed / 'count'
    for _ in range(2):
        assert launch(installed, 'python', PYTHON=python).returncode == 0
    assert count.read_text() == 'x\n'
    with (installed / 'pyproject.toml').open('a') as file:
        file.write('# changed\n')
    assert 'setting up' in launch(installed, 'python', PYTHON=python).stderr
    assert count.read_text() == 'x\nx\n'


@pytest.mark.parametrize(
    ('listing', 'extras'), [('GPU 0: NVIDIA H100 (UUID: GPU-1)', '[test,cuda12]'), ('No devices found', '[test]')]
)
def test_a_gpu_chooses_the_cuda_extra(installed, tmp_path, listing, extras):
    tools = tmp_path / 'tools'
    tools.mkdir()
    (tools / 'nvidia-smi').write_text(f'#!/bin/sh\necho "{listing}"\n')
    (tools / 'nvidia-smi').chmod(0o755)
    path = f'{tools}:{os.environ["PATH"]}'
    done = launch(installed, 'python', PYTHON=make_venv_that_installs(installed), PATH=path)
    assert done.returncode == 0, done.stderr
    installation = next(line for line in done.stdout.splitlines() if 'pip install' in line)
    assert installation.endswith(f'{installed}{extras}')


def test_a_copy_that_sbatch_made_finds_the_checkout(installed, tmp_path):
    spool = tmp_path / 'spool'
    spool.mkdir()
    shutil.copy(installed / 'launch.sh', spool / 'launch.sh')
    python = make_venv_that_installs(installed)
    done = launch(spool, 'configs/vit.py', PYTHON=python, SLURM_SUBMIT_DIR=str(installed))
    assert done.stdout.splitlines()[-1] == 'python -m flax_dlvc.main --config configs/vit.py'
    done = launch(spool, 'configs/vit.py', PYTHON=python, SLURM_SUBMIT_DIR=str(spool))
    assert done.returncode == 2
    assert done.stderr == f'error: {spool} is not a checkout of flax_dlvc; submit from one\n'


def test_a_python_that_is_too_old_or_missing_is_one_line(installed, tmp_path):
    old = fake_python(tmp_path, 'case "$*" in --version) echo Python 3.9.1 ;; -c*) exit 1 ;; esac')
    for python in (old, str(tmp_path / 'none')):
        done = launch(installed, 'python', PYTHON=python)
        assert done.returncode == 2
        assert done.stderr.startswith('error: ')
        assert done.stderr.count('\n') == 1
