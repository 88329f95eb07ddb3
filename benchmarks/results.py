"""Figures, kept as benchmarks.json, one entry per case, and the page that is made of them, benchmarks.md."""

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

from benchmarks import scaling, throughput, utilization
from benchmarks.scaling import markdown_table


def machine() -> dict[str, str]:
    """What the figures were taken on, and when."""
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'torch')
    versions = [f'{name} {importlib.metadata.version(name)}' for name in packages if importlib.util.find_spec(name)]
    return {
        'date': datetime.now(UTC).date().isoformat(),
        'processor': f'{_processor()}, {len(os.sched_getaffinity(0))} cores',
        'versions': ', '.join([f'Python {platform.python_version()}', *versions]),
    }


def _processor() -> str:
    """The name of the first processor, with its family and model, as virtual machines give several kinds one name."""
    path = Path('/proc/cpuinfo')
    first = path.read_text().partition('\n\n')[0] if path.exists() else ''
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(':') for line in first.splitlines())}
    name = fields.get('model name', platform.machine())
    return f'{name} (family {fields["cpu family"]}, model {fields["model"]})' if 'cpu family' in fields else name


class Results:
    """The figures of a directory; those that are measured again replace what they were."""

    def __init__(self, directory: Path):
        self._directory = directory
        path = directory / 'benchmarks.json'
        self._results = json.loads(path.read_text('utf-8')) if path.exists() else {}

    def keep(self, part: str, name: str, value: Any) -> None:
        """Writes both files, with the figures of one more case."""
        self._results.setdefault(part, {})[name] = {'machine': machine(), 'value': value}
        page = render(self._results)  # before anything is replaced: what cannot be rendered is not kept
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / 'benchmarks.json').write_text(json.dumps(self._results, indent=1) + '\n', 'utf-8')
        (self._directory / 'benchmarks.md').write_text(page, 'utf-8')


def render(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        '# Benchmarks',
        '',
        'Written by `python -m benchmarks`. Ratios are lowest / median / highest over turns in which the contenders',
        'work one after the other; above 1, ours is faster. On a CPU only ratios mean anything: the speed of a shared',
        'machine changes by the minute, and which of two programs is faster depends on the processor.',
    ]
    parts = {
        'throughput': ('Our steps against PyTorch', _throughput),
        'utilization': ("A device's arithmetic", _utilization),
        'traffic': ('Memory traffic of a GPU', _traffic),
        'speedrun': ('Speedruns', _speedrun),
        'startup': ('From process start to the first training step', _startup),
        'overhead': ('Around the step', _overhead),
        'saving': ('What saving costs', _saving),
        'scaling': ('Several devices', _scaling),
    }
    for part, (title, table) in parts.items():
        if cases := results.get(part):
            machines = [entry['machine'] for entry in cases.values()]
            taken = sorted({f'* {each["date"]}, {each["processor"]}; {each["versions"]}' for each in machines})
            lines += ['', f'## {title}', '', *table(cases), '', 'Taken on', '', *taken]
    return '\n'.join(lines) + '\n'


def spread(values: Sequence[float], form: str, mark: str = '') -> str:
    """The lowest, the median and the highest, each in a form such as '.2f'; the median between marks."""
    return f'{min(values):{form}} / {mark}{statistics.median(values):{form}}{mark} / {max(values):{form}}'


def _spread(values: Sequence[float]) -> str:
    return spread(values, '.2f', '**')


def _throughput(cases: dict[str, Any]) -> list[str]:
    lines = [
        'Images/s of ours over those of PyTorch, both from equal weights, the configs with dropout, AdamW (PyTorch:',
        'its fused one). PyTorch computes in bfloat16 by autocast. Each turn has new processes: by luck, some of',
        'PyTorch give memory back to the kernel in every step and some do not (figures in LOG.md). `best` is the',
        'better of eager and channels-last within each turn. What limits ours on a CPU: convolutions, that of few',
        'input channels most, and products of bfloat16. PyTorch computes all tokens in the last block of the ViT, as',
        'the tutorial does, ours the one that is read. Of the memory a good part is free, and kept: returning it',
        'costs time.',
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


def _utilization(cases: dict[str, Any]) -> list[str]:
    rows = []
    for name, entry in cases.items():
        value = entry['value']
        images, peak = statistics.median(value['images']), statistics.median(value['flops'])
        rows.append([name, value['device'], f'{images:,.0f}', f'{images * value["flops_per_image"] / 1e12:,.1f}'])
        rows[-1] += [f'{peak / 1e12:,.0f} ({value["product"]})', spread(utilization.shares(value), '.1%')]
    head = ('', 'device', 'images/s', 'TFLOP/s', 'TFLOP/s of a matrix product', 'share')
    return [
        "The training step's operations per second, and their share of those of a large matrix product on the same",
        'device. XLA counts the operations of the program as it is written; what a convolution multiplies with the',
        "padding's zeros, which the usual count takes in (ResNet18 with the CIFAR stem: 15 % more), is not among them.",
        '',
        *markdown_table(head, rows),
    ]


def _traffic(cases: dict[str, Any]) -> list[str]:
    columns = ('product_bytes', 'other_bytes', 'temporary_bytes')
    rows = [
        [name, str(entry['value']['kernels']), *(f'{entry["value"][column] / 1e9:.2f}' for column in columns)]
        for name, entry in cases.items()
    ]
    return [
        'By `python -m benchmarks.traffic`: a training step, compiled for an H100 and not run. Gigabytes are what its',
        'kernels read and write, caches left out: convolutions and matrix products, and all others; and what the step',
        'allocates.',
        '',
        *markdown_table(('', 'kernels', 'products, GB', 'others, GB', 'temporaries, GB'), rows),
    ]


def _speedrun(cases: dict[str, Any]) -> list[str]:
    rows = []
    for recipe, entry in cases.items():
        value = entry['value']
        for contender in ('ours', 'peer'):
            if runs := value.get(contender):
                accuracy = runs['accuracy']
                rows.append([f'{recipe}, {contender}', value['device'], str(len(accuracy)), mean_and_error(accuracy)])
                flops = f'{sum(value["flops"].values()) / 1e15:.3f}' if contender == 'ours' else '–'
                rows[-1] += [spread(runs['seconds'], '.2f'), flops]
    head = ('', 'device', 'runs', 'test accuracy', 'seconds', 'PFLOP')
    return [
        'By `python -m benchmarks.speedrun`: runs from initialisation to the accuracy on the test split, with test-',
        'time augmentation, after loading and compiling. *Peer*: airbench94_muon.py, unchanged, on the same device and',
        'images, run by run in turn; its seconds are those it prints. Accuracy: mean and its standard error;',
        'seconds: lowest / median / highest.',
        '',
        *markdown_table(head, rows),
    ]


def mean_and_error(values: Sequence[float]) -> str:
    """The mean and its standard error."""
    error = f' ± {statistics.stdev(values) / len(values) ** 0.5:.4f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.4f}{error}'


def _startup(cases: dict[str, Any]) -> list[str]:
    rows = []
    for model, entry in cases.items():
        value = entry['value']
        least = [a + b for a, b in zip(value['cold imports'], value['compile'], strict=True)]
        begun = [cold - step for cold, step in zip(value['cold'], value['cold step'], strict=True)]
        columns = [value[name] for name in ('cold', 'cold step', 'cold imports', 'compile')]
        columns += [[a / b for a, b in zip(seconds, least, strict=True)] for seconds in (begun, value['cold'])]
        rows.append([model, *map(_spread, (*columns, value['warm']))])
    head = ('seconds', 'cold', 'its step', 'imports', 'compiling', 'until its step / least', 'cold / least', 'warm')
    return [
        'Cold: no compiled program is in the cache. Warm: all are. Decoded images are there in both. *Least*: imports',
        'and compiling the training step. What a cold start takes beyond: compiling the initial state, loading, and',
        'the step itself, which touches its memory for the first time.',
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
        'on batches that lie ready. The loop has one turn, a bare pass beside each of its epochs, and the ratios are',
        'those of all pairs: a few per cent would not be told from noise. What limits it is what every epoch costs,',
        'however short: the save beside its first steps, and on a CPU memory that is given back to the kernel and',
        'touched again.',
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
        rows.append([model, str(len(saved)), f'{statistics.median(without):.1f}', spread(ratios, '.3f')])
    head = ('', 'epochs each', 'seconds of an epoch', 'images/s with saves over without')
    return [
        'One run of which every other epoch is saved: an epoch that begins with a save, part of which goes on beside',
        'its steps, against the next one, which does not. Whole epochs (a tenth of one for the ViT).',
        '',
        *markdown_table(head, rows),
    ]
