"""Stateless image augmentation: a key per example, inside the compiled step.

Shapes: B batch, H height, W width, C channels. What takes one example is mapped over a batch by the steps.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

# An augmentation maps a key and one image (H, W, C) float32 to an image of the same shape.
Augmentation = Callable[[jax.Array, jax.Array], jax.Array]

# Mixing maps a key and a batch (B, H, W, C) to a batch in which each image has something of the one before it, and to
# each image's own share (B,).
Mixing = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

# A batch augmentation maps a key of the run, images (B, H, W, C) uint8, their places (B,) in the training split and the
# step's number to images (B, H, W, C) float32 in [0, 1], and to each one's own share (B,), None where nothing is mixed.
BatchAugmentation = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]

CROP_TRIES = 10  # torchvision's RandomResizedCrop gives up after as many

NUM_OPERATIONS, NUM_STRENGTHS = 14, 31  # of TrivialAugment


def make_batch_augmentation(config: ConfigDict, mean: Sequence[float], steps_per_epoch: int) -> BatchAugmentation:
    """Builds what training does to a batch, as `config.augment` describes it; `mean` as in `make_augmentation`."""
    return partial(
        augment_batch,
        augmentation=make_augmentation(config, mean),
        mirror_period=steps_per_epoch if config.alternating_mirror else 0,
        mixing=make_mixing(config),
    )


def augment_batch(
    key: jax.Array,
    images: jax.Array,
    indices: jax.Array,
    step: jax.Array,
    *,
    augmentation: Augmentation = lambda key, image: image,
    mirror_period: int = 0,
    mixing: Mixing | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """A batch as a training step sees it before normalisation.

    Single images have a key per step and example, so that they do not depend on the number of devices; mixing has one
    per step and part of a batch.

    Args:
        key: the same throughout the run.
        images: (B, H, W, C) uint8.
        indices: (B,), the examples' places in the training split.
        step: scalar, counted from 0.
        augmentation: applied to each image in [0, 1].
        mirror_period: steps of an epoch, in each of which `alternating_mirror` goes the other way; 0 is without it.
        mixing: applied to the augmented batch.

    Returns:
        The images (B, H, W, C) on the scale [0, 1], and each one's own share (B,), None where they are not mixed.
    """
    batch = images.astype(jnp.float32) / 255
    if mirror_period:
        mirror_key = jax.random.fold_in(key, jnp.iinfo(jnp.uint32).max)  # none that a step has
        batch = alternating_mirror(mirror_key, batch, indices, step // mirror_period)
    step_key = jax.random.fold_in(key, step)
    example_keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, indices)
    batch = jax.vmap(augmentation)(example_keys, batch)
    if mixing is None:
        return batch, None
    # A key per part of a batch, by its first example, and none that an example itself has.
    mixing_key = jax.random.fold_in(step_key, jnp.iinfo(jnp.uint32).max)
    return mixing(jax.random.fold_in(mixing_key, indices[0]), batch)


def make_augmentation(config: ConfigDict, mean: Sequence[float]) -> Augmentation:
    """Builds the augmentation of single images that `config.augment` describes.

    Args:
        config: `config.augment`.
        mean: of the training images per channel, which cutout fills in.
    """

    def augmentation(key: jax.Array, image: jax.Array) -> jax.Array:
        crop_key, mirror_key = jax.random.split(key)
        translate_key, cutout_key = (jax.random.fold_in(key, number) for number in (2, 3))
        if config.random_resized_crop:
            image = random_resized_crop(
                crop_key, image, scale=config.random_resized_crop_scale, ratio=config.random_resized_crop_ratio
            )
        if config.random_mirror:
            image = random_mirror(mirror_key, image)
        if config.random_translate:
            image = random_translate(translate_key, image, config.random_translate)
        if config.trivial_augment:
            image = trivial_augment(jax.random.fold_in(key, 4), image)
        if config.cutout:
            image = cutout(cutout_key, image, config.cutout, mean)
        return image

    return augmentation


def random_mirror(key: jax.Array, image: jax.Array) -> jax.Array:
    """Mirrors an image (H, W, C) left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def alternating_mirror(key: jax.Array, images: jax.Array, indices: jax.Array, epoch: jax.Array) -> jax.Array:
    """Mirrors each image in every second epoch: over two epochs it is seen once each way.

    Jordan 2024, arXiv:2404.00498. Whether it is the even or the odd epochs is drawn for each example, once.

    Args:
        key: the same throughout the run.
        images: (B, H, W, C).
        indices: (B,), the examples' places in the training split.
        epoch: scalar, counted from 0.
    """
    first = jax.vmap(lambda index: jax.random.bernoulli(jax.random.fold_in(key, index)))(indices)
    mirrored = first ^ (epoch % 2 == 1)
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def random_translate(key: jax.Array, image: jax.Array, pixels: int) -> jax.Array:
    """Moves an image (H, W, C) by up to `pixels` along both axes, uniformly; what comes in is reflected."""
    padded = jnp.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), 'reflect')
    top, left = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def cutout(key: jax.Array, image: jax.Array, size: int, mean: Sequence[float]) -> jax.Array:
    """Fills a random square of `size` pixels of an image (H, W, C), all of it inside, with the mean (C,)."""
    height, width, _ = image.shape
    corner = jax.random.randint(key, (2,), 0, jnp.array([max(height - size, 0), max(width - size, 0)]) + 1)
    rows, columns = jnp.arange(height) - corner[0], jnp.arange(width) - corner[1]
    inside = ((rows >= 0) & (rows < size))[:, None] & (columns >= 0) & (columns < size)
    return jnp.where(inside[:, :, None], jnp.asarray(mean, image.dtype), image)


def trivial_augment(key: jax.Array, image: jax.Array) -> jax.Array:
    """Does one thing to an image (H, W, C), drawn at random like its strength and direction.

    TrivialAugment in its 'wide' space: Müller & Hutter 2021, arXiv:2103.10158.
    """
    which, how_much, way = jax.random.uniform(key, (3,))
    operation = (which * NUM_OPERATIONS).astype(jnp.int32)
    strength = (how_much * NUM_STRENGTHS).astype(jnp.int32)
    sign = jnp.where(way < 0.5, 1, -1)
    return apply_operation(jnp.round(image * 255), operation, strength, sign) / 255


def apply_operation(image: jax.Array, operation: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    """One operation of TrivialAugment's wide space, with its strengths.

    What Pillow does, which the paper uses; where Pillow cuts a result off to a whole level, ours keeps the fraction.

    Args:
        image: (H, W, C), whole levels from 0 to 255.
        operation: place in the list below, from 0 to 13.
        strength: from 0 to 30.
        sign: 1 or -1, the direction of a rotation, a shear or a translation.
    """
    height, width, _ = image.shape
    signed = sign * strength
    unit = 1 << strength * 6 // 30
    factor = 0.01 + 1.99 * strength / 30
    angle = jnp.deg2rad(sign * (strength * 135 // 30))
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    left = width / 2 * (1 - cosine) + height / 2 * sine  # so that the centre stays where it is
    top = height / 2 * (1 - cosine) - width / 2 * sine
    shear, shift = 0.99 * signed / 30, sign * (strength * 32 // 30)
    return jax.lax.switch(
        operation,
        [
            lambda: image,
            lambda: auto_contrast(image),
            lambda: equalize(image),
            lambda: jnp.where(image < 256 - strength * 256 // 30, image, 255 - image),  # solarize
            lambda: jnp.floor(image / unit) * unit,  # posterize: 8 to 2 bits
            lambda: blend(luminance(image), image, factor),  # color
            lambda: blend(jnp.floor(luminance(image).mean() + 0.5), image, factor),  # contrast
            lambda: blend(jnp.zeros_like(image), image, factor),  # brightness
            lambda: blend(smooth(image), image, factor),  # sharpness
            lambda: transform(image, (cosine, -sine, left), (sine, cosine, top)),  # rotate
            lambda: transform(image, (1, shear, 0), (0, 1, 0)),
            lambda: transform(image, (1, 0, 0), (shear, 1, 0)),
            lambda: transform(image, (1, 0, shift), (0, 1, 0)),
            lambda: transform(image, (1, 0, 0), (0, 1, shift)),
        ],
    )


def auto_contrast(image: jax.Array) -> jax.Array:
    """Stretches each channel of an image (H, W, C) to reach from 0 to 255."""
    low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
    return jnp.where(high > low, (image - low) * 255 / jnp.maximum(high - low, 1), image)


def equalize(image: jax.Array) -> jax.Array:
    """Makes the levels of each channel of an image (H, W, C) about equally frequent, as Pillow's integers do it."""

    def channel(levels: jax.Array) -> jax.Array:  # (H * W,)
        counts = jnp.zeros(256, jnp.int32).at[levels].add(1)
        step = (levels.size - counts[levels.max()]) // 255
        table = (step // 2 + jnp.cumsum(counts) - counts) // jnp.maximum(step, 1)
        return jnp.where(step > 0, jnp.minimum(table, 255)[levels], levels)

    levels = image.astype(jnp.int32).reshape(-1, image.shape[-1])
    return jax.vmap(channel, 1, 1)(levels).reshape(image.shape).astype(image.dtype)


def luminance(image: jax.Array) -> jax.Array:
    """The grey image (H, W, 1) of an image in colour (ITU-R 601-2), in whole levels; of others, the mean channel."""
    weights = (
        jnp.array([0.299, 0.587, 0.114]) if image.shape[-1] == 3 else jnp.full(image.shape[-1], 1 / image.shape[-1])
    )
    return jnp.floor((image * weights).sum(axis=-1, keepdims=True) + 0.5)


def smooth(image: jax.Array) -> jax.Array:
    """Pillow's smoothing of an image (H, W, C): the middle of 3x3 weighs 5, the others 1; the border is left alone."""
    height, width, _ = image.shape
    total = sum(image[row : row + height - 2, column : column + width - 2] for row in range(3) for column in range(3))
    inner = jnp.floor((total + 4 * image[1:-1, 1:-1]) / 13 + 0.5)
    return image.at[1:-1, 1:-1].set(inner)


def blend(start: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """From `start` to an image (H, W, C) and, for factors over 1, beyond it."""
    return jnp.clip(start + factor * (image - start), 0, 255)


def transform(image: jax.Array, column: Sequence[Any], row: Sequence[Any]) -> jax.Array:
    """Moves the pixels of an image (H, W, C) by an affine map; what comes in is black.

    Args:
        image: (H, W, C).
        column: a, b, c, so that a pixel with its centre at (x, y) shows what was at column a x + b y + c.
        row: likewise.
    """
    height, width, _ = image.shape
    y, x = jnp.arange(height)[:, None] + 0.5, jnp.arange(width) + 0.5
    columns, rows = (jnp.floor(a * x + b * y + c).astype(jnp.int32) for a, b, c in (column, row))
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    moved = image[jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)]
    return jnp.where(inside[:, :, None], moved, 0)


def evaluation_views(images: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """The views of images over which logits are averaged.

    Args:
        images: (B, H, W, C).
        kind: 'none'; 'mirror', as they are and mirrored; or 'mirror_translate', both of them in place, one pixel to
            the upper left and one to the lower right with the border reflected, where the views in place count double
            (airbench's).

    Returns:
        The views (V, B, H, W, C) and their weights (V,), which add up to 1.
    """
    views, weights = [images], [1.0]
    if kind == 'mirror_translate':
        _, height, width, _ = images.shape
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), 'reflect')
        views += [padded[:, :height, :width], padded[:, 2:, 2:]]
        weights = [0.5, 0.25, 0.25]
    if kind != 'none':
        views += [view[:, :, ::-1] for view in views]
        weights = [weight / 2 for weight in weights * 2]
    return jnp.stack(views), jnp.asarray(weights)


def make_mixing(config: ConfigDict) -> Mixing | None:
    """Builds what mixes the images of a batch as `config.augment` describes, or None where it describes nothing.

    Where both mixup and CutMix are on, each batch draws one of them.
    """
    kinds: list[Mixing] = []
    if config.mixup_alpha:
        kinds.append(partial(mixup, alpha=config.mixup_alpha))
    if config.cutmix_alpha:
        kinds.append(partial(cutmix, alpha=config.cutmix_alpha))

    def mixing(key: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        choice_key, key = jax.random.split(key)
        return jax.lax.switch(jax.random.randint(choice_key, (), 0, len(kinds)), kinds, key, images)

    return mixing if kinds else None


def mixup(key: jax.Array, images: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Blends each image (B, H, W, C) with the one before it (Zhang et al. 2018, arXiv:1710.09412).

    Returns:
        The images and each one's own share (B,), drawn from Beta(alpha, alpha); the rest is its predecessor's.
    """
    share = symmetric_beta(key, alpha, images.shape[:1])
    weight = share[:, None, None, None]
    return weight * images + (1 - weight) * jnp.roll(images, 1, axis=0), share


def cutmix(key: jax.Array, images: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Replaces a rectangle of each image (B, H, W, C) by that of the one before it (Yun et al. 2019, arXiv:1905.04899).

    The rectangle has the image's proportions, an area of 1 - Beta(alpha, alpha), and its centre anywhere; what is
    outside of the image is cut off.

    Returns:
        The images and each one's own share (B,), its share of the pixels.
    """
    batch, height, width, _ = images.shape
    area_key, centre_key = jax.random.split(key)
    side = jnp.sqrt(1 - symmetric_beta(area_key, alpha, (batch, 1)))
    centres = jax.random.uniform(centre_key, (batch, 2, 1))
    rows = jnp.abs(jnp.arange(height) + 0.5 - centres[:, 0] * height) < side * height / 2  # (B, H)
    columns = jnp.abs(jnp.arange(width) + 0.5 - centres[:, 1] * width) < side * width / 2
    inside = rows[:, :, None] & columns[:, None, :]
    mixed = jnp.where(inside[..., None], jnp.roll(images, 1, axis=0), images)
    return mixed, 1 - inside.mean(axis=(1, 2), dtype=jnp.float32)


def symmetric_beta(key: jax.Array, alpha: float, shape: Sequence[int]) -> jax.Array:
    """Draws float32 numbers of a shape from Beta(alpha, alpha), to within 2^-25.

    By a formula of two uniform numbers (Devroye 1996, 'Random variate generation in one line of code');
    `jax.random.beta` rejects and draws again, in loops, until the last number of a batch has been accepted.
    """
    radius, turn = jax.random.uniform(key, (2, *shape))
    square = ((1 - radius) ** (-1 / alpha) - 1) * jnp.cos(2 * jnp.pi * turn) ** 2
    distance = 0.5 / jnp.sqrt(1 + 1 / square)
    return jnp.where(turn < 0.5, 0.5 - distance, 0.5 + distance)


def random_resized_crop(
    key: jax.Array, image: jax.Array, *, scale: Sequence[float], ratio: Sequence[float]
) -> jax.Array:
    """torchvision's `RandomResizedCrop`: a random crop, enlarged to the image's own size.

    Unlike torchvision on uint8 input, the result is not rounded.

    Args:
        key: determines the crop.
        image: (H, W, C) float.
        scale: lowest and highest area of the crop as a fraction of the image's.
        ratio: lowest and highest width / height of the crop.
    """
    height, width, _ = image.shape
    top, left, crop_height, crop_width = sample_crop(key, height, width, scale=scale, ratio=ratio)
    rows = resize_weights(top, crop_height, height, height)
    columns = resize_weights(left, crop_width, width, width)
    # Full precision: an accelerator's default would round the pixels to bfloat16 or TF32.
    return jnp.einsum('yh,hwc,xw->yxc', rows, image, columns, precision='highest')


def sample_crop(
    key: jax.Array, height: int, width: int, *, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Draws a crop as torchvision's `RandomResizedCrop.get_params` does.

    Area uniform in `scale`, aspect ratio log-uniform in `ratio`, both rounded to whole pixels; the first of ten tries
    that fits the image is placed uniformly. If none fits, the largest centred crop whose ratio lies in `ratio`.

    Returns:
        top, left, crop height and crop width: int32 scalars, in pixels.
    """
    # One draw for all: every call of jax.random compiles to a generator of its own, a tenth of a second each.
    draws = jax.random.uniform(key, (2 * CROP_TRIES + 2,))
    areas, ratios, (down, right) = jnp.split(draws, (CROP_TRIES, 2 * CROP_TRIES))
    area = height * width * (scale[0] + areas * (scale[1] - scale[0]))
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** ratios
    widths = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    heights = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)

    fallback_aspect = min(max(width / height, ratio[0]), ratio[1])
    fallback_height = max(1, min(height, round(width / fallback_aspect)))
    fallback_width = max(1, min(width, round(height * fallback_aspect)))

    found, first = fits.any(), fits.argmax()
    crop_height = jnp.where(found, heights[first], fallback_height)
    crop_width = jnp.where(found, widths[first], fallback_width)
    top = (down * (height - crop_height + 1)).astype(jnp.int32)
    left = (right * (width - crop_width + 1)).astype(jnp.int32)
    top = jnp.where(found, top, (height - fallback_height) // 2)
    left = jnp.where(found, left, (width - fallback_width) // 2)
    return top, left, crop_height, crop_width


def resize_weights(start: jax.Array, length: jax.Array, in_size: int, out_size: int) -> jax.Array:
    """Antialiased bilinear resampling of pixels [start, start + length) as a matrix (out_size, in_size).

    Pillow's and torchvision's definition: a triangle filter, widened by the factor of a reduction, over the pixels of
    the crop alone, its weights normalised.
    """
    factor = length / out_size  # input pixels per output pixel
    support = jnp.maximum(factor, 1.0)
    centres = start + (jnp.arange(out_size) + 0.5) * factor
    pixels = jnp.arange(in_size)
    distance = jnp.abs(pixels + 0.5 - centres[:, None]) / support
    inside = (pixels >= start) & (pixels < start + length)
    weights = jnp.where(inside, jnp.maximum(1.0 - distance, 0.0), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)
