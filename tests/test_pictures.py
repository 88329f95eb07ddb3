"""What is drawn of a run's images and predictions."""

import io

import matplotlib
import numpy as np
import pytest
from conftest import make_config
from PIL import Image

from flax_dlvc import data, explain, pictures
from flax_dlvc.metrics import Predictions


def test_pictures_are_in_no_style_of_the_users():
    """Not one for papers, either, which would want LaTeX."""

    @pictures.plain_style({'font.size': 9})
    def draw():
        return pictures.encode_png(pictures.confusion_matrix(np.eye(3), ['a', 'b', 'c'], 'a title'))

    drawn = draw()
    with matplotlib.rc_context({'text.usetex': True, 'savefig.bbox': 'tight', 'axes.facecolor': 'red'}):
        assert draw() == drawn
        assert matplotlib.rcParams['text.usetex']


def test_without_augmentation_training_sees_the_datasets_images(digits):
    images, names = pictures.seen_in_training(make_config(batch_size=16), digits)
    indices = data.epoch_order(len(digits.train), 0, 1)[:16]
    np.testing.assert_allclose(images, digits.train.images[indices] / np.float32(255), rtol=0, atol=1e-6)
    assert names == [digits.class_names[label] for label in digits.train.labels[indices]]


def test_with_augmentation_the_images_change_with_the_seed_alone(digits):
    def seen(**fields):
        return pictures.seen_in_training(make_config(batch_size=16, **fields), digits)[0]

    augmented = seen(augment__random_resized_crop=True)
    assert np.abs(augmented - seen()).max(axis=(1, 2, 3)).min() > 0.1
    np.testing.assert_array_equal(augmented, seen(augment__random_resized_crop=True))
    assert not np.array_equal(augmented, seen(augment__random_resized_crop=True, seed=2**32 - 1))


def test_a_mixed_image_is_named_after_both(digits):
    config = make_config(batch_size=16, augment__mixup_alpha=1.0)
    images, names = pictures.seen_in_training(config, digits)
    plain, classes = pictures.seen_in_training(make_config(batch_size=16), digits)
    for number, name in enumerate(names):
        (own, share), (other, rest) = (line.rsplit(' ', 1) for line in name.split('\n'))
        assert (own, other) == (classes[number], classes[number - 1])
        blend = float(share) * plain[number] + float(rest) * plain[number - 1]
        np.testing.assert_allclose(images[number], blend, atol=0.02)


@pytest.mark.parametrize(('shape', 'scale'), [((4, 6, 1), 25), ((32, 32, 3), 4), ((9, 200, 3), 1)])
def test_the_grid_shows_each_image_under_its_label(shape, scale):
    images = np.random.default_rng(0).integers(0, 256, (5, *shape))
    labels = ['Agq', '', 'Agq\nAgq', '$x1$', 'ж']
    grid = 255 - np.asarray(pictures.image_grid(images / np.float32(255), labels, columns=2)).astype(int)
    height, width = scale * shape[0], scale * shape[1]
    assert grid.shape == (3 * (height + pictures.HEADER), 2 * (width + pictures.GAP), 3)
    cells = grid.reshape(3, height + pictures.HEADER, 2, width + pictures.GAP, 3).swapaxes(1, 2)
    cells = cells.reshape(6, *cells.shape[2:])
    cells = cells[:, :, pictures.GAP // 2 :][:, :, :width]
    for cell, image in zip(cells, images, strict=False):
        shown = 255 - cell[pictures.HEADER :]
        np.testing.assert_array_equal(shown, np.broadcast_to(np.kron(image, np.ones((scale, scale, 1))), shown.shape))
    assert not cells[5].any()
    ink = cells[:5, : pictures.HEADER, :, 0].sum(axis=2)
    assert not ink[:, 0].any() and not ink[:, -1].any()  # nothing is cut off
    lines = [np.flatnonzero(np.diff(rows > 0)).size // 2 for rows in ink]
    assert lines == [1, 0, 2, 1, 1]
    centre = (cells[:5, : pictures.HEADER, :, 0].sum(axis=1) @ np.arange(width)) / ink.sum(axis=1).clip(1)
    assert centre[[0, 2, 3, 4]] == pytest.approx((width - 1) / 2, abs=4)


def test_a_confusion_matrix_is_brightest_where_the_largest_share_is():
    """The largest count is elsewhere: rows are compared, not cells."""
    counts = np.array([[1, 9, 0], [30, 30, 40], [2, 2, 4]])
    figure = pictures.confusion_matrix(counts, ('cat', 'dog', 'frog'), 'a title')
    picture = Image.open(io.BytesIO(pictures.encode_png(figure))).convert('L')
    assert picture.size == (750, 750)
    (axes,) = figure.axes
    brightness = np.empty((3, 3))
    for row, column in np.ndindex(3, 3):
        # Beside the cell's number.
        x, y = axes.transData.transform((column + 0.3, row + 0.3)) * pictures.DPI / figure.dpi
        brightness[row, column] = picture.getpixel((round(x), picture.height - round(y)))
    assert np.unravel_index(brightness.argmax(), (3, 3)) == (0, 1)
    shares = counts / counts.sum(axis=1, keepdims=True)
    assert brightness.ravel()[shares.ravel().argsort(kind='stable')].tolist() == sorted(brightness.ravel())
    assert [label.get_text() for label in axes.get_yticklabels()] == ['cat', 'dog', 'frog']
    assert {text.get_text() for text in axes.texts} == {'10', '90', '30', '40', '25', '50'}


def test_a_dollar_in_the_name_of_a_class_is_one(tmp_path):
    names = ('$1_$2', '$x$')
    pictures.encode_png(pictures.confusion_matrix(np.eye(2), names, '$\\nothing$'))
    pictures.encode_png(pictures.image_grid(np.zeros((2, 4, 4, 3), np.float32), names))
    explain.draw(np.zeros((4, 4, 3), np.uint8), np.zeros((2, 2)), '$1_$2', tmp_path / 'a.png')
    assert [path.name for path in tmp_path.iterdir()] == ['a.png']


def test_mistakes_are_wrong_and_sorted_by_how_sure_the_model_was():
    predictions = Predictions(np.array([0, 1, 1, 0, 1]), np.array([0.6, 0.9, 0.8, 0.7, 0.95], np.float32))
    labels = np.array([1, 1, 0, 1, 0], np.int32)
    assert pictures.confident_mistakes(predictions, labels).tolist() == [4, 2, 3, 0]
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    shown = pictures.mistakes(data.Split(images, labels), predictions, ('cat', 'dog'))
    names = ['dog 0.95\nis cat', 'dog 0.80\nis cat', 'cat 0.70\nis dog', 'cat 0.60\nis dog']
    assert shown == pictures.image_grid(images[[4, 2, 3, 0]] / np.float32(255), names)
    assert shown != pictures.image_grid(images[[4, 2, 3, 0]] / np.float32(255), names[::-1])


def test_a_model_without_mistakes_has_an_empty_picture():
    split = data.Split(np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1], np.int32))
    picture = pictures.mistakes(split, Predictions(split.labels, np.ones(2)), ('cat', 'dog'))
    assert picture.getextrema() == ((255, 255),) * 3
    assert pictures.encode_png(picture).startswith(b'\x89PNG')
