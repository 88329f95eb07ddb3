"""Runs a recipe N times, seed by seed: `python -m benchmarks.speedrun --config configs/fast94.py --runs 50`.

Timed as the speedruns are: after loading and compiling, from initialisation (whitening included) to the accuracy on the
test split with the recipe's test-time augmentation. Prints a line per run, then the mean accuracy with its standard
error, the median seconds, and the floating-point operations of a run as XLA counts them in the programs. `--runs 0`
counts only. With `--peer PATH/airbench94_muon.py` (github.com/KellerJordan/cifar10-airbench, with PyTorch) that script
runs in turn on the same device and images; with `--output DIR` the figures go to DIR/benchmarks.md.
"""

import importlib
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.results import Results, mean_and_error, spread
from benchmarks.throughput import Contender, serve
from benchmarks.utilization import count_flops
from flax_dlvc import data
from flax_dlvc.config import parse_command_line
from flax_dlvc.errors import ArgumentParser, ConfigError, named_path, run_command
from flax_dlvc.evaluate import evaluate
from flax_dlvc.setup import Setup, set_up

ANCHOR = 0.29e15  # floating-point operations of airbench94's run to 94 % (Jordan 2024, arXiv:2404.00498)


def train_and_test(setup: Setup, num_epochs: int) -> tuple[float, float]:
    """Test accuracy in [0, 1] and seconds of a run, without validation and saving."""
    train_split, test_split = setup.place(setup.dataset.train), setup.place(setup.dataset.test)
    start = time.perf_counter()
    state = setup.create_state()
    for epoch in range(1, num_epochs + 1):
        for indices in setup.training_calls(epoch):
            state, _ = setup.train_step(state, *train_split, indices)
    metrics, _ = evaluate(setup, state.variables, test_split)
    return metrics['accuracy'], time.perf_counter() - start


def peer(script: Path, dataset: data.Dataset, connection: Connection) -> None:
    """A process that runs airbench's script, unchanged but for its data: `run(name)` answers accuracy and seconds.

    Its seconds are its own, by CUDA events: whitening, training and the last test, without what lies between.
    """
    import torch

    sys.path.insert(0, str(script.resolve().parent))
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)  # where the script looks for its data
        Path('cifar10').mkdir()
        for name in ('train', 'test'):
            split = getattr(dataset, name)
            tensors = {'images': torch.tensor(split.images), 'labels': torch.tensor(split.labels).long()}
            torch.save(tensors | {'classes': list(dataset.class_names)}, f'cifar10/{name}.pt')
        airbench = importlib.import_module(script.stem)
        model = airbench.CifarNet().cuda().to(memory_format=torch.channels_last)
        model.compile(mode='max-autotune')
        seconds = []
        airbench.print_training_details = lambda variables, is_final_entry: seconds.append(variables['time_seconds'])

        def run(name: str) -> tuple[float, float]:
            return airbench.main(name, model), seconds[-1]

        serve(connection, {'run': run})


def compare(setup: Setup, num_runs: int, script: Path | None) -> dict[str, Any]:
    """Runs the recipe, and the peer's script in turn where there is one.

    Returns:
        `device`, `flops` of training and of testing in a run, and for 'ours' and 'peer' the `accuracy` and `seconds` of
        every run.
    """
    contenders: dict[str, Any] = {
        'ours': lambda seed: train_and_test(setup.variant(seed=seed), setup.config.num_epochs)
    }
    airbench = Contender(peer, script, setup.dataset) if script else None
    if airbench:
        try:
            airbench.ask('run', 'warmup')
        except EOFError:
            raise ConfigError(f'{script} does not run here; it wants PyTorch and a GPU, and said why above') from None
        contenders['peer'] = lambda seed: airbench.ask('run', str(seed))[0]
    if num_runs:
        train_and_test(setup, 1)  # compiles
    results: dict[str, dict[str, list[float]]] = {name: {'accuracy': [], 'seconds': []} for name in contenders}
    for seed in range(setup.config.seed, setup.config.seed + num_runs):
        for name, run in contenders.items():
            accuracy, seconds = run(seed)
            results[name]['accuracy'].append(accuracy)
            results[name]['seconds'].append(seconds)
            print(f'{name}, seed {seed}: {accuracy:.4f} in {seconds:.3f} s', flush=True)
    if airbench:
        airbench.stop()
    train, test = count_flops(setup)
    flops = {
        'training': train * setup.config.num_epochs * setup.steps_per_epoch,
        'testing': test * -(-len(setup.dataset.test) // setup.config.evaluation_batch_size),
    }
    return {'device': setup.devices[0].device_kind, 'flops': flops, **results}


def main(argv: list[str]) -> None:
    """Parses the command line, runs, prints."""
    parser = ArgumentParser('python -m benchmarks.speedrun', description=__doc__.splitlines()[0])
    parser.add_argument('--runs', type=int, default=50, help='of seeds 0, 1, …; 50 by default')
    parser.add_argument('--peer', type=named_path, help='airbench94_muon.py, to run in turn')
    parser.add_argument('--output', type=named_path, help='directory of benchmarks.json and .md')
    arguments, config = parse_command_line(parser, argv)
    if arguments.runs < 0:
        raise ConfigError('--runs must be at least 0')
    if arguments.peer and not arguments.peer.is_file():
        raise ConfigError(f'--peer: {arguments.peer} is not there')
    if arguments.output and not arguments.runs:
        raise ConfigError('--output keeps runs, and --runs=0 has none; leave one of them out')
    results = compare(set_up(config), arguments.runs, arguments.peer)
    name = config.name
    for contender in ('ours', 'peer') if arguments.runs else ():
        if runs := results.get(contender):
            print(f'{name}, {contender}: {len(runs["seconds"])} runs on {results["device"]}')
            print(f'accuracy {mean_and_error(runs["accuracy"])} (mean and its standard error)')
            print(f'seconds {spread(runs["seconds"], ".2f")} (min, median, max)')
    training, testing = results['flops'].values()
    print(
        f'operations {training + testing:.3g} FLOP: {training:.3g} training, {testing:.3g} testing; anchor {ANCHOR:.3g}'
    )
    if arguments.output:
        Results(arguments.output).keep('speedrun', name, results)


if __name__ == '__main__':
    run_command(main)
