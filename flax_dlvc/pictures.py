"""Pictures of a run's images and predictions: what training sees, the confusion matrix, the most confident mistakes.

Shapes: B batch, N images, H height, W width, C channels, K classes.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from flax_dlvc import data
from flax_dlvc.errors import ConfigError, unwritable
from flax_dlvc.rundir import storage_error, whole

if TYPE_CHECKING:
    from flax_dlvc.metrics import Predictions  # JAX, for which pictures and tables need not wait

# Of Okabe and Ito's palette, whose colours the colour-blind can tell apart; line styles tell them apart in print.
ORANGE, BLUE, GREEN, PURPLE = '#E69F00', '#0072B2', '#009E73', '#CC79A7'
NUM_SHOWN = 64  # training images in a picture
NUM_MISTAKES = 32
METADATA: Any = {
    '.png': {'Software': None},
    '.svg': {'Date': None, 'Creator': None},
}  # the same bytes for the same data
DPI = 150
IMAGE_WIDTH = 150  # pixels, at most, of an image in a grid, unless it has more itself
GAP, HEADER, FONT_SIZE = 12, 40, 15  # pixels, of a grid: between images, above each for its label, of its letters


def training_images(config: ConfigDict, dataset: data.Dataset) -> Image.Image:
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

    steps_per_epoch = len(dataset.train) // config.batch_size
    augmentation = augment.make_batch_augmentation(config.augment, dataset.mean, steps_per_epoch)

    def first_batch(seed: jax.Array, images: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        _, key, _ = steps.keys_of(seed)
        return augmentation(key, images, indices, jax.numpy.int32(0))

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


def mistakes(split: data.Split, predictions: 'Predictions', class_names: Sequence[str]) -> Image.Image:
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


def image_grid(images: np.ndarray, labels: Sequence[str], columns: int = 8) -> Image.Image:
    """Images (N, H, W, C) on the scale [0, 1], row by row, each enlarged a whole number of times, under labels.

    Drawn by Pillow: matplotlib takes a second to import, and half of one for these, which is seen where a run starts.
    A label has up to two lines.
    """
    height, width = images.shape[1:3]
    scale = max(1, IMAGE_WIDTH // width)
    cell = scale * width + GAP, scale * height + HEADER
    rows = max(1, -(-len(images) // columns))
    grid = Image.new('RGB', (columns * cell[0], rows * cell[1]), 'white')
    draw, font = ImageDraw.Draw(grid), _font()
    pixels = np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8)
    enlarged = np.broadcast_to(pixels, (*pixels.shape[:3], 3)).repeat(scale, axis=1).repeat(scale, axis=2)
    for number, (image, label) in enumerate(zip(enlarged, labels, strict=False)):
        left, top = number % columns * cell[0] + GAP // 2, number // columns * cell[1] + HEADER
        grid.paste(Image.fromarray(image), (left, top))
        middle = left + scale * width / 2
        draw.multiline_text((middle, top - 3), label, 'black', font, anchor='md', spacing=1, align='center')
    return grid


def _font() -> ImageFont.FreeTypeFont:
    """matplotlib's, which has more letters than Pillow's own; matplotlib itself is not imported."""
    matplotlib = find_spec('matplotlib')
    assert matplotlib and matplotlib.origin  # it is installed with this package
    return ImageFont.truetype(Path(matplotlib.origin).with_name('mpl-data') / 'fonts/ttf/DejaVuSans.ttf', FONT_SIZE)


@contextmanager
def plain_style(changes: Any = ()) -> Iterator[None]:
    """Within, figures are drawn and saved in matplotlib's own style with these changes, whatever the user's is."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(changes)
        yield


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


def loss_and_accuracy() -> tuple[Any, dict[str, Any]]:
    """A figure, and its axes for what is drawn over epochs: of 'loss' and of 'accuracy'."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout='constrained')
    panels = dict(zip(('loss', 'accuracy'), figure.subplots(1, 2), strict=True))
    for axes, label in zip(panels.values(), ('cross-entropy (nats)', 'accuracy'), strict=True):
        axes.set(xlabel='epoch', ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    return figure, panels


def encode_png(picture: Any) -> bytes:
    """A picture as a PNG file's content; the same data give the same bytes."""
    content = io.BytesIO()
    _save(picture, content, '.png')
    return content.getvalue()


def write(picture: Any, path: Path) -> None:
    """Writes a .png or .svg file whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        _write(picture, path)
    except OSError as error:
        raise storage_error(path, error) from error


def _write(picture: Any, path: Path) -> None:
    with whole(path) as temporary:
        _save(picture, temporary, path.suffix)


def _save(picture: Any, file: Any, suffix: str) -> None:
    """Saves one of Pillow's images or of matplotlib's figures."""
    if isinstance(picture, Image.Image):
        picture.save(file, suffix[1:])
    else:
        picture.savefig(file, dpi=DPI, format=suffix[1:], metadata=METADATA[suffix])


def save_png(picture: Any, path: Path) -> None:
    """Writes a picture to a place that the user has named.

    Raises:
        ConfigError: it is not called .png, or cannot be written there.
        StorageError: the disk is full or read-only.
    """
    if path.suffix != '.png':
        raise ConfigError(f'{path} is not the name of a .png file')
    try:
        _write(picture, path)
    except OSError as error:
        raise unwritable(path, error, 'choose another place') from error
