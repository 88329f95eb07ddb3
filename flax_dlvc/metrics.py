"""Cross-entropy, and the sums that every other number is divided from.

Shapes: B batch, K classes, M bins of confidence.
"""

from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics as clu_metrics

CALIBRATION_BINS = 15  # of equal width in [0, 1], as in Guo et al. (2017, arXiv:1706.04599)


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
class Calibration(clu_metrics.Metric):
    """Per bin of confidence, the highest probability of an example: all examples, the right ones, the confidences."""

    counts: jax.Array  # (M,) int32
    correct: jax.Array  # (M,) int32
    confidence: jax.Array  # (M,) float32, summed

    @classmethod
    def from_model_output(cls, logits: jax.Array, labels: jax.Array, mask: jax.Array, **_: Any) -> 'Calibration':
        """Sums the examples whose mask is set."""
        confidence = jnp.where(mask, jax.nn.softmax(logits.astype(jnp.float32)).max(-1), 0.0)
        # Bins are open on the left and closed on the right; a masked example adds nothing wherever it falls.
        bins = jnp.clip(jnp.ceil(confidence * CALIBRATION_BINS).astype(jnp.int32) - 1, 0, CALIBRATION_BINS - 1)
        correct = mask & (logits.argmax(-1) == labels)
        zeros = jnp.zeros(CALIBRATION_BINS, jnp.int32)
        return cls(
            counts=zeros.at[bins].add(mask.astype(jnp.int32)),
            correct=zeros.at[bins].add(correct.astype(jnp.int32)),
            confidence=zeros.astype(jnp.float32).at[bins].add(confidence),
        )

    @classmethod
    def empty(cls) -> 'Calibration':
        """The sums over no examples."""
        zeros = jnp.zeros(CALIBRATION_BINS, jnp.int32)
        return cls(zeros, zeros, zeros.astype(jnp.float32))


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

    def merge(self, other: Self) -> Self:
        """The sums over both."""
        return jax.tree.map(jnp.add, self, other)


@flax.struct.dataclass
class EvaluationSums(Sums):
    """What is summed over a split that is evaluated: `Sums`, and how well the probabilities are calibrated."""

    calibration: Calibration

    @classmethod
    def from_model_output(
        cls, *, losses: jax.Array, logits: jax.Array, labels: jax.Array, mask: jax.Array
    ) -> 'EvaluationSums':
        """As `Sums.from_model_output`."""
        sums = Sums.from_model_output(losses=losses, logits=logits, labels=labels, mask=mask)
        return cls(sums.loss, sums.confusion, Calibration.from_model_output(logits, labels, mask))

    @classmethod
    def empty(cls, num_classes: int) -> 'EvaluationSums':
        """The sums over no examples."""
        sums = Sums.empty(num_classes)
        return cls(sums.loss, sums.confusion, Calibration.empty())


def summarize(sums: Sums) -> dict[str, Any]:
    """Divides, once, on the host.

    Returns:
        `cross_entropy` in nats per example, `accuracy`, `mean_class_accuracy` and `per_class_accuracy` in [0, 1],
        `num_examples`, and `confusion_matrix` with a row per true class. A class without examples has no accuracy: it
        is None, and the mean is over the others. Of `EvaluationSums` also `expected_calibration_error` in [0, 1]: the
        distance of accuracy and mean confidence, averaged over the bins by their share of the examples.
    """
    sums = jax.device_get(sums)
    confusion = np.asarray(sums.confusion.counts, np.int64)
    num_examples = int(sums.loss.count)
    counts = zip(confusion.diagonal().tolist(), confusion.sum(axis=1).tolist(), strict=True)
    per_class = [correct / size if size else None for correct, size in counts]
    present = [accuracy for accuracy in per_class if accuracy is not None]
    summary = {
        'accuracy': int(confusion.trace()) / num_examples,
        'mean_class_accuracy': sum(present) / len(present),
        'cross_entropy': float(sums.loss.total) / num_examples,
        'per_class_accuracy': per_class,
        'num_examples': num_examples,
        'confusion_matrix': confusion.tolist(),
    }
    if isinstance(sums, EvaluationSums):
        distances = np.abs(np.asarray(sums.calibration.correct, np.float64) - sums.calibration.confidence)
        summary['expected_calibration_error'] = float(distances.sum()) / num_examples
    return summary
