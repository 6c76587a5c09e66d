"""Roundings to a grid are found however they are written, and nothing else is."""

import jax
import jax.numpy as jnp
import pytest

from fgrad.fixed_point import fake_quantize
from fgrad.tracing import graph, roundings

X, STEP = jnp.ones((2, 3)), jnp.float32(0.1)


def round_first(x, s):
    return jnp.clip(jnp.round(x / s), -127, 127) * s


def clip_first(x, s):
    return jnp.round(jnp.clip(x / s, -127, 127)) * s


def by_the_inverse(x, s):
    return jnp.clip(jnp.round(x * (1 / s)), -127, 127) * s


def stored_in_integers(x, s):
    return round_first(x, jnp.float32(1)).astype(jnp.int8).astype(jnp.float32)


def straight_through(x, s):
    x = x / s
    return (x + jax.lax.stop_gradient(jnp.round(x) - x)) * s


def of_the_library(x, s):
    return fake_quantize(x, s, 8)


def step_of_the_batch(x, s):
    return round_first(x, jnp.abs(x).max() / 127)


@pytest.mark.parametrize(
    "on_grid",
    [
        *(round_first, clip_first, by_the_inverse, stored_in_integers),
        *(straight_through, of_the_library, step_of_the_batch),
    ],
)
def test_a_stream_goes_through_a_rounding(on_grid):
    def block(x, s, w):
        h = on_grid(x, s)
        return on_grid(h + jnp.tanh(h @ w), s)

    program = graph.trace(block, X, STEP, jnp.eye(3))
    assert program.outputs[0] in roundings.along_skips(program, program.inputs[0])


@pytest.mark.parametrize(
    "changed",
    [
        lambda x, s: jnp.round(x / s),  # in other units
        lambda x, s: jnp.round(x / s) * (2 * s),
        lambda x, s: x * s,
        lambda x, s: jax.nn.relu(x),
        lambda x, s: jnp.clip(x, -1, 1),
        lambda x, s: jnp.round(jnp.maximum(x, 0)),
        lambda x, s: jnp.round(x / s) * s * x,
    ],
)
def test_what_changes_a_value_ends_its_stream(changed):
    program = graph.trace(changed, X, STEP)
    assert program.outputs[0] not in roundings.along_skips(program, program.inputs[0])


@pytest.mark.parametrize("on_grid", [round_first, clip_first, by_the_inverse])
def test_the_division_begins_a_rounding_and_two_limits_belong_to_it(on_grid):
    program = graph.trace(lambda x, s: on_grid(2 * jax.nn.relu(x), s), X, STEP)
    begun = [n.name for n in program.nodes if roundings.begins(program, n)]
    assert begun == ["mul" if on_grid is by_the_inverse else "div"]
    limits = roundings.limits(program.nodes)
    names = [n.name for n in program.nodes if not limits.isdisjoint(n.outputs)]
    assert names == ["max", "min"], "and not the max of the ReLU"
