"""A small network of known losses and activations, with noise where one likes."""

import jax.numpy as jnp
import numpy as np

from fgrad.activity import Site
from fgrad.activity.example_losses import ExampleLosses

EXAMPLES = 4


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


def example_losses(names, **options):
    params, x = params_and_data()
    sites = [Site(name, **options) for name in names]

    def value_fn(params, x):
        return network(params, x, {})[0]

    return ExampleLosses.of(value_fn, params, sites, {"x": x}), sites
