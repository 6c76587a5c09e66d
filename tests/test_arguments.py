"""What links ask of their arguments, question by question."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import fgrad
from fgrad import _arguments, perturbations
from fgrad.leaves import Policy


def test_a_transformation_takes_extra_arguments_afterwards():
    tx = _arguments.transformation(optax.sgd(0.1))
    updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), batch=3)
    assert updates.tolist() == pytest.approx([-0.1, -0.1])
    with pytest.raises(TypeError, match=r"got 0.1; use for example fgrad.qzo_ff"):
        _arguments.transformation(0.1)


def test_a_policy_is_made_of_options_that_hold():
    z, grid = perturbations.rademacher(), fgrad.on_grid(0.1)
    assert _arguments.policy(0.1, 2, z, grid) == Policy(0.1, 2, z, grid)
    assert _arguments.policy(0.1, 2, None).perturbation == perturbations.normal()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ((0.0, 1, None), ValueError, "rho must be positive and finite, got 0.0"),
        ((-1, 1, None), ValueError, "rho must be positive and finite, got -1"),
        ((float("nan"), 1, None), ValueError, "positive and finite, got nan"),
        ((float("inf"), 1, None), ValueError, "positive and finite, got inf"),
        (("x", 1, None), TypeError, "rho must be a number.*got 'x' of type str"),
        ((None, 1, None), TypeError, "rho must be a number.*got None of type"),
        ((True, 1, None), TypeError, "rho must be a number.*got True of type bool"),
        ((jnp.ones(2), 1, None), TypeError, "rho must be a number or a schedule"),
        ((0.1, 1, "normal"), TypeError, "got 'normal'; use for"),
        ((0.1, 0, None), ValueError, "num_perturbations must be a positive integer"),
        ((0.1, 1, None, 8), TypeError, r"low_bit must be fgrad.on_grid.*got 8"),
    ],
)
def test_a_policy_of_other_options_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        _arguments.policy(*options, name="rho")


def test_a_perturbation_or_the_default():
    z = perturbations.rademacher()
    assert _arguments.perturbation(z, perturbations.normal) is z
    assert _arguments.perturbation(None, lambda: z) is z


def test_an_estimator_or_the_default():
    assert _arguments.estimator(None, jnp.sum, "this") is jnp.sum
    assert _arguments.estimator(jnp.max, jnp.sum, "this") is jnp.max
    with pytest.raises(TypeError, match="got 'spsa'; use this or that"):
        _arguments.estimator("spsa", jnp.sum, "this or that")


def test_the_loss_is_value_fn_or_its_alias():
    params = jnp.ones(2)
    assert _arguments.loss("link", params, jnp.sum, None) is jnp.sum
    assert _arguments.loss("link", params, None, jnp.sum) is jnp.sum
    for value_fn, obj_fn in ((None, None), (jnp.sum, jnp.max)):
        with pytest.raises(ValueError, match=r"link needs the loss.*not both"):
            _arguments.loss("link", params, value_fn, obj_fn)
    with pytest.raises(ValueError, match="link needs the parameters"):
        _arguments.loss("link", None, jnp.sum, None)
    with pytest.raises(ValueError, match="link needs the parameters"):
        _arguments.given("link", None)
    _arguments.given("link", {})


def test_leaves_that_a_wrapper_hides_are_noticed():
    with pytest.raises(ValueError, match="hid leaves of params"):
        _arguments.visible({"a": jnp.ones(1), "b": optax.MaskedNode()})
    _arguments.visible({"a": jnp.ones(1), "b": fgrad.quantize(jnp.ones(1))})


def test_keys_of_both_kinds_and_nothing_else():
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        _arguments.key(key)
        jax.jit(lambda k: _arguments.key(k))(key)
    for value in (0, None, jnp.zeros(2), "key"):
        with pytest.raises(TypeError, match=r"use jax.random.key\(0\)"):
            _arguments.key(value)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", jnp.int32(3), None])
def test_a_count_is_a_positive_python_integer(value):
    with pytest.raises(ValueError, match=r"m must be a positive integer.*static_args"):
        _arguments.count("m", value)
    _arguments.count("m", 1)


def test_a_loss_gets_the_arguments_that_it_names():
    extra = {"x": 1, "y": 2, "value": 3}

    def named(value_fn):
        return _arguments.named_arguments(value_fn, extra)

    assert named(lambda params, x: 0) == {"x": 1}
    assert named(lambda params, *, y=5, z=6: 0) == {"y": 2}
    assert named(lambda params: 0) == {}
    assert named(lambda params, **rest: 0) == extra
    assert named(lambda params, *rest: 0) == {}
    # The first parameter is the params, however it is called.
    assert named(lambda x, y: 0) == {"y": 2}
    assert named(functools.partial(lambda params, x, y: 0, y=7)) == {"x": 1, "y": 2}
    with pytest.raises(TypeError, match="needs images, labels, which update"):
        named(lambda params, images, x, labels: 0)
