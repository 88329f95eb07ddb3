"""The view of a study: the time that is left."""

import pytest

from flax_dlvc import rundir
from flax_dlvc.board import Board
from flax_dlvc.grid import plan


@pytest.mark.parametrize(('parallel_runs', 'expected'), [(1, 26), (2, 18), (4, 14)])
def test_the_time_left_counts_runs_side_by_side(tmp_path, parallel_runs, expected):
    """Of 10, 10 and 6 seconds; two at once take 16, four 10."""
    grid = plan(tmp_path, models=['cnn'], regularizations=['none', 'dropout'], seeds=2)
    for planned, seconds in zip(grid, (10, 10, 6, 0), strict=True):
        planned.epochs, planned.seconds_per_epoch = planned.config.num_epochs - seconds, 1.0
    grid[3].state = 'finished'
    assert Board(grid, parallel_runs).time_left() == f'at most about {expected} seconds left'


@pytest.mark.parametrize('files', [{}, {'config.json': '{'}, {'metrics.jsonl': 'torn'}])
def test_a_run_that_cannot_be_read_is_where_it_was(tmp_path, files):
    """Started again, a run writes them anew, or says what is wrong."""
    (planned,) = plan(tmp_path, models=['cnn'], regularizations=['none'], seeds=1)
    Board([planned], 1).follow(planned)
    rundir.create(planned.directory, planned.config)
    for name, content in files.items():
        (planned.directory / name).write_text(content)
    Board([planned], 1).follow(planned)
    assert (planned.epochs, planned.best) == (0, None)


def test_an_epoch_takes_what_the_clock_says(tmp_path, monkeypatch):
    """Also where no step was timed; a run that goes on, less its earlier epochs; the run's end is counted in."""
    now = 0.0
    monkeypatch.setattr('flax_dlvc.board.time.monotonic', lambda: now)
    first, second, third, other = grid = plan(
        tmp_path, models=['cnn'], regularizations=['none', 'dropout'], seeds=2, overrides=['--config.num_epochs=10']
    )
    board = Board(grid, 1)
    record = {'step': 1, 'images_per_second': 0.0} | dict.fromkeys(
        ('train_loss', 'train_accuracy', 'validation_loss', 'validation_accuracy'), 0.5
    )

    def train(planned, epochs):
        rundir.create(planned.directory, planned.config)
        rundir.write_history(planned.directory, [{'epoch': epoch + 1} | record for epoch in range(epochs)])
        board.follow(planned)

    train(first, 4)  # by an earlier process
    assert board.time_left() == 'time left not known yet'
    board.start(first)
    now = 6.0
    train(first, 7)  # 2 seconds each: 3 and 10, 10, 10 are left
    assert board.time_left() == 'at most about 66 seconds left'
    now = 18.0
    train(first, 10)
    first.state = 'finished'
    now = 30.0
    board.end(first, '')  # 5 seconds each, all in all
    assert board.time_left() == 'at most about 2 minutes left'
    assert first.seconds_per_epoch == 5
    board.start(third)
    now = 40.0
    train(third, 10)
    third.state = 'finished'
    board.end(third, '')  # another cell's run says nothing of the first one's, but all of its own
    assert board.time_left() == f'at most about {10 * 5 + 10 * 1} seconds left'
    second.state = 'elsewhere'
    assert (second.epochs_left, other.epochs_left) == (0, 10)
    assert board.time_left() == 'at most about 10 seconds left'
