"""How much of a device's arithmetic a training step uses: its FLOPs per second over those of a large matrix product.

The product of two square matrices, in bfloat16 (on a CPU: float32), is measured on the same device, in turns with the
steps. FLOPs are those of `count_flops`, which leaves out what convolutions multiply with the padding's zeros.
"""

import dataclasses
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.throughput import IMAGES, Case, Contender, serve, synthetic_setup
from flax_dlvc.results import base_config


def count_flops(setup: Any) -> tuple[float, float]:
    """FLOPs of a training and of an evaluation step on one accelerator, by XLA's cost analysis of what is lowered.

    Counted in the programs as they were written, before a backend replaces operations by calls that XLA cannot look
    into, and on the CPU backend, which is always there: that of GPUs does not count.
    """
    import jax

    from flax_dlvc.models.layers import traced_for

    setup = dataclasses.replace(setup, devices=jax.devices('cpu')[:1])
    split, totals = setup.place(setup.dataset.test), setup.empty_totals(len(setup.dataset.test))
    batch, test_batch = (
        np.zeros((1, 1, size), np.int32) for size in (setup.config.batch_size, setup.config.evaluation_batch_size)
    )
    with traced_for('gpu'):
        train = setup.lower_train_step(batch)
        test = setup.evaluation_step.lower(setup.abstract_state.variables, totals, *split, test_batch)
    return train.cost_analysis()['flops'], test.cost_analysis()['flops']


def worker(case: Case, stem: str, connection: Connection) -> None:
    """A process that calls the training step or the product n times: `train(n)`, `product(n)`."""
    import jax
    import jax.numpy as jnp

    from flax_dlvc.steps import default_steps_per_call

    config = base_config(case.model)
    config.batch_size, config.compute_dtype, config.model.stem = case.batch_size, case.dtype, stem
    setup = synthetic_setup(config)
    split = setup.place(setup.dataset.train)
    steps_per_call = default_steps_per_call(50)
    indices = np.arange(steps_per_call * case.batch_size, dtype=np.int32).reshape(1, steps_per_call, -1) % IMAGES
    holder = [setup.create_state()]

    size, dtype = (2048, 'float32') if setup.devices[0].platform == 'cpu' else (8192, 'bfloat16')
    factors = [jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0))]
    multiply = jax.jit(jnp.matmul)

    def about() -> dict[str, Any]:
        return {
            'device': setup.devices[0].device_kind,
            'flops_per_image': count_flops(setup)[0] / case.batch_size,
            'product': f'{size} x {size}, {dtype}',
            'images_per_call': indices.size,
            'flops_per_product': 2 * size**3,
        }

    def train(num_calls: int) -> None:
        for _ in range(num_calls):
            holder[0], sums = setup.train_step(holder[0], *split, indices)
        jax.block_until_ready(sums)

    def product(num_calls: int) -> None:
        for _ in range(num_calls):
            result = multiply(*factors)
        result.block_until_ready()

    serve(connection, {'about': about, 'train': train, 'product': product})


def measure(case: Case, stem: str, *, rounds: int, turn_seconds: float) -> dict[str, Any]:
    """Measures one case; of ResNet18, `stem` is that of the model.

    Returns:
        `device`, `flops_per_image`, what the `product` was, and for every round `images` and `flops`, both per second:
        of the training step and of the product.
    """
    contender = Contender(worker, case, stem)
    about = contender.ask('about')[0]
    work = {'train': about.pop('images_per_call'), 'product': about.pop('flops_per_product')}
    num_calls = {phase: contender.warm_up(phase, turn_seconds)[1] for phase in work}
    speeds: dict[str, list[float]] = {phase: [] for phase in work}
    for _ in range(rounds):
        for phase, amount in work.items():
            seconds = contender.ask(phase, num_calls[phase])[1]
            speeds[phase].append(num_calls[phase] * amount / seconds)
    contender.stop()
    return about | {'images': speeds['train'], 'flops': speeds['product']}


def shares(value: dict[str, Any]) -> list[float]:
    """Of each round, the step's FLOP/s over the product's."""
    return [
        images * value['flops_per_image'] / flops for images, flops in zip(value['images'], value['flops'], strict=True)
    ]
