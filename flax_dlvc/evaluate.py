"""From a state and a split to metrics; also the command.

`python -m flax_dlvc.evaluate --workdir DIR [--split test|validation|train] [--step best|latest|N]` prints the metrics
of a checkpoint and writes `evaluation-SPLIT.json` into the run directory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_dlvc import data, rundir, steps
from flax_dlvc.checkpoint import Checkpoints
from flax_dlvc.errors import ArgumentParser, ConfigError, add_step_argument, existing_directory, run_command
from flax_dlvc.metrics import Predictions, expected_calibration_error, summarize
from flax_dlvc.profiling import timed
from flax_dlvc.setup import Setup, set_up
from flax_dlvc.words import plural


@timed('evaluation')
def evaluate(
    setup: Setup,
    variables: Any,
    split: tuple[jax.Array, jax.Array],
    between_calls: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], Predictions]:
    """Metrics of a model on every example of a split, and what it says of each.

    Args:
        setup: of the run.
        variables: the model's parameters and batch statistics, replicated over the devices.
        split: images (N, H, W, C) uint8 and labels (N,), replicated over the devices.
        between_calls: called between compiled calls; may raise.

    Returns:
        What `metrics.summarize` returns, with `expected_calibration_error`; and the predictions, in host memory.
    """
    images, labels = split
    totals = setup.empty_totals(len(labels))
    batches = data.evaluation_batches(len(labels), setup.config.evaluation_batch_size, len(setup.devices))
    for indices in steps.calls(batches, 0, setup.steps_per_call):
        between_calls()
        previous, totals = totals, setup.evaluation_step(variables, totals, images, labels, indices)
        jax.block_until_ready(previous)  # one call is always queued, and never more
    sums, predictions = jax.device_get(totals)
    metrics = summarize(sums)
    metrics['expected_calibration_error'] = expected_calibration_error(predictions, np.asarray(labels))
    return metrics, predictions


def evaluate_checkpoint(workdir: Path, split_name: str, which: str) -> dict[str, Any]:
    """Metrics of a run directory's checkpoint; nothing but the directory and its dataset is needed.

    Args:
        workdir: the run directory.
        split_name: 'train', 'validation' or 'test'.
        which: 'best', 'latest' or a training step.

    Raises:
        ConfigError: the directory or the checkpoint is missing, damaged, or not ours, or the dataset has changed.
    """
    setup = set_up(rundir.read_config(workdir), training=False)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.find(which)
        rundir.check_dataset(workdir, setup.dataset)
        if not len(getattr(setup.dataset, split_name)):
            raise ConfigError(f'the {split_name} split of {workdir} is empty; name another one with --split')
        state, _ = checkpoints.restore(step, setup.abstract_state)
    metrics, _ = evaluate(setup, state.variables, setup.place(getattr(setup.dataset, split_name)))
    return describe_origin(setup, split_name, step) | metrics


def describe_origin(setup: Setup, split_name: str, step: int) -> dict[str, Any]:
    """What `evaluation-SPLIT.json` says of itself before its metrics."""
    return {
        'config_name': setup.config.name,
        'dataset': setup.config.dataset,
        'split': split_name,
        'step': step,
        'class_names': list(setup.dataset.class_names),
    }


def main(argv: list[str]) -> None:
    """Parses the command line, evaluates, prints and writes."""
    parser = ArgumentParser('python -m flax_dlvc.evaluate', description='Evaluates a checkpoint of a run directory.')
    parser.add_argument('--workdir', type=existing_directory, required=True, help='the run directory')
    parser.add_argument('--split', choices=('test', 'validation', 'train'), default='test')
    add_step_argument(parser)
    arguments = parser.parse_args(argv[1:])
    metrics = evaluate_checkpoint(arguments.workdir, arguments.split, arguments.step)
    print(f'{metrics["config_name"]} on {metrics["dataset"]} {arguments.split}, step {metrics["step"]}:')
    print(describe(metrics), flush=True)  # a directory that is closed to us may still be evaluated
    print(f'written to {rundir.write_evaluation(arguments.workdir, arguments.split, metrics)}')


def describe(metrics: dict[str, Any]) -> str:
    """The metrics in one line."""
    return (
        f'accuracy {metrics["accuracy"]:.4f}, cross-entropy {metrics["cross_entropy"]:.4f}, '
        f'mean class accuracy {metrics["mean_class_accuracy"]:.4f} on {plural(metrics["num_examples"], "example")}'
    )


if __name__ == '__main__':
    run_command(main)
