"""What a config and a dataset become: models that fit the images; one compilation for all seeds and learning rates."""

import contextlib
import dataclasses
import functools
import logging
import re
import subprocess

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from flax_dlvc import data, steps
from flax_dlvc.errors import ConfigError
from flax_dlvc.evaluate import evaluate
from flax_dlvc.models import MODELS
from flax_dlvc.models.airbench import whitening_kernel
from flax_dlvc.setup import Setup, _commit, set_up

pytestmark = pytest.mark.usefixtures('quick_compilation')


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


# Fields of which the training program is made, and a value besides the default.
IN_THE_TRAINING_PROGRAM = {
    'accumulate_steps': 2,
    'compute_dtype': 'bfloat16',
    'dropout_rate': 0.3,
    'label_smoothing': 0.1,
    'augment.random_resized_crop': True,
    'augment.random_mirror': True,
    'augment.alternating_mirror': True,
    'augment.random_translate': 1,
    'augment.trivial_augment': True,
    'augment.mixup_alpha': 0.2,
    'augment.cutmix_alpha': 1.0,
    'augment.cutout': 2,
    'optimizer.name': 'sgd',
    'optimizer.weight_decay': 0.1,
    'optimizer.gradient_clip_norm': 1.0,
    'schedule.name': 'cosine',
    'schedule.decay_per_epoch': 0.5,
    'schedule.warmup_epochs': 1.0,
    'ema_decay': 0.9,
}


def training_program(config):
    setup = set_up(config)
    return setup.lower_train_step(setup.training_calls(1)[0]).as_text()


@pytest.fixture(scope='module')
def default_program(small_vit_config):
    return training_program(small_vit_config)


def test_the_same_config_makes_the_same_program(small_vit_config, default_program):
    assert training_program(small_vit_config) == default_program


@pytest.mark.parametrize('field', IN_THE_TRAINING_PROGRAM)
def test_the_training_program_has_every_field(field, small_vit_config, default_program):
    config = small_vit_config.copy_and_resolve_references()
    config.update_from_flattened_dict({field: IN_THE_TRAINING_PROGRAM[field]})
    assert training_program(config) != default_program


def test_the_training_step_is_made_of_what_config_and_dataset_say(small_config, monkeypatch):
    small_config.label_smoothing, small_config.ema_decay, small_config.accumulate_steps = 0.1, 0.9, 2
    setup = set_up(small_config)
    monkeypatch.setattr(steps, 'make_train_step', lambda **arguments: arguments)
    made = setup._train_step
    assert (made['label_smoothing'], made['ema_decay'], made['accumulate_steps']) == (0.1, 0.9, 2)
    assert (made['mean'], made['std']) == (setup.dataset.mean, setup.dataset.std)


def test_each_epoch_has_an_order_of_its_own(small_config):
    setup = set_up(small_config)
    first, second = (np.concatenate(setup.training_calls(epoch), axis=1).reshape(-1) for epoch in (1, 2))
    assert len(first) == len(second) == 4 * 64 and not np.array_equal(first, second)
    np.testing.assert_array_equal(setup.training_calls(2, 3)[0].reshape(-1), second[3 * 64 :])


@pytest.mark.parametrize(
    ('changes', 'is_refused'),
    [
        ({'batch_size': 1}, True),
        ({'accumulate_steps': 64}, True),
        ({'accumulate_steps': 32}, False),
        ({'batch_size': 2, 'num_devices': 2}, True),
        ({'batch_size': 2, 'num_devices': 2, 'synchronize_batch_norm': True}, False),
        ({'batch_size': 1, 'model.stem': 'cifar'}, False),  # its smallest map has 16 pixels
        ({'batch_size': 1, 'model.name': 'cnn'}, False),
    ],
)
def test_batch_norm_of_a_single_value_is_refused(small_config, changes, is_refused):
    """Less its mean it is zero: such a ResNet18 learns its last bias, and nothing says so."""
    small_config.update_from_flattened_dict({'model.name': 'resnet18'} | changes)
    with pytest.raises(ConfigError, match='one value of a channel') if is_refused else contextlib.nullcontext():
        set_up(small_config)


class Flat(nn.Module):
    """Logits that no map is shown of."""

    num_classes: int
    dropout_rate: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


def test_of_a_model_that_exposes_no_map_the_image_is_the_smallest(small_config, monkeypatch):
    monkeypatch.setitem(MODELS, 'cnn', Flat)
    assert set_up(small_config).smallest_map() == 32 * 32


def test_a_model_that_begins_from_data_sees_all_images_of_a_small_dataset(small_config):
    small_config.model.name, small_config.model.widths = 'airbench', (4, 4, 4)
    setup = set_up(small_config)
    noise = np.random.default_rng(0).integers(0, 256, setup.dataset.train.images.shape, np.uint8)
    train = data.Split(noise, setup.dataset.train.labels)
    setup = dataclasses.replace(setup, dataset=dataclasses.replace(setup.dataset, train=train))
    images = (noise / np.float32(255) - np.float32(setup.dataset.mean)) / np.float32(setup.dataset.std)
    kernels = [setup.create_state().batch_stats['whitening']['kernel']]
    kernels += [jax.jit(whitening_kernel, static_argnums=1)(seen, 2) for seen in (images, images[:1])]
    # What does not depend on the signs of eigenvectors, and on the order of those of one eigenvalue.
    found, of_all, of_one = (flat @ flat.T for flat in (np.asarray(kernel).reshape(12, 24) for kernel in kernels))
    assert np.abs(found - of_all).max() < 0.01 * np.abs(found - of_one).max()


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'num_devices': 2, 'batch_size': 63}, 'batch_size 63 is not divisible by the 2 devices'),
        ({'num_devices': 2, 'accumulate_steps': 64}, 'accumulate_steps 64 does not divide the 32 examples'),
        ({'num_devices': 2, 'accumulate_steps': 32, 'augment.mixup_alpha': 0.2}, 'mixup and cutmix mix the images'),
        ({'batch_size': 1, 'augment.cutmix_alpha': 1.0}, 'mixup and cutmix mix the images'),
        ({'num_epochs': 10**9, 'schedule.name': 'linear'}, 'num_epochs 1000000000 is too many'),
        (
            {'optimizer.name': 'muon', 'optimizer.whitening_bias_epochs': 1e12},
            r'optimizer.whitening_bias_epochs 1000000000000\.0 is too many',
        ),
        ({'augment.cutout': 32}, r'augment\.cutout 32 is not below the 32 pixels of the images'),
        ({'augment.random_translate': 100}, r'augment\.random_translate 100 is not below the 32 pixels'),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_compiled(small_config, fields, message):
    small_config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=message):
        set_up(small_config)


def test_what_has_no_effect_is_not_refused(small_config):
    small_config.optimizer.whitening_bias_epochs = 1e12  # of Muon
    small_config.schedule.name, small_config.schedule.warmup_epochs = 'one_cycle', 1e308  # which warms up by itself
    small_config.augment.cutout = small_config.augment.random_translate = 31
    setup = set_up(small_config)
    setup.lower_train_step(setup.training_calls(1)[0])
    small_config.augment.cutout = 32
    set_up(small_config, training=False)  # what was trained so may be evaluated


def test_batch_norm_is_synchronized_where_the_config_says_so(small_config):
    small_config.model.name, small_config.num_devices = 'resnet18', 2
    separate = training_program(small_config).count('all_reduce')
    small_config.synchronize_batch_norm = True
    assert training_program(small_config).count('all_reduce') > separate


def test_evaluation_and_prediction_see_the_views_of_the_config(small_vit_config):
    def programs(views):
        config = small_vit_config.copy_and_resolve_references()
        config.test_time_augmentation = views
        setup = set_up(config)
        variables, split = setup.abstract_state.variables, setup.dataset.test
        indices = np.arange(8, dtype=np.int32).reshape(1, 1, 8)
        totals = setup.empty_totals(len(split))
        evaluation = setup.evaluation_step.lower(variables, totals, *setup.place(split), indices)
        return evaluation.as_text(), setup.prediction_step.lower(variables, split.images[:8]).as_text()

    one = programs('none')
    assert programs('none') == one
    assert all(each != mirrored for each, mirrored in zip(one, programs('mirror'), strict=True))


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


def test_the_commit_is_this_packages_within_another_repositorys_hook(tmp_path, monkeypatch):
    commit = _commit()
    assert re.fullmatch('([0-9a-f]{40}(-dirty)?)?', commit)
    subprocess.run(['git', 'init', '--quiet', tmp_path], check=True)
    monkeypatch.setenv('GIT_DIR', str(tmp_path / '.git'))
    assert _commit() == commit


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
