"""Sampled backpropagation: unbiased, with the variance of the formula, and small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import fast_jit

from experiments import main
from experiments.configs import sampled as sampled_config
from experiments.drivers import sampled_table
from experiments.models import sampled
from experiments.usage import UsageError

ROWS, INPUTS, OUTPUTS, COUNT, DRAWS = 12, 4, 3, 5, 4000
# Rows of very different length, for which winners matter.
X = jax.random.normal(jax.random.key(0), (ROWS, INPUTS)) * (
    2.0 ** -jnp.arange(ROWS)[:, None]
)
W = jax.random.normal(jax.random.key(1), (INPUTS, OUTPUTS))
D = jax.random.normal(jax.random.key(2), (ROWS, OUTPUTS))


def gradients(sampler, count=COUNT, x=X):
    """The gradients by x and by the kernel, of many keys."""

    def of_key(key):
        return jax.grad(
            lambda x, w: jnp.sum(D * sampled.dense(x, w, key, count, sampler)), (0, 1)
        )(x, W)

    keys = jax.random.split(jax.random.key(3), DRAWS)
    return fast_jit(lambda keys: jax.lax.map(of_key, keys))(keys)


def probabilities(x=X):
    lengths = np.linalg.norm(np.asarray(x, np.float64), axis=1)
    return lengths / lengths.sum()


def variance(p, count):
    """Of the sum of all entries' squares, for k rows drawn with p of those there."""
    terms = np.einsum("ri,ro->rio", np.asarray(X, float), np.asarray(D, float))
    squares = (terms**2).sum((1, 2))
    inside = p > 0
    share = p[inside].sum()
    mean = (terms[inside].sum(0) ** 2).sum()
    return (share * (squares[inside] / p[inside]).sum() - mean) / count


def expected_variance(sampler):
    p = probabilities()
    if sampler == "column_row":
        return variance(p, COUNT), 0
    order = np.argsort(-p)
    sizes = range(COUNT)
    cost = [(1 - p[order[:c]].sum()) / (COUNT - c) for c in sizes]
    winners = int(np.argmin(cost))
    p[order[:winners]] = 0
    return variance(p, COUNT - winners), winners


@pytest.mark.parametrize("sampler", sampled.SAMPLERS)
def test_the_gradient_is_unbiased_with_the_variance_of_the_formula(sampler):
    by_x, by_w = gradients(sampler)
    np.testing.assert_allclose(by_x, np.broadcast_to(D @ W.T, by_x.shape), rtol=1e-5)
    by_w, true = np.asarray(by_w, np.float64), np.asarray(X.T @ D, np.float64)
    wanted, _ = expected_variance(sampler)
    assert by_w.var(axis=0).sum() == pytest.approx(wanted, rel=0.1)
    errors = (by_w.mean(0) - true) / (by_w.std(0) / DRAWS**0.5 + 1e-9)
    assert np.abs(errors).max() < 5


def test_winners_take_most_of_the_variance_away():
    (plain, _), (ours, winners) = map(expected_variance, sampled.SAMPLERS)
    assert winners >= 2
    assert ours < 0.2 * plain


def test_all_rows_are_no_estimate_and_equal_rows_have_no_winner():
    p = jnp.full(8, 1 / 8)
    _, weights = sampled.winner_take_all(jax.random.key(0), p, 4)
    np.testing.assert_allclose(weights, 2.0)  # 1 / (k p), as column_row
    zeros = sampled.row_probabilities(jnp.zeros((4, 2)))
    np.testing.assert_array_equal(zeros, 0.25)


def test_what_is_kept_is_a_part_of_the_input():
    count, rows, width = 16, 256, 64
    x, w = jnp.ones((rows, width)), jnp.ones((width, width))
    key = jax.random.key(0)

    def loss(w, sample):
        y = x
        for _ in range(2):
            part = (
                sampled.dense(y, w, key, count, "winner_take_all") if sample else y @ w
            )
            y = part
        return jnp.sum(y)

    kept = {}
    for sample in (True, False):
        _, function = jax.vjp(lambda w, sample=sample: loss(w, sample), w)
        arrays = [a for a in jax.tree.leaves(function) if hasattr(a, "nbytes")]
        kept[sample] = sum(a.nbytes for a in arrays if a.shape[:1] == (rows,))
    assert kept[True] == 0 < kept[False]


def test_what_it_refuses():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="1 to 12 rows, got 13"):
        sampled.dense(X, W, key, 13, "column_row")
    with pytest.raises(ValueError, match=r"\[rows, inputs\], got shape \(4,\)"):
        sampled.dense(X[0], W, key, 1, "column_row")
    with pytest.raises(ValueError, match="got 'best'"):
        sampled.dense(X, W, key, 3, "best")


@pytest.mark.slow
def test_a_smoke_run_fills_the_table(tmp_path):
    config = sampled_config.get_config("smoke")
    results = sampled_table.run(config, str(tmp_path))
    assert set(results) == {"all rows", "winner_take_all, 32"}
    assert results["all rows"]["cosine"] == pytest.approx(1)
    assert 0.3 < results["winner_take_all, 32"]["cosine"] < 0.999
    assert "25%" in (tmp_path / "table.md").read_text()
    assert main._DRIVERS[config.driver] is sampled_table.run
    config.rows = (129,)
    with pytest.raises(UsageError, match="1 to 128"):
        sampled_table.run(config, str(tmp_path))
