"""The report's table and figures, with error bars: models by regularisations by seeds.

`python -m flax_dlvc.study --workdir DIR [--models …] [--regularizations …] [--seeds N] [--vary FIELD=V1,V2 …]
[--config.FIELD=VALUE …]` carries out what is not yet finished below DIR, then writes tables, figures, answers and
report.html. A run is an ordinary run directory, DIR/CELL/seed_N.
"""

import itertools
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.live import Live
from rich.table import Table

from flax_dlvc import data, distributed, results, rundir, tables
from flax_dlvc.config import differing_fields
from flax_dlvc.errors import ArgumentParser, CommandError, ConfigError, StoppedError, StorageError, run_command
from flax_dlvc.grid import Planned, plan
from flax_dlvc.results import MODELS, REGULARIZATIONS

if TYPE_CHECKING:
    from flax_dlvc.report import Display
    from flax_dlvc.setup import Setup

GPU_MEMORY = 0.9  # the share of it that runs on one GPU take together: each also needs some beside JAX's

# Carrying it out


def carry_out(grid: list[Planned], board: 'Board', parallel_runs: int) -> None:
    """Carries out what is not finished. A run that fails is noted in its directory, and the others go on.

    Raises:
        ConfigError: a directory holds another run than the grid's; nothing is started then.
        StoppedError: SIGTERM or SIGINT within a run, which is saved; between two, `run_command` sees to them.
    """
    for planned in grid:
        if rundir.check(planned.directory, planned.config) is not None:
            rundir.adopt(planned.directory, planned.config)  # or it would not be of its row, if it stopped early
            planned.state = 'finished'
            board.follow(planned)
    waiting = [planned for planned in grid if planned.state != 'finished']
    if len(waiting) == len(grid):  # nothing has begun: a dataset that cannot be had is no single run's failure
        data.load(waiting[0].config)
    if parallel_runs > 1:
        backend, num_devices = _devices()
        if backend not in ('cpu', 'gpu') and parallel_runs > num_devices:
            raise ConfigError(f'--parallel-runs is {parallel_runs}, but there are {num_devices} devices')
        slots = [placement(slot, parallel_runs, num_devices) for slot in range(parallel_runs)]
    with board:
        if parallel_runs > 1:
            _in_processes(waiting, board, slots)
        else:
            _in_turn(waiting, board)


def _in_turn(waiting: Sequence[Planned], board: 'Board') -> None:
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
            _ended(planned, board, f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]}')


def share(setup: 'Setup | None', config: ConfigDict) -> 'Setup':
    """The setup of a config, made of the last one where the two differ in seed and learning rate at most."""
    from flax_dlvc.setup import set_up

    if setup is not None and set(differing_fields(config, setup.config)) <= {'seed', 'learning_rate'}:
        return setup.variant(seed=config.seed, learning_rate=config.learning_rate)
    return set_up(config)


def _devices() -> tuple[str, int]:
    """Their kind and number. A process asks, so that this one leaves them to the runs."""
    program = 'import jax; print(jax.default_backend(), jax.local_device_count())'
    asked = subprocess.run([sys.executable, '-c', program], stdout=subprocess.PIPE, text=True, check=True)
    backend, count = asked.stdout.split()[-2:]
    return backend, int(count)


def placement(slot: int, parallel_runs: int, num_devices: int) -> dict[str, str]:
    """The environment in which a run of `parallel_runs`, one for each slot, sees one device.

    Where there are more runs than devices, they share a GPU and, unless the environment says how, its memory evenly.
    """
    device = str(slot % num_devices)
    own = {'JAX_CUDA_VISIBLE_DEVICES': device, 'JAX_ROCM_VISIBLE_DEVICES': device, 'JAX_NUM_CPU_DEVICES': '1'}
    if parallel_runs > num_devices and not any(name.endswith('CLIENT_MEM_FRACTION') for name in os.environ):
        own['XLA_CLIENT_MEM_FRACTION'] = f'{GPU_MEMORY / -(-parallel_runs // num_devices):.3f}'
    return own


def _in_processes(waiting: Sequence[Planned], board: 'Board', slots: Sequence[dict[str, str]]) -> None:
    """As many at once as there are slots: a process of `flax_dlvc.main` each, in the slot's environment.

    The first seeds of all cells go first: side by side, two seeds of a cell would compile the same programs, and later
    ones find them.
    """
    queue = sorted(waiting, key=lambda planned: planned.config.seed)
    active: dict[int, tuple[Planned, subprocess.Popen[bytes]]] = {}
    with tempfile.TemporaryDirectory() as complaints:
        try:
            while queue or active:
                for slot, own in enumerate(slots):
                    if slot not in active and queue:
                        planned = queue.pop(0)
                        board.start(planned)
                        active[slot] = planned, _start(planned, own, Path(complaints, str(slot)))
                time.sleep(0.2)
                for slot, (planned, process) in list(active.items()):
                    board.follow(planned)
                    if process.poll() is None:
                        continue
                    del active[slot]
                    error = Path(complaints, str(slot)).read_text().strip().splitlines()
                    failure = error[-1].removeprefix('error: ') if error else f'exit code {process.returncode}'
                    if process.returncode == StorageError.exit_code:
                        raise StorageError(failure)
                    _ended(planned, board, failure if process.returncode else '', process.returncode)
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
            env=os.environ | own,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )


def _ended(planned: Planned, board: 'Board', failure: str, exit_code: int = 1) -> None:
    planned.state = 'failed' if failure else 'finished'
    if failure:
        rundir.create(planned.directory, planned.config)
    rundir.write_failure(planned.directory, ' '.join(failure.split()), exit_code)
    board.end(planned, failure)


class Board:
    """The terminal's view of a study: a live table with a line per run; without a terminal a line per ended run."""

    def __init__(self, grid: Sequence[Planned], parallel_runs: int):
        self._grid, self._parallel_runs = grid, parallel_runs
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=2)

    def __enter__(self) -> 'Board':
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def start(self, planned: Planned) -> None:
        """A run starts."""
        planned.state = 'running'

    def end(self, planned: Planned, failure: str) -> None:
        """A run is finished or has failed."""
        self.follow(planned)
        if not self._console.is_terminal:
            done = sum(other.state in ('finished', 'failed') for other in self._grid)
            result = failure or f'test accuracy {self._accuracy(planned)}'
            self.say(
                f'[{done}/{len(self._grid)}] {planned.cell} seed {planned.config.seed} {planned.state} after epoch '
                f'{planned.epochs}: {result}; {self.time_left()}'
            )

    def say(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, markup=False)

    def display(self, planned: Planned) -> 'Display':
        """What the loop reports a run's epochs to."""
        from flax_dlvc.report import Display

        board = self

        class RowDisplay(Display):
            """Puts epochs into the run's row; a run's own lines have no place on the board."""

            def __enter__(self) -> Display:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def step(self, step: int, metrics: dict[str, Any], images_per_second: float) -> None:
                """The board shows epochs."""

            def epoch(self, record: dict[str, Any], stopping: Any) -> None:
                """Notes a finished epoch."""
                del record, stopping
                board.follow(planned)

            def print(self, text: str) -> None:
                """Not shown."""

        return RowDisplay(num_epochs=planned.config.num_epochs, steps_per_epoch=1)

    def follow(self, planned: Planned) -> None:
        """Reads how far a run is from its directory."""
        run = results.read_run(planned.directory.parent.parent, planned.directory)
        planned.epochs = len(run.history)
        validated = [record['validation_accuracy'] for record in run.history]
        planned.best = max((accuracy for accuracy in validated if accuracy is not None), default=None)
        planned.seconds_per_epoch = run.seconds_per_epoch

    def _accuracy(self, planned: Planned) -> str:
        result = rundir.read_result(planned.directory)
        return f'{result["test"]["accuracy"]:.4f}' if result else '–'

    def time_left(self) -> str:
        """An upper bound: runs may stop early; of models that have not trained yet nothing is known.

        Runs that go on whenever another ends are done after their mean share and what is left of the longest one
        (Graham 1969, 'Bounds on multiprocessing timing anomalies'). Speeds are those of runs side by side already.
        """
        speeds: dict[str, float] = {}
        for planned in self._grid:
            if planned.seconds_per_epoch:
                speeds[planned.config.model.name] = planned.seconds_per_epoch
        left = [planned for planned in self._grid if planned.epochs_left]
        if any(planned.config.model.name not in speeds for planned in left):
            return 'time left not known yet'
        seconds = [planned.epochs_left * speeds[planned.config.model.name] for planned in left]
        share = 1 / self._parallel_runs
        return f'at most {describe_time(share * sum(seconds) + (1 - share) * max(seconds, default=0))} left'

    def _render(self) -> Table:
        table = Table(title=self.time_left(), title_justify='left')
        for column in ('run', 'seed', 'state', 'epoch', 'best validation accuracy'):
            table.add_column(column)
        for planned in self._grid:
            best = '' if planned.best is None else f'{planned.best:.4f}'
            epoch = f'{planned.epochs}/{planned.config.num_epochs}'
            style = {'running': 'bold', 'failed': 'red', 'waiting': 'dim'}.get(planned.state)
            table.add_row(planned.cell, str(planned.config.seed), planned.state, epoch, best, style=style)
        return table


def describe_time(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f'{seconds:.0f} seconds'
    return f'{seconds / 60:.0f} minutes' if seconds < 5400 else f'{seconds / 3600:.1f} hours'


def dry_run(grid: Sequence[Planned], num_steps: int = 3) -> None:
    """Prints the grid, and the time that it takes at most, from a few timed steps of each cell."""
    import jax

    from flax_dlvc import steps

    setup: Setup | None = None
    total = 0.0
    for cell, members in itertools.groupby(grid, lambda planned: planned.cell):
        runs = list(members)
        left = [planned for planned in runs if rundir.check(planned.directory, planned.config) is None]
        note = ''
        if left:
            setup = share(setup, left[0].config)
            config, split = setup.config, setup.place(setup.dataset.train)
            state = setup.create_state()
            order = data.epoch_order(len(setup.dataset.train), config.seed, 1)
            batches = data.training_batches(order, config.batch_size, len(setup.devices))
            calls = steps.calls(batches, 0, 1)[: num_steps + 1]
            state, _ = setup.train_step(state, *split, calls[0])  # compiles
            jax.block_until_ready(state)
            start = time.perf_counter()
            for call in calls[1:]:
                state, _ = setup.train_step(state, *split, call)
            jax.block_until_ready(state)
            per_step = (time.perf_counter() - start) / max(1, len(calls) - 1)
            # Three forward passes are a step; an epoch ends with one over the validation split.
            per_epoch = per_step * (setup.steps_per_epoch + len(setup.dataset.validation) / config.batch_size / 3)
            seconds = per_epoch * config.num_epochs * len(left)
            total += seconds
            note = f', {1000 * per_step:.0f} ms a step, at most {describe_time(seconds)}'
        print(f'{cell}: {len(runs)} seeds, {len(runs) - len(left)} finished{note}', flush=True)
        print(f'  python {shlex.join(runs[0].command)}')
    print(f'{len(grid)} runs; at most {describe_time(total)} on this machine, less where runs stop early')


# The command


def main(argv: list[str]) -> None:
    """Parses the command line, carries out the grid and writes what comes of it."""
    parser = ArgumentParser(
        'python -m flax_dlvc.study',
        description=__doc__.splitlines()[0],
        epilog='--config.FIELD=VALUE sets a field of every run.',
    )
    parser.add_argument('--workdir', type=Path, required=True, help='the study; a directory per run below it')
    parser.add_argument('--models', type=_names(MODELS), default=list(MODELS), help='with commas; all by default')
    parser.add_argument(
        '--regularizations', type=_names(REGULARIZATIONS), default=list(REGULARIZATIONS), help='likewise'
    )
    parser.add_argument('--seeds', type=int, default=3, help='runs of each cell: seeds 0, 1, …')
    parser.add_argument('--vary', action='append', default=[], metavar='FIELD=V1,V2', help='another axis; repeatable')
    parser.add_argument('--parallel-runs', type=int, default=1, help='runs at once, in processes; 1 by default')
    parser.add_argument('--dry-run', action='store_true', help='print the grid and an estimate of its time')
    parser.add_argument('--rebuild', action='store_true', help='run nothing: tables and figures of what is there')
    arguments, overrides = parser.parse_known_args(argv[1:])
    for override in overrides:
        if not override.startswith('--config.') or '=' not in override:
            raise ConfigError(f'{override!r} is not a flag; fields are set as --config.FIELD=VALUE; see --help')
        if override.startswith(('--config.seed=', '--config.name=', '--config.model.name=')):
            raise ConfigError(f'{override!r}: the study sets this itself; see --seeds and --models')
    if arguments.seeds < 1 or arguments.parallel_runs < 1:
        raise ConfigError('--seeds and --parallel-runs must be at least 1')
    if distributed.num_processes() > 1:
        raise ConfigError('a study is one process; several form one run of flax_dlvc.main')
    workdir = arguments.workdir
    if arguments.rebuild:
        if not workdir.is_dir():
            raise ConfigError(f'{workdir} is not a directory')
        write(workdir)
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
    carry_out(grid, Board(grid, arguments.parallel_runs), arguments.parallel_runs)
    write(workdir, grid[0].config)
    print(f'written: {workdir / "report.html"}, table.md, table.csv, table.tex, answers.md, figures/')
    failed = [f'{planned.cell} seed {planned.config.seed}' for planned in grid if planned.state == 'failed']
    if failed:
        raise CommandError(f'{len(failed)} of {len(grid)} runs failed: {", ".join(failed)}; the table says why')


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
        config: of a run; where given, the dataset is loaded for the strip of augmented images if it is not there yet.
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
    if config is not None and not (workdir / 'examples.png').exists():
        figures.save_examples(config, workdir / 'examples.png')
    drawn = figures.draw_all(cells, workdir)
    rundir.write_text(workdir / 'report.html', page.render(cells, workdir, drawn))


if __name__ == '__main__':
    run_command(main)
