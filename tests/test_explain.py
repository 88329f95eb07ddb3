"""Where a model looked: rollout and Grad-CAM against NumPy and against a model whose answer is known."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flax_dlvc.errors import ConfigError
from flax_dlvc.explain import attention_rollout, draw, explain, grad_cam
from flax_dlvc.models import CNN, Airbench, ResNet18, ViT
from flax_dlvc.models.layers import expose

pytestmark = pytest.mark.usefixtures('quick_compilation')

IMAGES = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)


def initialize(model):
    return jax.jit(lambda: model.init(jax.random.key(0), jnp.asarray(IMAGES), train=False))()


def test_rollout_of_known_attention():
    # Layer 1: every token takes all from token 2. Layer 2: token 0 takes half from 1 and half from 2.
    first = np.tile([0.0, 0.0, 1.0], (3, 1))
    second = np.array([[0, 0.5, 0.5], [0, 1, 0], [0, 0, 1]])
    weights = np.stack([first, second])[:, None, None].astype(np.float32)
    expected = (second + np.eye(3)) / 2 @ (first + np.eye(3)) / 2
    rollout = attention_rollout(jnp.asarray(weights))
    np.testing.assert_allclose(rollout[0], expected, atol=1e-6)
    np.testing.assert_allclose(rollout[0, 0], [0.25, 0.125, 0.625], atol=1e-6)
    of_one_token = attention_rollout([jnp.asarray(weights[0]), jnp.asarray(weights[1, :, :, :1])])
    np.testing.assert_array_equal(of_one_token, rollout[:, :1])


def test_rollout_averages_heads_and_keeps_rows_summing_to_one():
    weights = np.random.default_rng(0).dirichlet(np.ones(5), size=(3, 2, 4, 5)).astype(np.float32)
    rollout = attention_rollout(jnp.asarray(weights))
    np.testing.assert_allclose(rollout.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(rollout, attention_rollout(jnp.asarray(weights.mean(2, keepdims=True))), atol=1e-6)


class Quadrants(nn.Module):
    """Class k's logit is the mean of channel k."""

    @nn.compact
    def __call__(self, x, *, train):
        x = expose(self, 'map_0', x)
        return x.mean(axis=(1, 2))


class Dark(nn.Module):
    """Shows nothing."""

    @nn.compact
    def __call__(self, x, *, train):
        return x.mean(axis=(1, 2))


def test_a_model_that_shows_nothing_is_named():
    with pytest.raises(ConfigError, match='Dark shows no maps'):
        explain(Dark(), {}, jnp.asarray(IMAGES), jnp.array([0, 0]))


def test_grad_cam_finds_the_pixels_that_make_the_class():
    images = np.zeros((2, 4, 4, 3), np.float32)
    images[0, 0, 1, 2], images[1, 3, 3, 0] = 16, 32
    maps = {'map_0': jnp.asarray(images)}
    heat = grad_cam(Quadrants(), {}, jnp.asarray(images), jnp.array([2, 0]), 'map_0', maps)
    expected = np.zeros((2, 4, 4))
    expected[0, 0, 1], expected[1, 3, 3] = 16 / 16, 32 / 16  # activation times the gradient, 1 / 16
    np.testing.assert_allclose(heat, expected, atol=1e-6)
    heat = explain(Quadrants(), {}, jnp.asarray(images), jnp.array([2, 0]))
    np.testing.assert_allclose(heat, expected / [[[1]], [[2]]], atol=1e-6)
    np.testing.assert_array_equal(explain(Quadrants(), {}, jnp.asarray(images), jnp.array([1, 1])), 0)


@pytest.mark.parametrize(
    ('model', 'grid'),
    [
        (CNN(num_classes=5, stage_features=(4, 4, 4), hidden_features=8), (8, 8)),
        (ViT(num_classes=5, embed_dim=8, hidden_dim=8, num_heads=2, num_layers=11, patch_size=8), (4, 4)),
        (ResNet18(num_classes=5, stage_sizes=(1, 1, 1, 1)), (4, 4)),
        (Airbench(num_classes=5, widths=(4, 4, 4)), (7, 7)),
    ],
    ids=['cnn', 'vit', 'resnet18', 'airbench'],
)
def test_each_model_has_a_place_to_look_at(model, grid):
    variables = initialize(model)
    assert not {'intermediates', 'perturbations'} & set(variables)
    heat = jax.jit(lambda *arguments: explain(model, *arguments))(variables, IMAGES, np.array([3, 1]))
    assert heat.shape == (2, *grid)
    assert np.isfinite(heat).all() and heat.min() >= 0 and heat.max() <= 1
    assert len(np.unique(heat)) > 4


class Shrinking(nn.Module):
    """Exposes maps of the given sizes, in turn."""

    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x, *, train):
        for number, size in enumerate(self.sizes):
            x = expose(self, f'map_{number}', jax.image.resize(x, (len(x), size, size, 3), 'linear') ** 2)
        return x.mean(axis=(1, 2))


@pytest.mark.parametrize(
    ('sizes', 'chosen'),
    [((8, 4, 2, 1), 4), ((2, 1), 2), ((1, 3, 2), 3), ((32, 16, *(8,) * 8, 6, 1), 6)],  # map_10 is the last of the large
)
def test_grad_cam_takes_the_last_large_map_or_else_the_largest(sizes, chosen):
    heat = explain(Shrinking(sizes), {}, jnp.asarray(IMAGES), jnp.array([0, 0]))
    assert heat.shape == (2, chosen, chosen)


def test_layers_count_in_their_order():
    """With eleven layers, transformer_10 comes last although '10' sorts before '2'."""
    model = ViT(num_classes=5, embed_dim=8, hidden_dim=8, num_heads=2, num_layers=11, patch_size=16)
    variables = initialize(model)
    _, captured = model.apply(variables, IMAGES, train=False, mutable=['intermediates'])
    layers = [captured['intermediates'][f'transformer_{n}']['attn']['attention_weights'][0] for n in range(11)]
    expected = attention_rollout(layers)[:, 0, 1:].reshape(2, 2, 2)
    heat = explain(model, variables, jnp.asarray(IMAGES), jnp.array([0, 0]))
    np.testing.assert_allclose(heat, expected / expected.max(axis=(1, 2), keepdims=True), rtol=1e-4)


@pytest.mark.parametrize('channels', [1, 3])
def test_the_picture_shows_image_and_heat(tmp_path, channels):
    image = np.zeros((8, 8, channels), np.uint8)
    heat = np.zeros((2, 2))
    heat[0, 0] = 1
    draw(image, heat, 'frog 0.98', tmp_path / 'a.png')
    with Image.open(tmp_path / 'a.png') as picture:
        pixels = np.asarray(picture.convert('RGB')).astype(int)
    right = pixels[100:, pixels.shape[1] // 2 :]
    height, width, _ = right.shape
    assert right[: height // 2, : width // 2, 0].mean() != pytest.approx(right[height // 2 :, width // 2 :, 0].mean())
