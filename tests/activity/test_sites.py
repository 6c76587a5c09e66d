"""Which leaves a site is about, and what sites refuse."""

import jax
import jax.numpy as jnp
import pytest

import fgrad
from fgrad.activity import Site, SyntheticGradient, leaves_of, leaves_outside, sites

PARAMS = {
    "block_1": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
    "block_10": {"kernel": jnp.ones((4, 4))},
    "head": {"kernel": fgrad.quantize(jnp.ones((4, 2))), "bias": jnp.ones(2)},
}


def chosen(mask):
    paths = jax.tree_util.tree_leaves_with_path(mask(PARAMS))
    return {
        jax.tree_util.keystr(p, simple=True, separator="/") for p, on in paths if on
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # A name is that of a layer or a leaf, never the beginning of another name.
        (["block_1"], {"block_1/kernel", "block_1/bias"}),
        (["block_1/bias", "head/kernel"], {"block_1/bias", "head/kernel"}),
        ([Site("head", "block_10")], {"head/kernel", "head/bias", "block_10/kernel"}),
        ([], set()),
        (["block"], set()),
    ],
)
def test_sites_own_the_leaves_that_their_names_are_about(names, expected):
    every = {"block_1/kernel", "block_1/bias", "block_10/kernel"}
    every |= {"head/kernel", "head/bias"}
    assert chosen(leaves_of(names)) == expected
    assert chosen(leaves_outside(names)) == every - expected
    # A mask has one bool for a QTensor, as the estimators ask for.
    assert leaves_of(names)(PARAMS)["head"]["kernel"] in (True, False)


def test_site_leaves_are_the_paths_of_each_site():
    one, two = Site("block_1"), Site("head/bias", "block_10")
    assert sites.site_leaves([one, two], PARAMS) == {
        one: ["block_1/bias", "block_1/kernel"],
        two: ["head/bias", "block_10/kernel"],
    }


@pytest.mark.parametrize(
    ("given", "params", "error", "message"),
    [
        (["blok"], PARAMS, ValueError, r"site 'blok' names no parameter; there are \["),
        (["head", "head/bias"], PARAMS, ValueError, "leaf 'head/bias' belongs to two"),
        (["ids"], {"ids": jnp.arange(3)}, TypeError, "leaf 'ids' .* dtype int32"),
    ],
)
def test_sites_that_cannot_be_are_refused(given, params, error, message):
    with pytest.raises(error, match=message):
        sites.site_leaves([Site(name) for name in given], params)


def test_a_site_may_be_its_name():
    assert sites.as_site("head").names == ("head",)
    site = Site("head")
    assert sites.as_site(site) is site
    with pytest.raises(TypeError, match=r"a site is a layer's name .* got 3"):
        sites.as_site(3)


@pytest.mark.parametrize(
    ("names", "options", "error", "message"),
    [
        ([], {}, ValueError, r"needs the names of layers, got \(\)"),
        ([""], {}, ValueError, "needs the names of layers"),
        ([3], {}, ValueError, "needs the names of layers"),
        (
            ["a"],
            {"epsilon": 0.0},
            ValueError,
            "epsilon must be positive and",
        ),
        (["a"], {"num_perturbations": 0}, ValueError, "positive integer, got 0"),
        (["a"], {"synthetic": "head"}, TypeError, "synthetic must be"),
        (
            ["a"],
            {"exact": True, "synthetic": SyntheticGradient("head")},
            ValueError,
            "is exact and has no noise",
        ),
    ],
)
def test_sites_are_checked_when_they_are_made(names, options, error, message):
    with pytest.raises(error, match=message):
        Site(*names, **options)


def test_a_synthetic_gradient_finds_the_exact_site_that_it_names():
    head = Site("head", "block_10", exact=True)
    synthetic = SyntheticGradient("block_10")
    body = Site("block_1", synthetic=synthetic)
    assert sites.exact_site(body, [body, head]) is head
    with pytest.raises(ValueError, match="which is no exact site"):
        sites.exact_site(body, [body, Site("block_10")])
    local = Site("block_1", synthetic=synthetic, loss="local")
    with pytest.raises(ValueError, match="needs an exact site of the same loss"):
        sites.exact_site(local, [local, head])


def test_mean_jacobians_have_an_axis_of_outputs_and_one_of_channels():
    head = Site("head", exact=True)
    body = Site("block_1", synthetic=SyntheticGradient("head"))
    found = sites.mean_jacobians([head, body], PARAMS)
    assert {name: x.shape for name, x in found.items()} == {"block_1": (2, 4)}
    assert not any(x.any() for x in found.values())
    # Of optax.tree.map_params' placeholder.
    assert sites.mean_jacobians([head, body], {})["block_1"].shape == (0, 0)
    several = Site("block_1/kernel", "head/bias", synthetic=SyntheticGradient("x"))
    exact = Site("x", exact=True)
    with pytest.raises(ValueError, match="needs a single layer"):
        sites.mean_jacobians([several, exact], PARAMS | {"x": jnp.ones((4, 5))})
