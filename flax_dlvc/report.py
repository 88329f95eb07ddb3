"""What a run shows: a line or a live bar per epoch, curves, TensorBoard."""

import contextlib
import io
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from flax_dlvc import pictures
from flax_dlvc.config import flatten
from flax_dlvc.data import Dataset
from flax_dlvc.profiling import timed
from flax_dlvc.rundir import storage_error
from flax_dlvc.stopping import Stopping

if TYPE_CHECKING:
    from flax_dlvc.metrics import Predictions  # JAX, for which pictures and tables need not wait

WIDE = 120  # columns of a terminal in which a bar has room beside all that is said in words


class Display:
    """The terminal's view of a run: a live bar over the steps of an epoch, and a line for each finished epoch.

    Without a terminal there are only the lines; a narrow one has only the words beside the bar. A context manager, as
    the bar has to be taken down.
    """

    def __init__(self, *, num_epochs: int, steps_per_epoch: int, metric: str):
        self._num_epochs = num_epochs
        self._metric = metric.removeprefix('validation_')  # by which the best epoch is chosen
        self._steps_per_epoch = steps_per_epoch
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._is_wide = self._console.width >= WIDE
        time_left = TimeRemainingColumn(table_column=Column(no_wrap=True))
        columns = (BarColumn(), MofNCompleteColumn(), time_left) if self._is_wide else (time_left,)
        self._progress = Progress(
            TextColumn('{task.description}'),
            *columns,
            TextColumn('{task.fields[status]}'),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task('', total=num_epochs * steps_per_epoch, status='')
        self._best = self._best_beside_bar = ''

    def __enter__(self) -> 'Display':
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    @timed('logging')
    def step(self, step: int, metrics: dict[str, Any], images_per_second: float) -> None:
        """Moves the bar to a finished step; the metrics are the epoch's so far."""
        self._progress.update(
            self._task,
            completed=step,
            description=f'epoch {(step - 1) // self._steps_per_epoch + 1}/{self._num_epochs}',
            status=f'loss {metrics["cross_entropy"]:.3f}  accuracy {metrics["accuracy"]:.3f}'
            f'  {images_per_second:,.0f} images/s{self._best_beside_bar}',
        )

    @timed('logging')
    def epoch(self, record: dict[str, Any], stopping: Stopping) -> None:
        """Prints the line of a finished epoch."""
        validation = ''
        if stopping.best_value is not None:
            self._best = f'  best {self._metric} {stopping.best_value:.4f} (epoch {stopping.best_epoch})'
            self._best_beside_bar = self._best if self._is_wide else f'  best {stopping.best_value:.4f}'
            loss, accuracy = record['validation_loss'], record['validation_accuracy']
            validation = f'  validation loss {loss:.4f} accuracy {accuracy:.4f}'
        self.print(
            f'epoch {record["epoch"]:>3}/{self._num_epochs}'
            f'  train loss {record["train_loss"]:.4f} accuracy {record["train_accuracy"]:.4f}'
            f'{validation}  learning rate {record["learning_rate"]:.2e}'
            f'  {record["images_per_second"]:,.0f} images/s{self._best}'
        )

    def print(self, text: str) -> None:
        """Prints above the bar."""
        self._console.print(text, markup=False)


class TensorBoard:
    """TensorBoard's event file, written at once and not by a thread, so that a full disk is noticed; a context manager.

    TensorBoard drops what an interrupted run has logged of an epoch that it did not save, once the run goes on.

    Raises, of its methods:
        StorageError: the event file cannot be written.
    """

    def __init__(self, workdir: Path, config: ConfigDict, dataset: Dataset):
        self._directory = workdir / 'tensorboard'
        self._config, self._dataset = config, dataset
        self._writer: Any = None
        self._takes_up = True  # what comes next may have been logged before, and is void

    def __enter__(self) -> 'TensorBoard':
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()

    @timed('logging')
    def begin(self) -> None:
        """Logs, where nothing is logged yet, the hyperparameters and images as training sees them."""
        if self._writer is None:
            start, _ = _hyperparameters(self._config)
            images = pictures.training_images(self._config, self._dataset)
            self._write(0, [start, _image('train/images', images)], next_epoch=0)

    def rewind(self) -> None:
        """Has the next epoch's record replace all that was logged of it and of later ones."""
        self._takes_up = True

    @timed('logging')
    def epoch(self, record: dict[str, Any]) -> None:
        """Logs a record of the history, at its epoch."""
        scalars = {}
        for key, value in record.items():
            if key != 'epoch' and value is not None:
                tag = key.replace('_', '/', 1) if key.startswith(('train_', 'validation_')) else key
                scalars[tag] = value
        self._write(record['epoch'], _scalars(scalars), next_epoch=record['epoch'])

    @timed('logging')
    @pictures.plain_style()
    def end(self, epoch: int, test: dict[str, Any], predictions: 'Predictions') -> None:
        """Logs the final test, at the last epoch: metrics, confusion matrix and the most confident mistakes.

        Args:
            epoch: the last one.
            test: the metrics that `evaluate.evaluate` returned for the test split.
            predictions: for its examples.
        """
        title = f'{self._config.name} on {self._config.dataset}, test: accuracy {test["accuracy"]:.4f}; % of a row'
        class_names = self._dataset.class_names
        confusion = pictures.confusion_matrix(np.array(test['confusion_matrix']), class_names, title)
        mistakes = pictures.mistakes(self._dataset.test, predictions, class_names)
        _, end = _hyperparameters(self._config)
        summaries = [
            *_scalars({f'test/{key}': test[key] for key in ('accuracy', 'cross_entropy')}),
            _image('test/confusion_matrix', confusion),
            _image('test/mistakes', mistakes),
            end,
        ]
        self._write(epoch, summaries, next_epoch=epoch + 1)

    def _write(self, step: int, summaries: Sequence[Any], next_epoch: int) -> None:
        """Writes summaries; where a run takes up again, first that what is there of `next_epoch` and later is void."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter  # over a second to import

        def write(**content: Any) -> None:
            self._writer.write(Event(wall_time=time.time(), **content).SerializeToString())

        try:
            if self._writer is None:
                self._directory.mkdir(exist_ok=True)
                # An EventsWriter leaves a file that has no room open, of which Python 3.13 complains at the end.
                name = f'events.out.tfevents.{int(time.time())}.{socket.gethostname()}'
                self._writer = RecordWriter(str(self._directory / name))
                write(file_version='brain.Event:2')
            if self._takes_up:
                write(step=next_epoch, session_log=SessionLog(status=SessionLog.START))
                self._takes_up = False
            for summary in summaries:
                write(step=step, summary=summary)
            self._writer.flush()
        except OSError as error:
            raise storage_error(self._directory, error) from error


def _scalars(values: dict[str, float]) -> list[Any]:
    """Numbers, by tag, as summaries."""
    from tensorboardX.summary import scalar

    return [scalar(tag, value) for tag, value in values.items()]


def _hyperparameters(config: ConfigDict) -> tuple[Any, Any]:
    """The summaries of a run's begin, with its hyperparameters, and of its end.

    tensorboardX's third one, of the experiment, is left out: without it TensorBoard itself gathers the metrics and
    shows the hyperparameters in which runs differ.
    """
    from tensorboardX.summary import hparams

    values = {field: str(value) if isinstance(value, tuple) else value for field, value in flatten(config).items()}
    _, start, end = hparams(values, {})
    return start, end


def _image(tag: str, picture: Any) -> Any:
    """A picture as a summary."""
    from PIL import Image
    from tensorboardX.proto.summary_pb2 import Summary

    content = pictures.encode_png(picture)
    with Image.open(io.BytesIO(content)) as opened:
        width, height, colorspace = *opened.size, len(opened.getbands())
    image = Summary.Image(width=width, height=height, colorspace=colorspace, encoded_image_string=content)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


@timed('logging')
@pictures.plain_style()
def plot_curves(
    config: ConfigDict,
    history: Sequence[dict[str, Any]],
    path: Path,
    best_epoch: int | None = None,
    stopped_early: bool = False,
) -> None:
    """Draws loss and accuracy per epoch, train and validation, with the best and the stopping epoch marked."""
    epochs = [record['epoch'] for record in history]
    figure, panels = pictures.loss_and_accuracy()
    figure.suptitle(f'{config.name} on {config.dataset}', parse_math=False)
    for quantity, axes in panels.items():
        for split, colour, style in (('train', pictures.ORANGE, '--'), ('validation', pictures.BLUE, '-')):
            values = [record[f'{split}_{quantity}'] for record in history]
            if None not in values:  # a run without validation
                axes.plot(epochs, values, style, color=colour, marker='.', label=split)
        if best_epoch is not None:
            axes.axvline(best_epoch, color='0.5', linestyle=':', label=f'best: epoch {best_epoch}')
        if stopped_early:
            axes.axvline(epochs[-1], color='0.2', linewidth=1, label=f'stopped: epoch {epochs[-1]}')
        axes.legend()
    pictures.write(figure, path)
