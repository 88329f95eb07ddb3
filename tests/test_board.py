"""The view of a study: the time that is left."""

import pytest

from flax_dlvc.board import Board
from flax_dlvc.grid import plan


@pytest.mark.parametrize(('parallel_runs', 'expected'), [(1, 26), (2, 18), (4, 14)])
def test_the_time_left_counts_runs_side_by_side(tmp_path, parallel_runs, expected):
    """Of 10, 10 and 6 seconds; two at once take 16, four 10."""
    grid = plan(tmp_path, models=['cnn'], regularizations=['none', 'dropout'], seeds=2)
    for planned, seconds in zip(grid, (10, 10, 6, 0), strict=True):
        planned.epochs, planned.seconds_per_epoch = planned.config.num_epochs - seconds, 1.0
    grid[3].state = 'finished'
    assert Board(grid, parallel_runs).time_left() == f'at most {expected} seconds left'
