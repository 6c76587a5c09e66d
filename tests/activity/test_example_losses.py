"""Losses after perturbed activations against a network that takes the noise itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fgrad import estimators, fixed_point, perturbations
from fgrad.activity import Site
from fgrad.activity.example_losses import Tapped, named_losses

EXAMPLES = 4
KEY = jax.random.key(5)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def array(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def params_and_data():
    params = {
        "first": {"w": array(0, 3, 5), "b": array(1, 5)},
        "second": array(2, 5, 6),
        "head": array(3, 6, 2),
    }
    return params, array(4, EXAMPLES, 3)


def network(params, x, noise):
    """Two losses of each example, and the activations; noise is added to those."""
    h1 = x @ params["first"]["w"] + params["first"]["b"] + noise.get("first", 0)
    h2 = jnp.tanh(h1) @ params["second"] + noise.get("second", 0)
    y = jnp.sin(h2) @ params["head"] + noise.get("head", 0)
    losses = {"deep": jnp.sum(y**3, -1), "local": jnp.sum(jnp.cos(h1), -1)}
    return losses, {"first": h1, "second": h2, "head": y}


def tapped(names, **options):
    params, x = params_and_data()
    sites = [Site(name, **options) for name in names]
    losses = lambda params, x: network(params, x, {})[0]  # noqa: E731
    return Tapped(losses, params, sites, {"x": x}), sites


@pytest.mark.parametrize(
    "names", [["first"], ["second"], ["head"], ["first", "head"], ["second", "first"]]
)
@pytest.mark.parametrize("loss", ["deep", "local"])
def test_losses_are_those_of_the_network_with_noise(names, loss):
    """Also where one perturbed activation depends on another."""
    params, x = params_and_data()
    taps, sites = tapped(names)
    _, activations = network(params, x, {})
    noise = {
        name: 0.3 * array(10 + i, *activations[name].shape)
        for i, name in enumerate(names)
    }
    numbers = {
        name: next(iter(taps.outputs(site)))
        for name, site in zip(names, sites, strict=True)
    }
    for name, number in numbers.items():
        np.testing.assert_allclose(taps.values[number], activations[name])
    output = dict(zip(["deep", "local"], taps.program.outputs, strict=True))[loss]
    found = taps.losses({numbers[name]: x for name, x in noise.items()}, output)
    np.testing.assert_allclose(found, network(params, x, noise)[0][loss], rtol=1e-12)


def test_leaves_of_a_layer_share_its_output():
    taps, (site,) = tapped(["first"])
    ((_, layers),) = taps.outputs(site).items()
    assert sorted(layers) == ["first/b", "first/w"]


def test_only_what_depends_on_the_noise_is_computed_again():
    taps, (site,) = tapped(["second"])
    (number,) = taps.outputs(site)

    def again(noise):
        return taps.losses({number: noise}, taps.program.outputs[0])

    noise = jnp.zeros((EXAMPLES, 6))
    names = [e.primitive.name for e in jax.make_jaxpr(again)(noise).jaxpr.eqns]
    assert names.count("dot_general") == 1  # the head's, of three
    assert "tanh" not in names
    untouched = taps.losses({number: noise + 1}, taps.program.outputs[1])
    np.testing.assert_array_equal(untouched, taps.values[taps.program.outputs[1]])


@pytest.mark.parametrize("vectorize", [1, 3, 8])
@pytest.mark.parametrize("estimator", [estimators.spsa, estimators.sign_m_spsa])
def test_random_directions_make_the_gradient_of_the_formula(vectorize, estimator):
    """``1/(K rms B) Σₖ cₖ uₖ`` at the output, and from there the layer's transpose."""
    params, x = params_and_data()
    taps, (site,) = tapped(["second"], loss="deep", epsilon=0.2)
    count, z = 5, perturbations.rademacher()
    found = taps.estimate(
        site,
        functools.partial(perturbations.sample_key, KEY, 7),
        count=count,
        perturbation=z,
        estimator=estimator,
        vectorize=vectorize,
    )
    _, activations = network(params, x, {})
    h = np.asarray(activations["second"])
    rms = np.sqrt(np.mean(h**2))
    dy, total = np.zeros_like(h), []
    for i in range(count):
        key = perturbations.sample_key(KEY, 7, i)
        key = perturbations.leaf_keys(key, ["second"])["second"]
        u = z.step * np.asarray(z.sample(key, h.shape), float)
        sides = [
            np.asarray(network(params, x, {"second": s * 0.2 * rms * u})[0]["deep"])
            for s in (1, -1)
        ]
        c = sides[0] - sides[1]
        c = np.sign(c) if estimator is estimators.sign_m_spsa else c / 0.4
        dy += c[:, None] * u / (count * rms * EXAMPLES)
        total += sides
    # The coefficients of SPSA are float32.
    np.testing.assert_allclose(next(iter(found.dy.values())), dy, rtol=1e-5, atol=1e-7)
    expected = np.tanh(np.asarray(activations["first"])).T @ dy
    np.testing.assert_allclose(found.gradients["second"], expected, rtol=1e-5)
    assert float(found.loss) == pytest.approx(np.mean(total), rel=1e-5)
    assert (found.name, int(found.nonfinite_pairs)) == ("deep", 0)
    assert found.jacobian is None


def test_an_exact_site_takes_central_differences_along_each_coordinate():
    params, x = params_and_data()
    taps, (site,) = tapped(["head"], loss="deep", exact=True, epsilon=0.1)
    found = taps.estimate(
        site,
        functools.partial(perturbations.sample_key, KEY, 0),
        count=1,
        perturbation=perturbations.rademacher(),
        estimator=estimators.spsa,
        vectorize=1,
    )
    y = np.asarray(network(params, x, {})[1]["head"])
    # Of y³: 3y² + ε².
    expected = (3 * y**2 + 0.1**2) / EXAMPLES
    np.testing.assert_allclose(next(iter(found.dy.values())), expected, rtol=1e-9)


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
        Tapped(loss, params, [Site("w")], {"x": jnp.ones((4, 3))})


def test_scales_take_no_leafs_place():
    params = {"q": fixed_point.quantize(jnp.ones((3, 2))), "w": jnp.ones((2, 2))}

    def losses(params, x):
        return jnp.sum(x @ jnp.asarray(params["q"]) @ params["w"], -1)

    site = Site("w")
    taps = Tapped(losses, params, [site], {"x": jnp.ones((4, 3))})
    ((_, layers),) = taps.outputs(site).items()
    assert taps.program.avals[layers["w"].leaf].shape == (2, 2)
