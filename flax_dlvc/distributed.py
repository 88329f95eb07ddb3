"""Several processes as one run: who writes, who is gone, and on which step all of them act together.

JAX's distributed runtime connects the processes. The environment says who they are: COORDINATOR_ADDRESS (HOST:PORT, on
process 0's host), NUM_PROCESSES and PROCESS_ID, and, where processes share a host's accelerators, LOCAL_DEVICE_IDS.
`launch.sh` sets them for SLURM, Open MPI and `--processes N`. Without NUM_PROCESSES there is one process.
"""

import contextlib
import itertools
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from flax_dlvc.errors import (
    ConfigError,
    PeerError,
    StoppedError,
    ending,
    first_line,
    is_out_of_memory,
    stop_signals_set,
)

SIGN_OF_LIFE = 1.0  # seconds between a process's signs of life
LOST_AFTER = 20.0  # seconds without one after which a process counts as gone
JOIN_TIMEOUT = 300  # seconds that a process waits for the others at the start
GRACE = 5.0  # seconds in which a process may find the failure of another one for itself
LOOPBACK = re.compile(r'(localhost|127\.[\d.]+|\[::1\]):\d+')  # an address that no other host can reach
AGAIN = 'start the run again to go on from its last checkpoint'


def num_processes() -> int:
    """Processes of the run."""
    return _integer('NUM_PROCESSES', 1)


def process_id() -> int:
    """This process's number, from 0."""
    return _integer('PROCESS_ID', 0)


def is_main() -> bool:
    """Whether this is process 0, which alone writes text files and to the terminal."""
    return process_id() == 0


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f'{name} must be a whole number, not {text!r}')
    return int(text)


@contextmanager
def joined() -> Iterator[None]:
    """Within, all processes are one run: it ends for all of them or for none.

    A process that fails takes the others down with its message and exit code; one that vanishes does so within
    `LOST_AFTER` seconds, and `PeerError`'s exit code says it. Must be entered before JAX looks for devices.

    Raises:
        ConfigError: the environment is incomplete or contradicts itself.
        PeerError: the others did not come, or another process is gone.
    """
    if process_id() >= num_processes():  # without NUM_PROCESSES, too: as another than process 0 it would write nothing
        raise ConfigError(f'PROCESS_ID is {process_id()}, but NUM_PROCESSES is {num_processes()}')
    if num_processes() == 1:
        yield
        return
    _join()
    if not is_main():
        sys.stdout = Path(os.devnull).open('w')  # noqa: SIM115, for the rest of the process
    watch = _Watch()
    try:
        yield
        barrier('end')
    except StoppedError:  # all processes stop together
        barrier('end')
        _leave(watch)
        raise
    except (Exception, KeyboardInterrupt) as error:
        watch.fail(error)
    _leave(watch)


def barrier(name: str) -> None:
    """Returns when all processes have come here; they come to each name equally often."""
    if num_processes() > 1:
        _client().wait_at_barrier(name, 24 * 3600 * 1000)  # the watch ends the process when one does not come


class Agreement:
    """Makes all processes act on the same call of this on what one of them wants.

    All processes make their agreements in the same order, by which they are told apart. A process must have waited for
    the result of step n before its call for step n + 2, as in `loop.train` and `evaluate`. Then none is two calls ahead
    of process 0, and what that announces for its call after next is in time.
    """

    _numbers = itertools.count()

    def __init__(self) -> None:
        self._name = f'agreement/{next(self._numbers)}'
        self._calls = 0

    def __call__(self, wanted: int) -> int:
        """Returns what a process wants, other than 0, on the same call in all processes; 0 on all others."""
        if num_processes() == 1:
            return wanted
        client, request, announcement = _client(), f'{self._name}/wanted', f'{self._name}/announced'
        self._calls += 1
        if wanted:
            client.key_value_set(request, str(int(wanted)), allow_overwrite=True)  # True is '1'
        said = dict(client.key_value_dir_get(self._name))
        if is_main() and request in said and announcement not in said:
            said[announcement] = f'{self._calls + 2} {said[request]}'
            client.key_value_set(announcement, said[announcement])
        call, value = said.get(announcement, '0 0').split()
        return int(value) if self._calls >= int(call) else 0


def _join() -> None:
    address = os.environ.get('COORDINATOR_ADDRESS', '')
    if not re.fullmatch(r'.+:\d+', address):
        raise ConfigError(f'COORDINATOR_ADDRESS must be HOST:PORT of process 0, not {address!r}')
    ids = os.environ.get('LOCAL_DEVICE_IDS', '')
    if not re.fullmatch(r'(\d+(,\d+)*)?', ids):
        raise ConfigError(f'LOCAL_DEVICE_IDS must be numbers with commas between them, not {ids!r}')

    import jax

    jax.config.update('jax_enable_preemption_service', False)  # its signal handler would take the place of ours
    missed = f'the {num_processes()} processes did not meet at {address} in {JOIN_TIMEOUT} seconds'
    timer = threading.Timer(JOIN_TIMEOUT, _end, (PeerError.exit_code, missed))  # JAX would abort with a stack trace
    timer.daemon = True
    timer.start()
    try:
        # JAX waits where Python's handlers do not run; nothing is there yet that would have to be saved.
        with stop_signals_set(signal.SIG_DFL):
            jax.distributed.initialize(
                address,
                num_processes(),
                process_id(),
                [int(number) for number in ids.split(',') if number] or None,
                cluster_detection_method='deactivate',
                initialization_timeout=2 * JOIN_TIMEOUT,
                heartbeat_timeout_seconds=10 * int(LOST_AFTER),  # ours is sooner, and says it in one line
                coordinator_bind_address=address if LOOPBACK.fullmatch(address) else None,  # else on all interfaces
            )
    except Exception as error:
        raise PeerError(f'cannot join the run at {address}: {first_line(error)}') from error
    finally:
        timer.cancel()


def _leave(watch: '_Watch') -> None:
    import jax

    watch.stop()
    jax.distributed.shutdown()


def _client() -> Any:
    """The coordination service's client; JAX has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client


class _Watch:
    """A thread that gives signs of life and looks for those of the others."""

    def __init__(self) -> None:
        self._name = f'process {process_id()} of {num_processes()} on {socket.gethostname()}'
        self._stopped = threading.Event()
        self._seen: dict[str, tuple[str, float]] = {}  # name: its last sign, and when it came
        _client().key_value_set(f'names/{process_id()}', self._name)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch; the run has ended."""
        self._stopped.set()
        self._thread.join()

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process with its error, and the others with its message."""
        if _is_of_the_runtime(error) and not is_out_of_memory(error):
            self._stopped.wait(2 * LOST_AFTER)  # a collective may have failed since another is gone: `_run` will say so
        end = ending(error)
        if end is None:
            traceback.print_exception(error)
        exit_code, message = end or (1, f'{type(error).__name__}, see its traceback')
        with contextlib.suppress(Exception):
            _client().key_value_set(f'failed/{process_id()}', f'{exit_code} {self._name}: {message}')
            time.sleep(2 * GRACE if is_main() else 0)  # its service must live until the others have read this and ended
        _end(exit_code, message)

    def _run(self) -> None:
        signs, failures = 0, 0
        while not self._stopped.wait(SIGN_OF_LIFE):
            signs += 1
            try:
                client = _client()
                client.key_value_set(f'alive/{process_id()}', str(signs), allow_overwrite=True)
                failed = client.key_value_dir_get('failed')
                alive = dict(client.key_value_dir_get('alive'))
                failures = 0
            except Exception:  # process 0 holds the service
                failures += 1
                if failures > 2 and not self._stopped.is_set():
                    _end(PeerError.exit_code, f'process 0 is gone; {AGAIN}')
                continue
            for _, failure in failed:
                code, message = failure.split(' ', 1)
                if not message.startswith(self._name) and not self._stopped.wait(GRACE):
                    _end(int(code), message)
            now = time.monotonic()
            for number in map(str, range(num_processes())):
                sign = alive.get(f'alive/{number}', '')
                last, since = self._seen.get(number, ('', now))
                self._seen[number] = (sign, now if sign != last else since)
                if now - self._seen[number][1] > LOST_AFTER and not self._stopped.is_set():
                    names = dict(client.key_value_dir_get('names'))
                    _end(PeerError.exit_code, f'{names.get(f"names/{number}", f"process {number}")} is gone; {AGAIN}')


def _is_of_the_runtime(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes from, is XLA's, as those of collectives are."""
    import jax

    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) or 'Gloo' in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _end(exit_code: int, reason: str) -> NoReturn:
    """Ends the process at once: its main thread may wait for a process that is no more."""
    print(f'error: {reason}', file=sys.stderr, flush=True)
    os._exit(exit_code)
