"""What is told to XLA and glibc holds where it is meant to, and leaves alone what the user or the version rules out."""

import os
import platform
import subprocess
import sys

import jaxlib.version
import pytest

from flax_dlvc import runtime

CONVOLUTION = """
import os
import resource
import sys

import jax
import jax.numpy as jnp

from flax_dlvc import runtime

runtime.set_cpu_options()
runtime.set_cpu_options()
num_devices = int(sys.argv[1])
runtime.keep_freed_memory(num_devices)
convolve = jax.jit(lambda x, kernel: jax.lax.conv(x, kernel, (1, 1), 'SAME'))
x, kernel = jnp.ones((64, 64, 32, 32)), jnp.ones((64, 64, 3, 3))
print('ynn' in convolve.lower(x, kernel).compile().as_text())
multiply = jax.jit(jnp.dot)
x = jnp.ones((512, 512))
print('ynn' in multiply.lower(x, x).compile().as_text())
print(os.environ['XLA_FLAGS'])
increment = jax.pmap(lambda x: x + 1, devices=jax.devices()[:num_devices])
x = jnp.ones((num_devices, 16, 1024, 1024))  # 64 MiB: glibc always maps more than 32 anew, unless told otherwise
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(increment(x))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


def first_lines(num_devices, **environment):
    process = subprocess.run(
        [sys.executable, '-c', CONVOLUTION, str(num_devices)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return process.stdout.splitlines()


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="mallopt is glibc's")
@pytest.mark.parametrize('num_devices', [1, 2])
def test_eigen_computes_and_freed_memory_is_kept(num_devices):
    """In a process of its own: both have to come before JAX's first use of a device."""
    convolution, product, flags, faults = first_lines(num_devices, XLA_FLAGS='--xla_cpu_enable_fast_math=false')
    assert (convolution, product) == ('False', 'False')
    assert flags == ' '.join(
        [
            '--xla_cpu_enable_fast_math=false',
            '--xla_cpu_experimental_ynn_fusion_type='
            '-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION,-LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT',
            '--xla_cpu_prefer_vector_width=512',
        ]
    )
    assert int(faults) < 100  # of the 16,384 pages of the result


PRODUCTS_UNDER_SIGNALS = """
import signal

import jax
import numpy as np

from flax_dlvc.setup import prepare_backend

prepare_backend(1)
matrix = jax.random.normal(jax.random.key(0), (512, 512))
multiply = jax.jit(jax.numpy.dot)
expected = np.asarray(multiply(matrix, matrix))
signals = []
signal.signal(signal.SIGALRM, lambda number, frame: signals.append(number))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
while len(signals) < 1000:
    np.testing.assert_array_equal(multiply(matrix, matrix), expected)
signal.setitimer(signal.ITIMER_REAL, 0)
"""


def test_signals_leave_the_heap_whole():
    """In a process of its own, which without a stack for signals glibc ends after a few of them."""
    process = subprocess.run(
        [sys.executable, '-c', PRODUCTS_UNDER_SIGNALS], capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stderr) == (0, '')


@pytest.mark.parametrize(('environment', 'kept'), [({}, 1), ({'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '9'}, 0)])
def test_every_compiled_program_is_kept_unless_the_user_has_chosen(tmp_path, monkeypatch, environment, kept):
    """In a process of its own, as this one has a directory."""
    monkeypatch.delenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', raising=False)
    script = f"""
import pathlib, jax
from flax_dlvc import runtime
runtime.keep_compiled_programs(pathlib.Path({str(tmp_path)!r}))
jax.jit(lambda x: 2 * x)(1.0)
"""
    subprocess.run([sys.executable, '-c', script], env=os.environ | environment, check=True)
    assert len([*tmp_path.glob('jit__lambda*-cache')]) == kept


@pytest.mark.parametrize('name', runtime.CPU_OPTIONS)
def test_an_option_stays_as_the_user_has_chosen(name, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', f'{name}=chosen')
    runtime.set_cpu_options()
    flags = os.environ['XLA_FLAGS'].split()
    assert flags[0] == f'{name}=chosen'
    assert {flag.split('=')[0] for flag in flags[1:]} == set(runtime.CPU_OPTIONS) - {name}


def test_a_file_of_flags_stands_alone(monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '/a/file')
    runtime.set_cpu_options()
    assert os.environ['XLA_FLAGS'] == '/a/file'


@pytest.mark.parametrize('version', [(0, 9, 2), (0, 13, 0)])
def test_no_option_is_set_where_it_may_not_be_known(version, monkeypatch):
    """XLA ends the process on an unknown one."""
    monkeypatch.setattr(jaxlib.version, '__version_info__', version)
    monkeypatch.delenv('XLA_FLAGS', raising=False)
    runtime.set_cpu_options()
    assert 'XLA_FLAGS' not in os.environ
