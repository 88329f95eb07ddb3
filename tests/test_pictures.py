"""What is drawn of a run's images and predictions."""

import io

import numpy as np
import pytest
from conftest import make_config
from PIL import Image

from flax_dlvc import data, explain, pictures
from flax_dlvc.metrics import Predictions


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


@pytest.mark.parametrize('channels', [1, 3])
def test_the_grid_shows_each_image_under_its_label(channels):
    images = np.random.default_rng(0).random((5, 4, 6, channels), np.float32)
    grid = pictures.image_grid(images, list('abcde'), columns=2)
    (axes,) = grid.axes
    assert [text.get_text() for text in axes.texts] == list('abcde')
    for drawn, text, image in zip(axes.images, axes.texts, images, strict=True):
        np.testing.assert_array_equal(np.asarray(drawn.get_array()).reshape(image.shape), image)
        left, right, bottom, top = drawn.get_extent()
        assert ((bottom - top) / (right - left), text.get_position()[0]) == pytest.approx((4 / 6, (left + right) / 2))
        assert 0 < top - text.get_position()[1] < 0.1
    corners = [image.get_extent()[::3] for image in axes.images]
    assert corners == pytest.approx(
        np.array([(column * 1.1 + 0.05, row * (4 / 6 + 0.3) + 0.29) for row, column in np.ndindex(3, 2)][:5])
    )


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
    (axes,) = pictures.mistakes(data.Split(images, labels), predictions, ('cat', 'dog')).axes
    assert [text.get_text().split('\n') for text in axes.texts] == [
        ['dog 0.95', 'is cat'], ['dog 0.80', 'is cat'], ['cat 0.70', 'is dog'], ['cat 0.60', 'is dog'],
    ]  # fmt: skip
    assert [round(255 * float(image.get_array().max())) for image in axes.images] == [4, 2, 3, 0]


def test_a_model_without_mistakes_has_an_empty_picture():
    split = data.Split(np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1], np.int32))
    figure = pictures.mistakes(split, Predictions(split.labels, np.ones(2)), ('cat', 'dog'))
    assert not figure.axes[0].images
    assert pictures.encode_png(figure).startswith(b'\x89PNG')
