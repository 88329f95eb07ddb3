"""ResNet18 (He et al. 2016, arXiv:1512.03385), layer for layer torchvision's `resnet18`.

Shapes: B batch, H height, W width, C channels.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_dlvc.models.convolution import Conv
from flax_dlvc.models.layers import BatchNorm, Dropout, expose, max_pool

batch_norm = partial(BatchNorm, momentum=0.9, epsilon=1e-5)  # PyTorch's defaults; its momentum is one minus this
# Kaiming normal over the fan-out, torchvision's initialisation of every convolution.
conv_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, added to a shortcut that is projected where the shape changes."""

    features: int
    stride: int
    dtype: jnp.dtype
    batch_norm_axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, features)."""
        conv = partial(Conv, use_bias=False, kernel_init=conv_init, dtype=self.dtype)
        norm = partial(batch_norm, use_running_average=not train, axis_name=self.batch_norm_axis, dtype=self.dtype)
        shortcut = x
        x = conv(self.features, (3, 3), (self.stride, self.stride), padding=1, name='conv1')(x)
        x = nn.relu(norm(name='bn1')(x))
        x = conv(self.features, (3, 3), padding=1, name='conv2')(x)
        x = norm(name='bn2')(x)
        if shortcut.shape != x.shape:
            stride = (self.stride, self.stride)
            shortcut = conv(self.features, (1, 1), stride, padding=0, name='downsample_conv')(shortcut)
            shortcut = norm(name='downsample_bn')(shortcut)
        return nn.relu(x + shortcut)


class ResNet(nn.Module):
    """A residual network of basic blocks, with dropout before the classifier."""

    num_classes: int
    stage_sizes: Sequence[int]
    stem: str = 'imagenet'
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    batch_norm_axis: str | None = None  # of devices, over which training statistics are averaged

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps normalised images (B, H, W, C) to logits (B, num_classes) in float32."""
        conv = partial(Conv, 64, use_bias=False, kernel_init=conv_init, dtype=self.dtype, name='conv1')
        if self.stem == 'imagenet':
            x = conv(kernel_size=(7, 7), strides=(2, 2), padding=3)(x)
        else:
            x = conv(kernel_size=(3, 3), padding=1)(x)
        x = batch_norm(not train, axis_name=self.batch_norm_axis, dtype=self.dtype, name='bn1')(x)
        x = nn.relu(x)
        if self.stem == 'imagenet':
            x = max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, num_blocks in enumerate(self.stage_sizes):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f'layer{stage + 1}_{block}'
                x = BasicBlock(64 * 2**stage, stride, self.dtype, self.batch_norm_axis, name=name)(x, train=train)
            x = expose(self, f'map_{stage}', x)
        x = x.mean(axis=(1, 2), dtype=jnp.float32)
        x = Dropout(self.dropout_rate)(x, deterministic=not train)
        return nn.Dense(self.num_classes, dtype=self.dtype, name='fc')(x).astype(jnp.float32)


ResNet18 = partial(ResNet, stage_sizes=(2, 2, 2, 2))
