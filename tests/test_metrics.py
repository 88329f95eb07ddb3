import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from flax_dlvc.metrics import ConfusionMatrix, Predictions, Sums, cross_entropy, expected_calibration_error, summarize

from_model_output = jax.jit(Sums.from_model_output)


@pytest.fixture
def examples():
    """Logits (53, 4), labels (53,); every class occurs."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 53).astype(np.int32)
    logits = generator.normal(size=(53, 4)).astype(np.float32) + 1.5 * np.eye(4, dtype=np.float32)[labels]
    return logits, labels


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def sum_up(logits, labels, mask=None, losses=None):
    mask = np.ones(len(labels), bool) if mask is None else mask
    losses = cross_entropy(logits, labels) if losses is None else losses
    return from_model_output(losses=losses, logits=logits, labels=labels, mask=mask)


def calibration_error(logits, labels):
    predictions = Predictions.from_model_output(jnp.asarray(logits), jnp.arange(len(labels)), len(labels))
    return expected_calibration_error(predictions, np.asarray(labels))


@pytest.mark.parametrize('label_smoothing', [0.0, 0.1, 0.9, 1.0])
def test_cross_entropy(examples, label_smoothing):
    logits, labels = examples
    targets = np.eye(4)[labels] * (1 - label_smoothing) + label_smoothing / 4
    expected = -(targets * log_softmax(logits)).sum(-1)
    losses = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), label_smoothing)
    assert losses.shape == (53,) and losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_large_logits_is_finite():
    losses = cross_entropy(jnp.array([[1e4, -1e4], [1e4, -1e4]]), jnp.array([0, 1]))
    np.testing.assert_array_equal(losses, [0, 2e4])


def test_uniform_logits_cost_the_logarithm_of_the_classes():
    np.testing.assert_allclose(cross_entropy(jnp.zeros((3, 10)), jnp.arange(3), 0.1), np.log(10), rtol=1e-6)


def test_confusion_matrix_has_a_row_per_true_class():
    logits = jnp.eye(3)[jnp.array([0, 1, 1, 2, 2])]
    counts = ConfusionMatrix.from_model_output(logits, jnp.array([0, 1, 0, 0, 0]), jnp.ones(5, bool)).counts
    np.testing.assert_array_equal(counts, [[1, 1, 2], [0, 1, 0], [0, 0, 0]])
    assert counts.dtype == jnp.int32


def test_masked_examples_do_not_count(examples):
    logits, labels = examples
    mask = np.random.default_rng(1).random(53) < 0.6
    garbage, losses = logits.copy(), np.array(cross_entropy(logits, labels))
    garbage[~mask], losses[~mask] = np.nan, np.nan  # what padding computes is nobody's business
    masked, chosen = sum_up(garbage, labels, mask, losses), sum_up(logits[mask], labels[mask])
    np.testing.assert_array_equal(masked.confusion.counts, chosen.confusion.counts)
    np.testing.assert_allclose(masked.loss.total, chosen.loss.total, rtol=1e-6)
    assert int(masked.loss.count) == mask.sum()


@pytest.mark.parametrize('sizes', [[53], [26, 26, 1], [1] * 53])
def test_any_partition_sums_to_the_whole(examples, sizes):
    logits, labels = examples
    sums, start = Sums.empty(4), 0
    for size in sizes:
        sums = sums.merge(sum_up(logits[start : start + size], labels[start : start + size]))
        start += size
    whole = summarize(sum_up(logits, labels))
    parts = summarize(sums)
    assert parts.pop('cross_entropy') == pytest.approx(whole.pop('cross_entropy'), rel=1e-6)
    assert parts == whole


def test_merge_is_the_sum_of_all_leaves(examples):
    logits, labels = examples
    left, right = sum_up(logits[:20], labels[:20]), sum_up(logits[20:], labels[20:])
    merged = left.merge(right)
    assert jax.tree.structure(merged) == jax.tree.structure(Sums.empty(4))
    for each, summed in zip(jax.tree.leaves(jax.tree.map(jnp.add, left, right)), jax.tree.leaves(merged), strict=True):
        np.testing.assert_array_equal(each, summed)


def test_summary_is_scikit_learns(examples):
    logits, labels = examples
    probabilities, predictions = np.exp(log_softmax(logits)), logits.argmax(-1)
    summary = summarize(sum_up(logits, labels))
    assert summary['accuracy'] == pytest.approx(sklearn.metrics.accuracy_score(labels, predictions), rel=1e-12)
    assert summary['accuracy'] != pytest.approx(summary['mean_class_accuracy'], rel=1e-3)
    balanced = sklearn.metrics.balanced_accuracy_score(labels, predictions)
    assert summary['mean_class_accuracy'] == pytest.approx(balanced, rel=1e-12)
    assert summary['cross_entropy'] == pytest.approx(sklearn.metrics.log_loss(labels, probabilities), rel=1e-5)
    assert summary['confusion_matrix'] == sklearn.metrics.confusion_matrix(labels, predictions).tolist()
    recalls = sklearn.metrics.recall_score(labels, predictions, average=None)
    assert summary['per_class_accuracy'] == pytest.approx(recalls.tolist(), rel=1e-12)
    assert summary['num_examples'] == 53


def test_a_class_without_examples_has_no_accuracy():
    logits = jnp.eye(3)[jnp.array([0, 1, 1, 0])]
    summary = summarize(sum_up(logits, np.array([0, 0, 1, 1])))
    assert summary['per_class_accuracy'] == [0.5, 0.5, None]
    assert summary['mean_class_accuracy'] == 0.5
    assert summary['confusion_matrix'] == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]


def test_a_summary_is_plain_json(examples):
    import json

    summary = summarize(sum_up(*examples))
    assert json.loads(json.dumps(summary)) == summary
    keys = 'accuracy mean_class_accuracy cross_entropy per_class_accuracy num_examples confusion_matrix'
    assert list(summary) == keys.split()


@pytest.mark.parametrize('sizes', [[53], [26, 26, 1]])
def test_predictions_are_of_the_examples_with_the_indices(examples, sizes):
    """In any order and any batches; indices of -1, NaN here, name none, and not the last example."""
    logits, _ = examples
    order, predictions, start = np.random.default_rng(0).permutation(53), Predictions.empty(60), 0
    for size in sizes:
        indices = np.append(order[start : start + size], [-1, -1])
        batch = np.concatenate([logits[indices[:-2]], np.full((2, 4), np.nan, np.float32)])
        new = Predictions.from_model_output(jnp.asarray(batch), jnp.asarray(indices), 60)
        predictions = jax.tree.map(jnp.add, predictions, new)
        start += size
    expected = np.exp(log_softmax(logits)).max(-1)
    assert predictions.classes.tolist() == logits.argmax(-1).tolist() + [0] * 7
    np.testing.assert_allclose(predictions.confidence, np.append(expected, [0] * 7), rtol=1e-6)


def test_expected_calibration_error(examples):
    """Against Guo et al.'s definition, bin by bin."""
    logits, labels = examples
    confidence, right = np.exp(log_softmax(logits)).max(-1), logits.argmax(-1) == labels
    expected = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert expected > 0.05
    assert calibration_error(logits, labels) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(('logit', 'expected'), [(50.0, 0.0), (-50.0, 1.0), (0.0, 0.0)])
def test_calibration_at_the_ends(logit, expected):
    """Sure and right, sure and wrong, undecided between two classes and right half of the time."""
    labels = [0, 0, 0, 0] if logit else [0, 1, 0, 1]
    assert calibration_error(np.array([[logit, 0.0]] * 4), labels) == pytest.approx(expected, abs=1e-6)


def test_each_bin_of_confidence_holds_its_own_examples():
    """Every bin full, and all right in every other one, so that no two neighbours can be taken together."""
    confidence = np.append(np.random.default_rng(0).uniform(0.0001, 0.9999, 400), [1.0] * 3).astype(np.float32)
    bins = sum(confidence > low / 15 for low in range(1, 15))
    assert np.bincount(bins).min() >= 3 and len(np.bincount(bins)) == 15
    expected = np.where(bins % 2, confidence, 1 - confidence.astype(np.float64)).mean()
    predictions = Predictions(np.full(403, 7), confidence)
    assert expected_calibration_error(predictions, np.where(bins % 2, 3, 7)) == pytest.approx(expected, rel=1e-12)


def test_a_confidence_between_two_bins_belongs_to_the_lower():
    """Undecided between five classes, and right, is 3/15; a little less sure, and wrong, is in the same bin."""
    predictions = Predictions(np.zeros(2, int), np.asarray(jax.nn.softmax(jnp.zeros(5)))[:2] - np.float32([0, 0.01]))
    assert expected_calibration_error(predictions, np.array([0, 1])) == pytest.approx(abs(0.8 - 0.19) / 2)
    beyond = Predictions(np.zeros(2, int), predictions.confidence + np.float32([0.01, 0]))
    assert expected_calibration_error(beyond, np.array([0, 1])) == pytest.approx((0.79 + 0.19) / 2)
