"""The training and evaluation steps: devices, keys, gradients."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_dlvc import data, steps
from flax_dlvc.augment import augment_batch
from flax_dlvc.errors import ConfigError
from flax_dlvc.metrics import Predictions, Sums, cross_entropy, summarize
from flax_dlvc.models import create_model

pytestmark = pytest.mark.usefixtures('quick_compilation')

NUM_CLASSES, NUM_EXAMPLES, BATCH_SIZE = 10, 320, 32
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


@pytest.fixture(scope='module')
def split():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (NUM_EXAMPLES, 8, 8, 3), np.uint8)
    return data.Split(images, generator.integers(0, NUM_CLASSES, NUM_EXAMPLES).astype(np.int32))


def make_model(dropout_rate=0.0, name='cnn', **options):
    return create_model(
        name,
        num_classes=NUM_CLASSES,
        dropout_rate=dropout_rate,
        dtype='float32',
        stage_features=(8,),  # CNN
        hidden_features=16,  # CNN
        stage_sizes=(1,),  # ResNet
        **options,
    )


def logits_of(model, variables, images, views='none'):
    """Logits of uint8 images."""
    return steps.average_logits(model, variables, steps.normalize(images.astype(np.float32) / 255, MEAN, STD), views)


def train(
    split,
    *,
    model,
    num_devices,
    steps_per_call=1,
    num_steps=10,
    augment=augment_batch,
    learning_rate=0.05,
    accumulate_steps=1,
    batch_size=BATCH_SIZE,
    ema_decay=0.0,
    same_batch=False,
):
    """Trains from the same start; returns the state and the loss of every step."""
    devices = jax.devices()[:num_devices]
    state = steps.create_state(model, optax.sgd(learning_rate), (8, 8, 3), NUM_CLASSES, 3, ema_decay)
    state = jax.device_put(state, steps.replicated(devices))
    images, labels = data.place(split, steps.replicated(devices))
    train_step = steps.make_train_step(
        model=model,
        make_optimizer=optax.sgd,
        mean=MEAN,
        std=STD,
        label_smoothing=0.0,
        augment=augment,
        accumulate_steps=accumulate_steps,
        ema_decay=ema_decay,
        devices=devices,
    )
    batches = data.training_batches(data.epoch_order(NUM_EXAMPLES, 3, 1), batch_size, num_devices)[:num_steps]
    if same_batch:
        batches = np.repeat(batches[:1], num_steps, axis=0)
    totals = [0.0]
    for indices in steps.calls(batches, 0, steps_per_call):
        state, sums = train_step(np.uint32(3), np.float32(learning_rate), state, images, labels, indices)
        totals.append(float(sums.loss.total))
    return state, np.diff(totals) / batch_size


def assert_trees_close(left, right, tolerance):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_two_devices_train_like_one(split):
    model = make_model()
    one, losses_of_one = train(split, model=model, num_devices=1)
    two, losses_of_two = train(split, model=model, num_devices=2)
    assert len(losses_of_one) == 10
    np.testing.assert_allclose(losses_of_two, losses_of_one, rtol=1e-5)
    assert_trees_close(one.params, two.params, 1e-5)


# Each image at a random brightness.
dim = partial(augment_batch, augmentation=lambda key, image: image * jax.random.uniform(key))


def test_augmentation_does_not_depend_on_the_number_of_devices(split):
    model = make_model()
    _, losses_of_one = train(split, model=model, num_devices=1, augment=dim)
    _, losses_of_two = train(split, model=model, num_devices=2, augment=dim)
    _, without = train(split, model=model, num_devices=1)
    np.testing.assert_allclose(losses_of_two, losses_of_one, rtol=1e-5)
    assert np.abs(losses_of_one - without).min() > 1e-4


def test_each_training_step_augments_anew(split):
    """With a learning rate of zero and the same batch every time, only the step's number moves the loss."""
    arguments = {'model': make_model(), 'num_devices': 1, 'learning_rate': 0.0, 'same_batch': True}
    _, without = train(split, **arguments)
    assert np.ptp(without) < 1e-5
    _, losses = train(split, **arguments, augment=dim)
    assert np.diff(np.sort(losses)).min() > 1e-5


def test_labels_are_mixed_as_the_images_are(split):
    """The loss is that of both labels, each by its share, of images that are mixed before normalisation."""

    def mixing(key, images):
        share = jnp.linspace(0.1, 1.0, len(images))
        weight = share[:, None, None, None]
        return weight * images + (1 - weight) * jnp.roll(images, 1, axis=0), share

    model = make_model()
    _, losses = train(split, model=model, num_devices=1, num_steps=1, augment=partial(augment_batch, mixing=mixing))
    indices = data.epoch_order(NUM_EXAMPLES, 3, 1)[:BATCH_SIZE]
    images, labels, share = split.images[indices] / 255, split.labels[indices], np.linspace(0.1, 1.0, BATCH_SIZE)
    weight = share[:, None, None, None]
    images = (weight * images + (1 - weight) * np.roll(images, 1, axis=0) - np.array(MEAN)) / np.array(STD)
    state = steps.create_state(model, optax.sgd(0.0), (8, 8, 3), NUM_CLASSES, seed=3)
    logits = np.asarray(model.apply(state.variables, jnp.asarray(images, jnp.float32), train=False), np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = np.arange(BATCH_SIZE)
    own, other = log_probabilities[rows, labels], log_probabilities[rows, np.roll(labels, 1)]
    assert losses[0] == pytest.approx(-(share * own + (1 - share) * other).mean(), rel=1e-5)


def test_several_steps_in_one_call_are_the_same_steps(split):
    model = make_model(dropout_rate=0.3)
    one, _ = train(split, model=model, num_devices=2, steps_per_call=1)
    four, _ = train(split, model=model, num_devices=2, steps_per_call=4)
    assert int(four.step) == 10
    assert_trees_close(one.params, four.params, 1e-5)
    assert int(four.sums.loss.count) == 10 * BATCH_SIZE


@pytest.mark.parametrize('num_devices', [1, 2])
def test_accumulated_gradients_are_those_of_the_large_batch(split, num_devices):
    model = make_model()
    whole, losses = train(split, model=model, num_devices=num_devices)
    parts, losses_of_parts = train(split, model=model, num_devices=num_devices, accumulate_steps=4)
    np.testing.assert_allclose(losses_of_parts, losses, rtol=1e-5)
    assert_trees_close(parts.params, whole.params, 1e-5)
    assert int(parts.step) == 10
    assert int(parts.sums.confusion.counts.sum()) == 10 * BATCH_SIZE


def test_synchronised_batch_norm_trains_on_two_devices_like_on_one(split):
    own = make_model(name='airbench', widths=(8,))
    synchronised = make_model(name='airbench', widths=(8,), batch_norm_axis=steps.AXIS)
    one, losses_of_one = train(split, model=own, num_devices=1, num_steps=3)
    two, losses_of_two = train(split, model=synchronised, num_devices=2, num_steps=3)
    _, apart = train(split, model=own, num_devices=2, num_steps=3)
    np.testing.assert_allclose(losses_of_two, losses_of_one, rtol=1e-4)
    assert_trees_close(two.batch_stats, one.batch_stats, 1e-4)
    assert np.abs(apart - losses_of_one).max() > 1e-3


def test_averaged_parameters_come_with_averaged_batch_statistics(split):
    states = [
        train(split, model=make_model(name='airbench', widths=(8,)), num_devices=1, num_steps=number, ema_decay=0.5)[0]
        for number in range(3)
    ]
    whole = [{'params': state.params, 'batch_stats': state.batch_stats} for state in states]
    expected = jax.tree.map(lambda a, b, c: a / 4 + b / 4 + c / 2, *whole)
    assert_trees_close(states[-1].variables, expected, 1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected['batch_stats'], states[-1].batch_stats)
    assert moved.pop('whitening') == {'kernel': 0}
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize(
    ('per_epoch', 'per_call'),
    [(312, 39), (351, 39), (25, 25), (313, 50), (7, 7), (100, 50), (2 * 53, 50), (2 * 51, 34)],
)
def test_calls_divide_the_epoch_on_an_accelerator(per_epoch, per_call, monkeypatch):
    assert steps.default_steps_per_call(per_epoch) == 1
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert steps.default_steps_per_call(per_epoch) == per_call


def test_dropout_differs_between_steps_and_devices(split):
    """With a learning rate of zero and the same example everywhere, only the masks move the loss."""
    same = data.Split(np.broadcast_to(split.images[:1], split.images.shape), split.labels * 0)
    arguments = {'learning_rate': 0.0, 'batch_size': 1}
    _, without = train(same, model=make_model(), num_devices=1, **arguments)
    assert np.ptp(without) < 1e-5
    model = make_model(dropout_rate=0.5)
    _, losses = train(same, model=model, num_devices=1, **arguments)
    assert len(np.unique(losses)) > 5
    _, losses_of_two = train(same, model=model, num_devices=2, learning_rate=0.0, batch_size=2)
    assert np.abs(losses_of_two - losses).max() > 1e-3  # else the second device has the masks of the first


class Masked(nn.Module):
    """Logits are means of scales, half of which are dropped, whatever the image."""

    @nn.compact
    def __call__(self, x, *, train):
        scale = self.param('scale', nn.initializers.ones, (NUM_CLASSES, 100))
        return nn.Dropout(0.5)(jnp.tile(scale, (len(x), 1, 1)), deterministic=not train).mean(axis=-1)


def test_dropout_differs_between_the_parts_of_a_batch(split):
    """Two parts of an image each move three quarters of the scales; with the same mask it were a half."""
    state, _ = train(split, model=Masked(), num_devices=1, num_steps=1, accumulate_steps=2, batch_size=2)
    moved = np.asarray(state.params['scale'] != 1).mean()
    assert moved == pytest.approx(0.75, abs=0.07)


class Counting(nn.Module):
    """The statistic is ten times the one before, plus the first pixel of the part's first image."""

    @nn.compact
    def __call__(self, x, *, train):
        seen = self.variable('batch_stats', 'seen', lambda: jnp.zeros(()))
        if train:
            seen.value = 10 * seen.value + x[0, 0, 0, 0]
        return nn.Dense(NUM_CLASSES)(x.reshape(len(x), -1))


def test_each_part_of_a_batch_goes_on_with_the_statistics_of_the_part_before(split):
    state, _ = train(split, model=Counting(), num_devices=1, num_steps=1, accumulate_steps=4, batch_size=8)
    order = data.epoch_order(NUM_EXAMPLES, 3, 1)
    first, second, third, last = (split.images[order[0:8:2], 0, 0, 0] / 255 - MEAN[0]) / STD[0]
    assert float(state.batch_stats['seen']) == pytest.approx(1000 * first + 100 * second + 10 * third + last, rel=1e-4)


def test_gradient_is_that_of_the_mean_loss_of_the_whole_batch(split):
    model = make_model()
    state = steps.create_state(model, optax.sgd(1.0), (8, 8, 3), NUM_CLASSES, seed=3)
    indices = data.epoch_order(NUM_EXAMPLES, 3, 1)[:BATCH_SIZE]
    images = (split.images[indices] / 255 - np.array(MEAN)) / np.array(STD)

    def loss(params):
        logits = model.apply({'params': params}, jnp.asarray(images, jnp.float32), train=False)
        return cross_entropy(logits, split.labels[indices]).mean()

    expected = jax.tree.map(jnp.subtract, state.params, jax.grad(loss)(state.params))
    trained, losses = train(split, model=model, num_devices=2, num_steps=1, learning_rate=1.0)
    assert_trees_close(trained.params, expected, 1e-5)
    assert losses[0] == pytest.approx(float(loss(state.params)), rel=1e-5)


def test_batch_statistics_are_averaged_over_the_devices(split):
    model = make_model(name='airbench', widths=(8,))
    one, _ = train(split, model=model, num_devices=1, num_steps=1)
    two, _ = train(split, model=model, num_devices=2, num_steps=1)
    # The mean of the devices' means is the mean of the batch; their variances are smaller by that of the means.
    mean_of_one, mean_of_two = (state.batch_stats['block1']['norm1']['mean'] for state in (one, two))
    np.testing.assert_allclose(mean_of_one, mean_of_two, rtol=1e-4, atol=1e-6)
    for leaf in jax.tree.leaves(two.batch_stats):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        np.testing.assert_array_equal(copies[0], copies[1])


def test_the_state_is_freed_and_the_sums_are_not(split):
    devices = jax.devices()[:1]
    model = make_model()
    state = jax.device_put(
        steps.create_state(model, optax.sgd(0.1), (8, 8, 3), NUM_CLASSES, seed=0), steps.replicated(devices)
    )
    train_step = steps.make_train_step(
        model=model,
        make_optimizer=optax.sgd,
        mean=MEAN,
        std=STD,
        label_smoothing=0.0,
        devices=devices,
    )
    placed = data.place(split, steps.replicated(devices))
    indices = np.arange(8, dtype=np.int32).reshape(1, 1, 8)
    after, sums = train_step(np.uint32(0), np.float32(0.1), state, *placed, indices)
    train_step(np.uint32(0), np.float32(0.1), after, *placed, indices)
    assert jax.tree.leaves(state.params)[0].is_deleted()
    assert int(sums.loss.count) == 8


@pytest.mark.parametrize('num_devices', [1, 2])
@pytest.mark.parametrize('batch_size', [2, 100, 320, 1000])
@pytest.mark.parametrize('steps_per_call', [1, 3])
def test_evaluation_counts_every_example_once(split, num_devices, batch_size, steps_per_call):
    devices = jax.devices()[:num_devices]
    model = make_model()
    state = steps.create_state(model, optax.sgd(0.1), (8, 8, 3), NUM_CLASSES, seed=1)
    variables = jax.device_put(state.variables, steps.replicated(devices))
    images, labels = data.place(split, steps.replicated(devices))
    evaluation_step = steps.make_evaluation_step(logits_of=partial(logits_of, model), devices=devices)
    totals = jax.device_put((Sums.empty(NUM_CLASSES), Predictions.empty(NUM_EXAMPLES)), steps.replicated(devices))
    small = 50 if batch_size == 2 else NUM_EXAMPLES  # a batch size of 2 on everything would take long
    for indices in steps.calls(data.evaluation_batches(small, batch_size, num_devices), 0, steps_per_call):
        totals = evaluation_step(variables, totals, images, labels, indices)
    sums, predictions = totals

    normalized = (split.images[:small] / 255 - np.array(MEAN)) / np.array(STD)
    logits = np.asarray(model.apply(state.variables, jnp.asarray(normalized, jnp.float32), train=False), np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    metrics = summarize(sums)
    assert metrics['num_examples'] == small
    assert metrics['accuracy'] == np.mean(logits.argmax(axis=1) == split.labels[:small])
    expected = -log_probabilities[np.arange(small), split.labels[:small]].mean()
    assert metrics['cross_entropy'] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(predictions.classes[:small], logits.argmax(axis=1))
    np.testing.assert_allclose(predictions.confidence[:small], np.exp(log_probabilities.max(axis=1)), rtol=1e-5)


def test_a_call_of_one_step_has_no_loop(split):
    model = make_model()
    state = steps.create_state(model, optax.sgd(0.1), (8, 8, 3), NUM_CLASSES, seed=1)
    evaluation_step = steps.make_evaluation_step(logits_of=partial(logits_of, model), devices=jax.devices()[:1])
    totals = Sums.empty(NUM_CLASSES), Predictions.empty(NUM_EXAMPLES)

    def program(num_steps):
        indices = np.zeros((1, num_steps, 4), np.int32)
        return evaluation_step.lower(state.variables, totals, split.images, split.labels, indices).as_text()

    assert 'while' not in program(1)
    assert 'while' in program(2)


def test_logits_are_averaged_over_the_views(split):
    model, images = make_model(), split.images[:4]
    variables = steps.create_state(model, optax.sgd(0.1), (8, 8, 3), NUM_CLASSES, seed=1).variables
    as_is, mirrored, both = (
        logits_of(model, variables, each, views)
        for each, views in ((images, 'none'), (images[:, :, ::-1], 'none'), (images, 'mirror'))
    )
    assert np.abs(as_is - mirrored).max() > 1e-2
    np.testing.assert_allclose(both, (as_is + mirrored) / 2, atol=1e-6)


def test_of_each_process_the_first_devices_run():
    assert steps.run_devices(0) == steps.run_devices(len(jax.devices())) == jax.devices()
    assert steps.run_devices(1) == jax.devices()[:1]
    with pytest.raises(ConfigError, match=f'num_devices is 9, but there are {len(jax.devices())} devices'):
        steps.run_devices(9)


def test_calls_cover_the_steps_that_are_left():
    batches = np.arange(10 * 2 * 3).reshape(10, 2, 3)
    calls = steps.calls(batches, 3, 4)
    assert [call.shape for call in calls] == [(2, 4, 3), (2, 3, 3)]
    np.testing.assert_array_equal(np.concatenate(calls, axis=1).swapaxes(0, 1), batches[3:])


def test_initial_state_depends_on_the_seed_alone():
    model = make_model()
    a, b, c = (steps.create_state(model, optax.sgd(0.1), (8, 8, 3), NUM_CLASSES, seed=seed) for seed in (0, 0, 1))
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, a.params, b.params)))
    assert not jnp.array_equal(a.params['Conv_0']['kernel'], c.params['Conv_0']['kernel'])
