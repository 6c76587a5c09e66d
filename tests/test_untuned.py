"""Configurations without a search, of sparse weights, and of few-shot gaps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from experiments.configs import fewshot_gaps, ood, quickstart, sparse_ood, untuned
from experiments.drivers import settings
from experiments.learners import optimizers
from experiments.usage import UsageError


def test_every_part_is_a_method_of_its_own_configuration():
    config = untuned.get_config()
    settings.check_training(config)
    assert sorted(config.parts) == sorted(untuned.PARTS)
    for name, part in config.parts.items():
        assert part.run == ("tuned", "default", *untuned.FREE)
        assert {tuple(part.methods[x].bits) for x in part.run} == {(16, 8)}
        assert {part.methods[x].steps for x in part.run} == {part.methods.tuned.steps}
        assert len(part.methods.tuned.learning_rates) > 1, name
        # No search.
        assert {len(part.methods[x].learning_rates) for x in part.run[1:]} == {1}
    assert config.parts.solar.metrics[0] == "auc"
    digits = quickstart.get_config().methods.joint_16w8a
    assert config.parts.digits.methods.tuned == digits
    for variant in ("smoke", "epsilon_digits", "epsilon_mnist"):
        settings.check_training(untuned.get_config(variant))
    with pytest.raises(ValueError, match="variant must be one of"):
        untuned.get_config("cifar")


@pytest.mark.parametrize("way", ood.WAYS)
def test_sparse_weights_are_chosen_within_as_many_passes(way):
    config = sparse_ood.get_config(way)
    settings.check_training(config)
    dense = config.methods.dense
    budget = optimizers.forward_passes(dense) * dense.steps
    for name, (_, times) in sparse_ood.CHOICES.items():
        method = config.methods[name]
        chosen = method.enhancements.sparse_update
        if every := chosen.get("reselect_every"):
            assert 0.9 * times <= -(-method.steps // every) <= times
        score = 2 * chosen.get("num_perturbations", 0) * times
        spent = optimizers.forward_passes(method) * method.steps + score
        assert budget - 32 < spent <= budget, name
        assert chosen.density == 0.1
    with pytest.raises(ValueError, match="variant must be one of"):
        sparse_ood.get_config("lp_2")


def test_one_pair_takes_as_many_passes_as_four():
    config = fewshot_gaps.get_config()
    settings.check_few_shot(config)
    assert len(config.parts) == 3
    for part in config.parts.values():
        _, *forward = (part.methods[name] for name in part.run)
        spent = {x.steps * optimizers.forward_passes(x) for x in forward}
        assert spent == {200}


@pytest.mark.slow
def test_backpropagation_of_sparse_weights_is_that_of_all_with_a_mask():
    method = ConfigDict(
        {
            "gradient": "backward",
            "optimizer": "sgd",
            "enhancements": {"sparse_update": {"density": 0.25}},
        }
    )
    params = {"w": jnp.array([[3.0, -0.1], [0.2, -4.0]]), "b": jnp.array([1.0, -2.0])}

    def loss(params, frozen):
        return jnp.sum(jnp.sin(params["w"]) @ params["b"]) + frozen

    tx = optimizers.make_optimizer(method, 0.5, 10, jax.random.key(0))

    @jax.jit
    def update(params, state):
        updates, state = tx.update(params, state, params, value_fn=loss, frozen=1.0)
        return optax.apply_updates(params, updates), state

    state, expected = tx.init(params), params
    for step in range(2):
        params, state = update(params, state)
        gradient = jax.grad(loss)(expected, 1.0)
        # The largest of four, and of two one.
        mask = {"w": jnp.array([[0, 0], [0, 1.0]]), "b": jnp.array([0, 1.0])}
        rate = 0.5 * (1 - step / 10)
        expected = jax.tree.map(
            lambda w, g, m, rate=rate: w - rate * g * m, expected, gradient, mask
        )
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-6)


def test_other_enhancements_of_backpropagation_are_refused():
    method = quickstart.base().methods.backprop
    method.enhancements = ConfigDict({"sharpness_aware": {}})
    with pytest.raises(UsageError, match="no enhancement of backpropagation"):
        optimizers.check_method(method)
