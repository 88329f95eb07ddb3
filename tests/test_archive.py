import functools
import hashlib
import http.server
import io
import re
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from flax_dlvc import archive
from flax_dlvc.errors import ConfigError

CLASSES = {'cifar10': {'label': 10}, 'cifar100': {'coarse_label': 20, 'label': 100}}
KINDS = [(name, kind) for name in CLASSES for kind in ('binary', 'python')]
# Bytes of a batch's pickle that make a numpy array, around those that depend on the array.
ARRAY_HEAD = b'cnumpy.core.multiarray\n_reconstruct\nq\x06cnumpy\nndarray\nq\x07K\x00\x85U\x01b\x87Rq\x08(K\x01'
ARRAY_TYPE = b'cnumpy\ndtype\nq\x09U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'


def examples(name, count, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    labels = {key: rng.integers(0, classes, count, dtype=np.uint8) for key, classes in CLASSES[name].items()}
    return images, labels


def class_names(name, key):
    return [f'{key}_{number}' for number in range(CLASSES[name][key])]


def pickled_string(value):
    """As Python 2's cPickle writes a `str` at protocol 2."""
    return (b'U' + bytes([len(value)]) if len(value) < 256 else b'T' + struct.pack('<I', len(value))) + value


def pickled_list(items):
    return b']' + (b'(' + b''.join(items) + b'e' if len(items) > 1 else items[0] + b'a')


def pickled_dict(entries):
    return b'\x80\x02}q\x01(' + b''.join(pickled_string(key) + value for key, value in entries.items()) + b'u.'


def pickled_array(pixels, fortran):
    shape = b'M' + struct.pack('<H', len(pixels)) + b'M' + struct.pack('<H', 3072) + b'\x86'
    data = pickled_string(pixels.tobytes('F' if fortran else 'C'))
    return ARRAY_HEAD + shape + ARRAY_TYPE + (b'\x88' if fortran else b'\x89') + data + b'tb'


def pickled_batch(name, images, labels, fortran=False):
    keys = {'label': b'labels'} if name == 'cifar10' else {'label': b'fine_labels', 'coarse_label': b'coarse_labels'}
    columns = {keys[key]: pickled_list([b'K' + bytes([value]) for value in labels[key]]) for key in labels}
    file_names = [
        pickled_string(f'image_{number}.png'.encode()) + b'r\x00\x01\x00\x00' for number in range(len(images))
    ]
    return pickled_dict(
        {
            b'batch_label': pickled_string(b'batch 1') + b'q\x02',
            **columns,
            b'data': pickled_array(images.reshape(-1, 3072), fortran),
            b'filenames': pickled_list(file_names),
            b'the_label_again': b'h\x02',
        }
    )


def binary_batch(images, labels):
    return np.concatenate([*(column[:, None] for column in labels.values()), images.reshape(-1, 3072)], 1).tobytes()


def members(name, kind, splits):
    """The files of an archive; CIFAR-10's train split is spread over five."""
    names = {key: class_names(name, key) for key in CLASSES[name]}
    if kind == 'binary':
        batch = binary_batch
        folder = {'cifar10': 'cifar-10-batches-bin', 'cifar100': 'cifar-100-binary'}[name]
        file_of = {'label': 'batches.meta.txt' if name == 'cifar10' else 'fine_label_names.txt'}
        meta = {
            file_of.get(key, 'coarse_label_names.txt'): ('\n'.join(each) + '\n\n').encode()
            for key, each in names.items()
        }
    else:
        batch = functools.partial(pickled_batch, name)
        folder = {'cifar10': 'cifar-10-batches-py', 'cifar100': 'cifar-100-python'}[name]
        key_of = {'label': b'label_names' if name == 'cifar10' else b'fine_label_names'}
        entries = {
            key_of.get(key, b'coarse_label_names'): pickled_list([pickled_string(each.encode()) for each in names[key]])
            for key in names
        }
        meta = {'batches.meta' if name == 'cifar10' else 'meta': pickled_dict(entries)}
    suffix = '.bin' if kind == 'binary' else ''
    if name == 'cifar10':
        parts = np.array_split(np.arange(len(splits['train'][0])), 5)
        chosen = {f'data_batch_{number}': ('train', part) for number, part in enumerate(parts, 1)}
        chosen['test_batch'] = ('test', slice(None))
    else:
        chosen = {'train': ('train', slice(None)), 'test': ('test', slice(None))}
    batches = {
        file + suffix: batch(splits[split][0][part], {key: each[part] for key, each in splits[split][1].items()})
        for file, (split, part) in chosen.items()
    }
    return {f'{folder}/{file}': content for file, content in {'readme.html': b'-', **meta, **batches}.items()}


def write_tar(path, files, *others):
    with tarfile.open(path, 'w:gz', compresslevel=1) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in others:
            tar.fileobj.write(info.tobuf())  # `addfile` wants the content as well
    return path


@pytest.fixture
def official(monkeypatch):
    """Makes an archive count as an official one."""

    def make_official(path, name):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(archive.OFFICIAL_ARCHIVES, name, {digest: 'small.tar.gz'})
        return path

    return make_official


@pytest.fixture
def splits():
    return {'train': examples('cifar10', 12, 0), 'test': examples('cifar10', 6, 1)}


def refused(match, call, *arguments):
    with pytest.raises(ConfigError, match=match) as caught:
        call(*arguments)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(('name', 'kind'), KINDS)
def test_plain_tfds_reads_what_was_in_the_archive(tmp_path, official, name, kind, capfd):
    splits = {'train': examples(name, 12, 0), 'test': examples(name, 1, 1)}
    path = official(write_tar(tmp_path / 'a.tar.gz', members(name, kind, splits)), name)
    directory = archive.prepare(name, tmp_path / 'data', path)
    assert directory == tmp_path / 'data' / name / '3.0.2'
    assert [each.name for each in (tmp_path / 'data').iterdir()] == [name]
    assert capfd.readouterr() == ('', f'writing {name} …\nwriting {name}: done\n')

    builder = tfds.builder(name, data_dir=tmp_path / 'data')
    for key in CLASSES[name]:
        assert builder.info.features[key].names == class_names(name, key)
    for split, (images, labels) in splits.items():
        source = builder.as_data_source(split=split)
        found = {example['id'].decode(): example for example in source}
        assert sorted(found) == [f'{split}_{index:05d}' for index in range(len(images))] and len(source) == len(images)
        for index, image in enumerate(images):
            example = found[f'{split}_{index:05d}']
            assert set(example) == {'id', 'image', *CLASSES[name]}
            np.testing.assert_array_equal(example['image'], image.transpose(1, 2, 0))
            assert {key: example[key] for key in labels} == {key: labels[key][index] for key in labels}


def test_progress_bar_on_a_terminal(tmp_path, official, splits, monkeypatch, capsys):
    path = official(write_tar(tmp_path / 'a.tar.gz', members('cifar10', 'binary', splits)), 'cifar10')
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    archive.prepare('cifar10', tmp_path / 'data', path)
    out, error = capsys.readouterr()
    assert out == '' and 'writing cifar10' in error and '100%' in error


def test_metadata_is_that_of_tfds(tmp_path, official, splits):
    path = official(write_tar(tmp_path / 'a.tar.gz', members('cifar10', 'binary', splits)), 'cifar10')
    directory = archive.prepare('cifar10', tmp_path, path)
    assert sorted(each.name for each in directory.iterdir()) == [
        'cifar10-test.array_record-00000-of-00001',
        'cifar10-train.array_record-00000-of-00001',
        'dataset_info.json',
        'features.json',
        'label.labels.txt',
    ]
    info = (directory / 'dataset_info.json').read_text()
    assert '"fileFormat": "array_record"' in info and '"moduleName": "tensorflow_datasets.' in info
    assert str(tmp_path) not in info


def test_order_is_that_of_tfds(tmp_path):
    # The published CIFAR-10 begins 16399, 01680, 47917, 17307, 27051, 48736, 26263, 01456: of the first 1681 images,
    # number 1680 comes first and 1456 second.
    images, labels = np.zeros((1681, 32, 32, 3), np.uint8), {'label': np.zeros(1681, np.int64)}
    split = archive.Split(images, labels)
    archive.write_tfds(
        archive.Archive({'train': split}, {'label': class_names('cifar10', 'label')}), 'cifar10', tmp_path
    )
    source = tfds.builder('cifar10', data_dir=tmp_path).as_data_source(split='train')
    assert [source[index]['id'] for index in range(2)] == [b'train_01680', b'train_01456']


def test_arrays_in_fortran_order(tmp_path, splits):
    files = members('cifar10', 'python', splits)
    images, labels = splits['test']
    files['cifar-10-batches-py/test_batch'] = pickled_batch('cifar10', images, labels, fortran=True)
    read = archive.read_archive(write_tar(tmp_path / 'a.tar.gz', files), 'cifar10')
    np.testing.assert_array_equal(read.splits['test'].images, images.transpose(0, 2, 3, 1))


def test_a_pickle_that_refers_back(tmp_path, splits):
    names = pickled_list([pickled_string(each.encode()) for each in class_names('cifar10', 'label')])
    meta = pickled_dict({b'names': names + b'q\x05', b'label_names': b'h\x05'})
    files = change(members('cifar10', 'python', splits), 'batches.meta', meta)
    read = archive.read_archive(write_tar(tmp_path / 'a.tar.gz', files), 'cifar10')
    assert read.class_names == {'label': class_names('cifar10', 'label')}


def test_needs_no_tensorflow_and_imports_late(tmp_path, splits):
    path = write_tar(tmp_path / 'a.tar.gz', members('cifar10', 'python', splits))
    script = f"""
import sys, flax_dlvc.errors
from pathlib import Path
before = set(sys.modules)
from flax_dlvc import archive
assert not {{'tensorflow_datasets', 'rich', 'PIL', 'array_record'}} & (set(sys.modules) - before)
archive.write_tfds(archive.read_archive(Path({str(path)!r}), 'cifar10'), 'cifar10', Path({str(tmp_path / 'data')!r}))
assert 'tensorflow' not in sys.modules
"""
    subprocess.run([sys.executable, '-c', script], check=True)


def test_prepared_once(tmp_path, official, splits, monkeypatch):
    path = official(write_tar(tmp_path / 'a.tar.gz', members('cifar10', 'binary', splits)), 'cifar10')
    directory = archive.prepare('cifar10', tmp_path / 'data', path)
    for name in ('read_archive', '_download', 'write_tfds'):
        monkeypatch.setattr(archive, name, lambda *_: pytest.fail('prepared again'))
    for again in (path, None):
        assert archive.prepare('cifar10', tmp_path / 'data', again) == directory
    path.write_bytes(b'another one')
    refused('no official cifar10 archive', archive.prepare, 'cifar10', tmp_path / 'data', path)
    path.unlink()
    refused('cannot read the archive', archive.prepare, 'cifar10', tmp_path / 'data', path)


@pytest.mark.parametrize('found', ['nothing', 'half', 'another format'])
def test_what_is_there_but_cannot_be_used_is_named(tmp_path, official, splits, found):
    path = official(write_tar(tmp_path / 'a.tar.gz', members('cifar10', 'binary', splits)), 'cifar10')
    directory = archive.prepare('cifar10', tmp_path / 'tfds', path)
    if found == 'nothing':
        shutil.rmtree(directory)
        directory.mkdir()
    elif found == 'half':
        (directory / 'dataset_info.json').write_text('{')
    else:
        info = directory / 'dataset_info.json'
        info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    refused('no whole cifar10 in ArrayRecord files: move it', archive.prepare, 'cifar10', tmp_path / 'tfds', path)


def test_the_quicker_of_two_processes_wins(tmp_path, official, splits, monkeypatch):
    path = official(write_tar(tmp_path / 'a.tar.gz', members('cifar10', 'binary', splits)), 'cifar10')
    quicker = tmp_path / 'data' / 'cifar10' / '3.0.2' / 'dataset_info.json'
    write = archive.write_tfds

    def write_while_another_finishes(*arguments):
        written = write(*arguments)
        quicker.parent.mkdir(parents=True)
        quicker.write_text('the other one')
        return written

    monkeypatch.setattr(archive, 'write_tfds', write_while_another_finishes)
    assert archive.prepare('cifar10', tmp_path / 'data', path) == quicker.parent
    assert quicker.read_text() == 'the other one'
    assert [each.name for each in (tmp_path / 'data').iterdir()] == ['cifar10']


@pytest.mark.parametrize('failure', [KeyboardInterrupt(), OSError(28, 'No space left on device'), RuntimeError('full')])
def test_a_failure_leaves_nothing(tmp_path, official, splits, monkeypatch, failure):
    path = official(write_tar(tmp_path / 'a.tar.gz', members('cifar10', 'binary', splits)), 'cifar10')
    write = archive.write_tfds

    def write_then_fail(*arguments):
        write(*arguments)
        raise failure

    monkeypatch.setattr(archive, 'write_tfds', write_then_fail)
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else ConfigError
    with pytest.raises(expected):
        archive.prepare('cifar10', tmp_path / 'data', path)
    assert list((tmp_path / 'data').iterdir()) == []


def test_only_official_archives_are_prepared(tmp_path, splits, monkeypatch):
    path = write_tar(tmp_path / 'a.tar.gz', members('cifar10', 'binary', splits))
    monkeypatch.setattr(archive, 'read_archive', lambda *_: pytest.fail('read before its checksum was'))
    refused('no official cifar10 archive .*SHA-256', archive.prepare, 'cifar10', tmp_path / 'data', path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(archive.OFFICIAL_ARCHIVES, 'cifar100', {digest: 'cifar-100-python.tar.gz'})
    refused('it is cifar-100-python', archive.prepare, 'cifar10', tmp_path / 'data', path)
    assert not (tmp_path / 'data').exists()


def test_official_checksums_are_those_tfds_ships():
    for name, files in archive.OFFICIAL_ARCHIVES.items():
        assert len(files) == 2
        urls = tfds.builder_cls(name).url_infos
        shipped = {info.checksum for url, info in urls.items() if url.startswith(archive.ARCHIVE_URL)}
        assert shipped and shipped < files.keys()


@pytest.mark.parametrize('archive_name', ['missing.tar.gz', '.'])
def test_an_archive_that_cannot_be_read(tmp_path, archive_name):
    refused('cannot read the archive', archive.prepare, 'cifar10', tmp_path / 'data', tmp_path / archive_name)


def test_a_data_directory_that_cannot_be_written(tmp_path, official, splits):
    path = official(write_tar(tmp_path / 'a.tar.gz', members('cifar10', 'binary', splits)), 'cifar10')
    refused('cannot write cifar10 to', archive.prepare, 'cifar10', path / 'data', path)


@pytest.mark.parametrize('keep', [0, 100, 5000, -5000, -1])
def test_a_truncated_archive(tmp_path, splits, keep):
    path = write_tar(tmp_path / 'a.tar.gz', members('cifar10', 'binary', splits))
    path.write_bytes(path.read_bytes()[:keep])
    refused('no readable .tar.gz', archive.read_archive, path, 'cifar10')


def test_a_corrupt_archive(tmp_path, splits):
    path = write_tar(tmp_path / 'a.tar.gz', members('cifar10', 'binary', splits))
    whole = path.read_bytes()
    for position in (0, -8, *range(30, len(whole) - 40, len(whole) // 30)):
        content = bytearray(whole)
        content[position : position + 6] = bytes(byte ^ 255 for byte in whole[position : position + 6])
        path.write_bytes(content)
        refused('no readable .tar.gz', archive.read_archive, path, 'cifar10')


def test_not_an_archive(tmp_path):
    (tmp_path / 'a.tar.gz').write_text('<html>')
    refused('no readable .tar.gz', archive.read_archive, tmp_path / 'a.tar.gz', 'cifar10')
    refused('no readable .tar.gz', archive.read_archive, tmp_path / 'missing.tar.gz', 'cifar10')


def link(name, kind, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    'member',
    [
        tarfile.TarInfo('/etc/passwd'),
        tarfile.TarInfo('../outside'),
        tarfile.TarInfo('cifar-10-batches-bin/../../outside'),
        link('cifar-10-batches-bin/link', tarfile.SYMTYPE, '/etc/passwd'),
        link('cifar-10-batches-bin/link', tarfile.LNKTYPE, 'cifar-10-batches-bin/test_batch.bin'),
        link('cifar-10-batches-bin/pipe', tarfile.FIFOTYPE, ''),
        tarfile.TarInfo('cifar-10-batches-bin/test_batch.bin'),
    ],
    ids=lambda member: f'{member.name}-{member.type.decode()}',
)
def test_malicious_members_are_refused(tmp_path, splits, member):
    path = write_tar(tmp_path / 'a.tar.gz', members('cifar10', 'binary', splits), member)
    refused('unsafe', archive.read_archive, path, 'cifar10')


def test_a_member_too_large_is_refused_unread(tmp_path, splits):
    path = tmp_path / 'a.tar.gz'
    huge = tarfile.TarInfo('cifar-10-batches-bin/data_batch_1.bin')
    huge.size = 1 << 40
    write_tar(path, {}, huge)
    refused('too large', archive.read_archive, path, 'cifar10')


def change(files, file, content):
    return {**files, next(name for name in files if name.endswith(file)): content}


@pytest.mark.parametrize('kind', ['binary', 'python'])
@pytest.mark.parametrize('damage', ['size', 'label', 'missing', 'names', 'empty'])
def test_damaged_members_are_refused(tmp_path, splits, kind, damage):
    files = members('cifar10', kind, splits)
    batch = {'binary': 'test_batch.bin', 'python': 'test_batch'}[kind]
    build = {'binary': binary_batch, 'python': functools.partial(pickled_batch, 'cifar10')}[kind]
    images, labels = splits['test']
    if damage == 'size' and kind == 'binary':
        files = change(files, batch, build(images, labels)[:-1])
    elif damage == 'size':
        files = change(files, batch, build(images, {'label': labels['label'][:-1]}))
    elif damage == 'label':
        files = change(files, batch, build(images, {'label': labels['label'] + 10}))
    elif damage == 'missing':
        files = {name: content for name, content in files.items() if not name.endswith(batch)}
    elif damage == 'names':
        meta = (
            b'airplane\n' if kind == 'binary' else pickled_dict({b'label_names': pickled_list([pickled_string(b'a')])})
        )
        files = change(files, 'batches.meta' + '.txt' * (kind == 'binary'), meta)
    else:
        files = change(files, batch, b'')
    refused('damaged', archive.read_archive, write_tar(tmp_path / 'a.tar.gz', files), 'cifar10')


@pytest.mark.parametrize(
    ('file', 'content'),
    [
        ('test_batch', b'\x80\x02].'),
        ('test_batch', pickled_dict({b'data': b'K\x01', b'labels': b']'})),
        ('test_batch', pickled_dict({b'data': b'cnumpy\ndtype\n', b'labels': b']'})),
        ('batches.meta', pickled_dict({b'label_names': pickled_list([b'K\x01'] * 10)})),
        ('batches.meta', pickled_dict({b'label_names': b'K\x01'})),
    ],
)
def test_pickles_of_something_else_are_refused(tmp_path, splits, file, content):
    files = change(members('cifar10', 'python', splits), file, content)
    refused('damaged', archive.read_archive, write_tar(tmp_path / 'a.tar.gz', files), 'cifar10')


def test_the_other_dataset(tmp_path, splits):
    path = write_tar(tmp_path / 'a.tar.gz', members('cifar10', 'python', splits))
    refused('no cifar100 archive', archive.read_archive, path, 'cifar100')


@pytest.mark.parametrize(
    'code',
    [
        b'\x80\x02cos\nsystem\nU\x07touch %s\x85R.',
        b"cos\nsystem\n(S'touch %s'\ntR.",
        b'\x80\x02}(U\x04datac__builtin__\neval\nU\x01x\x85Ru.',
        b'\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.',
    ],
)
def test_a_malicious_pickle_is_not_run(tmp_path, splits, code, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = code.replace(b'\x07touch %s', b'\x09touch ran').replace(b'%s', b'ran')
    path = write_tar(tmp_path / 'a.tar.gz', change(members('cifar10', 'python', splits), 'test_batch', code))
    message = refused('damaged', archive.read_archive, path, 'cifar10')
    assert re.search('its pickle has (GLOBAL|STRING|SHORT_BINUNICODE)', message)
    assert [each.name for each in tmp_path.iterdir()] == ['a.tar.gz']


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of odd escapes in strings
def test_any_damage_to_a_pickle_is_a_config_error(tmp_path, splits):
    files = members('cifar10', 'python', splits)
    images, labels = splits['test'][0][:1], {'label': splits['test'][1]['label'][:1]}
    whole = np.frombuffer(pickled_batch('cifar10', images, labels), np.uint8)
    rng = np.random.default_rng(0)
    opcodes = np.r_[0 : len(whole) - 3200, len(whole) - 60 : len(whole)]  # the rest is pixels
    for _ in range(60):
        damaged = whole.copy()
        damaged[rng.choice(opcodes, 2)] = rng.integers(0, 256, 2)
        path = write_tar(tmp_path / 'a.tar.gz', change(files, 'test_batch', damaged.tobytes()))
        try:
            archive.read_archive(path, 'cifar10')
        except ConfigError as error:
            assert '\n' not in str(error)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves `tmp_path/served` in place of the official site."""
    (tmp_path / 'served').mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=tmp_path / 'served')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(archive, 'ARCHIVE_URL', f'http://127.0.0.1:{running.server_port}/')
        yield tmp_path / 'served'
        running.shutdown()


def test_download(tmp_path, server, official, splits, capfd):
    official(write_tar(server / 'small.tar.gz', members('cifar10', 'binary', splits)), 'cifar10')
    directory = archive.prepare('cifar10', tmp_path / 'data', None)
    assert len(tfds.builder('cifar10', data_dir=tmp_path / 'data').as_data_source(split='train')) == 12
    assert list((tmp_path / 'data').iterdir()) == [directory.parent]
    lines = capfd.readouterr().err.splitlines()
    assert lines[:2] == ['downloading small.tar.gz …', 'downloading small.tar.gz: done']


def test_a_download_of_something_else_is_refused(tmp_path, server):
    (server / 'cifar-10-binary.tar.gz').write_text('<html>')
    refused('no official cifar10', archive.prepare, 'cifar10', tmp_path / 'data', None)
    assert list((tmp_path / 'data').iterdir()) == []


@pytest.mark.parametrize('network', ['refuses', 'is silent', 'knows no name', 'breaks off', 'stalls'])
def test_no_network(tmp_path, monkeypatch, network):
    monkeypatch.setattr(archive, 'NETWORK_TIMEOUT', 0.3)
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        if network != 'refuses':
            listener.listen()
        if network == 'knows no name':  # nor gives up looking
            monkeypatch.setattr(socket, 'getaddrinfo', look_up_in_vain)
        if network in ('breaks off', 'stalls'):
            seconds = 10 if network == 'stalls' else 0
            threading.Thread(target=answer_partly, args=(listener, seconds), daemon=True).start()
        monkeypatch.setattr(archive, 'ARCHIVE_URL', f'http://127.0.0.1:{listener.getsockname()[1]}/')
        start = time.monotonic()
        message = refused('cannot be downloaded', archive.prepare, 'cifar10', tmp_path / 'data', None)
        assert time.monotonic() - start < 5
    assert str(tmp_path / 'data') in message and '--config.dataset=digits' in message
    assert 'python -m flax_dlvc.data --dataset cifar10 --archive PATH' in message
    assert list((tmp_path / 'data').iterdir()) == []


def look_up_in_vain(*_, **__):
    time.sleep(30)
    raise socket.gaierror('no such name')


def answer_partly(listener, seconds):
    connection, _ = listener.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this')
        time.sleep(seconds)
