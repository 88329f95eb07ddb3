"""How a command begins and ends: its signals, and the errors that end it in one line, with their exit codes."""

import argparse
import atexit
import errno
import gc
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal is closed
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE)
# New objects after which Python looks for cycles. At its 700 to 2,000 it searches what imports and tracing leave behind
# over and over: a tenth of a short run.
GARBAGE_THRESHOLD = 20_000


class CommandError(Exception):
    """A command cannot go on; the message is one line that says what is wrong and what to do."""

    exit_code = 1


class ConfigError(CommandError):
    """Something a user handed over is wrong: a flag, a field, a file, a directory."""

    exit_code = 2


class DivergedError(CommandError):
    """The loss is no longer finite."""

    exit_code = 3


class StorageError(CommandError):
    """The run directory cannot be written any more: a full disk, a quota, a file system gone read-only."""

    exit_code = 4


class PeerError(CommandError):
    """Another process of the run is gone, or did not come."""

    exit_code = 5


class StoppedError(CommandError):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number  # the shell's convention


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but flags are not abbreviated, and its complaints are a `ConfigError` of one line."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **(options | {'allow_abbrev': False}))

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage as well."""
        raise ConfigError(f'{message}; see --help')


def named_path(name: str | Path) -> Path:
    """A path that has a name; an argparse type.

    Raises:
        ConfigError: the name is empty, which as a path is the current directory.
    """
    if not name:
        raise ConfigError('a file or directory has an empty name; is a shell variable not set?')
    return Path(name)


def existing_directory(name: str | Path) -> Path:
    """The path of a directory that has to be there; an argparse type.

    Raises:
        ConfigError: it is not a directory, or cannot be looked at.
    """
    path = named_path(name)
    try:
        if path.is_dir():
            return path
    except OSError as error:  # a name that is too long, a directory above that is closed to us
        raise ConfigError(f'cannot read {path}: {error.strerror}') from error
    raise ConfigError(f'{path} is not a directory')


def unwritable(path: Path, error: OSError, advice: str) -> CommandError:
    """The error of a place that a user has named and that cannot be written; of the disk, where that is to blame."""
    kind = StorageError if error.errno in _DISK_ERRORS else ConfigError
    return kind(f'cannot write {path}: {error.strerror}; {advice}')


def run_command(main: Callable[[list[str]], None]) -> NoReturn:
    """Runs a command's `main` on the process's arguments and exits; a `CommandError` becomes one line on stderr.

    Stop signals become a `KeyboardInterrupt` with the signal's number, where `main` does not handle them itself,
    and then one line too, and within an import that line and the end; a second signal ends the process at once.
    """
    os.environ['MPLBACKEND'] = 'agg'  # a notebook's, which its commands inherit, is none that matplotlib knows here
    gc.set_threshold(GARBAGE_THRESHOLD)
    atexit.register(gc.freeze)  # else Python searches all that is left for garbage, half a second, and then ends anyway
    _make_output_take_everything()
    set_stop_signals(_interrupt)
    try:
        main(sys.argv)
        sys.stdout.flush()
        set_stop_signals(signal.SIG_DFL)
        sys.exit(0)
    except (CommandError, KeyboardInterrupt, OSError, RuntimeError) as error:
        end = ending(error)
        if end is None:
            raise
        exit_code, message = end
        if isinstance(error, OSError):
            _give_up(sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            label = 'error: ' if not isinstance(error, KeyboardInterrupt | StoppedError) else ''
            _complain(f'{label}{message}')
        sys.exit(exit_code)


def ending(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the line with which an error ends a command; None of one that nobody has foreseen."""
    if isinstance(error, CommandError):
        return error.exit_code, ' '.join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return _stopped(*error.args or (signal.SIGINT,))
    if isinstance(error, BrokenPipeError):  # as with `| head`
        return 128 + signal.SIGPIPE, 'the reader of the output has left'
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        problem = f'cannot write {error.filename or "output"}: {error.strerror}'
        return StorageError.exit_code, f'{problem}; free space and start again'
    if is_out_of_memory(error):
        return 1, (
            'the device is out of memory; set a larger --config.accumulate_steps or a smaller '
            '--config.evaluation_batch_size, or, in another --workdir, a smaller --config.batch_size'
        )
    return None


def _stopped(signal_number: int) -> tuple[int, str]:
    """The exit code, as the shell has it, and the line of a command that a signal stopped."""
    return 128 + signal_number, f'stopped by {signal.Signals(signal_number).name}'


def set_stop_signals(handler: Any) -> dict[signal.Signals, Any]:
    """Sets the handler of all `STOP_SIGNALS`, but where `nohup` has SIGHUP ignored; returns those before.

    Python gives signals to its main thread alone: in another one, of a program that runs this package, none is set.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, current in before.items():
        if (number, current) != (signal.SIGHUP, signal.SIG_IGN):
            signal.signal(number, handler)
    return before


@contextmanager
def stop_signals_set(handler: Any) -> Iterator[None]:
    """Within, as `set_stop_signals`; then they are as they were."""
    before = set_stop_signals(handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within, a stop signal does no more than add its number to the yielded list; a second one ends the process.

    One that is still in the list at the end is raised again, for whoever handles it there.
    """
    noted: list[int] = []

    def note(signal_number: int, frame: FrameType | None) -> None:
        del frame
        _let_signals_end_the_process(signal_number)
        noted.append(signal_number)

    try:
        with stop_signals_set(note):
            yield noted
    finally:
        for unnoticed in noted:
            signal.raise_signal(unnoticed)


def add_step_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--step`, which names one of a run's checkpoints."""
    parser.add_argument('--step', default='best', help="'best', 'latest' or a number of training steps")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is XLA's (which is not imported here) of a device that has no more memory."""
    return isinstance(error, RuntimeError) and 'RESOURCE_EXHAUSTED' in str(error)


def _interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
    _let_signals_end_the_process(signal_number)
    if _is_importing(frame):  # an error there might end the process by SIGABRT, in C++, or by SIGINT, out of an `exec`
        exit_code, message = _stopped(signal_number)
        sys.stdout.flush()
        _complain(message)
        os._exit(exit_code)
    raise KeyboardInterrupt(signal_number)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported where a frame is."""
    while frame and not frame.f_code.co_filename.startswith('<frozen importlib'):
        frame = frame.f_back
    return frame is not None


def _make_output_take_everything() -> None:
    """Escapes what the terminal's encoding cannot show; sends what goes to a closed stream nowhere."""
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is None:  # as with `>&-`
            setattr(sys, name, Path(os.devnull).open('w'))  # noqa: SIM115, for the rest of the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')


def _let_signals_end_the_process(first: int) -> None:
    """A second signal ends the process, but SIGHUP, which comes from shell and kernel when a terminal is closed."""
    set_stop_signals(signal.SIG_DFL)
    if first == signal.SIGHUP:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for descriptor in (1, 2):  # stdout and stderr
            try:
                os.write(descriptor, b'')
            except OSError:
                _give_up(descriptor)


def _complain(message: str) -> None:
    """Prints an error's line; from here on nothing is worth waiting for."""
    set_stop_signals(signal.SIG_DFL)
    print(message, file=sys.stderr)


def _give_up(descriptor: int) -> None:
    """Lets what cannot be printed vanish; Python would try, and complain, again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
