"""The terminal's view of a study: a live table with a line per run, and the time that is left."""

import collections
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from flax_dlvc import results, rundir
from flax_dlvc.errors import ConfigError
from flax_dlvc.grid import Planned
from flax_dlvc.report import Display
from flax_dlvc.stopping import Stopping
from flax_dlvc.words import describe_time

BY_IMPORTANCE = ('running', 'failed', 'elsewhere', 'finished', 'waiting')  # states, where not all runs can be shown
WIDTH_BESIDE_CELL = 52  # characters of a line beside the row's name
LINES_AROUND_ROWS = 7  # of the table: its title, head and borders, and what it says of the runs left out


class Board:
    """A live table of the grid; without a terminal a line per ended run."""

    def __init__(self, grid: Sequence[Planned], parallel_runs: int):
        self._grid, self._parallel_runs = grid, parallel_runs
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._ended = False
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal  # rich redraws nothing there
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=2)

    def __enter__(self) -> 'Board':
        if self._is_live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True  # what stays in the terminal is the whole table
        self._live.stop()

    def start(self, planned: Planned) -> None:
        """A run starts, or goes on."""
        planned.state = 'running'
        planned.began = time.monotonic(), planned.epochs

    def end(self, planned: Planned, failure: str) -> None:
        """A run is finished, has failed, or is another process's."""
        self.follow(planned)
        self._measure(planned)
        if not self._is_live:
            done = sum(other.state not in ('waiting', 'running') for other in self._grid)
            result = failure or f'test accuracy {self._accuracy(planned)}'
            self._console.print(
                f'[{done}/{len(self._grid)}] {planned.cell} seed {planned.config.seed} {planned.state} after epoch '
                f'{planned.epochs}: {result}; {self.time_left()}',
                markup=False,
            )

    def display(self, planned: Planned) -> Display:
        """What the loop reports a run's epochs to."""
        return _RowDisplay(self, planned)

    def follow(self, planned: Planned) -> None:
        """Reads how far a run is from its directory; what cannot be read the run itself mends or complains of."""
        try:
            run = results.read_run(planned.directory.parent.parent, planned.directory)
        except ConfigError:
            return
        if planned.epochs != len(run.history):
            planned.epochs = len(run.history)
            self._measure(planned)
        planned.best = run.best.get('validation_accuracy')

    def _measure(self, planned: Planned) -> None:
        """Notes what an epoch of a run takes, by the clock: its share of compiling, evaluating and saving included."""
        if planned.began is None:
            return
        start, epochs_before = planned.began
        if planned.epochs > epochs_before:
            planned.seconds_per_epoch = (time.monotonic() - start) / (planned.epochs - epochs_before)

    def _accuracy(self, planned: Planned) -> str:
        result = rundir.read_result(planned.directory)
        return f'{result["test"]["accuracy"]:.4f}' if result else '–'

    def time_left(self) -> str:
        """An upper bound: runs may stop early; of models that have not trained yet nothing is known.

        A run takes as long for an epoch as it did so far; one that waits, as the slowest of its cell, or else of its
        model. Runs that go on whenever another ends are done after their mean share and what is left of the longest one
        (Graham 1969, 'Bounds on multiprocessing timing anomalies'). Speeds are those of runs side by side already.
        """
        by_cell: dict[str, float] = {}
        by_model: dict[str, float] = {}
        for planned in self._grid:
            if planned.seconds_per_epoch:
                for slowest, name in ((by_cell, planned.cell), (by_model, planned.config.model.name)):
                    slowest[name] = max(slowest.get(name, 0.0), planned.seconds_per_epoch)
        left = [planned for planned in self._grid if planned.epochs_left]
        if not left:
            return 'all have ended'
        if any(planned.config.model.name not in by_model for planned in left):
            return 'time left not known yet'
        seconds = [
            planned.epochs_left
            * (planned.seconds_per_epoch or by_cell.get(planned.cell) or by_model[planned.config.model.name])
            for planned in left
        ]
        share = 1 / self._parallel_runs
        return f'at most about {describe_time(share * sum(seconds) + (1 - share) * max(seconds))} left'

    def _render(self) -> Table:
        table = Table(title=self.time_left(), title_justify='left')
        for column in ('run', 'seed', 'state', 'epoch', 'best validation'):
            table.add_column(column)
        shown = self._shown()
        for planned in (self._grid[place] for place in shown):
            best = '' if planned.best is None else f'{planned.best:.4f}'
            epoch = f'{planned.epochs}/{planned.config.num_epochs}'
            style = {'running': 'bold', 'failed': 'red', 'waiting': 'dim'}.get(planned.state)
            cell = _fit(planned.cell, self._console.width - WIDTH_BESIDE_CELL)
            table.add_row(cell, str(planned.config.seed), planned.state, epoch, best, style=style)
        left_out = collections.Counter(run.state for place, run in enumerate(self._grid) if place not in shown)
        if left_out:
            table.caption = 'and ' + ', '.join(f'{count} {state}' for state, count in left_out.items())
        return table

    def _shown(self) -> list[int]:
        """Places in the grid of the runs that have a line: all, or as many as the terminal has room for."""

        def importance(place: int) -> tuple[int, int]:
            state = self._grid[place].state
            # Of those that wait the next ones, of the others the last ones.
            return BY_IMPORTANCE.index(state), place if state == 'waiting' else -place

        places = range(len(self._grid))
        room = len(places) if self._ended else max(1, self._console.height - LINES_AROUND_ROWS)
        return sorted(sorted(places, key=importance)[:room])


class _RowDisplay(Display):
    """Puts a run's epochs into its row of a board, where the run's own lines have no place."""

    def __init__(self, board: Board, planned: Planned):
        self._board, self._planned = board, planned

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, step: int, metrics: dict[str, Any], images_per_second: float) -> None:
        """The board shows epochs."""

    def epoch(self, record: dict[str, Any], stopping: Stopping) -> None:
        """Notes a finished epoch."""
        del record, stopping
        self._board.follow(self._planned)

    def print(self, text: str) -> None:
        """Not shown."""


def _fit(name: str, width: int) -> str:
    """A row's name in so many characters: its begin is the model, and its end tells it from the other rows."""
    width = max(width, 12)
    return name if len(name) <= width else f'{name[: width // 3]}…{name[width // 3 + 1 - width :]}'
