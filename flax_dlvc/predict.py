"""Classes of image files: `python -m flax_dlvc.predict --workdir DIR IMAGE… [--top 5] [--json] [--explain OUT]`.

An IMAGE is a file, a folder or a glob. One that cannot be read costs a line on stderr; the others go on, and the exit
code is 1.

Shapes: B batch, H height, W width, C channels, K classes.
"""

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flax_dlvc.errors import (
    ArgumentParser,
    CommandError,
    ConfigError,
    add_step_argument,
    existing_directory,
    named_path,
    run_command,
)
from flax_dlvc.explain import draw, explain
from flax_dlvc.images import ImageError, find_images, read_image, without_warnings
from flax_dlvc.setup import Setup
from flax_dlvc.transfer import load_trained
from flax_dlvc.words import plural

BATCH_SIZE = 32  # files read before the model sees them


class Prediction(NamedTuple):
    """An image (H, W, C) uint8 as the model saw it, its probabilities (K,), and its heat (h, w) where asked for."""

    path: Path
    image: np.ndarray
    probabilities: np.ndarray
    heat: np.ndarray | None


def predict(
    setup: Setup, variables: Any, paths: Iterable[Path], *, explained: bool = False
) -> Iterator[Prediction | tuple[Path, ImageError]]:
    """Predicts files, a batch at a time, in order; a file that cannot be read comes with its error.

    Args:
        setup: of the trained model.
        variables: its parameters and batch statistics.
        paths: image files.
        explained: whether to ask where the model looked.
    """

    @jax.jit
    def look(variables: Any, images: jax.Array, classes: jax.Array) -> jax.Array:
        return explain(setup.model, variables, setup.normalize(images), classes)

    for batch in _batched(paths, BATCH_SIZE):
        with without_warnings():
            read = [(path, _read(path, setup.dataset.image_shape)) for path in batch]
        images = [image for _, image in read if isinstance(image, np.ndarray)]
        if images:
            # Filled up with black, so that one program serves every batch of more than one image.
            size = 1 if len(images) == 1 else BATCH_SIZE
            padded = np.zeros((size, *setup.dataset.image_shape), np.uint8)
            padded[: len(images)] = images
            scores = np.asarray(setup.prediction_step(variables, padded))
            heat = np.asarray(look(variables, padded, scores.argmax(axis=1))) if explained else None
        row = itertools.count()
        for path, image in read:
            if isinstance(image, ImageError):
                yield path, image
            else:
                index = next(row)
                yield Prediction(path, image, scores[index], None if heat is None else heat[index])


def _batched(items: Iterable[Path], size: int) -> Iterator[tuple[Path, ...]]:
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray | ImageError:
    try:
        return read_image(path, shape)
    except ImageError as error:
        return error


def main(argv: list[str]) -> None:
    """Parses the command line, predicts and prints."""
    parser = ArgumentParser('python -m flax_dlvc.predict', description='Names the classes of image files.')
    parser.add_argument(
        '--workdir', type=existing_directory, required=True, help='the run directory of the trained model'
    )
    add_step_argument(parser)
    parser.add_argument('--top', type=int, default=5, help='classes to name for each image')
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.add_argument(
        '--explain', type=named_path, metavar='OUT', help='a folder for pictures of where the model looked'
    )
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='a file, a folder or a glob')
    arguments = parser.parse_args(argv[1:])
    if arguments.top < 1:
        raise ConfigError(f'--top must be at least 1, not {arguments.top}')
    setup, variables = load_trained(arguments.workdir, arguments.step)
    if arguments.explain:
        try:
            arguments.explain.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f'cannot make the folder {arguments.explain}: {error.strerror}; choose another --explain'
            ) from error

    table = Table('image', 'class', 'probability')
    records, unreadable = [], 0
    class_names = setup.dataset.class_names
    paths = find_images(arguments.images)
    for number, prediction in enumerate(predict(setup, variables, paths, explained=bool(arguments.explain))):
        if not isinstance(prediction, Prediction):
            path, problem = prediction
            print(f'{path}: {problem}', file=sys.stderr)
            records.append({'path': str(path), 'error': str(problem)})
            unreadable += 1
            continue
        record = describe(prediction, class_names, arguments.top)
        for rank, entry in enumerate(record['predictions']):
            row = '' if rank else record['path'], entry['class'], f'{entry["probability"]:.4f}'
            table.add_row(*map(Text, row))  # whose brackets are no markup
        if prediction.heat is not None:
            name = prediction.path.stem[:50]  # the longest ones have no room for what comes before
            picture = arguments.explain / f'{number:04d}_{name}.png'
            best = record['predictions'][0]
            draw(prediction.image, prediction.heat, f'{best["class"]} {best["probability"]:.2f}', picture)
            record['explanation'] = str(picture)
        records.append(record)
    if not records:
        raise CommandError(f'there are no images in {" ".join(arguments.images)}')
    if arguments.json:
        print(json.dumps(records, indent=2))
    elif table.row_count:
        Console(width=None if sys.stdout.isatty() else 1000, highlight=False).print(table)
    if unreadable:
        raise CommandError(f'{unreadable} of {plural(len(records), "image")} cannot be read')


def describe(prediction: Prediction, class_names: Sequence[str], top: int) -> dict[str, Any]:
    """A prediction as JSON: the path and the `top` classes, the most probable one first."""
    order = np.argsort(-prediction.probabilities, kind='stable')[:top]
    predictions = [{'class': class_names[k], 'probability': float(prediction.probabilities[k])} for k in order]
    return {'path': str(prediction.path), 'predictions': predictions}


if __name__ == '__main__':
    run_command(main)
