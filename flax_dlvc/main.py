"""Trains one model: `python -m flax_dlvc.main --config FILE [--workdir DIR] [--profile] [--config.FIELD=VALUE ...]`."""

import argparse
import contextlib
from pathlib import Path

from flax_dlvc.config import defaults, flatten, parse_command_line
from flax_dlvc.errors import ArgumentParser, named_path, run_command
from flax_dlvc.profiling import profiled, timed


def make_parser() -> ArgumentParser:
    """The arguments beside --config."""
    fields = ''.join(f'  --config.{field}={value}\n' for field, value in flatten(defaults()).items())
    parser = ArgumentParser(
        'python -m flax_dlvc.main',
        description='Trains one model, and tests its best checkpoint.',
        epilog=f'Fields and their defaults; configs/default.py says what each is:\n\n{fields}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--workdir', type=named_path, help="the run directory; runs/ and the config file's stem by default"
    )
    parser.add_argument(
        '--profile', action='store_true', help='say where the time went, and trace a few steps into WORKDIR/profile'
    )
    return parser


def main(argv: list[str]) -> None:
    """Parses the command line and runs."""
    arguments, config = parse_command_line(make_parser(), argv)
    workdir = arguments.workdir or Path('runs', config.name)
    with profiled(workdir) if arguments.profile else contextlib.nullcontext():
        with timed('start'):
            from flax_dlvc import loop  # after the command line is known to be right: JAX takes a second to import
        loop.run(config, workdir)


if __name__ == '__main__':
    run_command(main)
