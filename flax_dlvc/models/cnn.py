"""The report's CNN: a small convolutional net without batch statistics.

Shapes: B batch, H height, W width, C channels.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_dlvc.models.convolution import Conv
from flax_dlvc.models.layers import Dropout, expose, max_pool


class CNN(nn.Module):
    """Convolution, ReLU and 2x2 max pooling per stage, then a hidden layer, dropout and the classifier."""

    num_classes: int
    dropout_rate: float = 0.0
    stage_features: Sequence[int] = (32, 64, 128)
    hidden_features: int = 256
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps normalised images (B, H, W, C) to logits (B, num_classes) in float32."""
        for stage, features in enumerate(self.stage_features):
            x = Conv(features, (3, 3), dtype=self.dtype)(x)
            x = expose(self, f'map_{stage}', nn.relu(x))
            x = max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden_features, dtype=self.dtype)(x))
        x = Dropout(self.dropout_rate)(x, deterministic=not train)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)
