"""Trained models between run directories: out of one without its dataset, into a new one."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_dlvc import rundir, steps
from flax_dlvc.checkpoint import Checkpoints, Progress
from flax_dlvc.errors import ConfigError
from flax_dlvc.setup import Setup, prepare_backend


def load_trained(workdir: Path, which: str = 'best') -> tuple[Setup, dict[str, Any]]:
    """The setup and the model's variables of a run directory's checkpoint, on one device.

    Args:
        workdir: the run directory.
        which: 'best', 'latest' or a training step.

    Returns:
        The setup, whose dataset has no examples, and `{'params', 'batch_stats'}`.

    Raises:
        ConfigError: the directory or the checkpoint is missing, damaged, or not one of ours.
    """
    config, dataset = rundir.read_config(workdir), rundir.read_dataset(workdir)
    prepare_backend(1)
    setup = Setup(config, dataset, jax.local_devices()[:1])
    with Checkpoints(workdir, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(checkpoints.find(which), setup.abstract_state)
    return setup, state.variables


def save_as_run(workdir: Path, setup: Setup, variables: dict[str, Any]) -> None:
    """Makes a run directory whose only checkpoint, of step 0, holds these variables; it is evaluated like any other.

    Raises:
        ConfigError: the directory cannot be written, or holds a run already.
    """
    if (workdir / 'config.json').exists():
        raise ConfigError(f'{workdir} holds a run already; choose another --workdir')
    rundir.check(workdir, setup.config)
    state = with_variables(setup.create_state(), variables)
    rundir.create(workdir, setup.config)
    with rundir.lock(workdir):
        try:
            rundir.write_dataset(workdir, setup.dataset)
            with Checkpoints(workdir) as checkpoints:
                checkpoints.save(state, Progress(best_step=0))
                checkpoints.wait()
        except BaseException:  # what is left would pass for a run
            shutil.rmtree(workdir / 'checkpoints', ignore_errors=True)
            for name in ('dataset.json', 'config.json'):
                (workdir / name).unlink(missing_ok=True)
            raise


def with_variables(state: steps.TrainState, variables: dict[str, Any]) -> steps.TrainState:
    """The state with other parameters and batch statistics, placed where it is."""
    placed = jax.device_put(variables, state.step.sharding)
    return state.replace(**placed, ema=jax.tree.map(jnp.copy, placed) if state.ema else {})


def begin_from(workdir: Path, setup: Setup, state: steps.TrainState) -> tuple[steps.TrainState, list[str]]:
    """A fresh state that takes every variable of the same path and shape from a trained model's best checkpoint.

    Args:
        workdir: the run directory of the trained model.
        setup: of the run that begins.
        state: its initial state.

    Returns:
        The state, and the names of the variables that stay as they were initialised.

    Raises:
        ConfigError: the trained model cannot be had, or nothing of it fits.
    """
    chosen, reinitialized = _choose(workdir, setup, state)
    return with_variables(state, chosen), reinitialized


def check_origin(workdir: Path, setup: Setup) -> None:
    """Raises the `ConfigError` that `begin_from` would; only shapes of the run that begins are needed."""
    _choose(workdir, setup, setup.abstract_state)


def _choose(workdir: Path, setup: Setup, state: steps.TrainState) -> tuple[dict[str, Any], list[str]]:
    trained = dict(jax.tree_util.tree_leaves_with_path(load_trained(workdir)[1]))
    fresh = {'params': state.params, 'batch_stats': state.batch_stats}
    reinitialized: list[str] = []

    def choose(path: Any, leaf: jax.Array) -> Any:
        if path in trained and trained[path].shape == leaf.shape:
            return np.asarray(trained[path])
        reinitialized.append(jax.tree_util.keystr(path[1:], simple=True, separator='/'))
        return leaf

    chosen = jax.tree_util.tree_map_with_path(choose, fresh)
    if len(reinitialized) == len(jax.tree.leaves(fresh)):
        raise ConfigError(
            f'no array of {workdir} has the name and the shape of one of {setup.config.model.name}; '
            'choose another --config.init_from'
        )
    return chosen, reinitialized
