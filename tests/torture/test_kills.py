"""Real runs, killed with SIGKILL at random moments until one of them ends: the result is that of a run left alone.

FLAX_DLVC_KILLS sets the number of kills; a run is killed in start-up, steps, validation, saving and the test alike.
"""

import os
import random
import signal
import subprocess

import jax
import numpy as np
import pytest
from conftest import ROOT, read_history, restore_latest

KILLS = int(os.environ.get('FLAX_DLVC_KILLS', '6'))
LONGEST_LIFE = 1.5  # seconds after a process has found its place

FLAGS = {
    'cnn': [],
    'vit': [f'--config.model.{field}=16' for field in ('embed_dim', 'hidden_dim')]
    + ['--config.model.num_heads=2', '--config.model.num_layers=1', '--config.model.patch_size=8'],
}


def live(process, seconds):
    """Lets a process live for a time after it has announced its run; returns its exit code, or None if it lives on."""
    for line in process.stdout:
        if ' parameters on digits ' in line:
            break
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


@pytest.mark.timeout(60 + 30 * KILLS)
@pytest.mark.parametrize('model', FLAGS)
def test_killed_again_and_again_a_run_ends_as_if_left_alone(tmp_path, start, command, small_run_flags, model):
    arguments = [
        'main',
        '--config',
        ROOT / 'configs' / f'{model}_dropout_augment.py',
        *small_run_flags,
        *FLAGS[model],
        '--config.num_epochs=12',
        '--config.checkpoint_every_steps=2',
        '--config.early_stopping.patience=0',
        '--config.ema_decay=0.9',
    ]
    done = command(*arguments, '--workdir', tmp_path / 'whole')
    assert done.returncode == 0, done.stderr

    moments = random.Random(model)
    killed, workdir = 0, tmp_path / 'killed'
    while killed < KILLS // len(FLAGS):
        process = start(*arguments, '--workdir', workdir)
        try:
            if live(process, moments.uniform(0, LONGEST_LIFE)) is None:
                process.send_signal(signal.SIGKILL)
                killed += 1
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode in (0, -signal.SIGKILL), stderr
        if process.returncode == 0:  # done before all kills: begin anew
            check(tmp_path / 'whole', workdir)
            workdir = tmp_path / f'killed after {killed}'
    done = command(*arguments, '--workdir', workdir)
    assert done.returncode == 0, done.stderr
    check(tmp_path / 'whole', workdir)


def check(whole, workdir):
    assert read_history(workdir) == read_history(whole)
    assert (workdir / 'result.json').read_text() == (whole / 'result.json').read_text()
    jax.tree.map(np.testing.assert_array_equal, restore_latest(workdir), restore_latest(whole))
