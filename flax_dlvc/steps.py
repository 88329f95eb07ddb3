"""The training state, the training step and the evaluation step; the only file that maps over devices.

Shapes: D devices, S steps in one call, B examples per device and step, N examples, H W C image, K classes.

Every step takes the whole split, which lies on the devices, and the indices of the examples to use. The state is
replicated: it goes in and comes out without a leading device axis.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from flax_dlvc.augment import BatchAugmentation, augment_batch, evaluation_views
from flax_dlvc.errors import ConfigError
from flax_dlvc.metrics import Predictions, Sums, cross_entropy

AXIS = 'devices'


class TrainState(flax.struct.PyTreeNode):
    """All that training depends on, besides the config and the data.

    `ema` has moving averages of `params` and `batch_stats`, under their names, or is empty: batch statistics belong to
    the parameters that they were made with, so both are averaged alike. `sums` are those of the current epoch, so that
    an epoch can be left and taken up again in its middle.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: dict[str, Any]
    sums: Sums

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is evaluated with."""
        return self.ema or {'params': self.params, 'batch_stats': self.batch_stats}


def run_devices(num_devices: int) -> list[jax.Device]:
    """The devices of the run, process by process: of each the first `num_devices`; all of them for 0.

    Raises:
        ConfigError: a process has fewer, or not as many as the others.
    """
    counts = [len(jax.local_devices(process)) for process in range(jax.process_count())]
    if num_devices > min(counts):
        raise ConfigError(f'num_devices is {num_devices}, but there are {min(counts)} devices')
    if not num_devices and min(counts) < max(counts):
        raise ConfigError(f'the processes have {counts} devices; set --config.num_devices={min(counts)}')
    return [device for process in range(len(counts)) for device in jax.local_devices(process)[: num_devices or None]]


def local_positions(devices: Sequence[jax.Device]) -> list[int]:
    """Which of the run's devices are this process's."""
    return [position for position, device in enumerate(devices) if device.process_index == jax.process_index()]


def default_steps_per_call(steps_per_epoch: int) -> int:
    """Steps worth compiling into one call: one on a CPU, where a loop slows convolutions and dispatch is cheap.

    Elsewhere 50, or a little less where that divides the epoch: a call of the rest would be another program to compile.
    """
    if jax.default_backend() == 'cpu':
        return 1
    largest = max(steps for steps in range(1, 51) if steps_per_epoch % steps == 0)
    return largest if largest >= 20 or largest == steps_per_epoch else 50


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: Sequence[int],
    num_classes: int,
    seed: int | jax.Array,
    ema_decay: float = 0.0,
    images: jax.Array | None = None,
) -> TrainState:
    """Initialises a state on one device; a pure function of its arguments.

    `images` (N, H, W, C), normalised, are what a model that is initialised from data sees; a black one by default.
    """
    key, _, _ = keys_of(seed)
    variables = model.init(key, jnp.zeros((1, *image_shape)) if images is None else images, train=False)
    variables = {'params': variables['params'], 'batch_stats': variables.get('batch_stats', {})}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        **variables,
        opt_state=optimizer.init(variables['params']),
        ema=jax.tree.map(jnp.copy, variables) if ema_decay else {},
        sums=Sums.empty(num_classes),
    )


def keys_of(seed: int | jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Independent keys for initialisation, augmentation and dropout."""
    init_key, augmentation_key, dropout_key = jax.random.split(jax.random.key(seed), 3)
    return init_key, augmentation_key, dropout_key


def replicated(devices: Sequence[jax.Device]) -> jax.sharding.Sharding:
    """The sharding of the state (over all devices) and of a split (over this process's): a copy on every device."""
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def make_train_step(
    *,
    model: nn.Module,
    make_optimizer: Callable[[jax.Array], optax.GradientTransformation],
    mean: Sequence[float],
    std: Sequence[float],
    label_smoothing: float,
    augment: BatchAugmentation = augment_batch,
    ema_decay: float = 0.0,
    accumulate_steps: int = 1,
    devices: Sequence[jax.Device],
) -> 'OnDevices':
    """Builds the training step: S updates on D devices, each on the D * B examples that the indices name.

    Augmentation of single images has a key per step and example, so it does not depend on the number of devices; mixing
    and dropout have a key per step, device and part of a batch, so they do. Batch normalisation uses the statistics of
    each device and part, unless the model synchronises them over `AXIS`, and the running ones are averaged over the
    devices.

    Args:
        model: maps float images (B, H, W, C) to logits (B, K).
        make_optimizer: maps the learning rate to what turns averaged gradients into updates.
        mean: per channel, on the scale [0, 1].
        std: per channel, on the scale [0, 1].
        label_smoothing: probability mass spread over all classes; the reported loss contains it.
        augment: applied to each part of a batch, before normalisation; labels are mixed as it says.
        ema_decay: of the moving averages of parameters and batch statistics, per step; 0 keeps none.
        accumulate_steps: parts that each device's batch is cut into, one after the other, their gradients averaged.
        devices: to run on; the state and the split must be replicated over them.

    Returns:
        The compiled step. It takes the seed of augmentation and dropout (uint32) and the learning rate (float32; both
        so that runs that differ in them share the program), the state (and frees it), images (N, H, W, C), labels (N,)
        and indices (D, S, B), and returns the new state and a copy of its sums that the next call does not free.
    """

    def loss_function(
        params: Any, state: TrainState, images: jax.Array, labels: jax.Array, share: jax.Array | None, key: jax.Array
    ) -> tuple[jax.Array, tuple[Sums, Any]]:
        variables = {'params': params, 'batch_stats': state.batch_stats}
        logits, updated = model.apply(variables, images, train=True, mutable=['batch_stats'], rngs={'dropout': key})
        losses = cross_entropy(logits, labels, label_smoothing)
        if share is not None:
            losses = share * losses + (1 - share) * cross_entropy(logits, jnp.roll(labels, 1), label_smoothing)
        mask = jnp.ones_like(labels, bool)
        sums = Sums.from_model_output(losses=losses, logits=logits, labels=labels, mask=mask)
        return losses.mean(), (sums, updated.get('batch_stats', {}))

    def differentiate(
        state: TrainState, images: jax.Array, labels: jax.Array, indices: jax.Array, keys: tuple[jax.Array, jax.Array]
    ) -> tuple[Any, Sums, Any]:
        augmentation_key, dropout_key = keys
        batch, share = augment(augmentation_key, images[indices], indices, state.step)
        gradient_function = jax.grad(loss_function, has_aux=True)
        gradients, (sums, batch_stats) = gradient_function(
            state.params, state, normalize(batch, mean, std), labels[indices], share, dropout_key
        )
        return gradients, sums, batch_stats

    def accumulate(
        state: TrainState, images: jax.Array, labels: jax.Array, indices: jax.Array, keys: tuple[jax.Array, jax.Array]
    ) -> tuple[Any, Sums, Any]:
        def add(carry: tuple[Any, Sums, Any], part: tuple[jax.Array, jax.Array]) -> tuple[tuple[Any, Sums, Any], None]:
            total, sums, batch_stats = carry
            number, indices = part
            part_keys = augmentation_key, jax.random.fold_in(dropout_key, number)
            gradients, new_sums, batch_stats = differentiate(
                state.replace(batch_stats=batch_stats), images, labels, indices, part_keys
            )
            return (jax.tree.map(jnp.add, total, gradients), sums.merge(new_sums), batch_stats), None

        augmentation_key, dropout_key = keys
        nothing = jax.tree.map(jnp.zeros_like, (state.params, state.sums))
        parts = jnp.arange(accumulate_steps), indices.reshape(accumulate_steps, -1)
        (total, sums, batch_stats), _ = jax.lax.scan(add, (*nothing, state.batch_stats), parts)
        return jax.tree.map(lambda gradient: gradient / accumulate_steps, total), sums, batch_stats

    gradients_of = differentiate if accumulate_steps == 1 else accumulate

    def update(
        seed: jax.Array,
        learning_rate: jax.Array,
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        indices: jax.Array,
    ) -> TrainState:
        _, augmentation_key, dropout_key = keys_of(seed)
        dropout_key = jax.random.fold_in(jax.random.fold_in(dropout_key, state.step), jax.lax.axis_index(AXIS))
        gradients, sums, batch_stats = gradients_of(state, images, labels, indices, (augmentation_key, dropout_key))
        gradients, batch_stats = jax.lax.pmean((gradients, batch_stats), AXIS)
        updates, opt_state = make_optimizer(learning_rate).update(gradients, state.opt_state, state.params)
        variables = {'params': optax.apply_updates(state.params, updates), 'batch_stats': batch_stats}
        return TrainState(
            step=state.step + 1,
            **variables,
            opt_state=opt_state,
            ema=optax.incremental_update(variables, state.ema, 1 - ema_decay) if ema_decay else {},
            sums=state.sums.merge(jax.lax.psum(sums, AXIS)),
        )

    def train_step(
        seed: jax.Array,
        learning_rate: jax.Array,
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        indices: jax.Array,
    ) -> tuple[TrainState, Sums]:
        state = _fold(lambda state, batch: update(seed, learning_rate, state, images, labels, batch), state, indices)
        return state, state.sums

    by_device = jax.pmap(
        train_step,
        AXIS,
        in_axes=(None, None, None, None, None, 0),
        out_axes=(None, None),
        donate_argnums=2,
        devices=devices,
    )
    return OnDevices(by_device, devices)


def make_evaluation_step(
    *, logits_of: Callable[[Any, jax.Array], jax.Array], devices: Sequence[jax.Device]
) -> 'OnDevices':
    """Builds the evaluation step: adds the examples that the indices (D, S, B) name to the totals; -1 names none.

    Each example is named once; the totals have a prediction for each of the `images`.

    Args:
        logits_of: maps variables and images (B, H, W, C) uint8 to logits (B, K).
        devices: to run on; variables, totals and the split must be replicated over them.

    Returns:
        The compiled step: (variables, totals, images (N, H, W, C), labels (N,), indices) -> totals.
    """

    def add(
        totals: tuple[Sums, Predictions], variables: Any, images: jax.Array, labels: jax.Array, indices: jax.Array
    ) -> tuple[Sums, Predictions]:
        logits, known = logits_of(variables, images[indices]), labels[indices]
        losses = cross_entropy(logits, known)
        sums = Sums.from_model_output(losses=losses, logits=logits, labels=known, mask=indices >= 0)
        predictions = Predictions.from_model_output(logits, indices, len(labels))
        return jax.tree.map(jnp.add, totals, jax.lax.psum((sums, predictions), AXIS))

    def evaluation_step(
        variables: Any, totals: tuple[Sums, Predictions], images: jax.Array, labels: jax.Array, indices: jax.Array
    ) -> tuple[Sums, Predictions]:
        return _fold(lambda totals, batch: add(totals, variables, images, labels, batch), totals, indices)

    by_device = jax.pmap(evaluation_step, AXIS, in_axes=(None, None, None, None, 0), out_axes=None, devices=devices)
    return OnDevices(by_device, devices)


def average_logits(model: nn.Module, variables: Any, images: jax.Array, views: str = 'none') -> jax.Array:
    """Logits (B, K) of images (B, H, W, C), normalised, averaged over the `views` of `augment.evaluation_views`."""
    seen, weights = evaluation_views(images, views)
    logits: Any = model.apply(variables, seen.reshape(-1, *images.shape[1:]), train=False)
    if len(weights) > 1:
        logits = jnp.tensordot(weights, logits.reshape(*seen.shape[:2], -1), 1, precision='highest')
    return logits


class OnDevices:
    """A `pmap` that takes, as its last argument, the indices (D, …) of all processes' devices."""

    def __init__(self, step: Any, devices: Sequence[jax.Device]):
        self._step = step
        self._local = local_positions(devices)
        self._mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))

    def __call__(self, *arguments: Any) -> Any:
        """Returns arrays that all processes share.

        On several CPU devices it waits for each call, as collectives deadlock there when calls run ahead.
        """
        results = self._step(*self._localized(arguments))
        devices = self._mesh.devices
        if len(self._local) < devices.size:  # `pmap` returns each process its own copies
            results = multihost_utils.host_local_array_to_global_array(
                results, self._mesh, jax.sharding.PartitionSpec()
            )
        return jax.block_until_ready(results) if devices.size > 1 and devices[0].platform == 'cpu' else results

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """As that of `jax.jit`: for arguments of which shapes and placement are enough."""
        return self._step.lower(*self._localized(arguments))

    def _localized(self, arguments: Sequence[Any]) -> Sequence[Any]:
        *whole, by_device = arguments
        return *whole, by_device[self._local]


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Images (B, H, W, C) in [0, 1] to zero mean and unit deviation per channel."""
    return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def _fold(function: Callable[[Any, jax.Array], Any], carry: Any, batches: jax.Array) -> Any:
    """Applies `function(carry, batch)` for each of batches (S, B); a single one without a loop around it."""
    if len(batches) == 1:
        return function(carry, batches[0])
    return jax.lax.scan(lambda carry, batch: (function(carry, batch), None), carry, batches)[0]


def calls(batches: np.ndarray, first_step: int, steps_per_call: int) -> list[np.ndarray]:
    """Cuts steps (steps, D, B), from `first_step` on, into the calls' indices (D, S, B), S <= steps_per_call."""
    return [
        batches[start : start + steps_per_call].swapaxes(0, 1)
        for start in range(first_step, len(batches), steps_per_call)
    ]
