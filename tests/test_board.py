"""The view of a study: the table on a terminal, and the time that is left."""

import pytest
from rich.console import Console

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
    assert board.time_left() == 'at most about 2.5 minutes left'
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


@pytest.mark.parametrize(('terminal', 'lines'), [('xterm', 0), ('dumb', 1)])
def test_a_terminal_that_cannot_redraw_gets_a_line_for_each_run(tmp_path, monkeypatch, capsys, terminal, lines):
    monkeypatch.setenv('FORCE_COLOR', '1')  # has rich take what pytest captures for a terminal
    monkeypatch.setenv('TERM', terminal)
    grid = plan(tmp_path, models=['cnn'], regularizations=['none'], seeds=1)
    board = Board(grid, 1)
    board.start(grid[0])
    grid[0].state = 'failed'
    board.end(grid[0], 'why')
    assert capsys.readouterr().out.count('[1/1] cnn seed 0 failed after epoch 0: why') == lines


def test_when_all_have_ended_no_time_is_left(tmp_path):
    grid = plan(tmp_path, models=['cnn'], regularizations=['none'], seeds=2)
    for planned in grid:
        planned.state, planned.seconds_per_epoch = 'finished', 1.0
    assert Board(grid, 2).time_left() == 'all have ended'


def test_a_narrow_terminal_shows_what_tells_rows_apart_in_a_line_each(tmp_path):
    vary = ['augment.random_resized_crop_scale_min=0.125,0.25,0.5']
    grid = plan(tmp_path, models=['resnet18'], regularizations=['dropout_augment'], seeds=1, vary=vary)
    for planned in grid:
        planned.epochs, planned.best, planned.state = 30, 0.5, 'elsewhere'
    board = Board(grid, 1)
    board._console = Console(width=80, height=24, color_system=None)
    with board._console.capture() as capture:
        board._console.print(board._render())
    rows = [line for line in capture.get().splitlines() if 'resnet18' in line]
    assert len(rows) == 3
    assert all(
        f'={end} ' in row and '│ 30/30 │' in row for row, end in zip(rows, ('0.125', '0.25', '0.5'), strict=True)
    )


@pytest.mark.parametrize('lines', [12, 24, 80])
def test_a_low_terminal_shows_the_runs_that_matter(tmp_path, lines):
    grid = plan(tmp_path, models=['cnn', 'vit'], regularizations=['none', 'dropout'], seeds=9)
    for place, planned in enumerate(grid):
        planned.state = 'finished' if place < 30 else 'waiting'
    grid[2].state, grid[31].state = 'failed', 'running'
    board = Board(grid, 1)
    board._console = Console(width=100, height=lines, color_system=None)

    def look():
        with board._console.capture() as capture:
            board._console.print(board._render())
        return capture.get().rstrip().splitlines()

    shown = look()
    assert len(shown) <= lines
    assert sum('running' in line for line in shown) == 1
    assert sum('failed' in line for line in shown if 'and' not in line) == 1
    assert any('vit_dropout' in line and '│ 2 ' in line for line in shown)  # that ended last
    rows = sum('│ cnn' in line or '│ vit' in line for line in shown)
    if rows < len(grid):
        numbers = [int(word) for word in shown[-1].split() if word.isdecimal()]
        assert rows + sum(numbers) == len(grid)
    else:
        assert lines == 80
    board._ended = True
    assert sum('│ cnn' in line or '│ vit' in line for line in look()) == len(grid)
