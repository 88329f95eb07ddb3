"""A dataset as uint8 images and integer labels: loading, splitting, the order of an epoch, placement on devices.

Shapes: N examples, H height, W width, C channels, S steps, D devices, B examples per device and step.

`python -m flax_dlvc.data --dataset cifar10 --archive PATH` prepares CIFAR-10 or CIFAR-100 from an official archive;
`python -m flax_dlvc.data --config FILE --show OUT.png` draws images as the model sees them in training.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from flax_dlvc import decoded
from flax_dlvc.decoded import Split
from flax_dlvc.errors import ArgumentParser, ConfigError, named_path, run_command
from flax_dlvc.folder import SPLITS, Folder
from flax_dlvc.profiling import timed
from flax_dlvc.words import plural

# Per-channel statistics of CIFAR-10's 50,000 training images in [0, 1]. Other datasets' are of their training
# split.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)

SMALLEST_IMAGES = {'cnn': 8, 'airbench': 9}  # pixels: each halves an image three times, airbench one without its edge
PREPARABLE = ('cifar10', 'cifar100')  # datasets that are prepared from their official archive, without TensorFlow


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three disjoint splits, the names of the classes, and the training images' mean and deviation per channel.

    `validation` may be empty.
    """

    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    validation: Split
    test: Split

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        return self.train.images.shape[1:]

    def describe(self) -> dict[str, Any]:
        """All but the examples, of whose labels there is a checksum; `without_examples` makes a dataset of it."""
        splits = {split: getattr(self, split) for split in SPLITS}
        description: dict[str, Any] = {
            'name': self.name,
            'class_names': list(self.class_names),
            'image_shape': list(self.image_shape),
            'mean': list(self.mean),
            'std': list(self.std),
            'num_examples': {name: len(split) for name, split in splits.items()},
        }
        if self.train.labels.min() >= 0:
            description['labels_crc32'] = {
                name: zlib.crc32(split.labels.astype('<i4').tobytes()) for name, split in splits.items()
            }
        return description


def without_examples(description: dict[str, Any]) -> Dataset:
    """A dataset as `Dataset.describe` told it; its images are black, its labels -1, and neither takes memory.

    Raises:
        KeyError, TypeError, ValueError: the description is not one.
    """
    height, width, channels = description['image_shape']
    splits = {
        split: Split(np.broadcast_to(np.uint8(0), (size, height, width, channels)), np.broadcast_to(np.int32(-1), size))
        for split, size in description['num_examples'].items()
    }
    mean, std = tuple(map(float, description['mean'])), tuple(map(float, description['std']))
    return Dataset(description['name'], tuple(description['class_names']), mean, std, **splits)


def is_same(description: dict[str, Any], other: dict[str, Any], tolerance: float) -> bool:
    """Whether two of `Dataset.describe` tell of the same data, moments to a relative tolerance.

    Other examples are told by their number, by their labels, of which runs of earlier versions know nothing, and by
    mean and deviation of the training split, which are CIFAR-10's constants there. Those of earlier versions are as
    their machine rounded.
    """
    pairs = zip(*(each['mean'] + each['std'] for each in (description, other)), strict=False)
    return all(math.isclose(a, b, rel_tol=tolerance) for a, b in pairs) and all(
        description[key] == other[key] for key in (description.keys() & other.keys()) - {'mean', 'std'}
    )


@timed('data')
def load(config: ConfigDict) -> Dataset:
    """Loads the dataset that a config names; CIFAR-10 and CIFAR-100 are prepared first where they are not yet.

    Args:
        config: a valid config; `dataset`, `splits`, `batch_size` and `model.patch_size` are read.

    Raises:
        ConfigError: unknown or unprepared dataset, a slice that is malformed, empty or overlaps another, images of
            mixed sizes, labels outside the classes, an own validation split that is left out, or a config that does not
            fit the data.
    """
    source = _open(config.dataset)
    specs = {split: config.splits[split] for split in SPLITS}
    slices = {
        split: [] if split == 'validation' and spec == '' else _parse_slice(spec, source.sizes)
        for split, spec in specs.items()
    }
    _check_disjoint(slices)
    _check_validation(source, slices)
    read = cache(source.read)  # two slices of a split are the rule, and each reading looks at its checksums
    splits = {split: _take(read, ranges) for split, ranges in slices.items() if ranges}
    train = splits['train']
    splits.setdefault('validation', Split(train.images[:0], train.labels[:0]))
    statistics = (CIFAR10_MEAN, CIFAR10_STD)
    mean, std = statistics if config.dataset == 'cifar10' else channel_statistics(splits['train'].images)
    dataset = Dataset(config.dataset, source.class_names, mean, std, **splits)
    _check_fit(config, dataset)
    return dataset


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation per channel of uint8 images (N, H, W, C), on the scale [0, 1].

    In whole numbers up to the last step: the same digits on every machine.
    """
    means, deviations = [], []
    for channel in range(images.shape[-1]):
        counts = np.zeros(256, np.int64)
        for start in range(0, len(images), 1000):  # which `bincount` copies to eight times the memory
            counts += np.bincount(images[start : start + 1000, ..., channel].reshape(-1), minlength=256)
        number, total, squares = (
            sum(count * value**power for value, count in enumerate(counts.tolist())) for power in range(3)
        )
        means.append(total / (255 * number))
        # A constant channel carries nothing; dividing by one keeps it finite.
        deviations.append(math.sqrt(number * squares - total**2) / (255 * number) or 1.0)
    return tuple(means), tuple(deviations)


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, a permutation (N,) int32: a pure function of its arguments."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return generator.permutation(num_examples).astype(np.int32)


def training_batches(order: np.ndarray, batch_size: int, num_devices: int) -> np.ndarray:
    """Cuts an epoch's order (N,) into steps (S, D, B); the last N mod batch_size examples sit this epoch out."""
    num_steps = len(order) // batch_size
    return order[: num_steps * batch_size].reshape(num_steps, num_devices, batch_size // num_devices)


def evaluation_batches(num_examples: int, batch_size: int, num_devices: int) -> np.ndarray:
    """Every example once, in order, as steps (S, D, B) int32; -1 fills the last step up."""
    per_device = -(-min(batch_size, num_examples) // num_devices)
    num_steps = -(-num_examples // (per_device * num_devices))
    indices = np.full(num_steps * num_devices * per_device, -1, np.int32)
    indices[:num_examples] = np.arange(num_examples)
    return indices.reshape(num_steps, num_devices, per_device)


def place(split: Split, sharding: Any) -> tuple[Any, Any]:
    """Puts a split's images and labels on devices; on a single CPU device they stay mapped where they are."""
    import jax

    return jax.device_put((split.images, split.labels), sharding)


# Slices


def _parse_slice(spec: str, sizes: dict[str, int]) -> list[tuple[str, int, int]]:
    """Turns a TFDS slice such as 'train[:80%]+test[:10]' into (split, start, stop) ranges."""
    import tensorflow_datasets as tfds

    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0, filename_template=None)
        for name, size in sizes.items()
    }
    try:
        instructions = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
    except (AssertionError, KeyError, ValueError) as error:
        available = ', '.join(f'{name} ({size:,})' for name, size in sizes.items())
        raise ConfigError(f'splits: {spec!r} is not a slice of the available splits: {available}') from error
    ranges = []
    for instruction in instructions:
        start, stop, _ = slice(instruction.from_, instruction.to).indices(sizes[instruction.splitname])
        if stop <= start:
            size = sizes[instruction.splitname]
            raise ConfigError(f'splits: {spec!r} holds no examples; {instruction.splitname} has {size:,}')
        ranges.append((instruction.splitname, start, stop))
    return ranges


def _check_disjoint(slices: dict[str, list[tuple[str, int, int]]]) -> None:
    ranges = sorted((*range_, split) for split, ranges in slices.items() for range_ in ranges)
    for (base, _, stop, split), (next_base, next_start, _, next_split) in itertools.pairwise(ranges):
        if base == next_base and next_start < stop:
            names = ' and '.join(dict.fromkeys((f'splits.{split}', f'splits.{next_split}')))
            raise ConfigError(f'{names}: slices share examples of {base!r}; make them disjoint')


def _check_validation(source: '_Digits | Folder | _Tfds', slices: dict[str, list[tuple[str, int, int]]]) -> None:
    """A validation split that somebody made is there to be used, unless no validation is asked for."""
    used = {base for ranges in slices.values() for base, _, _ in ranges}
    if 'validation' in source.sizes and 'validation' not in used and slices['validation']:
        raise ConfigError(
            'the dataset has a validation split of its own; to use it, say '
            '--config.splits.train=train --config.splits.validation=validation'
        )


def _take(read: Callable[[str], Split], ranges: list[tuple[str, int, int]]) -> Split:
    parts = []
    for base, start, stop in ranges:
        split = read(base)
        parts.append(Split(split.images[start:stop], split.labels[start:stop]))
    if len(parts) == 1:
        return parts[0]
    if len({part.images.shape[1:] for part in parts}) > 1:
        raise ConfigError(f'splits: {" + ".join(base for base, _, _ in ranges)} hold images of different sizes')
    return Split(np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts]))


def _check_fit(config: ConfigDict, dataset: Dataset) -> None:
    height, width, channels = dataset.image_shape
    if channels not in (1, 3):
        raise ConfigError(f'{dataset.name}: the images have {channels} channels, and only one or three can be used')
    smallest = SMALLEST_IMAGES.get(config.model.name, 1)
    if min(height, width) < smallest:
        raise ConfigError(
            f'{dataset.name}: the {height}x{width} images are too small for the {config.model.name}, which needs '
            f'{smallest}x{smallest}; set --config.model.name'
        )
    if len({split.images.shape[1:] for split in (dataset.train, dataset.validation, dataset.test)}) > 1:
        raise ConfigError(f'{dataset.name}: the splits hold images of different sizes')
    if config.batch_size > len(dataset.train):
        raise ConfigError(
            f'batch_size {config.batch_size} is larger than the training split of {len(dataset.train)} examples; '
            'set --config.batch_size'
        )
    if config.model.name == 'vit' and (height % config.model.patch_size or width % config.model.patch_size):
        raise ConfigError(f'model.patch_size {config.model.patch_size} does not divide the {height}x{width} images')


# Sources: a dict of split sizes, class names, and `read(split)`


def _open(name: str) -> '_Digits | Folder | _Tfds':
    if name == 'digits':
        return _Digits()
    if name == 'folder:':  # of an empty shell variable; the current directory is folder:.
        raise ConfigError("dataset 'folder:' names no folder; set --config.dataset=folder:PATH")
    if name.startswith('folder:'):
        return Folder(Path(name.removeprefix('folder:')))
    return _Tfds(name)


class _Digits:
    """scikit-learn's 1,797 handwritten digits (UCI, 8x8, 17 grey levels), enlarged to 32x32x3.

    300 examples are the test split. Both it and every leading share of the training examples that is a multiple of
    20 % are stratified: the same classes in the same proportions, within two examples.
    """

    class_names = tuple(str(digit) for digit in range(10))
    sizes = {'train': 1497, 'test': 300}  # noqa: RUF012, a constant

    def read(self, split: str) -> Split:
        version = importlib.metadata.version('scikit-learn')  # which takes a second to import
        return decoded.load(f'digits/{split}', version, partial(self._decode, split))

    def _decode(self, split: str, building: Path) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import StratifiedKFold, train_test_split

        digits, labels = load_digits(return_X_y=True)
        train, test = train_test_split(
            np.arange(len(labels)), test_size=self.sizes['test'], stratify=labels, random_state=0
        )
        if split == 'train':
            folds = StratifiedKFold(5, shuffle=True, random_state=0).split(train, labels[train])
            chosen = np.concatenate([train[fold] for _, fold in folds])
        else:
            chosen = test

        def read(indices: Sequence[int]) -> Iterator[tuple[np.ndarray, int]]:
            for index in chosen[indices]:
                small = np.rint(digits[index].reshape(8, 8, 1) * (255 / 16)).astype(np.uint8)
                yield np.broadcast_to(small.repeat(4, axis=0).repeat(4, axis=1), (32, 32, 3)), labels[index]

        decoded.write(building, f'digits {split}', len(chosen), (32, 32, 3), read)


def _is_no_advice_of_tfds(record: logging.LogRecord) -> bool:
    """TFDS recommends OpenCV at every decode."""
    return record.levelno >= logging.ERROR or '/tensorflow_datasets/' not in record.pathname


class _Tfds:
    """A dataset that TFDS has prepared as ArrayRecord files, decoded once into arrays that later starts map."""

    def __init__(self, name: str):
        logging.getLogger('absl').addFilter(_is_no_advice_of_tfds)
        import tensorflow_datasets as tfds
        from google.protobuf.json_format import ParseError

        try:
            self._builder = tfds.builder(name)
            if not self._builder.info.splits and name in PREPARABLE:
                from flax_dlvc import archive

                archive.prepare(name, Path(tfds.core.constants.DATA_DIR), None)
                self._builder = tfds.builder(name)
        except (OSError, json.JSONDecodeError, ParseError, tfds.core.dataset_info.DatasetInfoFileError) as error:
            raise ConfigError(f'{name} is damaged in {tfds.core.constants.DATA_DIR}: {error}') from error
        except (tfds.core.DatasetNotFoundError, AssertionError, ValueError, ImportError) as error:
            raise ConfigError(f"dataset {name!r} is neither 'digits', folder:PATH nor a TFDS dataset") from error
        self._name = name
        info = self._builder.info
        if not info.splits:
            raise ConfigError(
                f'{name} is not prepared in {tfds.core.constants.DATA_DIR}: prepare it with TFDS as array_record, '
                'set TFDS_DATA_DIR, or use the embedded --config.dataset=digits'
            )
        if not {'image', 'label'} <= set(info.features or ()) or not hasattr(info.features['label'], 'num_classes'):
            raise ConfigError(f"{name} has no 'image' with a class 'label'")
        self.class_names = tuple(info.features['label'].names)
        self.sizes = {split: info.splits[split].num_examples for split in info.splits}

    def read(self, split: str) -> Split:
        source = Path(self._builder.data_path)
        digest = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:12]
        name = f'{self._name}-{self._builder.version}-{digest}/{split}'
        return decoded.load(name, _fingerprint(source, split), partial(self._decode, split))

    def _decode(self, split: str, building: Path) -> None:
        from PIL import UnidentifiedImageError

        source, size = self._builder.data_path, self.sizes[split]
        try:
            examples = self._builder.as_data_source(split)
            first = examples[0]['image']
            shape = first.shape
            if first.dtype != np.uint8:  # one type for all, which would be wrapped into uint8
                raise ConfigError(f'{self._name} has images of type {first.dtype}; only uint8 can be used')

            def read(indices: Sequence[int]) -> Iterator[tuple[np.ndarray, int]]:
                for index, example in zip(indices, examples.__getitems__(indices), strict=True):
                    image, label = example['image'], example['label']
                    if image.shape != shape:
                        raise ConfigError(
                            f'{self._name}: image {index} of {split!r} is {image.shape}, the first is {shape}; '
                            'only images of one size can be used'
                        )
                    if not 0 <= label < len(self.class_names):
                        raise ConfigError(
                            f'{self._name}: {split!r} has labels outside its {len(self.class_names)} classes'
                        )
                    yield image, label

            decoded.write(building, f'{self._name} {split}', size, shape, read)
        except NotImplementedError as error:  # TFDS reads single examples of ArrayRecord files alone
            raise ConfigError(
                f'{self._name} in {source} is not prepared as ArrayRecord files; prepare it with '
                'file_format="array_record", or set TFDS_DATA_DIR to another directory'
            ) from error
        except (RuntimeError, UnidentifiedImageError) as error:  # of array_record and Pillow
            raise ConfigError(f'{self._name}: {split!r} in {source} is damaged ({error}); prepare it again') from error


def _fingerprint(source: Path, split: str) -> str:
    """Changes when any file of a prepared split changes in size or time, or the dataset's description does."""
    digest = hashlib.sha256()
    for path in sorted(source.iterdir()):
        if path.suffix in ('.json', '.txt'):
            digest.update(path.read_bytes())
        elif f'-{split}.' in path.name:
            digest.update(f'{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}'.encode())
    return digest.hexdigest()


def show(argv: list[str]) -> None:
    """Draws images of the first training batch, augmented, with their labels."""
    from flax_dlvc import pictures
    from flax_dlvc.config import parse_command_line

    parser = ArgumentParser('python -m flax_dlvc.data', description=show.__doc__)
    parser.add_argument('--show', type=named_path, metavar='FILE.png', help='the picture to draw')
    arguments, config = parse_command_line(parser, argv)
    if not arguments.show:
        raise ConfigError('no picture to draw: say --show FILE.png')
    pictures.save_png(pictures.training_images(config, load(config)), arguments.show)
    print(f'{plural(min(pictures.NUM_SHOWN, config.batch_size), "image")} of {config.dataset}: {arguments.show}')


def main(argv: list[str]) -> None:
    """Prepares CIFAR-10 or CIFAR-100 in the TFDS data directory, or draws what a config's training sees."""
    if any(re.match('--?(config|show)', argument) for argument in argv[1:]):
        show(argv)
        return
    parser = ArgumentParser(
        'python -m flax_dlvc.data',
        description='Prepares CIFAR-10 or CIFAR-100 in TFDS_DATA_DIR, without TensorFlow.',
        epilog='--config FILE --show OUT.png draws what training sees',
    )
    parser.add_argument('--dataset', choices=PREPARABLE, required=True)
    parser.add_argument(
        '--archive', type=named_path, help='a downloaded official archive; without it, it is downloaded'
    )
    arguments = parser.parse_args(argv[1:])
    from tensorflow_datasets.core.constants import DATA_DIR

    from flax_dlvc import archive

    print(f'{arguments.dataset} is in {archive.prepare(arguments.dataset, Path(DATA_DIR), arguments.archive)}')


if __name__ == '__main__':
    run_command(main)
