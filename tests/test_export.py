"""The exported file against the model that it was made of, and in a process that has JAX but not this package."""

import errno
import json
import os
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from conftest import ROOT, SMALL_RUN, SMALL_VIT
from PIL import Image

from configs import cnn, resnet18, vit
from flax_dlvc import export
from flax_dlvc.errors import ConfigError
from flax_dlvc.images import read_image
from flax_dlvc.setup import set_up
from flax_dlvc.transfer import load_trained, save_as_run

pytestmark = pytest.mark.usefixtures('quick_compilation')

EVERY_MODEL = pytest.mark.parametrize('workdir', [cnn, resnet18, vit], ids=['cnn', 'resnet18', 'vit'], indirect=True)


@pytest.fixture(scope='module')
def workdir(request, tmp_path_factory):
    """A run's directory of untrained parameters, of the ViT where a test does not ask for every model."""
    source = getattr(request, 'param', vit)
    config = source.get_config()
    config.update_from_flattened_dict(SMALL_RUN | (SMALL_VIT if source is vit else {}))
    config.name = config.model.name
    workdir = tmp_path_factory.mktemp(config.name) / 'run'
    setup = set_up(config)
    save_as_run(workdir, setup, setup.create_state().variables)
    return workdir


@EVERY_MODEL
def test_exported_function_gives_the_same_probabilities_for_any_batch(workdir, tmp_path, capsys):
    export.main(['', '--workdir', str(workdir), '--out', str(tmp_path / 'out')])
    assert 'for cpu and cuda' in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['model.jax', 'model.json', 'out']
    exported = jax.export.deserialize((tmp_path / 'out' / 'model.jax').read_bytes())
    assert exported.platforms == ('cpu', 'cuda')
    description = json.loads((tmp_path / 'out' / 'model.json').read_text())
    assert description['class_names'] == list('0123456789')
    assert description['input']['shape'][1:] == list(exported.in_avals[0].shape[1:])

    setup, variables = load_trained(workdir)
    for size in (1, 5):
        images = np.random.default_rng(size).integers(0, 256, (size, *setup.dataset.image_shape), np.uint8)
        expected = setup.prediction_step(variables, images)
        np.testing.assert_allclose(exported.call(images), expected, atol=1e-6)


def test_the_views_of_the_config_are_averaged(workdir):
    setup, variables = load_trained(workdir)
    images = np.random.default_rng(0).integers(0, 256, (3, *setup.dataset.image_shape), np.uint8)
    once = setup.prediction_step(variables, images)
    setup.config.test_time_augmentation = 'mirror'
    del setup.__dict__['prediction_step']
    expected = setup.prediction_step(variables, images)
    assert np.abs(expected - once).max() > 1e-4
    exported = export.inference_function(setup, jax.device_get(variables))
    np.testing.assert_allclose(exported.call(images), expected, atol=1e-6)


@EVERY_MODEL
def test_parameters_are_in_the_file_once_and_each_platform_has_its_route(workdir):
    setup, variables = load_trained(workdir)
    exported = export.inference_function(setup, jax.device_get(variables))
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    assert 0.9 * num_bytes < len(exported.serialize()) < 1.5 * num_bytes + 200_000
    if setup.config.model.name == 'resnet18':  # its small maps are matrix products on a CPU, convolutions elsewhere
        program = exported.mlir_module()
        assert 'stablehlo.dot_general' in program
        assert program.count('stablehlo.convolution') > 20


def test_readme_script_runs_without_this_package(workdir, tmp_path):
    export.export(workdir, 'best', tmp_path / 'exported')
    setup, variables = load_trained(workdir)
    shape = setup.dataset.image_shape
    pixels = np.random.default_rng(0).integers(0, 256, (90, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'photo.png')
    image = read_image(tmp_path / 'photo.png', shape)  # as `predict` sees it
    (script,) = re.findall(r'```python\n(import json.*?jax\.export.*?)```', (ROOT / 'README.md').read_text(), re.S)
    assert len(script.splitlines()) <= 10
    blocked = f'import sys; sys.modules["flax_dlvc"] = None\n{script}'
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    done = subprocess.run(
        [sys.executable, '-c', blocked], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    scores = setup.prediction_step(variables, image[None])
    name, probability = done.stdout.split()
    assert int(name) == int(np.argmax(scores))
    assert float(probability) == pytest.approx(float(np.max(scores)), abs=1e-3)


def test_a_directory_that_is_there_is_left_alone(workdir, tmp_path):
    (tmp_path / 'mine').write_text('here')
    for out in (tmp_path, tmp_path / 'mine'):
        with pytest.raises(ConfigError, match='is there already'):
            export.export(workdir, 'best', out)
    assert [path.name for path in tmp_path.iterdir()] == ['mine']
    with pytest.raises(ConfigError, match='is not a directory'):
        export.main(['', '--workdir', str(tmp_path / 'nowhere'), '--out', str(tmp_path / 'out')])


def test_out_may_be_the_empty_directory_one_stands_in(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    export.main(['', '--workdir', str(workdir), '--out', '.'])
    assert 'model.jax' in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ['model.jax', 'model.json']


def test_what_a_killed_export_left_is_cleared_away(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(export, 'inference_function', lambda *_: types.SimpleNamespace(serialize=lambda: b'whole'))
    (tmp_path / '.writing').mkdir()
    (tmp_path / '.writing' / 'model.json').write_text('{')
    (tmp_path / 'model.jax').write_bytes(b'of the killed one')
    (tmp_path / 'mine').write_text('here')
    with pytest.raises(ConfigError, match='is there already'):
        export.export(workdir, 'best', tmp_path)
    (tmp_path / 'mine').unlink()
    export.export(workdir, 'best', tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['model.jax', 'model.json']
    assert (tmp_path / 'model.jax').read_bytes() == b'whole'

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tmp_path), 'write_bytes', interrupt)
    with pytest.raises(KeyboardInterrupt):
        export.export(workdir, 'best', tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_an_out_that_cannot_be_read_or_written(workdir, tmp_path, monkeypatch):
    def deny(self, *_, **__):
        raise PermissionError(errno.EACCES, 'Permission denied', str(self))

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), 'iterdir', deny)
        with pytest.raises(ConfigError, match=r'cannot read .*: Permission denied; choose another --out'):
            export.export(workdir, 'best', tmp_path)
    monkeypatch.setattr(export, 'inference_function', lambda *_: types.SimpleNamespace(serialize=lambda: b''))
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), 'write_bytes', deny)
        for out in (tmp_path, tmp_path / 'new' / 'out'):
            with pytest.raises(ConfigError, match=r'cannot write .*: Permission denied; choose another --out'):
                export.export(workdir, 'best', out)
            assert not list(tmp_path.rglob('model*')) and not list(tmp_path.rglob('.writing'))
