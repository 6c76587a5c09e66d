"""Metrics of a network's predictions, by name, as scikit-learn computes them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special
from sklearn import metrics

from experiments.usage import check_names


def scores(names: Sequence[str], logits: Any, labels: Any) -> dict[str, float]:
    """Metrics of predictions, between 0 and 1, by their names.

    Args:
      names: keys of `METRICS`.
      logits: float [examples, classes].
      labels: integers [examples].

    Raises:
      UsageError: for an unknown name.
      ValueError: for "auc" unless every class has an example.

    Example:
      >>> logits, labels = [[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]], [0, 0, 1]
      >>> {name: round(x, 3) for name, x in scores(METRICS, logits, labels).items()}
      {'accuracy': 0.667, 'balanced_accuracy': 0.75, 'auc': 1.0}
    """
    check_names("metric", names, METRICS)
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    return {name: float(METRICS[name](logits, labels)) for name in names}


def _predictions(logits: np.ndarray) -> np.ndarray:
    """The likeliest class; none, -1, where a run has diverged."""
    finite = np.isfinite(logits).all(-1)
    return np.where(finite, np.nan_to_num(logits).argmax(-1), -1)


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return metrics.accuracy_score(labels, _predictions(logits))


def _balanced_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    classes = np.unique(labels)
    predictions = _predictions(logits)
    return metrics.recall_score(labels, predictions, labels=classes, average="macro")


def _auc(logits: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve; of more than two classes the mean of one-vs-rest."""
    classes = logits.shape[-1]
    finite = np.isfinite(logits).all(-1, keepdims=True)
    logits = np.where(finite, logits, 0)  # undecided where a run has diverged
    if len(np.unique(labels)) < classes:
        raise ValueError(
            f"auc needs an example of each of {classes} classes, got labels "
            f"{np.unique(labels)}."
        )
    if classes == 2:
        return metrics.roc_auc_score(labels, logits[:, 1] - logits[:, 0])
    probabilities = special.softmax(logits, axis=-1)
    return metrics.roc_auc_score(labels, probabilities, multi_class="ovr")


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "auc": _auc,
}
