"""Conv against flax's own, at every shape that the models use."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import maximum_error

from flax_dlvc.models import convolution

pytestmark = pytest.mark.usefixtures('quick_compilation')

# (map size, of one number or two, input channels, output channels, kernel, stride, padding)
CNN = [(32, 3, 32, 3, 1, 'SAME'), (16, 32, 64, 3, 1, 'SAME'), (8, 64, 128, 3, 1, 'SAME')]
RESNET = [
    (32, 3, 64, 7, 2, 3),
    (8, 64, 64, 3, 1, 1),
    (8, 64, 128, 3, 2, 1),
    (8, 64, 128, 1, 2, 0),
    (4, 128, 128, 3, 1, 1),
    (4, 128, 256, 3, 2, 1),
    (4, 128, 256, 1, 2, 0),
    (2, 256, 256, 3, 1, 1),
    (2, 256, 512, 3, 2, 1),
    (2, 256, 512, 1, 2, 0),
    (1, 512, 512, 3, 1, 1),
]
CIFAR_STEM = [
    (32, 3, 64, 3, 1, 1),
    (32, 64, 64, 3, 1, 1),
    (32, 64, 128, 3, 2, 1),
    (32, 64, 128, 1, 2, 0),
    (16, 128, 128, 3, 1, 1),
    (16, 128, 256, 3, 2, 1),
    (8, 256, 256, 3, 1, 1),
    (8, 256, 512, 3, 2, 1),
    (4, 512, 512, 3, 1, 1),
]
UNUSUAL = [
    (9, 5, 7, 3, 2, 'SAME'),
    (9, 5, 7, 3, 2, 'VALID'),
    (7, 5, 7, 3, 1, 'VALID'),
    (3, 5, 7, 3, 1, 'VALID'),
    (6, 5, 7, 2, 1, 'SAME'),
    (9, 5, 7, 4, 3, ((0, 2), (3, 1))),
    (4, 5, 7, 3, 2, ((0, 1), (1, 2))),
    (4, 5, 7, 5, 1, ((0, 4), (3, 1))),
    (6, 5, 7, 5, 1, ((0, 4), (3, 1))),
    (8, 64, 72, 3, 1, ((0, 2), (2, 2))),
    (8, 72, 64, 3, 1, 'VALID'),
    (8, 64, 64, 3, 1, ((3, 3), (4, 2))),
    (7, 64, 64, 3, 1, 'SAME'),
    ((5, 8), 3, 7, 3, 1, 'SAME'),
    ((9, 6), 5, 7, 3, 2, 'SAME'),
    ((2, 4), 5, 7, 3, 1, 'SAME'),
    ((6, 10), 64, 64, 3, 1, 'SAME'),
]
SMALL, MIDDLE, LARGE, STRIDED, TILED = RESNET[7], RESNET[4], CNN[1], (9, 5, 7, 3, 2, 'SAME'), CNN[2]
ROUTES = [SMALL, MIDDLE, LARGE, STRIDED, TILED]  # every branch of `convolve` and its two gradients


def example(shape: tuple, batch: int = 8, **options: Any) -> tuple[nn.Module, nn.Module, dict, jax.Array]:
    """This package's layer, flax's, variables for both, and a batch."""
    size, channels, features, kernel, stride, padding = shape
    arguments = {'features': features, 'kernel_size': (kernel, kernel), 'strides': stride, 'padding': padding}
    ours, theirs = convolution.Conv(**arguments, **options), nn.Conv(**arguments, **options)
    generator = np.random.default_rng(0)
    x, weights, bias = (
        jnp.asarray(generator.normal(size=shape), jnp.float32)
        for shape in [(batch, *np.broadcast_to(size, 2), channels), (kernel, kernel, channels, features), (features,)]
    )
    return ours, theirs, {'params': {'kernel': weights / np.sqrt(kernel**2 * channels), 'bias': bias}}, x


def value_and_gradients(layer: nn.Module) -> Callable:
    """Of the squared result's weighted sum, for variables and input: a gradient that differs at every position."""

    def loss(variables: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = layer.apply(variables, x).astype(jnp.float32)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


@pytest.mark.parametrize('shape', [*CNN, *RESNET, *CIFAR_STEM, *UNUSUAL], ids=str)
def test_conv_and_its_gradients_equal_flax(shape):
    ours, theirs, variables, x = example(shape)
    (_, y), gradients = jax.jit(value_and_gradients(ours))(variables, x)
    (_, y_reference), reference = jax.jit(value_and_gradients(theirs))(variables, x)
    assert maximum_error(y, y_reference) < 1e-5
    assert maximum_error(gradients, reference) < 1e-5
    assert maximum_error(jax.jit(ours.apply)(variables, x), y_reference) < 1e-5  # as in evaluation


@pytest.mark.parametrize('use_bias', [True, False])
@pytest.mark.parametrize('strides', [2, (2, 2), (1, 2)])
def test_conv_has_the_parameters_of_flax(use_bias, strides):
    arguments = {'features': 6, 'kernel_size': (3, 5), 'strides': strides, 'use_bias': use_bias}
    x = jnp.ones((2, 8, 10, 4))
    ours = convolution.Conv(**arguments).init_with_output(jax.random.key(0), x)
    theirs = nn.Conv(**arguments).init_with_output(jax.random.key(0), x)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert maximum_error(ours[1]['params']['kernel'], theirs[1]['params']['kernel']) == 0
    assert maximum_error(ours[0], theirs[0]) < 1e-5


@pytest.mark.parametrize(
    ('size', 'options'),
    [
        ((8, 8), {'kernel_size': (3, 3), 'feature_group_count': 4}),
        ((8, 8), {'kernel_size': (7, 7), 'feature_group_count': 8, 'features': 8}),
        ((8, 8), {'kernel_size': (3, 3), 'kernel_dilation': 2}),
        ((4, 4), {'kernel_size': (3, 3), 'input_dilation': (1, 2), 'padding': 1}),
        ((8, 8), {'kernel_size': (3, 3), 'padding': 'CIRCULAR'}),
        ((4, 4), {'kernel_size': (3, 3), 'padding': 'CIRCULAR'}),
        ((16,), {'kernel_size': (3,)}),
        ((4, 6, 4), {'kernel_size': (3, 1, 3)}),
        ((2, 4, 4), {'kernel_size': (3, 3)}),  # two batch axes
    ],
    ids=str,
)
def test_what_else_conv_takes_equals_flax(size, options):
    x = jax.random.normal(jax.random.key(0), (2, *size, 8))
    options = {'features': 12} | options
    ours, theirs = convolution.Conv(**options), nn.Conv(**options)
    variables = theirs.init(jax.random.key(1), x)
    (_, y), gradients = value_and_gradients(ours)(variables, x)
    (_, y_reference), reference = value_and_gradients(theirs)(variables, x)
    assert maximum_error(y, y_reference) < 1e-5
    assert maximum_error(gradients, reference) < 1e-5


def test_conv_of_complex_numbers_of_no_image_and_of_an_open_size():
    ours, theirs, variables, x = example(SMALL)
    x = x + 1j * x[::-1]
    assert maximum_error(*(value_of(layer.apply(variables, x)) for layer in (ours, theirs))) < 1e-5
    ours, _, variables, x = example(TILED)
    assert ours.apply(variables, x[:0]).shape == (0, 8, 8, 128)
    nothing_comes_out = convolution.Conv(12, (3, 3), padding='VALID')
    assert nothing_comes_out.init_with_output(jax.random.key(0), x[:, :2, :2])[0].shape == (8, 0, 0, 12)
    (height,) = jax.export.symbolic_shape('height')
    open_size = jax.ShapeDtypeStruct((4, height, 8, 64), jnp.float32)
    exported = jax.export.export(jax.jit(partial(ours.apply, variables)))(open_size)
    assert maximum_error(exported.call(x[:4]), ours.apply(variables, x[:4])) < 1e-5


def value_of(y: jax.Array) -> list[jax.Array]:
    """Real and imaginary part."""
    return [y.real, y.imag]


@pytest.mark.parametrize('shape', ROUTES, ids=str)
def test_conv_under_vmap(shape):
    ours, theirs, variables, x = example(shape)
    variables = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), variables)
    x = x.reshape(2, 4, *x.shape[1:])
    result = jax.jit(jax.vmap(value_and_gradients(ours)))(variables, x)
    reference = jax.jit(jax.vmap(value_and_gradients(theirs)))(variables, x)
    assert maximum_error(result[0][1], reference[0][1]) < 1e-5
    assert maximum_error(result[1], reference[1]) < 1e-5


@pytest.mark.parametrize('shape', ROUTES, ids=str)
def test_conv_in_scan(shape):
    ours, theirs, variables, x = example(shape)

    def steps(layer):
        def step(variables, x):
            (_, y), (gradient, dx) = value_and_gradients(layer)(variables, x)
            return jax.tree.map(lambda leaf, change: leaf - 1e-3 * change, variables, gradient), (y, dx)

        return jax.jit(lambda: jax.lax.scan(step, variables, x.reshape(2, 4, *x.shape[1:])))()

    assert maximum_error(steps(ours), steps(theirs)) < 1e-5


@pytest.mark.parametrize('shape', ROUTES, ids=str)
def test_conv_in_bfloat16(shape):
    ours, theirs, variables, x = example(shape, dtype=jnp.bfloat16)
    exact = example(shape)[1]
    assert ours.apply(variables, x).dtype == jnp.bfloat16
    (_, y), gradients = jax.jit(value_and_gradients(ours))(variables, x)
    (_, y_exact), exact_gradients = jax.jit(value_and_gradients(exact))(variables, x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))
    (_, y_reference), reference = jax.jit(value_and_gradients(theirs))(variables, x)
    limit = 1.5 * max(maximum_error(y_reference, y_exact), 2**-8)
    assert maximum_error(y, y_exact) < limit
    assert maximum_error(jax.jit(ours.apply)(variables, x), y_exact) < limit  # as in evaluation
    limit = 1.5 * max(maximum_error(reference, exact_gradients), 2**-8)
    assert maximum_error(gradients, exact_gradients) < limit


@pytest.mark.parametrize('shape', [SMALL, LARGE, STRIDED, TILED], ids=str)
def test_elsewhere_conv_compiles_to_what_flax_compiles_to(shape, monkeypatch):
    ours, theirs, variables, x = example(shape)
    lower = lambda layer: jax.jit(value_and_gradients(layer)).lower(variables, x).as_text()  # noqa: E731
    assert lower(ours) != lower(theirs)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert lower(ours) == lower(theirs)


@pytest.mark.parametrize('shape', [RESNET[-1], RESNET[7], RESNET[5]], ids=str)
def test_small_maps_take_matrix_products_and_skip_the_padding(shape):
    ours, _, variables, x = example(shape)
    jaxpr = str(jax.make_jaxpr(value_and_gradients(ours))(variables, x))
    taps = {1: 1, 2: 3, 4: 3}[shape[0]] ** 2 if shape[4] == 1 else 9
    assert 'conv_general_dilated' not in jaxpr
    assert jaxpr.count('dot_general') == 3 * taps


@pytest.mark.parametrize('shape', [RESNET[1], CNN[2], CIFAR_STEM[6]], ids=str)
def test_many_channels_take_winograd_in_evaluation_and_input_gradient(shape):
    ours, _, variables, x = example(shape)
    assert str(jax.make_jaxpr(ours.apply)(variables, x)).count('conv_general_dilated[') == 0
    # Of forward pass, input gradient and kernel gradient, which see the same operands, the second one is Winograd's.
    jaxpr = str(jax.make_jaxpr(value_and_gradients(ours))(variables, x))
    assert jaxpr.count('conv_general_dilated[') == 2 and jaxpr.count('dot_general[') == 1


@pytest.mark.parametrize('shape', [CNN[1], (7, 64, 64, 3, 1, 1), (16, 64, 64, 3, 2, 1), (8, 64, 64, 5, 1, 2)], ids=str)
def test_other_convolutions_stay_convolutions(shape):
    ours, _, variables, x = example(shape)
    assert str(jax.make_jaxpr(ours.apply)(variables, x)).count('conv_general_dilated[') == 1
    assert str(jax.make_jaxpr(value_and_gradients(ours))(variables, x)).count('conv_general_dilated[') == 3


@pytest.mark.parametrize('shape', [CNN[0], CIFAR_STEM[0], UNUSUAL[4]], ids=str)
def test_few_inputs_are_summed_up_in_evaluation_alone(shape):
    ours, _, variables, x = example(shape)
    jaxpr = str(jax.make_jaxpr(ours.apply)(variables, x))
    assert 'conv_general_dilated[' not in jaxpr and 'dot_general[' not in jaxpr
    assert str(jax.make_jaxpr(value_and_gradients(ours))(variables, x)).count('conv_general_dilated[') == 3


@pytest.mark.parametrize('batch', [1, 4, 7])
def test_winograd_in_chunks_of_the_batch(batch, monkeypatch):
    x, kernel = (np.random.default_rng(0).normal(size=size) for size in [(batch, 6, 8, 64), (3, 3, 64, 64)])
    x, kernel = np.float32(x), np.float32(kernel / 24)
    exact = np.zeros((batch, 6, 8, 64))
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    for i, j in np.ndindex(3, 3):
        exact += padded[:, i : i + 6, j : j + 8] @ kernel[i, j].astype(np.float64)
    monkeypatch.setattr(convolution, 'CHUNK', 2 * 6 * 8 * 64)
    convolve = jax.jit(lambda x: convolution.winograd(x, kernel, ((1, 1), (1, 1))))
    assert maximum_error(convolve(x), exact) < 2e-6
    if batch > 2:
        assert 'while' in convolve.lower(x).as_text()
