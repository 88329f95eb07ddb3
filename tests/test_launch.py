"""launch.sh: what it runs, and how it fails; the installation itself is what CI begins with."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

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


def test_flags_alone_are_the_quickstarts(installed):
    python, config = make_venv_that_installs(installed), ['--config', f'{installed}/configs/quickstart.py']
    for arguments, added in (
        (['--config.num_epochs=3', '--workdir', 'runs/a b'], config),
        (['-config.seed=1'], config),
        (['--config', 'configs/vit.py', '--config.seed=1'], []),
        (['--config.seed=1', '--config=configs/vit.py'], []),
    ):
        done = launch(installed, *arguments, PYTHON=python)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == ' '.join(['python -m flax_dlvc.main', *added, *arguments])


@pytest.mark.parametrize('arguments', [['-h'], ['--help'], ['--processes', '2', '--help']])
def test_help_is_the_files_header_and_sets_nothing_up(tmp_path, arguments):
    for name in ('launch.sh', 'pyproject.toml'):
        shutil.copy(ROOT / name, tmp_path / name)
    done = launch(tmp_path, *arguments, PYTHON='none')
    assert (done.returncode, done.stderr) == (0, '')
    lines = done.stdout.splitlines()
    assert lines[0] == 'Sets up .venv where that is needed, then runs the main job or any command in it.'
    assert lines[1:3] == [
        '',
        '  ./launch.sh                          the main job on the embedded data (configs/quickstart.py)',
    ]
    assert lines[-1].startswith('(HOST:PORT of process 0)')
    assert not (tmp_path / '.venv').exists()


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
    (installed / '.venv.lock').unlink()
    (installed / '.venv.lock').mkdir()  # as in a checkout that may only be read, no lock can be had, nor is one needed
    assert launch(installed, 'python', PYTHON=python).returncode == 0
    assert count.read_text() == 'x\nx\n'


@pytest.mark.parametrize(
    ('listing', 'extras'), [('GPU 0: NVIDIA H100 (UUID: GPU-1)', '[test,cuda12]'), ('No devices found', '[test]')]
)
def test_a_gpu_chooses_the_cuda_extra(installed, tmp_path, listing, extras):
    done = launch(installed, 'python', PYTHON=make_venv_that_installs(installed), PATH=with_gpus(tmp_path, listing))
    assert done.returncode == 0, done.stderr
    assert installation(done).endswith(f'{installed}{extras}')


def with_gpus(directory, listing):
    """A PATH with an nvidia-smi that lists these."""
    tools = directory / 'tools'
    tools.mkdir()
    (tools / 'nvidia-smi').write_text(f'#!/bin/sh\necho "{listing}"\n')
    (tools / 'nvidia-smi').chmod(0o755)
    return f'{tools}:{os.environ["PATH"]}'


def installation(done):
    return next(line for line in done.stdout.splitlines() if 'pip install' in line)


def test_nodes_with_and_without_gpus_share_a_checkout(installed, tmp_path):
    python, path = make_venv_that_installs(installed), with_gpus(tmp_path, 'GPU 0: NVIDIA H100 (UUID: GPU-1)')
    assert installation(launch(installed, 'python', PYTHON=python)).endswith('[test]')
    assert installation(launch(installed, 'python', PYTHON=python, PATH=path)).endswith('[test,cuda12]')
    for environment in ({}, {'PATH': path}):
        done = launch(installed, 'python', PYTHON=python, **environment)
        assert done.returncode == 0 and 'pip install' not in done.stdout
    with (installed / 'pyproject.toml').open('a') as file:
        file.write('# changed\n')
    assert installation(launch(installed, 'python', PYTHON=python)).endswith('[test,cuda12]')


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


IDENTITY = ['COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID', 'LOCAL_DEVICE_IDS', 'NCCL_SOCKET_IFNAME']


@pytest.fixture
def telling(installed):
    """The same, but python appends to `told` who it is."""
    told = ' '.join(f'{name}=${{{name}:-}}' for name in IDENTITY)
    python = installed / '.venv' / 'bin' / 'python'
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *socket*) echo 23456 ;; *flax*) echo "{told}" >>{installed}/told ;; esac\n'
    )
    make_venv_that_installs(installed)
    return installed


def who(directory):
    """What the processes told, by process."""
    lines = (directory / 'told').read_text().splitlines()
    said = [dict(field.split('=') for field in line.split(' ')) for line in lines]
    return sorted(said, key=lambda each: each['PROCESS_ID'])


def test_processes_of_one_machine_share_its_devices_on_loopback(telling):
    python = str(telling / 'fake-python')
    done = launch(telling, '--processes', '2', 'configs/cnn.py', PYTHON=python, CUDA_VISIBLE_DEVICES='0,1,2,3')
    assert done.returncode == 0, done.stderr
    first, second = who(telling)
    assert first == {
        'COORDINATOR_ADDRESS': '127.0.0.1:23456',
        'NUM_PROCESSES': '2',
        'PROCESS_ID': '0',
        'LOCAL_DEVICE_IDS': '0,1',
        'NCCL_SOCKET_IFNAME': 'lo',
    }
    assert second == first | {'PROCESS_ID': '1', 'LOCAL_DEVICE_IDS': '2,3'}


@pytest.mark.parametrize('count', ['0', 'two', ''])
def test_a_number_of_processes_that_is_none_is_one_line(installed, count):
    done = launch(installed, '--processes', count, 'configs/cnn.py')
    assert (done.returncode, done.stderr) == (2, f"error: --processes takes a number, not '{count}'\n")


def test_a_process_that_fails_is_named_and_its_exit_code_is_the_runs(installed):
    python = installed / '.venv' / 'bin' / 'python'
    python.write_text('#!/bin/sh\ncase "$*" in *flax*) [ "$PROCESS_ID" = 0 ] || exit 5 ;; *) echo 1 ;; esac\n')
    done = launch(installed, '--processes', '3', 'configs/cnn.py', PYTHON=make_venv_that_installs(installed))
    assert done.returncode == 5
    assert 'process 1 of 3 ended with exit code 5' in done.stderr


@pytest.fixture
def listening(installed):
    """The same, but python logs the signals that it gets; the logs of two processes, and how to wait for both."""
    python = installed / '.venv' / 'bin' / 'python'
    python.write_text(
        f"""#!{sys.executable}
import os, pathlib, signal, sys, time
if 'flax' not in ' '.join(sys.argv):
    sys.exit(print(23456))
log = pathlib.Path('{installed}') / ('log' + os.environ['PROCESS_ID'])
for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(each, lambda number, _: log.open('a').write(f'{{number}};'))
log.write_text('ready;')
end = time.monotonic() + 60
while log.read_text() == 'ready;' and time.monotonic() < end:
    time.sleep(0.05)
time.sleep(0.5)
sys.exit(128 + int(log.read_text().split(';')[1]))
"""
    )
    logs = [installed / f'log{process_id}' for process_id in range(2)]

    def wait():
        end = time.monotonic() + 60
        while not all(log.exists() and log.read_text() == 'ready;' for log in logs) and time.monotonic() < end:
            time.sleep(0.05)

    return logs, wait


TWO_PROCESSES = ('launch.sh', '--processes', '2', 'configs/cnn.py')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_each_process_once(installed, listening, number):
    logs, wait = listening
    process = subprocess.Popen(
        TWO_PROCESSES,
        executable=installed / 'launch.sh',
        env=os.environ | {'PYTHON': make_venv_that_installs(installed)},
        # A shell that was started with a signal ignored, as in the background or by nohup, cannot trap it.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    wait()
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert [log.read_text() for log in logs] == [f'ready;{int(number)};'] * 2


def test_ctrl_c_in_a_terminal_reaches_each_process_once(installed, listening):
    logs, wait = listening
    environment = os.environ | {'PYTHON': make_venv_that_installs(installed)}
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execve(installed / 'launch.sh', TWO_PROCESSES, environment)
    wait()
    os.write(terminal, b'\x03')
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130
    assert [log.read_text() for log in logs] == [f'ready;{int(signal.SIGINT)};'] * 2


SRUN = """#!/usr/bin/env bash
# A job of 2 nodes x 2 tasks, as SLURM describes it to each task; all nodes are this machine.
while [[ $1 == --* ]]; do echo "$1" >>"$SRUN_LOG"; shift; done
export SLURM_STEP_ID=0 SLURM_STEPID=0 SLURM_STEP_NODELIST='127.0.0.[1-2]' SLURM_STEP_NUM_NODES=2
export SLURM_STEP_NUM_TASKS=4 SLURM_STEP_TASKS_PER_NODE='2(x2)' SLURM_NTASKS=4 SLURM_NNODES=2
for task in 0 1 2 3; do
    SLURM_PROCID=$task SLURM_NODEID=$((task / 2)) SLURM_LOCALID=$((task % 2)) "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit; done
"""


@pytest.fixture
def slurm(tmp_path):
    """What a batch script of a job of 2 nodes x 2 tasks finds in its environment, and a stand-in for srun."""
    tools = tmp_path / 'tools'
    tools.mkdir()
    (tools / 'srun').write_text(SRUN)
    (tools / 'srun').chmod(0o755)
    job = {
        'SLURM_JOB_ID': str(os.getpid()),
        'SLURM_JOB_NUM_NODES': '2',
        'SLURM_NTASKS_PER_NODE': '2',
        'SLURM_PROCID': '0',
    }
    return job | {'PATH': f'{tools}:{os.environ["PATH"]}', 'SRUN_LOG': str(tmp_path / 'srun.log')}


def test_a_slurm_job_says_who_is_who(telling, slurm, tmp_path):
    python = str(telling / 'fake-python')
    done = launch(telling, 'configs/cnn.py', **slurm, PYTHON=python, CUDA_VISIBLE_DEVICES='0,1,2,3')
    assert done.returncode == 0, done.stderr
    processes = who(telling)
    assert [process['PROCESS_ID'] for process in processes] == ['0', '1', '2', '3']
    assert [process['LOCAL_DEVICE_IDS'] for process in processes] == ['0,1', '2,3'] * 2
    assert {process['NUM_PROCESSES'] for process in processes} == {'4'}
    (address,) = {process['COORDINATOR_ADDRESS'] for process in processes}
    assert address.startswith('127.0.0.1:')
    assert (tmp_path / 'srun.log').read_text() == '--kill-on-bad-exit=1\n'

    (telling / 'told').unlink()  # where SLURM shows each task its own devices, they are not shared out again
    launch(telling, 'configs/cnn.py', **slurm, PYTHON=python, CUDA_VISIBLE_DEVICES='0,1', SLURM_GPUS_PER_TASK='2')
    assert [process['LOCAL_DEVICE_IDS'] for process in who(telling)] == [''] * 4


@pytest.mark.parametrize(
    ('nodes', 'host'),
    [('gpu3', 'gpu3'), ('gpu[003-010,12]', 'gpu003'), ('a[7,9],b', 'a7'), ('left,right', 'left'), ('n-1.x', 'n-1.x')],
)
def test_process_0_is_on_the_first_node(telling, nodes, host):
    task = {'SLURM_JOB_ID': '1', 'SLURM_STEP_ID': '0', 'SLURM_STEP_NODELIST': nodes, 'SLURM_STEP_NUM_TASKS': '3'}
    task |= {'SLURM_PROCID': '2', 'SLURM_NODEID': '1', 'SLURM_LOCALID': '0', 'SLURM_STEP_TASKS_PER_NODE': '2,1'}
    done = launch(telling, 'configs/cnn.py', PYTHON=str(telling / 'fake-python'), **task)
    assert done.returncode == 0, done.stderr
    (process,) = who(telling)
    assert process['COORDINATOR_ADDRESS'] == f'{host}:12031'
    assert (process['PROCESS_ID'], process['NUM_PROCESSES']) == ('2', '3')


def test_open_mpi_says_who_is_who(telling):
    task = {'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': '1', 'OMPI_COMM_WORLD_LOCAL_RANK': '1'}
    python = str(telling / 'fake-python')
    done = launch(telling, 'configs/cnn.py', PYTHON=python, **task, OMPI_COMM_WORLD_LOCAL_SIZE='1')
    assert done.returncode == 2
    assert 'mpirun -x COORDINATOR_ADDRESS=HOST:PORT' in done.stderr
    done = launch(telling, 'configs/cnn.py', PYTHON=python, **task, OMPI_COMM_WORLD_LOCAL_SIZE='2')
    assert done.returncode == 0, done.stderr
    (process,) = who(telling)
    assert process['COORDINATOR_ADDRESS'].startswith('127.0.0.1:')
    assert (process['PROCESS_ID'], process['NUM_PROCESSES']) == ('1', '2')


@pytest.mark.usefixtures('quick_compilation')
def test_four_tasks_of_a_slurm_job_train_as_one_run(installed, slurm, small_vit_flags, tmp_path):
    python = installed / '.venv' / 'bin' / 'python'
    python.write_text(f'#!/bin/sh\ncase "$*" in *"pip install"*) ;; *) exec {sys.executable} "$@" ;; esac\n')
    done = launch(
        installed,
        ROOT / 'configs' / 'vit.py',
        *(flag for flag in small_vit_flags if 'num_devices' not in flag),
        '--config.num_epochs=1',
        f'--workdir={tmp_path / "run"}',
        **slurm,
        PYTHON=make_venv_that_installs(installed),
        PYTHONPATH=str(ROOT),
        JAX_NUM_CPU_DEVICES='1',
    )
    assert done.returncode == 0, done.stderr
    assert '4 x cpu in 4 processes' in done.stdout
    assert json.loads((tmp_path / 'run' / 'result.json').read_text())['epochs_run'] == 1
