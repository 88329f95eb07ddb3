"""Real runs, killed with SIGKILL again and again until one of them ends: the result is that of a run left alone.

FLAX_DLVC_KILLS sets the number of kills. They come in turn while a process starts, at a random moment of its run
(steps, validation, test), and inside a save, as soon as the directory is seen that Orbax writes before renaming it.

What this does not catch: a machine that loses power. What a killed process has written is still written by the kernel,
so a missing fsync goes unnoticed.
"""

import contextlib
import os
import random
import signal
import subprocess
import time

import pytest
from conftest import ROOT, check_same_run

KILLS = int(os.environ.get('FLAX_DLVC_KILLS', '20'))

MODELS = ('cnn', 'vit')


def starting(process, workdir, chance):
    """Waits until a process is somewhere between its first import and its first step."""
    del workdir
    wait(process, chance.uniform(0, 4))


def running(process, workdir, chance):
    """Waits until a process has run for a time after it has announced its run."""
    del workdir
    for line in process.stdout:
        if ' parameters on digits ' in line:
            break
    wait(process, chance.uniform(0, 1.5))


def saving(process, workdir, chance):
    """Waits until a process is inside its first, second or third save."""
    for _ in range(chance.randint(1, 3)):
        for is_saving in (False, True):
            while process.poll() is None and is_saving != any(workdir.glob('checkpoints/*.orbax-checkpoint-tmp*')):
                time.sleep(0.0005)
    wait(process, chance.choice([0, 0.005, 0.02]))


def wait(process, seconds):
    """Waits, or less if the process ends."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


@pytest.mark.timeout(60 + 30 * KILLS)
@pytest.mark.parametrize('model', MODELS)
def test_killed_again_and_again_a_run_ends_as_if_left_alone(tmp_path, start, command, small_vit_flags, model):
    arguments = [
        'main',
        '--config',
        ROOT / 'configs' / f'{model}_dropout_augment.py',
        *small_vit_flags,
        '--config.num_epochs=8',
        '--config.checkpoint_every_steps=2',
        '--config.early_stopping.patience=0',
        '--config.ema_decay=0.9',
    ]
    done = command(*arguments, '--workdir', tmp_path / 'whole')
    assert done.returncode == 0, done.stderr

    chance = random.Random(model)
    killed = dict.fromkeys((saving, running, starting), 0)
    workdir = tmp_path / 'killed'
    while sum(killed.values()) < KILLS // len(MODELS):
        moment = min(killed, key=killed.get)
        process = start(*arguments, '--workdir', workdir)
        try:
            moment(process, workdir, chance)
            process.send_signal(signal.SIGKILL)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode in (0, -signal.SIGKILL), stderr
        if process.returncode == 0:  # done before all kills: begin anew
            check_same_run(workdir, tmp_path / 'whole')
            workdir = tmp_path / f'killed after {sum(killed.values())}'
        else:
            killed[moment] += 1
            print(f'{model}: {moment.__name__}, {sorted(path.name for path in workdir.glob("checkpoints/*"))}')
    done = command(*arguments, '--workdir', workdir)
    assert done.returncode == 0, done.stderr
    check_same_run(workdir, tmp_path / 'whole')
