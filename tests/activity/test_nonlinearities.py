"""Slopes in closed form against `jax.grad`, and where they are looked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import every

from fgrad.activity import nonlinearities
from fgrad.tracing import derivatives, graph

FUNCTIONS = {
    "abs": jnp.abs,
    "cbrt": jnp.cbrt,
    "celu": jax.nn.celu,
    "clip": lambda x: jnp.clip(x, -1, 1),
    "cos": jnp.cos,
    "cube": lambda x: x**3,
    "elu": jax.nn.elu,
    "erf": jax.lax.erf,
    "exact_gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "exp2": jnp.exp2,
    "gelu": jax.nn.gelu,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_swish": jax.nn.hard_swish,
    "hard_tanh": jax.nn.hard_tanh,
    "leaky_relu": jax.nn.leaky_relu,
    "log1p": lambda x: jnp.log1p(jnp.exp(x)),
    "mish": jax.nn.mish,
    "power": lambda x: jnp.exp(x) ** 1.5,
    "quotient": lambda x: x / (2 + x * x),
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sin": jnp.sin,
    "soft_sign": jax.nn.soft_sign,
    "softplus": jax.nn.softplus,
    "square": jnp.square,
    "squared_relu": lambda x: jax.nn.relu(x) ** 2,
    "squareplus": jax.nn.squareplus,
    "tanh": jnp.tanh,
}
X = jnp.array([-4.1, -1.7, -0.6, -0.2, 0.3, 0.9, 2.4, 4.7, 7.0])


def behind(function, x=X):
    """The nonlinearity behind the first argument, and the values around it."""
    program = graph.trace(function, x)
    (start,) = program.inputs
    values = graph.evaluate(program.nodes, {**program.constants, start: x})
    return nonlinearities.behind(program, start), values


@pytest.mark.parametrize("name", every(5, FUNCTIONS))
def test_slopes_are_those_of_grad(name):
    function = FUNCTIONS[name]
    found, values = behind(lambda x: function(x).sum())
    np.testing.assert_allclose(values[found.end], function(X), rtol=1e-6)
    expected = jax.vmap(jax.grad(function))(X)
    np.testing.assert_allclose(found.slope(values), expected, rtol=2e-5, atol=2e-6)


def test_a_kink_counts_as_flat():
    found, values = behind(lambda x: jax.nn.relu(x).sum(), jnp.zeros(2))
    np.testing.assert_array_equal(found.slope(values), [0, 0])


def test_wrappers_are_looked_through():
    found, _ = behind(lambda x: jax.jit(jax.checkpoint(jax.nn.relu))(x).sum())
    assert found.path == ("max",)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 2 * x @ jnp.ones(9),  # no curve
        lambda x: (x - x.mean()).sum(),  # a normalisation
        lambda x: (x + jax.nn.relu(x) @ jnp.ones((9, 9))).sum(),  # a skip connection
        lambda x: jnp.round(x).sum(),  # a grid
        lambda x: jnp.arctan(x).sum(),  # not in the table
    ],
    ids=["line", "norm", "skip", "grid", "unknown"],
)
def test_other_things_have_no_gate(function):
    assert behind(function)[0] is None


def test_it_ends_where_others_read_the_value():
    found, values = behind(lambda x: jnp.tanh(jax.nn.relu(x)).sum() * 2)
    assert found.path == ("max", "tanh")
    found, values = behind(lambda x: (y := jax.nn.relu(x)) @ y)
    assert found.path == ("max",)
    np.testing.assert_array_equal(found.slope(values), X > 0)


TRANSPOSED = {
    "normalised": lambda x: (
        (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-3)
    ),
    "attention": lambda x: jax.nn.softmax(x @ x.T) @ x,
    "maximum": lambda x: x.max(0) - x.min(1).sum(),
    "products": lambda x: (x @ jnp.ones((4, 4)) * x)[1:, ::2],
    "pieces": lambda x: jnp.concatenate([x, jnp.tanh(x)], 1).reshape(-1),
    "division": lambda x: x / (1 + jnp.exp(x).sum()),
}


@pytest.mark.parametrize("name", every(3, TRANSPOSED))
def test_transposed_products_are_those_of_vjp(name):
    function, x = TRANSPOSED[name], jax.random.normal(jax.random.key(0), (3, 4))
    program = graph.trace(function, x)
    (start,), (end,) = program.inputs, program.outputs
    values = graph.evaluate(program.nodes, {**program.constants, start: x})
    dy = jax.random.normal(jax.random.key(1), values[end].shape)
    (found,) = derivatives.transposed(program, [start], end, values, dy)
    (expected,) = jax.vjp(function, x)[1](dy)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_in_the_table_is_told():
    program = graph.trace(lambda x: jnp.sort(x), X)
    values = {program.inputs[0]: X, program.outputs[0]: jnp.sort(X)}
    with pytest.raises(ValueError, match=r"'sort'.*not in the table"):
        derivatives.transposed(program, program.inputs, program.outputs[0], values, X)
