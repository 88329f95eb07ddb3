"""Early stopping as a pure function of its state and the new value."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Stopping:
    """What early stopping remembers: the best value so far, its epoch, and how long ago the last improvement was."""

    best_value: float | None = None
    best_epoch: int | None = None
    epochs_without_improvement: int = 0


def update(state: Stopping, value: float, epoch: int, *, minimize: bool, min_delta: float) -> Stopping:
    """Takes note of an epoch's value.

    Args:
        state: what is remembered of the epochs before.
        value: the metric; a NaN is never an improvement.
        epoch: the epoch that `value` belongs to.
        minimize: whether lower is better.
        min_delta: the improvement has to be larger than this.
    """
    if state.best_value is None:
        improved = not math.isnan(value)
    else:
        improvement = state.best_value - value if minimize else value - state.best_value
        improved = improvement > min_delta
    if improved:
        return Stopping(value, epoch, 0)
    return dataclasses.replace(state, epochs_without_improvement=state.epochs_without_improvement + 1)


def follow(
    records: Iterable[Mapping[str, Any]], state: Stopping | None = None, *, metric: str, min_delta: float
) -> Stopping:
    """Takes note of the records of finished epochs, by the metric that chooses the best.

    Without validation nothing is chosen: the last epoch is the one to test.

    Args:
        records: of a history, with the number of its epoch and its metric, None where there is no validation.
        state: what is remembered of the epochs before.
        metric: 'validation_accuracy', or 'validation_loss', of which less is better.
        min_delta: as in `update`.
    """
    state = state or Stopping()
    for record in records:
        if record[metric] is None:
            state = Stopping(best_epoch=record['epoch'])
        else:
            minimize = metric == 'validation_loss'
            state = update(state, record[metric], record['epoch'], minimize=minimize, min_delta=min_delta)
    return state


def should_stop(state: Stopping, *, patience: int) -> bool:
    """Whether `patience` epochs have passed without improvement; a patience of 0 never stops."""
    return 0 < patience <= state.epochs_without_improvement
