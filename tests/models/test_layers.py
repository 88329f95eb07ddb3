"""Every layer against flax's own, or against its definition."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import maximum_error

from flax_dlvc.models import layers

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
