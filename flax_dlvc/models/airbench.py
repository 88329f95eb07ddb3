"""The network of the CIFAR-10 speedruns: frozen patch whitening, identity convolutions, norms without scales.

After Jordan 2024, '94% on CIFAR-10 in 3.29 Seconds on a Single GPU', arXiv:2404.00498, and its Muon version.

Shapes: B batch, H height, W width, C channels, P patch size, E = P² C values in a patch.
"""

import itertools
from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flax_dlvc.models.convolution import LAYOUT, Conv
from flax_dlvc.models.layers import BatchNorm, Dropout, expose, gelu, max_pool

# PyTorch's default of a convolution: uniform within the inverse root of the fan-in.
torch_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def torch_bias_init(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default of a convolution's bias."""

    def init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


def dirac_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """A kernel (KH, KW, C, O) whose first C outputs copy the input (`torch.nn.init.dirac_`), the others random."""
    height, width, inputs, outputs = shape
    kernel = torch_init(key, shape, dtype)
    identity = jnp.zeros((height, width, inputs, min(inputs, outputs)), dtype)
    identity = identity.at[height // 2, width // 2].set(jnp.eye(inputs, min(inputs, outputs), dtype=dtype))
    return lax.dynamic_update_slice(kernel, identity, (0, 0, 0, 0))


def unit_uniform_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Uniform with standard deviation 1."""
    return jax.random.uniform(key, shape, dtype, -(3**0.5), 3**0.5)


def whitening_kernel(images: jax.Array, patch_size: int, epsilon: float = 5e-4) -> jax.Array:
    """The filters that make the patches of images (B, H, W, C) uncorrelated and of unit power, and their negatives.

    Eigenvectors of the patches' second moments (E, E), each over the root of its eigenvalue plus `epsilon`.

    Returns:
        (P, P, C, 2 E) float32, in the order of growing eigenvalues, all filters before all negatives.
    """
    channels = images.shape[-1]
    height, width = images.shape[1] - patch_size + 1, images.shape[2] - patch_size + 1
    positions = itertools.product(range(patch_size), repeat=2)
    shifted = [images[:, i : i + height, j : j + width] for i, j in positions]
    product = partial(jnp.einsum, 'bhwc,bhwd->bcd', precision='highest')
    # An average of averages: one float32 sum over millions of patches is off by more than the least eigenvalue.
    averages = [[(product(a, b) / (height * width)).mean(axis=0) for b in shifted] for a in shifted]
    moments = jnp.block(averages)
    eigenvalues, eigenvectors = jnp.linalg.eigh(moments)  # a column per eigenvalue
    filters = eigenvectors / jnp.sqrt(eigenvalues + epsilon)
    return jnp.concatenate([filters, -filters], axis=1).reshape(patch_size, patch_size, channels, -1)


class Whitening(nn.Module):
    """A convolution whose kernel is computed once, from the images that the model is initialised with.

    It stands among the batch statistics: saved and averaged like them, and not trained. Its bias is trained. The sums
    are float32: the least eigenvalues' filters enlarge differences of pixels 40 times, and with them what bfloat16
    rounds off the pixels, to a sixth of the filters' output.
    """

    patch_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (B, H, W, C) to (B, H - P + 1, W - P + 1, 2 E)."""
        kernel = self.variable('batch_stats', 'kernel', whitening_kernel, x, self.patch_size).value
        bias = self.param('bias', torch_bias_init(x.shape[-1] * self.patch_size**2), (kernel.shape[-1],))
        y = lax.conv_general_dilated(x.astype(jnp.float32), kernel, (1, 1), 'VALID', dimension_numbers=LAYOUT)
        return (y + bias).astype(self.dtype)


class Block(nn.Module):
    """Convolution and 2x2 pooling, then one more convolution, or two with a shortcut past both."""

    features: int
    depth: int
    dtype: jnp.dtype
    batch_norm_axis: str | None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps (B, H, W, C) to (B, H // 2, W // 2, features)."""
        conv = partial(Conv, self.features, (3, 3), use_bias=False, kernel_init=dirac_init, dtype=self.dtype)
        norm = partial(
            BatchNorm,
            use_running_average=not train,
            use_scale=False,
            momentum=0.6,  # few steps: the running statistics have to follow fast
            epsilon=1e-12,
            axis_name=self.batch_norm_axis,
            dtype=self.dtype,
        )
        x = max_pool(conv(name='conv1')(x), (2, 2), (2, 2))
        x = gelu(norm(name='norm1')(x))
        shortcut = x
        for number in range(2, self.depth + 1):
            x = norm(name=f'norm{number}')(conv(name=f'conv{number}')(x))
            if number == 3:
                x += shortcut
            x = gelu(x)
        return x


class Airbench(nn.Module):
    """Whitening, three blocks, a global maximum and a classifier without bias whose logits are scaled down."""

    num_classes: int
    widths: Sequence[int] = (64, 256, 256)
    depth: int = 2
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    batch_norm_axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps normalised images (B, H, W, C) to logits (B, num_classes) in float32."""
        x = gelu(Whitening(2, self.dtype, name='whitening')(x))
        for number, features in enumerate(self.widths, start=1):
            block = Block(features, self.depth, self.dtype, self.batch_norm_axis, name=f'block{number}')
            x = expose(self, f'map_{number}', block(x, train=train))
        x = x.max(axis=(1, 2))
        x = Dropout(self.dropout_rate)(x, deterministic=not train)
        logits = nn.Dense(
            self.num_classes, use_bias=False, kernel_init=unit_uniform_init, dtype=self.dtype, name='classifier'
        )(x)
        return logits.astype(jnp.float32) / x.shape[-1]
