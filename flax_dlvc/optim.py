"""Learning-rate schedules and the optimiser, all of it optax."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict


def make_schedule(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate as a function of the step, as `config.schedule` describes it.

    'exponential' multiplies by `decay_per_epoch` after each epoch (PyTorch's `ExponentialLR`); 'cosine' falls to 0 at
    the end; 'one_cycle' is Smith and Topin's (2018, arXiv:1708.07120) with optax's defaults: up to the peak over 30 %
    of the run, then down again.
    """
    total_steps = config.num_epochs * steps_per_epoch
    warmup_steps = round(config.schedule.warmup_epochs * steps_per_epoch)
    peak = config.learning_rate
    if config.schedule.name == 'one_cycle':
        return optax.cosine_onecycle_schedule(total_steps, peak)
    if config.schedule.name == 'cosine':
        after_warmup = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup_steps))
    elif config.schedule.name == 'exponential':
        after_warmup = optax.exponential_decay(peak, steps_per_epoch, config.schedule.decay_per_epoch, staircase=True)
    else:
        after_warmup = optax.constant_schedule(peak)
    if not warmup_steps:
        return after_warmup
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after_warmup], [warmup_steps])


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optax chain: optional clipping by global norm, then AdamW or SGD with momentum.

    Weight decay applies to kernels only. It is decoupled in AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) and
    added to the gradient in SGD, as in PyTorch.
    """
    optimizer = config.optimizer
    if optimizer.name == 'adamw':
        update = optax.adamw(schedule, weight_decay=optimizer.weight_decay, mask=kernels_only)
    else:
        update = optax.chain(
            optax.add_decayed_weights(optimizer.weight_decay, mask=kernels_only),
            optax.sgd(schedule, momentum=optimizer.momentum),
        )
    if optimizer.gradient_clip_norm > 0:
        update = optax.chain(optax.clip_by_global_norm(optimizer.gradient_clip_norm), update)
    return update


def kernels_only(params: Any) -> Any:
    """True for the kernels of dense and convolutional layers: not for biases, norms, tokens and positions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', params)
