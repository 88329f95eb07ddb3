"""Layers that give flax's results and also run well on a CPU; convolutions are in `models.convolution`.

XLA compiles pooling gradients and random masks to slow CPU code. On a CPU, `max_pool` gets the same numbers by another
route; on any other backend it lowers to what flax's own lowers to, but for its gradient. The others are the same
everywhere. The gains below are ratios of CPU time, flax's layer over this one (batch 128, float32).

Shapes: B batch, H W map height and width, C channels, KH KW window height and width.
"""

import contextlib
import contextvars
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.linear import canonicalize_padding
from jax import lax

Pair = tuple[int, int]
Pads = tuple[Pair, Pair]  # ((top, bottom), (left, right))

_platform: contextvars.ContextVar[str] = contextvars.ContextVar('platform', default='')


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """Within, functions are traced for a platform, 'cpu' or another, that need not be this machine's."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def on_cpu() -> bool:
    """Whether the program is for a CPU, as it is on the default backend; decided once, when a function is traced."""
    return (_platform.get() or jax.default_backend()) == 'cpu'


def expose(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """`x`, sown as `name` among a module's intermediates, plus the perturbation of that name where one is handed in.

    The gradient for a perturbation of zeros is the gradient for `x`. In training neither is asked for nor computed.
    """
    module.sow('intermediates', name, x)
    return x + module.get_variable('perturbations', name) if module.has_variable('perturbations', name) else x


def explicit_pads(size: Sequence[int], window: Sequence[int], strides: Sequence[int], padding: Any) -> Pads:
    """Padding in any form that flax takes, as pairs of numbers."""
    padding = canonicalize_padding(padding, 2)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(size, window, strides, padding)
    (top, bottom), (left, right) = padding
    return (top, bottom), (left, right)


def max_pool(x: jax.Array, window: Sequence[int], strides: Sequence[int], padding: Any = 'VALID') -> jax.Array:
    """`nn.max_pool` of (B, H, W, C). Where values tie, the gradient is split between them; XLA gives it to the first.

    On a CPU: a maximum over rows, then over columns, forward and backward 6x (3x3, stride 2) to 14x (2x2) faster.
    Elsewhere only the gradient of windows side by side differs from flax's: see `max_pool_blocks`.
    """
    window, strides = tuple(window), tuple(strides)
    if not on_cpu():
        if window == strides and padding == 'VALID':
            return max_pool_blocks(x, window)
        return nn.max_pool(x, window, strides, padding)
    pads = explicit_pads(x.shape[1:3], window, strides, padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    for axis, size, stride in zip((1, 2), window, strides, strict=True):
        last = (x.shape[axis] - size) // stride * stride
        shifted = [lax.slice_in_dim(x, start, start + last + 1, stride, axis) for start in range(size)]
        x = functools.reduce(jnp.maximum, shifted)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool_blocks(x: jax.Array, window: Pair) -> jax.Array:
    """`max_pool` whose strides are its window, without padding; reverse-mode derivatives only.

    On a GPU, XLA scatters the gradients of a pooling one by one. Here every input looks up whether it is the maximum
    of its window, in one pass over the map.
    """
    return nn.max_pool(x, window, window, 'VALID')


def max_pool_blocks_gradient(window: Pair, x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    """The gradient for the input of `max_pool_blocks`, given that for its result, g (B, H // KH, W // KW, C)."""
    (kh, kw), (batch, height, width, channels) = window, g.shape
    blocks = x[:, : height * kh, : width * kw].reshape(batch, height, kh, width, kw, channels)
    members = [blocks[:, :, i, :, j] for i, j in itertools.product(range(kh), range(kw))]
    maximum = functools.reduce(jnp.maximum, members)
    count: Any = sum((member == maximum).astype(g.dtype) for member in members)
    share, maximum = (each[:, :, None, :, None] for each in (g / count, maximum))
    gradient = jnp.where(blocks == maximum, share, 0).reshape(batch, height * kh, width * kw, channels)
    rest = ((0, 0), (0, x.shape[1] - height * kh), (0, x.shape[2] - width * kw), (0, 0))
    return (jnp.pad(gradient, rest),)


max_pool_blocks.defvjp(lambda x, window: (max_pool_blocks(x, window), x), max_pool_blocks_gradient)


def mix(word: jax.Array) -> jax.Array:
    """A bijection of 32-bit words: flipping any input bit flips each output bit about half of the time.

    'lowbias32', found by search for least bias: Chris Wellons, 'Prospecting for hash functions', 2018.
    """
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)


def random_words(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """32 random bits per element: the element's index, hashed twice with the two halves of the key."""
    words = jax.random.key_data(key)
    index = lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return mix(mix(index ^ words[0]) + words[-1])


class Dropout(nn.Module):
    """`nn.Dropout`, its mask drawn by hashing each element's index, which fuses into the code that uses it.

    Threefry, JAX's default, is made for splitting keys and takes over half of a ViT's step on a CPU; this mask is 10x
    cheaper than 16-bit threefry words (and XLA's 'rbg' is slower still). Keys are still JAX's own, one per layer and
    step. The keep probability is a multiple of 2^-32 and the scale is its exact inverse.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Any shape to the same shape; draws from the 'dropout' stream of random keys."""
        if deterministic or self.rate == 0:
            return x
        threshold = min(round((1 - self.rate) * 2**32), 2**32 - 1)
        if threshold <= 0:
            return jnp.zeros_like(x)
        keep = random_words(self.make_rng('dropout'), x.shape) < jnp.uint32(threshold)
        scaled = x.astype(jnp.float32) * (2**32 / threshold)
        return jnp.where(keep, scaled.astype(x.dtype), 0)


class StochasticDepth(nn.Module):
    """Drops a whole branch of an example with probability `rate` (Huang et al. 2016, arXiv:1603.09382)."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Any shape (B, …) to the same shape; draws from the 'dropout' stream of random keys."""
        ones = jnp.ones((x.shape[0],) + (1,) * (x.ndim - 1), jnp.float32)
        return (x * Dropout(self.rate)(ones, deterministic)).astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU through erf, 2x faster on a CPU than `nn.gelu(approximate=False)`, which goes through erfc.

    In float32, as in PyTorch: where erf is near -1, 1 + erf has few digits left of bfloat16's eight bits.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, dropout: Callable[[jax.Array], jax.Array] = lambda weights: weights
) -> jax.Array:
    """Attention of queries, keys and values (B, tokens, heads, features of a head); `dropout` acts on the weights.

    Heads go before tokens first, so that all products are batched ones without further copies: 1.2x on a CPU.
    """
    q, k, v = (each.transpose(0, 2, 1, 3) for each in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.einsum('bhqd,bhkd->bhqk', q, k)
    weights = dropout(nn.softmax(scores.astype(jnp.float32)).astype(v.dtype))
    return jnp.einsum('bhqk,bhkd->bhqd', weights, v).transpose(0, 2, 1, 3)
