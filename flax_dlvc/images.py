"""Image files of any kind as the uint8 arrays that a model takes.

Shapes: H height, W width, C channels.
"""

import contextlib
import glob
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

# More pixels than any camera takes: a small file that claims more is an error or a decompression bomb.
MAX_PIXELS = 100_000_000

# What turns an image upright, by its orientation in EXIF (CIPA DC-008, `Orientation`); 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(Exception):
    """A file is not an image that can be used; the message says why."""


def find_images(names: Iterable[str]) -> Iterator[Path]:
    """Every file that the names stand for: files, folders (with all images below them) and globs of both.

    A glob's matches are sorted, and so are a folder's images; each is there once. A name that stands for nothing is
    yielded as it is: reading it says what is wrong with it.
    """
    for name in names:
        matches = [] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))  # noqa: PTH110, PTH207
        found: dict[Path, None] = {}
        for path in map(Path, matches or [name]):
            below: Iterable[Path] = [path]
            if os.path.isdir(path):  # noqa: PTH112, as `Path.is_dir` raises where a name is too long
                images = filter(has_image_name, path.rglob('*'))
                below = sorted(filter(os.path.isfile, images))  # `Path.is_file` raises in a folder closed to us
            found |= dict.fromkeys(below)
        yield from found


def has_image_name(path: Path) -> bool:
    """Whether a file's name ends as that of a kind of image that Pillow reads; PDF it only writes."""
    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN


def read_image(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Reads an image file, turned upright, scaled to cover `shape` and cropped to its middle.

    Transparent parts become white; one channel means greyscale, three mean RGB.

    Args:
        path: any file that Pillow reads; of an animation the first frame.
        shape: (H, W, C) with one or three channels.

    Returns:
        (H, W, C) uint8.

    Raises:
        ImageError: missing, unreadable, truncated, of more than `MAX_PIXELS` pixels, or of numbers whose scale nobody
            knows: floating-point ones, or integers of 32 bits that do not use 9 to 16 of them.
    """
    height, width, channels = shape
    with _open(path) as image:
        opaque = _opaque(_upright(image)).convert('L' if channels == 1 else 'RGB')
        fitted = ImageOps.fit(opaque, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(fitted, np.uint8).reshape(shape)


def is_greyscale(path: Path) -> bool:
    """Whether an image file has a single channel, transparency aside; only its header is read.

    Raises:
        ImageError: as `read_image`, so far as the header tells.
    """
    with _open(path) as image:
        return image.mode in ('1', 'L', 'LA', 'F') or image.mode.startswith('I')


def without_warnings() -> contextlib.AbstractContextManager[Any]:
    """Within, Pillow does not warn of files that it reads all the same; to be entered before other threads start."""
    return warnings.catch_warnings(action='ignore')


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """Opens an image file; whatever goes wrong with it until it is closed becomes an `ImageError`."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f'{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}')
            yield image
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError('there is no such file') from None
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        raise ImageError(' '.join(str(error).split()) or type(error).__name__) from error


def _upright(image: Image.Image) -> Image.Image:
    """The image as its camera was held; of all that EXIF says nothing else is read, as much of it may be malformed."""
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _opaque(image: Image.Image) -> Image.Image:
    """The image with 8 bits per channel, on white where it is transparent."""
    if image.mode == 'F':
        raise ImageError('its pixels are floating-point numbers; save it with 8 or 16 bits')
    if image.mode.startswith('I'):  # 16 bits, in some formats as 32
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ImageError('its pixels do not fit into 16 bits; save it with 8 or 16')
        if image.mode == 'I' and 0 < values.max() < 256:
            raise ImageError('its pixels have 32 bits and only values below 256; save it with 8 or 16 bits')
        return Image.fromarray((values >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    image = image.convert('RGBA')
    return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
