"""The run, told in order, once: restore, train and validate each epoch, stop, test the best checkpoint."""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview
from ml_collections import ConfigDict

from flax_dlvc import distributed, rundir, runtime, steps, stopping
from flax_dlvc.checkpoint import Checkpoints, Progress
from flax_dlvc.config import defaults, differing_fields, validate, without_effect
from flax_dlvc.errors import ConfigError, DivergedError, StoppedError, noted_signals
from flax_dlvc.evaluate import describe, describe_origin, evaluate
from flax_dlvc.metrics import Sums, summarize
from flax_dlvc.profiling import timed, training_call
from flax_dlvc.report import Display, TensorBoard, plot_curves
from flax_dlvc.setup import Setup, set_up
from flax_dlvc.transfer import begin_from, check_origin
from flax_dlvc.words import plural

ONE_AT_A_TIME = threading.Lock()  # two threads that save by Orbax get in each other's way
ANEW = 'in another --workdir with a lower --config.learning_rate or a --config.optimizer.gradient_clip_norm'


@dataclasses.dataclass(frozen=True)
class Output:
    """All that a run writes to: its directory, and in it checkpoints and TensorBoard's log; the display."""

    workdir: Path
    checkpoints: Checkpoints
    tensorboard: TensorBoard
    display: Display


def run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains, stops, and tests the best checkpoint; goes on where an interrupted run of the same config was.

    Args:
        config: what to run.
        workdir: the run directory; made if it does not exist.

    Returns:
        What `result.json` holds.

    Raises:
        ConfigError: the config is not valid, or the dataset, the devices or the directory do not fit it.
        DivergedError: a loss is not finite.
        PeerError: the run has several processes, and one of them is missing.
        StoppedError: SIGTERM, SIGINT or SIGHUP arrived; the state is saved.
    """
    validate(config)
    workdir = Path(workdir)
    result = rundir.check(workdir, config)
    if result is None:
        with distributed.joined():
            setup = set_up(config)
            display = Display(
                num_epochs=config.num_epochs, steps_per_epoch=setup.steps_per_epoch, metric=config.early_stopping.metric
            )
            result = carry_out(setup, workdir, display)
    if distributed.is_main() or distributed.num_processes() == 1:  # a finished run's processes do not join
        ended = 'stopped early' if result['stopped_early'] else 'ended'
        print(f'{result["config_name"]} on {result["dataset"]} {ended} after epoch {result["epochs_run"]}')
        chosen = 'best' if config.splits.validation else 'last'
        print(f'test, {chosen} epoch {result["best_epoch"]}: {describe(result["test"])}')
        print(f'curves: {workdir / "curves.png"}')
    return result


def carry_out(setup: Setup, workdir: Path, display: Display) -> dict[str, Any]:
    """As `run`, of a setup that is there already and a directory that may be used; shows nothing but on the display."""
    config = setup.config
    if config.init_from and not any(workdir.glob('checkpoints/*')):
        check_origin(Path(config.init_from), setup)  # before anything is written
    with (
        claimed(workdir, setup),
        Checkpoints(workdir, keep_latest=config.keep_checkpoints) as checkpoints,
        TensorBoard(workdir, config, setup.dataset) as tensorboard,
        display,
    ):
        if distributed.is_main():
            rundir.remove_failure(workdir)
        try:
            result = train_and_test(setup, Output(workdir, checkpoints, tensorboard, display))
        except DivergedError as error:
            if distributed.is_main():
                rundir.write_failure(workdir, str(error), error.exit_code)
                if history := rundir.read_history(workdir):
                    plot_curves(config, history, workdir / 'curves.png')
            raise
        if distributed.is_main():
            rundir.write_result(workdir, result)
    return result


@contextmanager
def claimed(workdir: Path, setup: Setup) -> Iterator[None]:
    """Within, the run directory exists and this run alone trains in it, and alone in its process."""
    with contextlib.ExitStack() as stack:
        if not ONE_AT_A_TIME.acquire(blocking=False):
            raise ConfigError('another run is under way in this process; start each in a process of its own')
        stack.callback(ONE_AT_A_TIME.release)
        if distributed.is_main():
            rundir.create(workdir, setup.config)
            stack.enter_context(rundir.lock(workdir))
            rundir.check(workdir, setup.config)  # another process may have made it meanwhile
            rundir.write_dataset(workdir, setup.dataset)
        distributed.barrier('claimed')
        yield


def train_and_test(setup: Setup, output: Output) -> dict[str, Any]:
    """The run proper, to its result; where the config says so, divergence sends it back to its best epoch.

    From there, or from its beginning where no epoch is finished, it goes on at half the rate. So how often it saves, or
    is stopped, does not change where it goes.
    """
    config, workdir, checkpoints = setup.config, output.workdir, output.checkpoints
    rewinds = 0
    while True:
        state, progress = restore_or_start(setup, output)
        check_progress(workdir, config, progress)
        if distributed.is_main():
            rundir.adopt(workdir, config)
            if progress.history:  # a process may have ended between its last save and this file
                rundir.write_history(workdir, progress.history)
        if rewinds > progress.rewinds:
            progress = dataclasses.replace(progress, rewinds=rewinds)
            if progress.history:
                save(checkpoints, state, progress)  # or a run that is killed would go on at the rate before
        rewinds = progress.rewinds
        slower = setup.variant(learning_rate=config.learning_rate / 2**rewinds) if rewinds else setup
        announce(slower, output, state, progress)
        try:
            with stop_signals() as check_stop:
                progress = train(slower, state, progress, output, check_stop)
                return test_best(slower, progress, output, check_stop)
        except StopRequested as request:
            checkpoints.wait()
            name = signal.Signals(request.signal_number).name
            saved = 'nothing saved' if checkpoints.latest_step is None else f'saved at step {checkpoints.latest_step}'
            message = f'stopped by {name}, {saved} in {workdir}; the same command goes on'
            raise StoppedError(message, request.signal_number) from None
        except NotFiniteError as error:
            what = f'{error} with learning rate {float(slower.schedule(error.step - 1)):.3g}'
            if config.on_divergence == 'stop' or rewinds >= config.max_rewinds:
                checkpoints.wait()
                latest = checkpoints.latest_step
                kept = 'no checkpoint was saved yet' if latest is None else f'the checkpoint of step {latest} is kept'
                ways = {'stop': '--config.on_divergence=rewind', 'rewind': 'more --config.max_rewinds'}
                raise DivergedError(f'{what}; {kept}; go on with {ways[config.on_divergence]}, or {ANEW}') from None
            checkpoints.rewind()
            output.tensorboard.rewind()
            rewinds += 1
            output.display.print(f'rewind {rewinds} of at most {config.max_rewinds}: {what}')


def check_progress(workdir: Path, config: ConfigDict, progress: Progress) -> None:
    """Raises a `ConfigError` where a run cannot go on from the progress that its directory has."""
    if progress.best_step == 0:  # which only `transfer.save_as_run` writes
        raise ConfigError(
            f'{workdir} holds imported weights, not a run; to train from them, set --config.init_from={workdir} '
            'and another --workdir'
        )
    if config.num_epochs < len(progress.history):
        raise ConfigError(
            f'{workdir} has {plural(len(progress.history), "epoch")} behind it; '
            'set --config.num_epochs to as many or more'
        )


@timed('input and host')
def train(
    setup: Setup, state: steps.TrainState, progress: Progress, output: Output, check_stop: Callable[[], None]
) -> Progress:
    """Trains and validates, epoch by epoch, until the last one or until early stopping has had enough.

    Raises:
        NotFiniteError: a loss or the state.
        StopRequested: by `check_stop`; the state is saved.
    """
    config, dataset = setup.config, setup.dataset
    train_split, validation_split = setup.place(dataset.train), setup.place(dataset.validation)
    freed_memory = runtime.FreedMemory()
    try:
        while not finished(config, progress):
            epoch = len(progress.history) + 1
            first_step = (epoch - 1) * setup.steps_per_epoch
            step = int(state.step)
            if step == first_step:
                state = state.replace(sums=setup.empty_sums())
            sums = state.sums
            monitor = Monitor(setup, step, output.display)
            save_is_due = Clock(config, step)
            for indices in setup.training_calls(epoch, step - first_step):
                check_stop()
                if save_is_due(step):
                    save(output.checkpoints, state, progress)
                with training_call(indices.shape[1]):
                    state, sums = setup.train_step(state, *train_split, indices)
                    step += indices.shape[1]
                    monitor.note(step, sums)
            images_per_second = monitor.finish()

            validation: dict[str, Any] = {'cross_entropy': None, 'accuracy': None}
            if len(dataset.validation):
                validation, _ = evaluate(setup, state.variables, validation_split, check_stop)
                check_finite(validation['cross_entropy'], 'validation', step)
            trained = summarize(sums)
            record = {
                'epoch': epoch,
                'step': step,
                'train_loss': trained['cross_entropy'],
                'train_accuracy': trained['accuracy'],
                'validation_loss': validation['cross_entropy'],
                'validation_accuracy': validation['accuracy'],
                'learning_rate': float(setup.schedule(step - 1)),
                'images_per_second': images_per_second,
            }
            progress = advance(config, progress, record)
            save(output.checkpoints, state, progress)
            if distributed.is_main():
                rundir.write_history(output.workdir, progress.history)
                output.tensorboard.epoch(record)
            output.display.epoch(record, progress.stopping)
            freed_memory.give_back()
    except StopRequested:
        with contextlib.suppress(NotFiniteError):  # the run goes on from the checkpoint before, and meets it again
            save(output.checkpoints, state, progress)
        raise
    return progress


@timed('input and host')
def test_best(setup: Setup, progress: Progress, output: Output, check_stop: Callable[[], None]) -> dict[str, Any]:
    """Tests the best checkpoint, draws the curves, and returns what `result.json` holds.

    Raises:
        DivergedError: the loss is not finite; going back would choose the same checkpoint again.
        StopRequested: by `check_stop`.
    """
    config, workdir, checkpoints = setup.config, output.workdir, output.checkpoints
    checkpoints.wait()
    best_step = checkpoints.find('best')
    best, _ = checkpoints.restore(best_step, setup.abstract_state)
    test, predictions = evaluate(setup, best.variables, setup.place(setup.dataset.test), check_stop)
    if not math.isfinite(loss := test['cross_entropy']):
        kept = f'the checkpoint of step {best_step} is kept'
        raise DivergedError(f'the test loss is {loss} at step {best_step}; {kept}; train {ANEW}')
    evaluation = describe_origin(setup, 'test', best_step) | test
    epochs_run = len(progress.history)
    stopped_early = epochs_run < config.num_epochs
    best_epoch = progress.stopping.best_epoch
    if distributed.is_main():
        rundir.write_evaluation(workdir, 'test', evaluation)
        chosen = best_epoch if config.splits.validation else None
        plot_curves(config, progress.history, workdir / 'curves.png', chosen, stopped_early)
        output.tensorboard.end(epochs_run, test, predictions)
    del test['confusion_matrix'], test['expected_calibration_error']  # they stand in evaluation-test.json
    return {
        'config_name': config.name,
        'dataset': config.dataset,
        'seed': config.seed,
        'best_epoch': best_epoch,
        'epochs_run': epochs_run,
        'stopped_early': stopped_early,
        'rewinds': progress.rewinds,
        'num_parameters': count_parameters(best),
        'test': test,
        'environment': setup.environment,
    }


@timed('start')
def restore_or_start(setup: Setup, output: Output) -> tuple[steps.TrainState, Progress]:
    """The newest whole checkpoint's state and progress, or the initial ones, which `init_from` may have a part in."""
    restored = output.checkpoints.restore_latest(setup.abstract_state)
    if restored is not None:
        return restored
    with setup.compiling():
        if distributed.is_main():
            output.tensorboard.begin()
    state = setup.create_state()
    if setup.config.init_from:
        state, reinitialized = begin_from(Path(setup.config.init_from), setup, state)
        output.display.print(
            f'begins with {setup.config.init_from}; initialised anew: {", ".join(reinitialized) or "nothing"}'
        )
    return state, Progress()


def save(checkpoints: Checkpoints, state: steps.TrainState, progress: Progress) -> None:
    """Saves, unless the state is not finite: then the run has diverged."""
    try:
        checkpoints.save(state, progress)
    except FloatingPointError:
        raise NotFiniteError('the state is not finite', int(state.step)) from None


class Clock:
    """Says when a checkpoint within an epoch is due."""

    def __init__(self, config: ConfigDict, step: int):
        self._steps, self._seconds = config.checkpoint_every_steps, 60 * config.checkpoint_every_minutes
        self._restart(step)

    def __call__(self, step: int) -> bool:
        """Whether one is due before the step after `step`; the clock starts anew when it is."""
        due = 0 < self._steps <= step - self._step
        if self._seconds:
            due |= bool(self._agree(time.monotonic() - self._time >= self._seconds))
        if due:
            self._restart(step)
        return due

    def _restart(self, step: int) -> None:
        self._step, self._time = step, time.monotonic()
        self._agree = distributed.Agreement()


def announce(setup: Setup, output: Output, state: steps.TrainState, progress: Progress) -> None:
    """Says what runs on what, and where it starts; at the very start also the table of parameters."""
    config, dataset, devices = setup.config, setup.dataset, setup.devices
    step = int(state.step)
    if step == 0:
        output.display.print(parameter_overview.get_parameter_overview(state.params, include_stats=False))
    output.display.print(
        f'{config.name}: {config.model.name} with {count_parameters(state):,} parameters on {config.dataset} '
        f'({len(dataset.train):,} train, {len(dataset.validation):,} validation, {len(dataset.test):,} test), '
        f'seed {config.seed}, {describe_devices(devices)}, in {output.workdir}'
    )
    if idle := without_effect(config) & set(differing_fields(config, defaults())):
        output.display.print(f'without effect here: {", ".join(sorted(idle))}')
    if step > 0:
        output.display.print(f'going on after step {step}, {plural(len(progress.history), "epoch")} finished')


def describe_devices(devices: Sequence[jax.Device]) -> str:
    """How many of which kind, and in how many processes."""
    processes = distributed.num_processes()
    return f'{len(devices)} x {devices[0].device_kind}' + (f' in {processes} processes' if processes > 1 else '')


def count_parameters(state: steps.TrainState) -> int:
    """Trainable parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def finished(config: ConfigDict, progress: Progress) -> bool:
    """Whether the epochs are used up or early stopping has had enough."""
    if len(progress.history) >= config.num_epochs:
        return True
    return stopping.should_stop(progress.stopping, patience=config.early_stopping.patience)


def advance(config: ConfigDict, progress: Progress, record: dict[str, Any]) -> Progress:
    """The progress after an epoch."""
    metric, min_delta = config.early_stopping.metric, config.early_stopping.min_delta
    followed = stopping.follow([record], progress.stopping, metric=metric, min_delta=min_delta)
    best_step = record['step'] if followed.best_epoch == record['epoch'] else progress.best_step
    history = (*progress.history, record)
    return dataclasses.replace(progress, history=history, stopping=followed, best_step=best_step)


class NotFiniteError(Exception):
    """A loss or the state is not finite after a step: the run diverges."""

    def __init__(self, what: str, step: int):
        super().__init__(f'{what} at step {step}')
        self.step = step


def check_finite(loss: float, split: str, step: int) -> None:
    """Raises the `NotFiniteError` of a loss that is not finite."""
    if not math.isfinite(loss):
        raise NotFiniteError(f'the {split} loss is {loss}', step)


class Monitor:
    """Watches an epoch's calls: finite loss, speed, the live bar.

    It looks at a call when the next one has been handed to the devices, so that they never wait for the host.
    """

    def __init__(self, setup: Setup, first_step: int, display: Display):
        self._setup, self._display = setup, display
        self._pending: tuple[int, Sums] | None = None
        self._since = (time.perf_counter(), first_step)
        self._looked = False
        self._images_per_second = 0.0

    def note(self, step: int, sums: Sums) -> None:
        """Takes note of a call that has been handed to the devices and ends with `step`."""
        self._look()
        self._pending = (step, sums)
        if self._setup.devices[0].platform == 'cpu':  # where a step runs in the thread that calls it
            self._look()

    def finish(self) -> float:
        """Looks at the last call; returns images/s, without the first of several, which may have been compiled.

        0.0 where there was none: an epoch that was stopped in its validation is finished without a step.
        """
        self._look()
        return self._images_per_second

    @timed('training')
    def _look(self) -> None:
        if self._pending is None:
            return
        (step, sums), self._pending = self._pending, None
        loss = float(sums.loss.total) / max(1, int(sums.loss.count))  # waits for the call
        check_finite(loss, 'training', step)
        start, first_step = self._since
        now = time.perf_counter()
        self._images_per_second = (step - first_step) * self._setup.config.batch_size / (now - start)
        if not self._looked:
            self._looked, self._since = True, (now, step)
        self._display.step(step, summarize(sums), self._images_per_second)


class StopRequested(Exception):  # noqa: N818, no error
    """A signal asked the run to stop at the next opportunity."""

    def __init__(self, signal_number: int):
        super().__init__()
        self.signal_number = signal_number


@contextmanager
def stop_signals() -> Iterator[Callable[[], None]]:
    """Within, a stop signal makes the yielded function raise `StopRequested`; a second one ends the process.

    With several processes it raises in all of them, on the same call, when one has received a signal. A signal that
    came after the last call of that function is raised again at the end.
    """
    agree = distributed.Agreement()

    def check_stop() -> None:
        if signal_number := agree(received[0] if received else 0):
            received.clear()
            raise StopRequested(signal_number)

    with noted_signals() as received:
        yield check_stop
