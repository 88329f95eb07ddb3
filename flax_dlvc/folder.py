"""A folder of image files as a dataset: a folder per class, or folders train, validation and test of such folders.

Any size and kind of image becomes 32x32, the size that the models are made for, as `images.read_image` does it for
predictions too: turned upright, opaque on white, scaled to cover, cropped to the middle. Where every file is greyscale
there is one channel, else three. Passed over are hidden files, and beside the folders what has no image's name.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flax_dlvc import decoded
from flax_dlvc.decoded import Split
from flax_dlvc.errors import ConfigError
from flax_dlvc.images import ImageError, has_image_name, is_greyscale, read_image, without_warnings

SIZE = 32  # pixels
TEST_SHARE = 0.2  # of the images of a folder without a test split of its own
SPLITS = ('train', 'validation', 'test')


class Folder:
    """Split sizes, class names (those of the folders, sorted), and `read(split)`.

    The examples of a split stand in an order in which every leading share holds the classes in the same proportions.
    Without splits of its own, a fifth of each class, at least one image, is the test split, the rest is for training.
    The order is that of the hashes of the files' names: the same everywhere, and hardly another for a file more.

    Raises:
        ConfigError: no such folder, fewer than two classes, a class without images or with too few for a test split,
            splits of different classes, or a folder or image in a place where it would not be used.
    """

    def __init__(self, path: Path):
        try:
            self._path = path.expanduser().absolute()  # for messages, which would not say relative to what
            folders = _list_folders(self._path)
            if 'train' in folders and _list_folders(folders['train']):  # else a class of that name
                self.class_names, files = self._read_splits(folders)
            elif folders and all(_is_split_by_another_name(folder) for folder in folders.values()):
                raise ConfigError(f'{path} holds {", ".join(folders)}: name them {", ".join(SPLITS)}, train at least')
            else:
                classes = _list_classes(self._path)
                self.class_names = tuple(classes)
                files = self._cut_off_test(classes)
        except OSError as error:
            raise ConfigError(f'cannot read {error.filename or path}: {error.strerror}') from error
        except RuntimeError as error:  # of `expanduser`
            raise ConfigError(f'cannot read {path}: {error}') from error
        self.sizes = {split: len(examples) for split, examples in files.items()}
        self._files = [example for examples in files.values() for example in examples]

    def _read_splits(self, folders: dict[str, Path]) -> tuple[tuple[str, ...], dict[str, list[tuple[Path, int]]]]:
        for name in folders:
            if name not in SPLITS:
                raise ConfigError(f'{folders[name]} is beside a folder train, but none of {", ".join(SPLITS)}')
        _refuse_loose(self._path)
        splits = {split: _list_classes(folders[split]) for split in SPLITS if split in folders}
        class_names = tuple(splits['train'])
        for split, classes in splits.items():
            differing = sorted({*classes} ^ {*class_names})
            if differing:
                raise ConfigError(f'{self._path}: train and {split} hold different classes: {", ".join(differing)}')
        return class_names, {split: _in_order(classes) for split, classes in splits.items()}

    def _cut_off_test(self, classes: dict[str, list[Path]]) -> dict[str, list[tuple[Path, int]]]:
        """The last of each class are for testing, so that every class is tested."""
        train, test = {}, {}
        for name, files in classes.items():
            if len(files) == 1:
                raise ConfigError(f'{self._path / name} has one image, but training and test need one each; add some')
            num_test = max(1, round(TEST_SHARE * len(files)))
            train[name], test[name] = files[:-num_test], files[-num_test:]
        return {'train': _in_order(train), 'test': _in_order(test)}

    def read(self, split: str) -> Split:
        """The examples of a split, mapped; the first time all of the folder is decoded."""
        names = list(self.sizes)
        start = sum(self.sizes[name] for name in names[: names.index(split)])
        stop = start + self.sizes[split]
        return Split(self._examples.images[start:stop], self._examples.labels[start:stop])

    @cached_property
    def _examples(self) -> Split:
        place = hashlib.sha256(os.fsencode(self._path.resolve())).hexdigest()[:12]
        try:
            fingerprint = self._fingerprint()
        except OSError as error:
            raise ConfigError(f'cannot read {error.filename}: {error.strerror}') from error
        return decoded.load(f'folder-{place}/all', fingerprint, self._decode)

    def _fingerprint(self) -> str:
        """Changes when a file comes, goes, or changes in class, size or time."""
        digest = hashlib.sha256(f'{SIZE} {self.sizes}'.encode())
        for path, label in self._files:
            status = path.stat()
            line = f'{path.relative_to(self._path)} {label} {status.st_size} {status.st_mtime_ns}\n'
            digest.update(os.fsencode(line))
        return digest.hexdigest()

    def _decode(self, building: Path) -> None:
        def read(indices: Sequence[int]) -> Iterator[tuple[np.ndarray, int]]:
            for path, label in (self._files[index] for index in indices):
                yield _or_complain(read_image, path, shape), label

        with without_warnings():
            shape = (SIZE, SIZE, 1 if all(_or_complain(is_greyscale, path) for path, _ in self._files) else 3)
            decoded.write(building, str(self._path), len(self._files), shape, read)


def _or_complain(read: Callable[..., Any], path: Path, *arguments: Any) -> Any:
    try:
        return read(path, *arguments)
    except ImageError as error:
        raise ConfigError(f'{path} is no image that can be used: {error}; mend it or take it away') from error


def _list_folders(path: Path) -> dict[str, Path]:
    return {folder.name: folder for folder in sorted(path.iterdir()) if folder.is_dir() and folder.name[0] != '.'}


def _is_split_by_another_name(folder: Path) -> bool:
    return folder.name.lower().startswith(('train', 'val', 'test')) and bool(_list_folders(folder))


def _list_files(folder: Path) -> Iterator[Path]:
    """Every file below a folder, links followed; hidden ones aside."""

    def complain(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(folder, onerror=complain, followlinks=True):
        folders[:] = [name for name in folders if name[0] != '.']
        yield from (Path(root, name) for name in names if name[0] != '.')


def _refuse_loose(path: Path) -> None:
    for file in sorted(path.iterdir()):
        if file.name[0] != '.' and has_image_name(file) and not file.is_dir():
            raise ConfigError(f'{file} is in no class; put it into the folder of one')


def _list_classes(path: Path) -> dict[str, list[Path]]:
    """The files of each class, at any depth below its folder, in the order of their names' hashes."""
    classes = {}
    for name, folder in _list_folders(path).items():
        if not _is_text(name):
            raise ConfigError(f'{path} holds a class whose name is not UTF-8, {name!r}; rename its folder')
        hashed = [(hashlib.sha256(os.fsencode(f'{name}/{file.name}')).digest(), file) for file in _list_files(folder)]
        if not hashed:
            raise ConfigError(f'{folder} is a class without images; fill it or take it away')
        classes[name] = [file for _, file in sorted(hashed)]
    if len(classes) < 2:
        raise ConfigError(f'{path} needs a folder for each of at least two classes; it has {len(classes)}')
    _refuse_loose(path)
    return classes


def _is_text(name: str) -> bool:
    """Whether a name can be written; Python reads other bytes as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _in_order(classes: dict[str, list[Path]]) -> list[tuple[Path, int]]:
    """Files and their labels such that every leading share holds each class in proportion, within an example or so."""
    places = []
    for label, files in enumerate(classes.values()):
        places += [((rank + 0.5) / len(files), label, file) for rank, file in enumerate(files)]
    return [(file, label) for _, label, file in sorted(places)]
