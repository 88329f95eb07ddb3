"""Every layer against flax's own, at every shape that the models use."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_dlvc.models import layers

# (map size, input channels, output channels, kernel, stride, padding)
CNN = [(32, 3, 32, 3, 1, 'SAME'), (16, 32, 64, 3, 1, 'SAME'), (8, 64, 128, 3, 1, 'SAME')]
RESNET = [
    (32, 3, 64, 7, 2, 3),
    (8, 64, 64, 3, 1, 1),
    (8, 64, 128, 3, 2, 1),
    (8, 64, 128, 1, 2, 0),
    (4, 128, 128, 3, 1, 1),
    (4, 128, 256, 3, 2, 1),
    (4, 128, 256, 1, 2, 0),
    (2, 256, 256, 3, 1, 1),
    (2, 256, 512, 3, 2, 1),
    (2, 256, 512, 1, 2, 0),
    (1, 512, 512, 3, 1, 1),
]
CIFAR_STEM = [
    (32, 3, 64, 3, 1, 1),
    (32, 64, 64, 3, 1, 1),
    (32, 64, 128, 3, 2, 1),
    (32, 64, 128, 1, 2, 0),
    (16, 128, 128, 3, 1, 1),
    (16, 128, 256, 3, 2, 1),
    (8, 256, 256, 3, 1, 1),
    (8, 256, 512, 3, 2, 1),
    (4, 512, 512, 3, 1, 1),
]
UNUSUAL = [
    (9, 5, 7, 3, 2, 'SAME'),
    (9, 5, 7, 3, 2, 'VALID'),
    (7, 5, 7, 3, 1, 'VALID'),
    (3, 5, 7, 3, 1, 'VALID'),
    (6, 5, 7, 2, 1, 'SAME'),
    (9, 5, 7, 4, 3, ((0, 2), (3, 1))),
    (4, 5, 7, 3, 2, ((0, 1), (1, 2))),
    (4, 5, 7, 5, 1, ((0, 4), (3, 1))),
    (6, 5, 7, 5, 1, ((0, 4), (3, 1))),
    (8, 64, 72, 3, 1, ((0, 2), (2, 2))),
    (8, 72, 64, 3, 1, 'VALID'),
    (7, 64, 64, 3, 1, 'SAME'),
]
SMALL, MIDDLE, LARGE, STRIDED, TILED = RESNET[7], RESNET[4], CNN[1], (9, 5, 7, 3, 2, 'SAME'), CNN[2]
ROUTES = [SMALL, MIDDLE, LARGE, STRIDED, TILED]  # every branch of `convolve` and its two gradients


def maximum_error(result: Any, reference: Any) -> float:
    """The largest difference of two trees, leaf by leaf relative to the largest value in the reference."""
    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(reference), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)


def example(shape: tuple, batch: int = 8, **options: Any) -> tuple[nn.Module, nn.Module, dict, jax.Array]:
    """This package's layer, flax's, variables for both, and a batch."""
    size, channels, features, kernel, stride, padding = shape
    arguments = {'features': features, 'kernel_size': (kernel, kernel), 'strides': stride, 'padding': padding}
    ours, theirs = layers.Conv(**arguments, **options), nn.Conv(**arguments, **options)
    generator = np.random.default_rng(0)
    x, weights, bias = (
        jnp.asarray(generator.normal(size=shape), jnp.float32)
        for shape in [(batch, size, size, channels), (kernel, kernel, channels, features), (features,)]
    )
    return ours, theirs, {'params': {'kernel': weights / np.sqrt(kernel**2 * channels), 'bias': bias}}, x


def value_and_gradients(layer: nn.Module) -> Callable:
    """Of the squared result's weighted sum, for variables and input: a gradient that differs at every position."""

    def loss(variables: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = layer.apply(variables, x).astype(jnp.float32)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


@pytest.mark.parametrize('shape', [*CNN, *RESNET, *CIFAR_STEM, *UNUSUAL], ids=str)
def test_conv_and_its_gradients_equal_flax(shape):
    ours, theirs, variables, x = example(shape)
    (_, y), gradients = jax.jit(value_and_gradients(ours))(variables, x)
    (_, y_reference), reference = jax.jit(value_and_gradients(theirs))(variables, x)
    assert maximum_error(y, y_reference) < 1e-5
    assert maximum_error(gradients, reference) < 1e-5
    assert maximum_error(jax.jit(ours.apply)(variables, x), y_reference) < 1e-5  # as in evaluation


@pytest.mark.parametrize('use_bias', [True, False])
@pytest.mark.parametrize('strides', [2, (2, 2), (1, 2)])
def test_conv_has_the_parameters_of_flax(use_bias, strides):
    arguments = {'features': 6, 'kernel_size': (3, 5), 'strides': strides, 'use_bias': use_bias}
    x = jnp.ones((2, 8, 10, 4))
    ours = layers.Conv(**arguments).init_with_output(jax.random.key(0), x)
    theirs = nn.Conv(**arguments).init_with_output(jax.random.key(0), x)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert maximum_error(ours[1]['params']['kernel'], theirs[1]['params']['kernel']) == 0
    assert maximum_error(ours[0], theirs[0]) < 1e-5


@pytest.mark.parametrize('shape', ROUTES, ids=str)
def test_conv_under_vmap(shape):
    ours, theirs, variables, x = example(shape)
    variables = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), variables)
    x = x.reshape(2, 4, *x.shape[1:])
    result = jax.jit(jax.vmap(value_and_gradients(ours)))(variables, x)
    reference = jax.jit(jax.vmap(value_and_gradients(theirs)))(variables, x)
    assert maximum_error(result[0][1], reference[0][1]) < 1e-5
    assert maximum_error(result[1], reference[1]) < 1e-5


@pytest.mark.parametrize('shape', ROUTES, ids=str)
def test_conv_in_scan(shape):
    ours, theirs, variables, x = example(shape)

    def steps(layer):
        def step(variables, x):
            (_, y), (gradient, dx) = value_and_gradients(layer)(variables, x)
            return jax.tree.map(lambda leaf, change: leaf - 1e-3 * change, variables, gradient), (y, dx)

        return jax.jit(lambda: jax.lax.scan(step, variables, x.reshape(2, 4, *x.shape[1:])))()

    assert maximum_error(steps(ours), steps(theirs)) < 1e-5


@pytest.mark.parametrize('shape', ROUTES, ids=str)
def test_conv_in_bfloat16(shape):
    ours, theirs, variables, x = example(shape, dtype=jnp.bfloat16)
    exact = example(shape)[1]
    assert ours.apply(variables, x).dtype == jnp.bfloat16
    (_, y), gradients = jax.jit(value_and_gradients(ours))(variables, x)
    (_, y_exact), exact_gradients = jax.jit(value_and_gradients(exact))(variables, x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))
    (_, y_reference), reference = jax.jit(value_and_gradients(theirs))(variables, x)
    limit = 1.5 * max(maximum_error(y_reference, y_exact), 2**-8)
    assert maximum_error(y, y_exact) < limit
    assert maximum_error(jax.jit(ours.apply)(variables, x), y_exact) < limit  # as in evaluation
    limit = 1.5 * max(maximum_error(reference, exact_gradients), 2**-8)
    assert maximum_error(gradients, exact_gradients) < limit


@pytest.mark.parametrize('shape', [SMALL, LARGE, STRIDED, TILED], ids=str)
def test_elsewhere_conv_compiles_to_what_flax_compiles_to(shape, monkeypatch):
    ours, theirs, variables, x = example(shape)
    lower = lambda layer: jax.jit(value_and_gradients(layer)).lower(variables, x).as_text()  # noqa: E731
    assert lower(ours) != lower(theirs)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert lower(ours) == lower(theirs)


@pytest.mark.parametrize('shape', [RESNET[-1], RESNET[7], RESNET[5]], ids=str)
def test_small_maps_take_matrix_products_and_skip_the_padding(shape):
    ours, _, variables, x = example(shape)
    jaxpr = str(jax.make_jaxpr(value_and_gradients(ours))(variables, x))
    taps = {1: 1, 2: 3, 4: 3}[shape[0]] ** 2 if shape[4] == 1 else 9
    assert 'conv_general_dilated' not in jaxpr
    assert jaxpr.count('dot_general') == 3 * taps


@pytest.mark.parametrize('shape', [RESNET[1], CNN[2], CIFAR_STEM[6]], ids=str)
def test_many_channels_take_winograd_in_evaluation_and_input_gradient(shape):
    ours, _, variables, x = example(shape)
    assert str(jax.make_jaxpr(ours.apply)(variables, x)).count('conv_general_dilated[') == 0
    # Of forward pass, input gradient and kernel gradient, which see the same operands, the second one is Winograd's.
    jaxpr = str(jax.make_jaxpr(value_and_gradients(ours))(variables, x))
    assert jaxpr.count('conv_general_dilated[') == 2 and jaxpr.count('dot_general[') == 1


@pytest.mark.parametrize('shape', [CNN[1], (7, 64, 64, 3, 1, 1), (16, 64, 64, 3, 2, 1), (8, 64, 64, 5, 1, 2)], ids=str)
def test_other_convolutions_stay_convolutions(shape):
    ours, _, variables, x = example(shape)
    assert str(jax.make_jaxpr(ours.apply)(variables, x)).count('conv_general_dilated[') == 1
    assert str(jax.make_jaxpr(value_and_gradients(ours))(variables, x)).count('conv_general_dilated[') == 3


@pytest.mark.parametrize('shape', [CNN[0], CIFAR_STEM[0], UNUSUAL[4]], ids=str)
def test_few_inputs_are_summed_up_in_evaluation_alone(shape):
    ours, _, variables, x = example(shape)
    jaxpr = str(jax.make_jaxpr(ours.apply)(variables, x))
    assert 'conv_general_dilated[' not in jaxpr and 'dot_general[' not in jaxpr
    assert str(jax.make_jaxpr(value_and_gradients(ours))(variables, x)).count('conv_general_dilated[') == 3


@pytest.mark.parametrize('batch', [1, 4, 7])
def test_winograd_in_chunks_of_the_batch(batch, monkeypatch):
    x, kernel = (np.random.default_rng(0).normal(size=size) for size in [(batch, 6, 8, 64), (3, 3, 64, 64)])
    x, kernel = np.float32(x), np.float32(kernel / 24)
    exact = np.zeros((batch, 6, 8, 64))
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    for i, j in np.ndindex(3, 3):
        exact += padded[:, i : i + 6, j : j + 8] @ kernel[i, j].astype(np.float64)
    monkeypatch.setattr(layers, 'CHUNK', 2 * 6 * 8 * 64)
    convolve = jax.jit(lambda x: layers.winograd(x, kernel, ((1, 1), (1, 1))))
    assert maximum_error(convolve(x), exact) < 2e-6
    if batch > 2:
        assert 'while' in convolve.lower(x).as_text()


POOLS = [
    ((16, 16), (2, 2), (2, 2), 'VALID'),
    ((16, 16), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((9, 7), (3, 3), (2, 2), 'SAME'),
    ((9, 7), (3, 2), (2, 3), 'VALID'),
    ((9, 7), (2, 3), (2, 3), 'VALID'),
]


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
@pytest.mark.parametrize('pool', POOLS, ids=str)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_max_pool_equals_flax(pool, dtype, platform):
    size, window, strides, padding = pool
    values = jax.random.permutation(jax.random.key(0), 256)  # without ties, exact in bfloat16
    images = [jnp.roll(values, shift)[: size[0] * size[1]].reshape(size) for shift in range(12)]
    x = (jnp.stack(images).reshape(4, 3, *size).transpose(0, 2, 3, 1) - 300).astype(dtype)  # below zero: padding loses

    def value_and_gradient(function):
        y, backward = jax.vjp(lambda x: function(x, window, strides, padding), x)
        return y, *backward(jnp.arange(y.size, dtype=dtype).reshape(y.shape) % 64)

    with layers.traced_for(platform):
        ours = value_and_gradient(layers.max_pool)
    assert maximum_error(ours, value_and_gradient(nn.max_pool)) == 0


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
@pytest.mark.parametrize('pool', POOLS, ids=str)
def test_max_pool_splits_the_gradient_of_ties_without_loss(pool, platform):
    size, window, strides, padding = pool
    x = jnp.zeros((2, *size, 3))
    with layers.traced_for(platform):
        y, backward = jax.vjp(lambda x: layers.max_pool(x, window, strides, padding), x)
        (dx,) = backward(jnp.ones_like(y))
    assert dx.min() >= 0
    assert np.asarray(dx).sum(dtype=np.float64) == pytest.approx(y.size)
    if platform == 'gpu' and window == strides:
        height, width = (length // side * side for length, side in zip(size, window, strict=True))
        np.testing.assert_allclose(dx[:, :height, :width], 1 / np.prod(window), rtol=1e-6)


@pytest.mark.parametrize('strides', [(2, 2), (1, 1)])
def test_elsewhere_max_pool_is_the_one_of_flax(monkeypatch, strides):
    x = jnp.ones((2, 8, 8, 3))
    lower = lambda function: jax.jit(lambda x: function(x, (2, 2), strides)).lower(x).as_text()  # noqa: E731
    flax = lambda *arguments: nn.max_pool(*arguments)  # noqa: E731
    assert lower(layers.max_pool) != lower(flax)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert lower(layers.max_pool) == lower(flax)


def test_elsewhere_the_gradient_of_windows_side_by_side_is_not_scattered():
    x = jnp.ones((2, 9, 9, 3))

    def program(strides):
        return jax.jit(jax.grad(lambda x: layers.max_pool(x, (2, 2), strides).sum())).lower(x).as_text()

    with layers.traced_for('gpu'):
        assert 'select_and_scatter' not in program((2, 2)) and 'select_and_scatter' in program((1, 1))


def masks(rate: float, shape: tuple, seed: int = 0) -> np.ndarray:
    """Where a Dropout layer keeps its input."""
    y = layers.Dropout(rate).apply({}, jnp.ones(shape), deterministic=False, rngs={'dropout': jax.random.key(seed)})
    return np.asarray(y != 0)


@pytest.mark.parametrize('rate', [0.2, 0.5, 0.9])
def test_dropout_keeps_at_the_rate_and_the_mean(rate):
    x = jnp.full((1000, 1000), 3.0)
    y = layers.Dropout(rate).apply({}, x, deterministic=False, rngs={'dropout': jax.random.key(0)})
    assert set(np.unique(y)) == {0, np.float32(3 * np.float32(1 / (1 - rate)))}
    deviation = np.sqrt(rate * (1 - rate)) / 1000
    assert abs((y == 0).mean() - rate) < 4 * deviation
    assert y.mean() == pytest.approx(3, rel=4 * deviation / (1 - rate))


def test_dropout_at_its_limits():
    x = jnp.arange(12.0).reshape(3, 4)
    key = {'dropout': jax.random.key(0)}
    np.testing.assert_array_equal(layers.Dropout(0.0).apply({}, x, deterministic=False), x)
    np.testing.assert_array_equal(layers.Dropout(0.3).apply({}, x, deterministic=True), x)
    np.testing.assert_array_equal(layers.Dropout(1.0).apply({}, x, deterministic=False, rngs=key), jnp.zeros_like(x))
    almost = layers.Dropout(1e-12).apply({}, x, deterministic=False, rngs=key)
    np.testing.assert_allclose(almost, x, rtol=1e-6)


def test_dropout_depends_on_the_key_and_the_layer_alone():
    assert (masks(0.5, (64, 64), seed=1) == masks(0.5, (64, 64), seed=1)).all()
    assert (masks(0.5, (64, 64), seed=1) != masks(0.5, (64, 64), seed=2)).mean() == pytest.approx(0.5, abs=0.05)

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layers.Dropout(0.5)(x, deterministic=False), layers.Dropout(0.5)(x, deterministic=False)

    first, second = Two().apply({}, jnp.ones((64, 64)), rngs={'dropout': jax.random.key(0)})
    assert ((first != 0) != (second != 0)).mean() == pytest.approx(0.5, abs=0.05)


def test_stochastic_depth_drops_whole_branches_and_keeps_the_mean():
    x = np.random.default_rng(0).normal(size=(20_000, 3, 2)).astype(np.float32)
    keys = {'dropout': jax.random.key(0)}
    y = np.asarray(jax.jit(lambda x: layers.StochasticDepth(0.3).apply({}, x, deterministic=False, rngs=keys))(x))
    dropped = (y == 0).all(axis=(1, 2))
    assert (dropped == (y == 0).any(axis=(1, 2))).all()  # an example's branch as a whole, or not at all
    np.testing.assert_allclose(y[~dropped], x[~dropped] / 0.7, rtol=1e-6)
    assert abs(dropped.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / len(x))
    np.testing.assert_array_equal(layers.StochasticDepth(0.3).apply({}, x, deterministic=True), x)


def test_dropout_gradient_and_type_follow_the_mask():
    x = jnp.ones((32, 32), jnp.bfloat16)
    layer = lambda x: layers.Dropout(0.2).apply({}, x, False, rngs={'dropout': jax.random.key(0)})  # noqa: E731
    y, backward = jax.vjp(layer, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(backward(x)[0], y)


def test_random_words_are_as_good_as_random():
    """Every statistic of 2^20 words per key, and of consecutive keys, within five deviations of chance."""
    count = 2**20
    keys = jax.random.split(jax.random.key(7), 4)
    words = np.asarray(jax.vmap(lambda key: layers.random_words(key, (count,)))(keys))
    bits = ((words[:, :, None] >> np.array([31, 30, 24, 16, 8, 0], np.uint32)) & 1) * 2.0 - 1  # (key, position, bit)
    limit = 5 / np.sqrt(count)
    assert np.abs(bits.mean(axis=1)).max() < limit  # fair
    for lag in (1, 2, 3, 4, 16, 32, 64, 65, 256, 512, 4225, 33280):  # also the distances of rows, maps and images
        assert np.abs((bits[:, lag:] * bits[:, :-lag]).mean(axis=1)).max() < limit * 1.1, lag
    for other in range(1, 4):  # steps are independent
        assert np.abs((bits[0] * bits[other]).mean(axis=0)).max() < limit, other
    spectrum = np.abs(np.fft.rfft(bits[0, :, 0])[1:]) ** 2 / count  # no period: exponential with mean 1
    assert spectrum.max() < 30
    counts = np.bincount(words[0] >> 22, minlength=1024)  # level: chi-squared with 1023 degrees of freedom
    assert abs(((counts - 1024) ** 2 / 1024).sum() - 1023) < 5 * np.sqrt(2 * 1023)


def test_in_bfloat16_gelu_and_dropout_round_once():
    x = jnp.linspace(-4, 4, 801, dtype=jnp.bfloat16)
    exact = nn.gelu(x.astype(jnp.float32), approximate=False)
    np.testing.assert_allclose(layers.gelu(x).astype(np.float32), exact, rtol=2**-8, atol=1e-6)
    assert layers.gelu(x).dtype == jnp.bfloat16
    x, rngs = jnp.full((500,), 1.75, jnp.bfloat16), {'dropout': jax.random.key(0)}
    for layer in (layers.Dropout(0.1), layers.StochasticDepth(0.1)):
        kept = layer.apply({}, x, False, rngs=rngs)
        assert kept.dtype == jnp.bfloat16
        assert set(np.asarray(kept, float)) == {0.0, float(jnp.bfloat16(1.75 / 0.9))}


def test_gelu_equals_flax():
    x = jnp.linspace(-12, 12, 10001)
    result = jax.vmap(jax.value_and_grad(layers.gelu))(x)
    reference = jax.vmap(jax.value_and_grad(lambda x: nn.gelu(x, approximate=False)))(x)
    assert maximum_error(result, reference) < 1e-6


def test_attention_equals_flax():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 65, 8, 32))
    value = lambda function: lambda *qkv: (function(*qkv) ** 2).sum()  # noqa: E731
    result = jax.jit(jax.value_and_grad(value(layers.attention), argnums=(0, 1, 2)))(q, k, v)
    reference = jax.jit(jax.value_and_grad(value(nn.dot_product_attention), argnums=(0, 1, 2)))(q, k, v)
    assert maximum_error(result, reference) < 1e-5


def test_attention_drops_weights():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 65, 8, 32))
    seen = []
    result = layers.attention(q, k, v, dropout=lambda weights: seen.append(weights) or 2 * weights)
    assert seen[0].shape == (2, 8, 65, 65)
    np.testing.assert_allclose(seen[0].sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(result, 2 * layers.attention(q, k, v), rtol=1e-5)
