"""Where the time of a run goes: `--profile` of the main job.

A phase is a name; `timed(phase)` around a block, or before a function, books its seconds there. Devices work while the
host goes on, so the seconds of a step are booked where the host waits for it.
"""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from flax_dlvc.distributed import is_main
from flax_dlvc.errors import ConfigError, first_line

PHASES = {
    'start': 'imports, devices, initial state',
    'data': 'loading, placing on devices',
    'compile': 'tracing and compiling',
    'input and host': 'order of examples, dispatch, checks',
    'training': 'steps',
    'evaluation': 'validation, final test',
    'saving': 'checkpoints, saved and restored',
    'logging': 'text files, curves, TensorBoard, terminal',
    'profiling': 'starting and writing the trace',
    'other': '',
}
COMPILE_EVENTS = '/jax/core/compile/'  # of jax.monitoring: tracing, lowering, and compiling or reading from the cache
CACHE_HIT_EVENT = '/jax/compilation_cache/cache_hits'
WITHOUT = 'run without --profile'
FIRST_TRACED_CALL = 2  # of the training step, from 0: the first one compiles, the second one touches memory
TRACED_STEPS = 5


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """Books the seconds within to a phase, less those of phases within; a microsecond where nothing is profiled."""
    profile = _active.get()
    if profile is None:
        yield
        return
    profile.enter(phase)
    try:
        yield
    finally:
        profile.leave()


@contextmanager
def training_call(num_steps: int) -> Iterator[None]:
    """Books a call of the training step; a profile traces a few of them, in the steady state."""
    profile = _active.get()
    annotation = contextlib.nullcontext() if profile is None else profile.trace_call(num_steps)
    with timed('training'), annotation:
        yield


@contextmanager
def profiled(workdir: Path) -> Iterator[None]:
    """Within, process 0 is profiled: at the end it prints where the time went, and `workdir/profile` holds a trace.

    Raises:
        ConfigError: nothing can be traced, or not written there.
    """
    if not is_main():
        yield
        return
    profile = Profile(workdir / 'profile')
    token = _active.set(profile)
    with timed('start'):
        import jax.monitoring
    jax.monitoring.register_event_duration_secs_listener(profile.on_duration)
    jax.monitoring.register_event_listener(profile.on_event)
    try:
        yield
        profile.stop_trace()
        if profile.is_empty:
            print(f'nothing is left to profile: {workdir} holds a finished run')
    finally:
        jax.monitoring.unregister_event_duration_listener(profile.on_duration)
        jax.monitoring.unregister_event_listener(profile.on_event)
        _active.reset(token)
        with contextlib.suppress(ConfigError):  # nothing of it where all went well
            profile.stop_trace()
        if not profile.is_empty:
            print(profile.summary())


class Profile:
    """Seconds by phase, and the trace."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._thread = threading.get_ident()
        self._phases = ['other']  # the innermost one last
        self._since = time.perf_counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._compilations: list[tuple[float, float]] = []  # when each began, and its seconds
        self.num_programs = self.num_cached = 0
        self._num_calls = 0
        self._traced_steps: list[int] = []  # of each call in the trace
        self._is_tracing = False

    def enter(self, phase: str) -> None:
        """From now on seconds are this phase's."""
        self._book()
        self._phases.append(phase)

    def leave(self) -> None:
        """From now on seconds are again those of the phase around."""
        self._book()
        self._phases.pop()

    def _book(self) -> None:
        now = time.perf_counter()
        self.seconds[self._phases[-1]] += now - self._since
        self._since = now

    def on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        """Books what JAX has just spent on compiling, taken from the phase in which it did; counts all programs."""
        if not event.startswith(COMPILE_EVENTS):
            return
        self.num_programs += event.endswith('backend_compile_duration')
        if threading.get_ident() != self._thread:
            return
        self._book()
        began = self._since - duration_secs
        nested = 0.0  # a function is traced while another one is
        while self._compilations and self._compilations[-1][0] >= began:
            nested += self._compilations.pop()[1]
        self._compilations.append((began, duration_secs))
        self.seconds[self._phases[-1]] -= duration_secs - nested
        self.seconds['compile'] += duration_secs - nested

    def on_event(self, event: str, **_: Any) -> None:
        """Counts programs that were not compiled but read."""
        self.num_cached += event == CACHE_HIT_EVENT

    @property
    def is_empty(self) -> bool:
        """Whether nothing was trained or evaluated."""
        return not self._num_calls and not self.seconds['evaluation']

    def trace_call(self, num_steps: int) -> contextlib.AbstractContextManager[Any]:
        """Starts or ends the trace where that is due; marks the call that begins now in it."""
        import jax

        number, self._num_calls = self._num_calls, self._num_calls + 1
        if number == 0:
            self._check_directory()
        if number == FIRST_TRACED_CALL:
            self._start_trace()
        elif sum(self._traced_steps[:-1]) >= TRACED_STEPS:  # the last call may still run, those before it are complete
            self.stop_trace()
        if not self._is_tracing:
            return contextlib.nullcontext()
        self._traced_steps.append(num_steps)
        return jax.profiler.StepTraceAnnotation('train', step_num=number)

    def _check_directory(self) -> None:
        try:
            self._directory.mkdir(exist_ok=True)
            if not os.access(self._directory, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise ConfigError(f'cannot write {self._directory}: {error.strerror}; {WITHOUT}') from error

    @timed('profiling')
    def _start_trace(self) -> None:
        import jax

        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every function call of Python's would be most of the file
        try:
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True, profiler_options=options)
        except Exception as error:  # whatever a profiler that is busy or not there raises
            raise ConfigError(f'cannot trace: {first_line(error)}; {WITHOUT}') from error
        self._is_tracing = True

    @timed('profiling')
    def stop_trace(self) -> None:
        """Writes the trace where one is under way.

        Raises:
            ConfigError: it cannot be written.
        """
        import jax

        if not self._is_tracing:
            return
        self._is_tracing = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # of the profiler, or of a disk
            raise ConfigError(f'cannot write a trace to {self._directory}: {first_line(error)}; {WITHOUT}') from error

    def summary(self) -> str:
        """Seconds and share of the wall time by phase, and where the trace is."""
        self._book()
        wall = sum(self.seconds.values())
        lines = [f'where {wall:.1f} s went:']
        for phase, meaning in PHASES.items():
            if phase == 'compile':
                meaning += f' {self.num_programs} programs, {self.num_cached} of them from the cache'
            lines.append(f'  {phase:<15}{self.seconds[phase]:>9.1f} s {self.seconds[phase] / wall:>6.1%}  {meaning}')
        lines.append('Devices work while the host goes on: the seconds of a step are where the host waits for it.')
        if self._traced_steps:
            lines.append(
                f'trace of {sum(self._traced_steps)} steps: {self._directory}, for TensorBoard (tensorboard-plugin-'
                'profile) and, its perfetto_trace.json.gz, for ui.perfetto.dev'
            )
        else:
            lines.append(
                f'no trace: only {self._num_calls} calls of the training step, and the third is the first one traced'
            )
        return '\n'.join(lines)


_active: ContextVar[Profile | None] = ContextVar('profile', default=None)
