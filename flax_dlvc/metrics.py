"""Cross-entropy, and the sums that every other number is divided from.

Shapes: B batch, N examples of a split, K classes.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics as clu_metrics

CALIBRATION_BINS = 15  # as in Guo et al. (2017)


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy in nats of logits (B, K) and integer labels (B,); returns (B,) float32."""
    if label_smoothing == 0.0:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


@flax.struct.dataclass
class ConfusionMatrix(clu_metrics.Metric):
    """Counts (K, K) int32: a row per true class, a column per predicted class."""

    counts: jax.Array

    @classmethod
    def from_model_output(cls, logits: jax.Array, labels: jax.Array, mask: jax.Array, **_: Any) -> 'ConfusionMatrix':
        """Counts the examples whose mask is set."""
        num_classes = logits.shape[-1]
        counts = jnp.zeros((num_classes, num_classes), jnp.int32)
        return cls(counts.at[labels, logits.argmax(-1)].add(mask.astype(jnp.int32)))


@flax.struct.dataclass
class Sums:
    """Sums over examples: all leaves add up, over steps by `merge` and over devices by `psum`."""

    loss: clu_metrics.Average
    confusion: ConfusionMatrix

    @classmethod
    def from_model_output(cls, *, losses: jax.Array, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> 'Sums':
        """Sums losses (B,), logits (B, K) and labels (B,) over the examples whose mask (B,) is set."""
        return cls(
            loss=clu_metrics.Average.from_model_output(losses, mask),
            confusion=ConfusionMatrix.from_model_output(logits, labels, mask),
        )

    @classmethod
    def empty(cls, num_classes: int) -> 'Sums':
        """The sums over no examples."""
        confusion = ConfusionMatrix(jnp.zeros((num_classes, num_classes), jnp.int32))
        return cls(loss=clu_metrics.Average.empty(), confusion=confusion)

    def merge(self, other: 'Sums') -> 'Sums':
        """The sums over both."""
        return jax.tree.map(jnp.add, self, other)


@flax.struct.dataclass
class Predictions:
    """What a model says of each example of a split, zeros where it was not asked: they add up, as `Sums` do."""

    classes: jax.Array  # (N,) int32, the most probable one
    confidence: jax.Array  # (N,) float32, the probability of that class

    @classmethod
    def from_model_output(cls, logits: jax.Array, indices: jax.Array, num_examples: int) -> 'Predictions':
        """The predictions by logits (B, K) for the examples with the indices (B,), each there once; -1 names none."""
        empty = cls.empty(num_examples)
        indices = jnp.where(indices < 0, num_examples, indices)  # out of bounds, where -1 is the last example
        return cls(
            classes=empty.classes.at[indices].set(logits.argmax(-1), mode='drop'),
            confidence=empty.confidence.at[indices].set(jax.nn.softmax(logits).max(-1), mode='drop'),
        )

    @classmethod
    def empty(cls, num_examples: int) -> 'Predictions':
        """Those of a model that was not asked."""
        return cls(jnp.zeros(num_examples, jnp.int32), jnp.zeros(num_examples, jnp.float32))


def summarize(sums: Sums) -> dict[str, Any]:
    """Divides, once, on the host.

    Returns:
        `cross_entropy` in nats per example, `accuracy`, `mean_class_accuracy` and `per_class_accuracy` in [0, 1],
        `num_examples`, and `confusion_matrix` with a row per true class. A class without examples has no accuracy: it
        is None, and the mean is over the others.
    """
    sums = jax.device_get(sums)
    confusion = np.asarray(sums.confusion.counts, np.int64)
    num_examples = int(sums.loss.count)
    counts = zip(confusion.diagonal().tolist(), confusion.sum(axis=1).tolist(), strict=True)
    per_class = [correct / size if size else None for correct, size in counts]
    present = [accuracy for accuracy in per_class if accuracy is not None]
    return {
        'accuracy': int(confusion.trace()) / num_examples,
        'mean_class_accuracy': sum(present) / len(present),
        'cross_entropy': float(sums.loss.total) / num_examples,
        'per_class_accuracy': per_class,
        'num_examples': num_examples,
        'confusion_matrix': confusion.tolist(),
    }


def expected_calibration_error(predictions: Predictions, labels: np.ndarray) -> float:
    """Distance of accuracy and mean confidence, averaged over bins of confidence by their share of the examples.

    By Guo et al. (2017, arXiv:1706.04599): bins of equal width, open on the left and closed on the right. Computed on
    the host, in [0, 1].
    """
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1, dtype=np.float32)
    bins = np.digitize(predictions.confidence, edges[1:-1], right=True)
    surplus = (predictions.classes == labels) - np.asarray(predictions.confidence, np.float64)
    return float(np.abs(np.bincount(bins, surplus)).sum()) / len(labels)
