"""The report's table and figures, with error bars: models by regularisations by seeds.

`python -m flax_dlvc.study --workdir DIR [--models …] [--regularizations …] [--seeds N] [--vary FIELD=V1,V2 …]
[--config.FIELD=VALUE …]` carries out what is not yet finished below DIR, then writes tables, figures, answers and
report.html. A run is an ordinary run directory, DIR/CELL/seed_N.
"""

import contextlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from flax_dlvc import data, distributed, results, rundir, tables
from flax_dlvc.board import Board
from flax_dlvc.config import differing_fields
from flax_dlvc.errors import (
    ArgumentParser,
    CommandError,
    ConfigError,
    StoppedError,
    StorageError,
    existing_directory,
    first_line,
    named_path,
    noted_signals,
    run_command,
)
from flax_dlvc.grid import Planned, plan
from flax_dlvc.results import MODELS, REGULARIZATIONS
from flax_dlvc.words import describe_time, plural

if TYPE_CHECKING:
    from flax_dlvc.setup import Setup

TIMED_STEPS = 3  # of a dry run, after the first one
GPU_MEMORY = 0.9  # the share of it that runs on one GPU take together: each also needs some beside JAX's

# Carrying it out


def carry_out(grid: list[Planned], parallel_runs: int) -> None:
    """Carries out what is not finished. A run that fails is noted in its directory, and the others go on.

    Raises:
        ConfigError: a directory holds another run than the grid's, or the devices do not suffice; nothing is started.
        StoppedError: a signal within a run, which is saved; between two, `run_command` sees to it.
    """
    board = Board(grid, parallel_runs)
    finished = [planned for planned in grid if rundir.check(planned.directory, planned.config) is not None]
    for planned in finished:  # after all were looked at
        rundir.adopt(planned.directory, planned.config)  # or it would not be of its row, if it stopped early
        planned.state = 'finished'
    for planned in grid:
        board.follow(planned)
    waiting = [planned for planned in grid if planned.state != 'finished']
    if len(waiting) == len(grid):  # nothing has begun: a dataset that cannot be had is no single run's failure
        data.load(waiting[0].config)
    slots = _slots(parallel_runs) if parallel_runs > 1 else []
    with board:
        if slots:
            _in_processes(waiting, board, slots)
        else:
            _in_turn(waiting, board)


def _in_turn(waiting: Sequence[Planned], board: Board) -> None:
    """One run after the other in this process; runs that differ in their seeds alone share compiled programs."""
    from flax_dlvc import loop

    setup: Setup | None = None
    for planned in waiting:
        board.start(planned)
        try:
            setup = share(setup, planned.config)
            loop.carry_out(setup, planned.directory, board.display(planned))
            _ended(planned, board, '')
        except (StoppedError, StorageError):
            raise
        except CommandError as error:
            _ended(planned, board, str(error), error.exit_code)
        except Exception as error:  # whatever a device makes of a model that is too large for it
            _ended(planned, board, f'{type(error).__name__}: {first_line(error)}')


def share(setup: 'Setup | None', config: ConfigDict) -> 'Setup':
    """The setup of a config, made of the last one where the two differ in seed and learning rate at most."""
    from flax_dlvc.setup import set_up

    if setup is not None and set(differing_fields(config, setup.config)) <= {'seed', 'learning_rate'}:
        return setup.variant(seed=config.seed, learning_rate=config.learning_rate)
    return set_up(config)


def _slots(parallel_runs: int) -> list[dict[str, str]]:
    """The environments of runs side by side. A process asks for the devices, so that this one leaves them to the runs.

    Raises:
        ConfigError: there are fewer devices, and they cannot be shared.
    """
    program = 'import jax; print(jax.default_backend(), jax.local_device_count())'
    asked = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise ConfigError(f'JAX finds no devices: {_why(asked.returncode, asked.stderr)}')
    backend, count = asked.stdout.split()[-2:]
    if backend not in ('cpu', 'gpu') and parallel_runs > int(count):
        raise ConfigError(f'--parallel-runs is {parallel_runs}, but there are {count} devices')
    return [placement(slot, parallel_runs, int(count)) for slot in range(parallel_runs)]


def placement(slot: int, parallel_runs: int, num_devices: int) -> dict[str, str]:
    """The environment in which a run of `parallel_runs`, one for each slot, sees one device.

    Where there are more runs than devices, they share a GPU and, unless the environment says how, its memory evenly.
    """
    own = {'JAX_NUM_CPU_DEVICES': '1'}
    for name in ('JAX_CUDA_VISIBLE_DEVICES', 'JAX_ROCM_VISIBLE_DEVICES'):
        chosen = os.environ.get(name, 'all')
        devices = list(map(str, range(num_devices))) if chosen == 'all' else chosen.split(',')
        own[name] = devices[slot % len(devices)]
    if parallel_runs > num_devices and not any(name.endswith('CLIENT_MEM_FRACTION') for name in os.environ):
        own['XLA_CLIENT_MEM_FRACTION'] = f'{GPU_MEMORY / -(-parallel_runs // num_devices):.3f}'
    return own


def _in_processes(waiting: Sequence[Planned], board: Board, slots: Sequence[dict[str, str]]) -> None:
    """As many at once as there are slots: a process of `flax_dlvc.main` each, in the slot's environment.

    The first seeds of all cells go first: side by side, two seeds of a cell would compile the same programs, and later
    ones find them.
    """
    queue = sorted(waiting, key=lambda planned: planned.config.seed)
    active: dict[int, tuple[Planned, subprocess.Popen[bytes]]] = {}
    with tempfile.TemporaryDirectory() as complaints, noted_signals() as noted:
        try:
            while (queue or active) and not noted:
                for slot, own in enumerate(slots):
                    if slot not in active and queue and not noted:
                        planned = queue.pop(0)
                        board.start(planned)
                        active[slot] = planned, _start(planned, own, Path(complaints, str(slot)))
                time.sleep(0.2)
                for slot, (planned, process) in list(active.items()):
                    board.follow(planned)
                    if process.poll() is None:
                        continue
                    del active[slot]
                    failure = _why(process.returncode, Path(complaints, str(slot)).read_text(errors='replace'))
                    if process.returncode == StorageError.exit_code:
                        raise StorageError(failure)
                    _ended(planned, board, failure, process.returncode)
        finally:
            for _, process in active.values():
                process.terminate()
            for _, process in active.values():
                process.wait()


def _start(planned: Planned, own: dict[str, str], complaints: Path) -> 'subprocess.Popen[bytes]':
    """Starts a run with an environment of its own, in a directory that the board can follow from the first moment.

    Its stderr goes to a file, as a pipe may fill up. Ctrl-C in the terminal reaches the study alone, which passes on
    one signal: a second one would end the run unsaved.
    """
    rundir.create(planned.directory, planned.config)
    with complaints.open('w') as stderr:
        return subprocess.Popen(
            [sys.executable, *planned.command],
            env=os.environ | own | {'JAX_TRACEBACK_FILTERING': 'off'},  # else its last line is a note on tracebacks
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )


def _why(exit_code: int, complaints: str) -> str:
    """Why a process failed, by the last line on its stderr; '' where it did not."""
    if exit_code < 0:
        return f'ended by a signal: {signal.strsignal(-exit_code)}'
    last_line = (complaints.strip().splitlines() or [f'exit code {exit_code}'])[-1]
    return last_line.removeprefix('error: ') if exit_code else ''


def _ended(planned: Planned, board: Board, failure: str, exit_code: int = 1) -> None:
    if failure and rundir.is_locked(planned.directory):
        planned.state = 'elsewhere'  # and its files are another process's
    else:
        planned.state = 'failed' if failure else 'finished'
        if failure:
            rundir.create(planned.directory, planned.config)
            rundir.write_failure(planned.directory, ' '.join(failure.split()), exit_code)
    board.end(planned, failure)


def dry_run(grid: Sequence[Planned]) -> None:
    """Prints the grid, and the time that it takes, from the beginning and a few timed steps of each cell."""
    setup: Setup | None = None
    total = 0.0
    for cell, members in itertools.groupby(grid, lambda planned: planned.cell):
        runs = list(members)
        left = [planned for planned in runs if rundir.check(planned.directory, planned.config) is None]
        note = ''
        if left:
            start = time.perf_counter()
            setup = share(setup, left[0].config)
            ready, per_step = _time_steps(setup)
            begin = ready - start  # compiling, which the runs of a cell share
            seconds = begin + per_step * _steps_of_a_run(setup) * len(left)
            total += seconds
            note = f', {begin:.1f} s to begin, {1000 * per_step:.1f} ms a step, about {describe_time(seconds)}'
        print(f'{cell}: {plural(len(runs), "seed")}, {len(runs) - len(left)} finished{note}', flush=True)
        print(f'  python {shlex.join(runs[0].command)}')
    print(f'{plural(len(grid), "run")}; about {describe_time(total)} one after the other, less where they stop early')


def _time_steps(setup: 'Setup') -> tuple[float, float]:
    """When the first training step, which compiles, was complete, by time.perf_counter; and seconds of a later one."""
    import jax

    from flax_dlvc import steps

    split, state = setup.place(setup.dataset.train), setup.create_state()
    first, *others = steps.calls(setup.training_batches(1), 0, 1)[: 1 + TIMED_STEPS]
    state, _ = jax.block_until_ready(setup.train_step(state, *split, first))
    ready = time.perf_counter()
    others = others or [first]
    for indices in others:
        state, _ = setup.train_step(state, *split, indices)
    jax.block_until_ready(state)
    return ready, (time.perf_counter() - ready) / len(others)


def _steps_of_a_run(setup: 'Setup') -> float:
    """Training steps that take as long as a run, with validation and test but without logging and saving.

    Three forward passes are taken for a training step.
    """
    validation, test = (
        len(split) / setup.config.batch_size / 3 for split in (setup.dataset.validation, setup.dataset.test)
    )
    return setup.config.num_epochs * (setup.steps_per_epoch + validation) + test


# The command


def make_parser() -> ArgumentParser:
    """The arguments beside `--config.FIELD=VALUE`."""
    parser = ArgumentParser(
        'python -m flax_dlvc.study',
        description="The report's table and figures, with error bars: models by regularisations by seeds.",
        epilog='--config.FIELD=VALUE sets a field of every run.',
    )
    parser.add_argument('--workdir', type=named_path, required=True, help='the study; a directory per run below it')
    parser.add_argument('--models', type=_names(MODELS), default=list(MODELS), help='with commas; all by default')
    parser.add_argument(
        '--regularizations', type=_names(REGULARIZATIONS), default=list(REGULARIZATIONS), help='likewise'
    )
    parser.add_argument('--seeds', type=int, default=3, help='runs of each cell: seeds 0, 1, …')
    parser.add_argument('--vary', action='append', default=[], metavar='FIELD=V1,V2', help='another axis; repeatable')
    parser.add_argument('--parallel-runs', type=int, default=1, help='runs at once, in processes; 1 by default')
    parser.add_argument('--dry-run', action='store_true', help='print the grid and an estimate of its time')
    parser.add_argument('--rebuild', action='store_true', help='run nothing: tables and figures of what is there')
    return parser


def main(argv: list[str]) -> None:
    """Parses the command line, carries out the grid and writes what comes of it."""
    arguments, overrides = make_parser().parse_known_args(argv[1:])
    for override in overrides:
        if re.match(r'--?config\.(seed|name|model|model\.name)(=|$)', override):
            raise ConfigError(f'{override!r}: the study sets this itself; see --seeds and --models')
    if arguments.seeds < 1 or arguments.parallel_runs < 1:
        raise ConfigError('--seeds and --parallel-runs must be at least 1')
    if distributed.num_processes() > 1:
        raise ConfigError('a study is one process; several form one run of flax_dlvc.main')
    workdir = arguments.workdir
    written = f'written: {workdir / "report.html"}, table.md, table.csv, table.tex, runs.csv, answers.md, figures/'
    if arguments.rebuild:
        surplus = [word for word in argv[1:] if re.match(r'--(?!workdir\b|rebuild\b)', word)]
        if surplus:
            raise ConfigError(f'--rebuild takes all runs that are there, so it goes without {" ".join(surplus)}')
        write(existing_directory(workdir))
        print(written)
        return
    grid = plan(
        workdir,
        models=arguments.models,
        regularizations=arguments.regularizations,
        seeds=arguments.seeds,
        overrides=overrides,
        vary=arguments.vary,
    )
    if arguments.dry_run:
        dry_run(grid)
        return
    carry_out(grid, arguments.parallel_runs)
    write(workdir, grid[0].config)
    print(written)
    for state, problem, advice in (
        ('failed', 'failed', 'the table says why'),
        ('elsewhere', 'left to another process that trains them', 'start again when it has ended'),
    ):
        runs = [f'{planned.cell} seed {planned.config.seed}' for planned in grid if planned.state == state]
        if runs:
            raise CommandError(f'{len(runs)} of {plural(len(grid), "run")} {problem}: {", ".join(runs)}; {advice}')


def _names(known: dict[str, str]) -> Any:
    """An argparse type: names with commas between them."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(',')))
        for name in names:
            if name not in known:
                raise ConfigError(f'{name!r} is none of {", ".join(known)}')
        return names

    return parse


def write(workdir: Path, config: ConfigDict | None = None) -> None:
    """Writes tables, answers, figures and report.html from the run directories.

    Args:
        workdir: the study's directory.
        config: of a run; where given, its dataset is loaded for the strip of augmented images, unless that is there.
    """
    from flax_dlvc import answers, figures, page

    runs = results.read_runs(workdir)
    if not runs:
        raise ConfigError(f'{workdir} is no study: it holds no run directory CELL/seed_N')
    cells = results.group(runs)
    for name, text in (
        ('table.md', tables.to_markdown(cells)),
        ('table.csv', tables.to_csv(cells)),
        ('table.tex', tables.to_tex(cells)),
        ('runs.csv', tables.runs_to_csv(runs)),
        ('answers.md', answers.to_answers(cells)),
    ):
        rundir.write_text(workdir / name, text)
    if config is not None and figures.dataset_of_examples(workdir / 'examples.png') != config.dataset:
        with contextlib.suppress(ConfigError):  # the dataset is gone, which nothing but the strip needs
            figures.save_examples(config, workdir / 'examples.png')
    drawn = figures.draw_all(cells, workdir)
    rundir.write_text(workdir / 'report.html', page.render(cells, workdir, drawn))


if __name__ == '__main__':
    run_command(main)
