"""What a config and a dataset become: models that fit the images; one compilation for all seeds and learning rates."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from flax_dlvc import data, steps
from flax_dlvc.errors import ConfigError
from flax_dlvc.evaluate import evaluate
from flax_dlvc.models import MODELS
from flax_dlvc.setup import Setup, set_up


def train_two_steps(setup):
    """Two training steps and an evaluation step from the setup's own start."""
    state, split = setup.create_state(), setup.place(setup.dataset.train)
    order = data.epoch_order(len(setup.dataset.train), setup.config.seed, 1)
    for indices in steps.calls(data.training_batches(order, setup.config.batch_size, 1)[:2], 0, 1):
        state, _ = setup.train_step(state, *split, indices)
    return state


@pytest.fixture
def compilations(caplog):
    """JAX's log lines of the compilations so far."""
    caplog.set_level(logging.DEBUG, 'jax._src.dispatch')
    return lambda: [record.message for record in caplog.records if 'Finished XLA compilation' in record.message]


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_variants_share_compiled_programs_and_nothing_else(optimizer, small_config, compilations):
    """With 2**32 - 1, the largest seed: more than an int32 holds."""
    small_config.optimizer.name = optimizer
    small_config.dropout_rate = 0.3
    small_config.augment.random_mirror = True
    first = set_up(small_config)
    one = train_two_steps(first)
    before = len(compilations())
    assert before >= 2  # the initial state, the step
    second = first.variant(seed=2**32 - 1, learning_rate=0.02)
    two = train_two_steps(second)
    assert compilations()[before:] == []
    assert (first.config.seed, second.config.seed) == (0, 2**32 - 1)
    assert float(second.schedule(0)) == pytest.approx(0.02)

    small_config.seed, small_config.learning_rate = 2**32 - 1, 0.02
    alone = train_two_steps(set_up(small_config))
    for left, right, other in zip(*map(jax.tree.leaves, (two.params, alone.params, one.params)), strict=True):
        np.testing.assert_array_equal(left, right)
        assert not np.array_equal(left, other)


@pytest.mark.parametrize(('num_devices', 'steps_per_call'), [(1, 1), (2, 3)])
def test_what_is_compiled_ahead_is_what_a_run_begins_with(num_devices, steps_per_call, small_config, compilations):
    small_config.num_devices, small_config.steps_per_call = num_devices, steps_per_call
    setup = set_up(small_config)
    with setup.compiling():
        pass
    programs = [message.split()[4] for message in compilations()]
    assert sorted(programs) == ['jit(_fun)', 'jit(_initialize)']  # `pmap` calls its own so
    split = setup.place(setup.dataset.train)
    order = data.epoch_order(len(setup.dataset.train), 0, 1)
    batches = data.training_batches(order, small_config.batch_size, num_devices)
    before = len(compilations())
    setup.train_step(setup.create_state(), *split, steps.calls(batches, 0, steps_per_call)[0])
    assert compilations()[before:] == []


@pytest.mark.parametrize('shape', [(28, 28, 1), (32, 32, 1)])
@pytest.mark.parametrize('name', MODELS)
def test_models_adapt_to_size_channels_and_classes(name, shape):
    config = default.get_config()
    config.model.name = name
    sizes = {'train': 10, 'validation': 0, 'test': 10}
    description = {'name': 'grey', 'class_names': list('abcdefg'), 'image_shape': shape, 'num_examples': sizes}
    dataset = data.without_examples(description | {'mean': [0.5], 'std': [0.2]})
    setup = Setup(config, dataset, jax.local_devices()[:1])
    images = jax.ShapeDtypeStruct((4, *shape), jnp.float32)
    apply = functools.partial(setup.model.apply, train=False)
    logits = jax.eval_shape(apply, setup.abstract_state.variables, images)
    assert (logits.shape, logits.dtype) == ((4, 7), jnp.float32)


def test_two_devices_share_an_odd_evaluation_batch(small_config):
    small_config.num_devices, small_config.evaluation_batch_size = 2, 99
    setup = set_up(small_config)
    metrics, _ = evaluate(setup, setup.create_state().variables, setup.place(setup.dataset.test))
    assert metrics['num_examples'] == 300


def test_a_trained_model_is_evaluated_on_the_devices_that_there_are(small_config):
    small_config.num_devices, small_config.batch_size = 64, 63
    with pytest.raises(ConfigError, match='there are 2 devices'):
        set_up(small_config)
    assert len(set_up(small_config, training=False).devices) == 2
