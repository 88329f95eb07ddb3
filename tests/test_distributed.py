"""Several processes as one run: real processes, real signals, CPU devices joined by gloo on loopback."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from conftest import ROOT, check_same_run, read_history

from flax_dlvc import distributed, rundir
from flax_dlvc.errors import PeerError

pytestmark = [pytest.mark.timeout(280), pytest.mark.usefixtures('quick_compilation')]


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


@pytest.fixture(scope='module')
def start_processes(start):
    """Starts a run of several processes, `devices` CPU devices each; none of them outlives the test."""
    with contextlib.ExitStack() as stack:

        def start_processes(count, devices, *arguments, **environment):
            environment |= {'COORDINATOR_ADDRESS': f'127.0.0.1:{free_port()}', 'NUM_PROCESSES': str(count)}
            environment |= {'JAX_NUM_CPU_DEVICES': str(devices)}
            processes = [start('main', *arguments, PROCESS_ID=str(process), **environment) for process in range(count)]
            for process in processes:
                stack.callback(process.wait)
                stack.callback(process.kill)
            return processes

        yield start_processes


def finish(processes, seconds=200):
    """Waits for all; returns exit codes, stdouts and stderrs."""
    end = time.monotonic() + seconds
    outputs = [process.communicate(timeout=max(1, end - time.monotonic())) for process in processes]
    return [process.returncode for process in processes], [out for out, _ in outputs], [err for _, err in outputs]


def finish_well(processes):
    """Waits for all, none of which may fail; returns their stdouts."""
    codes, outputs, errors = finish(processes)
    assert codes == [0] * len(processes), errors
    return outputs


def wait_for_checkpoint(workdir, seconds=120):
    """Waits for a checkpoint later than those that are there."""

    def steps():
        return {int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdecimal()}

    latest, end = max(steps(), default=0), time.monotonic() + seconds
    while max(steps(), default=0) <= latest:
        assert time.monotonic() < end, f'no checkpoint after step {latest} in {workdir}'
        time.sleep(0.05)


@pytest.fixture(scope='module')
def flags(small_vit_flags):
    """A small run on all devices of a small ViT with dropout, augmentation and averaging: all randomness there is."""
    return [
        *('--config', ROOT / 'configs' / 'vit_dropout_augment.py'),
        *(flag for flag in small_vit_flags if 'num_devices' not in flag),
        *('--config.ema_decay=0.9', '--config.early_stopping.patience=0', '--config.num_epochs=8'),
    ]


@pytest.fixture(scope='module')
def comparable(flags):
    """The same without dropout, whose masks depend on the devices, and shorter."""
    return [*flags, '--config.dropout_rate=0.0', '--config.num_epochs=4']


@pytest.fixture(scope='module')
def sgd(comparable):
    """Of AdamW's updates a wrong factor of the gradients would be gone; of SGD's it is not."""
    return [*comparable, '--config.optimizer.name=sgd', '--config.learning_rate=0.01']


@pytest.fixture(scope='module')
def sgd_on_one_device(tmp_path_factory, start_processes, sgd):
    """The directory of a run that those on more devices are compared with."""
    workdir = tmp_path_factory.mktemp('sgd') / 'run'
    finish_well(start_processes(1, 1, *sgd, '--workdir', workdir))
    return workdir


def check_close(workdir, expected):
    """That two runs differ by rounding at most."""
    for record, other in zip(read_history(workdir), read_history(expected), strict=True):
        for field in ('train_loss', 'validation_loss'):
            assert record[field] == pytest.approx(other[field], rel=1e-5), (workdir, field)
        for field in ('epoch', 'step', 'train_accuracy', 'validation_accuracy'):
            assert record[field] == other[field], (workdir, field)
    test, other = (json.loads((run / 'result.json').read_text())['test'] for run in (workdir, expected))
    assert test['cross_entropy'] == pytest.approx(other['cross_entropy'], rel=1e-5)
    assert test['per_class_accuracy'] == other['per_class_accuracy']
    test, other = (json.loads((run / 'evaluation-test.json').read_text()) for run in (workdir, expected))
    error = 'expected_calibration_error'  # of the predictions, which no device and no process has all of
    assert test[error] == pytest.approx(other[error], rel=1e-4)


@pytest.mark.parametrize(('processes', 'devices'), [(1, 2), (1, 4), (2, 2)])
def test_losses_do_not_depend_on_devices_and_processes(
    tmp_path, start_processes, sgd, sgd_on_one_device, processes, devices
):
    profile = ['--profile'] if processes > 1 else []
    started = start_processes(processes, devices, *sgd, *profile, '--workdir', tmp_path / 'run')
    outputs = finish_well(started)
    assert 'test, best epoch ' in outputs[0]
    assert all('accuracy' not in output for output in outputs[1:])
    assert [' s went:' in output for output in outputs] == [bool(profile), False][:processes]
    assert len(list(tmp_path.glob('run/profile/plugins/profile/*/*.xplane.pb'))) == len(profile)  # process 0 alone
    check_close(tmp_path / 'run', sgd_on_one_device)


def test_stopped_on_four_devices_it_goes_on_in_two_processes_and_is_evaluated_on_one(
    tmp_path, start_processes, command, comparable
):
    on_one = start_processes(1, 1, *comparable, '--workdir', tmp_path / 'whole')
    flags = [*comparable, '--workdir', tmp_path / 'run']
    (process,) = start_processes(1, 4, *flags, '--config.checkpoint_every_steps=1')
    wait_for_checkpoint(tmp_path / 'run')
    process.send_signal(signal.SIGTERM)
    codes, _, errors = finish([process])
    assert codes == [143], errors
    outputs = finish_well(start_processes(2, 2, *flags))
    assert 'going on after step' in outputs[0]
    finish_well(on_one)
    check_close(tmp_path / 'run', tmp_path / 'whole')

    done = command('evaluate', '--workdir', tmp_path / 'run')
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((tmp_path / 'run' / 'evaluation-test.json').read_text())
    test = json.loads((tmp_path / 'run' / 'result.json').read_text())['test']
    assert evaluation['cross_entropy'] == pytest.approx(test['cross_entropy'], rel=1e-5)
    assert evaluation['accuracy'] == test['accuracy']


def test_stopped_by_signals_and_killed_the_run_goes_on_to_the_same_bits(tmp_path, start_processes, flags):
    """A signal to either process stops both at the same step; where one is killed, the other does not wait for ever."""
    left_alone = start_processes(2, 1, *flags, '--workdir', tmp_path / 'whole')  # beside what waits for the dead

    flags = [*flags, '--workdir', tmp_path / 'run']
    for receiver in (0, 1):
        processes = start_processes(2, 1, *flags, '--config.checkpoint_every_minutes=0.0001')  # both agree when
        wait_for_checkpoint(tmp_path / 'run')
        processes[receiver].send_signal(signal.SIGTERM)
        codes, _, errors = finish(processes)
        assert codes == [143, 143], errors
        assert len({error.splitlines()[-1] for error in errors}) == 1  # the same step
        assert 'stopped by SIGTERM, saved at step' in errors[0]

    for victim in (1, 0):
        processes = start_processes(2, 1, *flags, '--config.checkpoint_every_steps=1')
        wait_for_checkpoint(tmp_path / 'run')
        processes[victim].kill()
        codes, _, errors = finish(processes)
        assert codes[victim] == -signal.SIGKILL
        if victim == 1:
            assert codes[0] == 5, errors[0]
            assert errors[0].startswith('error: process 1 of 2 on ') and 'is gone; start the run again' in errors[0]
            assert errors[0].count('\n') == 1
        else:  # JAX itself ends a process that has lost the coordination service, which is process 0's
            assert codes[1] not in (0, None), errors[1]
            assert 'the leader task' in errors[1].lower()
        assert not (tmp_path / 'run' / 'result.json').exists()

    outputs = finish_well(start_processes(2, 1, *flags))
    assert 'going on after step' in outputs[0]
    finish_well(left_alone)
    check_same_run(tmp_path / 'run', tmp_path / 'whole')


def test_processes_rewind_and_give_up_together(tmp_path, start_processes, sgd):
    diverging = ('--config.learning_rate=1e38', '--config.on_divergence=rewind', '--config.max_rewinds=1')
    codes, outputs, errors = finish(start_processes(2, 1, *sgd, *diverging, '--workdir', tmp_path / 'run'))
    assert codes == [3, 3], errors
    assert outputs[0].count('rewind 1 of at most 1: the training loss is nan at step') == 1
    assert all('go on with more --config.max_rewinds' in error and error.count('\n') == 1 for error in errors)
    assert rundir.read_failure(tmp_path / 'run')[1] == 3


# Two agreements, one after the other; in the first one process 0 wants something from its third call on, in the second
# process 1. A barrier stands for the result of the step before, for which a process waits.
_AGREE = """
import sys
from flax_dlvc import distributed
with distributed.joined():
    for who in range(2):
        agree = distributed.Agreement()
        answers = []
        for call in range(10):
            answers.append(agree(7 + who if call > 2 and distributed.process_id() == who else 0))
            distributed.barrier(f'{who}, {call}')
        print(answers, file=sys.stderr)
"""


def test_all_processes_act_on_the_same_call_and_each_agreement_begins_anew():
    environment = os.environ | {'COORDINATOR_ADDRESS': f'127.0.0.1:{free_port()}', 'NUM_PROCESSES': '2'}
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', _AGREE], env=environment | {'PROCESS_ID': number}, stderr=subprocess.PIPE, text=True
        )
        for number in '01'
    ]
    answers = [[json.loads(line) for line in process.communicate()[1].splitlines()] for process in processes]
    assert answers[0] == answers[1]
    for who, of_one in enumerate(answers[0]):
        first = of_one.index(7 + who)
        assert 3 <= first <= 6 and of_one == [0] * first + [7 + who] * (10 - first)


def test_what_fails_in_one_process_ends_all_with_its_message(tmp_path, start_processes, flags):
    flags = [*flags, '--workdir', tmp_path / 'run']
    (tmp_path / 'run').mkdir()
    with rundir.lock(tmp_path / 'run'):
        codes, _, errors = finish(start_processes(2, 1, *flags))
    assert codes == [2, 2], errors
    assert all('another process is training in' in error for error in errors)


@pytest.mark.parametrize(
    ('environment', 'message'),
    [
        ({'NUM_PROCESSES': '2', 'PROCESS_ID': '0'}, 'COORDINATOR_ADDRESS must be HOST:PORT'),
        ({'PROCESS_ID': '1'}, 'PROCESS_ID is 1, but NUM_PROCESSES is 1'),
        ({'NUM_PROCESSES': 'two'}, "NUM_PROCESSES must be a whole number, not 'two'"),
        ({'NUM_PROCESSES': '2', 'PROCESS_ID': '2', 'COORDINATOR_ADDRESS': 'localhost:1'}, 'PROCESS_ID is 2, but'),
        (
            {'NUM_PROCESSES': '2', 'COORDINATOR_ADDRESS': 'localhost:1', 'LOCAL_DEVICE_IDS': '0;1'},
            "LOCAL_DEVICE_IDS must be numbers with commas between them, not '0;1'",
        ),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(tmp_path, command_here, flags, environment, message):
    done = command_here('main', *flags, '--workdir', tmp_path / 'run', **environment)
    assert done.returncode == 2
    assert done.stderr.startswith('error: ') and message in done.stderr and done.stderr.count('\n') == 1
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('address', 'alone'),
    [
        ('127.0.0.1:1', True),
        ('127.0.1.1:1', True),
        ('localhost:80', True),
        ('[::1]:80', True),
        ('localhost.example:80', False),
        ('node127.0.0.1:80', False),
        ('10.127.0.1:80', False),
        ('node1:80', False),
    ],
)
def test_other_hosts_may_reach_the_coordinator_unless_its_address_says_otherwise(monkeypatch, address, alone):
    """A host's own name often resolves to a loopback address there, so that binding to it would shut all others out."""
    asked = {}

    def initialize(*_, **options):
        asked.update(options)
        raise RuntimeError('not in a test')

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    monkeypatch.setenv('COORDINATOR_ADDRESS', address)
    with pytest.raises(PeerError, match=f'cannot join the run at {re.escape(address)}: not in a test'):
        distributed._join()
    assert asked['coordinator_bind_address'] == (address if alone else None)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_the_others_can_be_stopped(tmp_path, flags, start, number):
    port = free_port()
    environment = {'COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'NUM_PROCESSES': '2', 'PROCESS_ID': '0'}
    process = start('main', *flags, '--workdir', tmp_path / 'run', **environment)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port)):
            break
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == -number
    assert not (tmp_path / 'run').exists()
