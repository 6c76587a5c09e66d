"""Sampled backpropagation: unbiased, with the variance of the formula, and small."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import fast_jit

from experiments import main
from experiments.configs import quickstart
from experiments.configs import sampled as sampled_config
from experiments.data.arrays import Split
from experiments.drivers import sampled_table
from experiments.learners import learner as learners
from experiments.learners.classification import Classification
from experiments.models import cnn, sampled, vit
from experiments.usage import UsageError

ROWS, INPUTS, OUTPUTS, COUNT, DRAWS = 12, 4, 3, 5, 4000
# Rows of very different length, for which winners matter.
X = jax.random.normal(jax.random.key(0), (ROWS, INPUTS)) * (
    2.0 ** -jnp.arange(ROWS)[:, None]
)
W = jax.random.normal(jax.random.key(1), (INPUTS, OUTPUTS))
D = jax.random.normal(jax.random.key(2), (ROWS, OUTPUTS))


SETTINGS = {
    "window_strides": (2, 1),
    "padding": "SAME",
    "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    "feature_group_count": 2,
}


class Case(NamedTuple):
    """A product of one kind, its operands and the gradient at its output."""

    x: jax.Array
    w: jax.Array
    d: jax.Array
    sampled: Callable[..., jax.Array]
    exact: Callable[..., jax.Array]

    def terms(self):
        """What each row alone adds to the gradient of the kernel, by `jax.vjp`."""

        def of_row(x, d):
            return jax.vjp(lambda w: self.exact(x[None], w), self.w)[1](d[None])[0]

        return np.asarray(jax.vmap(of_row)(self.x, self.d), np.float64)


def case(kind):
    if kind == "dense":
        return Case(X, W, D, sampled.dense, jnp.matmul)
    keys = jax.random.split(jax.random.key(5), 3)
    sizes = 2.0 ** -jnp.arange(ROWS)
    x = jax.random.normal(keys[0], (ROWS, 4, 3, 4)) * sizes[:, None, None, None]
    w = jax.random.normal(keys[1], (3, 2, 2, 4))
    exact = functools.partial(jax.lax.conv_general_dilated, **SETTINGS)
    d = jax.random.normal(keys[2], exact(x, w).shape)
    return Case(x, w, d, functools.partial(sampled.conv, **SETTINGS), exact)


def gradients(sampler, one):
    """The gradients by x and by the kernel, of many keys."""

    def of_key(key):
        return jax.grad(
            lambda x, w: jnp.sum(one.d * one.sampled(x, w, key, COUNT, sampler)), (0, 1)
        )(one.x, one.w)

    keys = jax.random.split(jax.random.key(3), DRAWS)
    return fast_jit(lambda keys: jax.lax.map(of_key, keys))(keys)


def probabilities(x):
    lengths = np.linalg.norm(np.asarray(x, np.float64).reshape(len(x), -1), axis=1)
    return lengths / lengths.sum()


def variance(one, p, count):
    """Of the sum of all entries' squares, for k rows drawn with p of those there."""
    terms = one.terms().reshape(ROWS, -1)
    squares = (terms**2).sum(1)
    inside = p > 0
    share = p[inside].sum()
    mean = (terms[inside].sum(0) ** 2).sum()
    return (share * (squares[inside] / p[inside]).sum() - mean) / count


def expected_variance(sampler, one):
    p = probabilities(one.x)
    if sampler == "column_row":
        return variance(one, p, COUNT), 0
    order = np.argsort(-p)
    sizes = range(COUNT)
    cost = [(1 - p[order[:c]].sum()) / (COUNT - c) for c in sizes]
    winners = int(np.argmin(cost))
    p[order[:winners]] = 0
    return variance(one, p, COUNT - winners), winners


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("sampler", sampled.SAMPLERS)
def test_the_gradient_is_unbiased_with_the_variance_of_the_formula(sampler, kind):
    one = case(kind)
    by_x, by_w = gradients(sampler, one)
    true_by_x, true = jax.vjp(one.exact, one.x, one.w)[1](one.d)
    true_by_x = np.broadcast_to(true_by_x, by_x.shape)
    np.testing.assert_allclose(by_x, true_by_x, rtol=1e-4, atol=1e-6)
    by_w, true = np.asarray(by_w, np.float64), np.asarray(true, np.float64)
    wanted, _ = expected_variance(sampler, one)
    assert by_w.var(axis=0).sum() == pytest.approx(wanted, rel=0.1)
    errors = (by_w.mean(0) - true) / (by_w.std(0) / DRAWS**0.5 + 1e-9)
    assert np.abs(errors).max() < 5


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_winners_take_most_of_the_variance_away(kind):
    one = case(kind)
    (plain, _), (ours, winners) = (
        expected_variance(sampler, one) for sampler in sampled.SAMPLERS
    )
    assert winners >= 2
    assert ours < 0.2 * plain


def test_all_rows_are_no_estimate_and_equal_rows_have_no_winner():
    p = jnp.full(8, 1 / 8)
    _, weights = sampled.winner_take_all(jax.random.key(0), p, 4)
    np.testing.assert_allclose(weights, 2.0)  # 1 / (k p), as column_row
    for sampler in sampled.SAMPLERS:
        part, rows = sampled._kept(X, jax.random.key(0), ROWS, sampler)
        np.testing.assert_array_equal(part, X)
        np.testing.assert_array_equal(rows, np.arange(ROWS))
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


NETWORKS = {
    "cnn": functools.partial(cnn.CNN, features=(2, 4), strides=(2, 1)),
    "vit": functools.partial(
        vit.ViT, patch=4, width=8, depth=1, num_heads=2, mlp_width=8
    ),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_a_method_samples_in_every_layer_of_a_network(network):
    """The gradients of all kernels are estimates, those of all else stay exact."""
    images = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
    images *= jnp.arange(1.0, 7.0)[:, None, None, None]
    split = Split(images, jnp.arange(6) % 3)
    params = network(num_classes=3).init(jax.random.key(1), images)["params"]

    def gradient(**chosen):
        method = quickstart.changed(
            quickstart.base().methods.backprop,
            {"optimizer": "sgd", "batch_size": 6, "sampled": chosen},
        )
        made = learners.make_learner(
            method, lambda bits: network(num_classes=3), Classification(method)
        )
        state = made.init(params, images, 0)
        step = fast_jit(made.step)(state, jnp.float32(1), jnp.float32(1e9), split)
        return jax.tree.map(jnp.subtract, state.params, step.params)

    exact = gradient()
    half = gradient(share=0.5, sampler="winner_take_all")
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(half)[0],
        jax.tree.leaves(exact),
        strict=True,
    ):
        differs = not np.allclose(a, b, rtol=1e-3, atol=1e-4)
        assert differs == (path[-1].key == "kernel"), path


def test_a_method_says_what_of_sampling_is_wrong():
    backprop = quickstart.base().methods.backprop
    for chosen, message in (
        ({"share": 0.5}, "takes"),
        ({"share": 0.0, "sampler": "column_row"}, r"in \(0, 1\]"),
        ({"share": 0.5, "sampler": "best"}, "best"),
    ):
        with pytest.raises(UsageError, match=message):
            learners.check_method(quickstart.changed(backprop, {"sampled": chosen}))
    forward = quickstart.base().methods.forward_fp32
    with pytest.raises(UsageError, match="backward"):
        learners.check_method(
            quickstart.changed(forward, {"sampled": quickstart.SAMPLED})
        )


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
