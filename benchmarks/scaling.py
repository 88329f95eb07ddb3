"""What more devices bring: measured on those that are there, and worked out for clusters that are not.

`python -m benchmarks scaling` measures the training step on 1, 2 and 4 devices, in turns, and an all-reduce of arrays
like the gradients by itself. `python -m benchmarks.scaling` prints the tables of docs/scaling.md from its arguments
(`--help`); `--page docs/scaling.md` writes them there. Nothing in those is measured: they are sums over a program's
FLOPs and bytes and a cluster's stated speeds.
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.throughput import Contender, serve, synthetic_setup
from benchmarks.utilization import count_flops
from flax_dlvc.results import base_config

MODELS = ('cnn', 'resnet18', 'vit')
GENERATED = '<!-- from here on printed by python -m benchmarks.scaling -->\n'
TRAINING_IMAGES = 40_000  # of the default splits


# Measured


def worker(model: str, num_devices: int, connection: Connection) -> None:
    """A process with devices of its own: `train(B, n)` and `reduce(n)` answer (wall, processor) seconds of n calls."""
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # the other processes use the same GPUs
    import jax

    jax.config.update('jax_num_cpu_devices', num_devices)
    from flax_dlvc import decoded, runtime, steps

    runtime.keep_compiled_programs(decoded.cache_directory() / 'compiled')
    setup = synthetic_setup(base_config(f'{model}_dropout'), num_devices)
    split = setup.place(setup.dataset.train)
    holder = [setup.create_state()]
    averaged = setup.abstract_state.params, setup.abstract_state.batch_stats
    by_device = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.array(setup.devices), (steps.AXIS,)), jax.sharding.PartitionSpec(steps.AXIS)
    )
    arrays = jax.tree.map(lambda leaf: jax.device_put(np.ones((num_devices, *leaf.shape)), by_device), averaged)
    mean = jax.pmap(lambda tree: jax.lax.pmean(tree, steps.AXIS), steps.AXIS, out_axes=None, devices=setup.devices)

    def timed(call: Callable[[], Any], num_calls: int) -> tuple[float, float]:
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(num_calls):
            result = call()
            if setup.devices[0].platform == 'cpu':  # collectives of calls that run ahead of each other deadlock
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        return time.perf_counter() - wall, time.process_time() - processor

    def train(per_device: int, num_steps: int) -> tuple[float, float]:
        indices = np.arange(num_devices * per_device, dtype=np.int32).reshape(num_devices, 1, per_device)

        def step() -> Any:
            holder[0], sums = setup.train_step(holder[0], *split, indices)
            return sums

        return timed(step, num_steps)

    def reduce(num_calls: int) -> tuple[float, float]:
        return timed(lambda: mean(arrays), num_calls)

    def about() -> tuple[str, int]:
        return setup.devices[0].platform, num_bytes(averaged)

    serve(connection, {'train': train, 'reduce': reduce, 'about': about})


def num_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays."""
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def measure(
    model: str, batch_size: int, device_counts: Sequence[int], *, rounds: int, turn_seconds: float
) -> dict[str, Any]:
    """Measures a model's step at every number of devices, with `batch_size` images for each and for all.

    Returns:
        `steps`: for every 'DEVICES x IMAGES PER DEVICE' the (wall, processor) seconds of a step in each round; one
        device also takes what each of several takes. `reduce`: for every number of devices likewise for the
        all-reduce alone. And `platform`, `cores`, `batch_size`, `bytes` (of what is reduced).
    """
    contenders = {count: Contender(worker, model, count) for count in device_counts}
    platform, reduced = contenders[device_counts[0]].ask('about')[0]
    shares = {count: batch_size // count for count in device_counts}
    turns: list[tuple[str, str, int, tuple[Any, ...]]] = []
    for count in device_counts:
        sizes = set(shares.values()) if count == 1 else {batch_size, shares[count]}
        turns += [('steps', f'{count} x {size}', count, ('train', size)) for size in sorted(sizes, reverse=True)]
        if count > 1:
            turns.append(('reduce', str(count), count, ('reduce',)))
    repeats = {}
    for kind, name, count, request in turns:
        contenders[count].ask(*request, 1)  # compiles
        wall, _ = contenders[count].ask(*request, 2)[0]
        repeats[kind, name] = max(1, round(turn_seconds / (wall / 2)))
    seconds: dict[str, dict[str, list[tuple[float, float]]]] = {'steps': {}, 'reduce': {}}
    for _ in range(rounds):
        for kind, name, count, request in turns:
            times = repeats[kind, name]
            wall, processor = contenders[count].ask(*request, times)[0]
            seconds[kind].setdefault(name, []).append((wall / times, processor / times))
    for contender in contenders.values():
        contender.stop()
    facts = {'platform': platform, 'cores': len(os.sched_getaffinity(0)), 'batch_size': batch_size, 'bytes': reduced}
    return facts | seconds


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the measured table; every list has a number for each round.

    Attributes:
        images: per second.
        ratio: those over the images per second of one device with `batch_size` images.
        share: of the step that the all-reduce alone takes.
        cores: that were busy during the step.
        explained: on CPU devices the processor time of as many single devices and the all-reduce over that of the step:
            they share the cores, so that at 1 nothing but the number of cores holds them up. On others, each of which
            computes by itself, likewise in wall time: that of one single device and the all-reduce.
    """

    devices: int
    per_device: int
    images: list[float]
    ratio: list[float]
    share: list[float]
    cores: list[float]
    explained: list[float]


def rows(value: dict[str, Any]) -> list[Row]:
    """The measured table of one model, from what `measure` returned."""
    on_cpu = value['platform'] == 'cpu'
    table = []
    for name, seconds in value['steps'].items():
        devices, per_device = map(int, name.split(' x '))
        if devices == 1 and per_device < value['batch_size']:
            continue  # what the others are compared with
        reduce = value['reduce'].get(str(devices), [(0.0, 0.0)] * len(seconds))
        rounds = list(zip(seconds, reduce, value['steps'][f'1 x {per_device}'], strict=True))
        single = [value['batch_size'] / wall for wall, _ in value['steps'][f'1 x {value["batch_size"]}']]
        images = [devices * per_device / wall for wall, _ in seconds]
        table.append(
            Row(
                devices,
                per_device,
                images,
                ratio=[mine / one for mine, one in zip(images, single, strict=True)],
                share=[reduced / wall for (wall, _), (reduced, _), _ in rounds],
                cores=[processor / wall for wall, processor in seconds],
                explained=[
                    (devices * alone[1] + reduced[1]) / step[1] if on_cpu else (alone[0] + reduced[0]) / step[0]
                    for step, reduced, alone in rounds
                ],
            )
        )
    return table


# Worked out


@dataclasses.dataclass(frozen=True)
class Program:
    """What of a training step its time is worked out from: see `program`."""

    flops_per_image: float
    parameter_bytes: int
    reduced_bytes: int


@dataclasses.dataclass(frozen=True)
class Cluster:
    """GPUs in nodes, and their stated speeds; docs/scaling.md says where the defaults come from."""

    peak_flops: float = 989.5e12  # per second, bfloat16, dense: an H200's
    fraction: float = 0.3  # of the peak that the step reaches; an assumption
    memory_bandwidth: float = 4.8e12  # bytes/s, an H200's
    node: int = 8  # GPUs joined by NVLink
    link_bandwidth: float = 450e9  # bytes/s of a GPU in one direction, NVLink 4
    network_bandwidth: float = 400e9  # bytes/s of a node in one direction: eight InfiniBand NDR adapters
    link_latency: float = 1.9e-6  # seconds for a hop of the ring, NCCL's for NVLink
    network_latency: float = 4.0e-6  # and for InfiniBand


def program(model: str) -> Program:
    """FLOPs of a config's training step on a GPU, as XLA counts them, and what it averages."""
    setup = synthetic_setup(base_config(f'{model}_dropout'))
    flops, _ = count_flops(setup)
    parameters = num_bytes(setup.abstract_state.params)
    reduced = parameters + num_bytes(setup.abstract_state.batch_stats)
    return Program(flops / setup.config.batch_size, parameters, reduced)


def compute_seconds(step: Program, cluster: Cluster, images: float) -> float:
    """A GPU's seconds for its images and the update: FLOPs over the reached rate, and AdamW's seven passes in memory.

    AdamW reads parameters, gradients and two moments and writes all but the gradients; no device is spared it.
    """
    forward_and_backward = images * step.flops_per_image / (cluster.fraction * cluster.peak_flops)
    return forward_and_backward + 7 * step.parameter_bytes / cluster.memory_bandwidth


def reduce_seconds(num_bytes: float, devices: int, cluster: Cluster) -> float:
    """Seconds of a ring all-reduce: 2 (N - 1) / N * bytes / bandwidth, and the latency of 2 (N - 1) hops.

    The slowest part of the way sets the bandwidth. Two hops for each node lead to the next one, as NCCL counts them.
    """
    nodes = -(-devices // cluster.node)
    bandwidth = cluster.link_bandwidth if nodes == 1 else min(cluster.link_bandwidth, cluster.network_bandwidth)
    hops = 2 * (devices - 1)
    between = min(hops, 2 * nodes) if nodes > 1 else 0
    latency = between * cluster.network_latency + (hops - between) * cluster.link_latency
    return 2 * (devices - 1) / devices * num_bytes / bandwidth + latency


def step_seconds(step: Program, cluster: Cluster, devices: int, images: float) -> float:
    """Seconds of a step on some devices with `images` for each; nothing overlaps."""
    return compute_seconds(step, cluster, images) + reduce_seconds(step.reduced_bytes, devices, cluster)


def efficiency(step: Program, cluster: Cluster, devices: int, images: float) -> float:
    """Share of a GPU's own images per second that is left when there are several, `images` for each."""
    return compute_seconds(step, cluster, images) / step_seconds(step, cluster, devices, images)


def least_images(step: Program, cluster: Cluster, devices: int, share: float) -> int:
    """Images that each device must have for an efficiency of at least `share`; at least one."""
    seconds = share / (1 - share) * reduce_seconds(step.reduced_bytes, devices, cluster)
    fixed = compute_seconds(step, cluster, 0)
    per_image = compute_seconds(step, cluster, 1) - fixed
    return max(1, int(np.ceil((seconds - fixed) / per_image)))


def fastest(step: Program, cluster: Cluster, batch_size: int) -> int:
    """The number of devices, a power of two, at which a step over `batch_size` images in all is shortest."""
    counts = [2**exponent for exponent in range(batch_size.bit_length())]
    return min(counts, key=lambda devices: step_seconds(step, cluster, devices, batch_size / devices))


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ['| ' + ' | '.join(row) + ' |' for row in (head, ['---'] * len(head), *body)]


def projection(
    programs: dict[str, Program], clusters: Sequence[Cluster], counts: Sequence[int], per_device: int, total: int
) -> str:
    """The tables of docs/scaling.md as Markdown.

    Args:
        programs: by model.
        clusters: each gives every model a row.
        counts: of GPUs, a column each.
        per_device: images for each GPU, in the table of fixed work per GPU.
        total: images for all GPUs, in the table of fixed total work.
    """
    facts, weak, strong, least = [], [], [], []
    for model, step in programs.items():
        facts.append(
            [model, f'{step.flops_per_image / 1e6:,.1f}', f'{step.parameter_bytes:,}', f'{step.reduced_bytes:,}']
        )
        for cluster in clusters:
            name = [model, f'{cluster.fraction:.0%}', f'{cluster.network_bandwidth / 1e9:.0f}']
            alone = compute_seconds(step, cluster, per_device)
            weak.append([*name, f'{alone * 1e6:,.0f}'])
            strong.append([*name, f'{compute_seconds(step, cluster, total) * 1e6:,.0f}'])
            least.append(list(name))
            for count in counts:
                reduce = reduce_seconds(step.reduced_bytes, count, cluster)
                images_per_second = count * per_device / (alone + reduce)
                share = efficiency(step, cluster, count, per_device)
                weak[-1].append(f'{reduce * 1e6:,.0f} µs; {images_per_second:,.0f}; **{share:.0%}**')
                seconds = step_seconds(step, cluster, count, total / count)
                faster = compute_seconds(step, cluster, total) / seconds
                strong[-1].append(f'{seconds * 1e6:,.0f} µs; {total / seconds:,.0f}; **{faster:.1f}×**')
                images = least_images(step, cluster, count, 0.5)
                least[-1].append(f'{images:,}; {TRAINING_IMAGES / (images * count):,.1f}')
            strong[-1].append(str(fastest(step, cluster, total)))
    head = ('', 'of peak', 'GB/s between nodes')
    columns = [f'{count} GPUs' for count in counts]
    lines = [
        *('**The programs** (XLA counts FLOPs; bytes are float32)', ''),
        *markdown_table(('', 'MFLOP an image', 'bytes of gradients', 'bytes reduced'), facts),
        *('', f'**Fixed work per GPU: {per_device} images each.** All-reduce; images/s; efficiency', ''),
        *markdown_table((*head, '1 GPU, µs a step', *columns), weak),
        *('', f'**Fixed total work: {total:,} images a step.** Step; images/s; speed-up over one GPU', ''),
        *markdown_table((*head, '1 GPU, µs a step', *columns, 'fastest at'), strong),
        *('', 'The last column is the power of two of GPUs at which the step is shortest.', ''),
        f'**Images that each GPU must have for half of its time to be work**; steps that {TRAINING_IMAGES:,} images',
        *('then make in an epoch', ''),
        *markdown_table((*head, *columns), least),
    ]
    return '\n'.join(lines) + '\n'


def main() -> None:
    """Prints the tables, or writes them into the page."""
    parser = argparse.ArgumentParser(
        'python -m benchmarks.scaling', description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--models', nargs='+', choices=MODELS, default=MODELS)
    parser.add_argument('--counts', nargs='+', type=int, default=(8, 64, 512), help='numbers of GPUs')
    parser.add_argument('--per-device', type=int, default=128, help='images for each GPU where those are fixed')
    parser.add_argument('--total', type=int, default=4096, help='images for all GPUs where those are fixed')
    parser.add_argument('--fractions', nargs='+', type=float, default=(0.1, 0.4), help='of the peak that is reached')
    parser.add_argument('--networks', nargs='+', type=float, default=(400e9, 50e9), help='bytes/s between nodes')
    for field in dataclasses.fields(Cluster):
        if field.name not in ('fraction', 'network_bandwidth'):
            parser.add_argument(f'--{field.name.replace("_", "-")}', type=field.type, default=field.default, help=' ')
    parser.add_argument('--page', type=Path, help='a Markdown file whose end the tables replace')
    arguments = parser.parse_args()
    fields = {field.name for field in dataclasses.fields(Cluster)} & set(vars(arguments))
    stated = {name: getattr(arguments, name) for name in fields}
    clusters = [
        Cluster(**stated, fraction=fraction, network_bandwidth=network)
        for fraction in arguments.fractions
        for network in arguments.networks
    ]
    programs = {model: program(model) for model in arguments.models}
    text = projection(programs, clusters, arguments.counts, arguments.per_device, arguments.total)
    if arguments.page is None:
        print(text, end='')
        return
    prose, mark, _ = arguments.page.read_text('utf-8').partition(GENERATED)
    arguments.page.write_text(f'{prose}{mark or GENERATED}\n{text}', 'utf-8')


if __name__ == '__main__':
    main()
