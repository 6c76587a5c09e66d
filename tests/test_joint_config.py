"""The experiment of joint pairs: its configuration, its methods, what is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import joint, joint_fine_tuning, joint_ood, quickstart
from experiments.data.arrays import Split
from experiments.drivers import settings
from experiments.drivers.trainer import Trainer
from experiments.learners import optimizers
from experiments.learners.classification import Classification
from experiments.learners.learner import make_learner
from experiments.models import cnn
from experiments.usage import UsageError

KEY = jax.random.key(0)


@pytest.mark.parametrize("task", ["digits", "mnist", "vit"])
@pytest.mark.parametrize("length", ["", "_smoke", "_long"])
def test_configurations_can_be_run(task, length):
    config = joint.get_config(task + length)
    settings.check_training(config)
    assert config.run[0] == "backprop"
    assert {f"joint_{x}" for x in quickstart.BITS} <= set(config.run)


@pytest.mark.parametrize(("length", "expected"), [("", 900), ("_long", 6000)])
def test_every_method_spends_as_many_evaluations(length, expected):
    for task in joint.RATES:
        config = joint.get_config(task + length)
        for name in config.run:
            # Of whole steps, of 3 evaluations at most.
            found = evaluations(config.methods[name])
            assert expected - 3 < found <= expected, (task, name)


def test_the_picture_is_of_methods_of_as_many_evaluations():
    config = joint.get_config("mnist_memory")
    settings.check_training(config)
    assert config.figure == "memory"
    assert {evaluations(config.methods[name]) for name in config.run} == {900}
    assert config.methods.on_the_way_16w8a.joint.on_the_way
    assert not config.methods.joint_16w8a.joint.on_the_way


@pytest.mark.parametrize("way", joint_fine_tuning.WAYS)
def test_solar_cells_are_adapted_at_three_depths(way):
    for variant in (way, f"{way},smoke"):
        config = joint_fine_tuning.get_config(variant)
        settings.check_training(config)
    config = joint_fine_tuning.get_config(way)
    assert max(evaluations(config.methods[name]) for name in config.run) <= 6000
    backprop, pairs = config.methods.backprop, config.methods.joint_16w8a
    assert backprop.adaptation == pairs.adaptation
    assert backprop.learning_rates == pairs.learning_rates


def test_corrupted_images_are_adapted_to_by_backpropagations_evaluations():
    settings.check_training(joint_ood.get_config("smoke"))
    config = joint_ood.get_config()
    settings.check_training(config)
    for name in config.run:
        expected = 3600 if "d_vpt_pairs" in name else 900
        expected = 5400 if "long" in name else expected
        assert evaluations(config.methods[name]) == expected, name
        way = next(way for way in joint_ood.ORDER if name.startswith(way))
        backprop = config.methods[f"{way}_backprop"]
        assert config.methods[name].adaptation == backprop.adaptation


def evaluations(method):
    return method.steps * optimizers.forward_passes(method)


def test_an_unknown_task_is_told():
    with pytest.raises(ValueError, match="variant must be one of"):
        joint.get_config("cifar")
    with pytest.raises(ValueError, match="variant must be one of"):
        joint_fine_tuning.get_config("adapter,long")
    with pytest.raises(ValueError, match="variant must be one of"):
        joint_ood.get_config("severity_2")


def test_products_of_gradients_count_for_every_method():
    methods = joint.get_config("vit").methods
    count = optimizers.passes_with_products
    assert count(methods.backprop) == 3
    assert count(methods.exact_head_fp32) == 1
    assert count(methods.joint_fp32) == 1 + 1 + 2 / 8
    assert count(methods.joint_residual_fp32) == 3
    assert count(quickstart.get_config().methods.forward_fp32) == 32


def network(bits=None):
    return cnn.CNN(num_classes=2, features=(2, 4), strides=(2, 1), bits=bits)


def data():
    images = jax.random.normal(KEY, (20, 4, 4, 1))
    return Split(images, (images.mean((1, 2, 3)) > 0).astype(jnp.int32))


@pytest.mark.slow
def test_the_stages_of_a_cnn_are_its_parts():
    model, x = network(), data().images
    variables = model.init(KEY, x)
    assert sorted(variables["params"]) == ["Conv_0", "Conv_1", "Dense_0"]
    assert sorted(sum(model.stages, ())) == sorted(variables["params"])
    for cut in range(1, len(model.stages)):
        inner = model.apply(variables, x, stop=cut)
        found = model.apply(variables, inner, start=cut)
        np.testing.assert_array_equal(found, model.apply(variables, x))


@pytest.mark.slow
def test_checkpoints_change_no_gradient():
    config = joint.get_config("digits_smoke")
    params = network().init(KEY, data().images)["params"]
    found = []
    for name in ("backprop", "backprop_checkpoints"):
        method = config.methods[name]
        learner = make_learner(method, network, Classification(method))
        found.append(jax.grad(learner.loss_fn)(params, {}, {}, data()))
        jaxpr = str(jax.make_jaxpr(jax.grad(learner.loss_fn))(params, {}, {}, data()))
        assert ("prevent_cse" in jaxpr) == (name == "backprop_checkpoints")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)


@pytest.mark.slow
def test_checkpoints_begin_behind_what_is_frozen():
    method = joint.get_config("digits_smoke").methods.backprop_head
    x = data().images
    params = network().init(KEY, x)["params"]
    found = []
    for checkpoint in (False, True):
        method.checkpoint, method.cache_frozen = checkpoint, True
        learner = make_learner(method, network, Classification(method))
        trained, frozen = learner.model.split(params)
        inner = learner.behind_frozen(trained, frozen, {}, x)
        assert inner.shape != x.shape
        found.append(learner.outputs(trained, frozen, {})(inner)[0])
    np.testing.assert_array_equal(*found)


def test_checkpoints_and_local_heads_exclude_each_other():
    method = joint.get_config("digits").methods.backprop
    with method.unlocked():
        method.adaptation.adapter = {"num_blocks": 2, "local_heads": True}
    method.checkpoint = True
    with pytest.raises(UsageError, match="checkpoint"):
        make_learner(method, network, Classification(method))


@pytest.mark.slow
def test_a_run_counts_pairs_in_the_steps_that_have_them():
    config = joint.get_config("digits_smoke")
    method = config.methods.joint_fp32
    splits = dict.fromkeys(("train", "validation", "test"), data())
    params = network().init(KEY, data().images)["params"]
    trainer = Trainer(method, network, params, splits, ["accuracy"])
    perturbing, all_eight = trainer.multiply_adds(1), trainer.multiply_adds(8)
    between = (all_eight - perturbing) / 7
    # A clean pass and the products of gradients; and a pair behind the first layer.
    assert 1.4 < perturbing / between < 2
    state = trainer.learner.init(params, data().images, 0)
    state = jax.jit(trainer.learner.step)(state, 1e-2, 10.0, data())
    assert all(
        np.any(a != b)
        for a, b in zip(
            *map(jax.tree.leaves, (state.params["Dense_0"], params["Dense_0"])),
            strict=True,
        )
    )
