"""PyTorch's weights in and out."""

import functools
import importlib
import json
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, SMALL_RUN
from safetensors.numpy import save_file

from flax_dlvc import interop
from flax_dlvc.errors import ConfigError
from flax_dlvc.setup import set_up
from flax_dlvc.transfer import load_trained, save_as_run

pytestmark = pytest.mark.usefixtures('quick_compilation')


def test_importing_what_was_exported_is_the_identity(tmp_path, small_vit_config):
    setup = set_up(small_vit_config)
    variables = setup.create_state().variables
    save_as_run(tmp_path / 'a', setup, variables)
    interop.export_weights(tmp_path / 'a', 'best', tmp_path / 'w.safetensors')
    for name in ('.', '..', '/'):
        with pytest.raises(ConfigError, match='is a directory; name a file with --weights'):
            interop.export_weights(tmp_path / 'a', 'best', Path(name))
    with pytest.raises(ConfigError, match='No such file or directory; choose another --weights'):
        interop.export_weights(tmp_path / 'a', 'best', tmp_path / 'nowhere' / 'w.safetensors')
    interop.import_weights(setup, tmp_path / 'w.safetensors', tmp_path / 'b')
    jax.tree.map(np.testing.assert_array_equal, variables, load_trained(tmp_path / 'b')[1])

    weights = interop.to_torch(setup, variables)
    weights['cls_token'] = weights['cls_token'][0]
    weights['extra'] = weights.pop('mlp_head.1.bias')
    with pytest.raises(ConfigError, match=r'missing: mlp_head\.1\.bias; surplus: extra; misshapen: cls_token is'):
        interop.from_torch(setup, weights)


@pytest.mark.parametrize('value', [np.float64(1e300), np.float32(np.nan), np.int64(1)])
def test_weights_that_float32_cannot_hold_are_refused(tmp_path, small_vit_config, value):
    setup = set_up(small_vit_config)
    weights = interop.to_torch(setup, setup.create_state().variables)
    weights['cls_token'] = np.full(weights['cls_token'].shape, value)
    save_file(weights, tmp_path / 'w.safetensors')
    with pytest.raises(ConfigError, match=r'not finite numbers: cls_token$'):
        interop.import_weights(setup, tmp_path / 'w.safetensors', tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


# The logits of one image, by PyTorch 2.13, for the weights of `numbered_weights`; the second test below compares anew.
GOLDEN = {
    'cnn': [2.180240, 0.720750, -0.911636, -1.314757, 0.961415, 0.626681, 1.060198, 0.562608, -0.757545, 0.713123],
    'resnet18': [
        -0.187615,
        1.508803,
        -0.609683,
        -0.205698,
        0.173867,
        0.336554,
        -0.942617,
        -0.405335,
        0.000774,
        0.986386,
    ],
    'vit': [-0.049073, 1.069786, -0.113116, 0.100380, 0.434149, -0.743350, 0.225563, 0.098295, -0.741696, -1.050844],
}


def numbered_weights(name):
    """A setup and weights under PyTorch's names, in PyTorch's layout: random numbers that each name decides."""
    config = importlib.import_module(f'configs.{name}').get_config()
    config.update_from_flattened_dict(SMALL_RUN)
    setup = set_up(config)
    weights = {}
    for key, value in interop.to_torch(setup, setup.create_state().variables).items():
        numbers = np.random.default_rng(zlib.crc32(key.encode())).normal(size=value.shape)
        scale = max(1, value[0].size) ** -0.5 if value.ndim > 1 else 0.3
        # Statistics, biases and scales that are not zero or one, so that each has to be in its place.
        weights[key] = (0.5 + np.abs(numbers) if key.endswith('running_var') else scale * numbers).astype(np.float32)
    images = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    return setup, weights, images


@pytest.mark.parametrize('name', GOLDEN)
def test_logits_are_those_that_pytorch_gave(name):
    setup, weights, images = numbered_weights(name)
    apply = jax.jit(functools.partial(setup.model.apply, train=False))
    (logits,) = np.asarray(apply(interop.from_torch(setup, weights), images))
    assert np.abs(logits).max() > 0.1
    np.testing.assert_allclose(logits, GOLDEN[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(('name', 'reference'), [('cnn', 'CNN'), ('resnet18', 'ResNet18'), ('vit', 'ViT')])
def test_pytorch_gives_these_logits(name, reference):
    torch = pytest.importorskip('torch', reason='compares with PyTorch, which is not installed')
    from benchmarks import torch_reference

    _, weights, images = numbered_weights(name)
    model = getattr(torch_reference, reference)(0.0).eval()
    state = {key: torch.from_numpy(value) for key, value in weights.items()}
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not surplus and all(key.endswith('num_batches_tracked') for key in missing)
    with torch.no_grad():
        (logits,) = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(logits, GOLDEN[name], atol=1e-4, rtol=1e-4, err_msg=str(logits.tolist()))


def test_a_run_goes_out_comes_back_and_is_evaluated_and_fine_tuned(tmp_path, command, command_here, small_run_flags):
    """Through the commands, as a user would: train, export, import, evaluate, train on with other classes."""
    config = ['--config', ROOT / 'configs' / 'cnn.py', *small_run_flags, '--config.num_epochs=1']
    trained, imported, tuned = (tmp_path / name for name in ('trained', 'imported', 'tuned'))
    weights = ['--weights', tmp_path / 'cnn.safetensors']
    for module, *arguments in (
        ('main', *config, '--workdir', trained),
        ('interop', 'export', '--workdir', trained, *weights),
        ('interop', 'import', *config, '--workdir', imported, *weights),
        ('evaluate', '--workdir', imported),
    ):
        done = command(module, *arguments)
        assert done.returncode == 0, done.stderr
    evaluation = json.loads((imported / 'evaluation-test.json').read_text())
    test = json.loads((trained / 'result.json').read_text())['test']
    assert evaluation['cross_entropy'] == test['cross_entropy']

    done = command('main', *config, f'--config.init_from={imported}', '--config.learning_rate=1e-9', '--workdir', tuned)
    assert done.returncode == 0, done.stderr
    result = json.loads((tuned / 'result.json').read_text())['test']
    assert result['cross_entropy'] == pytest.approx(test['cross_entropy'], rel=1e-4)
    done = command_here('interop', 'export', '--workdir', trained, '--weights', '..')
    assert done.returncode == 2 and done.stderr == 'error: .. is a directory; name a file with --weights\n'
    before = sorted(path for path in imported.rglob('*') if path.name != '.lock')
    in_place = command_here('main', *config, '--workdir', imported)
    assert in_place.returncode == 2 and in_place.stderr.count('\n') == 1
    assert f'not a run; to train from them, set --config.init_from={imported} and another' in in_place.stderr
    assert sorted(path for path in imported.rglob('*') if path.name != '.lock') == before
    again = command_here('interop', 'import', *config, '--workdir', imported, *weights)
    assert again.returncode == 2 and 'holds a run already' in again.stderr and again.stderr.count('\n') == 1
    nowhere = command_here('main', *config, f'--config.init_from={tmp_path / "none"}', '--workdir', tmp_path / 'new')
    assert nowhere.returncode == 2 and nowhere.stderr.count('\n') == 1, nowhere.stderr
