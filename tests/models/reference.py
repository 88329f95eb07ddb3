"""Layers in NumPy, by their definitions, and what the tests of all models ask of a model.

Shapes: B batch, H height, W width, C input and O output channels, K kernel height and width.
"""

import jax
import numpy as np
import scipy.special


def shapes_of(model, images):
    """The variables of a model for images (B, H, W, C), without their values."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))


def count(variables):
    """Numbers in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def windows(x, size, stride, padding, border=0):
    """All K x K windows of maps (B, H, W, C) with a border around: (B, H', W', C, K, K)."""
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=border)
    return np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))[:, ::stride, ::stride]


def convolve(x, kernel, stride=1, padding=1):
    """Maps (B, H, W, C) with a kernel (K, K, C, O)."""
    return np.einsum('bhwcij,ijco->bhwo', windows(x, len(kernel), stride, padding), kernel, optimize=True)


def max_pool(x, size=2, stride=2, padding=0):
    """Maps (B, H, W, C); rows and columns that fill no window are left out."""
    return windows(x, size, stride, padding, -np.inf).max((-2, -1))


def gelu(x):
    """x Φ(x)."""
    return x * (1 + scipy.special.erf(x / np.sqrt(2))) / 2
