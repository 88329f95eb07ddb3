"""The report's vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929; layout of the UvA tutorial 15).

Shapes: B batch, H height, W width, C channels, P patch size, N tokens, Q queries, D embedding, F hidden, A heads.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_dlvc.models.convolution import Conv
from flax_dlvc.models.layers import Dropout, LayerNorm, StochasticDepth, attention, gelu, max_pool, row_major


def image_to_patches(x: jax.Array, patch_size: int) -> jax.Array:
    """Cuts images (B, H, W, C) into flattened patches (B, H W / P², C P P), rows first, channels first in a patch."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch_size, patch_size, width // patch_size, patch_size, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4)  # (B, H/P, W/P, C, P, P)
    return x.reshape(batch, -1, channels * patch_size * patch_size)


class SelfAttention(nn.Module):
    """Multi-head self-attention with dropout on the attention weights, as `torch.nn.MultiheadAttention`."""

    num_heads: int
    dropout_rate: float
    dtype: jnp.dtype
    num_queries: int | None = None  # Q: the leading tokens that attend to all N; None: all of them

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps tokens (B, N, D) to tokens (B, Q, D)."""
        batch, tokens, embed_dim = x.shape
        head_dim = embed_dim // self.num_heads
        # PyTorch initialises the joint projection as one (3D, D) matrix and both biases with zeros.
        qkv = nn.Dense(3 * embed_dim, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name='in_proj')(x)
        query, key, value = (
            part.reshape(batch, tokens, self.num_heads, head_dim) for part in jnp.split(qkv, 3, axis=-1)
        )
        dropout = partial(Dropout(self.dropout_rate), deterministic=not train)
        x, weights = attention(query[:, : self.num_queries], key, value, dropout)
        self.sow('intermediates', 'attention_weights', weights)  # (B, A, Q, N)
        return nn.Dense(embed_dim, dtype=self.dtype, name='out_proj')(x.reshape(batch, -1, embed_dim))


class Block(nn.Module):
    """Pre-norm transformer block: attention and a two-layer MLP, each added to its input."""

    hidden_dim: int
    num_heads: int
    dropout_rate: float
    dtype: jnp.dtype
    stochastic_depth_rate: float = 0.0
    num_outputs: int | None = None  # Q: the leading tokens that are returned; None: all of them

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps tokens (B, N, D) to tokens (B, Q, D)."""
        embed_dim = x.shape[-1]
        sometimes = partial(StochasticDepth(self.stochastic_depth_rate), deterministic=not train)
        y = LayerNorm(dtype=self.dtype, name='layer_norm_1')(x)
        attend = SelfAttention(self.num_heads, self.dropout_rate, self.dtype, self.num_outputs, name='attn')
        x = x[:, : self.num_outputs] + sometimes(attend(y, train=train))
        y = LayerNorm(dtype=self.dtype, name='layer_norm_2')(x)
        y = gelu(nn.Dense(self.hidden_dim, dtype=self.dtype, name='linear_0')(y))
        y = Dropout(self.dropout_rate)(y, deterministic=not train)
        y = nn.Dense(embed_dim, dtype=self.dtype, name='linear_3')(y)
        return x + sometimes(Dropout(self.dropout_rate)(y, deterministic=not train))


class ViT(nn.Module):
    """Patches, class token, learned positions, transformer blocks, and a classifier on the class token."""

    num_classes: int
    embed_dim: int = 256
    hidden_dim: int = 512
    num_heads: int = 8
    num_layers: int = 6
    patch_size: int = 4
    patch_stem: str = 'linear'
    stochastic_depth_rate: float = 0.0  # of the last block; it grows linearly from 0 at the first
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps normalised images (B, H, W, C) to logits (B, num_classes) in float32."""
        if self.patch_stem == 'convolutional':  # Xiao et al. 2021, arXiv:2106.14881: what a patch is, learned locally
            for number, features in enumerate((self.embed_dim // 4, self.embed_dim // 2)):
                x = Conv(features, (3, 3), dtype=self.dtype, name=f'stem_{number}')(x)
                x = gelu(LayerNorm(dtype=self.dtype, name=f'stem_norm_{number}')(x))
                x = max_pool(x, (2, 2), (2, 2)) if number == 0 else x
            x = image_to_patches(x, self.patch_size // 2)
        else:
            x = image_to_patches(x, self.patch_size)
        batch, num_patches, _ = x.shape
        x = nn.Dense(self.embed_dim, dtype=self.dtype, name='input_layer')(x)
        normal = nn.initializers.normal(1.0)  # the tutorial's torch.randn
        cls_token = self.param('cls_token', normal, (1, 1, self.embed_dim)).astype(self.dtype)
        cls_tokens = jnp.broadcast_to(cls_token, (batch, 1, self.embed_dim))
        positions = self.param('pos_embedding', normal, (1, num_patches + 1, self.embed_dim)).astype(self.dtype)
        x = jnp.concatenate([cls_tokens, x], axis=1) + positions  # (B, N, D)
        x = Dropout(self.dropout_rate)(x, deterministic=not train)
        for layer in range(self.num_layers):
            block = Block(
                self.hidden_dim,
                self.num_heads,
                self.dropout_rate,
                self.dtype,
                stochastic_depth_rate=self.stochastic_depth_rate * layer / max(1, self.num_layers - 1),
                # Nothing reads the last block's patches: without them a step has a ninth less to compute.
                num_outputs=1 if layer == self.num_layers - 1 else None,
                name=f'transformer_{layer}',
            )
            x = block(x, train=train)
        x = LayerNorm(dtype=self.dtype, name='mlp_head_0')(x[:, 0])
        if train:  # else XLA, on a GPU, transposes all tokens to batch last for the next kernel's gradient
            x = row_major(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name='mlp_head_1')(x).astype(jnp.float32)
