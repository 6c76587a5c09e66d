"""The interpreter: each parameter is perturbed where it is used, and nowhere else.

Most tests here stand in for `fgrad.leaves.arithmetic.Side` with a move that is easy to
see, so that what they check is the interpreter alone.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import fast_jit
from jax import lax
from light_keys import light_key

from fgrad import evaluation, perturbations
from fgrad.evaluation import point_of_use
from fgrad.evaluation.point_of_use import Event, Pending

KEY, EPSILON = light_key(1, 2), 0.05


class Shifted(NamedTuple):
    """A leaf that is perturbed by adding ``by``, in all blocks alike.

    Attributes:
      name: of the leaf.
      by: what is added.
      calls: receives shape, block and what it waits for, each time it is asked.
    """

    name: str
    by: float
    calls: list[Any]

    def dense(self, array, block, after):
        self.calls.append((array.shape, block, after))
        return array + self.by

    def factored(self, array, block):
        return None


def shifted_run(function, arrays, *data, seed=1.0):
    """Value, events and calls of a run in which every array is moved by its own step.

    Returns also what the function says of arrays that are moved beforehand.
    """
    calls = {name: [] for name in arrays}
    events = []
    steps = {name: 0.5 + i for i, name in enumerate(arrays)}
    program = point_of_use.trace(lambda *a: function(*a, *data), *arrays.values())
    pending = [
        Pending(Shifted(name, steps[name], calls[name]), jnp.asarray(array))
        for name, array in arrays.items()
    ]
    (got,) = point_of_use.run(program, pending, jnp.float32(seed), events)
    moved = [jnp.asarray(array) + steps[name] for name, array in arrays.items()]
    return got, function(*moved, *data), events, calls


def matrix(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = matrix(0, 2, 3)


def test_each_leaf_is_perturbed_once_where_it_meets_the_data():
    def function(w, v):
        return jnp.sum(jnp.tanh(X @ w) * v)

    arrays = {"w": matrix(1, 3, 4), "v": matrix(2, 4)}
    got, wanted, events, _ = shifted_run(function, arrays)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert events == [Event("w", "at use", "dot_general"), Event("v", "at use", "mul")]


def test_it_waits_for_the_activation_that_it_meets():
    def function(w, v):
        return jnp.sum(jnp.sin(X @ w) @ v)

    arrays = {"w": matrix(1, 3, 4), "v": matrix(2, 4, 5)}
    _, _, _, calls = shifted_run(function, arrays, seed=7.0)
    ((_, _, first),) = calls["w"]
    ((_, _, second),) = calls["v"]
    assert first == 7.0  # until there is an activation, the seed
    np.testing.assert_allclose(second, X @ (arrays["w"] + 0.5), rtol=1e-6)


def test_what_is_done_to_parameters_alone_waits_with_them():
    def function(w, s):
        scaled = (jnp.exp(w) * s).astype(jnp.bfloat16).astype(jnp.float32)
        return jnp.sum(jnp.tanh(X @ scaled.T.reshape(3, 4)))

    arrays = {"w": matrix(1, 3, 4), "s": matrix(2, 4)}
    got, wanted, events, _ = shifted_run(function, arrays)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert set(events) == {
        Event("w", "at use", "dot_general"),
        Event("s", "at use", "dot_general"),
    }


@pytest.mark.parametrize(("uses", "times"), [(1, 1), (2, 2), (3, 1), (9, 1)])
def test_a_copy_is_kept_where_there_are_many_uses(uses, times):
    def function(w):
        h = X
        for _ in range(uses):
            h = jnp.tanh(h @ w)
        return jnp.sum(h)

    got, wanted, events, _ = shifted_run(function, {"w": matrix(1, 3, 3)})
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert events == [Event("w", "at use", "dot_general")] * times


def test_a_leaf_that_is_not_used_is_never_perturbed():
    arrays = {"w": matrix(1, 3, 4), "v": matrix(2, 4)}
    got, wanted, events, calls = shifted_run(lambda w, v: jnp.sum(X @ w), arrays)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert [event.leaf for event in events] == ["w"]
    assert calls["v"] == []


def test_a_leaf_may_be_the_result():
    got, wanted, events, _ = shifted_run(lambda w: w, {"w": np.float32(2.0)})
    assert got == wanted == 2.5
    assert events == [Event("w", "at use", "return")]


@jax.custom_jvp
def doubled(x):
    return 2 * x


doubled.defjvp(lambda primals, tangents: (doubled(*primals), 2 * tangents[0]))

CALLS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "custom_jvp": lambda f: lambda *a: doubled(f(*a)),
    "nested": lambda f: jax.jit(jax.checkpoint(jax.jit(f))),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_followed(name):
    inner = CALLS[name](lambda h, w: jnp.tanh(h @ w))

    def function(w, v):
        return jnp.sum(inner(inner(X, w), v))

    arrays = {"w": matrix(1, 3, 4), "v": matrix(2, 4, 3)}
    got, wanted, events, _ = shifted_run(function, arrays)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert events == [Event(leaf, "at use", "dot_general") for leaf in ("w", "v")]


def test_a_scan_slices_a_stacked_leaf_and_perturbs_its_blocks():
    def function(w):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), X, w)
        return jnp.sum(h)

    got, wanted, events, calls = shifted_run(function, {"w": matrix(1, 5, 3, 3)})
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert events == [Event("w", "at use", "dot_general")]
    ((shape, block, _),) = calls["w"]
    assert shape == (3, 3)
    assert block is not None


@pytest.mark.parametrize(("rows", "way"), [(300, "at use"), (2, "before")])
def test_a_loop_that_does_much_with_a_weight_perturbs_it_inside(rows, way):
    x = matrix(3, rows, 3)

    def function(w):
        h, _ = lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=4)
        return jnp.sum(h)

    assert rows * 3 * 3 / 9 >= point_of_use.LOOP_WORK or way == "before"
    got, wanted, events, _ = shifted_run(function, {"w": matrix(1, 3, 3)})
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    primitive = "dot_general" if way == "at use" else "scan"
    assert events == [Event("w", way, primitive)]


@pytest.mark.parametrize("flag", [True, False])
def test_branches_perturb_what_they_use(flag):
    def function(w, v, flag):
        return lax.cond(
            flag, lambda h: jnp.sum(h @ w), lambda h: jnp.sum(jnp.tanh(h) @ v), X
        )

    arrays = {"w": matrix(1, 3, 4), "v": matrix(2, 3, 5)}
    got, wanted, events, _ = shifted_run(function, arrays, jnp.bool_(flag))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert {event.leaf for event in events} == {"w", "v"}  # both are traced


def test_while_loops_and_carries():
    def function(w, v):
        def body(carry):
            count, h, moving = carry
            return count + 1, jnp.tanh(h @ w), moving * 0.5

        count, h, moving = lax.while_loop(lambda c: c[0] < 3, body, (0, X, v))
        return jnp.sum(h) + jnp.sum(moving) + count

    arrays = {"w": matrix(1, 3, 3), "v": matrix(2, 4)}
    got, wanted, events, _ = shifted_run(function, arrays)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert set(events) == {Event("w", "before", "while"), Event("v", "before", "while")}


def test_equations_with_effects_run_once_and_in_order():
    seen = []

    def function(w):
        h = X @ w
        jax.debug.callback(lambda a: seen.append(float(a)), h[0, 0], ordered=True)
        jax.debug.callback(lambda a: seen.append(float(a)), w[0, 0], ordered=True)
        return jnp.sum(h)

    w = matrix(1, 3, 4)
    program = point_of_use.trace(function, w)
    run = fast_jit(
        lambda: point_of_use.run(
            program, [Pending(Shifted("w", 0.5, []), w)], jnp.float32(1)
        )
    )
    run()
    jax.effects_barrier()
    expected = [float((X @ (w + 0.5))[0, 0]), float(w[0, 0] + 0.5)]
    np.testing.assert_allclose(seen, expected, rtol=1e-6)


def test_products_keep_the_precision_that_they_were_traced_with():
    def function(w):
        with jax.default_matmul_precision("highest"):
            return jnp.sum(X @ w)

    w = matrix(1, 3, 4)
    program = point_of_use.trace(function, w)

    def run(w):
        pending = Pending(Shifted("w", 0.5, []), w)
        return point_of_use.run(program, [pending], jnp.float32(1))

    equations = jax.make_jaxpr(run)(w).jaxpr.eqns
    (product,) = [e for e in equations if e.primitive.name == "dot_general"]
    assert product.params["precision"] == (lax.Precision.HIGHEST,) * 2


def test_arguments_may_be_arrays_as_they_are():
    def function(w, v):
        return jnp.sum(X @ w + v)

    w, v = matrix(1, 3, 4), matrix(2, 4)
    program = point_of_use.trace(function, w, v)
    pending = Pending(Shifted("w", 0.5, []), w)
    (got,) = point_of_use.run(program, [pending, v], jnp.float32(1))
    np.testing.assert_allclose(got, function(w + 0.5, v), rtol=1e-6)


# ----------------------------------------------- parameters placed into other arrays


FROZEN = np.linspace(-1, 1, 60 * 40, dtype=np.float32).reshape(60, 40)


def placed(name, w):
    if name == "scatter":
        return jnp.asarray(FROZEN).at[::2].set(w)
    return jax.lax.dynamic_update_slice(jnp.asarray(FROZEN), w, (5, 0))


@functools.partial(fast_jit, static_argnums=(0, 3))
def both_ways(loss, params, x, z):
    """The losses at w ± εz, by the evaluator and from a perturbed copy."""
    got = evaluation.dual_forward(loss, params, KEY, EPSILON, z, x=x)
    there = [evaluation.perturb(params, KEY, EPSILON, z, sign=s) for s in (1, -1)]
    return *got, *(loss(p, x) for p in there)


@pytest.mark.parametrize("name", ["scatter", "dynamic_update_slice"])
@pytest.mark.parametrize("rows", [30, 1])
def test_what_a_parameter_is_placed_into_waits_for_its_use(name, rows):
    w = jnp.asarray(np.random.default_rng(3).normal(size=(rows, 40)), jnp.float32)
    params = {"w": w, "v": jnp.full((40, 60), 0.1)}
    x = jnp.ones((2, 40))

    def loss(params, x):
        whole = placed(name, params["w"])
        h = jnp.tanh(x @ params["v"])  # before the placed array in the program
        return jnp.sum(jnp.sin(h @ (whole.T.reshape(40, 60).T * 1.5)))

    plus, minus, *there = both_ways(loss, params, x, perturbations.normal())
    for got, wanted in zip((plus, minus), there, strict=True):
        # A sum of 120 sines of up to 1, in another order.
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)
    lines = evaluation.explain(loss, params, x=x)
    way = {line.name: (line.way, *line.primitives) for line in lines}
    assert way["w"] == (("at use", "dot_general") if rows == 30 else ("first",))


def test_data_that_a_parameter_is_placed_into_is_no_parameter():
    params = {"token": jnp.ones(6), "w": jnp.full((6, 300), 0.1), "p": jnp.ones((4, 6))}
    x = jnp.ones((4, 6))

    def loss(params, x):
        x = x.at[0].set(params["token"])
        return jnp.sum(jnp.tanh(x @ params["w"])) + jnp.sum(jnp.tanh(x * params["p"]))

    low_rank = perturbations.low_rank()
    lines = evaluation.explain(loss, params, low_rank, x=x)
    way = {line.name: line.way for line in lines}
    assert way == {"token": "first", "w": "low rank", "p": "at use"}
    plus, _, wanted, _ = both_ways(loss, params, x, low_rank)
    np.testing.assert_allclose(plus, wanted, rtol=1e-5)
