"""The errors that end a command in one line, and their exit codes."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


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
    """Runs a command's `main` on the process's arguments and exits; a `CommandError` becomes one line on stderr."""
    try:
        main(sys.argv)
    except CommandError as error:
        print(f'{error.label}{" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        sys.stderr.close()
        sys.exit(141)
    sys.exit(0)
