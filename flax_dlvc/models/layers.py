"""Layers that match flax's own and are as fast on a CPU as on an accelerator.

XLA runs a convolution, a pooling gradient or a random mask on a CPU many times slower than the arithmetic in it needs.
`Conv`, `max_pool` and `Dropout` take other routes to the same numbers there; on any other backend they lower to what
flax's own layers lower to.

Shapes: B batch, H W height and width of a feature map, C input channels, O output channels, S stride.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.linen.linear import canonicalize_padding, default_kernel_init
from jax import lax

Pairs = tuple[tuple[int, int], ...]
LAYOUT = ('NHWC', 'HWIO', 'NHWC')


def on_cpu() -> bool:
    """Whether computations run on a CPU unless told otherwise."""
    return jax.default_backend() == 'cpu'


class Tap(NamedTuple):
    """One position in the kernel, along one axis, and where the map meets it (padding left out)."""

    index: int  # position in the kernel
    outputs: slice  # outputs that this position contributes to
    inputs: slice  # the inputs that it contributes, one per output


def taps(size: int, kernel: int, stride: int, padding: tuple[int, int]) -> list[Tap]:
    """The kernel positions along one axis that touch the map at all."""
    num_outputs = (size + sum(padding) - kernel) // stride + 1
    found = []
    for index in range(kernel):
        shift = index - padding[0]
        first = max(0, -(shift // stride))
        last = min(num_outputs - 1, (size - 1 - shift) // stride)
        if first <= last:
            start = first * stride + shift
            stop = last * stride + shift + 1
            found.append(Tap(index, slice(first, last + 1), slice(start, stop, stride)))
    return found


def tap_pairs(x_shape, kernel_shape, stride, padding) -> list[tuple[Tap, Tap]]:
    axes = zip(x_shape[1:3], kernel_shape[:2], stride, padding, strict=True)
    return list(itertools.product(*(taps(*axis) for axis in axes)))


def place(x: jax.Array, shape: Sequence[int], rows: slice, columns: slice) -> jax.Array:
    """Zeros of (B, H, W, ·) with `x` at the given rows and columns."""
    config = [(0, 0, 0)]
    for size, count, part in zip(shape[1:3], x.shape[1:3], (rows, columns), strict=True):
        step = part.step or 1
        config.append((part.start, size - part.start - (count - 1) * step - 1, step - 1))
    return lax.pad(x, jnp.zeros((), x.dtype), [*config, (0, 0, 0)])


def output_shape(x_shape, kernel_shape, stride, padding):
    spatial = [
        (n + sum(p) - k) // s + 1 for n, k, s, p in zip(x_shape[1:3], kernel_shape[:2], stride, padding, strict=True)
    ]
    return (x_shape[0], *spatial, kernel_shape[3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, stride: tuple[int, int], padding: Pairs) -> jax.Array:
    """(B, H, W, C) and (kernel height, kernel width, C, O) to (B, H', W', O)."""
    if not prefers_matmul(x.shape, kernel.shape, stride):
        return lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=LAYOUT)
    shape = output_shape(x.shape, kernel.shape, stride, padding)
    y = jnp.zeros(shape, jnp.float32)
    for row, column in tap_pairs(x.shape, kernel.shape, stride, padding):
        part = jnp.dot(
            x[:, row.inputs, column.inputs], kernel[row.index, column.index], preferred_element_type=jnp.float32
        )
        y += place(part, shape, row.outputs, column.outputs)
    return y.astype(x.dtype)


def prefers_matmul(x_shape, kernel_shape, stride) -> bool:
    return max(x_shape[1:3]) <= 4 or (stride[0] > 1 and kernel_shape[2] >= 16)


def convolve_forward(x, kernel, stride, padding):
    return convolve(x, kernel, stride, padding), (x, kernel)


def convolve_backward(stride, padding, residuals, g):
    x, kernel = residuals
    return input_gradient(x, kernel, stride, padding, g), kernel_gradient(x, kernel, stride, padding, g)


def input_gradient(x, kernel, stride, padding, g):
    if not prefers_matmul(x.shape, kernel.shape, stride) and stride == (1, 1):
        flipped = kernel[::-1, ::-1].swapaxes(2, 3)
        full = [(k - 1 - lo, k - 1 - hi) for k, (lo, hi) in zip(kernel.shape[:2], padding, strict=True)]
        return lax.conv_general_dilated(g, flipped, (1, 1), full, dimension_numbers=LAYOUT)
    dx = jnp.zeros(x.shape, jnp.float32)
    for row, column in tap_pairs(x.shape, kernel.shape, stride, padding):
        part = jnp.einsum(
            'bhwo,co->bhwc',
            g[:, row.outputs, column.outputs],
            kernel[row.index, column.index],
            preferred_element_type=jnp.float32,
        )
        dx += place(part, x.shape, row.inputs, column.inputs)
    return dx.astype(x.dtype)


def kernel_gradient(x, kernel, stride, padding, g):
    if not prefers_matmul(x.shape, kernel.shape, stride):
        pads = [
            (lo, k - 1 + (n_out - 1) * s + 1 - n - lo)
            for k, (lo, _), s, n, n_out in zip(
                kernel.shape[:2], padding, stride, x.shape[1:3], g.shape[1:3], strict=True
            )
        ]
        dk = lax.conv_general_dilated(
            x.transpose(3, 1, 2, 0),
            g.transpose(1, 2, 0, 3),
            (1, 1),
            pads,
            rhs_dilation=stride,
            dimension_numbers=LAYOUT,
        )
        return dk.transpose(1, 2, 0, 3)
    zeros = jnp.zeros(kernel.shape[2:], kernel.dtype)
    parts = {
        (row.index, column.index): jnp.einsum(
            'bhwc,bhwo->co',
            x[:, row.inputs, column.inputs],
            g[:, row.outputs, column.outputs],
            preferred_element_type=jnp.float32,
        ).astype(kernel.dtype)
        for row, column in tap_pairs(x.shape, kernel.shape, stride, padding)
    }
    indices = itertools.product(range(kernel.shape[0]), range(kernel.shape[1]))
    return jnp.stack([parts.get(index, zeros) for index in indices]).reshape(kernel.shape)


convolve.defvjp(convolve_forward, convolve_backward)


class Conv(nn.Module):
    """`nn.Conv` for images, without groups or dilation."""

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] = 1
    padding: Any = 'SAME'
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = default_kernel_init
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) to (B, H', W', features)."""
        kernel_size = tuple(self.kernel_size)
        strides = (self.strides,) * 2 if isinstance(self.strides, int) else tuple(self.strides)
        padding = canonicalize_padding(self.padding, 2)
        kernel = self.param('kernel', self.kernel_init, (*kernel_size, x.shape[-1], self.features), self.param_dtype)
        bias = self.param('bias', self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        if on_cpu():
            pairs = lax.padtype_to_pads(x.shape[1:3], kernel_size, strides, padding) if isinstance(padding, str) else padding
            y = convolve(x, kernel, strides, tuple(map(tuple, pairs)))
        else:
            y = lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)
        return y if bias is None else y + bias


def max_pool(x: jax.Array, window: Sequence[int], strides: Sequence[int], padding: Any = 'VALID') -> jax.Array:
    """`nn.max_pool` of (B, H, W, C); on ties the gradient is shared."""
    window, strides = tuple(window), tuple(strides)
    if not on_cpu():
        return nn.max_pool(x, window, strides, padding)
    pads = lax.padtype_to_pads(x.shape[1:3], window, strides, padding) if isinstance(padding, str) else padding
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    for axis, size, stride in zip((1, 2), window, strides, strict=True):
        count = (x.shape[axis] - size) // stride + 1
        shifts = (
            lax.slice_in_dim(x, first, first + (count - 1) * stride + 1, stride, axis) for first in range(size)
        )
        x = functools.reduce(jnp.maximum, shifts)
    return x


class Dropout(nn.Module):
    """`nn.Dropout` from 16-bit random words; the scale uses the true, quantised keep probability."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Any shape to the same shape."""
        if deterministic or self.rate == 0:
            return x
        threshold = round((1 - self.rate) * 2**16)
        if threshold == 0:
            return jnp.zeros_like(x)
        if threshold == 2**16:
            return x
        bits = jax.random.bits(self.make_rng('dropout'), x.shape, jnp.uint16)
        return jnp.where(bits < threshold, x * jnp.asarray(2**16 / threshold, x.dtype), 0)
