"""Decoded images, kept as arrays that later starts map: made once, whole or not at all, and checked at every start.

Shapes: N examples, H height, W width, C channels.
"""

import dataclasses
import fcntl
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flax_dlvc.errors import ConfigError

_ARRAYS = ('images.npy', 'labels.npy')
_CHUNK = 500  # examples that a thread decodes at a time


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples: `images` (N, H, W, C) uint8 and `labels` (N,) int32, possibly mapped from a file."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def cache_directory() -> Path:
    """Where decoded images and compiled programs are kept: FLAX_DLVC_CACHE_DIR, or the user's cache directory."""
    if own := os.environ.get('FLAX_DLVC_CACHE_DIR'):
        return Path(own)
    try:
        return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'flax_dlvc'
    except RuntimeError as error:
        raise ConfigError(f'no directory for decoded images ({error}): set FLAX_DLVC_CACHE_DIR') from error


def load(name: str, fingerprint: str, decode: Callable[[Path], None]) -> Split:
    """Maps decoded arrays; decodes them first where they are missing, of another fingerprint, or damaged.

    Args:
        name: the arrays' directory, below the cache's.
        fingerprint: of the files that they are decoded from; changes when any of those does.
        decode: calls `write` with the directory that it is given.

    Raises:
        ConfigError: the cache cannot be written.
    """
    directory = cache_directory() / 'decoded' / name
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _lock(directory.with_suffix('.lock')):
            cached = _map_arrays(directory, fingerprint)
            if cached is None:
                _build(directory, fingerprint, decode)
                cached = _map_arrays(directory, fingerprint)
    except OSError as error:
        raise ConfigError(
            f'cannot keep decoded images in {directory}: {error.strerror or error}; set FLAX_DLVC_CACHE_DIR'
        ) from error
    if cached is None:
        raise ConfigError(f'{directory} changed while it was written; start again')
    return cached


def write(
    building: Path,
    what: str,
    size: int,
    shape: tuple[int, ...],
    read: Callable[[Sequence[int]], Iterable[tuple[np.ndarray, int]]],
) -> None:
    """Writes the arrays of `size` examples into a directory, with several threads.

    Args:
        building: the directory.
        what: what the progress bar calls it.
        size: N.
        shape: (H, W, C).
        read: the images (H, W, C) uint8 and labels at some of the positions 0 to N - 1.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    path = building / 'images.npy'
    images = np.lib.format.open_memmap(path, 'w+', np.uint8, (size, *shape))
    if hasattr(os, 'posix_fallocate'):  # else a page for which the disk has no room ends the process with SIGBUS
        with path.open('r+b') as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    labels = np.zeros(size, np.int32)

    def fill(indices: Sequence[int]) -> int:
        for index, (image, label) in zip(indices, read(indices), strict=True):
            images[index], labels[index] = image, label
        return len(indices)

    chunks = [range(start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK)]
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
    ):
        task = progress.add_task(f'decoding {what}', total=size)
        for count in pool.map(fill, chunks):
            progress.advance(task, count)
    images.flush()
    np.save(building / 'labels.npy', labels)


def _build(directory: Path, fingerprint: str, decode: Callable[[Path], None]) -> None:
    """Decodes into a new directory that then takes the old one's place; called by one process at a time."""
    prefix = f'.{directory.name}-'
    for left in directory.parent.glob(f'{prefix}*'):  # by a process that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=prefix) as temporary:
        building = Path(temporary) / directory.name
        building.mkdir()
        decode(building)
        (building / 'manifest.json').write_text(json.dumps(_manifest(fingerprint, building)))
        if directory.exists():
            shutil.rmtree(directory)
        building.rename(directory)


def _map_arrays(directory: Path, fingerprint: str) -> Split | None:
    """The decoded arrays, or None where they are missing, from other files than these, or damaged."""
    try:
        manifest = json.loads((directory / 'manifest.json').read_text())
        if manifest != _manifest(fingerprint, directory):
            return None
        return Split(*(np.load(directory / name, mmap_mode='r') for name in _ARRAYS))
    except (OSError, ValueError):
        return None


def _manifest(fingerprint: str, directory: Path) -> dict[str, Any]:
    """The source's fingerprint, and checksums of the arrays' files, headers included."""
    files = (np.memmap(directory / name, mode='r') for name in _ARRAYS)
    return {'source': fingerprint, 'crc32': [zlib.crc32(file.data) for file in files]}


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Lets one process at a time pass; the lock ends with its process."""
    with path.open('w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
