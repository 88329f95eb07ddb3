"""Measures and writes: `python -m benchmarks [PART …] [--quick] [--output DIR]`; --help names the parts.

Without a name, all. Figures are kept in DIR/benchmarks.json, one entry per case, so that a part can be measured again;
DIR/benchmarks.md is written from them. PyTorch is the peer where it is installed (`pip install torch`).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import overhead, scaling, throughput
from benchmarks.scaling import MODELS, markdown_table

PARTS = ('throughput', 'overhead', 'saving', 'startup', 'scaling')

# An epoch of CIFAR-10 where that takes less than a minute on two cores, part of one for the ViT.
EPOCHS: dict[str, dict[str, Any]] = {
    'cnn': {},
    'resnet18': {},
    'vit': {'splits.train': 'train[:10%]', 'splits.validation': 'train[80%:82%]'},
}
# Images of a step on one device: as many as give steps of a tenth of a second or more on two cores.
SCALING_BATCH_SIZES = {'cnn': 64, 'resnet18': 32, 'vit': 16}
QUICK = {
    'dataset': 'digits',
    'splits.train': 'train[:20%]',
    'splits.validation': 'train[80%:]',
    'batch_size': 32,
    'evaluation_batch_size': 100,
}


def machine() -> dict[str, str]:
    """What the figures were taken on, and when."""
    names = [
        line.split(':')[1].strip() for line in _read('/proc/cpuinfo').splitlines() if line.startswith('model name')
    ]
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'torch')
    versions = [f'{name} {importlib.metadata.version(name)}' for name in packages if importlib.util.find_spec(name)]
    return {
        'date': datetime.now(UTC).date().isoformat(),
        'processor': f'{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores',
        'versions': ', '.join([f'Python {platform.python_version()}', *versions]),
    }


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ''


def measure(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Measures the parts that were asked for; every case goes to the results as soon as it is done."""
    torch_is_there = importlib.util.find_spec('torch') is not None
    if not torch_is_there:
        print('torch is not installed: our steps are measured without a peer')
    peers = tuple(arguments.peers) if torch_is_there else ()
    rounds, turn_seconds = (1, 0.0) if arguments.quick else (arguments.rounds, 1.0)

    def keep(part: str, name: str, value: Any) -> None:
        results.setdefault(part, {})[name] = {'machine': machine(), 'value': value}
        write(results, arguments.output)
        print(f'{part}: {name} done', flush=True)

    for model in arguments.models:
        if 'throughput' in arguments.parts:
            for batch_size in arguments.batch_sizes:
                for dtype in arguments.dtypes:
                    case = throughput.Case(model, batch_size, dtype)
                    keep(
                        'throughput',
                        str(case),
                        throughput.compare(case, peers, rounds=rounds, turn_seconds=turn_seconds),
                    )
        if 'startup' in arguments.parts:
            changes = QUICK if arguments.quick else {}
            keep('startup', model, overhead.start_up(model, changes, rounds=min(rounds, 3)))
        if 'overhead' in arguments.parts:
            changes = QUICK if arguments.quick else EPOCHS[model]
            keep('overhead', model, overhead.loop(model, changes, epochs=1 if arguments.quick else 2, rounds=1))
        if 'saving' in arguments.parts:
            changes = QUICK if arguments.quick else EPOCHS[model]
            keep('saving', model, overhead.saving(model, changes, turns=rounds))
        if 'scaling' in arguments.parts:
            batch_size = max(arguments.device_counts) if arguments.quick else SCALING_BATCH_SIZES[model]
            counts = arguments.device_counts
            keep('scaling', model, scaling.measure(model, batch_size, counts, rounds=rounds, turn_seconds=turn_seconds))


def write(results: dict[str, Any], directory: Path) -> None:
    """Writes both files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / 'benchmarks.json').write_text(json.dumps(results, indent=1) + '\n')
    (directory / 'benchmarks.md').write_text(render(results))


def render(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        '# Benchmarks',
        '',
        'Written by `python -m benchmarks`. Ratios are lowest / median / highest over turns in which the contenders',
        'work one after the other; above 1, ours is faster. On a CPU only ratios mean anything: the speed of a shared',
        'machine changes by the minute.',
    ]
    if throughput_cases := results.get('throughput'):
        lines += ['', '## Our steps against PyTorch', '', *_throughput(throughput_cases)]
    if startup_cases := results.get('startup'):
        lines += ['', '## From process start to the end of the first training step', '', *_startup(startup_cases)]
    if overhead_cases := results.get('overhead'):
        lines += ['', '## Around the step', '', *_overhead(overhead_cases)]
    if saving_cases := results.get('saving'):
        lines += ['', '## What saving costs', '', *_saving(saving_cases)]
    if scaling_cases := results.get('scaling'):
        lines += ['', '## Several devices', '', *_scaling(scaling_cases)]
    measured = [entry['machine'] for part in PARTS for entry in results.get(part, {}).values()]
    lines += ['', '## Machine', '']
    for key in ('date', 'processor', 'versions'):
        lines.append(f'* {key}: {"; ".join(dict.fromkeys(each[key] for each in measured))}')
    return '\n'.join(lines) + '\n'


def _spread(values: Sequence[float]) -> str:
    return f'{min(values):.2f} / **{statistics.median(values):.2f}** / {max(values):.2f}'


def _throughput(cases: dict[str, Any]) -> list[str]:
    lines = [
        'Images/s of ours over those of PyTorch, both from equal weights, the configs with dropout, AdamW (PyTorch:',
        'its fused one). PyTorch computes in bfloat16 by autocast.',
        '`best` is the better of eager and channels-last within each turn. What limits ours on a CPU: convolutions,',
        'that of few input channels most, and products of bfloat16 (figures in LOG.md). Of the memory a good part is',
        'free, and kept: returning it costs time.',
    ]
    for phase, title in (('train', 'Training step'), ('evaluate', 'Evaluation step')):
        rows = []
        for name, entry in cases.items():
            contenders = entry['value']['contenders']
            row = [name]
            for peers in (('eager',), ('channels_last',), ('compile',), ('eager', 'channels_last')):
                there = tuple(peer for peer in peers if phase in contenders.get(peer, {}))
                row.append(_spread(throughput.ratios(contenders, phase, there)) if there else '–')
            rows.append(row)
        lines += [
            '',
            f'**{title}**',
            '',
            *markdown_table((title, 'eager', 'channels-last', 'torch.compile', 'best'), rows),
        ]
    rows = []
    for name, entry in cases.items():
        contenders = entry['value']['contenders']
        for key, scale in (('first_step_seconds', 1), ('peak_bytes', 2**30)):
            row = [f'{name}: {"first step, s" if scale == 1 else "peak memory, GiB"}']
            for contender in ('ours', *throughput.PEERS):
                value = contenders.get(contender, {}).get(key)
                row.append('–' if value is None else f'{value / scale:.1f}')
            rows.append(row)
    head = ('', 'ours', 'eager', 'channels-last', 'torch.compile')
    return [
        *lines,
        '',
        '**First step (compilation included) and peak memory of the process**',
        '',
        *markdown_table(head, rows),
    ]


def _startup(cases: dict[str, Any]) -> list[str]:
    rows = []
    for model, entry in cases.items():
        value = entry['value']
        least = [a + b for a, b in zip(value['imports'], value['compile'], strict=True)]
        quotients = [cold / each for cold, each in zip(value['cold'], least, strict=True)]
        columns = (value['cold'], value['imports'], value['compile'], quotients, value['warm'])
        rows.append([model, *map(_spread, columns)])
    head = ('seconds', 'cold', 'imports', 'compiling the training step', 'cold / (imports + compiling)', 'warm')
    return [
        'Cold: no compiled program is in the cache. Warm: all are. Decoded images are there in both. What a cold',
        'start takes beyond imports and compiling the training step: compiling the initial state, loading, and the',
        'step itself, which touches its memory for the first time.',
        '',
        *markdown_table(head, rows),
    ]


def _overhead(cases: dict[str, Any]) -> list[str]:
    rows = []
    for model, entry in cases.items():
        value = entry['value']
        validate = statistics.median(value['validate'])
        loop = [(train + validate) / epoch for train in value['train'] for epoch in value['epoch']]
        evaluation = [f / v for f, v in zip(value['forward'], value['validate'], strict=True)]
        rows.append([model, f'{value["images"][0]:,}', _spread(loop), _spread(evaluation)])
    head = ('', 'images an epoch', 'loop', 'evaluation')
    return [
        'Loop: images/s of `flax_dlvc.main`, validation, saving and logging included, over those of the same training',
        'and evaluation steps bare. Evaluation: images/s of `flax_dlvc.evaluate` over those of the bare forward pass',
        'on batches that lie ready. What limits the loop is what every epoch costs, however short: the save beside its',
        'first steps, and on a CPU memory that is given back to the kernel and touched again. It weighs ten times in',
        "the ViT's epochs here, which are a tenth of the real ones.",
        '',
        *markdown_table(head, rows),
    ]


def _scaling(cases: dict[str, Any]) -> list[str]:
    body = []
    for model, entry in cases.items():
        for row in scaling.rows(entry['value']):
            body.append([f'{model}, {row.devices} x {row.per_device}', f'{statistics.median(row.images):,.0f}'])
            body[-1].append(_spread(row.ratio))
            if row.devices == 1:
                body[-1] += ['–', _spread(row.cores), '–']
            else:
                body[-1] += [_spread(row.share), _spread(row.cores), _spread(row.explained)]
    places = {f'{entry["value"]["cores"]} cores, {entry["value"]["platform"]} devices' for entry in cases.values()}
    return [
        f'The training step on several devices (devices x images for each; {"; ".join(sorted(places))}), in turns with',
        'one. *Ratio*: images/s over those of one device. *All-reduce*: seconds of an all-reduce of arrays like the',
        'gradients, alone on the same devices, over those of the step. *Cores busy*: processor time over wall time.',
        '*Explained*: what is expected of the step over what was measured. CPU devices share the cores, so N of them',
        'are expected to take the processor time of N single ones with as many images each, and of the all-reduce. At',
        '1 a device costs what the core count explains: images/s are images times cores busy over processor time, and',
        'more devices do not add cores. Below 1 something else is lost; above 1 the step was cheaper than single',
        'devices. GPUs compute by themselves: expected is the wall time of one with as many images, and the all-',
        'reduce.',
        '',
        *markdown_table(('', 'images/s', 'ratio', 'all-reduce', 'cores busy', 'explained'), body),
    ]


def _saving(cases: dict[str, Any]) -> list[str]:
    rows = []
    for model, entry in cases.items():
        saved, without = entry['value']['with'], entry['value']['without']
        ratios = [b / a for a, b in zip(saved, without, strict=True)]
        spread = ' / '.join(f'{value:.3f}' for value in (min(ratios), statistics.median(ratios), max(ratios)))
        rows.append([model, str(len(saved)), f'{statistics.median(without):.1f}', spread])
    head = ('', 'epochs each', 'seconds of an epoch', 'images/s with saves over without')
    return [
        'One run of which every other epoch is saved: an epoch that begins with a save, part of which goes on beside',
        'its steps, against the next one, which does not. Whole epochs (a tenth for the ViT).',
        '',
        *markdown_table(head, rows),
    ]


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
    path = arguments.output / 'benchmarks.json'
    measure(arguments, json.loads(path.read_text()) if path.exists() else {})
    print(f'written to {arguments.output / "benchmarks.md"}')


if __name__ == '__main__':
    main()
