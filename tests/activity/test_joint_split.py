"""Parts of a batch start from what holds least of a layer's input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fgrad
from fgrad import activity
from fgrad.activity import joint_parts, joint_sites, joint_structure
from fgrad.activity.example_losses import ExampleLosses
from fgrad.activity.joint_split import Split
from fgrad.fixed_point import products

EXAMPLES, PARTS = 8, 4
LAYOUT = ("NHWC", "HWIO", "NHWC")


def depthwise(x, kernel):
    """By shifted copies of the image, of which each is as large as the image."""
    arguments = ((1, 1), "SAME", None, None, LAYOUT, x.shape[-1])
    if not isinstance(kernel, fgrad.QTensor):
        return products.float_conv_general_dilated(x, kernel, *arguments)
    x = fgrad.fixed_point.quantize_to_scale(x, jnp.float32(0.02), 8)
    return products.conv_general_dilated(x, kernel, *arguments)


def losses(params, x):
    h = jax.nn.relu(x @ params["stem"])
    h = jax.nn.relu(depthwise(h, params["taps"]) + 1)
    return (h.mean((1, 2)) @ params["head"]).sum(-1)


def traced(params, examples):
    """The losses of some examples and the activations in their trace."""
    x = jax.random.normal(jax.random.key(0), (examples, 4, 4, 2))
    hidden, head = activity.Site("stem", "taps"), joint_structure.as_head("head")
    found = ExampleLosses.of(losses, params, [hidden, head], {"x": x})
    sites = joint_sites.joint_sites(
        found, hidden, head, transposed_head=False, residual=False
    )
    return found, sites


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 16])
def test_a_depthwise_layer_starts_from_its_image(bits):
    """Not from the nine copies that its product adds up."""
    normal = jax.random.normal
    params = {
        "stem": normal(jax.random.key(1), (2, 6)),
        "taps": normal(jax.random.key(2), (3, 3, 1, 6)),
        "head": normal(jax.random.key(3), (6, 3)),
    }
    if bits:
        params["taps"] = fgrad.quantize(params["taps"], bits=bits)
    whole, _ = traced(params, EXAMPLES)
    split = Split(*traced(params, EXAMPLES // PARTS), PARTS, whole.program)
    (site,) = (site for site in split.sites if "taps" in site.layers)
    nodes = joint_parts.nodes_of(split.losses.program, site)
    region = split.region(nodes, [site.output, site.activation])
    of_data = whole.program.depending(whole.batch)
    shapes = [whole.program.avals[v].shape for v in region.sources if v in of_data]
    assert shapes == [(EXAMPLES, 4, 4, 6)]

    read = functools.partial(split.values, region, whole.values)
    parts = [read(index)[site.activation] for index in range(PARTS)]
    expected = whole.values[site.activation]
    np.testing.assert_allclose(jnp.concatenate(parts), expected, rtol=1e-6)
