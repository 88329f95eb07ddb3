from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import convolve, count, max_pool, shapes_of

from flax_dlvc.models import ResNet18
from flax_dlvc.models.resnet import BasicBlock, ResNet

pytestmark = pytest.mark.usefixtures('quick_compilation')


def make_images(size, batch=2):
    return np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)


def fill(shapes):
    """Arbitrary values that keep activations near one; variances and scales are positive."""
    generator = np.random.default_rng(1)

    def values(path, leaf):
        if path[-1].key in ('var', 'scale'):
            return generator.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == 'kernel' else 10
        return (generator.normal(size=leaf.shape) * np.sqrt(1 / fan_in)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(values, shapes)


def apply(model, variables, x, *, train=False, seed=0):
    """Logits, and the batch statistics after the call."""
    logits, changed = jitted_apply(model, train, variables, x, jax.random.key(seed))
    return np.asarray(logits), changed.get('batch_stats')


@partial(jax.jit, static_argnums=(0, 1))
def jitted_apply(model, train, variables, x, key):
    return model.apply(variables, x, train=train, rngs={'dropout': key}, mutable=['batch_stats'] if train else [])


class Reference:
    """torchvision's `resnet18` in NumPy, over the variables of ours."""

    def __init__(self, variables, train=False):
        self.params = jax.tree.map(np.float64, variables['params'])
        self.statistics = jax.tree.map(np.float64, variables['batch_stats'])
        self.train = train

    def norm(self, x, params, statistics):
        if self.train:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            statistics['mean'] = 0.9 * statistics['mean'] + 0.1 * mean
            statistics['var'] = 0.9 * statistics['var'] + 0.1 * var
        else:
            mean, var = statistics['mean'], statistics['var']
        return (x - mean) / np.sqrt(var + 1e-5) * params['scale'] + params['bias']

    def block(self, x, params, statistics, stride):
        y = convolve(x, params['conv1']['kernel'], stride, 1)
        y = np.maximum(self.norm(y, params['bn1'], statistics['bn1']), 0)
        y = self.norm(convolve(y, params['conv2']['kernel'], 1, 1), params['bn2'], statistics['bn2'])
        if 'downsample_conv' in params:
            x = convolve(x, params['downsample_conv']['kernel'], stride, 0)
            x = self.norm(x, params['downsample_bn'], statistics['downsample_bn'])
        return np.maximum(x + y, 0)

    def logits(self, x, stem, stage_sizes):
        params, statistics = self.params, self.statistics
        stride, padding = (2, 3) if stem == 'imagenet' else (1, 1)
        x = convolve(x, params['conv1']['kernel'], stride, padding)
        x = np.maximum(self.norm(x, params['bn1'], statistics['bn1']), 0)
        if stem == 'imagenet':
            x = max_pool(x, 3, 2, 1)
        for stage, size in enumerate(stage_sizes):
            for block in range(size):
                name = f'layer{stage + 1}_{block}'
                x = self.block(x, params[name], statistics[name], 2 if stage and not block else 1)
        return x.mean((1, 2)) @ params['fc']['kernel'] + params['fc']['bias']


def expected_count(stem_size):
    """Stem, 64-64 twice, then stages that double the features and project the shortcut; two numbers a norm."""

    def conv(kernel, inputs, outputs):
        return kernel * kernel * inputs * outputs + 2 * outputs

    total = conv(stem_size, 3, 64) + 4 * conv(3, 64, 64)
    for features in (128, 256, 512):
        total += conv(3, features // 2, features) + 3 * conv(3, features, features) + conv(1, features // 2, features)
    return total + (512 + 1) * 10


@pytest.mark.parametrize(('stem', 'expected'), [('imagenet', 11_181_642), ('cifar', 11_173_962)])
def test_parameter_count(stem, expected):
    shapes = shapes_of(ResNet18(num_classes=10, stem=stem), make_images(32))
    assert count(shapes['params']) == expected_count(7 if stem == 'imagenet' else 3) == expected
    assert count(shapes['batch_stats']) == 2 * (64 * 5 + 128 * 5 + 256 * 5 + 512 * 5)


@pytest.mark.parametrize(('stem', 'size'), [('imagenet', 32), ('cifar', 16)])
def test_logits_are_numpys(stem, size):
    model, images = ResNet18(num_classes=10, stem=stem), make_images(size)
    variables = fill(shapes_of(model, images))
    logits, _ = apply(model, variables, images)
    expected = Reference(variables).logits(images.astype(np.float64), stem, (2, 2, 2, 2))
    assert logits.shape == (2, 10) and logits.dtype == np.float32
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize(('features', 'stride'), [(4, 1), (8, 2), (8, 1), (4, 2)])
def test_a_block_is_numpys(features, stride, train):
    model = BasicBlock(features, stride, jnp.float32)
    x = np.random.default_rng(0).normal(size=(3, 9, 8, 4)).astype(np.float32)
    variables = fill(shapes_of(model, x))
    assert ('downsample_conv' in variables['params']) == ((features, stride) != (4, 1))
    reference = Reference(variables, train)
    expected = reference.block(x.astype(np.float64), reference.params, reference.statistics, stride)
    y, statistics = apply(model, variables, x, train=train)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    if train:
        jax.tree.map(
            lambda left, right: np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6),
            statistics,
            reference.statistics,
        )


@pytest.fixture(scope='module')
def small():
    """A network of two blocks, its variables and images."""
    images = make_images(8, batch=4)
    variables = fill(shapes_of(ResNet(num_classes=5, stage_sizes=(1, 1), stem='cifar'), images))
    return lambda **fields: ResNet(num_classes=5, stage_sizes=(1, 1), stem='cifar', **fields), variables, images


def test_a_network_in_training_is_numpys(small):
    make_model, variables, images = small
    logits, statistics = apply(make_model(), variables, images, train=True)
    reference = Reference(variables, train=True)
    expected = reference.logits(images.astype(np.float64), 'cifar', (1, 1))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    jax.tree.map(
        lambda left, right: np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-5),
        statistics,
        reference.statistics,
    )


def test_statistics_change_in_training_only(small):
    make_model, variables, images = small
    _, statistics = apply(make_model(), variables, images, train=True)
    changed = jax.tree.map(lambda left, right: bool((left != right).any()), statistics, variables['batch_stats'])
    assert all(jax.tree.leaves(changed)) and len(jax.tree.leaves(changed)) == 12


def test_statistics_over_an_axis_are_those_of_the_whole_batch(small):
    make_model, variables, images = small
    whole, expected = apply(make_model(), variables, images, train=True)
    halves = images.reshape(2, 2, *images.shape[1:])
    synchronised = jax.vmap(
        partial(jitted_apply, make_model(batch_norm_axis='halves'), True), (None, 0, None), axis_name='halves'
    )
    logits, changed = synchronised(variables, halves, jax.random.key(0))
    np.testing.assert_allclose(logits.reshape(whole.shape), whole, atol=1e-4)
    jax.tree.map(
        lambda each, one: np.testing.assert_allclose(each, np.stack([one, one]), rtol=1e-4, atol=1e-5),
        changed['batch_stats'],
        expected,
    )


def test_statistics_do_not_change_in_evaluation(small):
    make_model, variables, images = small
    evaluate = jax.jit(lambda: make_model().apply(variables, images, train=False, mutable=['batch_stats']))
    jax.tree.map(np.testing.assert_array_equal, evaluate()[1]['batch_stats'], variables['batch_stats'])


def test_in_evaluation_the_batch_does_not_matter(small):
    make_model, variables, images = small
    both, _ = apply(make_model(), variables, images)
    others, _ = apply(make_model(), variables, np.concatenate([images[:1], 3 * images[1:]]))
    np.testing.assert_allclose(others[:1], both[:1], atol=1e-5)
    assert np.abs(others[1:] - both[1:]).max() > 0.1


def test_dropout_in_training_only(small):
    make_model, variables, images = small
    model = make_model(dropout_rate=0.5)
    evaluated, _ = apply(model, variables, images, seed=0)
    np.testing.assert_array_equal(evaluated, apply(model, variables, images, seed=1)[0])
    trained, statistics = apply(model, variables, images, train=True, seed=0)
    others, same_statistics = apply(model, variables, images, train=True, seed=1)
    assert np.abs(trained - others).max() > 0.1
    # Dropout comes after all statistics.
    jax.tree.map(np.testing.assert_array_equal, statistics, same_statistics)


def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32(small):
    make_model, variables, images = small
    model = make_model(dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes_of(model, images)))
    exact, _ = apply(make_model(), variables, images, train=True)
    logits, statistics = apply(model, variables, images, train=True)
    assert logits.dtype == np.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(statistics))
    assert 1e-4 < np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


def test_initialisation_is_torchvisions():
    """Normal with variance 2 / fan-out for convolutions; norms start as the identity."""
    model = BasicBlock(64, 2, jnp.float32)
    variables = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 16)), train=False))()
    params, statistics = variables['params'], variables['batch_stats']
    for name, fan_out in (('conv1', 9 * 64), ('conv2', 9 * 64), ('downsample_conv', 64)):
        kernel = np.asarray(params[name]['kernel'])
        assert kernel.std() == pytest.approx(np.sqrt(2 / fan_out), rel=5 / np.sqrt(2 * kernel.size))
        assert abs(kernel.mean()) < 5 * np.sqrt(2 / fan_out / kernel.size)
    for name in ('bn1', 'bn2', 'downsample_bn'):
        assert (params[name]['scale'] == 1).all() and (params[name]['bias'] == 0).all()
        assert (statistics[name]['mean'] == 0).all() and (statistics[name]['var'] == 1).all()
