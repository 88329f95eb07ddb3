import dataclasses
import math

import pytest

from flax_dlvc.stopping import Stopping, should_stop, update

NAN = math.nan


def follow(values, *, minimize=False, min_delta=0.0, patience=0):
    """Feeds epochs 1, 2, … until stopping says so: the last state and the number of epochs run."""
    state = Stopping()
    for epoch, value in enumerate(values, 1):
        state = update(state, value, epoch, minimize=minimize, min_delta=min_delta)
        if should_stop(state, patience=patience):
            return state, epoch
    return state, len(values)


@pytest.mark.parametrize(
    ('values', 'best_value', 'best_epoch', 'without'),
    [
        ([0.5], 0.5, 1, 0),
        ([0.1, 0.2, 0.3], 0.3, 3, 0),
        ([0.3, 0.2, 0.1], 0.3, 1, 2),
        ([0.1, 0.3, 0.2, 0.3, 0.3], 0.3, 2, 3),  # a tie keeps the first
        ([0.1, 0.3, 0.2, 0.4, 0.3], 0.4, 4, 1),  # an improvement starts the count again
        ([0.0, 0.0], 0.0, 1, 1),
        ([-2.0, -1.0], -1.0, 2, 0),
        ([NAN], None, None, 1),
        ([NAN, NAN, 0.1], 0.1, 3, 0),
        ([NAN, 0.2, 0.1], 0.2, 2, 1),
        ([0.2, NAN, 0.1], 0.2, 1, 2),
        ([0.2, NAN, 0.3], 0.3, 3, 0),
    ],
)
def test_maximise(values, best_value, best_epoch, without):
    assert follow(values)[0] == Stopping(best_value, best_epoch, without)


@pytest.mark.parametrize(
    ('values', 'best_value', 'best_epoch', 'without'),
    [
        ([3.0, 2.0, 1.0], 1.0, 3, 0),
        ([1.0, 2.0, 3.0], 1.0, 1, 2),
        ([2.0, 1.0, 1.0], 1.0, 2, 1),
        ([NAN, 2.0, NAN, 1.0], 1.0, 4, 0),
        ([math.inf, 5.0], 5.0, 2, 0),
        ([5.0, math.inf], 5.0, 1, 1),
    ],
)
def test_minimise(values, best_value, best_epoch, without):
    assert follow(values, minimize=True)[0] == Stopping(best_value, best_epoch, without)


@pytest.mark.parametrize(
    ('values', 'minimize', 'best_epoch'),
    [
        ([0.5, 0.625], False, 1),  # exactly min_delta is not enough
        ([0.5, 0.626], False, 2),
        ([0.5, 0.6, 0.7], False, 3),  # against the best, not against the epoch before
        ([0.5, 0.6, 0.62], False, 1),
        ([0.5, 0.375], True, 1),
        ([0.5, 0.374], True, 2),
    ],
)
def test_min_delta(values, minimize, best_epoch):
    assert follow(values, minimize=minimize, min_delta=0.125)[0].best_epoch == best_epoch


@pytest.mark.parametrize(
    ('patience', 'values', 'epochs_run'),
    [
        (1, [0.1, 0.2, 0.2, 0.9], 3),
        (2, [0.1, 0.2, 0.2, 0.9], 4),
        (2, [0.3, 0.2, 0.1, 0.9], 3),
        (2, [0.3, 0.2, 0.4, 0.3, 0.4, 0.9], 5),
        (3, [0.1, 0.2, 0.3, 0.4], 4),
        (2, [NAN, NAN, 0.9], 2),
        (2, [0.1, NAN, NAN, 0.9], 3),
        (5, [0.5] * 10, 6),
        (0, [0.5] * 10, 10),  # never
        (0, [NAN] * 10, 10),
    ],
)
def test_patience(patience, values, epochs_run):
    assert follow(values, patience=patience)[1] == epochs_run


def test_nothing_seen_does_not_stop():
    assert not should_stop(Stopping(), patience=1)


@pytest.mark.parametrize('patience', [1, 999, 1000])
def test_a_patience_that_was_passed_already_stops(patience):
    """As in a run that goes on with less patience."""
    assert should_stop(Stopping(0.5, 1, 1000), patience=patience)


def test_what_is_remembered_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Stopping().best_value = 0.5


def test_flags_are_named():
    """Nobody sees what is true in `update(state, 0.5, 1, True, 0.0)`."""
    with pytest.raises(TypeError, match='positional'):
        update(Stopping(), 0.5, 1, True, 0.0)
    with pytest.raises(TypeError, match='positional'):
        should_stop(Stopping(), 3)


def test_update_leaves_its_argument():
    state = Stopping(0.5, 1, 2)
    update(state, 0.6, 2, minimize=False, min_delta=0.0)
    assert state == Stopping(0.5, 1, 2)
