"""Where a model looked: attention rollout for the ViT, Grad-CAM for the convolutional networks.

Shapes: B batch, H height, W width, C channels, K classes, L layers, A heads, N tokens, Q queries, P patch size.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_dlvc import pictures
from flax_dlvc.errors import ConfigError

# Grad-CAM takes the last map of at least this height and width, or else the largest. The textbook's choice, the very
# last map, is a single pixel in a ResNet18 with the ImageNet stem on 32x32 images, and says nothing about where.
SMALLEST_MAP = 4


def explain(model: nn.Module, variables: Any, images: jax.Array, classes: jax.Array) -> jax.Array:
    """How much each place of an image counts for a class.

    Args:
        model: with attention: `attention_rollout`; without: `grad_cam`.
        variables: its parameters and batch statistics.
        images: (B, H, W, C) float, normalised.
        classes: (B,) int, the class to explain for each image; attention does not ask for it.

    Returns:
        (B, h, w) in [0, 1], for a grid of h times w places.

    Raises:
        ConfigError: the model has neither attention nor maps that it exposes.
    """
    _, captured = model.apply(variables, images, train=False, mutable=['intermediates'])
    intermediates = captured.get('intermediates', {})
    num_layers = sum(name.startswith('transformer_') for name in intermediates)
    if num_layers:
        layers = [intermediates[f'transformer_{layer}'] for layer in range(num_layers)]
        weights = [layer['attn']['attention_weights'][0] for layer in layers]
        rows = images.shape[1] // model.patch_size
        heat = attention_rollout(weights)[:, 0, 1:].reshape(len(images), rows, -1)
    else:
        maps = {name: sown[0] for name, sown in intermediates.items() if name.startswith('map_')}
        if not maps:
            raise ConfigError(f'{type(model).__name__} shows no maps (map_0 …) to explain it by; see layers.expose')
        *_, last = sorted(maps, key=lambda name: min(*maps[name].shape[1:3], SMALLEST_MAP))  # of equals, the last one
        heat = grad_cam(model, variables, images, classes, last, maps)
    return heat / jnp.maximum(heat.max(axis=(1, 2), keepdims=True), jnp.finfo(heat.dtype).tiny)


def attention_rollout(weights: Sequence[jax.Array]) -> jax.Array:
    """How much of each token at the start reaches each token at the end (Abnar and Zuidema 2020, arXiv:2005.00928).

    Attention is averaged over the heads; half of each token passes by on the residual connection; the layers multiply.

    Args:
        weights: for each of L layers attention weights (B, A, Q, N), a row per query, each row's sum 1. The queries are
            those of the first Q tokens; in the last layer alone Q may be less than N.

    Returns:
        (B, Q, N), a row per token at the end, each row's sum 1.
    """
    mixing = (
        (layer.astype(jnp.float32).mean(axis=1) + jnp.eye(layer.shape[-2], layer.shape[-1])) / 2  # (B, Q, N)
        for layer in weights
    )
    return functools.reduce(lambda rollout, layer: layer @ rollout, mixing)


def grad_cam(
    model: nn.Module, variables: Any, images: jax.Array, classes: jax.Array, name: str, maps: dict[str, jax.Array]
) -> jax.Array:
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): the maps, weighted by what each adds to a class's logit.

    Args:
        model: exposes its maps under the names in `maps`.
        variables: its parameters and batch statistics.
        images: (B, H, W, C) float, normalised.
        classes: (B,) int, the class to explain for each image.
        name: of the map to use.
        maps: (B, h, w, C) by name, as sown for these images.

    Returns:
        (B, h, w), at least 0.
    """

    def logit(perturbation: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables | {'perturbations': {name: perturbation}}, images, train=False)
        return jnp.take_along_axis(logits, classes[:, None], axis=1).sum()  # images do not influence each other

    gradient = jax.grad(logit)(jnp.zeros_like(maps[name]))
    weights = gradient.mean(axis=(1, 2), dtype=jnp.float32)
    return nn.relu(jnp.einsum('bhwc,bc->bhw', maps[name].astype(jnp.float32), weights))


@pictures.plain_style()
def draw(image: np.ndarray, heat: np.ndarray, title: str, path: Path) -> None:
    """Writes a picture: the image (H, W, C) uint8 beside itself under its heat (h, w) in [0, 1].

    Raises:
        StorageError: it cannot be written.
    """
    from matplotlib.figure import Figure

    height, width, _ = image.shape
    figure = Figure(figsize=(6, 3.4), layout='constrained')
    figure.suptitle(title, parse_math=False)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.imshow(image.squeeze(), cmap='gray', vmin=0, vmax=255, extent=(0, width, height, 0))
        axes.set_axis_off()
    right.imshow(
        heat, cmap='inferno', vmin=0, vmax=1, alpha=0.6, interpolation='bilinear', extent=(0, width, height, 0)
    )
    pictures.write(figure, path)
