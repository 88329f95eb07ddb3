"""Learning-rate schedules and the optimiser, all of it optax."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

# A stack (N, KH, KW, C, O) of kernels as N matrices (KH KW C, O).
KERNELS = optax.contrib.MuonDimensionNumbers(reduction_axis=(1, 2, 3), output_axis=4)


def make_schedule(config: ConfigDict, steps_per_epoch: int, peak: float | jax.Array) -> optax.Schedule:
    """Learning rate as a function of the step, as `config.schedule` describes it; `peak` is its highest.

    'exponential' multiplies by `decay_per_epoch` after each epoch (PyTorch's `ExponentialLR`); 'linear' and 'cosine'
    fall to 0 at the end; 'one_cycle' is Smith and Topin's (2018, arXiv:1708.07120) with optax's defaults: up to the
    peak over 30 % of the run, then down again.
    """
    total_steps = config.num_epochs * steps_per_epoch
    if config.schedule.name == 'one_cycle':
        return optax.cosine_onecycle_schedule(total_steps, peak)
    warmup_steps = round(config.schedule.warmup_epochs * steps_per_epoch)
    if config.schedule.name == 'cosine':
        after_warmup = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup_steps))
    elif config.schedule.name == 'linear':
        after_warmup = optax.linear_schedule(peak, 0.0, max(1, total_steps - warmup_steps))
    elif config.schedule.name == 'constant':
        after_warmup = optax.constant_schedule(peak)
    elif config.schedule.name == 'exponential':
        decay = optax.exponential_decay(peak, 1, config.schedule.decay_per_epoch)

        def after_warmup(step: jax.Array) -> jax.Array:
            # optax would divide as floats, which XLA makes a product: 61 steps by 1/61 are less than an epoch.
            return decay(step // steps_per_epoch)
    else:
        raise ValueError(f'no schedule is called {config.schedule.name!r}')
    if not warmup_steps:
        return after_warmup
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after_warmup], [warmup_steps])


def make_optimizer(
    config: ConfigDict, steps_per_epoch: int, learning_rate: float | jax.Array
) -> optax.GradientTransformation:
    """The optax chain: optional clipping by global norm, then AdamW, SGD with momentum, or Muon.

    `learning_rate` is the schedule's peak, beside the config so that a compiled step can take it as an argument.

    Weight decay applies to kernels only, except with Muon (see there). It is decoupled in AdamW (Loshchilov and Hutter
    2019, arXiv:1711.05101) and added to the gradient in SGD, as in PyTorch.
    """
    optimizer = config.optimizer
    schedule = make_schedule(config, steps_per_epoch, learning_rate)
    if optimizer.name == 'adamw':
        update = optax.adamw(schedule, weight_decay=optimizer.weight_decay, mask=named('kernel'))
    elif optimizer.name == 'muon':
        update = make_muon(config, schedule, steps_per_epoch, learning_rate)
    elif optimizer.name == 'sgd':
        update = optax.chain(
            optax.add_decayed_weights(optimizer.weight_decay, mask=named('kernel')),
            optax.sgd(schedule, momentum=optimizer.momentum),
        )
    else:
        raise ValueError(f'no optimizer is called {optimizer.name!r}')
    if optimizer.gradient_clip_norm > 0:
        update = optax.chain(optax.clip_by_global_norm(optimizer.gradient_clip_norm), update)
    return update


def named(*names: str) -> Callable[[Any], Any]:
    """A mask of parameters: True for those with one of the names; dense and convolutional layers have a 'kernel'."""
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)


def make_muon(
    config: ConfigDict, schedule: optax.Schedule, steps_per_epoch: int, learning_rate: float | jax.Array
) -> optax.GradientTransformation:
    """Muon on the kernels of convolutions and SGD with Nesterov momentum on everything else.

    Muon (Jordan et al. 2024) steps along the momentum with its singular values brought near 1, and before each step
    brings every kernel to airbench's norm, the root of the number of its output channels. The whitening bias of
    `airbench` is trained in the first epochs only. Rates relative to the schedule are `config.optimizer`'s, and so is
    weight decay: here it is the share that dense kernels and biases lose in a step at the highest rate, times what
    momentum adds up. `fast94` has airbench's; AdamW's default is far above it.
    """
    optimizer = config.optimizer
    first_steps = round(optimizer.whitening_bias_epochs * steps_per_epoch)
    early = optax.linear_schedule(learning_rate, 0.0, first_steps) if first_steps else optax.constant_schedule(0.0)

    def sgd(schedule: optax.Schedule, factor: float) -> optax.GradientTransformation:
        # PyTorch's order: decay is added to the gradient, so that the schedule and the momentum scale it as well.
        decay = optimizer.weight_decay / (learning_rate * factor)
        step = optax.sgd(lambda step: factor * schedule(step), momentum=optimizer.sgd_momentum, nesterov=True)
        decayed = named('kernel', 'bias')  # all that airbench has; scales of norms, tokens and positions are spared
        return optax.chain(optax.add_decayed_weights(decay, mask=decayed), step)

    muon = optax.chain(
        stacked(
            optax.contrib.scale_by_muon(
                ns_steps=optimizer.newton_schulz_steps,
                beta=optimizer.momentum,
                weight_dimension_numbers=lambda stacks: dict.fromkeys(stacks, KERNELS),
            )
        ),
        optax.scale_by_learning_rate(schedule),
        renormalize(),
    )
    return optax.partition(
        {
            'muon': muon,
            'classifier': sgd(schedule, optimizer.classifier_factor),
            'bias': sgd(schedule, optimizer.bias_factor),
            'whitening bias': sgd(early, optimizer.bias_factor),
        },
        muon_groups,
    )


def muon_groups(params: Any) -> Any:
    """For each parameter, which rule of `make_muon` trains it."""

    def group(path: Any, param: jax.Array) -> str:
        if path[-1].key == 'kernel':
            return 'muon' if param.ndim == 4 else 'classifier'
        return 'whitening bias' if path[0].key == 'whitening' else 'bias'

    return jax.tree_util.tree_map_with_path(group, params)


def stacked(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on arrays of one shape stacked along a new first axis: its matrix products run in batches."""

    def stack(tree: Any) -> dict[str, jax.Array]:
        shapes: dict[str, list[jax.Array]] = {}
        for leaf in jax.tree.leaves(tree):
            shapes.setdefault('x'.join(map(str, leaf.shape)), []).append(leaf)
        return {shape: jnp.stack(leaves) for shape, leaves in shapes.items()}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        stacks, state = inner.update(stack(updates), state, None if params is None else stack(params))
        rows = {shape: iter(stack) for shape, stack in stacks.items()}
        return jax.tree.map(lambda leaf: next(rows['x'.join(map(str, leaf.shape))]), updates), state

    return optax.GradientTransformation(lambda params: inner.init(stack(params)), update)


def renormalize() -> optax.GradientTransformation:
    """Rescales each kernel (KH, KW, C, O) to a norm of root O before its update, by adding the difference to that."""

    def add(update: jax.Array, param: jax.Array) -> jax.Array:
        return update + (param.shape[-1] ** 0.5 / jnp.linalg.norm(param) - 1) * param

    return optax.stateless(lambda updates, params: jax.tree.map(add, updates, params))
