"""The speedruns' network, against its definition in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import maximum_error
from reference import convolve, count, gelu, max_pool, shapes_of, windows

from configs import fast94, fast96
from flax_dlvc.models import create_model
from flax_dlvc.models.airbench import Airbench, Block, Whitening, dirac_init, unit_uniform_init, whitening_kernel

pytestmark = pytest.mark.usefixtures('quick_compilation')

IMAGES = np.random.default_rng(0).normal(size=(4, 20, 28, 3)).astype(np.float32)  # odd sizes are halved on the way
SMALL = {'num_classes': 5, 'widths': (4, 6, 6)}


def fill(shapes):
    """Arbitrary values: of single convolutions' order, and statistics other than those that norms begin with."""
    generator = np.random.default_rng(1)

    def values(path, leaf):
        low, high = (0.5, 2.0) if path[-1].key == 'var' else (-0.3, 0.3)
        return generator.uniform(low, high, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(values, shapes)


def forward(variables, x, depth, *, train):
    """Logits, and the running statistics after them."""
    params, statistics = variables['params'], variables['batch_stats']
    after = {'whitening': statistics['whitening']}

    def norm(block, name, x):
        running = statistics[block][name]
        now = {'mean': x.mean((0, 1, 2)), 'var': x.var((0, 1, 2))} if train else running
        after.setdefault(block, {})[name] = {key: 0.6 * running[key] + 0.4 * now[key] for key in running}
        return (x - now['mean']) / np.sqrt(now['var'] + 1e-12) + params[block][name]['bias']

    x = gelu(convolve(x, statistics['whitening']['kernel'], padding=0) + params['whitening']['bias'])
    for block in ('block1', 'block2', 'block3'):
        kernels = [params[block][f'conv{number}']['kernel'] for number in range(1, depth + 1)]
        x = shortcut = gelu(norm(block, 'norm1', max_pool(convolve(x, kernels[0]))))
        x = norm(block, 'norm2', convolve(x, kernels[1]))
        if depth == 3:
            x = norm(block, 'norm3', convolve(gelu(x), kernels[2])) + shortcut
        x = gelu(x)
    return x.max((1, 2)) @ params['classifier']['kernel'] / x.shape[-1], after


@pytest.mark.parametrize('depth', [2, 3])
def test_network_by_definition(depth):
    model = Airbench(**SMALL, depth=depth)
    variables = fill(shapes_of(model, IMAGES))
    expected, _ = forward(variables, np.float64(IMAGES), depth, train=False)
    logits = jax.jit(partial(model.apply, train=False))(variables, IMAGES)
    assert logits.shape == (4, 5) and logits.dtype == jnp.float32
    assert maximum_error(logits, expected) < 1e-5
    expected, after = forward(variables, np.float64(IMAGES), depth, train=True)
    logits, updated = jax.jit(partial(model.apply, train=True, mutable=['batch_stats']))(variables, IMAGES)
    assert maximum_error(logits, expected) < 1e-4
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), updated['batch_stats'], after)
    np.testing.assert_array_equal(updated['batch_stats']['whitening']['kernel'], after['whitening']['kernel'])


@pytest.mark.parametrize(('config', 'expected'), [(fast94, 1_971_352), (fast96, 9_915_416)])
def test_parameter_count(config, expected):
    """A bias per whitening filter, kernels without biases, norms without scales; the filters are not trained."""
    options = config.get_config().model
    shapes = shapes_of(
        create_model(num_classes=10, dropout_rate=0.0, dtype='bfloat16', **options), np.zeros((1, 32, 32, 3))
    )
    inputs, total = 24, 24
    for width in options.widths:
        total += 9 * inputs * width + (options.depth - 1) * 9 * width**2 + options.depth * width
        inputs = width
    assert count(shapes['params']) == total + 10 * inputs == expected


def test_defaults_are_those_of_fast94():
    options = {'num_classes': 10, 'dropout_rate': 0.0, 'dtype': 'bfloat16'}
    assert create_model(**options, **fast94.get_config().model) == Airbench(num_classes=10, dtype=jnp.dtype('bfloat16'))


def test_dropout_acts_in_training_alone():
    plain, dropping = Airbench(**SMALL), Airbench(**SMALL, dropout_rate=0.9)
    variables = fill(shapes_of(plain, IMAGES))
    rngs = {'dropout': jax.random.key(0)}

    def logits(model, train):
        return model.apply(variables, IMAGES, train=train, rngs=rngs, mutable=['batch_stats'])[0]

    np.testing.assert_array_equal(logits(dropping, False), logits(plain, False))
    assert maximum_error(logits(dropping, True), logits(plain, True)) > 0.1


def test_initial_values_are_airbenchs():
    """The classifier's are uniform and of deviation 1, the whitening bias's within PyTorch's bound for 5x5x3 inputs."""
    classifier = unit_uniform_init(jax.random.key(0), (300, 300))
    np.testing.assert_allclose([classifier.min(), classifier.max()], [-(3**0.5), 3**0.5], atol=0.01)
    assert abs(classifier.mean()) < 0.02 and abs(classifier.std() - 1) < 0.01
    bias = Whitening(5, jnp.float32).init(jax.random.key(0), smooth_images(2))['params']['bias']
    np.testing.assert_allclose([bias.min(), bias.max()], [-(75**-0.5), 75**-0.5], rtol=0.1)
    assert bias.shape == (150,) and np.abs(bias).max() <= 75**-0.5 and abs(bias.mean()) < 0.02


def test_dirac_kernel_copies_its_input():
    kernel = dirac_init(jax.random.key(0), (3, 3, 4, 6))
    image = np.random.default_rng(0).normal(size=(1, 5, 5, 4)).astype(np.float32)
    y = jax.lax.conv_general_dilated(image, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    np.testing.assert_allclose(y[..., :4], image, atol=1e-6)
    assert np.abs(kernel[..., 4:]).max() <= 36**-0.5 and np.std(kernel[..., 4:]) > 0.05


def test_blocks_begin_with_copies_and_a_third_convolution_is_residual():
    """With fresh statistics and a third kernel of zeros, what is left is the map after the first convolution, twice."""
    block = Block(4, 3, jnp.float32, None)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    variables = block.init(jax.random.key(0), x, train=False)
    variables['params']['conv3']['kernel'] = jnp.zeros((3, 3, 4, 4))
    expected = gelu(gelu(max_pool(x)))  # the first convolution copies its input
    np.testing.assert_allclose(block.apply(variables, x, train=False), expected, atol=1e-5)


def smooth_images(count, height=12, width=15):
    """Images whose neighbouring pixels and channels are correlated, as those of photographs."""
    noise = np.random.default_rng(0).normal(size=(count, height + 1, width + 1, 3)).astype(np.float32)
    smooth = noise[:, 1:, 1:] + noise[:, :-1, 1:] + noise[:, 1:, :-1]
    return smooth + smooth.mean(axis=3, keepdims=True)


def patches(images, size):
    """Every patch, flattened as a kernel is: (patches, size * size * C)."""
    return (
        windows(images, size, 1, 0)
        .transpose(0, 1, 2, 4, 5, 3)
        .reshape(-1, size * size * images.shape[-1])
        .astype(np.float64)
    )


def test_whitening_by_definition():
    images = smooth_images(50)
    flat = patches(images, 2)
    eigenvalues, eigenvectors = np.linalg.eigh(flat.T @ flat / len(flat))
    kernel = np.asarray(jax.jit(whitening_kernel, static_argnums=1)(images, 2), np.float64).reshape(12, 24)
    np.testing.assert_array_equal(kernel[:, 12:], -kernel[:, :12])
    expected = eigenvectors / np.sqrt(eigenvalues + 5e-4)
    signs = np.sign((kernel[:, :12] * expected).sum(axis=0))  # an eigenvector's sign is free
    np.testing.assert_allclose(kernel[:, :12], expected * signs, rtol=2e-3, atol=2e-3 * abs(expected).max())


def test_ill_conditioned_patches_are_whitened():
    """Of 5,000 images as photographs are: one float32 sum over all patches is off by more than the least eigenvalue."""
    noise = np.random.default_rng(0).normal(size=(5000, 19, 19, 3)).astype(np.float32)
    images = noise.cumsum(axis=1).cumsum(axis=2)[:, 1:, 1:] / 6 + np.float32(0.05) * noise[:, 1:, 1:]
    images = np.float32(0.95) * images.mean(axis=3, keepdims=True) + np.float32(0.05) * images
    flat = patches(images, 2)
    moments = flat.T @ flat / len(flat)
    eigenvalues, eigenvectors = np.linalg.eigh(moments)
    assert 0 < eigenvalues[0] < 1e-4 and eigenvalues[-1] > 10
    for epsilon, tolerance in ((5e-4, 0.01), (1e-7, 0.1)):
        kernel = jax.jit(whitening_kernel, static_argnums=1)(images, 2, epsilon)
        kernel = np.asarray(kernel, np.float64).reshape(12, 24)[:, :12]
        white = kernel.T @ moments @ kernel  # the covariance of the whitened patches
        np.testing.assert_allclose(white, np.diag(eigenvalues / (eigenvalues + epsilon)), atol=tolerance)
        # Whatever the signs, and the order within a cluster of eigenvalues.
        expected = eigenvectors / (eigenvalues + epsilon) @ eigenvectors.T
        np.testing.assert_allclose(kernel @ kernel.T, expected, atol=tolerance * np.abs(expected).max())
    np.testing.assert_allclose(white, np.eye(12), atol=0.1)


def test_whitened_patches_are_uncorrelated():
    images = smooth_images(50)
    variables = jax.jit(Airbench(**SMALL).init, static_argnames='train')(jax.random.key(0), images, train=False)
    assert list(variables['params']['whitening']) == ['bias']
    kernel = np.asarray(variables['batch_stats']['whitening']['kernel'], np.float64).reshape(12, 24)
    white = patches(images, 2) @ kernel[:, :12]
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(12), atol=0.02)


def test_whitening_in_bfloat16_keeps_what_the_filters_enlarge():
    colours = jax.random.uniform(jax.random.key(0), (8, 1, 1, 3), minval=-2, maxval=2)
    images = colours + 0.05 * jax.random.normal(jax.random.key(1), (8, 16, 16, 3))  # flat patches: small eigenvalues
    exact, rounded = (Whitening(2, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    variables = exact.init(jax.random.key(2), images)
    expected, y = (layer.apply(variables, images) for layer in (exact, rounded))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8, atol=1e-3)
