"""Checkpoints by Orbax: the latest, to resume from, and the best, to report; with everything that the loop needs.

A checkpoint is trusted only when its structure, its values' fingerprints and its text's checksum are those that were
saved. Orbax writes each one beside its place and renames it, so a crash leaves none half-written.
"""

import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import json
import logging
import os
import sys
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from flax_dlvc.distributed import barrier, is_main
from flax_dlvc.errors import ConfigError, StorageError, first_line
from flax_dlvc.profiling import timed
from flax_dlvc.rundir import write_text
from flax_dlvc.steps import TrainState
from flax_dlvc.stopping import Stopping

PROGRESS_FILE = 'metadata'  # in a checkpoint's directory `progress`


@dataclasses.dataclass(frozen=True)
class Progress:
    """What the loop remembers besides the training state.

    Attributes:
        history: a record per finished epoch, as in `metrics.jsonl`.
        stopping: the state of early stopping.
        best_step: the training step of the best checkpoint.
        rewinds: how often the run diverged and went back.
    """

    history: tuple[dict[str, Any], ...] = ()
    stopping: Stopping = dataclasses.field(default_factory=Stopping)
    best_step: int | None = None
    rewinds: int = 0


class DamagedError(Exception):
    """A checkpoint is not what was saved."""


class _LatestAndBest:
    """Orbax preservation policy: keeps the latest `keep_latest` checkpoints, and the best one as of each of them.

    An older one's, too, or a run that has to go on from it would miss its best.

    Attributes:
        best_steps: by training step, that of its checkpoint's `Progress`.
    """

    def __init__(self, keep_latest: int):
        self.keep_latest = keep_latest
        self.best_steps: dict[int, int | None] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        latest = {checkpoint.step for checkpoint in checkpoints[-self.keep_latest :]}
        kept = latest | {self.best_steps.get(step) for step in latest}
        return [checkpoint.step in kept for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints of a run directory, named by training step; a context manager that waits for the last save."""

    def __init__(self, workdir: Path, *, keep_latest: int = 1, read_only: bool = False):
        logging.getLogger('absl').addFilter(_is_not_of_orbax)
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
        try:
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=options,
                item_handlers={
                    'state': ocp.StandardCheckpointHandler(),
                    'progress': ocp.JsonCheckpointHandler(PROGRESS_FILE),
                },
            )
            self._opened = os.open(self.directory, os.O_RDONLY)  # while it is, no other directory gets its inode
        except OSError as error:
            raise StorageError(f'cannot write {self.directory}: {error.strerror or error}') from error

    def __enter__(self) -> 'Checkpoints':
        _ignore_closed_loops()
        return self

    @timed('saving')
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._manager.close()
        except Exception as failure:
            if error is None:
                raise self._storage_error(failure) from failure
        finally:
            os.close(self._opened)

    @property
    def steps(self) -> list[int]:
        """The training steps of all checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The training step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    @timed('saving')
    def save(self, state: TrainState, progress: Progress) -> None:
        """Saves asynchronously; the state may be freed as soon as this returns.

        A step that is saved already stays as it is, as the same step always has the same state. Where an epoch has
        ended since (the run was stopped in its validation) or the run was rewound, the progress alone is written anew.

        Raises:
            StorageError: this save or the one before failed.
            FloatingPointError: the state is not finite; it is not saved.
        """
        self._check_there()
        step = int(state.step)
        self._policy.best_steps[step] = progress.best_step
        if step in self.steps:
            self._renew(step, state, progress)
            return
        content = _content(state, progress)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(content)),
            )
        except Exception as error:  # whatever Orbax and TensorStore make of a full disk
            raise self._storage_error(error) from error

    def _renew(self, step: int, state: TrainState, progress: Progress) -> None:
        """Writes the progress of a saved step anew, where it has an epoch or a rewind more."""
        self.wait()
        known = self._content_if_whole(step)
        # All processes agree on these numbers; the speeds in their histories differ.
        if known:
            before = _progress(known)
            if (len(before.history), before.rewinds) == (len(progress.history), progress.rewinds):
                return
        content = _content(state, progress)
        if is_main():
            write_text(self.directory / str(step) / 'progress' / PROGRESS_FILE, json.dumps(content))
        barrier(f'progress of step {step}')

    @timed('saving')
    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises:
            StorageError: it failed.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._storage_error(error) from error

    @timed('saving')
    def restore(self, step: int, like: TrainState) -> tuple[TrainState, Progress]:
        """Restores the state and the progress of a step.

        Args:
            step: the training step.
            like: a state, or an abstract one, with the structure, shapes, dtypes and placement to expect.

        Raises:
            ConfigError: no such step, a damaged checkpoint, or one of another model.
            StorageError: the directory is gone.
        """
        self._check_there()
        if step not in self.steps:
            there_are = ', '.join(map(str, self.steps)) or 'none'
            raise ConfigError(f'{self.directory} has no checkpoint of step {step}; there are: {there_are}')
        try:
            return self._restore(step, like)
        except DamagedError as error:
            raise ConfigError(f'{self.directory}: the checkpoint of step {step} {error}') from error

    @timed('saving')
    def restore_latest(self, like: TrainState) -> tuple[TrainState, Progress] | None:
        """Restores the newest checkpoint that is whole; sets newer, damaged ones aside with a warning on stderr.

        Returns:
            None where there are no checkpoints.

        Raises:
            ConfigError: there are checkpoints, but none is whole, or not the best one; nothing is changed.
        """
        damaged: list[tuple[int, DamagedError]] = []
        for step in reversed(self.steps):
            try:
                restored = self._restore(step, like)
            except DamagedError as error:
                damaged.append((step, error))
                continue
            self._check_best(restored[1].best_step, step, like)
            for damaged_step, damage in damaged if is_main() else ():
                aside = self._set_aside(damaged_step)
                print(
                    f'warning: the checkpoint of step {damaged_step} {damage}; it is now {aside}, '
                    f'and the run goes on from step {step}',
                    file=sys.stderr,
                )
            if damaged:
                barrier(f'set aside above {step}')
                self._manager.reload()
            contents = {step: self._content_if_whole(step) for step in self.steps}
            self._policy.best_steps = {
                s: content['progress']['best_step'] for s, content in contents.items() if content
            }
            _tell_versions(step, contents[step]['versions'])
            return restored
        if damaged:
            newest, damage = damaged[0]
            raise ConfigError(
                f'{self.directory} holds no whole checkpoint: that of step {newest} {damage}; '
                'bring back the files or the version that it was saved with, or train anew in another --workdir'
            )
        return None

    def _check_best(self, best: int | None, newest: int, like: TrainState) -> None:
        """Checks that the best one is whole: else a run would train to its end, and only then find nothing to test."""
        if best in (None, newest):
            return
        try:
            self.restore(best, like)
        except ConfigError as error:
            raise ConfigError(
                f'{error}; it is the best of this run: test the newest with evaluate --step latest, '
                'or train anew in another --workdir'
            ) from error

    def find(self, which: str) -> int:
        """Turns 'best', 'latest' or a number into a training step.

        Raises:
            ConfigError: there is no such checkpoint.
        """
        steps = self.steps
        if not steps:
            raise ConfigError(f'{self.directory} holds no checkpoint')
        if which == 'latest':
            return steps[-1]
        if which == 'best':
            best = self._best_step()
            if best is None:
                raise ConfigError(f'{self.directory}: no epoch is finished, so none is the best; try --step latest')
            return best
        if not which.isdecimal():
            raise ConfigError(f"--step must be 'best', 'latest' or a number of training steps, not {which!r}")
        return int(which)

    def _best_step(self) -> int | None:
        """What the newest checkpoint says is the best; None where no epoch is finished."""
        newest = self.steps[-1]
        try:
            return _progress(self._read_content(newest)).best_step
        except DamagedError as error:
            raise ConfigError(
                f'{self.directory}: the checkpoint of step {newest} {error}; '
                'start the run again to go on from an older one, or name one with --step'
            ) from error

    @timed('saving')
    def rewind(self) -> None:
        """Removes what is newer than the best checkpoint; all of them, where no epoch is finished.

        Raises:
            StorageError: one cannot be removed, or the last save failed.
        """
        self.wait()
        best = self._best_step() if self.steps else None
        for step in self.steps:
            if best is None or step > best:
                try:
                    self._manager.delete(step)
                except OSError as error:
                    raise self._storage_error(error) from error

    def _restore(self, step: int, like: TrainState) -> tuple[TrainState, Progress]:
        content = self._read_content(step)
        with _orbax_errors_as_damage():
            saved = self._manager.item_metadata(step)['state']
            # Orbax would cast dtypes and leave out arrays silently.
            shapes = _shapes(saved)
        if not shapes:
            raise DamagedError('is damaged (its description is missing)')
        if different := dict(_shapes(like).items() ^ shapes.items()):
            raise DamagedError(f'has other arrays than its config and this code make, first {min(different)}')
        # By the paths of arrays: what is empty may be new since, or gone.
        targets = _by_path(like)
        target = jax.tree.map_with_path(lambda path, _: targets[_name(path)], saved)
        with _orbax_errors_as_damage():
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))
        arrays = _by_path(restored['state'])
        state = jax.tree.map_with_path(lambda path, _: arrays[_name(path)], like)
        fingerprints, finite = inspect(state)
        if fingerprints != content['fingerprints']:
            raise DamagedError('is damaged (its values are not those that were saved)')
        if not finite or int(state.step) != step:
            raise DamagedError('is damaged (its values are not finite, or of another step)')
        return state, _progress(content)

    def _read_content(self, step: int) -> dict[str, Any]:
        with _orbax_errors_as_damage():
            restored = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
            content = dict(restored['progress'])
            whole = content.pop('crc32') == _crc32(content)
        if not whole:
            raise DamagedError('is damaged (its progress is not what was saved)')
        return content

    def _content_if_whole(self, step: int) -> dict[str, Any]:
        try:
            return self._read_content(step)
        except DamagedError:
            return {}

    def _set_aside(self, step: int) -> Path:
        aside = self.directory.parent / 'damaged' / str(step)
        while aside.exists():
            aside = aside.with_name(f'{aside.name}x')
        try:
            aside.parent.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(aside)
        except OSError as error:
            raise self._storage_error(error) from error
        return aside

    def _check_there(self) -> None:
        """Orbax makes a directory anew that somebody has removed, and a save under way may have done so."""
        with contextlib.suppress(OSError):
            if os.path.samestat(self.directory.stat(), os.fstat(self._opened)):
                return
        raise self._storage_error(FileNotFoundError('it is gone'))

    def _storage_error(self, error: Exception) -> StorageError:
        # What Orbax gives up with a failed save would complain of it again, at the end of the process.
        logging.getLogger('asyncio').setLevel(logging.CRITICAL)
        warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
        return StorageError(
            f'cannot save to {self.directory} ({error}); the checkpoints before are whole: '
            'free space or mend the disk, and start again'
        )


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs every file it touches, and what we report ourselves."""
    return '/orbax/' not in record.pathname


@functools.cache
def _ignore_closed_loops() -> None:
    """Has nobody hear of TensorStore reporting to an event loop that a failed read or save closed; of the rest as ever.

    For good: some of it comes after the end.
    """
    before = sys.unraisablehook

    def report_unless_loop_is_closed(unraisable: Any) -> None:
        if str(unraisable.exc_value) != 'Event loop is closed':
            before(unraisable)

    sys.unraisablehook = report_unless_loop_is_closed


@contextlib.contextmanager
def _orbax_errors_as_damage() -> Iterator[None]:
    """Whatever Orbax, TensorStore and JSON make of a damaged file is a `DamagedError` with one short line."""
    try:
        yield
        return
    except Exception as error:
        # After that phrase TensorStore refers to an object's name.
        reason = first_line(error).split('. See full')[0][:160]
    # Reads that were under way are coroutines that nobody waits for; Python would complain of each when it drops it.
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    gc.collect()
    sys.unraisablehook = hook
    raise DamagedError(f'is damaged ({reason})')


def inspect(tree: Any) -> tuple[list[int], bool]:
    """A fingerprint (uint32) of each array of 16- or 32-bit numbers, the same on every backend; and: is all finite?

    Each word times an odd number of its place, summed modulo 2^32: a change of any one word always changes it.
    """
    if jax.default_backend() == 'cpu':  # no faster compiled, and a ViT's 246 arrays take XLA two seconds
        fingerprints, finite = _inspect(jax.tree.map(np.asarray, tree), np)
    else:
        fingerprints, finite = jax.device_get(jax.jit(_inspect, static_argnums=1)(tree, jnp))
    return [int(fingerprint) for fingerprint in fingerprints], bool(finite)


def _inspect(tree: Any, numpy: Any) -> tuple[list[Any], Any]:
    """The same as scalars of `numpy`, which is NumPy or JAX's."""

    def fingerprint(leaf: Any) -> Any:
        words = leaf.reshape(-1).view(f'uint{8 * leaf.dtype.itemsize}').astype(numpy.uint32)
        factors = numpy.arange(words.size, dtype=numpy.uint32) * numpy.uint32(0x9E3779B2) + numpy.uint32(1)
        return numpy.sum(words * factors, dtype=numpy.uint32)

    leaves = jax.tree.leaves(tree)
    finite = [numpy.isfinite(leaf).all() for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return [fingerprint(leaf) for leaf in leaves], numpy.all(numpy.stack(finite))


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what computes: the package ('' where it is run uninstalled), JAX and the libraries on it, Python."""
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
    found = {package: importlib.metadata.version(package) for package in packages}
    try:
        own = importlib.metadata.version('flax_dlvc')
    except importlib.metadata.PackageNotFoundError:
        own = ''
    return {'flax_dlvc': own} | found | {'python': '.'.join(map(str, sys.version_info[:3]))}


def _tell_versions(step: int, saved_by: dict[str, str]) -> None:
    """Warns where versions are not those that saved a step: they may round differently."""
    changed = [
        f'{name} {saved_by.get(name)} is now {version}'
        for name, version in versions().items()
        if saved_by.get(name) != version
    ]
    if changed and is_main():
        print(f'warning: since step {step} {", ".join(changed)}; the digits may change from here on', file=sys.stderr)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')


def _by_path(tree: Any) -> dict[str, Any]:
    """Path to array: the paths are the same for a state and for what Orbax says it has saved of one."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    return {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in _by_path(tree).items()}


def _crc32(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _content(state: TrainState, progress: Progress) -> dict[str, Any]:
    """What a checkpoint holds beside its state; raises a `FloatingPointError` where that is not finite."""
    fingerprints, finite = inspect(state)
    if not finite:
        raise FloatingPointError(f'the state of step {int(state.step)} is not finite')
    content: dict[str, Any] = {
        'progress': dataclasses.asdict(progress),
        'fingerprints': fingerprints,
        'versions': versions(),
    }
    content['crc32'] = _crc32(content)
    return content


def _progress(content: dict[str, Any]) -> Progress:
    values = dict(content['progress'])
    return Progress(tuple(values.pop('history')), Stopping(**values.pop('stopping')), **values)
