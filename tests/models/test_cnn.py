from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import convolve, count, max_pool, shapes_of

from flax_dlvc.models import CNN, create_model

IMAGES = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)


def fill(shapes):
    """Arbitrary values that keep activations near one."""
    generator = np.random.default_rng(1)

    def values(leaf):
        fan_in = np.prod(leaf.shape[:-1]) or 1
        return (generator.normal(size=leaf.shape) * np.sqrt(2 / fan_in)).astype(np.float32)

    return jax.tree.map(values, shapes)


def apply(model, variables, images=IMAGES, *, train=False, seed=0):
    return np.asarray(jitted_apply(model, train, variables, images, jax.random.key(seed)))


@partial(jax.jit, static_argnums=(0, 1))
def jitted_apply(model, train, variables, images, key):
    return model.apply(variables, images, train=train, rngs={'dropout': key})


@pytest.fixture(scope='module')
def variables():
    return fill(shapes_of(CNN(num_classes=10), IMAGES))


def forward(params, x):
    """The network in NumPy."""
    for stage in range(3):
        layer = params[f'Conv_{stage}']
        x = max_pool(np.maximum(convolve(x, layer['kernel']) + layer['bias'], 0))
    x = x.reshape(len(x), -1)
    x = np.maximum(x @ params['Dense_0']['kernel'] + params['Dense_0']['bias'], 0)
    return x @ params['Dense_1']['kernel'] + params['Dense_1']['bias']


def test_parameter_count():
    shapes = shapes_of(CNN(num_classes=10), IMAGES)
    assert set(shapes) == {'params'}
    convolutions = (9 * 3 + 1) * 32 + (9 * 32 + 1) * 64 + (9 * 64 + 1) * 128
    assert count(shapes) == convolutions + (4 * 4 * 128 + 1) * 256 + (256 + 1) * 10 == 620_362


def test_logits_are_numpys(variables):
    params = jax.tree.map(np.float64, variables['params'])
    logits = apply(CNN(num_classes=10), variables)
    expected = forward(params, IMAGES.astype(np.float64))
    assert logits.shape == (4, 10) and logits.dtype == np.float32
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize(('shape', 'num_classes'), [((1, 32, 32, 3), 7), ((3, 28, 28, 1), 10), ((2, 9, 17, 3), 2)])
def test_other_sizes(shape, num_classes):
    model = CNN(num_classes=num_classes)
    images = np.ones(shape, np.float32)
    logits = apply(model, fill(shapes_of(model, images)), images)
    assert logits.shape == (shape[0], num_classes) and np.isfinite(logits).all()


def test_an_examples_logits_do_not_depend_on_the_others(variables):
    model = CNN(num_classes=10)
    np.testing.assert_allclose(apply(model, variables, IMAGES[::-1])[::-1], apply(model, variables), atol=1e-5)


def test_dropout_in_training_only(variables):
    model = CNN(num_classes=10, dropout_rate=0.5)
    evaluated = apply(model, variables, seed=0)
    np.testing.assert_array_equal(evaluated, apply(model, variables, seed=1))
    np.testing.assert_array_equal(evaluated, apply(CNN(num_classes=10), variables, train=True))
    trained = apply(model, variables, train=True, seed=0)
    np.testing.assert_array_equal(trained, apply(model, variables, train=True, seed=0))
    assert np.abs(trained - apply(model, variables, train=True, seed=1)).max() > 0.1
    assert np.abs(trained - evaluated).max() > 0.1


def test_dropout_is_just_before_the_classifier(variables):
    """With the classifier's kernel zero nothing random is left; what is dropped is the hidden layer."""
    params = {**variables['params'], 'Dense_1': jax.tree.map(np.zeros_like, variables['params']['Dense_1'])}
    params['Dense_1']['bias'] = np.arange(10, dtype=np.float32)
    logits = apply(CNN(num_classes=10, dropout_rate=0.9), {'params': params}, train=True)
    np.testing.assert_array_equal(logits, np.tile(np.arange(10), (4, 1)))
    hidden = {**variables['params'], 'Dense_1': {'kernel': np.eye(256, dtype=np.float32), 'bias': np.zeros(256)}}
    model = CNN(num_classes=256, dropout_rate=0.5)
    kept, dropped = (apply(model, {'params': hidden}, train=train) for train in (False, True))
    active = kept > 1e-3
    is_zero, is_doubled = dropped == 0, np.isclose(dropped, 2 * kept, rtol=1e-4)
    assert (is_zero ^ is_doubled)[active].all()
    assert 0.4 < is_zero[active].mean() < 0.6


def test_bfloat16_keeps_parameters_and_logits_in_float32(variables):
    model = create_model('cnn', num_classes=10, dropout_rate=0.0, dtype='bfloat16')
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes_of(model, IMAGES)))
    logits, exact = apply(model, variables), apply(CNN(num_classes=10), variables)
    assert logits.dtype == np.float32
    assert 1e-4 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()
