"""The official CIFAR archives → a TFDS directory of ArrayRecord files, without TensorFlow and without unpickling.

The result is what `tfds.build` writes: the same features, ids (`train_00000` …), split names and order of examples, so
plain `tfds.builder(name, data_dir=…).as_data_source()` reads it. Images are stored as PNG, which loses nothing.

Sources: archives and their formats, https://www.cs.toronto.edu/~kriz/cifar.html; ids, keys and the order of examples
(sorted by the MD5 of split name and index), `tensorflow_datasets.image_classification.cifar` and
`tensorflow_datasets.core.hashing`.
"""

import contextlib
import gzip
import hashlib
import http.client
import pickletools
import queue
import sys
import tarfile
import tempfile
import threading
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from flax_dlvc.errors import ConfigError

ARCHIVE_URL = 'https://www.cs.toronto.edu/~kriz/'
NETWORK_TIMEOUT = 10.0  # seconds without an answer

# SHA-256 of each dataset's official archives. TFDS publishes those of the binary ones (`url_checksums/`), Keras those
# of the python ones (`keras.datasets`).
OFFICIAL_ARCHIVES = {
    'cifar10': {
        'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd': 'cifar-10-binary.tar.gz',
        '6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce': 'cifar-10-python.tar.gz',
    },
    'cifar100': {
        '58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec': 'cifar-100-binary.tar.gz',
        '85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7': 'cifar-100-python.tar.gz',
    },
}

_PIXELS = 3 * 32 * 32
_LARGEST_MEMBER = 160_000_000  # bytes; the largest official one is cifar-100-python/train with 155 MB


class _Label(NamedTuple):
    """A kind of label: its TFDS key, the archives' name for it (in the singular), the number of its classes."""

    key: str
    archive_key: str
    classes: int


class _Layout(NamedTuple):
    """The files of one kind of archive, in order; the names of the classes are in one file for each kind of label."""

    folder: str
    train: list[str]
    test: list[str]
    class_names: list[str]


# In the order in which the binary archives put the label bytes before the pixels.
_LABELS = {
    'cifar10': (_Label('label', 'label', 10),),
    'cifar100': (_Label('coarse_label', 'coarse_label', 20), _Label('label', 'fine_label', 100)),
}
_BATCHES = [f'data_batch_{number}' for number in range(1, 6)]
_BINARY = {
    'cifar10': _Layout(
        'cifar-10-batches-bin', [f'{batch}.bin' for batch in _BATCHES], ['test_batch.bin'], ['batches.meta.txt']
    ),
    'cifar100': _Layout(
        'cifar-100-binary', ['train.bin'], ['test.bin'], ['coarse_label_names.txt', 'fine_label_names.txt']
    ),
}
_PICKLED = {
    'cifar10': _Layout('cifar-10-batches-py', _BATCHES, ['test_batch'], ['batches.meta']),
    'cifar100': _Layout('cifar-100-python', ['train'], ['test'], ['meta', 'meta']),
}


class Split(NamedTuple):
    """One split, in the archive's order.

    Attributes:
        images: uint8, shape (n, 32, 32, 3).
        labels: TFDS key ('label'; for CIFAR-100 'coarse_label' too) → int64, shape (n,).
    """

    images: np.ndarray
    labels: dict[str, np.ndarray]


class Archive(NamedTuple):
    """What an archive holds.

    Attributes:
        splits: 'train' and 'test' → its examples.
        class_names: TFDS key → the names of its classes, by label.
    """

    splits: dict[str, Split]
    class_names: dict[str, list[str]]


def prepare(name: str, data_dir: Path, archive: Path | None) -> Path:
    """Makes the TFDS directory of a CIFAR dataset, or finds it made.

    The directory is written beside its place and renamed when complete: whoever looks there sees all of it or nothing,
    and of two processes at work at once the quicker one's stays.

    Args:
        name: 'cifar10' or 'cifar100'.
        data_dir: the TFDS data directory; made if missing.
        archive: a downloaded official archive, binary or python version, checked even where there is nothing to make;
            `None` downloads the binary one.

    Returns:
        The version directory, e.g. `data_dir/cifar10/3.0.2`.

    Raises:
        ConfigError: no network; an archive that cannot be read or is not an official one; a `data_dir` that cannot be
            written, or that holds the dataset in part or in another format.
    """
    import tensorflow_datasets as tfds

    directory = data_dir / name / str(tfds.builder_cls(name).VERSION)
    if archive:
        _check_official(archive, name)
    if directory.is_dir():
        _check_prepared(directory, name, data_dir)
        return directory
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{name}-', dir=data_dir) as scratch:
            if not archive:
                archive = _download(name, data_dir, Path(scratch))
                _check_official(archive, name)
            written = write_tfds(read_archive(archive, name), name, Path(scratch))
            directory.parent.mkdir(exist_ok=True)
            try:
                written.rename(directory)
            except OSError:
                if not directory.is_dir():  # else another process was quicker
                    raise
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of array_record
        raise ConfigError(
            f'cannot write {name} to {data_dir} ({error}): make room, or use another directory'
        ) from error
    return directory


def _check_prepared(directory: Path, name: str, data_dir: Path) -> None:
    """Refuses a directory that is there, but not whole or not in files that can be read without TensorFlow."""
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    try:
        info = tfds.builder(name, data_dir=data_dir).info
        usable = bool(info.splits) and info.file_format == tfds.core.FileFormat.ARRAY_RECORD
    except (OSError, ValueError, ParseError, tfds.core.dataset_info.DatasetInfoFileError):
        usable = False
    if not usable:
        raise ConfigError(
            f'{directory} holds no whole {name} in ArrayRecord files: move it away, or set TFDS_DATA_DIR to another '
            'directory'
        )


def _check_official(path: Path, name: str) -> None:
    """Refuses an archive that is not, byte for byte, an official one of the dataset."""
    try:
        with path.open('rb') as stream:
            digest = hashlib.file_digest(stream, 'sha256').hexdigest()
    except OSError as error:
        raise ConfigError(f'cannot read the archive {path} ({error.strerror}): check --archive') from error
    if digest not in OFFICIAL_ARCHIVES[name]:
        known = {file for files in OFFICIAL_ARCHIVES.values() for sum_, file in files.items() if sum_ == digest}
        found = f'it is {known.pop()}' if known else f'its SHA-256 is {digest}'
        wanted = ' or '.join(OFFICIAL_ARCHIVES[name].values())
        raise ConfigError(f'{path} is no official {name} archive ({found}): get {wanted} from {ARCHIVE_URL}')


def _download(name: str, data_dir: Path, scratch: Path) -> Path:
    """Downloads the binary archive into `scratch`."""
    file = next(iter(OFFICIAL_ARCHIVES[name].values()))
    try:
        with (
            _open_url(ARCHIVE_URL + file) as response,
            (scratch / file).open('wb') as stream,
            _progress(f'downloading {file}', response.length or 0) as advance,
        ):
            while block := response.read(1 << 18):
                stream.write(block)
                advance(len(block))
            if response.length:  # still to come
                raise ConnectionError('the connection broke off')
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(
            f'no {name} in {data_dir}, and {ARCHIVE_URL + file} cannot be downloaded ({error}): hand over a downloaded '
            f'archive with `python -m flax_dlvc.data --dataset {name} --archive PATH`, or train on the embedded '
            'dataset with --config.dataset=digits'
        ) from error
    return scratch / file


def _open_url(url: str) -> Any:
    """Opens a URL or fails in time, in a thread of its own as a name look-up obeys no timeout and may take minutes."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=NETWORK_TIMEOUT))
        except (OSError, http.client.HTTPException) as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=NETWORK_TIMEOUT + 1)
    except queue.Empty:
        raise TimeoutError('timed out') from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def read_archive(path: Path, name: str) -> Archive:
    """Reads an archive in memory; nothing is unpacked to disk, and nothing in it is run. It need not be official.

    Args:
        path: a `.tar.gz` in the format of the official binary or python archive, with any number of images.
        name: 'cifar10' or 'cifar100'.

    Returns:
        Its images, labels and class names.

    Raises:
        ConfigError: not such an archive, a damaged one, or one with members that have no place in it.
    """
    members = _read_members(path, {_BINARY[name].folder, _PICKLED[name].folder})
    labels = _LABELS[name]
    pickled = any(member.startswith(_PICKLED[name].folder) for member in members)
    folder, train, test, class_name_files = (_PICKLED if pickled else _BINARY)[name]
    try:
        splits = {
            split: _parse_split([members[f'{folder}/{file}'] for file in files], labels, pickled)
            for split, files in (('train', train), ('test', test))
        }
        class_names = {
            label.key: _parse_class_names(members[f'{folder}/{file}'], label, pickled)
            for label, file in zip(labels, class_name_files, strict=True)
        }
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f'{path} is no {name} archive, or damaged ({error}): get it from {ARCHIVE_URL}') from error
    return Archive(splits, class_names)


def _read_members(path: Path, folders: set[str]) -> dict[str, bytes]:
    """Reads the files in the folders; refuses an archive with any member that an official one cannot have."""
    members: dict[str, bytes] = {}
    try:
        with gzip.open(path) as content, tarfile.open(fileobj=content, mode='r:') as archive:
            for member in archive:
                place = PurePosixPath(member.name)
                if place.is_absolute() or '..' in place.parts or not (member.isreg() or member.isdir()):
                    raise ConfigError(f'{path} is unsafe: its member {member.name!r} is a link or leaves its folder')
                if member.size > _LARGEST_MEMBER or str(place) in members:
                    raise ConfigError(f'{path} is unsafe: its member {member.name!r} is too large or there twice')
                stream = archive.extractfile(member) if str(place.parent) in folders else None
                if stream is not None:
                    members[str(place)] = stream.read()
            while content.read(1 << 20):  # tarfile stops short of the end, where gzip has its checksum
                pass
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ConfigError(f'{path} is no readable .tar.gz ({error}): get it from {ARCHIVE_URL}') from error
    return members


def _parse_split(contents: list[bytes], labels: tuple[_Label, ...], pickled: bool) -> Split:
    """Parses the files of a split, in which an image is its red, then green, then blue plane, row by row."""
    batches = [(_parse_pickled if pickled else _parse_binary)(content, labels) for content in contents]
    pixels = np.concatenate([pixels for pixels, _ in batches])
    values = np.concatenate([values for _, values in batches], axis=1)
    if len(pixels) == 0 or pixels.shape != (values.shape[1], _PIXELS):
        raise ValueError(f'{values.shape[1]} labels for pixels of shape {pixels.shape}')
    if (values < 0).any() or (values >= [[label.classes] for label in labels]).any():
        raise ValueError('label out of range')
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Split(images, {label.key: row for label, row in zip(labels, values, strict=True)})


def _parse_binary(content: bytes, labels: tuple[_Label, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels, uint8 (n, 3072), and labels, int64 (kinds, n): each record is label bytes, then pixels."""
    records = np.frombuffer(content, np.uint8).reshape(-1, len(labels) + _PIXELS)
    return records[:, len(labels) :], records[:, : len(labels)].T.astype(np.int64)


def _parse_pickled(content: bytes, labels: tuple[_Label, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels, uint8 (n, 3072), and labels, int64 (kinds, n), from the pickle of a batch."""
    batch = _read_pickle(content)
    _, shape, _, fortran, data = batch['data'].state  # of a numpy array; its bytes are a string in Python 2
    pixels = np.frombuffer(data.encode('latin-1'), np.uint8).reshape(shape, order='F' if fortran else 'C')
    return pixels, np.array([batch[f'{label.archive_key}s'] for label in labels], dtype=np.int64)


def _parse_class_names(content: bytes, label: _Label, pickled: bool) -> list[str]:
    """Returns the names of a label's classes, by label."""
    names = _read_pickle(content)[f'{label.archive_key}_names'] if pickled else content.decode('ascii').split()
    if len(names) != label.classes or not all(isinstance(name, str) for name in names):
        raise ValueError(f'it names {len(names)} classes')
    return list(names)


class _Inert:
    """Stands for an object that a pickle asks to be made. None is; what its state would be is kept as it is."""

    state: Any = None


def _read_pickle(content: bytes) -> Any:
    """Reads the data in a Python 2 pickle (protocol 2) without unpickling, which could run anything.

    Only the opcodes of dictionaries, lists, tuples, strings, numbers and numpy arrays are known, and none calls
    anything. An array comes back as an `_Inert` with its state: (version, shape, dtype, Fortran order, bytes as str).
    An `Unpickler` that looks up nothing but numpy's array is no way out: damaged pickles make it take all memory.

    Raises:
        ValueError, or another error of a failed look-up: anything else in the pickle, or a damaged one.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def pop_from(start: int) -> list[Any]:
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(content):
        match opcode.name:
            case 'PROTO' | 'STOP':
                pass
            case 'BININT' | 'BININT1' | 'BININT2' | 'BINSTRING' | 'SHORT_BINSTRING' | 'NONE':
                stack.append(argument)
            case 'NEWTRUE' | 'NEWFALSE':
                stack.append(opcode.name == 'NEWTRUE')
            case 'EMPTY_DICT':
                stack.append({})
            case 'EMPTY_LIST':
                stack.append([])
            case 'MARK':
                marks.append(len(stack))
            case 'TUPLE':
                stack.append(tuple(pop_from(marks.pop())))
            case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
                stack.append(tuple(pop_from(-int(opcode.name[-1]))))
            case 'APPEND' | 'APPENDS':
                items = pop_from(marks.pop() if opcode.name == 'APPENDS' else -1)
                stack[-1].extend(items)
            case 'SETITEMS':
                items = pop_from(marks.pop())
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case 'BINPUT' | 'LONG_BINPUT':
                memo[argument] = stack[-1]
            case 'BINGET' | 'LONG_BINGET':
                stack.append(memo[argument])
            case 'GLOBAL' if argument in ('numpy.core.multiarray _reconstruct', 'numpy ndarray', 'numpy dtype'):
                stack.append(_Inert())
            case 'REDUCE':
                pop_from(-2)
                stack.append(_Inert())
            case 'BUILD':
                state = stack.pop()
                stack[-1].state = state
            case _:
                raise ValueError(f'its pickle has {opcode.name} {argument!r:.80}')
    return stack.pop()


def write_tfds(archive: Archive, name: str, data_dir: Path) -> Path:
    """Writes a dataset as TFDS would, in ArrayRecord files of one shard a split.

    Args:
        archive: the examples.
        name: 'cifar10' or 'cifar100'.
        data_dir: a TFDS data directory that has no such dataset yet.

    Returns:
        The version directory, e.g. `data_dir/cifar10/3.0.2`.

    Raises:
        OSError, RuntimeError: it cannot be written.
    """
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module
    from PIL import Image
    from tensorflow_datasets.core import hashing

    builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    directory = Path(builder.data_path)
    directory.mkdir(parents=True)
    for key, class_names in archive.class_names.items():
        builder.info.features[key].names = class_names
    infos = []
    with _progress(f'writing {name}', sum(len(split.images) for split in archive.splits.values())) as advance:
        for split_name, (images, labels) in archive.splits.items():
            template = tfds.core.ShardedFileTemplate(
                data_dir=builder.data_path, dataset_name=name, split=split_name, filetype_suffix='array_record'
            )
            path = template.sharded_filepath(shard_index=0, num_shards=1)
            writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
            size = 0
            for index in sorted(range(len(images)), key=hashing.Hasher(split_name).hash_key):
                example = {
                    'id': f'{split_name}_{index:05d}',
                    'image': Image.fromarray(images[index]),  # TFDS would need TensorFlow to encode an array
                    **{key: int(values[index]) for key, values in labels.items()},
                }
                record = builder.info.features.serialize_example(example)
                writer.write(record)
                size += len(record)
                advance(1)
            writer.close()
            infos.append(tfds.core.SplitInfo(split_name, [len(images)], size, filename_template=template))
    builder.info.set_splits(tfds.core.SplitDict(infos))
    builder.info.write_to_directory(builder.data_path)
    return directory


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows progress on stderr: a bar on a terminal, elsewhere a line at the start and one at the end."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total or None)
            yield lambda amount: bar.advance(task, amount)
    else:
        print(f'{what} …', file=sys.stderr)
        yield lambda amount: None
        print(f'{what}: done', file=sys.stderr)
