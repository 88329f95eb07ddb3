"""Runs a recipe N times, seed by seed: `python -m benchmarks.speedrun --config configs/fast94.py --runs 50`.

Timed as the speedruns are: after loading and compiling, from initialisation (whitening included) to the accuracy on the
test split with the recipe's test-time augmentation. Prints a line per run, then the mean accuracy with its standard
error, the median seconds, and the floating-point operations of a run as XLA counts them in the compiled programs.
`--runs 0` counts only.
"""

import dataclasses
import statistics
import time

import numpy as np
from absl import flags

from flax_dlvc import data, steps
from flax_dlvc.config import parse_command_line
from flax_dlvc.errors import run_command
from flax_dlvc.evaluate import evaluate
from flax_dlvc.metrics import EvaluationSums
from flax_dlvc.setup import Setup, set_up

ANCHOR = 0.29e15  # floating-point operations of airbench94's run to 94 % (Jordan 2024, arXiv:2404.00498)


def train_and_test(setup: Setup, num_epochs: int) -> tuple[float, float]:
    """Test accuracy in [0, 1] and seconds of a run, without validation and saving."""
    train_split, test_split = setup.place(setup.dataset.train), setup.place(setup.dataset.test)
    start = time.perf_counter()
    state = setup.create_state()
    for epoch in range(1, num_epochs + 1):
        order = data.epoch_order(len(setup.dataset.train), setup.config.seed, epoch)
        batches = data.training_batches(order, setup.config.batch_size, len(setup.devices))
        for indices in steps.calls(batches, 0, setup.steps_per_call):
            state, _ = setup.train_step(state, *train_split, indices)
    accuracy = evaluate(setup, state.variables, test_split)['accuracy']
    return accuracy, time.perf_counter() - start


def count_operations(setup: Setup) -> tuple[float, float]:
    """Floating-point operations of training and of testing in a whole run, on one device.

    Counted in the program as it was written, before a backend replaces operations by calls that XLA cannot look into.
    """
    config = setup.config
    train_split, test_split = setup.place(setup.dataset.train), setup.place(setup.dataset.test)
    state = setup.abstract_state
    indices = np.zeros((1, 1, config.batch_size), np.int32)
    step = setup.train_step.func.lower(*setup.train_step.args, state, *train_split, indices).cost_analysis()['flops']
    indices = np.zeros((1, 1, config.evaluation_batch_size), np.int32)
    sums = setup.empty_sums(EvaluationSums)
    test = setup.evaluation_step.lower(state.variables, sums, *test_split, indices)
    num_tests = -(-len(setup.dataset.test) // config.evaluation_batch_size)
    return step * config.num_epochs * setup.steps_per_epoch, test.cost_analysis()['flops'] * num_tests


def main(argv: list[str]) -> None:
    """Parses the command line, runs, prints."""

    def define_flags(flag_values: flags.FlagValues) -> None:
        flags.DEFINE_integer('runs', 50, 'Runs, of seeds 0, 1, …', lower_bound=0, flag_values=flag_values)

    flag_values = parse_command_line(argv, define_flags)
    config = flag_values.config
    setup = set_up(config)
    accuracies, seconds = [], []
    for run in range(flag_values.runs):
        seeded = config.copy_and_resolve_references()
        seeded.seed = config.seed + run
        this = dataclasses.replace(setup, config=seeded)
        train_and_test(this, 1)  # compiles
        accuracy, spent = train_and_test(this, config.num_epochs)
        accuracies.append(accuracy)
        seconds.append(spent)
        print(f'seed {seeded.seed}: {accuracy:.4f} in {spent:.2f} s', flush=True)
    device = setup.devices[0].device_kind
    if accuracies:
        error = statistics.stdev(accuracies) / len(accuracies) ** 0.5 if len(accuracies) > 1 else float('nan')
        print(f'{config.name}, {len(accuracies)} runs on {len(setup.devices)} x {device}')
        print(f'accuracy {statistics.mean(accuracies):.4f} ± {error:.4f} (mean and its standard error)')
        print(f'seconds {min(seconds):.2f} / {statistics.median(seconds):.2f} / {max(seconds):.2f} (min, median, max)')
    train, test = count_operations(setup)
    print(f'operations {train + test:.3g} FLOP: {train:.3g} training, {test:.3g} testing; anchor {ANCHOR:.3g}')


if __name__ == '__main__':
    run_command(main)
