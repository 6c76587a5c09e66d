import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fgrad.tracing import graph


def branches(x, w):
    def body(carry, row):
        return carry @ w + row, None

    y, _ = jax.lax.scan(body, x, jnp.ones((5, 3)))
    return jax.lax.cond(y.sum() > 0, lambda v: v @ w @ w, lambda v: v * 2, y)


@jax.custom_jvp
def cube(x):
    return x**3


cube.defjvp(lambda primals, tangents: (cube(*primals), tangents[0]))

FUNCTIONS = {
    "jit": lambda x, w: jax.jit(lambda a: jax.nn.relu(a @ w) + 1)(x),
    "nested": lambda x, w: jax.jit(lambda a: jax.jit(jnp.tanh)(a) @ w)(x),
    "remat": lambda x, w: jax.checkpoint(lambda a: jnp.sin(a @ w))(x),
    "custom_jvp": lambda x, w: cube(x) @ w,
    "control flow": branches,
    "twice": lambda x, w: jax.nn.gelu(jax.nn.gelu(x @ w)),
    "constant": lambda x, w: x + np.arange(3.0),
    "passed through": lambda x, w: [x, 2.0, w],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_graph_computes_the_function(name):
    function = FUNCTIONS[name]
    x = jax.random.normal(jax.random.key(0), (3,))
    w = jax.random.normal(jax.random.key(1), (3, 3))
    program = graph.trace(function, x, w)
    inputs = dict(zip(program.inputs, (x, w), strict=True))
    values = graph.evaluate(program.nodes, {**program.constants, **inputs})
    found = [
        values[out] if isinstance(out, int) else out.value for out in program.outputs
    ]
    # One by one rather than fused by jit.
    for a, b in zip(found, jax.tree.leaves(function(x, w)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert not any(node.facts.called for node in program.nodes), "calls are written out"


def test_what_no_output_needs_is_left_out_but_for_effects():
    def function(x):
        jnp.sin(x)
        jax.debug.print("{}", jnp.cos(x))
        return x + 1

    names = [node.name for node in graph.trace(function, 1.0).nodes]
    assert "sin" not in names
    assert "cos" in names
    assert any("debug" in name for name in names)


def test_dependencies():
    program = graph.trace(lambda a, b: ((a * 2) @ b, b + 1), *[jnp.ones((2, 2))] * 2)
    a, b = program.inputs
    product, other = program.outputs
    assert product in program.depending([a])
    assert other not in program.depending([a])
    assert [n.name for n in program.needed([other])] == ["add"]
    assert program.uses()[b] == 2
