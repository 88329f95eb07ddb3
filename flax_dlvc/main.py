"""Trains one model: `python -m flax_dlvc.main --config FILE [--workdir DIR] [--profile] [--config.FIELD=VALUE ...]`."""

import contextlib
from pathlib import Path

from absl import flags

from configs import default
from flax_dlvc.config import flatten, parse_command_line
from flax_dlvc.errors import run_command
from flax_dlvc.profiling import profiled, timed


def define_flags(flag_values: flags.FlagValues) -> None:
    """Defines the flags beside --config."""
    flags.DEFINE_string(
        'workdir', None, "The run directory; runs/<config file's stem> by default.", flag_values=flag_values
    )
    flags.DEFINE_bool(
        'profile',
        False,
        'Say where the time went, and trace a few steps into WORKDIR/profile.',
        flag_values=flag_values,
    )


def main(argv: list[str]) -> None:
    """Parses the command line and runs."""
    if {'-h', '--help'} & set(argv):
        print(f'{__doc__}\n\nFields and their defaults; configs/default.py says what each is:\n')
        for field, value in flatten(default.get_config()).items():
            print(f'  --config.{field}={value}')
        return
    flag_values = parse_command_line(argv, define_flags)
    config = flag_values.config
    workdir = Path(flag_values.workdir or f'runs/{config.name}')

    with profiled(workdir) if flag_values.profile else contextlib.nullcontext():
        with timed('start'):
            from flax_dlvc import loop  # after the command line is known to be right: JAX takes a second to import
        loop.run(config, workdir)


if __name__ == '__main__':
    run_command(main)
