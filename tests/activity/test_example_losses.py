"""Losses after perturbed activations against a network that takes the noise itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from noisy_network import EXAMPLES, array, example_losses, network, params_and_data

from fgrad import fixed_point
from fgrad.activity import Site
from fgrad.activity.example_losses import ExampleLosses, named_losses


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    "names", [["first"], ["second"], ["head"], ["first", "head"], ["second", "first"]]
)
@pytest.mark.parametrize("loss", ["deep", "local"])
def test_losses_are_those_of_the_network_with_noise(names, loss):
    """Also where one perturbed activation depends on another."""
    params, x = params_and_data()
    losses, sites = example_losses(names)
    _, activations = network(params, x, {})
    noise = {
        name: 0.3 * array(10 + i, *activations[name].shape)
        for i, name in enumerate(names)
    }
    numbers = {
        name: next(iter(losses.outputs(site)))
        for name, site in zip(names, sites, strict=True)
    }
    for name, number in numbers.items():
        np.testing.assert_allclose(losses.values[number], activations[name])
    found = losses.evaluate({numbers[name]: x for name, x in noise.items()}, loss)
    np.testing.assert_allclose(found, network(params, x, noise)[0][loss], rtol=1e-12)


def test_leaves_of_a_layer_share_its_output():
    losses, (site,) = example_losses(["first"])
    ((_, layers),) = losses.outputs(site).items()
    assert sorted(layers) == ["first/b", "first/w"]


def test_only_what_depends_on_the_noise_is_computed_again():
    losses, (site,) = example_losses(["second"])
    (number,) = losses.outputs(site)

    def again(noise):
        return losses.evaluate({number: noise}, "deep")

    noise = jnp.zeros((EXAMPLES, 6))
    names = [e.primitive.name for e in jax.make_jaxpr(again)(noise).jaxpr.eqns]
    assert names.count("dot_general") == 1  # the head's, of three
    assert "tanh" not in names
    untouched = losses.evaluate({number: noise + 1}, "local")
    np.testing.assert_array_equal(untouched, losses.evaluate({}, "local"))


def test_losses_have_names():
    assert list(named_losses(jnp.ones(3))) == ["loss"]
    assert list(named_losses({"a": [1.0], "b": [2.0]})) == ["a", "b"]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda params, x: jnp.mean(x @ params["w"]), "a loss for each example"),
        (lambda params, x: x @ params["w"], "a loss for each example"),
        (
            lambda params, x: jnp.sum(x @ (params["w"] @ params["w"].T), -1),
            "layer of leaf 'w' has no output to perturb: .*fixed_point_forward_grad",
        ),
    ],
)
def test_losses_and_layers_that_cannot_be_followed(loss, message):
    params = {"w": jnp.ones((3, 2))}
    with pytest.raises((TypeError, ValueError), match=message):
        ExampleLosses.of(loss, params, [Site("w")], {"x": jnp.ones((4, 3))})


def test_scales_take_no_leafs_place():
    params = {"q": fixed_point.quantize(jnp.ones((3, 2))), "w": jnp.ones((2, 2))}

    def losses(params, x):
        return jnp.sum(x @ jnp.asarray(params["q"]) @ params["w"], -1)

    site = Site("w")
    found = ExampleLosses.of(losses, params, [site], {"x": jnp.ones((4, 3))})
    ((_, layers),) = found.outputs(site).items()
    assert found.program.avals[layers["w"].leaf].shape == (2, 2)
