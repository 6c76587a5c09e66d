"""Switches of JAX that are about the user's code do not reach the library's."""

import jax
import jax.numpy as jnp
import optax
import pytest
from lanes import every

import fgrad
from fgrad import enhancements, estimators, perturbations

KEY = jax.random.key(0)
PARAMS = {"w": jnp.linspace(-1, 1, 48).reshape(8, 6), "b": jnp.zeros(6)}
SWITCHES = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "key reuse": lambda: jax.debug_key_reuse(True),
}


def chain(**options):
    return optax.chain(
        fgrad.fixed_point_forward_grad(KEY, epsilon=0.1, **options),
        optax.sgd(1e-2),
        fgrad.quantized_update(),
    )


LINKS = {
    "signs": chain,
    "low rank": lambda: chain(perturbation=perturbations.low_rank(2), vectorize=3),
    "guided": lambda: chain(guide=enhancements.momentum_guided_sampling()),
    "spsa": lambda: chain(estimator=estimators.spsa),
    "sharpness": lambda: enhancements.sharpness_aware(
        chain(), jax.random.key(1), rho=0.1
    ),
    "sparse": lambda: enhancements.sparse_update(chain(), density=0.5),
}


def loss(params, x):
    y = jnp.dot(x, jnp.asarray(params["w"]))
    return jnp.mean(jnp.square(y + jnp.broadcast_to(params["b"][None], y.shape)))


def step(link, params):
    """A function that makes the updates of one step, and its arguments."""
    tx = link()

    def update(params, state):
        return tx.update(params, state, params, value_fn=loss, x=jnp.ones((4, 8)))[0]

    return update, (params, tx.init(params))


@pytest.mark.parametrize("bits", every(2, [16, None]))
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_link_can_be_traced(switch, link, bits):
    params = fgrad.quantize(PARAMS, bits=bits, channel_axis=-1) if bits else PARAMS
    with SWITCHES[switch]():
        update, arguments = step(LINKS[link], params)
        shapes = jax.eval_shape(update, *arguments)
    assert jax.tree.structure(shapes) == jax.tree.structure(params)


@pytest.mark.parametrize("switch", every(3, SWITCHES))
def test_the_updates_are_those_without_the_switch(switch):
    params = fgrad.quantize(PARAMS)
    update, arguments = step(LINKS["low rank"], params)
    expected = jax.jit(update)(*arguments)
    with SWITCHES[switch]():
        found = jax.jit(update)(*arguments)
    for name in params:
        assert (found[name].qvalue == expected[name].qvalue).all()


@pytest.mark.parametrize("switch", ["rank promotion", "dtype promotion"])
def test_a_switch_still_holds_in_the_loss(switch):
    def careless(params):
        ranks = jnp.sum(params["w"] + params["b"])
        return ranks + jnp.sum(params["w"] * jnp.arange(6, dtype=jnp.int32)[None])

    tx = chain()
    state = tx.init(PARAMS)
    tx.update(PARAMS, state, PARAMS, value_fn=careless)
    with SWITCHES[switch](), pytest.raises((ValueError, TypeError), match="promot"):
        tx.update(PARAMS, state, PARAMS, value_fn=careless)
