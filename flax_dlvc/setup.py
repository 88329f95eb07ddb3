"""What a config stands for: its dataset, model, optimiser, devices and compiled steps, built once per run."""

import dataclasses
import math
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from flax_dlvc import checkpoint, data, decoded, optim, runtime, steps
from flax_dlvc.augment import make_batch_augmentation
from flax_dlvc.config import BATCH_NORM_MODELS
from flax_dlvc.errors import ConfigError, first_line
from flax_dlvc.metrics import Predictions, Sums
from flax_dlvc.models import create_model
from flax_dlvc.profiling import timed


@dataclasses.dataclass(frozen=True)
class Setup:
    """A config, its data in host memory, and what is derived from the two; nothing is compiled before it is used."""

    config: ConfigDict
    dataset: data.Dataset
    devices: list[jax.Device]

    @property
    def num_classes(self) -> int:
        """Classes of the dataset, outputs of the model."""
        return len(self.dataset.class_names)

    @property
    def environment(self) -> dict[str, str]:
        """What computes: versions, devices, and the package's commit where it lies in a git checkout."""
        devices = f'{len(self.devices)} x {self.devices[0].device_kind}'
        return checkpoint.versions() | {'devices': devices, 'commit': _commit()}

    @property
    def steps_per_epoch(self) -> int:
        """Training steps in an epoch; the examples that do not fill a batch sit it out."""
        return len(self.dataset.train) // self.config.batch_size

    @property
    def steps_per_call(self) -> int:
        """Steps in one compiled call."""
        return self.config.steps_per_call or steps.default_steps_per_call(self.steps_per_epoch)

    def training_calls(self, epoch: int, first_step: int = 0) -> list[np.ndarray]:
        """The indices (D, S, B) that the calls of the training step take in an epoch, from its step `first_step` on."""
        return steps.calls(self.training_batches(epoch), first_step, self.steps_per_call)

    def training_batches(self, epoch: int) -> np.ndarray:
        """The indices (steps, D, B) of an epoch's batches, in its order."""
        order = data.epoch_order(len(self.dataset.train), self.config.seed, epoch)
        return data.training_batches(order, self.config.batch_size, len(self.devices))

    @property
    def replicated(self) -> jax.sharding.Sharding:
        """A copy on every device of the run."""
        return steps.replicated(self.devices)

    @property
    def _replicated_here(self) -> jax.sharding.Sharding:
        """A copy on every device of this process."""
        return steps.replicated([self.devices[position] for position in steps.local_positions(self.devices)])

    @cached_property
    def model(self) -> nn.Module:
        """The model, without parameters."""
        return create_model(
            num_classes=self.num_classes,
            dropout_rate=self.config.dropout_rate,
            dtype=self.config.compute_dtype,
            batch_norm_axis=steps.AXIS if self.config.synchronize_batch_norm else None,
            **self.config.model,
        )

    def smallest_map(self) -> int:
        """Pixels of the smallest map that the model hands to `layers.expose`, or of the image where it hands none."""
        image = jax.ShapeDtypeStruct((1, *self.dataset.image_shape), np.float32)
        variables = jax.eval_shape(partial(self.model.init, train=False, mutable=True), jax.random.key(0), image)
        maps = jax.tree.leaves(variables.get('intermediates', {}))
        return min((math.prod(found.shape[1:3]) for found in maps), default=math.prod(self.dataset.image_shape[:2]))

    @cached_property
    def schedule(self) -> optax.Schedule:
        """Learning rate by step, one program: what is small takes longer to compile than to compute."""
        return jax.jit(optim.make_schedule(self.config, self.steps_per_epoch, self.config.learning_rate))

    @property
    def train_step(self) -> partial[tuple[steps.TrainState, Sums]]:
        """The training step of `steps.make_train_step`, with the config's seed and learning rate."""
        return partial(self._train_step, *self._of_the_run)

    @cached_property
    def _train_step(self) -> steps.OnDevices:
        return steps.make_train_step(
            model=self.model,
            make_optimizer=partial(optim.make_optimizer, self.config, self.steps_per_epoch),
            mean=self.dataset.mean,
            std=self.dataset.std,
            label_smoothing=self.config.label_smoothing,
            augment=make_batch_augmentation(self.config.augment, self.dataset.mean, self.steps_per_epoch),
            ema_decay=self.config.ema_decay,
            accumulate_steps=self.config.accumulate_steps,
            devices=self.devices,
        )

    @cached_property
    def evaluation_step(self) -> steps.OnDevices:
        """The evaluation step of `steps.make_evaluation_step`."""
        return steps.make_evaluation_step(logits_of=self.logits, devices=self.devices)

    def normalize(self, images: jax.Array) -> jax.Array:
        """Images (B, H, W, C) uint8 as the model sees them, float32."""
        return steps.normalize(images.astype(np.float32) / 255, self.dataset.mean, self.dataset.std)

    def logits(self, variables: Any, images: jax.Array) -> jax.Array:
        """Logits (B, K) of images (B, H, W, C) uint8, averaged over the config's views."""
        return steps.average_logits(self.model, variables, self.normalize(images), self.config.test_time_augmentation)

    def probabilities(self, variables: Any, images: jax.Array) -> jax.Array:
        """Probabilities (B, K) of the classes of images (B, H, W, C) uint8, by the logits that are evaluated."""
        return nn.softmax(self.logits(variables, images))

    @cached_property
    def prediction_step(self) -> jax.stages.Wrapped:
        """`probabilities`, compiled, on one device."""
        return jax.jit(self.probabilities)

    def create_state(self) -> steps.TrainState:
        """The initial training state, on every device."""
        return self._create_state(self._seed, self._example_images)

    @cached_property
    def _create_state(self) -> jax.stages.Wrapped:
        # Compiled as a whole: operation by operation, compiling takes up to seven times as long. It runs once, so LLVM
        # need not work hard: to the same bits, a CNN's takes 0.7 s instead of 1.9, a ResNet18's 2.1 instead of 5.0.
        options = {'xla_backend_optimization_level': 1} if self.devices[0].platform == 'cpu' else None
        return jax.jit(self._initialize, out_shardings=self.replicated, compiler_options=options)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Within, what a run begins with compiles in threads of its own: the initial state and the training step.

        One program keeps XLA busy on one and a half cores. On two, a ViT's take 4.7 s side by side instead of 5.9. Of
        several processes nothing compiles ahead: there `pmap` can be lowered for real arrays only.
        """
        if jax.process_count() > 1:
            yield
            return
        with ThreadPoolExecutor(2) as threads:
            initialization = self._create_state.lower(self._seed, self._example_images)
            compiled = [threads.submit(initialization.compile)]
            compiled.append(threads.submit(self.lower_train_step(self.training_calls(1)[0]).compile))
            yield
            with timed('compile'):
                for each in compiled:
                    each.result()

    def lower_train_step(self, indices: np.ndarray) -> jax.stages.Lowered:
        """The training step as it is lowered for the training split and a call's indices (D, S, B); places nothing."""
        images, labels = (
            jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self._replicated_here)
            for array in (self.dataset.train.images, self.dataset.train.labels)
        )
        return self._train_step.lower(*self._of_the_run, self.abstract_state, images, labels, indices)

    @cached_property
    def abstract_state(self) -> steps.TrainState:
        """Shapes, dtypes and placement of a training state, without its values; what a checkpoint is restored to."""
        return self._create_state.trace(self._seed, self._example_images).out_info  # the trace that is compiled later

    @property
    def _of_the_run(self) -> tuple[np.uint32, np.float32]:
        """What the training step takes besides state and data; runs that differ in it share the program."""
        return self._seed, np.float32(self.config.learning_rate)

    @property
    def _seed(self) -> np.uint32:
        return np.uint32(self.config.seed)

    @property
    def _example_images(self) -> np.ndarray:
        """What a model that is initialised from data sees; to the others it costs nothing."""
        return self.dataset.train.images[:5000]

    def _initialize(self, seed: jax.Array, images: jax.Array) -> steps.TrainState:
        return steps.create_state(
            self.model,
            optim.make_optimizer(self.config, self.steps_per_epoch, self.config.learning_rate),
            self.dataset.image_shape,
            self.num_classes,
            seed,
            self.config.ema_decay,
            self.normalize(images),
        )

    def empty_sums(self) -> Sums:
        """Sums over no examples, on every device."""
        return self.empty_totals(0)[0]

    @cached_property
    def empty_totals(self) -> Callable[[int], tuple[Sums, Predictions]]:
        """What an evaluation of so many examples begins with, on every device."""

        def empty(num_examples: int) -> tuple[Sums, Predictions]:
            return Sums.empty(self.num_classes), Predictions.empty(num_examples)

        return jax.jit(empty, static_argnums=0, out_shardings=self.replicated)

    def variant(self, *, seed: int | None = None, learning_rate: float | None = None) -> 'Setup':
        """The same with another seed or learning rate; what is compiled is shared, since they are arguments of it."""
        config = self.config.copy_and_resolve_references()
        if seed is not None:
            config.seed = seed
        if learning_rate is not None:
            config.learning_rate = learning_rate
        other = dataclasses.replace(self, config=config)
        for name in ('_train_step', 'evaluation_step', '_create_state', 'abstract_state', 'empty_totals'):
            other.__dict__[name] = getattr(self, name)  # where a cached property keeps its value
        return other

    @timed('data')
    def place(self, split: data.Split) -> tuple[jax.Array, jax.Array]:
        """A split's images and labels, on every device of this process."""
        return data.place(split, self._replicated_here)


def prepare_backend(num_devices: int) -> None:
    """Sets what all commands that compute have in common, before JAX or Orbax starts the backend; all devices for 0.

    Raises:
        ConfigError: there is no such backend as JAX_PLATFORMS asks for.
    """
    jax.config.update('jax_enable_x64', False)  # all is written for single precision; some would become double
    runtime.keep_compiled_programs(decoded.cache_directory() / 'compiled')
    runtime.set_cpu_options()
    runtime.give_signals_a_stack()
    try:
        runtime.keep_freed_memory(num_devices)
        jax.default_backend()
    except RuntimeError as error:
        raise ConfigError(f'JAX finds no devices: {first_line(error)}') from error


@timed('start')
def set_up(config: ConfigDict, *, training: bool = True) -> Setup:
    """Loads the data and chooses the devices.

    Args:
        config: a valid config.
        training: whether training has to be possible; a trained model is evaluated on as many devices as there are.

    Raises:
        ConfigError: the dataset cannot be had, or the config does not fit it or the devices.
    """
    prepare_backend(config.num_devices)
    dataset = data.load(config)
    if not training:
        return Setup(config, dataset, steps.run_devices(min(config.num_devices, jax.local_device_count())))
    devices = steps.run_devices(config.num_devices)
    if config.batch_size % len(devices):
        raise ConfigError(
            f'batch_size {config.batch_size} is not divisible by the {len(devices)} devices; '
            'set --config.batch_size or --config.num_devices'
        )
    if config.batch_size // len(devices) % config.accumulate_steps:
        raise ConfigError(
            f'accumulate_steps {config.accumulate_steps} does not divide the {config.batch_size // len(devices)} '
            'examples that each device has in a step; set --config.accumulate_steps'
        )
    side = min(dataset.image_shape[:2])
    for field in ('random_translate', 'cutout'):
        if (pixels := config.augment[field]) >= side:
            raise ConfigError(f'augment.{field} {pixels} is not below the {side} pixels of the images; set a lower one')
    part = config.batch_size // len(devices) // config.accumulate_steps
    if part == 1 and (config.augment.mixup_alpha or config.augment.cutmix_alpha):
        raise ConfigError(
            'mixup and cutmix mix the images that a device has at a time, and that is one; set a larger '
            '--config.batch_size or a smaller --config.accumulate_steps'
        )
    setup = Setup(config, dataset, devices)
    if config.model.name in BATCH_NORM_MODELS:
        images = part * len(devices) if config.synchronize_batch_norm else part
        if images == 1 and setup.smallest_map() == 1:
            raise ConfigError(
                'batch norm has one value of a channel at a time, which it turns into zero; set a larger '
                '--config.batch_size, a smaller --config.accumulate_steps or, of several devices, '
                '--config.synchronize_batch_norm'
            )
    counted = {'num_epochs': config.num_epochs}
    if config.optimizer.name == 'muon':
        counted['optimizer.whitening_bias_epochs'] = config.optimizer.whitening_bias_epochs
    for field, epochs in counted.items():
        if epochs * setup.steps_per_epoch >= 2**31:
            raise ConfigError(f'{field} {epochs} is too many: steps are counted in 31 bits; set --config.{field}')
    return setup


def _commit() -> str:
    """The commit of the checkout that this file belongs to, with '-dirty' where files were changed since; or ''."""

    def git(*arguments: str) -> str:
        command = ['git', '-C', str(Path(__file__).parent), *arguments]
        # Within another repository's hooks the environment says that all is about that one.
        environment = {name: value for name, value in os.environ.items() if not name.startswith('GIT_')}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        git('ls-files', '--error-unmatch', Path(__file__).name)  # not merely below somebody else's checkout
        return git('describe', '--always', '--dirty', '--abbrev=40', '--exclude=*')
    except (OSError, subprocess.SubprocessError):
        return ''
