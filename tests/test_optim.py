import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default
from flax_dlvc.config import OPTIMIZER_FIELDS, SCHEDULE_FIELDS
from flax_dlvc.models import create_model
from flax_dlvc.optim import make_optimizer, make_schedule, muon_groups, named

STEPS = 10  # per epoch


def make_config(**fields):
    config = default.get_config()
    config.learning_rate = 0.5
    config.num_epochs = 4
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


def rates(steps, **fields):
    schedule = make_schedule(make_config(**fields), STEPS, 0.5)
    return [float(schedule(step)) for step in steps]


def test_the_fields_of_each_schedule_are_those_that_it_takes():
    def program(**fields):
        return str(jax.make_jaxpr(make_schedule(make_config(**fields), STEPS, 0.5))(jnp.int32(3)))

    other = {'decay_per_epoch': 0.7, 'warmup_epochs': 2.0}
    assert {name: {*fields} for name, fields in SCHEDULE_FIELDS.items()} == {
        name: {
            field
            for field, value in other.items()
            if program(**{'schedule.name': name, f'schedule.{field}': value}) != program(**{'schedule.name': name})
        }
        for name in SCHEDULE_FIELDS
    }


def test_a_name_without_a_branch_trains_nothing_else():
    with pytest.raises(ValueError, match="no schedule is called 'unknown'"):
        make_schedule(make_config(**{'schedule.name': 'unknown'}), STEPS, 0.5)
    with pytest.raises(ValueError, match="no optimizer is called 'unknown'"):
        make_optimizer(make_config(**{'optimizer.name': 'unknown'}), STEPS, 0.5)


def test_the_fields_of_each_optimizer_are_those_that_it_takes():
    params = {
        'whitening': {'bias': jnp.ones(3)},
        'convolution': {'kernel': jnp.ones((3, 3, 2, 4))},
        'classifier': {'kernel': jnp.ones((4, 2)), 'bias': jnp.ones(2)},
    }

    def program(**fields):
        optimizer = make_optimizer(make_config(**fields), STEPS, 0.5)
        return str(jax.make_jaxpr(optimizer.update)(params, optimizer.init(params), params))

    other = {
        'momentum': 0.7, 'weight_decay': 0.3, 'gradient_clip_norm': 1.0, 'newton_schulz_steps': 5, 'sgd_momentum': 0.6,
        'classifier_factor': 2.0, 'bias_factor': 3.0, 'whitening_bias_epochs': 1.0,
    }  # fmt: skip
    assert {'name', *other} == {*default.get_config().optimizer}
    for name, taken in OPTIMIZER_FIELDS.items():
        usual = program(**{'optimizer.name': name})
        changing = {f for f in other if program(**{'optimizer.name': name, f'optimizer.{f}': other[f]}) != usual}
        assert changing == {*taken}


def test_constant():
    assert rates([0, 1, 39, 1000], **{'schedule.name': 'constant'}) == [0.5] * 4


def test_exponential_falls_after_each_epoch():
    steps = [0, 1, 9, 10, 19, 20, 39]
    expected = [0.5 * 0.9 ** (step // 10) for step in steps]
    assert rates(steps) == pytest.approx(expected, rel=1e-5)
    expected = [0.5 * 0.1 ** (step // 10) for step in steps]
    assert rates(steps, **{'schedule.decay_per_epoch': 0.1}) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('steps_per_epoch', [41, 61, 107, 312])
def test_compiled_exponential_falls_on_the_first_step_of_an_epoch(steps_per_epoch):
    schedule = make_schedule(make_config(), steps_per_epoch, 0.5)
    first = steps_per_epoch * jnp.arange(1, 31)
    epoch = np.arange(1, 31)
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(first), 0.5 * 0.9**epoch, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(first - 1), 0.5 * 0.9 ** (epoch - 1), rtol=1e-5)


def test_cosine_ends_at_zero():
    steps = [0, 1, 10, 20, 30, 39, 40]
    expected = [0.25 * (1 + math.cos(math.pi * step / 40)) for step in steps]
    assert rates(steps, **{'schedule.name': 'cosine'}) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_one_cycle():
    """Half cosines: peak / 25 to the peak over 30 % of the run, then to peak / (25 * 10,000)."""

    def between(low, high, share):
        return low + (high - low) * (1 - math.cos(math.pi * share)) / 2

    steps = [0, 3, 6, 12, 20, 26, 39, 40]
    expected = [
        between(0.02, 0.5, step / 12) if step <= 12 else between(0.5, 0.5 / 25e4, (step - 12) / 28) for step in steps
    ]
    assert rates(steps, **{'schedule.name': 'one_cycle'}) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('num_epochs', [1, 2])
@pytest.mark.parametrize('steps_per_epoch', [1, 2, 3])
@pytest.mark.parametrize('name', ['constant', 'exponential', 'cosine', 'one_cycle'])
def test_short_runs_have_finite_rates(name, steps_per_epoch, num_epochs):
    schedule = make_schedule(make_config(num_epochs=num_epochs, **{'schedule.name': name}), steps_per_epoch, 0.5)
    values = [float(schedule(step)) for step in range(num_epochs * steps_per_epoch)]
    assert all(0 <= value <= 0.5 + 1e-6 for value in values), values


@pytest.mark.parametrize('name', ['constant', 'exponential', 'cosine'])
def test_warmup_is_linear_from_zero(name):
    fields = {'schedule.name': name, 'schedule.warmup_epochs': 1.5}
    after = {
        'constant': lambda step: 0.5,
        'exponential': lambda step: 0.5 * 0.9 ** (step // 10),
        'cosine': lambda step: 0.25 * (1 + math.cos(math.pi * step / 25)),
    }[name]
    steps = [0, 1, 7, 14, 15, 16, 24, 25, 39]
    expected = [0.5 * step / 15 if step < 15 else after(step - 15) for step in steps]
    assert rates(steps, **fields) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_warmup_all_the_way():
    fields = {'schedule.name': 'cosine', 'schedule.warmup_epochs': 4.0}
    assert rates([0, 20, 39], **fields) == pytest.approx([0, 0.25, 0.5 * 39 / 40])


@pytest.fixture
def params():
    generator = np.random.default_rng(0)
    return {
        'dense': {
            'kernel': generator.normal(size=(3, 2)).astype(np.float32),
            'bias': generator.normal(size=2).astype(np.float32),
        },
        'norm': {'scale': generator.normal(size=2).astype(np.float32)},
    }


def gradients(params, seed, scale=1.0):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (scale * generator.normal(size=leaf.shape)).astype(np.float32), params)


def train(config, params, all_gradients, steps_per_epoch=STEPS):
    optimizer = make_optimizer(config, steps_per_epoch, config.learning_rate)

    @jax.jit
    def train_all(params, all_gradients):
        state = optimizer.init(params)
        for each in all_gradients:
            updates, state = optimizer.update(each, state, params)
            params = optax.apply_updates(params, updates)
        return params

    return train_all(params, all_gradients)


def assert_close(actual, expected, rtol=1e-5):
    jax.tree.map(lambda left, right: np.testing.assert_allclose(left, right, rtol=rtol, atol=1e-6), actual, expected)


def each_leaf(function, params, *others):
    """Maps `function(is_kernel, leaf, *leaves)` over trees."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path[-1].key == 'kernel', *leaves), params, *others
    )


HALVING = {'learning_rate': 0.1, 'schedule.decay_per_epoch': 0.5}


def halving(step):
    return 0.1 * 0.5**step


def test_sgd_is_pytorchs(params):
    """d = g + w p for kernels, b = m b + d, p = p - lr b; the first b is d."""
    config = make_config(
        **HALVING, **{'optimizer.name': 'sgd', 'optimizer.momentum': 0.8, 'optimizer.weight_decay': 0.3}
    )
    all_gradients = [gradients(params, seed) for seed in range(3)]

    def pytorch(is_kernel, leaf, *leaf_gradients):
        leaf, buffer = leaf.astype(np.float64), 0.0
        for step, gradient in enumerate(leaf_gradients):
            buffer = 0.8 * buffer + gradient + (0.3 * leaf if is_kernel else 0.0)
            leaf = leaf - halving(step) * buffer
        return leaf

    assert_close(train(config, params, all_gradients, steps_per_epoch=1), each_leaf(pytorch, params, *all_gradients))


def test_adamw_is_pytorchs(params):
    """p = p - lr w p for kernels, then p = p - lr m̂ / (√v̂ + 1e-8)."""
    config = make_config(**HALVING, **{'optimizer.weight_decay': 0.3})
    all_gradients = [gradients(params, seed) for seed in range(3)]

    def pytorch(is_kernel, leaf, *leaf_gradients):
        leaf, first, second = leaf.astype(np.float64), 0.0, 0.0
        for step, gradient in enumerate(leaf_gradients):
            gradient = gradient.astype(np.float64)
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            rate = halving(step)
            leaf = leaf - (rate * 0.3 * leaf if is_kernel else 0.0)
            corrected = np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8
            leaf = leaf - rate * first / (1 - 0.9 ** (step + 1)) / corrected
        return leaf

    actual = train(config, params, all_gradients, steps_per_epoch=1)
    assert_close(actual, each_leaf(pytorch, params, *all_gradients), rtol=1e-4)


@pytest.mark.parametrize(('scale', 'clip_norm'), [(100.0, 2.0), (1e-3, 2.0), (100.0, 0.0)])
def test_clipping_by_the_global_norm(params, scale, clip_norm):
    """Scales all gradients alike, before weight decay is added; small ones, or with 0 all, stay."""
    config = make_config(
        **{
            'optimizer.name': 'sgd',
            'optimizer.momentum': 0.0,
            'optimizer.weight_decay': 0.3,
            'optimizer.gradient_clip_norm': clip_norm,
        }
    )
    raw = gradients(params, 0, scale)
    norm = math.sqrt(sum(float((leaf.astype(np.float64) ** 2).sum()) for leaf in jax.tree.leaves(raw)))
    factor = min(1.0, clip_norm / norm) if clip_norm else 1.0
    expected = each_leaf(
        lambda is_kernel, leaf, gradient: leaf - 0.5 * (factor * gradient + 0.3 * leaf * is_kernel), params, raw
    )
    assert_close(train(config, params, [raw]), expected)


@pytest.mark.parametrize('optimizer', ['adamw', 'sgd'])
@pytest.mark.parametrize('model', ['cnn', 'resnet18', 'vit'])
def test_weight_decay_moves_kernels_only(model, optimizer):
    """Without gradients only weight decay moves anything."""
    options = {'embed_dim': 8, 'hidden_dim': 8, 'num_heads': 2, 'num_layers': 1, 'patch_size': 4, 'stem': 'cifar'}
    if model == 'resnet18':
        options['stage_sizes'] = (1, 1)
    module = create_model(model, num_classes=3, dropout_rate=0.0, dtype='float32', **options)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False))['params']
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    zeros = jax.tree.map(np.zeros_like, ones)
    config = make_config(**{'optimizer.name': optimizer, 'optimizer.weight_decay': 0.2})
    trained = train(config, ones, [zeros])
    assert_close(trained, each_leaf(lambda is_kernel, leaf: leaf * (0.9 if is_kernel else 1.0), ones))
    spared = {path[-1].key for path, kernel in jax.tree_util.tree_leaves_with_path(named('kernel')(ones)) if not kernel}
    assert (
        spared
        == {
            'cnn': {'bias'},
            'resnet18': {'bias', 'scale'},
            'vit': {'bias', 'scale', 'cls_token', 'pos_embedding'},
        }[model]
    )


def test_linear_falls_to_zero():
    expected = [0.5, 0.5 * 39 / 40, 0.25, 0.5 / 40]
    assert rates([0, 1, 20, 39], **{'schedule.name': 'linear'}) == pytest.approx(expected, rel=1e-5)


def newton_schulz(matrix, steps):
    """Muon's quintic iteration on a matrix (rows, columns), by definition."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_by_definition():
    generator = np.random.default_rng(0)
    shapes = {'conv1': (3, 3, 4, 6), 'conv2': (3, 3, 6, 6), 'conv3': (3, 3, 6, 6)}  # two of one shape, as a batch
    params = {name: {'kernel': generator.normal(size=shape)} for name, shape in shapes.items()}
    params |= {'classifier': {'kernel': generator.normal(size=(6, 3))}, 'norm': {'bias': generator.normal(size=6)}}
    params |= {'scaled norm': {'scale': generator.normal(size=6)}}
    params |= {'whitening': {'bias': generator.normal(size=5)}}
    fields = {'name': 'muon', 'momentum': 0.6, 'weight_decay': 0.01, 'classifier_factor': 3.0, 'bias_factor': 2.0}
    config = make_config(**{f'optimizer.{name}': value for name, value in fields.items()}, **{'learning_rate': 0.1})
    config.schedule.name, config.num_epochs = 'linear', 2
    config.optimizer.whitening_bias_epochs = 1.0  # the first two steps of four
    each = [gradients(params, seed) for seed in range(4)]
    actual = train(config, jax.tree.map(np.float32, params), each, steps_per_epoch=2)

    momenta = jax.tree.map(np.zeros_like, params)
    for step, now in enumerate(each):
        rate = 0.1 * (1 - step / 4)
        for name, entry in params.items():
            ((leaf, value),) = entry.items()
            gradient = np.float64(now[name][leaf])
            if name.startswith('conv'):
                mean = momenta[name][leaf] = 0.6 * momenta[name][leaf] + 0.4 * gradient
                # optax corrects the averages for their start at zero
                nesterov = 0.6 * mean / (1 - 0.6 ** (step + 2)) + 0.4 * gradient / (1 - 0.6 ** (step + 1))
                matrix = nesterov.reshape(-1, value.shape[-1]).T  # (outputs, inputs)
                value = value * np.sqrt(value.shape[-1]) / np.linalg.norm(value)
                entry[leaf] = value - rate * newton_schulz(matrix, 3).T.reshape(value.shape)
                continue
            factor = 3.0 if name == 'classifier' else 2.0
            rate_here = 2.0 * 0.1 * max(0, 1 - step / 2) if name == 'whitening' else factor * rate
            gradient = gradient + 0.01 / (0.1 * factor) * value * (leaf != 'scale')
            momenta[name][leaf] = 0.85 * momenta[name][leaf] + gradient
            entry[leaf] = value - rate_here * (gradient + 0.85 * momenta[name][leaf])
    assert_close(actual, params, rtol=1e-3)


def test_muon_trains_the_kernels_of_convolutions():
    model = create_model('airbench', num_classes=3, dropout_rate=0.0, dtype='float32', widths=(2, 2, 2))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False))['params']
    for path, group in jax.tree_util.tree_leaves_with_path(muon_groups(shapes)):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        expected = {'whitening/bias': 'whitening bias', 'classifier/kernel': 'classifier'}
        assert group == expected.get(name, 'muon' if 'conv' in name else 'bias'), name


def test_a_whitening_bias_of_no_epochs_stays():
    params = {'whitening': {'bias': np.ones(3, np.float32)}, 'norm': {'bias': np.ones(3, np.float32)}}
    config = make_config(**{'optimizer.name': 'muon', 'optimizer.whitening_bias_epochs': 0.0})
    trained = train(config, params, [gradients(params, 0)])
    np.testing.assert_array_equal(trained['whitening']['bias'], params['whitening']['bias'])
    assert not np.allclose(trained['norm']['bias'], params['norm']['bias'])
