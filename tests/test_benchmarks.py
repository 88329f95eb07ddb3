import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.throughput import ratios

ROOT = Path(__file__).parents[1]


def test_ratio_is_taken_within_a_turn_and_against_the_best_peer():
    contenders = {'ours': {'train': [10, 30, 20]}, 'a': {'train': [5, 20, 10]}, 'b': {'train': [4, 60, 2]}, 'c': {}}
    assert ratios(contenders, 'train', ('a',)) == (1.5, 2.0, 2.0)
    assert ratios(contenders, 'train', ('a', 'b')) == (0.5, 2.0, 2.0)


def test_command_measures_and_keeps_what_was_measured_before(tmp_path):
    (tmp_path / 'benchmarks.json').write_text('{"throughput": {}, "other": {"kept": 1}}')
    options = ['--quick', '--models', 'cnn', '--batch-sizes', '16', '--dtypes', 'float32', '--peers', 'eager']
    command = [sys.executable, '-m', 'benchmarks', 'throughput', *options, '--output', tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / 'benchmarks.json').read_text())
    ours = results['throughput']['cnn, batch 16, float32']['value']['contenders']['ours']
    assert len(ours['train']) == len(ours['evaluate']) == 1 and ours['train'][0] > 0 and ours['peak_bytes'] > 2**26
    assert results['other'] == {'kept': 1}
    assert '| cnn, batch 16, float32 |' in (tmp_path / 'benchmarks.md').read_text()
    if 'eager' in results['throughput']['cnn, batch 16, float32']['value']['contenders']:
        return
    assert 'torch is not installed' in done.stdout


@pytest.mark.parametrize('name', ['cnn', 'resnet18', 'vit'])
def test_reference_computes_the_same_logits(name):
    torch = pytest.importorskip('torch', reason='PyTorch, the peer of the benchmarks, is not installed')
    import jax

    from benchmarks.torch_reference import MODELS, state_dict
    from flax_dlvc.models import create_model

    model = create_model(name, num_classes=10, dropout_rate=0.5, dtype='float32')
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    variables = jax.jit(lambda: model.init(jax.random.key(0), images, train=False))()
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    reference = MODELS[name](0.5).eval()
    reference.load_state_dict(
        state_dict({jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf) for path, leaf in leaves}),
        strict=False,
    )
    with torch.inference_mode():
        theirs = reference(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(model.apply(variables, images, train=False), theirs, atol=1e-4)
