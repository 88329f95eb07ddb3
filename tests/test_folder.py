"""Folders of image files as datasets, and a run on one as a new user would make it."""

import json
import os

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from configs import default
from flax_dlvc import data, decoded
from flax_dlvc.errors import ConfigError
from flax_dlvc.images import read_image

COLORS = {'blue': (0, 0, 200), 'green': (0, 200, 0), 'red': (200, 0, 0)}


def write_images(folder, classes=('green', 'blue', 'red'), count=10, mode='RGB'):
    """`count` noisy images a class, of several sizes, PNG and JPEG."""
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 50, (40 + number, 50, 3), np.uint8) + np.uint8(COLORS[name])
            suffix = 'png' if number % 2 else 'jpg'
            Image.fromarray(pixels).convert(mode).save(folder / name / f'{number}.{suffix}')
    return folder


def load(folder, **splits):
    config = default.get_config()
    config.dataset, config.batch_size = f'folder:{folder}', 2
    config.splits.update(splits)
    return data.load(config)


def refused(folder, match):
    with pytest.raises(ConfigError, match=match) as caught:
        load(folder)
    assert '\n' not in str(caught.value)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('FLAX_DLVC_CACHE_DIR', str(tmp_path / 'cache'))


def test_a_folder_per_class_is_split_in_proportion_each_file_once(tmp_path):
    folder = write_images(tmp_path / 'own')
    (folder / 'red' / '.hidden').write_text('')
    dataset = load(folder)
    assert dataset.class_names == ('blue', 'green', 'red') and dataset.image_shape == (32, 32, 3)
    splits = (dataset.train, dataset.validation, dataset.test)
    assert [np.bincount(split.labels, minlength=3).sum() for split in splits] == [19, 5, 6]
    for split in splits:
        assert np.ptp(np.bincount(split.labels, minlength=3)) <= 1
    found = sorted(
        (image.tobytes(), int(label))
        for split in splits
        for image, label in zip(split.images, split.labels, strict=True)
    )
    names = dataset.class_names
    expected = [
        (read_image(path, (32, 32, 3)).tobytes(), names.index(path.parent.name)) for path in folder.glob('*/*.*g')
    ]
    assert found == sorted(expected)
    pixels = dataset.train.images / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(dataset.std, pixels.std((0, 1, 2)), rtol=1e-9)


def test_given_splits_are_kept_and_grey_files_have_one_channel(tmp_path):
    for split, count in (('train', 5), ('validation', 3), ('test', 2)):
        write_images(tmp_path / 'own' / split, ('red', 'blue'), count, mode='L')
    dataset = load(tmp_path / 'own', train='train', validation='validation')
    assert dataset.image_shape == (32, 32, 1) and len(dataset.mean) == 1
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [10, 6, 4]


def test_decoded_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    folder = write_images(tmp_path / 'own')
    before = load(folder).train.images.copy()
    with monkeypatch.context() as patch:
        patch.setattr(decoded, 'write', lambda *_: pytest.fail('decoded again'))
        assert isinstance(load(folder).train.images, np.memmap)
    for path in (folder / 'red').iterdir():
        Image.new('RGB', (9, 9)).save(path)
    assert not np.array_equal(load(folder).train.images, before)


def test_what_is_refused(tmp_path):
    folder = tmp_path / 'own'
    refused(folder, 'cannot read .*own: No such file')
    write_images(folder, ['red'])
    refused(folder, 'at least two classes; it has 1')
    (folder / 'empty').mkdir()
    refused(folder, 'empty is a class without images')
    (folder / 'empty').rmdir()
    write_images(folder, ['blue'])
    damaged = folder / 'blue' / '1.png'
    whole = damaged.read_bytes()
    for content in (whole[:200], b'words'):
        damaged.write_bytes(content)
        refused(folder, r'blue/1\.png is no image that can be used')
    damaged.write_bytes(whole)
    Image.new('RGB', (9, 9)).save(folder / 'loose.png')
    refused(folder, r'loose\.png is in no class')
    split = tmp_path / 'split'
    write_images(split / 'train', ['red', 'blue'])
    write_images(split / 'test', ['red', 'green'])
    refused(split, 'train and test hold different classes: blue, green')
    (split / 'val').mkdir()
    refused(split, 'val is beside a folder train')


def test_train_predict_export_and_fine_tune_on_own_images(tmp_path, command):
    folder = write_images(tmp_path / 'own')
    tiny = ['--config', ROOT / 'configs' / 'cnn.py', '--config.num_epochs=1', '--config.batch_size=4']
    first = ('main', *tiny, f'--config.dataset=folder:{folder}', '--workdir', tmp_path / 'run')
    explained = ('--explain', tmp_path / 'explained', '--json', folder / 'red')
    two = write_images(tmp_path / 'two', ['red', 'blue'])
    tune = (f'--config.dataset=folder:{two}', f'--config.init_from={tmp_path / "run"}', '--workdir', tmp_path / 'tuned')
    outputs = []
    for arguments in (
        first,
        ('predict', '--workdir', tmp_path / 'run', *explained),
        ('export', '--workdir', tmp_path / 'run', '--out', tmp_path / 'exported'),
        ('main', *tiny, *tune),
    ):
        done = command(*arguments, FLAX_DLVC_CACHE_DIR=os.environ['FLAX_DLVC_CACHE_DIR'])
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout + done.stderr)
    records = json.loads(outputs[1])
    assert len(records) == 10 == len(list((tmp_path / 'explained').iterdir()))
    assert {entry['class'] for entry in records[0]['predictions']} == set(COLORS)
    about = json.loads((tmp_path / 'exported' / 'model.json').read_text())
    assert about['class_names'] == sorted(COLORS) and about['input']['shape'] == ['batch', 32, 32, 3]
    assert 'initialised anew: Dense_1/bias, Dense_1/kernel' in ' '.join(outputs[3].split())
