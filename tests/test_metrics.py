import numpy as np
import pytest
from scipy import stats

from experiments.learners import metrics


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
    with pytest.raises(ValueError, match="no metric 'f1'"):
        metrics.scores(["f1"], np.zeros((2, 2)), [0, 1])
    with pytest.raises(ValueError, match="auc needs an example of each of 2 classes"):
        metrics.scores(["auc"], np.zeros((2, 2)), [1, 1])


def test_naming_the_larger_class_is_accurate_only():
    labels = np.array([0] * 90 + [1] * 10)
    logits = np.tile([2.0, -1.0], (100, 1))
    found = metrics.scores(metrics.METRICS, logits, labels)
    assert found == {"accuracy": 0.9, "balanced_accuracy": 0.5, "auc": 0.5}


def test_scores_of_a_few_examples_by_hand():
    # 3 of 4 negatives and 1 of 2 positives are right; of 8 pairs, 6 and a tie are won.
    margins = np.array([-2.0, -1.0, -0.5, 1.0, -0.5, 3.0])
    logits = np.stack([np.full(6, 7.0), 7.0 + margins], axis=1)
    found = metrics.scores(metrics.METRICS, logits, [0, 0, 0, 0, 1, 1])
    expected = {"accuracy": 4 / 6, "balanced_accuracy": 5 / 8, "auc": 6.5 / 8}
    assert found == pytest.approx(expected)


def test_normal_margins_have_closed_forms():
    n, shift = 20_000, 1.0
    normal = stats.norm.ppf((np.arange(n) + 0.5) / n)  # quantiles, not a sample
    margins = np.concatenate([normal, normal[::10] + shift]) - shift / 2
    logits = np.stack([np.zeros_like(margins), margins], axis=1)
    found = metrics.scores(metrics.METRICS, logits, [0] * n + [1] * (n // 10))
    right = stats.norm.cdf(shift / 2)
    area = stats.norm.cdf(shift / np.sqrt(2))
    expected = {"accuracy": right, "balanced_accuracy": right, "auc": area}
    # Each tenth quantile stands for ten: off by less than 10 / n in probability.
    assert found == pytest.approx(expected, abs=10 / n)


def test_large_logits_keep_their_order():
    # As probabilities in float32 all would be 1.
    logits = np.array([[0.0, 50.0], [0.0, 60.0], [0.0, 70.0]], np.float32)
    assert metrics.scores(["auc"], logits, [0, 1, 1])["auc"] == 1


def test_a_diverged_run_predicts_nothing():
    logits = np.array([[np.nan, 0.0], [np.inf, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = metrics.scores(metrics.METRICS, logits, [0, 1, 1, 0])
    # Two are right; of each class one; and the undecided lie between the two.
    assert found == {"accuracy": 0.5, "balanced_accuracy": 0.5, "auc": 0.875}
