"""Accuracy against privacy: batches, pruning, noise, and a smoke run."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import fast_jit

from experiments import main
from experiments.configs import private as private_config
from experiments.data.arrays import Split
from experiments.drivers import private_table
from experiments.usage import UsageError
from fgrad import enhancements


def test_batches_are_poisson_and_padded():
    examples, expected, draws = 200, 20, 400
    split = Split(jnp.arange(examples)[:, None], jnp.arange(examples))
    found = fast_jit(
        jax.vmap(lambda key: private_table._poisson(key, split, expected))
    )(jax.random.split(jax.random.key(0), draws))
    labels, present = np.asarray(found[0].labels), np.asarray(found[1])
    room = private_table._room(expected, examples)
    assert labels.shape == (draws, room)
    counts = present.sum(1)
    # Binomial: its mean and its variance, which fixed batches would not have.
    assert counts.mean() == pytest.approx(expected, abs=5 * (18 / draws) ** 0.5)
    assert counts.var() == pytest.approx(18, rel=0.35)
    for row, there in zip(labels, present, strict=True):
        chosen = row[there > 0]
        assert len(set(chosen)) == len(chosen)  # no example twice
    often = np.bincount(labels[present > 0], minlength=examples) / draws
    assert np.abs(often - 0.1).max() < 5 * (0.09 / draws) ** 0.5
    assert private_table._room(examples, examples) == examples


def test_pruning_keeps_the_largest_share_of_each_leaf():
    params = {"a": jnp.array([[1.0, -5.0], [3.0, 0.1]]), "b": jnp.zeros(3)}
    kept = private_table._largest(params, 0.5)
    np.testing.assert_array_equal(kept["a"], [[0, 1], [1, 0]])
    assert kept["b"].sum() == 2
    whole = private_table._largest(params, 1.0)
    assert all(np.all(leaf == 1) for leaf in whole.values())


def test_noise_is_the_least_that_keeps_to_epsilon(monkeypatch):
    def spent(*, noise_multiplier, sampling_probability, steps, delta):
        assert (sampling_probability, steps, delta) == (0.1, 10, 1e-5)
        return 4 / noise_multiplier

    monkeypatch.setattr(enhancements, "privacy_spent", spent)
    config = private_config.get_config("smoke")
    train = Split(jnp.zeros(1000), jnp.zeros(1000))
    found = private_table._noise_multipliers(config, train)
    assert found[math.inf] == 0
    assert 4 / 3 <= found[3.0] < 4 / 3 * 1.003


@pytest.mark.slow
def test_a_smoke_run_fills_the_table(tmp_path, monkeypatch):
    # What the accountant says is for tests/enhancements/test_private.py.
    monkeypatch.setattr(
        enhancements,
        "privacy_spent",
        lambda noise_multiplier, **_: 3 / noise_multiplier,
    )
    config = private_config.get_config("smoke")
    config.seeds, config.epsilons, config.run = (0,), (3.0,), ("forward_sign_pruned",)
    results = private_table.run(config, str(tmp_path))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert set(results) == {"forward_sign_pruned", "backprop"}
    (one,) = results["forward_sign_pruned"].values()
    assert one["noise_multiplier"] == pytest.approx(1, rel=0.01)
    assert 0 < one["accuracy"][0] < 1
    assert 0.3 < one["attack"][0] < 0.7
    assert "of one seed" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert main._DRIVERS[config.driver] is private_table.run


def test_settings_are_checked_before_any_work(tmp_path):
    for field, value, message in (
        ("epsilons", (-1.0, 3.0), "must be positive"),
        ("tuning_epsilon", 2.0, "one of the epsilons"),
        ("run", ("forwards",), "forwards"),
    ):
        config = private_config.get_config("smoke")
        with config.ignore_type():
            config[field] = value
        with pytest.raises(UsageError, match=message):
            private_table.run(config, str(tmp_path))
