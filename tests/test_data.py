import itertools
import json
import math
import os
import subprocess
import sys
import zlib
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_config
from PIL import Image

from flax_dlvc import archive, data, decoded
from flax_dlvc.errors import ConfigError

CIFAR10 = Path(os.environ.get('TFDS_DATA_DIR', ''), 'cifar10')


def refused(match, call, *arguments):
    with pytest.raises(ConfigError, match=match) as caught:
        call(*arguments)
    assert '\n' not in str(caught.value)
    return str(caught.value)


# Digits


def test_digits_are_scikit_learns(digits):
    from sklearn.datasets import load_digits

    splits = (digits.train, digits.validation, digits.test)
    assert [len(split) for split in splits] == [1198, 299, 300]
    images = np.concatenate([split.images for split in splits])
    labels = np.concatenate([split.labels for split in splits])
    assert images.shape == (1797, 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int32
    small = images[:, ::4, ::4, :1]
    np.testing.assert_array_equal(images, small.repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3))
    original_images, original_labels = load_digits(return_X_y=True)

    def examples(pixels, labels):
        return sorted((row.tobytes(), int(label)) for row, label in zip(pixels, labels, strict=True))

    levels = np.rint(original_images * 255 / 16).astype(np.uint8)
    assert examples(small.reshape(-1, 64), labels) == examples(levels, original_labels)  # each once: disjoint too
    assert digits.class_names == tuple('0123456789') and digits.image_shape == (32, 32, 3)


def test_digits_are_stratified(digits):
    splits = (digits.train, digits.validation, digits.test)
    counts = np.array([np.bincount(split.labels, minlength=10) for split in splits])
    proportional = counts.sum(0) * np.array([[len(split)] for split in splits]) / 1797
    assert np.abs(counts - proportional).max() <= 1


@pytest.mark.parametrize('share', [20, 40, 60])
def test_leading_shares_of_the_digits_are_stratified(digits, share):
    labels = np.concatenate([digits.train.labels, digits.validation.labels])
    part = data.load(make_config(splits__train=f'train[:{share}%]')).train.labels
    np.testing.assert_array_equal(part, labels[: len(part)])
    proportional = np.bincount(labels) * len(part) / len(labels)
    assert np.abs(np.bincount(part) - proportional).max() < 2


def test_digits_are_the_same_in_every_call(digits):
    again = data.load(make_config())
    for name, checksum in (('train', 74188681), ('validation', 3343363481), ('test', 3688178672)):
        split = getattr(again, name)
        np.testing.assert_array_equal(split.images, getattr(digits, name).images)
        np.testing.assert_array_equal(split.labels, getattr(digits, name).labels)
        assert zlib.crc32(split.images) == checksum


def test_later_starts_need_no_scikit_learn(tmp_path):
    look = (
        'import sys; from configs import quickstart; from flax_dlvc import data;'
        'print(data.load(quickstart.get_config()).train.images.sum(), "sklearn" in sys.modules)'
    )
    first, second = (
        subprocess.run(
            [sys.executable, '-c', look],
            cwd=ROOT,
            env=os.environ | {'FLAX_DLVC_CACHE_DIR': str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    )
    assert [first[1], second[1]] == ['True', 'False'] and first[0] == second[0]


def test_statistics_are_those_of_the_training_images(digits):
    pixels = digits.train.images / 255.0
    np.testing.assert_allclose(digits.mean, pixels.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(digits.std, pixels.std((0, 1, 2)), rtol=1e-9)


def test_channel_statistics():
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), np.uint8)
    images[..., 2] = 51
    mean, std = data.channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], (images / 255).std((0, 1, 2))[:2], rtol=1e-12)
    assert std[2] == 1.0  # a constant channel is not divided by zero


def test_channel_statistics_are_exact_whatever_the_machine():
    """A run goes on, and is evaluated, on another one."""
    for seed in range(20):
        images = np.random.default_rng(seed).integers(0, 256, (7, 5, 4, 1), np.uint8)
        values = [int(value) for value in images.reshape(-1)]
        mean = Fraction(sum(values), 255 * len(values))
        variance = sum((Fraction(value, 255) - mean) ** 2 for value in values) / len(values)
        with localcontext(prec=50):
            root = float((Decimal(variance.numerator) / Decimal(variance.denominator)).sqrt())
        (found_mean,), (found_std,) = data.channel_statistics(images)
        assert found_mean == float(mean)
        assert abs(found_std - root) <= math.ulp(root)


# Slices


def test_slices_take_the_examples_they_name(digits):
    everything = np.concatenate([digits.train.images, digits.validation.images])
    dataset = data.load(
        make_config(
            splits__train='train[1000:]+train[:100]', splits__validation='train[200:300]', splits__test='test[-7:]'
        )
    )
    np.testing.assert_array_equal(dataset.train.images, np.concatenate([everything[1000:], everything[:100]]))
    np.testing.assert_array_equal(dataset.validation.images, everything[200:300])
    np.testing.assert_array_equal(dataset.test.images, digits.test.images[-7:])
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [597, 100, 7]


@pytest.mark.parametrize(
    'spec',
    [
        '',
        'train[',
        'train[:80%',
        'train[::2]',
        'train[a:b]',
        'train[5]',
        'train[:9999]',
        'train[:101%]',
        'nope',
        'train+',
    ],
)
def test_malformed_slice(spec):
    message = refused('is not a slice of the available splits', data.load, make_config(splits__train=spec))
    assert 'train (1,497), test (300)' in message and repr(spec) in message


@pytest.mark.parametrize('spec', ['train[5:5]', 'train[50%:10%]', 'train[:0%]', 'test+train[0:0]'])
def test_empty_slice(spec):
    refused('holds no examples', data.load, make_config(splits__train=spec))


@pytest.mark.parametrize(
    ('train', 'validation', 'test'),
    [
        ('train', 'train[80%:]', 'test'),
        ('train[:1000]', 'train[999:]', 'test'),
        ('train[:80%]', 'train[80%:]', 'train[10:11]'),
        ('train[:10%]+test[:1]', 'train[80%:]', 'test'),
        ('train[:80%]', 'test', 'test'),
        ('train[:50%]+train[40%:60%]', 'train[80%:]', 'test'),
    ],
)
def test_overlapping_slices(train, validation, test):
    config = make_config(splits__train=train, splits__validation=validation, splits__test=test)
    refused('share examples of .*make them disjoint', data.load, config)


def test_a_split_with_examples_twice_is_named_once():
    config = make_config(splits__train='train[:50%]+train[40%:60%]')
    refused(r"^splits\.train: slices share examples of 'train'; make them disjoint$", data.load, config)


def test_a_batch_larger_than_the_split():
    data.load(make_config(splits__train='train[:128]'))
    message = refused('batch_size 128 is larger', data.load, make_config(splits__train='train[:127]'))
    assert '127 examples' in message


def test_patches_have_to_fit():
    data.load(make_config(model__patch_size=5))
    data.load(make_config(model__patch_size=8, model__name='vit'))
    refused('patch_size 5 does not divide', data.load, make_config(model__patch_size=5, model__name='vit'))


# Order and batches


@pytest.mark.parametrize('num_examples', [1, 10, 1197])
def test_an_epoch_is_a_permutation(num_examples):
    order = data.epoch_order(num_examples, seed=3, epoch=5)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(num_examples))


def test_an_epochs_order_is_a_function_of_seed_and_epoch():
    orders = {(seed, epoch): data.epoch_order(1000, seed, epoch) for seed in range(3) for epoch in range(3)}
    np.testing.assert_array_equal(orders[2, 1], data.epoch_order(1000, 2, 1))
    for left, right in itertools.combinations(orders.values(), 2):
        assert (left == right).mean() < 0.02  # two independent orders agree in one place


def test_the_largest_seed():
    assert sorted(data.epoch_order(5, 2**32 - 1, 10_000)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ('seed', 'epoch', 'expected'),
    [
        (0, 0, [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]),
        (0, 1, [9, 4, 2, 1, 0, 7, 8, 5, 3, 6]),
        (1, 0, [6, 0, 7, 9, 4, 1, 8, 5, 2, 3]),
    ],
)
def test_golden_orders(seed, epoch, expected):
    """A change here changes every run: results of old and new code with one seed are no longer the same."""
    assert data.epoch_order(10, seed, epoch).tolist() == expected


@pytest.mark.parametrize(
    ('num_examples', 'batch_size', 'num_devices'), [(10, 3, 1), (12, 4, 2), (13, 12, 4), (8, 8, 8), (7, 7, 1)]
)
def test_training_batches(num_examples, batch_size, num_devices):
    order = data.epoch_order(num_examples, 0, 0)
    batches = data.training_batches(order, batch_size, num_devices)
    assert batches.shape == (num_examples // batch_size, num_devices, batch_size // num_devices)
    np.testing.assert_array_equal(batches.ravel(), order[: num_examples // batch_size * batch_size])


@pytest.mark.parametrize('num_devices', [1, 2, 3, 8])
@pytest.mark.parametrize('batch_size', [24, 48, 480])
@pytest.mark.parametrize('num_examples', [1, 5, 23, 24, 25, 96, 1000])
def test_evaluation_batches_hold_every_example_once(num_examples, batch_size, num_devices):
    batches = data.evaluation_batches(num_examples, batch_size, num_devices)
    assert batches.dtype == np.int32 and batches.ndim == 3 and batches.shape[1] == num_devices
    assert batches.shape[1] * batches.shape[2] <= batch_size
    flat = batches.ravel()
    np.testing.assert_array_equal(flat[:num_examples], np.arange(num_examples))
    np.testing.assert_array_equal(flat[num_examples:], -1)
    assert len(flat) - num_examples < batches.shape[1] * batches.shape[2]  # no step of padding alone


# TFDS


def write_prepared(data_dir, splits, name='tiny', version='1.0.0', num_classes=10, features=None):
    """Writes what TFDS would, without its builder: a features.json, a dataset_info.json, an ArrayRecord per split."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module
    from PIL import Image

    channels = splits['train'][0][0].shape[-1]
    features = features or tfds.features.FeaturesDict(
        {
            'image': tfds.features.Image(shape=(None, None, channels)),
            'label': tfds.features.ClassLabel(names=[f'class {number}' for number in range(num_classes)]),
        }
    )
    directory = data_dir / name / version
    directory.mkdir(parents=True, exist_ok=True)
    infos = []
    for split, (images, labels) in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory, dataset_name=name, split=split, filetype_suffix='array_record'
        )
        writer = array_record_module.ArrayRecordWriter(
            str(template.sharded_filepath(shard_index=0, num_shards=1)), 'group_size:1'
        )
        for image, label in zip(images, labels, strict=True):
            if image.dtype == np.uint8:
                image = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
            example = {'id': f'{split}_{label}', 'image': image, 'label': int(label), 'coarse_label': int(label) % 20}
            writer.write(features.serialize_example({key: example[key] for key in features}))
        writer.close()
        infos.append(tfds.core.SplitInfo(split, [len(labels)], 0, filename_template=template))
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name,
        version=tfds.core.Version(version),
        data_dir=str(directory),
        module_name='',
        config_name='',
        config_description='',
        release_notes={},
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    info.set_file_format('array_record')
    info.set_splits(tfds.core.SplitDict(infos))
    info.write_to_directory(directory)
    return directory


def make_examples(seed, sizes=(('train', 700), ('test', 30)), shape=(6, 4, 3)):
    generator = np.random.default_rng(seed)
    return {
        split: (generator.integers(0, 256, (size, *shape), np.uint8), generator.integers(0, 10, size, np.int32))
        for split, size in sizes
    }


@pytest.fixture
def tfds_environment(tmp_path, monkeypatch):
    """An empty TFDS data directory and an empty cache."""
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path / 'tfds'))
    monkeypatch.setenv('FLAX_DLVC_CACHE_DIR', str(tmp_path / 'cache'))
    return tmp_path / 'tfds'


def write_known(data_dir, name, sizes):
    """Writes a dataset that TFDS knows, with its features and random examples, and returns these."""
    import tensorflow_datasets as tfds

    builder = tfds.builder(name)
    features = builder.info.features
    if name == 'cifar100':  # its builder names them while it prepares
        features['label'].names = [f'fine {number}' for number in range(100)]
        features['coarse_label'].names = [f'coarse {number}' for number in range(20)]
    splits = make_examples(0, sizes, features['image'].shape)
    write_prepared(data_dir, splits, name, str(builder.version), features=features)
    return splits


@pytest.fixture
def prepared(tfds_environment):
    """A prepared dataset and its directory."""
    splits = make_examples(0)
    return splits, write_prepared(tfds_environment, splits)


def load_tiny(**fields):
    return data.load(make_config(**{'dataset': 'tiny', 'model__name': 'resnet18'} | fields))


def assert_holds(dataset, splits):
    (images, labels), size = splits['train'], len(splits['train'][1]) * 8 // 10
    parts = {
        'train': (images[:size], labels[:size]),
        'validation': (images[size:], labels[size:]),
        'test': splits['test'],
    }
    for name, (images, labels) in parts.items():
        split = getattr(dataset, name)
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)


def cached(split):
    """The directory of a split's decoded arrays."""
    (directory,) = (decoded.cache_directory() / 'decoded').glob(f'tiny-*/{split}')
    return directory


def test_decoded_arrays_are_the_sources(prepared):
    splits, _ = prepared
    dataset = load_tiny()
    assert_holds(dataset, splits)
    assert dataset.class_names == tuple(f'class {number}' for number in range(10))
    pixels = splits['train'][0][:560] / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(dataset.std, pixels.std((0, 1, 2)), rtol=1e-9)


def test_a_second_load_maps_the_arrays(prepared, monkeypatch):
    splits, _ = prepared
    load_tiny()
    written = {path: path.stat().st_mtime_ns for path in cached('train').parent.rglob('*.[nj]*')}
    assert len(written) == 6
    monkeypatch.setattr(data._Tfds, '_decode', lambda *_: pytest.fail('decoded again'))
    dataset = load_tiny()
    assert_holds(dataset, splits)
    assert isinstance(dataset.test.images, np.memmap) and isinstance(dataset.test.labels, np.memmap)
    assert isinstance(dataset.train.images, np.memmap)  # a slice of one
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert sorted(path.name for path in cached('train').parent.iterdir()) == [
        'test',
        'test.lock',
        'train',
        'train.lock',
    ]


def test_a_split_that_no_slice_needs_is_not_decoded(prepared):
    load_tiny(splits__validation='train[80%:90%]', splits__test='train[90%:]')
    assert sorted(path.name for path in cached('train').parent.iterdir()) == ['train', 'train.lock']


def test_two_directories_have_a_cache_each(tmp_path, tfds_environment, monkeypatch):
    import tensorflow_datasets as tfds

    for number in range(2):
        monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path / f'tfds {number}'))
        write_prepared(tmp_path / f'tfds {number}', make_examples(number))
        assert_holds(load_tiny(), make_examples(number))
    assert len(list((decoded.cache_directory() / 'decoded').iterdir())) == 2


def test_a_source_that_changed_is_decoded_again(prepared, tfds_environment):
    load_tiny()
    others = make_examples(1)
    write_prepared(tfds_environment, others)
    assert_holds(load_tiny(), others)


def test_a_source_that_was_touched_is_decoded_again(prepared):
    splits, directory = prepared
    load_tiny()
    before = cached('train').stat().st_ino, cached('test').stat().st_ino
    (record,) = directory.glob('*-train.*')
    os.utime(record, ns=(0, record.stat().st_mtime_ns + 1))
    assert_holds(load_tiny(), splits)
    assert cached('train').stat().st_ino != before[0]
    assert cached('test').stat().st_ino == before[1]


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


DAMAGE = {
    'a pixel': lambda directory: flip(directory / 'images.npy', 5000),
    'a label': lambda directory: flip(directory / 'labels.npy', 200),
    'magic of images': lambda directory: flip(directory / 'images.npy', 0),
    'header length of images': lambda directory: (directory / 'images.npy').write_bytes(
        b'\x93NUMPY\x01\x00\x39' + (directory / 'images.npy').read_bytes()[9:]
    ),
    'dtype of images': lambda directory: (directory / 'images.npy').write_bytes(
        (directory / 'images.npy').read_bytes().replace(b"'|u1'", b"'|i1'", 1)
    ),
    'dtype of labels': lambda directory: (directory / 'labels.npy').write_bytes(
        (directory / 'labels.npy').read_bytes().replace(b"'<i4'", b"'1i4'", 1)
    ),
    'shape of images': lambda directory: (directory / 'images.npy').write_bytes(
        (directory / 'images.npy').read_bytes().replace(b'6, 4, 3', b'4, 6, 3', 1)
    ),
    'truncated images': lambda directory: os.truncate(directory / 'images.npy', 10_000),
    'truncated header': lambda directory: os.truncate(directory / 'images.npy', 40),
    'empty labels': lambda directory: (directory / 'labels.npy').write_bytes(b''),
    'no labels': lambda directory: (directory / 'labels.npy').unlink(),
    'no manifest': lambda directory: (directory / 'manifest.json').unlink(),
    'empty manifest': lambda directory: (directory / 'manifest.json').write_text(''),
    'another manifest': lambda directory: (directory / 'manifest.json').write_text('[]'),
    'manifest of another source': lambda directory: (directory / 'manifest.json').write_text(
        json.dumps({**json.loads((directory / 'manifest.json').read_text()), 'source': ''})
    ),
}


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_built_anew(prepared, damage):
    splits, _ = prepared
    load_tiny()
    damage(cached('train'))
    assert_holds(load_tiny(), splits)
    manifest = cached('train') / 'manifest.json'
    before = manifest.stat().st_ino
    assert_holds(load_tiny(), splits)
    assert manifest.stat().st_ino == before  # whole again


def test_decoding_that_is_interrupted_leaves_nothing(prepared, monkeypatch):
    splits, _ = prepared

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoded, '_manifest', interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_tiny()
    (directory,) = (decoded.cache_directory() / 'decoded').iterdir()
    assert [path.name for path in directory.iterdir()] == ['train.lock']
    assert_holds(load_tiny(), splits)


def test_a_cache_that_is_damaged_while_it_is_written(prepared, monkeypatch):
    monkeypatch.setattr(decoded, '_map_arrays', lambda *_: None)
    refused('changed while it was written; start again', load_tiny)


def test_two_processes_at_once(prepared, tfds_environment):
    splits, _ = prepared
    script = """
import zlib
from configs import default
from flax_dlvc import data
config = default.get_config()
config.dataset, config.model.name = 'tiny', 'resnet18'
dataset = data.load(config)
for split in (dataset.train, dataset.validation, dataset.test):
    print(zlib.crc32(split.images), zlib.crc32(split.labels))
"""
    environment = os.environ | {'TFDS_DATA_DIR': str(tfds_environment)}
    processes = [
        subprocess.Popen([sys.executable, '-c', script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    images, labels = splits['train']
    parts = [(images[:560], labels[:560]), (images[560:], labels[560:]), splits['test']]
    expected = ''.join(f'{zlib.crc32(images)} {zlib.crc32(labels)}\n' for images, labels in parts)
    assert outputs == [expected, expected]
    assert sorted(path.name for path in cached('train').parent.iterdir()) == [
        'test',
        'test.lock',
        'train',
        'train.lock',
    ]


@pytest.mark.parametrize('channels', [2, 4])
def test_images_of_neither_one_nor_three_channels(monkeypatch, channels):
    class Source:
        sizes = {'train': 200, 'test': 20}  # noqa: RUF012
        class_names = ('a', 'b')

        def read(self, split):
            size = self.sizes[split]
            return data.Split(np.zeros((size, 32, 32, channels), np.uint8), np.zeros(size, np.int32))

    monkeypatch.setattr(data, '_open', lambda _: Source())
    refused(f'the images have {channels} channels', data.load, make_config(dataset='any'))


@pytest.mark.parametrize(('name', 'smallest'), [('cnn', '8x8'), ('airbench', '9x9')])
def test_images_that_are_too_small_for_a_model(prepared, name, smallest):
    refused(f'6x4 images are too small for the {name}, which needs {smallest}', lambda: load_tiny(model__name=name))


@pytest.mark.parametrize('patch_size', [3, 4])
def test_patches_have_to_fit_both_ways(prepared, patch_size):
    load_tiny(model__name='vit', model__patch_size=2)
    refused('does not divide the 6x4 images', lambda: load_tiny(model__name='vit', model__patch_size=patch_size))


def test_cifar10_has_its_own_statistics(tfds_environment):
    splits = make_examples(0, shape=(32, 32, 3))
    write_prepared(tfds_environment, splits, name='cifar10', version='3.0.2')
    dataset = data.load(make_config(dataset='cifar10'))
    assert_holds(dataset, splits)
    assert dataset.mean == (0.4914, 0.4822, 0.4465)
    assert dataset.std == (0.2470, 0.2435, 0.2616)


@pytest.mark.parametrize(
    ('name', 'shape', 'class_names'),
    [
        ('cifar100', (32, 32, 3), [f'fine {number}' for number in range(100)]),
        ('svhn_cropped', (32, 32, 3), '0123456789'),
        ('mnist', (28, 28, 1), '0123456789'),
        (
            'fashion_mnist',
            (28, 28, 1),
            ['T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot'],
        ),
    ],
)
def test_other_datasets_of_tfds(tfds_environment, name, shape, class_names):
    splits = write_known(tfds_environment, name, [('train', 150), ('test', 20), ('extra', 30)])
    dataset = data.load(make_config(dataset=name, batch_size=8))
    assert_holds(dataset, splits)
    assert dataset.image_shape == shape and dataset.class_names == tuple(class_names)
    pixels = splits['train'][0][:120] / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(dataset.std, pixels.std((0, 1, 2)), rtol=1e-9)
    more = data.load(make_config(dataset=name, batch_size=8, splits__train='train[:80%]+extra')).train
    np.testing.assert_array_equal(more.images, np.concatenate([splits['train'][0][:120], splits['extra'][0]]))
    refused(
        f'patch_size 5 does not divide the {shape[0]}x{shape[1]} images',
        data.load,
        make_config(dataset=name, batch_size=8, model__name='vit', model__patch_size=5),
    )


def test_the_first_run_prepares_cifar100(tfds_environment, monkeypatch):
    written = []

    def prepare(name, data_dir, path):
        assert (name, data_dir, path) == ('cifar100', tfds_environment, None)
        written.append(write_known(data_dir, name, [('train', 50), ('test', 20)]))

    monkeypatch.setattr(archive, 'prepare', prepare)
    for _ in range(2):
        assert_holds(data.load(make_config(dataset='cifar100', batch_size=8)), written[0])
    assert len(written) == 1


def test_the_command_prepares_from_an_archive(tfds_environment, monkeypatch, capsys):
    def run(*arguments):
        data.main(['data', *arguments])

    refused('cannot read the archive nowhere.tar.gz', run, '--dataset', 'cifar10', '--archive', 'nowhere.tar.gz')
    refused('invalid choice', run, '--dataset', 'mnist')
    monkeypatch.setattr(archive, 'prepare', lambda name, data_dir, path: data_dir / name / path)
    run('--dataset', 'cifar100', '--archive', 'official.tar.gz')
    assert capsys.readouterr().out == f'cifar100 is in {tfds_environment / "cifar100" / "official.tar.gz"}\n'


def test_a_validation_split_is_not_left_out_silently(tfds_environment):
    splits = make_examples(0, [('train', 700), ('validation', 40), ('test', 30)])
    write_prepared(tfds_environment, splits)
    message = refused('has a validation split of its own', load_tiny)
    assert '--config.splits.train=train --config.splits.validation=validation' in message
    dataset = load_tiny(splits__train='train', splits__validation='validation')
    np.testing.assert_array_equal(dataset.train.images, splits['train'][0])
    np.testing.assert_array_equal(dataset.validation.images, splits['validation'][0])
    load_tiny(splits__test='validation')
    load_tiny(splits__train='train', splits__validation='')


def test_an_empty_split(tfds_environment):
    write_prepared(tfds_environment, make_examples(0, [('train', 700), ('test', 0)]))
    refused("'test' holds no examples; test has 0", load_tiny)


def test_a_dataset_without_class_labels(tfds_environment):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({'image': tfds.features.Image(shape=(6, 4, 3)), 'label': np.int64})
    write_prepared(tfds_environment, make_examples(0), features=features)
    refused("tiny has no 'image' with a class 'label'", load_tiny)


@pytest.mark.parametrize('dtype', ['uint16', 'float32'])
def test_images_that_are_not_uint8(tfds_environment, dtype):
    import tensorflow_datasets as tfds

    image = tfds.features.Tensor(shape=(6, 4, 3), dtype=np.dtype(dtype))
    features = tfds.features.FeaturesDict({'image': image, 'label': tfds.features.ClassLabel(num_classes=10)})
    splits = {split: (images.astype(dtype), labels) for split, (images, labels) in make_examples(0).items()}
    write_prepared(tfds_environment, splits, features=features)
    refused(f'tiny has images of type {dtype}; only uint8 can be used', load_tiny)


def test_another_file_format(prepared):
    _, directory = prepared
    info = directory / 'dataset_info.json'
    info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    refused('tiny in .* is not prepared as ArrayRecord files', load_tiny)


def test_images_of_mixed_sizes(tfds_environment):
    splits = make_examples(0)
    images, labels = splits['train']
    odd = np.zeros((6, 5, 3), np.uint8)
    write_prepared(tfds_environment, {**splits, 'train': ([*images[:-1], odd], labels)})
    refused(r'image 699 of .train. is \(6, 5, 3\), the first is \(6, 4, 3\)', load_tiny)
    assert not list(decoded.cache_directory().rglob('*.npy'))


def test_splits_of_different_sizes(tfds_environment):
    splits = make_examples(0) | make_examples(1, [('test', 30)], (4, 4, 3))
    write_prepared(tfds_environment, splits)
    refused('images of different sizes', load_tiny)
    refused(
        'train [+] test hold images of different sizes',
        lambda: load_tiny(splits__train='train[:80%]+test[:50%]', splits__test='test[50%:]'),
    )


@pytest.mark.parametrize('label', [-1, 10])
def test_labels_outside_the_classes(tfds_environment, monkeypatch, label):
    import tensorflow_datasets as tfds

    splits = make_examples(0)
    splits['train'][1][3] = label
    with monkeypatch.context() as patch:  # TFDS refuses to write them
        patch.setattr(tfds.features.ClassLabel, 'encode_example', lambda _, value: value)
        write_prepared(tfds_environment, splits)
    refused("'train' has labels outside its 10 classes", load_tiny)
    assert not list(decoded.cache_directory().rglob('*.npy'))


@pytest.mark.parametrize('name', ['', ' ', 'nope', 'nope/nope', '../tiny', 'cifar10/nope', 'cifar10:9.9.9', 'a\nb'])
def test_unknown_dataset(tfds_environment, name):
    message = ' '.join(str(refused_any(name)).split())
    assert "neither 'digits', folder:PATH nor a TFDS dataset" in message


def refused_any(name):
    with pytest.raises(ConfigError) as caught:
        data.load(make_config(dataset=name))
    return caught.value


def test_unprepared_dataset(tfds_environment):
    message = refused('mnist is not prepared in ', data.load, make_config(dataset='mnist'))
    assert 'TFDS_DATA_DIR' in message and '--config.dataset=digits' in message


@pytest.mark.parametrize(
    ('damage', 'message'),
    {
        'truncate': "tiny: 'train' in .* is damaged",
        'flip': "tiny: 'train' in .* is damaged",
        'remove': "tiny: 'train' in .* is damaged",
        'empty info': 'tiny is damaged in ',
        'no info': 'tiny is damaged in ',
        'empty features': 'tiny is damaged in ',
    }.items(),
)
def test_damaged_source(prepared, damage, message):
    _, directory = prepared
    (record,) = directory.glob('*-train.*')
    if damage == 'truncate':
        os.truncate(record, record.stat().st_size // 2)
    elif damage == 'flip':
        flip(record, 1000)
    elif damage == 'remove':
        record.unlink()
    elif damage == 'empty info':
        (directory / 'dataset_info.json').write_text('{')
    elif damage == 'empty features':
        (directory / 'features.json').write_text('{')
    else:
        (directory / 'dataset_info.json').unlink()
    refused(message, load_tiny)
    assert not list(decoded.cache_directory().rglob('*.npy'))


def test_a_cache_that_cannot_be_written(prepared, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('FLAX_DLVC_CACHE_DIR', str(tmp_path / 'file'))
    refused('set FLAX_DLVC_CACHE_DIR', load_tiny)


def test_cache_directory(monkeypatch):
    monkeypatch.setenv('FLAX_DLVC_CACHE_DIR', '/somewhere')
    assert decoded.cache_directory() == Path('/somewhere')
    monkeypatch.delenv('FLAX_DLVC_CACHE_DIR')
    monkeypatch.setenv('XDG_CACHE_HOME', '/elsewhere')
    assert decoded.cache_directory() == Path('/elsewhere/flax_dlvc')
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', '/home/somebody')
    assert decoded.cache_directory() == Path('/home/somebody/.cache/flax_dlvc')


def test_a_user_without_a_home_names_a_cache_directory(monkeypatch):
    def nowhere():
        raise RuntimeError('Could not determine home directory.')

    monkeypatch.setattr(Path, 'home', nowhere)
    monkeypatch.setenv('FLAX_DLVC_CACHE_DIR', '/somewhere')
    assert decoded.cache_directory() == Path('/somewhere')
    monkeypatch.delenv('FLAX_DLVC_CACHE_DIR')
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    refused('set FLAX_DLVC_CACHE_DIR', decoded.cache_directory)


def test_a_cache_on_a_full_disk(prepared, tmp_path, monkeypatch):
    """A page of a mapped file for which there is no room would end the process."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=32k', 'tmpfs', disk], check=False).returncode:
        pytest.skip('a small disk needs the right to mount a tmpfs')
    try:
        monkeypatch.setenv('FLAX_DLVC_CACHE_DIR', str(disk))
        refused('cannot keep decoded images in .*: No space left on device; set FLAX_DLVC_CACHE_DIR', load_tiny)
        assert not list(disk.rglob('*.npy'))
    finally:
        subprocess.run(['umount', '--lazy', disk], check=True)


def test_what_a_killed_process_left_is_removed(prepared):
    load_tiny()
    (cached('train') / 'labels.npy').unlink()
    left = cached('train').with_name('.train-1234')
    left.mkdir()
    (left / 'images.npy').write_bytes(bytes(1000))
    load_tiny()
    assert sorted(path.name for path in left.parent.iterdir() if path.name.strip('.').startswith('train')) == [
        'train',
        'train.lock',
    ]


@pytest.mark.skipif(not CIFAR10.is_dir() or CIFAR10.parent == Path(), reason='TFDS_DATA_DIR holds no prepared cifar10')
def test_real_cifar10():
    dataset = data.load(make_config(dataset='cifar10'))
    splits = (dataset.train, dataset.validation, dataset.test)
    assert [split.images.shape for split in splits] == [(size, 32, 32, 3) for size in (40_000, 10_000, 10_000)]
    train = np.concatenate([dataset.train.images, dataset.validation.images])
    labels = np.concatenate([dataset.train.labels, dataset.validation.labels])
    assert np.bincount(labels).tolist() == [5000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1000] * 10
    names = 'airplane automobile bird cat deer dog frog horse ship truck'
    assert dataset.class_names == tuple(names.split())
    # Close, not equal: a copy may hold the images as JPEG.
    mean, std = data.channel_statistics(train)
    np.testing.assert_allclose(mean, (0.4914, 0.4822, 0.4465), atol=5e-4)
    np.testing.assert_allclose(std, (0.2470, 0.2435, 0.2616), atol=2e-3)


# What --show draws


def show(*arguments):
    return data.main(['data', '--config', 'configs/cnn_augment.py', '--config.dataset=digits', *map(str, arguments)])


def test_show_draws_a_picture_and_the_same_one_again(tmp_path, capsys):
    for name in ('a.png', 'b.png'):
        show('--show', tmp_path / name, '--config.batch_size=20')
    assert capsys.readouterr().out.startswith(f'20 images of digits: {tmp_path / "a.png"}')
    assert Image.open(tmp_path / 'a.png').size == (8 * (128 + 12), 3 * (128 + 40))
    assert np.ptp(np.asarray(Image.open(tmp_path / 'a.png').convert('L'))) > 200  # not blank
    assert (tmp_path / 'a.png').read_bytes() == (tmp_path / 'b.png').read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((), 'say --show'),
        (('--show', 'x.svg'), 'not the name of a .png'),
        (('--show', 'nowhere/x.png'), 'cannot write nowhere/x.png'),
        (('--show', 'x.png', '--config.sed=1'), 'unknown field'),
        (('--show', 'x.png', '--archive', 'y'), "unknown flag '--archive'"),
    ],
)
def test_what_show_refuses(arguments, message):
    refused(message, show, *arguments)


def test_the_name_of_an_archive_is_no_flag(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path))
    arguments = ['data', '--dataset', 'cifar10', '--archive', 'config.tar.gz']
    refused(r'cannot read the archive config\.tar\.gz', data.main, arguments)


def test_show_needs_a_config():
    refused('no config', data.main, ['data', '--show', 'x.png'])
