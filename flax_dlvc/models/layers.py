"""Layers that give flax's results and run well on CPUs and GPUs; convolutions are in `models.convolution`.

XLA compiles pooling gradients and random masks to slow CPU code, and the gradients of pooling and normalisation to GPU
code that reads and writes maps more often than it has to. The layers are the same everywhere. The gains below are
ratios of CPU time, flax's layer over this one (batch 128, float32).

Shapes: B batch, H W map height and width, C channels, KH KW window height and width.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.linear import canonicalize_padding
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

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


def max_pool(x: jax.Array, window: Pair, strides: Pair, padding: Any = 'VALID') -> jax.Array:
    """`nn.max_pool` of (B, H, W, C), also where values tie; reverse-mode derivatives only.

    XLA's gradient reads the input once more and, on a GPU, scatters one by one. Here training notes in a byte which
    place of its window is the maximum, and the gradient is written in one pass without the input. Forward and backward
    together: 10x (3x3, stride 2) and 20x (2x2).
    """
    return max_pool_padded(x, window, strides, explicit_pads(x.shape[1:3], window, strides, padding))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool_padded(x: jax.Array, window: Pair, strides: Pair, pads: Pads) -> jax.Array:
    """`max_pool` with its padding in numbers."""
    return max_pool_and_winners(x, window, strides, pads)[0]


def max_pool_and_winners(
    x: jax.Array, window: Pair, strides: Pair, pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """What `max_pool` returns, and what its gradient takes: the maxima's places in their windows, and `x`."""
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    height, width = (
        (size - side) // stride * stride + 1
        for size, side, stride in zip(padded.shape[1:3], window, strides, strict=True)
    )
    maximum, *others = (
        padded[:, i : i + height : strides[0], j : j + width : strides[1]] for i, j in np.ndindex(*window)
    )
    winner = jnp.zeros(maximum.shape, np.min_scalar_type(math.prod(window)))
    for place, other in enumerate(others, start=1):
        winner = jnp.where(other > maximum, winner.dtype.type(place), winner)
        maximum = jnp.maximum(maximum, other)
    return maximum, (winner, x)


def max_pool_gradient(
    window: Pair, strides: Pair, pads: Pads, kept: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array]:
    """The gradient for the input of `max_pool`, given that for its result, g: a pixel's is of all windows over it."""
    winner, x = kept  # of x the shape alone is used, so that a compiled step does not keep it
    size, (kh, kw) = x.shape[1:3], window
    gradient = jnp.zeros_like(x)
    for back in np.ndindex(*(-(-side // stride) for side, stride in zip(window, strides, strict=True))):
        i, j = (
            (np.arange(length) + pad) % stride + stride * away
            for length, stride, (pad, _), away in zip(size, strides, pads, back, strict=True)
        )
        place = np.where((i[:, None] < kh) & (j < kw), i[:, None] * kw + j, kh * kw).astype(winner.dtype)
        is_winner = window_over(winner, size, strides, pads, back) == place[:, :, None]
        gradient += jnp.where(is_winner, window_over(g, size, strides, pads, back), 0)
    return (gradient,)


def window_over(pooled: jax.Array, size: Sequence[int], strides: Pair, pads: Pads, back: Sequence[int]) -> jax.Array:
    """For each pixel of a map of `size` what is pooled in the last window over it, or `back` windows before; else 0."""
    for axis, length, stride, (pad, _), away in zip((1, 2), size, strides, pads, back, strict=True):
        num_windows = -(-(pad + length) // stride)
        edges = [(0, 0, 0)] * 4
        edges[axis] = (away, num_windows - away - pooled.shape[axis], 0)  # what is negative is cut off
        pooled = lax.pad(pooled, jnp.zeros((), pooled.dtype), edges).repeat(stride, axis)
        pooled = lax.slice_in_dim(pooled, pad, pad + length, axis=axis)
    return pooled


max_pool_padded.defvjp(max_pool_and_winners, max_pool_gradient)


class BatchNorm(nn.Module):
    """`nn.BatchNorm` over the last axis, with a gradient that reads the maps twice instead of three times.

    JAX differentiates statistics and normalisation one by one, on a GPU in part in float32: a seventh of what a step of
    `fast94` reads and writes outside of convolutions. ResNet18's step: 1.03x. The running variance is that of the
    batches, divided by n, as flax has it; PyTorch divides that one, and it alone, by n - 1.
    """

    use_running_average: bool
    use_scale: bool = True
    momentum: float = 0.99
    epsilon: float = 1e-5
    axis_name: str | None = None  # of devices, over which statistics are averaged
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (…, C) to (…, C), by the statistics of `x`, which it adds to the running ones, or by those."""
        features = x.shape[-1:]
        mean = self.variable('batch_stats', 'mean', jnp.zeros, features)
        variance = self.variable('batch_stats', 'var', jnp.ones, features)
        scale = self.param('scale', nn.initializers.ones, features) if self.use_scale else jnp.ones(features)
        bias = self.param('bias', nn.initializers.zeros, features)
        x = x.astype(self.dtype)
        if self.use_running_average:
            return standardize(x, mean.value, variance.value, scale, bias, self.epsilon)
        if self.is_initializing():  # where the axis of devices need not exist
            return normalize_batch(x, scale, bias, self.epsilon, None)[0]
        y, *statistics = normalize_batch(x, scale, bias, self.epsilon, self.axis_name)
        for running, new in zip((mean, variance), statistics, strict=True):
            running.value = self.momentum * running.value + (1 - self.momentum) * new
        return y


def standardize(
    x: jax.Array, mean: jax.Array, variance: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
    """(…, C) to mean `bias` and deviation `scale` (C,), in float32, given the mean and variance (C,) that it has."""
    return ((x.astype(jnp.float32) - mean) * (lax.rsqrt(variance + epsilon) * scale) + bias).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`standardize` by the mean and variance of x (…, C) itself, over all devices of the axis where there is one.

    Returns:
        The result (…, C), and mean and variance (C,), which have no gradient. Reverse-mode derivatives only.
    """
    return normalize_batch_and_keep(x, scale, bias, epsilon, axis_name)[0]


def normalize_batch_and_keep(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]:
    """What `normalize_batch` returns, and what its gradient takes."""
    wide, axes = x.astype(jnp.float32), tuple(range(x.ndim - 1))
    mean, square = wide.mean(axes), (wide * wide).mean(axes)
    if axis_name is not None:
        mean, square = lax.pmean((mean, square), axis_name)
    variance = jnp.maximum(0.0, square - mean * mean)  # of a constant, rounding may bring it below
    return (standardize(x, mean, variance, scale, bias, epsilon), mean, variance), (x, mean, variance, scale)


def normalize_batch_gradient(
    epsilon: float, axis_name: str | None, kept: tuple[jax.Array, ...], gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients for x, scale and bias (Ioffe and Szegedy 2015, arXiv:1502.03167, section 3)."""
    x, mean, variance, scale = kept
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    g = gradients[0].astype(jnp.float32)
    factor = lax.rsqrt(variance + epsilon)
    normal = (x.astype(jnp.float32) - mean) * factor
    for_bias, for_scale = g.sum(axes), (g * normal).sum(axes)
    along_mean, along_deviation = for_bias / count, for_scale / count
    if axis_name is not None:
        along_mean, along_deviation = lax.pmean((along_mean, along_deviation), axis_name)
    for_x = scale * factor * (g - along_mean - normal * along_deviation)
    return for_x.astype(x.dtype), for_scale, for_bias


normalize_batch.defvjp(normalize_batch_and_keep, normalize_batch_gradient)


def row_major(x: jax.Array) -> jax.Array:
    """`x`, its last axis contiguous in memory where the program is for an accelerator; on a CPU all arrays are."""
    return x if on_cpu() else with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@jax.custom_vjp
def kept_apart(x: jax.Array) -> jax.Array:
    """`x`; on a CPU, XLA cannot have YNNPACK compute in one call what comes before it and what comes after it.

    YNNPACK would compute a reduction together with the matrix products that follow, which takes it longer than Eigen
    takes. An optimization barrier does not prevent it; any operation that YNNPACK lacks does, such as this comparison.
    In training the gradient's use of `x` is enough, so there it is `x` itself. Reverse-mode derivatives only.
    """
    return jnp.where(x == x, x, jnp.nan) if on_cpu() else x


kept_apart.defvjp(lambda x: (x, None), lambda _, g: (g,))


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`, kept apart from the matrix product that follows: evaluation steps of a ViT 1.29x (Intel Xeon)."""

    epsilon: float = 1e-5  # PyTorch's

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Maps (…, C) to (…, C)."""
        return kept_apart(super().__call__(x, mask=mask))


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


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU through erf, 2x faster on a CPU than `nn.gelu(approximate=False)`, which goes through erfc.

    In float32, as in PyTorch: where erf is near -1, 1 + erf has few digits left of bfloat16's eight bits. The gradient
    is by its formula: JAX 0.12 works the one of erf out to the last digit, and XLA then rather writes the result down
    than computes it again in each kernel that reads it: a third more of what `fast94` moves outside of convolutions.
    """
    y = x.astype(jnp.float32)
    return (y * normal_cdf(y)).astype(x.dtype)


def gelu_tangent(tangent: jax.Array, _: jax.Array, x: jax.Array) -> jax.Array:
    """The change of `gelu` with that of x: (y Φ(y))' = Φ(y) + y φ(y), with the density φ."""
    y = x.astype(jnp.float32)
    slope = normal_cdf(y) + y * jnp.exp(-0.5 * y * y) * (2 * math.pi) ** -0.5
    return (slope * tangent.astype(jnp.float32)).astype(x.dtype)


def normal_cdf(y: jax.Array) -> jax.Array:
    """Φ of the standard normal distribution; `jax.scipy.special.ndtr` goes through erfc as well."""
    return 0.5 * (1 + lax.erf(y * math.sqrt(0.5)))


gelu.defjvps(gelu_tangent)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, dropout: Callable[[jax.Array], jax.Array] = lambda weights: weights
) -> tuple[jax.Array, jax.Array]:
    """Attention (B, queries, heads, features of a head), where keys and values are (B, tokens, heads, features).

    And its weights (B, heads, queries, tokens) before dropout in float32, each row's sum 1. `dropout` acts on multiples
    of them, one factor a row: a row is divided by its sum only after the product with the values, as in FlashAttention
    (Dao et al. 2022, arXiv:2205.14135), where it is half as long, and weights that nobody reads are never computed.
    1.6x forward on a CPU. Heads go before tokens first, so that all products are batched ones without further copies:
    1.2x.
    """
    q, k, v = (each.transpose(0, 2, 1, 3) for each in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.einsum('bhqd,bhkd->bhqk', q, k).astype(jnp.float32)
    # The result does not depend on what is subtracted, so there is nothing to differentiate.
    exponentials = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    scale = 1 / exponentials.sum(axis=-1, keepdims=True)
    mixture = jnp.einsum('bhqk,bhkd->bhqd', dropout(exponentials.astype(v.dtype)), v)
    return (mixture * scale).astype(v.dtype).transpose(0, 2, 1, 3), exponentials * scale
