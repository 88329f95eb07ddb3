"""Measures and writes: `python -m benchmarks [PART …] [--quick] [--output DIR]`; --help names the parts.

Without a name, all. Figures are kept in DIR/benchmarks.json, one entry per case, so that a part can be measured again;
DIR/benchmarks.md is written from them. PyTorch is the peer where it is installed (`pip install torch`).
"""

import argparse
import importlib.util
import itertools
from pathlib import Path
from typing import Any

from benchmarks import overhead, scaling, throughput, utilization
from benchmarks.results import Results, machine
from benchmarks.scaling import MODELS

PARTS = ('throughput', 'utilization', 'startup', 'overhead', 'saving', 'scaling')

# What saving costs is seen in a dozen epochs; one of the ViT takes seven minutes on two cores.
PART_OF_AN_EPOCH = {'vit': {'splits.train': 'train[:10%]', 'splits.validation': 'train[80%:82%]'}}
# Images of a step on one device: as many as give steps of a tenth of a second or more on two cores.
SCALING_BATCH_SIZES = {'cnn': 64, 'resnet18': 32, 'vit': 16}
QUICK = {
    'dataset': 'digits',
    'splits.train': 'train[:20%]',
    'splits.validation': 'train[80%:]',
    'batch_size': 32,
    'evaluation_batch_size': 100,
}


def measure(arguments: argparse.Namespace) -> None:
    """Measures the parts that were asked for; every case goes to the results as soon as it is done."""
    results = Results(arguments.output)
    torch_is_there = importlib.util.find_spec('torch') is not None
    if not torch_is_there:
        print('torch is not installed: our steps are measured without a peer')
    peers = tuple(arguments.peers) if torch_is_there else ()
    rounds, turn_seconds = (1, 0.0) if arguments.quick else (arguments.rounds, 1.0)
    changes: dict[str, Any] = QUICK if arguments.quick else {}

    def keep(part: str, name: str, value: Any) -> None:
        results.keep(part, name, value)
        print(f'{part}: {name} done', flush=True)

    for model in arguments.models:
        cases = [throughput.Case(model, *each) for each in itertools.product(arguments.batch_sizes, arguments.dtypes)]
        if 'throughput' in arguments.parts:
            for case in cases:
                value = throughput.compare(case, peers, rounds=rounds, turn_seconds=turn_seconds)
                keep('throughput', f'{case}, {machine()["processor"]}', value)  # elsewhere ratios are others
        if 'utilization' in arguments.parts:
            for case in cases:
                for stem in ('imagenet', 'cifar') if model == 'resnet18' else ('imagenet',):
                    name = str(case) if stem == 'imagenet' else f'{case}, CIFAR stem'
                    value = utilization.measure(case, stem, rounds=rounds, turn_seconds=turn_seconds)
                    keep('utilization', name, value)
        if 'startup' in arguments.parts:
            keep('startup', model, overhead.start_up(model, changes, rounds=min(rounds, 3)))
        if 'overhead' in arguments.parts:
            keep('overhead', model, overhead.loop(model, changes, epochs=1 if arguments.quick else 2))
        if 'saving' in arguments.parts:
            keep('saving', model, overhead.saving(model, PART_OF_AN_EPOCH.get(model, {}) | changes, turns=rounds))
        if 'scaling' in arguments.parts:
            batch_size = max(arguments.device_counts) if arguments.quick else SCALING_BATCH_SIZES[model]
            counts = arguments.device_counts
            keep('scaling', model, scaling.measure(model, batch_size, counts, rounds=rounds, turn_seconds=turn_seconds))


def main() -> None:
    """Parses the command line, measures, writes."""
    parser = argparse.ArgumentParser('python -m benchmarks', description=__doc__)
    parser.add_argument('parts', nargs='*', metavar='PART', help=f'of {", ".join(PARTS)}; all without one')
    parser.add_argument('--models', nargs='+', choices=MODELS, default=MODELS)
    parser.add_argument('--batch-sizes', nargs='+', type=int, default=(128, 256))
    parser.add_argument('--dtypes', nargs='+', choices=('float32', 'bfloat16'), default=('float32', 'bfloat16'))
    parser.add_argument('--peers', nargs='+', choices=throughput.PEERS, default=throughput.PEERS)
    parser.add_argument('--device-counts', nargs='+', type=int, default=(1, 2, 4), help='of scaling; the first is 1')
    parser.add_argument('--rounds', type=int, default=5, help='turns of every contender')
    parser.add_argument('--quick', action='store_true', help='smallest sizes: does it run?')
    parser.add_argument('--output', type=Path, default=Path('docs/results'))
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f'{unknown.pop()!r} is not one of {", ".join(PARTS)}')
    arguments.parts = arguments.parts or PARTS
    measure(arguments)
    print(f'written to {arguments.output / "benchmarks.md"}')


if __name__ == '__main__':
    main()
