"""Predicting files with a run directory alone."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from flax_dlvc import predict, rundir
from flax_dlvc.errors import CommandError, ConfigError
from flax_dlvc.images import ImageError
from flax_dlvc.setup import set_up
from flax_dlvc.transfer import load_trained, save_as_run


@pytest.fixture(scope='module')
def run_directory(tmp_path_factory, small_vit_config):
    """A small ViT on the digits, as it is initialised."""
    workdir = tmp_path_factory.mktemp('predict') / 'run'
    setup = set_up(small_vit_config)
    state = setup.create_state()
    save_as_run(workdir, setup, state.variables)
    return workdir


@pytest.fixture(scope='module')
def pictures(tmp_path_factory, small_vit_config):
    """Digits of the test split as files; and one that is damaged."""
    folder = tmp_path_factory.mktemp('pictures')
    test = set_up(small_vit_config).dataset.test
    for index in range(3):
        Image.fromarray(test.images[index]).save(folder / f'digit_{index}.png')
    (folder / 'torn.png').write_bytes((folder / 'digit_0.png').read_bytes()[:60])
    return folder


def expected_probabilities(workdir, config, index):
    setup = set_up(config)
    _, variables = load_trained(workdir)
    images = setup.dataset.test.images[index : index + 1].astype(np.float32) / 255
    normalized = (images - np.float32(setup.dataset.mean)) / np.float32(setup.dataset.std)
    return np.asarray(jax.nn.softmax(setup.model.apply(variables, normalized, train=False)))[0]


def test_probabilities_are_the_models_and_need_no_dataset(
    run_directory, pictures, small_vit_config, capsys, monkeypatch
):
    monkeypatch.setattr('flax_dlvc.data.load', None)  # would fail
    predict.main(['', '--workdir', str(run_directory), '--json', '--top', '10', str(pictures / 'digit_*.png')])
    monkeypatch.undo()
    records = json.loads(capsys.readouterr().out)
    assert [record['path'] for record in records] == [str(pictures / f'digit_{index}.png') for index in range(3)]
    for index, record in enumerate(records):
        expected = expected_probabilities(run_directory, small_vit_config, index)
        found = [entry['probability'] for entry in record['predictions']]
        np.testing.assert_allclose(found, np.sort(expected)[::-1], atol=1e-5)
        assert record['predictions'][0]['class'] == str(expected.argmax())


def test_the_views_of_the_config_are_averaged_as_in_the_test(run_directory, pictures):
    setup, variables = load_trained(run_directory)
    setup.config.test_time_augmentation = 'mirror'
    (prediction,) = predict.predict(setup, variables, [pictures / 'digit_0.png'])
    images = np.stack([prediction.image, prediction.image[:, ::-1]]).astype(np.float32) / 255
    normalized = (images - np.float32(setup.dataset.mean)) / np.float32(setup.dataset.std)
    logits = setup.model.apply(variables, normalized, train=False)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
    np.testing.assert_allclose(prediction.probabilities, jax.nn.softmax(logits.mean(axis=0)), atol=1e-6)


def test_a_path_in_brackets_is_shown_as_it_is(run_directory, pictures, tmp_path, capsys):
    path = tmp_path / 'red[edit]' / '[' / 'digit.png'
    path.parent.mkdir(parents=True)
    path.write_bytes((pictures / 'digit_0.png').read_bytes())
    predict.main(['', '--workdir', str(run_directory), '--top', '1', str(path)])
    assert str(path) in capsys.readouterr().out


def test_what_predict_compiles_is_kept(run_directory, pictures, tmp_path, command):
    done = command('predict', '--workdir', run_directory, pictures / 'digit_0.png', FLAX_DLVC_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / 'compiled').iterdir())


def test_a_damaged_image_costs_a_line_and_the_exit_code(run_directory, pictures, tmp_path, capsys):
    arguments = ['', '--workdir', str(run_directory), '--top', '2', '--explain', str(tmp_path / 'out'), str(pictures)]
    with pytest.raises(CommandError, match='1 of 4 images cannot be read') as caught:
        predict.main(arguments)
    assert caught.value.exit_code == 1
    out, err = capsys.readouterr()
    assert err.startswith(f'{pictures / "torn.png"}: ') and err.count('\n') == 1
    assert all(f'digit_{index}.png' in out for index in range(3))
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
        f'000{index}_digit_{index}.png' for index in range(3)
    ]


def test_the_longest_name_has_an_explanation(run_directory, pictures, tmp_path, capsys):
    path = tmp_path / f'{"é" * 125}.png'
    path.write_bytes((pictures / 'digit_0.png').read_bytes())
    predict.main(['', '--workdir', str(run_directory), '--explain', str(tmp_path / 'out'), str(path)])
    assert path.name in capsys.readouterr().out
    assert len(list((tmp_path / 'out').iterdir())) == 1


def test_many_images_come_out_in_order(run_directory, pictures, monkeypatch):
    monkeypatch.setattr(predict, 'BATCH_SIZE', 2)
    setup, variables = load_trained(run_directory)
    names = ['digit_2', 'torn', 'digit_0', 'digit_1', 'missing', 'digit_2']
    results = list(predict.predict(setup, variables, [pictures / f'{name}.png' for name in names]))
    kinds = [isinstance(result, predict.Prediction) for result in results]
    assert kinds == [True, False, True, True, False, True]
    assert isinstance(results[4][1], ImageError)
    np.testing.assert_allclose(results[0].probabilities, results[5].probabilities, atol=1e-6)
    assert not np.allclose(results[0].probabilities, results[2].probabilities)


def test_what_is_refused(run_directory, pictures, tmp_path):
    image = str(pictures / 'digit_0.png')
    with pytest.raises(ConfigError, match='--top must be at least 1'):
        predict.main(['', '--workdir', str(run_directory), '--top', '0', image])
    with pytest.raises(ConfigError, match='is not a directory'):
        predict.main(['', '--workdir', str(tmp_path / 'none'), image])
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match='cannot make the folder'):
        predict.main(['', '--workdir', str(run_directory), '--explain', str(tmp_path / 'file'), image])
    (tmp_path / 'empty').mkdir()
    with pytest.raises(CommandError, match='there are no images in'):
        predict.main(['', '--workdir', str(run_directory), str(tmp_path / 'empty')])


def test_dataset_json(run_directory, tmp_path, small_vit_config):
    dataset = set_up(small_vit_config).dataset
    known = rundir.read_dataset(run_directory)
    labels = {'labels_crc32': dataset.describe()['labels_crc32']}
    assert known.describe() | labels == dataset.describe() == rundir.read_description(run_directory)
    assert known.class_names == tuple('0123456789') and known.image_shape == (32, 32, 3)
    rundir.write_dataset(run_directory, dataset)  # the same again
    rundir.write_dataset(tmp_path, dataset)
    text = (tmp_path / 'dataset.json').read_text()
    (tmp_path / 'dataset.json').write_text(text.replace('"9"', '"nine"'))
    with pytest.raises(ConfigError, match=r'is not what .* says of it any more'):
        rundir.write_dataset(tmp_path, dataset)
    for damage in ('', '[]', '{}', '{"image_shape": 3}', text[:-20]):
        (tmp_path / 'dataset.json').write_text(damage)
        with pytest.raises(ConfigError, match='is damaged'):
            rundir.read_dataset(tmp_path)
    (tmp_path / 'dataset.json').unlink()
    with pytest.raises(ConfigError, match=r'has no dataset\.json'):
        rundir.read_dataset(tmp_path)


def test_the_command(run_directory, pictures, command):
    done = command('predict', '--workdir', run_directory, pictures / 'digit_0.png', pictures / 'torn.png')
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and lines[1] == 'error: 1 of 2 images cannot be read'
    assert 'probability' in done.stdout
