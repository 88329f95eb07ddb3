import collections
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from configs import default
from flax_dlvc import augment
from flax_dlvc.augment import (
    NUM_OPERATIONS,
    NUM_STRENGTHS,
    alternating_mirror,
    apply_operation,
    augment_batch,
    cutmix,
    cutout,
    evaluation_views,
    make_augmentation,
    make_batch_augmentation,
    make_mixing,
    mixup,
    random_mirror,
    random_resized_crop,
    random_translate,
    resize_weights,
    sample_crop,
    symmetric_beta,
    trivial_augment,
)

pytestmark = pytest.mark.usefixtures('quick_compilation')

MEAN = (0.5, 0.4, 0.3)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
KEYS = 8192


def sample_crops(height, width, scale, ratio, seed=0):
    """Top, left, height and width of many crops, (KEYS, 4)."""
    keys = jax.random.split(jax.random.key(seed), KEYS)
    sample = jax.jit(jax.vmap(partial(sample_crop, height=height, width=width, scale=scale, ratio=ratio)))
    return np.stack(sample(keys), axis=1)


def get_params(generator, height, width, scale, ratio):
    """torchvision's `RandomResizedCrop.get_params`, statement by statement."""
    area = height * width
    log_ratio = np.log(ratio)
    for _ in range(10):
        target_area = area * generator.uniform(scale[0], scale[1])
        aspect_ratio = np.exp(generator.uniform(log_ratio[0], log_ratio[1]))
        w = round(np.sqrt(target_area * aspect_ratio))
        h = round(np.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            return generator.integers(0, height - h + 1), generator.integers(0, width - w + 1), h, w
    in_ratio = width / height
    if in_ratio < min(ratio):
        w = width
        h = round(w / min(ratio))
    elif in_ratio > max(ratio):
        h = height
        w = round(h * max(ratio))
    else:
        w = width
        h = height
    return (height - h) // 2, (width - w) // 2, h, w


def assert_same_distribution(left, right):
    """Two samples' cumulative shares, at every value, within five standard deviations (Kolmogorov-Smirnov)."""
    values = np.unique(np.concatenate([left, right]))
    shares = [np.searchsorted(np.sort(sample), values, side='right') / len(sample) for sample in (left, right)]
    assert np.abs(shares[0] - shares[1]).max() < 2.5 * np.sqrt(2 / KEYS)


@pytest.mark.parametrize(
    ('height', 'width', 'scale', 'ratio'),
    [
        (32, 32, SCALE, RATIO),
        (32, 32, (0.9, 1.0), (0.4, 2.5)),  # most tries do not fit
        (40, 24, (0.6, 1.0), RATIO),
    ],
)
def test_crops_are_torchvisions(height, width, scale, ratio):
    generator = np.random.default_rng(0)
    expected = np.array([get_params(generator, height, width, scale, ratio) for _ in range(KEYS)])
    crops = sample_crops(height, width, scale, ratio)
    for column in range(4):
        assert_same_distribution(crops[:, column], expected[:, column])
    assert_same_distribution(crops[:, 2] * crops[:, 3], expected[:, 2] * expected[:, 3])
    assert_same_distribution(crops[:, 3] / crops[:, 2], expected[:, 3] / expected[:, 2])
    top, left, crop_height, crop_width = crops.T
    assert (top >= 0).all() and (top + crop_height <= height).all() and (crop_height > 0).all()
    assert (left >= 0).all() and (left + crop_width <= width).all() and (crop_width > 0).all()


def test_area_ratio_and_place_are_uniform():
    """Where every try fits and rounding is fine: on a large image."""
    size = 1000
    top, left, crop_height, crop_width = sample_crops(size, size, (0.1, 0.5), (0.5, 2.0)).T
    uniform = (np.arange(KEYS) + 0.5) / KEYS
    for values in (
        (crop_height * crop_width / size**2 - 0.1) / 0.4,
        np.log2(crop_width / crop_height) / 2 + 0.5,
        (top + 0.5) / (size - crop_height + 1),
        (left + 0.5) / (size - crop_width + 1),
    ):
        assert np.abs(np.sort(values) - uniform).max() < 2 / np.sqrt(KEYS)
    independent = np.corrcoef([crop_height * crop_width, crop_width / crop_height, top / (size - crop_height), left])
    assert abs(independent[0, 1]) < 0.05 and abs(independent[2, 3]) < 0.05


@pytest.mark.parametrize(
    ('height', 'width', 'scale', 'ratio', 'expected'),
    [
        (32, 32, (1.0, 1.0), (2.0, 3.0), (8, 0, 16, 32)),  # too wide for any try: full width, lowest ratio
        (32, 32, (1.0, 1.0), (0.25, 0.5), (0, 8, 32, 16)),
        (10, 40, (1.0, 1.0), RATIO, (0, 13, 10, 13)),
        (40, 10, (1.0, 1.0), RATIO, (13, 0, 13, 10)),
        (32, 32, (1.0, 1.0), (1.0, 1.0), (0, 0, 32, 32)),
        (32, 32, (1e-6, 1e-6), RATIO, (0, 0, 32, 32)),  # no try has a pixel
        (32, 32, (1 / 1024, 1 / 1024), (9.0, 9.0), (14, 0, 4, 32)),  # 3 x 0 pixels
        (32, 32, (1 / 1024, 1 / 1024), (1 / 9, 1 / 9), (0, 14, 32, 4)),
    ],
)
def test_the_largest_centred_crop_where_none_fits(height, width, scale, ratio, expected):
    assert get_params(np.random.default_rng(0), height, width, scale, ratio) == expected
    for seed in range(3):
        assert sample_crop(jax.random.key(seed), height, width, scale=scale, ratio=ratio) == expected


def test_the_largest_crop_is_taken_after_ten_tries():
    generator = np.random.default_rng(0)
    area, aspect = 1024 * generator.uniform(0.95, 1, 300_000), np.exp(np.log(2) * generator.uniform(-1, 1, 300_000))
    fits = np.maximum(np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))) <= 32
    crops = sample_crops(32, 32, (0.95, 1.0), (0.5, 2.0))
    # The whole image is what is left when no try fits; of those that fit, hardly any is as large.
    whole = np.mean(fits & (np.round(np.sqrt(area * aspect)) == 32) & (np.round(np.sqrt(area / aspect)) == 32))
    expected = (1 - fits.mean()) ** 10
    expected += (1 - expected) * whole / fits.mean()
    assert 0.2 < expected < 0.8
    assert abs((crops[:, 2:] == 32).all(axis=1).mean() - expected) < 3 * np.sqrt(0.25 / KEYS)


@pytest.mark.parametrize(('ratio', 'expected'), [((100.0, 100.0), (1, 32)), ((0.01, 0.01), (32, 1))])
def test_a_crop_has_at_least_a_pixel(ratio, expected):
    *_, height, width = sample_crop(jax.random.key(0), 32, 32, scale=(1.0, 1.0), ratio=ratio)
    assert (height, width) == expected


def pillow_resize(channel, top, left, crop_height, crop_width, out_height, out_width):
    """Crop, then antialiased bilinear resize, of a float channel (H, W)."""
    image = Image.fromarray(channel).crop((left, top, left + crop_width, top + crop_height))
    return np.asarray(image.resize((out_width, out_height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize(('height', 'width'), [(32, 32), (24, 40)])
def test_resized_crops_are_pillows(height, width):
    generator = np.random.default_rng(0)
    image = generator.uniform(0, 255, (height, width, 3)).astype(np.float32)

    @jax.jit
    @jax.vmap
    def sample_and_crop(key):
        crop = sample_crop(key, height, width, scale=SCALE, ratio=RATIO)
        return crop, random_resized_crop(key, jnp.asarray(image), scale=SCALE, ratio=RATIO)

    crops, images = jax.device_get(sample_and_crop(jax.random.split(jax.random.key(1), 100)))
    for top, left, crop_height, crop_width, actual in zip(*crops, images, strict=True):
        expected = np.stack(
            [
                pillow_resize(np.ascontiguousarray(image[..., c]), top, left, crop_height, crop_width, height, width)
                for c in range(3)
            ],
            axis=-1,
        )
        np.testing.assert_allclose(actual, expected, atol=1e-3)
    assert len(set(zip(crops[2].tolist(), crops[3].tolist(), strict=True))) > 50


@pytest.mark.parametrize(
    ('start', 'length', 'in_size', 'out_size'),
    [(0, 32, 32, 8), (3, 29, 32, 8), (5, 20, 32, 13), (10, 11, 32, 10), (0, 32, 32, 31), (4, 3, 32, 1), (31, 1, 32, 5)],
)
def test_resize_weights_reduce_with_antialiasing(start, length, in_size, out_size):
    line = np.random.default_rng(0).uniform(0, 255, in_size).astype(np.float32)
    weights = resize_weights(start, length, in_size, out_size)
    expected = pillow_resize(line[None].repeat(2, axis=0), 0, start, 2, length, 2, out_size)[0]
    assert weights.shape == (out_size, in_size)
    np.testing.assert_allclose(weights @ line, expected, atol=1e-3)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)


def test_a_crop_of_the_whole_image_changes_nothing():
    np.testing.assert_array_equal(resize_weights(0, 32, 32, 32), np.eye(32))
    image = np.random.default_rng(0).uniform(size=(32, 32, 3)).astype(np.float32)
    same = random_resized_crop(jax.random.key(0), image, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_allclose(same, image, atol=1e-7)


def test_mirror_is_exact_and_half_the_time():
    image = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), KEYS)
    images = np.asarray(jax.vmap(random_mirror, (0, None))(keys, jnp.asarray(image)))
    mirrored = (images == image[:, ::-1]).all((1, 2, 3))
    same = (images == image).all((1, 2, 3))
    assert (mirrored ^ same).all()
    assert abs(mirrored.mean() - 0.5) < 2.5 / np.sqrt(KEYS)


def make_config(crop, mirror):
    config = default.get_config().augment
    config.random_resized_crop, config.random_mirror = crop, mirror
    return config


def test_no_augmentation():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    augmentation = make_batch_augmentation(make_config(False, False), MEAN, 10)
    seen, shares = augmentation(jax.random.key(0), images, np.arange(2), jnp.int32(3))
    np.testing.assert_allclose(seen, images / 255, rtol=1e-6)
    assert shares is None and seen.dtype == np.float32


def test_examples_and_steps_are_augmented_differently():
    """Each image becomes its random number, which is that of its step and of its place in the split."""

    def seen(step, indices):
        images = np.zeros((8, 4, 4, 3), np.uint8)
        mark = lambda key, image: jnp.full_like(image, jax.random.uniform(key))  # noqa: E731
        batch, _ = augment_batch(jax.random.key(3), images, indices, jnp.int32(step), augmentation=mark)
        return np.asarray(batch)[:, 0, 0, 0]

    first, second = seen(0, np.arange(8)), seen(1, np.arange(8))
    assert len(np.unique([first, second])) == 16
    np.testing.assert_array_equal(seen(0, np.arange(8)[::-1]), first[::-1])


def test_what_mixes_a_batch_has_a_key_of_its_step_and_part_that_no_example_has():
    def mark(key, image):
        """Pixels become the random numbers of the keys that an example has or may make of its own."""
        keys = [key, *jax.random.split(key), *(jax.random.fold_in(key, number) for number in range(5))]
        numbers = jnp.stack([jax.random.uniform(each) for each in keys])
        return image.reshape(-1).at[: len(keys)].set(numbers).reshape(image.shape)

    def mixing(key, batch):
        return batch, jnp.full(len(batch), jax.random.uniform(key))

    def seen(step, indices):
        images = np.zeros((8, 4, 4, 3), np.uint8)
        key = jax.random.key(3)
        return augment_batch(key, images, indices, jnp.int32(step), augmentation=mark, mixing=mixing)

    marked, shares = seen(0, np.arange(8))
    assert not np.isin(shares, marked.reshape(8, -1)[:, :8]).any()
    others = [seen(0, np.arange(8, 16))[1][0], seen(1, np.arange(8))[1][0]]
    assert len(np.unique([shares[0], *others])) == 3


def test_the_mirror_has_a_key_that_no_step_has():
    config = make_config(False, False)
    config.alternating_mirror = True
    images = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 3), np.uint8)
    arguments = jax.random.key(0), images, np.arange(64)
    seen = np.asarray(make_batch_augmentation(config, MEAN, 1)(*arguments, jnp.int32(0))[0])
    by_the_steps_key = np.asarray(alternating_mirror(*arguments, jnp.int32(0))) / np.float32(255)
    assert 16 < np.sum((seen != by_the_steps_key).any(axis=(1, 2, 3))) < 48


def test_the_mirror_alternates_with_the_first_step_of_an_epoch():
    config = make_config(False, False)
    config.alternating_mirror = True
    augmentation = make_batch_augmentation(config, MEAN, 3)
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
    seen = [np.asarray(augmentation(jax.random.key(0), images, np.arange(8), jnp.int32(step))[0]) for step in range(7)]
    for step in range(7):
        epoch = step // 3
        np.testing.assert_array_equal(seen[step], seen[0] if epoch % 2 == 0 else seen[0][:, :, ::-1])


@pytest.mark.parametrize(('crop', 'mirror'), [(True, False), (False, True), (True, True)])
def test_augmentation_is_a_function_of_its_key(crop, mirror):
    augmentation = jax.jit(jax.vmap(make_augmentation(make_config(crop, mirror), MEAN), (0, None)))
    image = jnp.asarray(np.random.default_rng(0).uniform(size=(8, 8, 3)), jnp.float32)
    images = np.asarray(augmentation(jax.random.split(jax.random.key(0), 20), image))
    backwards = np.asarray(augmentation(jax.random.split(jax.random.key(0), 20)[::-1], image))
    np.testing.assert_array_equal(images, backwards[::-1])
    assert images.shape == (20, 8, 8, 3) and images.dtype == np.float32
    distinct = {each.tobytes() for each in images}
    assert len(distinct) == 2 if not crop else len(distinct) > 15


def test_augmentation_crops_as_configured_then_mirrors():
    config = make_config(True, True)
    config.random_resized_crop_scale, config.random_resized_crop_ratio = (0.25, 0.25), (1.0, 1.0)
    augmentation = jax.jit(jax.vmap(make_augmentation(config, MEAN), (0, None)))
    image = np.random.default_rng(0).uniform(size=(8, 8, 1)).astype(np.float32)
    images = np.asarray(augmentation(jax.random.split(jax.random.key(0), 200), image))
    possible = [  # every place of a 4x4 crop, and each mirrored
        pillow_resize(image[..., 0], top, left, 4, 4, 8, 8)[:, ::step]
        for top in range(5)
        for left in range(5)
        for step in (1, -1)
    ]
    seen = set()
    for actual in images:
        errors = [np.abs(actual[..., 0] - each).max() for each in possible]
        assert min(errors) < 1e-5
        seen.add(int(np.argmin(errors)))
    assert len(seen) > 40  # of 50


def test_translation_and_cutout_as_configured_are_independent_and_cutout_comes_last():
    """An image whose pixels are all different tells where it went; the hole, in the mean, where it was cut."""
    config = make_config(False, False)
    config.random_translate, config.cutout = 2, 3
    augmentation = jax.jit(jax.vmap(make_augmentation(config, MEAN), (0, None)))
    image = np.arange(1, 8 * 10 + 1, dtype=np.float32).reshape(8, 10, 1).repeat(3, axis=2)
    images = np.asarray(augmentation(jax.random.split(jax.random.key(0), 1000), image))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), 'reflect')
    places = []
    for actual in images:
        hole = (actual == np.float32(MEAN)).all(axis=-1)
        assert hole.sum() == 9
        top, left = next(
            (top, left)
            for top in range(5)
            for left in range(5)
            if (actual == padded[top : top + 8, left : left + 10])[~hole].all()
        )
        places.append((top, left, *np.argwhere(hole)[0]))
    assert [len(np.unique(column)) for column in np.transpose(places)] == [5, 5, 6, 8]
    assert np.abs(np.corrcoef(np.transpose(places)) - np.eye(4)).max() < 0.15


@pytest.mark.parametrize('field', ['random_translate', 'cutout'])
def test_either_alone_is_an_augmentation(field):
    config = make_config(False, False)
    config[field] = 1
    image = np.random.default_rng(0).uniform(size=(4, 4, 3)).astype(np.float32)
    augmentation = make_augmentation(config, MEAN)
    changed = [(np.asarray(augmentation(jax.random.key(seed), image)) != image).any(axis=-1).sum() for seed in range(4)]
    assert max(changed) == 1 if field == 'cutout' else max(changed) > 4


def test_alternating_mirror_shows_every_image_once_each_way():
    images = np.random.default_rng(0).uniform(size=(200, 4, 4, 3)).astype(np.float32)
    mirror = jax.jit(alternating_mirror)
    epochs = [np.asarray(mirror(jax.random.key(1), images, np.arange(200), epoch)) for epoch in range(3)]
    mirrored = [(shown == images[:, :, ::-1]).all(axis=(1, 2, 3)) for shown in epochs]
    for shown, flip in zip(epochs, mirrored, strict=True):
        np.testing.assert_array_equal(shown, np.where(flip[:, None, None, None], images[:, :, ::-1], images))
    assert 70 < mirrored[0].sum() < 130
    np.testing.assert_array_equal(mirrored[1], ~mirrored[0])
    np.testing.assert_array_equal(mirrored[2], mirrored[0])
    backwards = mirror(jax.random.key(1), images[::-1], np.arange(200)[::-1], 0)  # bound to the example, not the place
    np.testing.assert_array_equal(backwards, epochs[0][::-1])


def test_translation_reflects_and_reaches_every_place_equally_often():
    image = np.random.default_rng(0).uniform(size=(6, 5, 2)).astype(np.float32)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), 'reflect')
    possible = [padded[i : i + 6, j : j + 5].tobytes() for i in range(5) for j in range(5)]
    moved = jax.jit(jax.vmap(random_translate, (0, None, None)), static_argnums=2)(
        jax.random.split(jax.random.key(0), 2500), image, 2
    )
    places = collections.Counter(possible.index(np.asarray(each).tobytes()) for each in jax.device_get(moved))
    assert len(places) == 25 and all(abs(count - 100) < 40 for count in places.values())


def test_cutout_fills_one_square_with_the_mean():
    image = np.ones((8, 8, 3), np.float32)
    cut = jax.jit(jax.vmap(partial(cutout, size=3, mean=MEAN), (0, None)))(
        jax.random.split(jax.random.key(0), 300), image
    )
    holes = np.asarray((cut == np.float32(MEAN)).all(axis=-1))
    np.testing.assert_array_equal(np.asarray(cut)[~holes], 1)
    corners = set()
    for hole in holes:
        rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
        assert hole.sum() == 9 and np.ptp(rows) == np.ptp(columns) == 2
        corners.add((rows[0], columns[0]))
    assert len(corners) == 36


@pytest.mark.parametrize(('size', 'height', 'corners'), [(5, 4, 4), (10, 4, 1), (4, 4, 5), (3, 3, 12)])
def test_a_square_that_is_larger_than_the_image_fills_it(size, height, corners):
    """On 4 x 8 pixels: as many rows as there are, and columns from as many places as the square fits in."""
    image = np.ones((4, 8, 3), np.float32)
    keys = jax.random.split(jax.random.key(0), 200)
    cut = np.asarray(jax.vmap(partial(cutout, size=size, mean=MEAN), (0, None))(keys, image))
    holes = (cut == np.float32(MEAN)).all(axis=-1)
    assert (holes.sum(axis=(1, 2)) == height * min(size, 8)).all()
    assert len({hole.tobytes() for hole in holes}) == corners


def test_six_views_are_airbenchs():
    images = np.random.default_rng(0).uniform(size=(3, 5, 5, 2)).astype(np.float32)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), 'reflect')
    expected = np.zeros(3)
    score = lambda batch: (batch * np.arange(50).reshape(5, 5, 2)).sum(axis=(1, 2, 3))  # noqa: E731, any function
    mirrored = lambda batch: 0.5 * score(batch) + 0.5 * score(batch[:, :, ::-1])  # noqa: E731
    expected = 0.5 * mirrored(images) + 0.25 * (mirrored(padded[:, :5, :5]) + mirrored(padded[:, 2:, 2:]))
    views, weights = evaluation_views(images, 'mirror_translate')
    assert views.shape == (6, 3, 5, 5, 2)
    np.testing.assert_allclose(
        sum(w * score(np.asarray(v)) for w, v in zip(weights, views, strict=True)), expected, 1e-5
    )
    views, weights = evaluation_views(images, 'mirror')
    np.testing.assert_allclose(
        sum(w * score(np.asarray(v)) for w, v in zip(weights, views, strict=True)), mirrored(images), 1e-5
    )
    views, weights = evaluation_views(images, 'none')
    np.testing.assert_array_equal(views[0], images)
    assert weights.tolist() == [1]


@pytest.mark.parametrize('alpha', [0.1, 0.5, 1.0, 5.0])
def test_symmetric_beta_has_the_distribution_of_numpys(alpha):
    drawn = jax.jit(symmetric_beta, static_argnums=(1, 2))(jax.random.key(0), alpha, (2, KEYS // 2))
    assert drawn.shape == (2, KEYS // 2) and drawn.dtype == np.float32
    expected = np.random.default_rng(0).beta(alpha, alpha, KEYS)
    assert_same_distribution(np.round(np.ravel(drawn), 6), np.round(expected, 6))  # next to 0 and 1 float32 is coarse


def test_mixup_blends_with_the_image_before():
    images = np.random.default_rng(0).uniform(size=(KEYS, 2, 3, 1)).astype(np.float32)
    mixed, share = jax.jit(mixup, static_argnums=2)(jax.random.key(0), images, 0.4)
    weight = np.asarray(share)[:, None, None, None]
    np.testing.assert_allclose(mixed, weight * images + (1 - weight) * np.roll(images, 1, axis=0), rtol=1e-5, atol=1e-6)
    assert_same_distribution(share, np.random.default_rng(0).beta(0.4, 0.4, KEYS))


def draw_rectangles(generator, height, width, alpha):
    """CutMix's rectangles as the paper has them, (KEYS, H, W): pixels whose centres lie in them."""
    side = np.sqrt(1 - generator.beta(alpha, alpha, KEYS))
    spans = []
    for pixels in (height, width):
        centre = generator.uniform(0, pixels, KEYS)
        low, high = centre - side * pixels / 2, centre + side * pixels / 2
        middle = np.arange(pixels) + 0.5
        spans.append((middle > low[:, None]) & (middle < high[:, None]))
    return spans[0][:, :, None] & spans[1][:, None, :]


def test_cutmix_replaces_a_rectangle_and_its_share_is_that_of_the_pixels():
    height, width = 12, 20
    images = np.random.default_rng(0).uniform(size=(KEYS, height, width, 1)).astype(np.float32)
    mixed, share = jax.device_get(jax.jit(cutmix, static_argnums=2)(jax.random.key(0), images, 0.7))
    foreign = (mixed != images).any(axis=-1)
    np.testing.assert_array_equal(mixed, np.where(foreign[..., None], np.roll(images, 1, axis=0), images))
    np.testing.assert_allclose(share, 1 - foreign.mean(axis=(1, 2)), rtol=1e-5, atol=1e-6)
    rows, columns = foreign.any(axis=2), foreign.any(axis=1)
    np.testing.assert_array_equal(foreign, rows[:, :, None] & columns[:, None, :])

    expected = draw_rectangles(np.random.default_rng(1), height, width, 0.7)
    assert_same_distribution(share, 1 - expected.mean(axis=(1, 2)))
    for actual_span, expected_span in ((rows, expected.any(axis=2)), (columns, expected.any(axis=1))):
        assert_same_distribution(actual_span.sum(axis=1), expected_span.sum(axis=1))
        assert_same_distribution(actual_span.argmax(axis=1), expected_span.argmax(axis=1))


@pytest.mark.parametrize(('mixup_alpha', 'cutmix_alpha'), [(0.3, 0.0), (0.0, 0.4), (0.3, 0.4)])
def test_each_batch_is_mixed_as_configured(monkeypatch, mixup_alpha, cutmix_alpha):
    """With stand-ins whose shares say which one was called, with what alpha, and draw a number with their key."""

    def stand_in(sign):
        return lambda key, images, alpha: (images + jax.random.uniform(key), jnp.full(2, sign * alpha))

    monkeypatch.setattr(augment, 'mixup', stand_in(1))
    monkeypatch.setattr(augment, 'cutmix', stand_in(-1))
    config = make_config(False, False)
    config.mixup_alpha, config.cutmix_alpha = mixup_alpha, cutmix_alpha
    mix = jax.jit(jax.vmap(make_mixing(config), (0, None)))
    images, shares = mix(jax.random.split(jax.random.key(0), 1000), np.zeros((2, 1, 1, 1), np.float32))
    numbers, shares = np.asarray(images)[:, 0, 0, 0, 0], np.asarray(shares)[:, 0].round(6)
    expected = [np.float32(alpha) for alpha in (-cutmix_alpha, mixup_alpha) if alpha]
    kinds, counts = np.unique(shares, return_counts=True)
    np.testing.assert_allclose(kinds, expected, rtol=1e-5)
    assert (np.abs(counts - 1000 / len(expected)) < 80).all()
    for kind in kinds:  # whichever is chosen, its own randomness is not what it was chosen by
        assert abs(numbers[shares == kind].mean() - 0.5) < 0.07 and abs(numbers[shares == kind].std() - 0.289) < 0.03


def test_no_mixing():
    assert make_mixing(make_config(False, False)) is None


def pillow_operations(image, strength, sign):
    """What the operations of TrivialAugment's wide space make of a picture, in the paper's parameters."""
    shear, shift, factor = sign * strength * 0.99 / 30, sign * int(strength * 32 / 30), 0.01 + strength * 1.99 / 30
    move = lambda *matrix: image.transform(image.size, Image.Transform.AFFINE, matrix)  # noqa: E731
    return {
        'identity': image,
        'auto_contrast': ImageOps.autocontrast(image),
        'equalize': ImageOps.equalize(image),
        'solarize': ImageOps.solarize(image, 256 - int(strength * 256 / 30)),
        'posterize': ImageOps.posterize(image, 8 - int(strength * 6 / 30)),
        'color': ImageEnhance.Color(image).enhance(factor),
        'contrast': ImageEnhance.Contrast(image).enhance(factor),
        'brightness': ImageEnhance.Brightness(image).enhance(factor),
        'sharpness': ImageEnhance.Sharpness(image).enhance(factor),
        'rotate': image.rotate(sign * int(strength * 135 / 30)),
        'shear_x': move(1, shear, 0, 0, 1, 0),
        'shear_y': move(1, 0, 0, shear, 1, 0),
        'translate_x': move(1, 0, shift, 0, 1, 0),
        'translate_y': move(1, 0, 0, 0, 1, shift),
    }


def between_pixels(name, strength, sign):
    """Where a pixel of 32x32 is taken from the line between two, so that rounding decides: (H, W) bool."""
    y, x = np.mgrid[:32, :32] - 15.5
    angle, shear = np.deg2rad(sign * (strength * 135 // 30)), sign * strength * 0.99 / 30
    row, column = {
        'rotate': (np.sin(angle) * x + np.cos(angle) * y, np.cos(angle) * x - np.sin(angle) * y),
        'shear_x': (y, x + 16 + shear * (y + 16)),
        'shear_y': (y + 16 + shear * (x + 16), x),
    }[name]
    return np.minimum(*(np.abs(each - each.round()) for each in (row, column))) < 1e-3


@pytest.fixture(scope='module')
def photograph():
    """A part of a real photograph, 32x32; (H, W, C) uint8."""
    whole = Image.fromarray(load_sample_image('flower.jpg')).crop((200, 100, 500, 400))
    return np.asarray(whole.resize((32, 32), Image.Resampling.BILINEAR))


@pytest.fixture(scope='module')
def all_operations(photograph):
    """Every operation at every strength in both directions: (14, 31, 2, H, W, C)."""
    each = apply_operation
    for axes in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None)):
        each = jax.vmap(each, axes)
    numbers = jnp.arange(NUM_OPERATIONS), jnp.arange(NUM_STRENGTHS), jnp.array([1, -1])
    return np.asarray(jax.jit(each)(jnp.asarray(photograph, jnp.float32), *numbers))


def test_operations_are_pillows(photograph, all_operations):
    """Levels within one, which Pillow cuts off; pixels that are moved are equal, unless from the line between two."""
    picture = Image.fromarray(photograph)
    changed = set()
    for strength in range(NUM_STRENGTHS):
        for place, sign in enumerate((1, -1)):
            expected = pillow_operations(picture, strength, sign)
            for number, (name, result) in enumerate(expected.items()):
                actual, wanted = all_operations[number, strength, place], np.asarray(result, np.float32)
                if name in ('rotate', 'shear_x', 'shear_y'):
                    different = (actual != wanted).any(axis=-1)
                    assert not (different & ~between_pixels(name, strength, sign)).any(), (name, strength, sign)
                else:
                    tolerance = 0 if name in ('identity', 'equalize', 'solarize', 'posterize') else 1
                    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance + 1e-3, err_msg=name)
                if np.abs(actual - photograph).max() > 2:
                    changed.add(name)
    assert changed == set(expected) - {'identity'}


def test_trivial_augment_draws_one_operation_for_each_image(photograph, all_operations):
    possible = all_operations.reshape(-1, photograph.size) / 255
    image = jnp.asarray(photograph / 255, jnp.float32)
    images = jax.jit(jax.vmap(trivial_augment, (0, None)))(jax.random.split(jax.random.key(0), 1000), image)
    images = np.asarray(images, np.float64).reshape(1000, -1)
    squares = (images**2).sum(axis=1)[:, None] + (possible.astype(np.float64) ** 2).sum(axis=1)
    distances = squares - 2 * images @ possible.T.astype(np.float64)
    assert distances.min(axis=1).max() < 1e-6
    nearest = distances.argmin(axis=1) // (2 * NUM_STRENGTHS)
    counts = np.bincount(nearest, minlength=NUM_OPERATIONS)
    assert counts.min() > 35 and len(np.unique(images.round(4), axis=0)) > 300
    # Weakest strengths that change nothing count as the first operation's.
    assert abs(counts[1:9].mean() - 1000 / 14) < 15


@pytest.mark.parametrize('shape', [(8, 8, 1), (9, 6, 3)])
def test_trivial_augment_takes_small_and_grey_images(shape):
    config = make_config(False, False)
    config.trivial_augment = True
    augmentation = jax.jit(jax.vmap(make_augmentation(config, MEAN), (0, None)))
    images = augmentation(jax.random.split(jax.random.key(0), 200), jnp.full(shape, 0.5))
    assert images.shape == (200, *shape) and np.isfinite(images).all() and np.min(images) >= 0 and np.max(images) <= 1


@pytest.mark.parametrize('channels', [1, 2, 3])
def test_luminance_weighs_colours_and_averages_other_channels(channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 4, channels)).astype(np.float32)
    weights = {1: [1], 2: [0.5, 0.5], 3: [0.299, 0.587, 0.114]}[channels]
    expected = np.floor(np.average(image, axis=-1, weights=weights)[..., None] + 0.5)
    np.testing.assert_array_equal(augment.luminance(jnp.asarray(image)), expected)
