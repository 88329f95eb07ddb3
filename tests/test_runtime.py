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

runtime.spread_convolutions()
runtime.spread_convolutions()
num_devices = int(sys.argv[1])
runtime.keep_freed_memory(num_devices)
convolve = jax.jit(lambda x, kernel: jax.lax.conv(x, kernel, (1, 1), 'SAME'))
x, kernel = jnp.ones((64, 64, 32, 32)), jnp.ones((64, 64, 3, 3))
print('ynn' in convolve.lower(x, kernel).compile().as_text(), os.environ['XLA_FLAGS'])
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
def test_convolutions_use_all_cores_and_freed_memory_is_kept(num_devices):
    """In a process of its own: both have to come before JAX's first use of a device."""
    program, faults = first_lines(num_devices, XLA_FLAGS='--xla_cpu_enable_fast_math=false')
    option = f'{runtime.YNNPACK_FLAG}=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION'
    assert program == f'False --xla_cpu_enable_fast_math=false {option}'
    assert int(faults) < 100  # of the 16,384 pages of the result


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


def test_convolutions_stay_as_the_user_has_chosen(monkeypatch):
    chosen = f'{runtime.YNNPACK_FLAG}=LIBRARY_FUSION_TYPE_DOT'
    monkeypatch.setenv('XLA_FLAGS', chosen)
    runtime.spread_convolutions()
    assert os.environ['XLA_FLAGS'] == chosen


@pytest.mark.parametrize('version', [(0, 9, 2), (0, 13, 0)])
def test_convolutions_are_left_alone_where_the_option_is_not_known(version, monkeypatch):
    """XLA ends the process on an unknown one."""
    monkeypatch.setattr(jaxlib.version, '__version_info__', version)
    monkeypatch.delenv('XLA_FLAGS', raising=False)
    runtime.spread_convolutions()
    assert 'XLA_FLAGS' not in os.environ
