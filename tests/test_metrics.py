import numpy as np
import pytest

from experiments import metrics


def test_scores_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    labels = rng.choice(2, size=200, p=[0.8, 0.2])
    logits = rng.normal(size=(200, 2)) + np.eye(2)[labels]
    found = metrics.scores(("accuracy", "balanced_accuracy", "auc"), logits, labels)
    right = logits.argmax(-1) == labels
    by_class = [right[labels == c].mean() for c in (0, 1)]
    margin = logits[:, 1] - logits[:, 0]
    # AUC: how often a positive example is ranked above a negative one.
    above = margin[labels == 1][:, None] > margin[labels == 0][None]
    np.testing.assert_allclose(found["accuracy"], right.mean())
    np.testing.assert_allclose(found["balanced_accuracy"], np.mean(by_class))
    np.testing.assert_allclose(found["auc"], above.mean())


def test_auc_of_three_classes_is_the_mean_of_one_against_the_rest():
    rng = np.random.default_rng(1)
    labels = np.arange(60) % 3
    logits = rng.normal(size=(60, 3)) + np.eye(3)[labels]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.mean(
        [
            (p[labels == c, c][:, None] > p[labels != c, c][None]).mean()
            for c in range(3)
        ]
    )
    np.testing.assert_allclose(metrics.scores(["auc"], logits, labels)["auc"], expected)


def test_what_has_no_answer_is_refused():
    with pytest.raises(ValueError, match=r"no metrics \['f1'\]; choose from"):
        metrics.scores(["f1"], np.zeros((2, 2)), [0, 1])
    with pytest.raises(ValueError, match="auc needs an example of each of 2 classes"):
        metrics.scores(["auc"], np.zeros((2, 2)), [1, 1])
