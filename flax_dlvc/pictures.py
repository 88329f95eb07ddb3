"""Pictures of a run's images and predictions: what training sees, the confusion matrix, the most confident mistakes.

Shapes: B batch, N images, H height, W width, C channels, K classes.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from flax_dlvc import data
from flax_dlvc.errors import ConfigError
from flax_dlvc.rundir import whole

if TYPE_CHECKING:
    from flax_dlvc.metrics import Predictions  # JAX, for which pictures and tables need not wait

NUM_SHOWN = 64  # training images in a picture
NUM_MISTAKES = 32
METADATA: Any = {
    '.png': {'Software': None},
    '.svg': {'Date': None, 'Creator': None},
}  # the same bytes for the same data
DPI = 150


def training_images(config: ConfigDict, dataset: data.Dataset) -> Any:
    """Images of the first training batch as the model sees them, augmented, with the names of their classes."""
    images, names = seen_in_training(config, dataset)
    return image_grid(images[:NUM_SHOWN], names)


def seen_in_training(config: ConfigDict, dataset: data.Dataset) -> tuple[np.ndarray, list[str]]:
    """What the first training step of a run on one device sees, before normalisation.

    Returns:
        Images (B, H, W, C) float32 on the scale [0, 1], and the names of their classes; of an image that is mixed,
        both with their shares.
    """
    import jax

    from flax_dlvc import augment, steps

    augmentation = augment.make_augmentation(config.augment, dataset.mean)
    mixing = augment.make_mixing(config.augment)
    mirror_period = len(dataset.train) // config.batch_size if config.augment.alternating_mirror else 0

    def first_batch(seed: jax.Array, images: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        _, key, _ = steps.keys_of(seed)
        return steps.augment_batch(key, images, indices, jax.numpy.int32(0), augmentation, mirror_period, mixing)

    indices = data.epoch_order(len(dataset.train), config.seed, 1)[: config.batch_size]
    with jax.default_device(device_for_drawing()):
        seen, shares = jax.jit(first_batch)(np.uint32(config.seed), dataset.train.images[indices], indices)
    names = [dataset.class_names[label] for label in dataset.train.labels[indices]]
    if shares is not None:
        names = [
            f'{own} {share:.2f}\n{other} {1 - share:.2f}'
            for own, other, share in zip(names, np.roll(names, 1), np.asarray(shares), strict=True)
        ]
    return np.asarray(seen), names


def device_for_drawing() -> Any:
    """The CPU, so that a picture does not depend on the accelerator; another device where JAX may use no CPU."""
    import jax

    try:
        return jax.local_devices(backend='cpu')[0]
    except RuntimeError:
        return jax.local_devices()[0]


def mistakes(split: data.Split, predictions: 'Predictions', class_names: Sequence[str]) -> Any:
    """The most confident mistakes among a split's predictions, the worst one first, with both classes."""
    chosen = confident_mistakes(predictions, split.labels)[:NUM_MISTAKES]
    labels = [
        f'{class_names[predicted]} {confidence:.2f}\nis {class_names[label]}'
        for predicted, confidence, label in zip(
            np.asarray(predictions.classes)[chosen], predictions.confidence[chosen], split.labels[chosen], strict=True
        )
    ]
    return image_grid(split.images[chosen] / np.float32(255), labels)


def confident_mistakes(predictions: 'Predictions', labels: np.ndarray) -> np.ndarray:
    """Which of the predictions are not the labels (N,), the most confident one first."""
    (wrong,) = np.nonzero(predictions.classes != labels)
    return wrong[np.argsort(-predictions.confidence[wrong], kind='stable')]


def image_grid(images: np.ndarray, labels: Sequence[str], columns: int = 8) -> Any:
    """Images (N, H, W, C) on the scale [0, 1] under their labels of up to two lines, row by row."""
    from matplotlib.figure import Figure

    # One pair of axes for all, in inches: with a pair for each image drawing takes five times as long.
    aspect = images.shape[1] / images.shape[2]
    width, height = 1.1 * columns, (aspect + 0.3) * max(1, -(-len(images) // columns))
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for number, (image, label) in enumerate(zip(images, labels, strict=False)):
        left, top = 1.1 * (number % columns) + 0.05, (aspect + 0.3) * (number // columns) + 0.29
        extent = (left, left + 1, top + aspect, top)
        axes.imshow(np.clip(image, 0, 1), cmap='gray', vmin=0, vmax=1, interpolation='nearest', extent=extent)
        axes.text(left + 0.5, top - 0.02, label, ha='center', va='bottom', fontsize=7, linespacing=1, parse_math=False)
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


def confusion_matrix(counts: np.ndarray, class_names: Sequence[str], title: str) -> Any:
    """A confusion matrix (K, K), a row per true class, in percent of each row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout='constrained')
    axes = figure.subplots()
    draw_confusion(axes, counts, class_names)
    axes.set_title(title, fontsize=9, parse_math=False)
    return figure


def draw_confusion(axes: Any, counts: np.ndarray, class_names: Sequence[str]) -> None:
    """Draws a confusion matrix (K, K) on axes; with more than twelve classes without their names and numbers."""
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap='cividis', vmin=0, vmax=100)
    if len(class_names) <= 12:
        for row, column in np.ndindex(shares.shape):
            colour = 'black' if shares[row, column] > 55 else 'white'
            if shares[row, column] >= 0.5:
                text = f'{shares[row, column]:.0f}'
                axes.text(column, row, text, ha='center', va='center', color=colour, fontsize=7)
        axes.set_xticks(range(len(class_names)), class_names, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(len(class_names)), class_names, fontsize=7, parse_math=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel('predicted')
    axes.set_ylabel('true')


def encode_png(figure: Any) -> bytes:
    """A picture as a PNG file's content; the same data give the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI, format='png', metadata=METADATA['.png'])
    return content.getvalue()


def write(figure: Any, path: Path) -> None:
    """Writes a .png or .svg file whole or not at all; may raise an `OSError`."""
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format=path.suffix[1:], metadata=METADATA[path.suffix])


def save_png(figure: Any, path: Path) -> None:
    """Writes a picture to a place that the user has named.

    Raises:
        ConfigError: it is not called .png, or cannot be written there.
    """
    if path.suffix != '.png':
        raise ConfigError(f'{path} is not the name of a .png file')
    try:
        write(figure, path)
    except OSError as error:
        raise ConfigError(f'cannot write {path}: {error.strerror}; choose another place') from error
