"""`Conv`: `nn.Conv` that also runs well on a CPU.

XLA compiles convolutions on small maps, and gradients of convolutions, to slow CPU code: nine tenths of a plain
ResNet18's training step. On a CPU, `Conv` gets the same numbers by other routes; on any other backend it is `nn.Conv`.
The gains below are ratios of CPU time (batch 128, float32): XLA's own way over the one that is described.

Shapes: B batch, H W map height and width, C input and O output channels, KH KW kernel height and width; H' W' of a
result.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flax_dlvc.models.layers import Pads, Pair, explicit_pads, on_cpu

LAYOUT = ('NHWC', 'HWIO', 'NHWC')
PLAIN = {'lhs_dilation': (1, 1), 'rhs_dilation': (1, 1), 'feature_group_count': 1}  # what `convolve` computes
SMALL_MAP = 4  # up to this output height and width, matrix products are faster than XLA's CPU convolution
MANY_CHANNELS = 64  # from this many in and out, Winograd's algorithm saves more than its transforms cost
FEW_INPUTS = 27  # of an output, KH x KW x C, up to which a loop that XLA compiles is the fastest way
CHUNK = 2**19  # entries of a map (2 MiB) whose transforms, four times as large, stay in a CPU's cache


def pad_axis(x: jax.Array, axis: int, low: int, high: int, stride: int = 1) -> jax.Array:
    """`x` with its entries `stride` apart along `axis` and zeros around them; negative `low` or `high` cut off."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (low, high, stride - 1)
    return lax.pad(x, jnp.zeros((), x.dtype), config)


class Tap(NamedTuple):
    """A (row, column) in the kernel, the part of the input map that it reads, and where in the output that goes."""

    position: Pair
    inputs: tuple[slice, slice]
    outputs: tuple[slice, slice]


class Geometry(NamedTuple):
    """What decides how a convolution is compiled, each along (height, width)."""

    size: Pair
    kernel: Pair
    strides: Pair
    pads: Pads

    @property
    def output(self) -> Pair:
        """Height and width of the result."""
        height, width = (
            (size + sum(pad) - kernel) // stride + 1 for size, kernel, stride, pad in zip(*self, strict=True)
        )
        return height, width

    @property
    def taps(self) -> list[Tap]:
        """The kernel positions that read the map at all; reads of the padding are left out."""
        axes: list[list[tuple[int, slice, slice]]] = []
        for size, kernel, stride, (low, _), num_outputs in zip(*self, self.output, strict=True):
            axis = []
            for position in range(kernel):
                offset = position - low
                first = max(0, -(offset // stride))
                last = min(num_outputs - 1, (size - 1 - offset) // stride)
                if first <= last:
                    inputs = slice(first * stride + offset, last * stride + offset + 1, stride)
                    axis.append((position, inputs, slice(first, last + 1)))
            axes.append(axis)
        return [Tap((i, j), (a, b), (c, d)) for (i, a, c), (j, b, d) in itertools.product(*axes)]

    @property
    def as_matmul(self) -> bool:
        """Whether a matrix product per tap is the faster way on a CPU."""
        return max(self.output) <= SMALL_MAP

    @property
    def in_tiles(self) -> bool:
        """Whether `winograd` can compute it and its input gradient."""
        even = all(length % 2 == 0 for length in (*self.size, *self.output))
        return self.kernel == (3, 3) and self.strides == (1, 1) and even


def sum_of_taps(equation: str, x: jax.Array, kernel: jax.Array, size: Pair, taps: list[Tap]) -> jax.Array:
    """Adds up, at each tap's outputs on a map of `size`, its inputs times its matrix.

    No patches are materialised and no zeros of the padding multiplied: on a 1x1 map a 3x3 kernel is one product, not
    nine. Sums are float32 whatever the inputs are, like those inside a convolution.
    """
    total: Any = 0
    for tap in taps:
        part = jnp.einsum(equation, x[:, *tap.inputs], kernel[tap.position], preferred_element_type=jnp.float32)
        for axis, length, where in zip((1, 2), size, tap.outputs, strict=True):
            part = pad_axis(part, axis, where.start, length - where.stop, where.step or 1)
        total += part
    return total.astype(x.dtype)


def winograd(x: jax.Array, kernel: jax.Array, pads: Sequence[Pair]) -> jax.Array:
    """Convolves (B, H, W, C) with (3, 3, C, O) to maps of even height and width H', W'.

    Winograd's F(2x2, 3x3), section 4.1 of Lavin and Gray 2016 (arXiv:1509.09308): 4x4 inputs make 2x2 outputs by 16
    products where the definition has 36, between transforms that only add. A chunk of the batch at a time, so that it
    stays in the cache: 8x8x64 1.6x, 16x16x64 1.5x, 8x8x256 1.8x.
    """

    def transform_kernel(g: jax.Array) -> jax.Array:  # the first axis, of length 3, becomes the second, of length 4
        return jnp.stack([g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]], axis=1)

    def transform_tiles(d: jax.Array) -> jax.Array:  # the second axis is cut into tiles; their entries come first
        d0, d1, d2, d3 = (d[:, first : first + d.shape[1] - 3 : 2] for first in range(4))
        return jnp.stack([d0 - d2, d1 + d2, d2 - d1, d1 - d3])

    def transform_products(m: jax.Array, axis: int) -> jax.Array:  # the first axis, of length 4, becomes one of 2
        return jnp.stack([m[0] + m[1] + m[2], m[1] - m[2] - m[3]], axis)

    def convolve_map(x: jax.Array) -> jax.Array:  # (H, W, C)
        padded = lax.pad(x, jnp.zeros((), x.dtype), [(*pads[0], 0), (*pads[1], 0), (0, 0, 0)])  # or cut off
        tiles = transform_tiles(transform_tiles(padded))  # (4, 4, H'/2, W'/2, C)
        products = jnp.einsum('ijhwc,ijco->ijhwo', tiles, kernel)
        outputs = transform_products(transform_products(products, 2), 3)  # (H'/2, 2, W'/2, 2, O)
        height, _, width, _, channels = outputs.shape
        return outputs.reshape(2 * height, 2 * width, channels)

    kernel = transform_kernel(transform_kernel(kernel))  # (4, 4, C, O)
    num_chunks = math.ceil(x.size / CHUNK)
    return lax.map(convolve_map, x, batch_size=math.ceil(len(x) / num_chunks))


def sum_of_products(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolves (B, H, W, C) with (KH, KW, C, O) as its definition says, in one loop with what comes before and after.

    32x32x3 to 32, with the pooling that follows: 1.13x for the whole evaluation of a CNN.
    """
    x = jnp.pad(x, ((0, 0), *geometry.pads, (0, 0)))
    # With the padding as part of the map, each tap reads for all outputs.
    padded = geometry._replace(size=(x.shape[1], x.shape[2]), pads=((0, 0), (0, 0)))
    terms: Any = (
        x[:, *tap.inputs, c, None] * kernel[*tap.position, c] for tap in padded.taps for c in range(x.shape[3])
    )
    return sum(terms)


def suits_winograd(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> bool:
    """Whether `winograd` is the fastest way on a CPU.

    In bfloat16 its transforms would lose digits; a batch whose size is open, in an exported function, has no chunks.
    """
    if not geometry.in_tiles or geometry.as_matmul or jax.export.is_symbolic_dim(x.shape[0]):
        return False
    return min(kernel.shape[2:]) >= MANY_CHANNELS and x.dtype == jnp.float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolves (B, H, W, C) with (KH, KW, C, O) on a CPU; reverse-mode derivatives only.

    The gradients are written as matrix products and plain convolutions. Those that autodiff derives have permuted
    dimensions, for which XLA has no fast CPU code in the body of a `lax.scan` (32x32x32: 70 times slower there).
    """
    if suits_winograd(x, kernel, geometry):
        return winograd(x, kernel, geometry.pads)
    if math.prod(kernel.shape[:3]) <= FEW_INPUTS and x.dtype == jnp.float32:
        return sum_of_products(x, kernel, geometry)
    return convolve_in_training(x, kernel, geometry)


def convolve_in_training(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """`convolve` where gradients follow, by operations that XLA fuses with nothing else.

    What it does fuse it computes again for each use: `x` in the transforms of `winograd` and, transposed, for
    `kernel_gradient` (a CNN's step takes 1.08x as long), or the results of `sum_of_products` (1.9x).
    """
    if not geometry.as_matmul:
        return lax.conv_general_dilated(x, kernel, geometry.strides, geometry.pads, dimension_numbers=LAYOUT)
    return sum_of_taps('bhwc,co->bhwo', x, kernel, geometry.output, geometry.taps)


def input_gradient(kernel: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    """The gradient for the input of `convolve`, given that for its result, g (B, H', W', O)."""
    if geometry.as_matmul:
        taps = [Tap(position, outputs, inputs) for position, inputs, outputs in geometry.taps]
        return sum_of_taps('bhwo,co->bhwc', g, kernel, geometry.size, taps)
    pads = [
        (kernel - 1 - low, size + low - (outputs - 1) * stride - 1)
        for outputs, size, kernel, stride, (low, _) in zip(geometry.output, *geometry, strict=True)
    ]
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    if suits_winograd(g, kernel, geometry):
        return winograd(g, flipped, pads)
    return lax.conv_general_dilated(g, flipped, (1, 1), pads, lhs_dilation=geometry.strides, dimension_numbers=LAYOUT)


def kernel_gradient(x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    """The gradient for the kernel of `convolve`, given that for its result, g (B, H', W', O)."""
    (kh, kw), c, o = geometry.kernel, x.shape[3], g.shape[3]
    x_rows, g_rows = x.transpose(1, 2, 0, 3), g.transpose(1, 2, 0, 3)  # (H, W, B, ·): slices below are contiguous
    if geometry.as_matmul:
        parts: dict[Pair, jax.Array] = {
            position: jnp.dot(x_rows[inputs].reshape(-1, c).T, g_rows[outputs].reshape(-1, o))
            for position, inputs, outputs in geometry.taps
        }
        unread = jnp.zeros((c, o), x.dtype)
        positions = itertools.product(range(kh), range(kw))
        return jnp.stack([parts.get(position, unread) for position in positions]).reshape(kh, kw, c, o)
    pads = [
        (low, kernel + (outputs - 1) * stride - size - low)
        for outputs, size, kernel, stride, (low, _) in zip(geometry.output, *geometry, strict=True)
    ]
    product = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0), g_rows, (1, 1), pads, rhs_dilation=geometry.strides, dimension_numbers=LAYOUT
    )
    return product.transpose(1, 2, 0, 3)


convolve.defvjp(
    lambda x, kernel, geometry: (convolve_in_training(x, kernel, geometry), (x, kernel)),
    lambda geometry, saved, g: (input_gradient(saved[1], g, geometry), kernel_gradient(saved[0], g, geometry)),
)


def conv_general_dilated(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: str | Sequence[Pair], **options: Any
) -> jax.Array:
    """`lax.conv_general_dilated` as `nn.Conv` calls it; on a CPU by the fastest route for the shape.

    Forward pass, input gradient and kernel gradient take a route each, and there are no other derivatives; the
    convolutions among them want `runtime.set_cpu_options`. 2x2x256, forward and backward: 60x. Groups, dilation, other
    than two dimensions, sizes that are open or zero, and numbers that are not floating-point ones stay with XLA.
    """
    is_plain = all(options[name] == value for name, value in PLAIN.items()) and jnp.issubdtype(x.dtype, jnp.floating)
    if on_cpu() and is_plain and x.ndim == 4 and all(isinstance(length, int) for length in x.shape[1:]):
        size, window = (x.shape[1], x.shape[2]), (kernel.shape[0], kernel.shape[1])
        pads = explicit_pads(size, window, strides, padding)
        geometry = Geometry(size, window, (strides[0], strides[1]), pads)
        if 0 not in x.shape and min(geometry.output) > 0:
            return convolve(x, kernel, geometry)
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


Conv = functools.partial(nn.Conv, conv_general_dilated_cls=lambda: conv_general_dilated)
