"""Every layer against flax's own, or against its definition."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import maximum_error

from flax_dlvc.models import layers

pytestmark = pytest.mark.usefixtures('quick_compilation')

POOLS = [
    ((16, 16), (2, 2), (2, 2), 'VALID'),
    ((16, 16), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((9, 7), (3, 3), (2, 2), 'SAME'),
    ((9, 7), (3, 2), (2, 3), 'VALID'),
    ((9, 7), (2, 3), (2, 3), 'VALID'),
    ((9, 8), (2, 2), (1, 1), 'VALID'),
    ((9, 8), (5, 4), (2, 3), ((2, 0), (1, 3))),
    ((16, 33), (16, 16), (16, 16), 'VALID'),
]


@pytest.mark.parametrize('pool', POOLS, ids=str)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_max_pool_equals_flax_also_where_values_tie(pool, dtype):
    size, *arguments = pool
    x = jax.random.randint(jax.random.key(0), (4, *size, 3), -300, -296).astype(dtype)  # below zero: padding loses

    @partial(jax.jit, static_argnums=0)
    def value_and_gradient(function):
        y, backward = jax.vjp(lambda x: function(x, *arguments), x)
        return y, *backward(jnp.arange(y.size, dtype=dtype).reshape(y.shape) % 64)

    ours, flax = value_and_gradient(layers.max_pool), value_and_gradient(nn.max_pool)
    assert ours[0].dtype == ours[1].dtype == dtype
    assert maximum_error(ours[:1], flax[:1]) == 0
    assert maximum_error(ours[1:], flax[1:]) < (1e-6 if dtype == jnp.float32 else 2e-2)  # of many windows, the order


def test_the_gradient_of_max_pool_takes_of_the_input_the_shape_alone():
    x, g, where = jnp.ones((2, 9, 9, 3)), jnp.ones((2, 4, 4, 3)), ((2, 2), (2, 2), ((0, 0), (0, 0)))
    _, (winner, _) = layers.max_pool_and_winners(x, *where)
    assert winner.shape == g.shape and winner.dtype == jnp.uint8
    program = jax.make_jaxpr(lambda x: layers.max_pool_gradient(*where, (winner, x), g)[0])(x).jaxpr
    assert not any(program.invars[0] is variable for equation in program.eqns for variable in equation.invars)


def train_norm(layer, variables, x, g):
    """The result of a layer, its new running statistics, and the gradients for its parameters and input."""

    def apply(params, x):
        return layer.apply(variables | {'params': params}, x, mutable=['batch_stats'])

    y, backward, updated = jax.vjp(apply, variables['params'], x, has_aux=True)
    return y, updated['batch_stats'], backward(g)


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5), ('bfloat16', 2e-2)])
@pytest.mark.parametrize('use_scale', [True, False])
def test_batch_norm_equals_flax(dtype, tolerance, use_scale):
    options = {'use_scale': use_scale, 'momentum': 0.8, 'epsilon': 1e-3, 'dtype': jnp.dtype(dtype)}
    keys = jax.random.split(jax.random.key(0), 5)
    x, g = (jax.random.normal(key, (6, 5, 4, 3)).astype(dtype) for key in keys[:2])
    x = x * jnp.array([1, 2, 0.1], dtype) + jnp.array([0.5, -1, 0], dtype)
    ours, flax = (layer(use_running_average=False, **options) for layer in (layers.BatchNorm, nn.BatchNorm))
    variables = ours.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, variables, flax.init(jax.random.key(1), x))
    variables['params'] = jax.tree.map(lambda leaf: leaf + jax.random.uniform(keys[2], leaf.shape), variables['params'])
    assert maximum_error(train_norm(ours, variables, x, g), train_norm(flax, variables, x, g)) < tolerance
    ours, flax = (layer(use_running_average=True, **options) for layer in (layers.BatchNorm, nn.BatchNorm))
    variables['batch_stats'] = {'mean': jax.random.normal(keys[3], (3,)), 'var': jax.random.uniform(keys[4], (3,))}
    assert ours.apply(variables, x).dtype == dtype
    assert maximum_error(ours.apply(variables, x), flax.apply(variables, x)) < tolerance


def test_batch_norm_over_devices_equals_flax_and_that_of_the_whole_batch():
    x, g = (jax.random.normal(key, (8, 3, 3, 2)) for key in jax.random.split(jax.random.key(0)))
    variables = layers.BatchNorm(False).init(jax.random.key(1), x)

    def on_two(layer):
        halves = (each.reshape(2, 4, 3, 3, 2) for each in (x, g))
        train = partial(train_norm, layer(use_running_average=False, axis_name='devices'), variables)
        y, statistics, (params, dx) = jax.vmap(train, axis_name='devices')(*halves)
        return y.reshape(x.shape), jax.tree.map(lambda leaf: leaf[1], statistics), params, dx.reshape(x.shape)

    ours = on_two(layers.BatchNorm)
    assert maximum_error(ours, on_two(nn.BatchNorm)) < 1e-5
    y, statistics, (_, dx) = train_norm(nn.BatchNorm(use_running_average=False), variables, x, g)
    assert maximum_error((ours[0], ours[1], ours[3]), (y, statistics, dx)) < 1e-5


def test_batch_norm_of_a_constant_is_finite():
    layer = layers.BatchNorm(use_running_average=False, epsilon=1e-12)
    x = jnp.broadcast_to(jnp.linspace(0.1, 10, 50), (7, 3, 3, 50))  # of some the variance is below zero by rounding
    variables = layer.init(jax.random.key(0), x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(train_norm(layer, variables, x, x)))


def test_rows_are_asked_for_where_the_program_is_not_for_a_cpu():
    x = jnp.arange(6.0).reshape(2, 3)
    program = lambda: jax.jit(lambda x: layers.row_major(x)).lower(x).as_text()  # noqa: E731
    assert 'LayoutConstraint' not in program()
    with layers.traced_for('gpu'):
        assert 'LayoutConstraint' in program()
        np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: (layers.row_major(x) ** 2).sum()))(x), 2 * x)


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


def test_random_words_are_hashes_of_index_and_key():
    """With Python's integers: two rounds of lowbias32, one for each half of the key."""

    def lowbias32(word):
        word = (word ^ word >> 16) * 0x7FEB352D % 2**32
        word = (word ^ word >> 15) * 0x846CA68B % 2**32
        return word ^ word >> 16

    key = jax.random.wrap_key_data(np.array([0xDEADBEEF, 0x01234567], np.uint32))
    expected = [lowbias32((lowbias32(index ^ 0xDEADBEEF) + 0x01234567) % 2**32) for index in range(12)]
    assert layers.random_words(key, (3, 4)).reshape(-1).tolist() == expected


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
    slope, exact = (jax.vmap(jax.grad(layers.gelu))(each) for each in (x, x.astype(jnp.float32)))
    assert slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(slope.astype(np.float32), exact, rtol=2**-8, atol=1e-6)
    x, rngs = jnp.full((500,), 1.75, jnp.bfloat16), {'dropout': jax.random.key(0)}
    for layer in (layers.Dropout(0.1), layers.StochasticDepth(0.1)):
        kept = layer.apply({}, x, False, rngs=rngs)
        assert kept.dtype == jnp.bfloat16
        assert set(np.asarray(kept, float)) == {0.0, float(jnp.bfloat16(1.75 / 0.9))}


def test_layer_norm_equals_flax():
    x = jax.random.normal(jax.random.key(0), (2, 5, 16)).at[0, 0, 0].set(jnp.nan)
    ours, flax = layers.LayerNorm(), nn.LayerNorm(epsilon=1e-5)
    variables = flax.init(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(1), x)) == jax.tree.map(jnp.shape, variables)

    def value_and_gradients(layer, x):
        return jax.value_and_grad(lambda *arguments: (layer.apply(*arguments) ** 3).sum(), (0, 1))(variables, x)

    np.testing.assert_array_equal(ours.apply(variables, x), flax.apply(variables, x))
    assert maximum_error(*(value_and_gradients(layer, x[1:]) for layer in (ours, flax))) == 0


def test_layer_norm_is_kept_apart_from_the_product_that_follows():
    """Else YNNPACK computes both, which in a ViT takes half as long again: no fused computation has both of them."""
    x, kernel = jnp.ones((64, 65, 256)), jnp.ones((256, 768))
    layer = layers.LayerNorm()
    variables = layer.init(jax.random.key(0), x)
    program = jax.jit(lambda x: layer.apply(variables, x) @ kernel).lower(x).compile().as_text()
    fused = [text for text in program.split('\n\n') if not text.startswith('ENTRY')]
    assert any(' reduce' in text for text in fused)
    assert not [text for text in fused if ' reduce(' in text and ' dot(' in text]


def test_gelu_equals_flax():
    x = jnp.linspace(-12, 12, 10001)
    result = jax.vmap(jax.value_and_grad(layers.gelu))(x)
    reference = jax.vmap(jax.value_and_grad(lambda x: nn.gelu(x, approximate=False)))(x)
    assert maximum_error(result, reference) < 1e-6


def test_gelu_has_a_short_gradient():
    """XLA rather computes it twice than writes it down; by JAX 0.12's derivative of erf it has over 30 operations."""
    assert str(jax.make_jaxpr(jax.grad(layers.gelu))(1.0)).count(' = ') <= 20


def test_attention_equals_flax():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 65, 8, 32))
    value = lambda function: lambda *qkv: (function(*qkv) ** 2).sum()  # noqa: E731
    ours = lambda *qkv: layers.attention(*qkv)[0]  # noqa: E731
    result = jax.jit(jax.value_and_grad(value(ours), argnums=(0, 1, 2)))(q, k, v)
    reference = jax.jit(jax.value_and_grad(value(nn.dot_product_attention), argnums=(0, 1, 2)))(q, k, v)
    assert maximum_error(result, reference) < 1e-5


def test_attention_gives_its_weights():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 65, 8, 32))
    _, weights = layers.attention(q, k, v)
    assert weights.shape == (2, 8, 65, 65)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(weights, nn.dot_product_attention_weights(q, k), atol=1e-6)


def test_attention_drops_weights():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 65, 8, 32))
    mask = jax.random.bernoulli(jax.random.key(1), 0.9, (2, 8, 65, 65)) / 0.9
    result, weights = layers.attention(q, k, v, dropout=lambda weights: weights * mask)
    np.testing.assert_allclose(weights, layers.attention(q, k, v)[1])  # before it
    np.testing.assert_allclose(result, jnp.einsum('bhqk,bkhd->bqhd', weights * mask, v), atol=1e-5)
    doubled, _ = layers.attention(q, k, v, dropout=lambda weights: 2 * weights)
    np.testing.assert_allclose(doubled, 2 * layers.attention(q, k, v)[0], rtol=1e-5)


def test_attention_of_large_scores_is_finite():
    q, k, v = 100 * jax.random.normal(jax.random.key(0), (3, 2, 65, 8, 32))
    result, gradient = jax.value_and_grad(lambda *qkv: (layers.attention(*qkv)[0] ** 2).sum(), (0, 1, 2))(q, k, v)
    assert np.isfinite(result)
    assert all(np.isfinite(each).all() for each in gradient)
