"""What a config and a dataset become: models that fit the images; one compilation for all seeds and learning rates."""

import functools
import logging
import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest

from configs import default
from flax_dlvc import data, steps
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


CONVOLUTION = """
import os
import resource

import jax
import jax.numpy as jnp

from flax_dlvc import steps

steps.spread_convolutions()
steps.spread_convolutions()
steps.keep_freed_memory()
convolve = jax.jit(lambda x, kernel: jax.lax.conv(x, kernel, (1, 1), 'SAME'))
x, kernel = jnp.ones((64, 64, 32, 32)), jnp.ones((64, 64, 3, 3))
print('ynn' in convolve.lower(x, kernel).compile().as_text(), os.environ['XLA_FLAGS'])
increment = jax.jit(lambda x: x + 1)
x = jnp.ones((16, 1024, 1024))  # 64 MiB: glibc always maps more than 32 anew, unless told otherwise
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(increment(x))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


def first_lines(**environment):
    process = subprocess.run(
        [sys.executable, '-c', CONVOLUTION],
        env=os.environ | {'JAX_PLATFORMS': 'cpu'} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return process.stdout.splitlines()


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="mallopt is glibc's")
def test_convolutions_use_all_cores_and_freed_memory_is_kept():
    """In a process of its own: both have to come before JAX's first use of a device."""
    program, faults = first_lines(XLA_FLAGS='--xla_cpu_enable_fast_math=false')
    option = f'{steps.YNNPACK_FLAG}=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION'
    assert program == f'False --xla_cpu_enable_fast_math=false {option}'
    assert int(faults) < 100  # of the 16,384 pages of the result


def test_convolutions_stay_as_the_user_has_chosen(monkeypatch):
    chosen = f'{steps.YNNPACK_FLAG}=LIBRARY_FUSION_TYPE_DOT'
    monkeypatch.setenv('XLA_FLAGS', chosen)
    steps.spread_convolutions()
    assert os.environ['XLA_FLAGS'] == chosen


@pytest.mark.parametrize('version', [(0, 9, 2), (0, 13, 0)])
def test_convolutions_are_left_alone_where_the_option_is_not_known(version, monkeypatch):
    """XLA ends the process on an unknown one."""
    monkeypatch.setattr(jaxlib.version, '__version_info__', version)
    monkeypatch.delenv('XLA_FLAGS', raising=False)
    steps.spread_convolutions()
    assert 'XLA_FLAGS' not in os.environ
