"""Images/s of the training and the evaluation step, ours against PyTorch's, in turns on the CPU of the same machine.

Every contender is a process of its own and does the whole of a step: take a batch of uint8 images by index, normalise,
forward, cross-entropy, backward, AdamW. They start from equal weights, which is checked by their logits, and work one
at a time; a ratio is taken within a turn, so that what slows the machine for a while slows both. Each turn has new
processes: one of PyTorch's may give memory back to the kernel in every step of its life, and the next one not.
"""

import dataclasses
import itertools
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from flax_dlvc.results import base_config

IMAGES = 1024  # of the synthetic split that batches are taken from
PEERS = ('eager', 'channels_last', 'compile')


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: a model, examples per step, and the compute dtype."""

    model: str
    batch_size: int
    dtype: str

    def __str__(self) -> str:
        return f'{self.model}, batch {self.batch_size}, {self.dtype}'


def synthetic_split(size: int = IMAGES) -> tuple[np.ndarray, np.ndarray]:
    """Random images (N, 32, 32, 3) uint8 and labels (N,) int32; speed does not depend on what they show."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (size, 32, 32, 3), np.uint8), generator.integers(0, 10, size, np.int32)


def synthetic_dataset(size: int = IMAGES) -> Any:
    """A `Dataset` whose splits are all the synthetic one."""
    from flax_dlvc import data

    split = data.Split(*synthetic_split(size))
    names = tuple(map(str, range(10)))
    return data.Dataset('synthetic', names, data.CIFAR10_MEAN, data.CIFAR10_STD, split, split, split)


def synthetic_setup(config: Any, num_devices: int = 1) -> Any:
    """A `Setup` on the synthetic split and the first devices."""
    from flax_dlvc import runtime, setup, steps

    runtime.set_cpu_options()
    runtime.keep_freed_memory(num_devices)
    return setup.Setup(config, synthetic_dataset(), steps.run_devices(num_devices))


def ours(case: Case, cache: str, connection: Connection) -> None:
    """A process that trains and evaluates our model as it is told; compiled programs are kept in a directory."""
    import jax

    from flax_dlvc import runtime
    from flax_dlvc.interop import to_torch

    runtime.keep_compiled_programs(Path(cache))
    jax.config.update('jax_platforms', 'cpu')  # where PyTorch's are, whatever else the machine has
    config = base_config(f'{case.model}_dropout')
    config.batch_size, config.compute_dtype = case.batch_size, case.dtype
    setup = synthetic_setup(config)
    images, labels = setup.place(setup.dataset.train)
    empty = setup.empty_totals(len(labels))
    indices = np.arange(case.batch_size, dtype=np.int32).reshape(1, 1, -1)
    holder = [setup.create_state()]
    weights = to_torch(setup, holder[0].variables)

    def logits() -> np.ndarray:
        batch = setup.normalize(images[:64])
        return np.asarray(jax.jit(setup.model.apply, static_argnames='train')(holder[0].variables, batch, train=False))

    def train(num_steps: int) -> None:
        for _ in range(num_steps):
            holder[0], sums = setup.train_step(holder[0], images, labels, indices)
        jax.block_until_ready(sums)

    def evaluate(num_steps: int) -> None:
        for _ in range(num_steps):
            totals = setup.evaluation_step(holder[0].variables, empty, images, labels, indices)
        jax.block_until_ready(totals)

    serve(connection, {'weights': lambda: weights, 'logits': logits, 'train': train, 'evaluate': evaluate})


def peer(case: Case, variant: str, weights: dict[str, np.ndarray], cache: str, connection: Connection) -> None:
    """A process that trains and evaluates PyTorch's model as it is told; compiled programs are kept in a directory."""
    os.environ['TORCHINDUCTOR_CACHE_DIR'] = cache
    import torch
    from torch.nn import functional

    from benchmarks.torch_reference import MODELS

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    from flax_dlvc.data import CIFAR10_MEAN, CIFAR10_STD

    config = base_config(f'{case.model}_dropout')
    model = MODELS[case.model](config.dropout_rate)
    state = {name: torch.from_numpy(value) for name, value in weights.items()}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert all(name.endswith('num_batches_tracked') for name in missing), missing
    layout = torch.contiguous_format if variant == 'eager' else torch.channels_last
    model = model.to(memory_format=layout)
    decayed = [parameter for name, parameter in model.named_parameters() if parameter.ndim > 1]
    spared = [parameter for name, parameter in model.named_parameters() if parameter.ndim <= 1]
    groups = [{'params': decayed, 'weight_decay': 0.01}, {'params': spared, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    network = torch.compile(model) if variant == 'compile' else model
    images_nhwc, labels_array = synthetic_split()
    images, labels = torch.from_numpy(images_nhwc).permute(0, 3, 1, 2), torch.from_numpy(labels_array).long()
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (CIFAR10_MEAN, CIFAR10_STD))
    indices = torch.arange(case.batch_size)

    def forward(chosen: torch.Tensor) -> torch.Tensor:
        batch = ((images[chosen].float() / 255 - mean) / std).contiguous(memory_format=layout)
        with torch.autocast('cpu', torch.bfloat16, enabled=case.dtype == 'bfloat16'):
            return network(batch)

    def logits() -> np.ndarray:
        model.eval()
        with torch.inference_mode():
            return forward(torch.arange(64)).float().numpy()

    def train(num_steps: int) -> None:
        model.train()
        for _ in range(num_steps):
            optimizer.zero_grad()
            functional.cross_entropy(forward(indices).float(), labels[indices]).backward()
            optimizer.step()

    def evaluate(num_steps: int) -> None:
        model.eval()
        with torch.inference_mode():
            for _ in range(num_steps):
                outputs = forward(indices).float()
                functional.cross_entropy(outputs, labels[indices], reduction='sum').item()
                (outputs.argmax(1) == labels[indices]).sum().item()

    serve(connection, {'logits': logits, 'train': train, 'evaluate': evaluate})


def serve(connection: Connection, functions: dict[str, Any]) -> None:
    """Answers (name, arguments) with (value, seconds) until it is told to stop; then with the peak memory in bytes."""
    while (request := connection.recv()) is not None:
        name, *arguments = request
        start = time.perf_counter()
        value = functions[name](*arguments)
        connection.send((value, time.perf_counter() - start))
    connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


class Contender:
    """A process at work, seen from the one that measures."""

    def __init__(self, target: Any, *arguments: Any):
        context = multiprocessing.get_context('spawn')
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(*arguments, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, *request: Any) -> tuple[Any, float]:
        """The value of a function there and the seconds that it took.

        Raises:
            EOFError: the process has ended.
        """
        try:
            self._connection.send(request)
            return self._connection.recv()
        except ConnectionError as error:  # it ended before it was asked, or before it had read that
            raise EOFError from error

    def warm_up(self, name: str, turn_seconds: float) -> tuple[float, int]:
        """Of a function that is told how often to do something, the seconds of the first time, in which it is compiled.

        And how many times after that last about `turn_seconds`, at least one.
        """
        first = self.ask(name, 1)[1]
        seconds = min(self.ask(name, 1)[1] for _ in range(2))
        return first, max(1, round(turn_seconds / seconds))

    def stop(self) -> int:
        """Ends the process; its peak memory in bytes."""
        self._connection.send(None)
        peak = self._connection.recv()
        self._process.join()
        return peak


def compare(case: Case, variants: tuple[str, ...], *, rounds: int, turn_seconds: float) -> dict[str, Any]:
    """Measures one case.

    Args:
        case: what to measure.
        variants: of PyTorch: 'eager', 'channels_last', 'compile'; those that fail are named with their reason.
        rounds: turns of every contender, each by a new process.
        turn_seconds: a turn takes as many steps as last about that long, at least one.

    Returns:
        For every contender `first_step_seconds` (the first time), `peak_bytes`, `train` and `evaluate` (images/s in
        each turn), and `logits_difference`, the largest from ours.
    """
    results: dict[str, dict[str, Any]] = {name: {'train': [], 'evaluate': []} for name in ('ours', *variants)}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(rounds):
            contenders = _start(case, cache, results)
            for phase, (name, contender) in itertools.product(('train', 'evaluate'), contenders.items()):
                first, num_steps = contender.warm_up(phase, turn_seconds)
                results[name].setdefault('first_step_seconds', first)
                seconds = contender.ask(phase, num_steps)[1]
                results[name][phase].append(num_steps * case.batch_size / seconds)
            for name, contender in contenders.items():
                results[name]['peak_bytes'] = max(contender.stop(), results[name].get('peak_bytes', 0))
    return dataclasses.asdict(case) | {'contenders': results}


def _start(case: Case, cache: str, results: dict[str, dict[str, Any]]) -> dict[str, Contender]:
    """Starts ours and each variant that has results and has not failed, with our weights; notes who fails."""
    contenders = {'ours': Contender(ours, case, cache)}
    weights, expected = (contenders['ours'].ask(name)[0] for name in ('weights', 'logits'))
    for variant in [name for name in results if name != 'ours' and 'failed' not in results[name]]:
        contender = Contender(peer, case, variant, weights, cache)
        try:
            difference = float(np.abs(contender.ask('logits')[0] - expected).max())
        except EOFError:
            results[variant] = {'failed': 'its process ended; see above'}
            continue
        tolerance = 1e-3 if case.dtype == 'float32' else 0.05 * float(np.abs(expected).max())
        if difference > tolerance:
            raise AssertionError(f'{case}: logits of {variant} differ by {difference}')
        results[variant]['logits_difference'] = difference
        contenders[variant] = contender
    return contenders


def ratios(contenders: dict[str, dict[str, Any]], phase: str, peers: tuple[str, ...]) -> tuple[float, float, float]:
    """Lowest, median and highest of our images/s over the best of the peers' in the same turn."""
    measured = [contenders[name][phase] for name in peers if phase in contenders.get(name, {})]
    values = [mine / max(theirs) for mine, *theirs in zip(contenders['ours'][phase], *measured, strict=True)]
    return min(values), statistics.median(values), max(values)
