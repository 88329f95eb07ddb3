"""What XLA, glibc and Python are told before a run starts, and glibc again while it lasts: speed, and a whole heap."""

import ctypes
import faulthandler
import os
import platform
import time
from pathlib import Path

import jax
import jaxlib.version

# glibc's malloc.h: no mapping of its own for a large buffer, never trim the heap, one heap for all threads.
M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX = -4, -1, -8
TRIM_INTERVAL = 10.0  # seconds; a run of shorter epochs would lose a tenth of its time by one after each

# XLA's options for a CPU; an unknown name or value ends the process, hence the versions.
CPU_OPTIONS = {
    # What YNNPACK computes, by default these two among others: it uses one core for a convolution, and for a matrix
    # product more time than Eigen.
    '--xla_cpu_experimental_ynn_fusion_type': (
        '-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION,-LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'
    ),
    '--xla_cpu_prefer_vector_width': '512',  # bits, where the CPU has such vectors; XLA's default is half of it
}
CPU_OPTIONS_VERSIONS = ((0, 10), (0, 13))  # of jaxlib, from the first to below the second


def keep_compiled_programs(directory: Path) -> None:
    """Turns on JAX's persistent compilation cache, for every program; each setting unless the user has chosen it.

    JAX itself keeps only what took a second to compile. A run has a dozen programs that take less, together three
    seconds on two cores; on disk they are a third of a megabyte.
    """
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update('jax_compilation_cache_dir', str(directory))
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def set_cpu_options() -> None:
    """Has Eigen compute convolutions and matrix products on a CPU, and everything else use its widest vectors.

    On two cores a convolution takes half the time, and the gradient for its kernel may be one too
    (`models.convolution`): a CNN's training step 1.8x as fast, a ResNet18's 1.1x. Products and vectors: a training step
    1.04x (CNN), 1.10x (ResNet18) and 1.13x (ViT), an evaluation step 1.14x, 1.10x and 1.08x on an Intel Xeon with
    AVX-512. Has no effect once a backend is in use, nor where the user has chosen; other backends do not read the
    options.
    """
    first, last = CPU_OPTIONS_VERSIONS
    if not first <= jaxlib.version.__version_info__[:2] < last:
        return
    flags = os.environ.get('XLA_FLAGS', '')
    if flags and not flags.lstrip().startswith('-'):  # the name of a file with flags, which stands alone
        return
    ours = [f'{name}={value}' for name, value in CPU_OPTIONS.items() if name not in flags]
    os.environ['XLA_FLAGS'] = ' '.join(filter(None, [flags, *ours]))


def give_signals_a_stack() -> None:
    """Has Python's signal handlers run on a stack of their own, in the thread that calls this.

    oneDNN's float32 matrix products, which Eigen uses on a CPU, have the stack's register point into the heap (oneDNN's
    issue 4845; jaxlib 0.11.2 has it mended). What the kernel puts on the stack for a signal then overwrites arrays and
    malloc's own records: of a CNN's runs that were to save and stop a third crashed instead (LOG.md). Python's handlers
    run on another stack where a thread has one, and faulthandler makes one. The thread has to be the main one, to which
    the kernel gives a process's signals first.
    """
    if not faulthandler.is_enabled():
        faulthandler.enable(2, all_threads=False)  # standard error's number: what Python has in its place may have none


def keep_freed_memory(num_devices: int) -> None:
    """Tells glibc to keep what XLA frees on a CPU, until `FreedMemory` gives it back.

    XLA allocates a step's temporaries anew each time. Returned to the kernel, every page of them faults again: half of
    a ViT's step, a quarter of a ResNet18's, a third of a CNN's (LOG.md). glibc maps what is large anew for every thread
    but the main one, whatever it is told; so steps run in the thread that calls them. Several CPU devices have threads
    of their own, hence one heap for all, at which the threads wait for each other: without it a ResNet18's step takes
    a seventh longer there; on one device, with it, a sixth longer, and compiling a quarter.

    To be called before JAX starts its backend. `num_devices` are those of the run; all for 0.
    """
    if platform.libc_ver()[0] != 'glibc':
        return
    libc = ctypes.CDLL(None)
    if num_devices != 1 and jax.config.jax_num_cpu_devices > 1:  # type: ignore[attr-defined]
        libc.mallopt(M_ARENA_MAX, 1)
    jax.config.update('jax_cpu_enable_async_dispatch', False)
    if jax.default_backend() == 'cpu':
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


class FreedMemory:
    """Gives what lies free of the kept memory back to the kernel now and then, so that fragments do not add up.

    It costs as much time as the memory that the next steps touch for the first time: a step at most.
    """

    def __init__(self) -> None:
        self._trim = ctypes.CDLL(None).malloc_trim if platform.libc_ver()[0] == 'glibc' else None
        self._time = time.monotonic()

    def give_back(self) -> None:
        """Gives it back, `TRIM_INTERVAL` after the last time at the earliest."""
        if self._trim is None or time.monotonic() - self._time < TRIM_INTERVAL:
            return
        self._trim(0)
        self._time = time.monotonic()
