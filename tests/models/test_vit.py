import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import maximum_error
from reference import convolve, count, gelu, max_pool, shapes_of

from flax_dlvc.models import ViT
from flax_dlvc.models.vit import Block, SelfAttention, image_to_patches

pytestmark = pytest.mark.usefixtures('quick_compilation')

IMAGES = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
SMALL = {'num_classes': 5, 'embed_dim': 12, 'hidden_dim': 20, 'num_heads': 3, 'num_layers': 2, 'patch_size': 4}


def fill(shapes):
    """Arbitrary values: large enough for attention to choose."""
    generator = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: (generator.normal(size=leaf.shape) * (0.5 if len(leaf.shape) == 2 else 1)).astype(np.float32),
        shapes,
    )


def apply(model, variables, x=IMAGES, *, train=False, seed=0):
    return np.asarray(jitted_apply(model, train, variables, x, jax.random.key(seed)))


@partial(jax.jit, static_argnums=(0, 1))
def jitted_apply(model, train, variables, x, key):
    return model.apply(variables, x, train=train, rngs={'dropout': key})


@pytest.fixture(scope='module')
def variables():
    return fill(shapes_of(ViT(**SMALL), IMAGES))


# The network in NumPy


def dense(params, x):
    return x @ params['kernel'] + params['bias']


def layer_norm(params, x):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * params['scale'] + params['bias']


def attention(params, x, num_heads):
    """`torch.nn.MultiheadAttention`: all queries, then all keys, then all values in the joint projection."""
    query, key, value = np.split(dense(params['in_proj'], x), 3, axis=-1)
    head_dim = x.shape[-1] // num_heads
    heads = []
    for head in range(num_heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        scores = query[..., part] @ key[..., part].swapaxes(-1, -2) / np.sqrt(head_dim)
        heads.append(scipy.special.softmax(scores, axis=-1) @ value[..., part])
    return dense(params['out_proj'], np.concatenate(heads, axis=-1))


def block(params, x, num_heads):
    x = x + attention(params['attn'], layer_norm(params['layer_norm_1'], x), num_heads)
    y = gelu(dense(params['linear_0'], layer_norm(params['layer_norm_2'], x)))
    return x + dense(params['linear_3'], y)


def stem(params, x):
    """Two convolutions, each normalised, the maps halved between them."""
    x = gelu(layer_norm(params['stem_norm_0'], convolve(x, params['stem_0']['kernel']) + params['stem_0']['bias']))
    x = convolve(max_pool(x), params['stem_1']['kernel']) + params['stem_1']['bias']
    return gelu(layer_norm(params['stem_norm_1'], x))


def forward(params, x, patch_size, num_heads, num_layers):
    batch, height, width, _ = x.shape
    patches = [
        x[:, row : row + patch_size, column : column + patch_size].transpose(0, 3, 1, 2).reshape(batch, -1)
        for row in range(0, height, patch_size)
        for column in range(0, width, patch_size)
    ]
    x = dense(params['input_layer'], np.stack(patches, axis=1))
    x = np.concatenate([np.repeat(params['cls_token'], batch, axis=0), x], axis=1) + params['pos_embedding']
    for layer in range(num_layers):
        x = block(params[f'transformer_{layer}'], x, num_heads)
    return dense(params['mlp_head_1'], layer_norm(params['mlp_head_0'], x[:, 0]))


def test_parameter_count():
    """Of the report's sizes: 256 features, 512 hidden, 6 blocks, 64 patches of 48 numbers."""
    norm, joint, out = 2 * 256, (256 + 1) * 3 * 256, (256 + 1) * 256
    mlp = (256 + 1) * 512 + (512 + 1) * 256
    embedding = (48 + 1) * 256 + 256 + 65 * 256
    shapes = shapes_of(ViT(num_classes=10), np.zeros((1, 32, 32, 3), np.float32))
    assert set(shapes) == {'params'}
    assert count(shapes) == embedding + 6 * (2 * norm + joint + out + mlp) + norm + (256 + 1) * 10 == 3_195_146


def test_convolutional_stem_counts_and_keeps_the_number_of_patches():
    """Two 3x3 convolutions to 64 and 128 features, a norm after each, one halving; 2x2 patches of 128 features."""
    x = np.zeros((3, 32, 32, 3), np.float32)
    model = ViT(num_classes=10, patch_stem='convolutional')
    shapes = shapes_of(model, x)
    stem = (27 + 1) * 64 + 2 * 64 + (9 * 64 + 1) * 128 + 2 * 128
    assert count(shapes) == count(shapes_of(ViT(num_classes=10), x)) - 49 * 256 + stem + (4 * 128 + 1) * 256
    assert shapes['params']['input_layer']['kernel'].shape == (512, 256)
    assert shapes['params']['pos_embedding'].shape == (1, 65, 256)
    assert jax.eval_shape(partial(model.apply, train=False), shapes, x).shape == (3, 10)


def test_stochastic_depth_grows_from_the_first_block_to_the_last():
    """Of many examples alike, of three blocks: the shares of those that kept the same branches, attention and MLP."""
    rate, images = 0.6, np.repeat(IMAGES[:1], 4000, axis=0)
    plain, model = (ViT(**SMALL | {'num_layers': 3}, stochastic_depth_rate=each) for each in (0.0, rate))
    variables = fill(shapes_of(plain, IMAGES))
    logits = apply(model, variables, images, train=True)
    _, counts = np.unique(logits.round(3), axis=0, return_counts=True)
    kept = [(1 - each, each) for each in (rate / 2, rate / 2, rate, rate)]  # the first block keeps all
    expected = [np.prod(shares) for shares in itertools.product(*kept)]
    np.testing.assert_allclose(sorted(counts / 4000), sorted(expected), atol=0.02)
    np.testing.assert_array_equal(apply(model, variables), apply(plain, variables))


def test_patches_are_rows_first_and_channels_first():
    image = np.arange(4 * 6 * 2).reshape(1, 4, 6, 2)  # value = 12 row + 2 column + channel
    patches = np.asarray(image_to_patches(jnp.asarray(image), 2))
    assert patches.shape == (1, 6, 8)
    assert patches[0, 0].tolist() == [0, 2, 12, 14, 1, 3, 13, 15]
    assert patches[0, 1].tolist() == [4, 6, 16, 18, 5, 7, 17, 19]
    assert patches[0, 3].tolist() == [24, 26, 36, 38, 25, 27, 37, 39]
    assert patches[0, 5].tolist() == [32, 34, 44, 46, 33, 35, 45, 47]


def test_attention_is_numpys():
    x = np.random.default_rng(0).normal(size=(2, 7, 12)).astype(np.float32)
    model = SelfAttention(num_heads=3, dropout_rate=0.0, dtype=jnp.float32)
    variables = fill(shapes_of(model, x))
    expected = attention(jax.tree.map(np.float64, variables['params']), x.astype(np.float64), 3)
    np.testing.assert_allclose(apply(model, variables, x), expected, atol=1e-5)


def test_a_block_is_numpys():
    x = np.random.default_rng(0).normal(size=(2, 7, 12)).astype(np.float32)
    model = Block(hidden_dim=20, num_heads=3, dropout_rate=0.0, dtype=jnp.float32)
    variables = fill(shapes_of(model, x))
    expected = block(jax.tree.map(np.float64, variables['params']), x.astype(np.float64), 3)
    np.testing.assert_allclose(apply(model, variables, x), expected, atol=1e-5)


def test_tokens_that_are_not_wanted_change_nothing_for_the_others():
    """Results and gradients of the first two of seven tokens, asked for alone and taken from all."""
    x = np.random.default_rng(0).normal(size=(2, 7, 12)).astype(np.float32)
    whole, part = (Block(20, 3, dropout_rate=0.0, dtype=jnp.float32, num_outputs=wanted) for wanted in (None, 2))
    variables = fill(shapes_of(whole, x))
    assert jax.tree.map(jnp.shape, shapes_of(part, x)) == jax.tree.map(jnp.shape, variables)

    def loss(model, variables, x):
        y = model.apply(variables, x, train=True)[:, :2]
        return (y * y).sum(), y

    differentiated = (jax.jit(jax.grad(partial(loss, model), (0, 1), has_aux=True)) for model in (whole, part))
    expected, result = (gradient(variables, x) for gradient in differentiated)
    assert result[1].shape == (2, 2, 12)
    assert maximum_error(result, expected) < 1e-5


def test_of_the_last_block_the_class_token_alone_is_computed(variables):
    _, captured = ViT(**SMALL).apply(variables, IMAGES, train=False, mutable=['intermediates'])
    shapes = [
        captured['intermediates'][f'transformer_{layer}']['attn']['attention_weights'][0].shape for layer in range(2)
    ]
    assert shapes == [(2, 3, 7, 7), (2, 3, 1, 7)]


def test_logits_are_numpys(variables):
    logits = apply(ViT(**SMALL), variables)
    expected = forward(jax.tree.map(np.float64, variables['params']), IMAGES.astype(np.float64), 4, 3, 2)
    assert logits.shape == (2, 5) and logits.dtype == np.float32
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_logits_after_a_convolutional_stem_are_numpys():
    model = ViT(**SMALL, patch_stem='convolutional')
    variables = fill(shapes_of(model, IMAGES))
    params = jax.tree.map(np.float64, variables['params'])
    expected = forward(params, stem(params, IMAGES.astype(np.float64)), 2, 3, 2)
    assert maximum_error(apply(model, variables), expected) < 1e-4


@pytest.mark.parametrize('name', ['cls_token', 'pos_embedding'])
def test_class_token_and_positions_matter(variables, name):
    changed = {'params': {**variables['params'], name: np.zeros_like(variables['params'][name])}}
    assert np.abs(apply(ViT(**SMALL), changed) - apply(ViT(**SMALL), variables)).max() > 0.1


def test_dropout_in_training_only(variables):
    model = ViT(**SMALL, dropout_rate=0.5)
    evaluated = apply(model, variables, seed=0)
    np.testing.assert_array_equal(evaluated, apply(model, variables, seed=1))
    np.testing.assert_allclose(evaluated, apply(ViT(**SMALL), variables, train=True), atol=1e-5)
    trained = apply(model, variables, train=True, seed=0)
    np.testing.assert_array_equal(trained, apply(model, variables, train=True, seed=0))
    assert np.abs(trained - apply(model, variables, train=True, seed=1)).max() > 0.1
    assert np.abs(trained - evaluated).max() > 0.1


def test_dropout_is_on_the_tokens():
    model = ViT(**{**SMALL, 'num_layers': 0}, dropout_rate=0.5)
    variables = fill(shapes_of(model, IMAGES))
    first, second = (apply(model, variables, train=True, seed=seed) for seed in range(2))
    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize('silenced', ['out_proj', 'linear_3'])
def test_dropout_is_in_attention_and_in_the_mlp(silenced):
    """With the other part's last layer zero, what is left is still random."""
    x = np.random.default_rng(0).normal(size=(2, 7, 12)).astype(np.float32)
    model = Block(hidden_dim=20, num_heads=3, dropout_rate=0.5, dtype=jnp.float32)
    params = fill(shapes_of(model, x))['params']
    group = params['attn'] if silenced == 'out_proj' else params
    group[silenced] = jax.tree.map(np.zeros_like, group[silenced])
    first, second = (apply(model, {'params': params}, x, train=True, seed=seed) for seed in range(2))
    assert np.abs(first - second).max() > 0.1


def test_bfloat16_keeps_parameters_and_logits_in_float32(variables):
    model = ViT(**SMALL, dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes_of(model, IMAGES)))
    logits, exact = apply(model, variables), apply(ViT(**SMALL), variables)
    assert logits.dtype == np.float32
    assert 1e-4 < np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


def test_an_examples_logits_do_not_depend_on_the_others(variables):
    model = ViT(**SMALL)
    np.testing.assert_allclose(apply(model, variables, IMAGES[:1]), apply(model, variables)[:1], atol=1e-5)
