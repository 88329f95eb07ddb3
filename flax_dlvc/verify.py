"""Checks a run directory: `python -m flax_dlvc.verify --workdir DIR`.

Every checkpoint can be restored and is what was saved; metrics.jsonl is the history in the newest one; result.json is
what the best one gives on the test split, rounding aside: other devices than those of the training add up in another
order. A line for each; exit code 1 where one is wrong.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_dlvc import rundir
from flax_dlvc.checkpoint import Checkpoints, Progress
from flax_dlvc.errors import ArgumentParser, CommandError, ConfigError, existing_directory, run_command
from flax_dlvc.evaluate import evaluate
from flax_dlvc.setup import set_up

# What was checked, and what is wrong with it: None where it is as it should be.
Finding = tuple[str, str | None]


def verify(workdir: Path) -> Iterator[Finding]:
    """Checks a run directory, one finding at a time.

    Raises:
        ConfigError: it is not a run directory or a process is training in it; its dataset cannot be had or has changed.
    """
    if rundir.is_locked(workdir):
        raise ConfigError(f'a process is training in {workdir}; verify it when the run has ended')
    setup = set_up(rundir.read_config(workdir), training=False)
    lacking = rundir.lacking_fields(workdir)
    yield f'config.json (with defaults of {", ".join(lacking)})' if lacking else 'config.json', None
    rundir.check_dataset(workdir, setup.dataset)  # no checkpoint says anything of another one
    yield 'dataset.json', None
    result = rundir.read_result(workdir)
    progress: Progress | None = None
    with Checkpoints(workdir, read_only=True) as checkpoints:
        if not checkpoints.steps:
            yield 'checkpoints', 'there are none'
        for step in checkpoints.steps:
            try:
                state, progress = checkpoints.restore(step, setup.abstract_state)
                yield f'checkpoint of step {step}', None
            except CommandError as error:
                yield f'checkpoint of step {step}', str(error)
                progress = None  # that of an older one says nothing of metrics.jsonl
                continue
            if result and step == _best_step(progress, result['best_epoch']):
                test, _ = evaluate(setup, state.variables, setup.place(setup.dataset.test))
                yield 'result.json', _compare_result(result['test'], test, step)
                result = None
    if result:
        yield 'result.json', f'no whole checkpoint of its best epoch {result["best_epoch"]} is left'
    if progress is not None:
        yield 'metrics.jsonl', _compare_history(workdir, progress)


def _best_step(progress: Progress, best_epoch: int) -> int | None:
    return next((record['step'] for record in progress.history if record['epoch'] == best_epoch), None)


def _compare_result(said: dict[str, Any], test: dict[str, Any], step: int) -> str | None:
    wrong = [f'{key} {test.get(key)}, not {value}' for key, value in said.items() if not _agree(key, value, test)]
    return f'the checkpoint of step {step} gives {"; ".join(wrong)}' if wrong else None


def _agree(key: str, value: Any, test: dict[str, Any]) -> bool:
    """Whether a metric is the same but for rounding, by which the class of two examples may change."""
    again, counts = test.get(key), [sum(row) for row in test['confusion_matrix']]
    if key == 'per_class_accuracy':
        return len(value) == len(counts) and all(
            ours == theirs or (None not in (ours, theirs) and abs(ours - theirs) * count < 2.5)
            for ours, theirs, count in zip(value, test[key], counts, strict=True)
        )
    if not (isinstance(value, float) and isinstance(again, float)):
        return value == again
    if key == 'cross_entropy':
        return math.isclose(value, again, rel_tol=1e-4)
    # Whatever else there is may be a mean over classes.
    there = list(filter(None, counts))
    examples = test['num_examples'] if key == 'accuracy' else min(there) * len(there)
    return math.isclose(value, again, rel_tol=1e-4, abs_tol=2.5 / examples)


def _compare_history(workdir: Path, progress: Progress) -> str | None:
    try:
        history = rundir.read_history(workdir)
    except CommandError as error:
        return str(error)
    if history != progress.history:
        return f'it is not the history that the newest checkpoint holds; {rundir.ANEW}'
    return None


def main(argv: list[str]) -> None:
    """Parses the command line and prints the findings."""
    parser = ArgumentParser('python -m flax_dlvc.verify', description='Checks a run directory.')
    parser.add_argument('--workdir', type=existing_directory, required=True, help='the run directory')
    workdir = parser.parse_args(argv[1:]).workdir
    wrong = 0
    for what, problem in verify(workdir):
        print(f'{what}: {problem or "ok"}')
        wrong += problem is not None
    if wrong:
        raise CommandError(f'{wrong} of the things in {workdir} are wrong')


if __name__ == '__main__':
    run_command(main)
