"""The errors that end a command in one line, and their exit codes."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE)


class CommandError(Exception):
    """A command cannot go on; the message is one line that says what is wrong and what to do."""

    exit_code = 1
    label = 'error: '


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

    label = ''

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number  # the shell's convention


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but its complaints are a `ConfigError` of one line."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage as well."""
        raise ConfigError(f'{message}; see --help')


def run_command(main: Callable[[list[str]], None]) -> NoReturn:
    """Runs a command's `main` on the process's arguments and exits; a `CommandError` becomes one line on stderr.

    SIGTERM and SIGINT become a `KeyboardInterrupt` with the signal's number, where `main` does not handle them itself,
    and then one line too; a second signal ends the process at once.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _interrupt)
    try:
        main(sys.argv)
        sys.stdout.flush()
        _let_signals_end_the_process()
        sys.exit(0)
    except CommandError as error:
        _complain(f'{error.label}{" ".join(str(error).split())}')
        sys.exit(error.exit_code)
    except KeyboardInterrupt as interrupt:
        stop = signal.Signals(*interrupt.args or (signal.SIGINT,))
        _complain(f'stopped by {stop.name}')
        sys.exit(128 + stop)
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        _give_up_output()
        sys.exit(141)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        _give_up_output()
        _complain(f'error: cannot write {error.filename or "output"}: {error.strerror}; free space and start again')
        sys.exit(StorageError.exit_code)


def _interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
    del frame
    _let_signals_end_the_process()
    raise KeyboardInterrupt(signal_number)


def _let_signals_end_the_process() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _complain(message: str) -> None:
    """Prints an error's line; from here on nothing is worth waiting for."""
    _let_signals_end_the_process()
    print(message, file=sys.stderr)


def _give_up_output() -> None:
    """Lets what could not be printed vanish; Python would try, and complain, again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
