import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_dlvc.models import create_model
from flax_dlvc.models.airbench import Block, Whitening, dirac_init, whitening_kernel

pytestmark = pytest.mark.usefixtures('quick_compilation')


def smooth_images(count, size=12):
    """Images whose neighbouring pixels and channels are correlated, as those of photographs."""
    noise = np.random.default_rng(0).normal(size=(count, size + 1, size + 1, 3)).astype(np.float32)
    smooth = noise[:, 1:, 1:] + noise[:, :-1, 1:] + noise[:, 1:, :-1]
    return smooth + smooth.mean(axis=3, keepdims=True)


def patches(images, size):
    """Every patch, flattened as a kernel is: (patches, size * size * C)."""
    windows = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(1, 2))  # (B, H, W, C, P, P)
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, size * size * images.shape[-1]).astype(np.float64)


def test_whitening_by_definition():
    images = smooth_images(50)
    flat = patches(images, 2)
    eigenvalues, eigenvectors = np.linalg.eigh(flat.T @ flat / len(flat))
    kernel = np.asarray(jax.jit(whitening_kernel, static_argnums=1)(images, 2), np.float64).reshape(12, 24)
    np.testing.assert_array_equal(kernel[:, 12:], -kernel[:, :12])
    expected = eigenvectors / np.sqrt(eigenvalues + 5e-4)
    signs = np.sign((kernel[:, :12] * expected).sum(axis=0))  # an eigenvector's sign is free
    np.testing.assert_allclose(kernel[:, :12], expected * signs, rtol=2e-3, atol=2e-3 * abs(expected).max())


def test_ill_conditioned_patches_are_whitened():
    """Of 5,000 images as photographs are: one float32 sum over all patches is off by more than the least eigenvalue."""
    noise = np.random.default_rng(0).normal(size=(5000, 19, 19, 3)).astype(np.float32)
    images = noise.cumsum(axis=1).cumsum(axis=2)[:, 1:, 1:] / 6 + np.float32(0.05) * noise[:, 1:, 1:]
    images = np.float32(0.95) * images.mean(axis=3, keepdims=True) + np.float32(0.05) * images
    flat = patches(images, 2)
    moments = flat.T @ flat / len(flat)
    eigenvalues, eigenvectors = np.linalg.eigh(moments)
    assert 0 < eigenvalues[0] < 1e-4 and eigenvalues[-1] > 10
    for epsilon, tolerance in ((5e-4, 0.01), (1e-7, 0.1)):
        kernel = jax.jit(whitening_kernel, static_argnums=1)(images, 2, epsilon)
        kernel = np.asarray(kernel, np.float64).reshape(12, 24)[:, :12]
        white = kernel.T @ moments @ kernel  # the covariance of the whitened patches
        np.testing.assert_allclose(white, np.diag(eigenvalues / (eigenvalues + epsilon)), atol=tolerance)
        # Whatever the signs, and the order within a cluster of eigenvalues.
        expected = eigenvectors / (eigenvalues + epsilon) @ eigenvectors.T
        np.testing.assert_allclose(kernel @ kernel.T, expected, atol=tolerance * np.abs(expected).max())
    np.testing.assert_allclose(white, np.eye(12), atol=0.1)


def test_whitened_patches_are_uncorrelated_and_the_layer_stays_as_it_was():
    images = smooth_images(50)
    model = create_model('airbench', num_classes=10, dropout_rate=0.0, dtype='float32', widths=(4, 8, 8))
    batch = np.resize(images, (50, 32, 32, 3))
    variables = jax.jit(lambda images: model.init(jax.random.key(0), images, train=False))(batch)
    assert 'kernel' not in variables['params']['whitening']
    kernel = variables['batch_stats']['whitening']['kernel']
    white = patches(batch, 2) @ np.asarray(kernel, np.float64).reshape(12, 24)[:, :12]
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(12), atol=0.02)
    logits, updated = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=['batch_stats']))(variables, batch)
    assert logits.shape == (50, 10) and logits.dtype == jnp.float32
    np.testing.assert_array_equal(updated['batch_stats']['whitening']['kernel'], kernel)
    before, after = variables['batch_stats']['block1']['norm1'], updated['batch_stats']['block1']['norm1']
    assert not np.allclose(before['mean'], after['mean'])


def test_dirac_kernel_copies_its_input():
    kernel = dirac_init(jax.random.key(0), (3, 3, 4, 6))
    image = np.random.default_rng(0).normal(size=(1, 5, 5, 4)).astype(np.float32)
    y = jax.lax.conv_general_dilated(image, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    np.testing.assert_allclose(y[..., :4], image, atol=1e-6)
    assert np.abs(kernel[..., 4:]).max() <= 36**-0.5 and np.std(kernel[..., 4:]) > 0.05


def test_a_third_convolution_is_residual():
    """With fresh statistics and a third kernel of zeros, what is left is the map after the first convolution, twice."""
    block = Block(4, 3, jnp.float32, None)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    variables = block.init(jax.random.key(0), x, train=False)
    variables['params']['conv3']['kernel'] = jnp.zeros((3, 3, 4, 4))
    pooled = nn.max_pool(x, (2, 2), (2, 2))  # the first convolution copies its input
    expected = nn.gelu(nn.gelu(pooled, approximate=False), approximate=False)
    np.testing.assert_allclose(block.apply(variables, x, train=False), expected, atol=1e-5)


def test_whitening_in_bfloat16_keeps_what_the_filters_enlarge():
    colours = jax.random.uniform(jax.random.key(0), (8, 1, 1, 3), minval=-2, maxval=2)
    images = colours + 0.05 * jax.random.normal(jax.random.key(1), (8, 16, 16, 3))  # flat patches: small eigenvalues
    exact, rounded = (Whitening(2, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    variables = exact.init(jax.random.key(2), images)
    expected, y = (layer.apply(variables, images) for layer in (exact, rounded))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8, atol=1e-3)
