"""Folders of image files as datasets, and a run on one as a new user would make it."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_data import write_known

from configs import default
from flax_dlvc import data, decoded, main
from flax_dlvc.errors import ConfigError
from flax_dlvc.folder import Folder
from flax_dlvc.images import read_image

pytestmark = pytest.mark.usefixtures('quick_compilation')

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


def refused(folder, match, **splits):
    with pytest.raises(ConfigError, match=match) as caught:
        load(folder, **splits)
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
    refused(tmp_path / 'own', 'say --config.splits.train=train --config.splits.validation=validation')
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


def test_every_class_is_trained_on_and_tested(tmp_path):
    folder = write_images(tmp_path / 'own', ['red', 'green'], 23)
    write_images(folder, ['blue'], 2)
    dataset = load(folder, train='train', validation='')
    assert np.bincount(dataset.train.labels).tolist() == [1, 18, 18]
    assert np.bincount(dataset.test.labels).tolist() == [1, 5, 5]
    (folder / 'blue' / '0.jpg').unlink()
    refused(folder, 'blue has one image, but training and test need one each')


def test_a_file_that_goes_away_meanwhile(tmp_path):
    folder = Folder(write_images(tmp_path / 'own', ['red', 'blue']))
    (tmp_path / 'own' / 'red' / '1.png').unlink()
    with pytest.raises(ConfigError, match=r'cannot read .*red/1\.png: No such file'):
        folder.read('train')


def test_what_is_refused(tmp_path):
    folder = tmp_path / 'own'
    refused(folder, 'cannot read .*own: No such file')
    write_images(folder, ['red'])
    refused(folder, 'at least two classes; it has 1')
    (folder / 'empty').mkdir()
    refused(folder, 'empty is a class without images')
    (folder / 'empty').rmdir()
    not_text = os.fsdecode(b'caf\xe9')
    (write_images(tmp_path, ['blue']) / 'blue').rename(folder / not_text)
    refused(folder, r"a class whose name is not UTF-8, 'caf\\udce9'; rename its folder")
    shutil.rmtree(folder / not_text)
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


def test_no_file_is_passed_over_in_silence(tmp_path):
    folder = write_images(tmp_path / 'own', ['red', 'blue'], 4)
    (folder / '.hidden.png').write_text('')
    (folder / 'labels.csv').write_text('')
    elsewhere = write_images(tmp_path / 'elsewhere', ['green'], 6)
    (folder / 'red' / 'more').symlink_to(elsewhere / 'green')
    os.link(folder / 'blue' / '1.png', os.fsencode(folder / 'blue') + b'/caf\xe9.png')
    dataset = load(folder, train='train', validation='')
    assert (np.bincount(dataset.train.labels) + np.bincount(dataset.test.labels)).tolist() == [5, 10]
    (folder / 'red' / 'broken.png').symlink_to('nowhere')
    refused(folder, r'cannot read .*broken\.png: No such file')
    split = tmp_path / 'split'
    for name in ('train', 'test'):
        write_images(split / name, ['red', 'blue'], 2)
    Image.new('RGB', (9, 9)).save(split / 'loose.png')
    refused(split, r'loose\.png is in no class')


@pytest.mark.parametrize('names', [('training', 'test'), ('validation', 'test'), ('Train', 'Val')])
def test_splits_by_other_names_are_no_classes(tmp_path, names):
    for name in names:
        write_images(tmp_path / 'own' / name, ['red', 'blue'], 4)
    refused(tmp_path / 'own', 'name them train, validation, test')


def test_a_relative_path_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused('photos', f'^cannot read {tmp_path}/photos: No such file')
    write_images(tmp_path / 'photos', ['red'])
    refused('photos', f'^{tmp_path}/photos needs a folder for each of at least two classes')


def test_a_folder_whose_name_was_forgotten(tmp_path, monkeypatch):
    """As by `folder:$PHOTOS` where there is no such variable."""
    monkeypatch.chdir(write_images(tmp_path / 'own'))
    refused('', "dataset 'folder:' names no folder; set --config.dataset=folder:PATH")
    assert load('.').class_names == ('blue', 'green', 'red')


def test_a_user_who_is_not_there():
    refused('~nosuchuser/photos', 'cannot read ~nosuchuser/photos')


def test_train_predict_and_export_on_own_images(tmp_path, command, command_here):
    folder = write_images(tmp_path / 'own')
    tiny = ['--config', ROOT / 'configs' / 'cnn.py', '--config.num_epochs=1', '--config.batch_size=4']
    first = ('main', *tiny, f'--config.dataset=folder:{folder}', '--workdir', tmp_path / 'run')
    explained = ('--explain', tmp_path / 'explained', '--json', folder / 'red')
    outputs = []
    for arguments in (
        first,
        ('predict', '--workdir', tmp_path / 'run', *explained),
        ('export', '--workdir', tmp_path / 'run', '--out', tmp_path / 'exported'),
    ):
        done = command(*arguments, FLAX_DLVC_CACHE_DIR=os.environ['FLAX_DLVC_CACHE_DIR'])
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout + done.stderr)
    records = json.loads(outputs[1])
    assert len(records) == 10 == len(list((tmp_path / 'explained').iterdir()))
    assert {entry['class'] for entry in records[0]['predictions']} == set(COLORS)
    about = json.loads((tmp_path / 'exported' / 'model.json').read_text())
    assert about['class_names'] == sorted(COLORS) and about['input']['shape'] == ['batch', 32, 32, 3]
    (folder / 'red').rename(folder / 'wine')  # then another class comes last
    for module in ('evaluate', 'verify'):
        done = command_here(module, '--workdir', tmp_path / 'run')
        assert done.returncode == 2 and done.stderr.count('\n') == 1
        assert 'dataset.json says of it any more; bring back what the run began with' in done.stderr
    (folder / 'wine').rename(folder / 'red')
    (folder / 'red' / 'notes.txt').write_text('words')
    done = command_here('main', *tiny, f'--config.dataset=folder:{folder}', '--workdir', tmp_path / 'new')
    assert (done.returncode, done.stdout) == (2, '') and not (tmp_path / 'new').exists()
    assert done.stderr.startswith(f'error: {folder}/red/notes.txt is no image') and done.stderr.count('\n') == 1


def test_one_channel_fashion_mnist_then_a_folder_of_grey_images(tmp_path, monkeypatch, capsys):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path / 'tfds'))
    write_known(tmp_path / 'tfds', 'fashion_mnist', [('train', 50), ('test', 10)])
    folder = write_images(tmp_path / 'own', mode='L')
    flags = ['--config', str(ROOT / 'configs' / 'cnn.py'), '--config.num_epochs=1', '--config.num_devices=1']
    flags += ['--config.batch_size=8']

    def train(workdir, *fields):
        main.main(['main', *flags, '--workdir', str(workdir), *fields])
        return json.loads((workdir / 'result.json').read_text()), json.loads((workdir / 'dataset.json').read_text())

    result, dataset = train(tmp_path / 'fashion', '--config.dataset=fashion_mnist')
    assert result['test']['num_examples'] == 10 and np.isfinite(result['test']['cross_entropy'])
    assert dataset['image_shape'] == [28, 28, 1] and dataset['class_names'][0] == 'T-shirt/top'
    capsys.readouterr()
    init_from = f'--config.init_from={tmp_path / "fashion"}'
    result, dataset = train(tmp_path / 'grey', f'--config.dataset=folder:{folder}', init_from)
    output = ''.join(capsys.readouterr())
    assert 'initialised anew: Dense_0/kernel, Dense_1/bias, Dense_1/kernel' in ' '.join(output.split())
    assert result['test']['num_examples'] == 6 and dataset['image_shape'] == [32, 32, 1]
    assert dataset['class_names'] == sorted(COLORS)
