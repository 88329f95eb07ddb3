"""A study's pictures, as PNG and SVG: curves, confusion matrices, accuracy by crop scale, augmented images.

The same runs give the same bytes.
"""

import statistics
import textwrap
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from flax_dlvc import answers, pictures, results
from flax_dlvc.pictures import BLUE, GREEN, ORANGE, PURPLE
from flax_dlvc.results import Cell
from flax_dlvc.rundir import storage_error, whole
from flax_dlvc.words import plural

STYLE: Any = {
    'font.size': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'svg.hashsalt': 'flax_dlvc',
    'text.parse_math': False,  # a dollar in a name is one
}
STEMS = ('curves_', 'confusion_', 'crop_scale', 'augmentation')  # that pictures' names begin with; others are not ours
NUM_EXAMPLES = 8  # images in the strip
WIDTH_IN_STRIP, DATASET_IN_STRIP = 'width of an image', 'dataset'  # names of texts in the strip's PNG file


def draw_all(cells: Sequence[Cell], workdir: Path) -> list[tuple[str, str]]:
    """Draws what there is to draw into `workdir/figures`, and removes what was drawn of runs that are gone.

    Returns:
        File stem and caption of each picture.
    """
    drawn = []
    directory = workdir / 'figures'
    with pictures.plain_style(STYLE):
        for stem, caption, figure in _figures(cells, workdir):
            _save(figure, directory / stem)
            drawn.append((stem, caption))
    current = {f'{stem}{suffix}' for stem, _ in drawn for suffix in pictures.METADATA}
    for path in directory.glob('*'):
        if path.suffix in pictures.METADATA and path.name not in current and path.name.startswith(STEMS):
            path.unlink()
    return drawn


def _as_file_name(dataset: str) -> str:
    """A dataset's name for files; of a long path its end, and a number that tells it from others with that end."""
    name = dataset.replace('/', '_')
    return name if len(name.encode()) <= 150 else f'{name[-30:]}_{zlib.crc32(dataset.encode()):08x}'


def _figures(cells: Sequence[Cell], workdir: Path) -> Iterator[tuple[str, str, Any]]:
    for dataset, members in results.datasets(cells).items():
        suffix = '' if dataset == 'cifar10' else f'_{_as_file_name(dataset)}'
        for model, title in results.MODELS.items():
            # A picture compares regularisations. Crop scales have one of their own; their first cell is here.
            plain: dict[str, Cell] = {}
            for cell in members:
                if cell.model == model:
                    plain.setdefault(cell.without(results.CROP_SCALE).title, cell)
            with_history = [cell for cell in plain.values() if any(run.history for run in cell.runs)]
            if with_history:
                caption = (
                    f'{title} on {dataset}: train (dashed) and validation (solid) by epoch. Lines are means over '
                    'seeds, bands reach from the lowest to the highest; a triangle marks the end of each run.'
                )
                yield f'curves_{model}{suffix}', caption, curves(with_history)
            evaluated = [c for c in plain.values() if any('confusion_matrix' in run.evaluation for run in c.finished)]
            if evaluated:
                caption = (
                    f'{title} on {dataset}: of the test images of a class (row), the share called each class, in %.'
                )
                yield f'confusion_{model}{suffix}', caption, confusion(evaluated)
        series = answers.crop_scales(members)
        if series:
            caption = (
                f'Test accuracy on {dataset} by the lowest area of a random crop; bars are ± one standard deviation.'
            )
            yield f'crop_scale{suffix}', caption, crop_scale(series)
    if (workdir / 'examples.png').exists():
        lowest = sorted({0.08, 0.25, 0.5, 0.75} | set(map(answers.crop_scale, cells)))
        dataset = dataset_of_examples(workdir / 'examples.png')
        caption = (
            f'What augmentation does to a few training images{f" of {dataset}" if dataset else ""}, by the lowest area '
            'of a crop: each row one draw.'
        )
        yield 'augmentation', caption, augmentation(workdir / 'examples.png', lowest)


def curves(cells: Sequence[Cell]) -> Any:
    """Loss (above) and accuracy (below) by epoch, a column per cell, all on the same scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * len(cells) + 0.9, 4.6), layout='constrained')
    axes = figure.subplots(2, len(cells), sharex=True, sharey='row', squeeze=False)
    for column, cell in enumerate(cells):
        for row, quantity in enumerate(('loss', 'accuracy')):
            for split, colour, style in (('train', ORANGE, '--'), ('validation', BLUE, '-')):
                _curve(axes[row, column], cell.runs, f'{split}_{quantity}', colour, style, split)
            axes[row, column].grid(alpha=0.25)
            axes[row, column].xaxis.get_major_locator().set_params(integer=True)
        axes[0, column].set_title(_short_title(cell, sum(bool(run.history) for run in cell.runs)), fontsize=9)
        axes[1, column].set_xlabel('epoch')
    axes[0, 0].set_ylabel('cross-entropy (nats)')
    axes[1, 0].set_ylabel('accuracy')
    axes[0, 0].legend(frameon=False)
    return figure


def _short_title(cell: Cell, seeds: int) -> str:
    title = results.REGULARIZATIONS[cell.regularization].replace(' and ', '\nand ')
    for field, (ours, _) in cell.settings.items():
        if field != 'num_epochs':
            title += f'\n{results.short(field)} {results.plain(ours)}'
    return f'{title}\n{plural(seeds, "seed")}, {plural(cell.config.num_epochs, "epoch")} at most'


def compare(runs: Sequence[results.Run]) -> Any:
    """Loss and accuracy by epoch, a colour per run; train dashed, validation solid."""
    figure, panels = pictures.loss_and_accuracy()
    for quantity, axes in panels.items():
        for run, colour in zip(runs, (ORANGE, BLUE, GREEN, PURPLE), strict=False):
            for split, style in (('train', '--'), ('validation', '-')):
                key = f'{split}_{quantity}'
                _curve(axes, [run], key, colour, style, f'{split}, {run.name}')  # no legend shows a name like _x
    for text in panels['accuracy'].legend(frameon=False).get_texts():
        text.set_parse_math(False)
    return figure


def _curve(axes: Any, runs: Sequence[results.Run], key: str, colour: str, style: str, label: str) -> None:
    histories = [[record[key] for record in run.history] for run in runs if run.history]
    histories = [history for history in histories if None not in history]  # there are runs without validation
    if not histories:
        return
    epochs = range(1, max(map(len, histories)) + 1)
    by_epoch = [[history[epoch - 1] for history in histories if len(history) >= epoch] for epoch in epochs]
    axes.plot(
        epochs, [statistics.fmean(values) for values in by_epoch], style, color=colour, label=label, linewidth=1.4
    )
    if len(histories) > 1:
        axes.fill_between(epochs, list(map(min, by_epoch)), list(map(max, by_epoch)), color=colour, alpha=0.2, lw=0)
    for history in histories:
        axes.plot(len(history), history[-1], marker='v', color=colour, markersize=4)


def confusion(cells: Sequence[Cell]) -> Any:
    """A matrix per cell, in percent of each row, summed over the seeds."""
    from matplotlib.figure import Figure

    names = results.class_names(cells)
    columns = min(2, len(cells))
    rows = -(-len(cells) // columns)
    figure = Figure(figsize=(4.1 * columns, 4.3 * rows), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, cell in zip(grid, cells, strict=False):
        matrices = [run.evaluation['confusion_matrix'] for run in cell.finished if 'confusion_matrix' in run.evaluation]
        counts = np.sum(matrices, axis=0)
        pictures.draw_confusion(axes, counts, names)
        axes.set_title(_short_title(cell, len(matrices)), fontsize=9)
    for axes in list(grid):
        axes.remove()
    return figure


def crop_scale(series: Sequence[tuple[str, list[Cell]]]) -> Any:
    """Accuracy by crop scale, a line per model and regularisation, a dot per run."""
    from matplotlib.figure import Figure

    titles = ['\n'.join(textwrap.wrap(title, 80)) for title, _ in series]
    lines = sum(title.count('\n') + 1 for title in titles)
    figure = Figure(figsize=(6, 3.6 + 0.2 * lines), layout='constrained')
    axes = figure.subplots()
    for number, (title, (_, cells)) in enumerate(zip(titles, series, strict=True)):
        colour, marker, style = [
            (BLUE, 'o', '-'), (ORANGE, 's', '--'), (GREEN, '^', '-.'), (PURPLE, 'D', ':'),
        ][number % 4]  # fmt: skip
        scales = list(map(answers.crop_scale, cells))
        values = [[100 * value for value in cell.values('accuracy')] for cell in cells]
        deviations = [results.deviation(runs) or 0.0 for runs in values]
        means = [statistics.fmean(runs) for runs in values]
        axes.errorbar(scales, means, deviations, color=colour, marker=marker, linestyle=style, capsize=3, label=title)
        for scale, runs in zip(scales, values, strict=True):
            axes.plot([scale] * len(runs), runs, '.', color=colour, alpha=0.5)
    axes.set_xlabel('lowest area of a crop (fraction of the image)')
    axes.set_ylabel('test accuracy (%)')
    axes.grid(alpha=0.25)
    figure.legend(loc='outside lower left', frameon=False)  # titles may be as wide as the picture
    return figure


def save_examples(config: ConfigDict, path: Path) -> None:
    """Writes training images of different classes, unchanged and side by side, as a PNG."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from flax_dlvc import data

    split = data.load(config).train
    _, first = np.unique(split.labels, return_index=True)
    images = np.concatenate([split.images[index] for index in sorted(first)[:NUM_EXAMPLES]], axis=1)
    picture = images.squeeze(-1) if images.shape[-1] == 1 else images
    text = PngInfo()
    text.add_text(WIDTH_IN_STRIP, str(split.images.shape[2]))
    text.add_itxt(DATASET_IN_STRIP, config.dataset)
    try:
        with whole(path) as temporary:
            Image.fromarray(picture).save(temporary, pnginfo=text)
    except OSError as error:
        raise storage_error(path, error) from error


def dataset_of_examples(path: Path) -> str:
    """The name of the dataset that a strip is of; '' where there is none, or one that does not say it."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return str(picture.info.get(DATASET_IN_STRIP, ''))
    except OSError:
        return ''


def augmentation(examples: Path, lowest_areas: Sequence[float]) -> Any:
    """The examples as they are, then crops by their lowest area, mirrored at random, two draws of each."""
    import jax
    from matplotlib.figure import Figure
    from PIL import Image

    from flax_dlvc.augment import random_mirror, random_resized_crop

    with Image.open(examples) as picture:
        # The first strips did not say it; their images were square.
        width = int(picture.info.get(WIDTH_IN_STRIP, picture.height))
        strip = np.asarray(picture.convert('RGB'), np.float32) / 255
    images = np.stack([strip[:, start : start + width] for start in range(0, strip.shape[1], width)])
    rows = [('as it is', images)]
    with jax.default_device(pictures.device_for_drawing()):
        for lowest in lowest_areas:
            for draw in range(2):
                keys = jax.random.split(jax.random.key(draw), (len(images), 2))

                def augment(keys: jax.Array, image: Any, scale: tuple[float, float] = (lowest, 1.0)) -> jax.Array:
                    return random_mirror(
                        keys[0], random_resized_crop(keys[1], image, scale=scale, ratio=(3 / 4, 4 / 3))
                    )

                rows.append((f'from {lowest:g}' if draw == 0 else '', np.asarray(jax.vmap(augment)(keys, images))))
    height = 0.75 * images.shape[1] / images.shape[2]
    figure = Figure(figsize=(0.75 * len(images) + 0.8, height * len(rows)), layout='constrained')
    grid = figure.subplots(len(rows), len(images), squeeze=False)
    for axes_of_row, (label, examples_of_row) in zip(grid, rows, strict=True):
        for axes, picture in zip(axes_of_row, examples_of_row, strict=True):
            axes.imshow(np.clip(picture, 0, 1), interpolation='nearest')
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        axes_of_row[0].set_ylabel(label, rotation=0, ha='right', va='center')
    return figure


def _save(figure: Any, stem: Path) -> None:
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(stem, error) from error
    for suffix in pictures.METADATA:
        pictures.write(figure, stem.with_name(stem.name + suffix))
