"""Checkpoints by Orbax: the latest, to resume from, and the best, to report; with everything that the loop needs."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from flax_dlvc.errors import ConfigError
from flax_dlvc.steps import TrainState
from flax_dlvc.stopping import Stopping


@dataclasses.dataclass(frozen=True)
class Progress:
    """What the loop remembers besides the training state.

    Attributes:
        history: a record per finished epoch, as in `metrics.jsonl`.
        stopping: the state of early stopping.
        best_step: the training step of the best checkpoint.
    """

    history: tuple[dict[str, Any], ...] = ()
    stopping: Stopping = dataclasses.field(default_factory=Stopping)
    best_step: int | None = None


class _LatestAndBest:
    """Orbax preservation policy: keeps the latest `keep_latest` checkpoints and the one of `best_step`."""

    def __init__(self, keep_latest: int):
        self.keep_latest = keep_latest
        self.best_step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        latest = {checkpoint.step for checkpoint in checkpoints[-self.keep_latest :]}
        return [checkpoint.step in latest or checkpoint.step == self.best_step for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints of a run directory, named by training step; a context manager that waits for the last save."""

    def __init__(self, workdir: Path, *, keep_latest: int = 1, read_only: bool = False):
        logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax logs every file it touches
        self.directory = workdir.resolve() / 'checkpoints'
        if read_only and not self.directory.is_dir():
            raise ConfigError(f'{workdir} has no checkpoints; is it a run directory?')
        self._policy = _LatestAndBest(keep_latest)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            read_only=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_handlers={'state': ocp.StandardCheckpointHandler(), 'progress': ocp.JsonCheckpointHandler()},
        )

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The training step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: Progress) -> None:
        """Saves asynchronously; the state may be freed as soon as this returns.

        A step that is saved already stays as it is: the same step always has the same state.
        """
        step = int(state.step)
        self._policy.best_step = progress.best_step
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(dataclasses.asdict(progress))
            ),
        )

    def wait(self) -> None:
        """Returns when the last save is complete."""
        self._manager.wait_until_finished()

    def restore(self, step: int, like: TrainState, sharding: jax.sharding.Sharding) -> tuple[TrainState, Progress]:
        """Restores the state and the progress of a step.

        Args:
            step: the training step.
            like: a state, or its shapes, with the structure, shapes and dtypes to expect.
            sharding: where to place every array.

        Raises:
            ConfigError: no such step, a damaged checkpoint, or one of another model.
        """
        if step not in self._manager.all_steps():
            steps = ', '.join(map(str, self._manager.all_steps())) or 'none'
            raise ConfigError(f'{self.directory} has no checkpoint of step {step}; there are: {steps}')
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like)
        try:
            saved = self._manager.item_metadata(step)['state']
            if _shapes(saved) != _shapes(target):
                raise ConfigError(f'{self.directory}: step {step} is of another model than config.json describes')
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore())
            )
            return restored['state'], _read_progress(restored['progress'])
        except ConfigError:
            raise
        except Exception as error:  # whatever Orbax, TensorStore and JSON make of a damaged file
            raise ConfigError(f'{self.directory}: the checkpoint of step {step} is damaged: {error}') from error

    def progress(self, step: int) -> Progress:
        """The progress alone of a step that exists."""
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
            return _read_progress(restored['progress'])
        except Exception as error:
            raise ConfigError(f'{self.directory}: the checkpoint of step {step} is damaged: {error}') from error

    def find(self, which: str) -> int:
        """Turns 'best', 'latest' or a number into a training step.

        Raises:
            ConfigError: there is no such checkpoint.
        """
        latest = self.latest_step
        if latest is None:
            raise ConfigError(f'{self.directory} holds no checkpoint')
        if which == 'latest':
            return latest
        if which == 'best':
            best = self.progress(latest).best_step
            if best is None:
                raise ConfigError(f'{self.directory}: no epoch is finished, so none is the best; try --step latest')
            return best
        if not which.isdecimal():
            raise ConfigError(f"--step must be 'best', 'latest' or a number of training steps, not {which!r}")
        return int(which)


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path, shape and dtype of every array: the same for a state and for what Orbax says it has saved of one."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): (tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in leaves
    }


def _read_progress(values: dict[str, Any]) -> Progress:
    return Progress(tuple(values['history']), Stopping(**values['stopping']), values['best_step'])
