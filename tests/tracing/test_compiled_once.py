import contextlib
import gc
import itertools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from fgrad.tracing import compiled_once

X = jnp.arange(3.0)
runs = []  # a line for each time that `run` is traced, or runs by itself


def run(program, x, *, scale=1):
    runs.append(scale)
    return core.jaxpr_as_fun(program)(x)[0] * scale


def call(function, x=X, **static):
    return compiled_once.call(run, jax.make_jaxpr(function)(x), x, **static)


def is_new(function, x=X):
    """Whether a function has to be compiled."""
    runs.clear()
    expected = function(x)
    np.testing.assert_array_equal(call(function, x), expected)
    assert len(runs) <= 1
    return bool(runs)


@pytest.fixture(autouse=True)
def nothing_kept():
    compiled_once._program.cache_clear()


def captures(array):
    return lambda x: jnp.sum(x * array)


def captures_in_jit(array):
    return lambda x: 2 * jax.jit(lambda x: jax.jit(captures(array))(x))(x)


def captures_in_scan(array):
    return lambda x: jax.lax.scan(lambda c, _: (c * array, None), x, None, 2)[0].sum()


def with_a_derivative(array):
    @jax.custom_jvp
    def function(x):
        return jnp.sin(x * array)

    function.defjvp(lambda x, t: (function(*x), t[0] * jnp.cos(x[0])))
    return lambda x: jnp.sum(function(x))


@pytest.mark.parametrize(
    "make", [captures, captures_in_jit, captures_in_scan, with_a_derivative]
)
@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_captured_arrays_are_arguments(make, kind):
    first, second = kind(X + 1), kind(X * X + 7)
    assert is_new(make(first))
    assert not is_new(make(second))
    assert not is_new(make(first))


def test_a_captured_scalar_or_key_is_an_argument():
    def function(scalar, seed):
        key = jax.random.key(seed)
        return lambda x: jnp.sum(x * scalar + jax.random.normal(key, x.shape))

    assert is_new(function(jnp.float32(2), 0))
    assert not is_new(function(jnp.float32(3), 1))


def test_what_changed_in_place_counts():
    array = np.ones(3, np.float32)
    assert is_new(captures(array))
    array[:] = 5
    assert not is_new(captures(array))


OTHERS = {
    "a literal": lambda x: jnp.sum(x * 2.0),
    "another literal": lambda x: jnp.sum(x * 3.0),
    "zero": lambda x: jnp.min(1 / (x * 0.0 + 0.0)),
    "negative zero": lambda x: jnp.min(1 / (x * 0.0 * -0.0)),
    "an operation": lambda x: jnp.sum(x + 2.0),
    "the order of operands": lambda x: jnp.sum(2.0 - x),
    "other operands": lambda x: jnp.sum(x - 2.0),
    "a parameter": lambda x: jnp.sum(x**2),
    "another parameter": lambda x: jnp.sum(x**3),
    "a call": lambda x: jax.jit(lambda y: jnp.sum(y * 2.0))(x),
    "a loop": lambda x: jax.lax.fori_loop(0, 3, lambda i, c: c * 2, x).sum(),
    "a longer loop": lambda x: jax.lax.fori_loop(0, 4, lambda i, c: c * 2, x).sum(),
    "other integers": lambda x: jnp.sum(x.astype(jnp.int32)),
}


@pytest.mark.parametrize("pair", list(itertools.pairwise(OTHERS)), ids=" ".join)
def test_another_computation_is_another_program(pair):
    first, second = (OTHERS[name] for name in pair)
    assert is_new(first)
    assert is_new(second)
    assert not is_new(first)
    assert not is_new(second)


def test_another_shape_type_or_option_is_another_program():
    def total(x):
        return jnp.sum(x * 2)

    assert is_new(total, X)
    assert is_new(total, jnp.ones(4))
    assert is_new(total, jnp.ones(3, jnp.int32))
    assert not is_new(total, X)
    runs.clear()
    assert call(total, scale=3) == 3 * total(X)
    assert call(total, scale=5) == 5 * total(X)
    assert runs == [3, 5]


def test_settings_that_the_trace_saw_count():
    def product(x):
        return x @ x

    assert is_new(product)
    with jax.default_matmul_precision("highest"):
        assert is_new(product)
    assert not is_new(product)


def test_tracers_pass_through():
    def loss(scale):
        return call(lambda x: jnp.sum(x * scale))

    expected = float(jnp.sum(X * 2))
    assert jax.jit(loss)(2.0) == expected
    assert jax.grad(loss)(2.0) == float(jnp.sum(X))
    np.testing.assert_array_equal(jax.vmap(loss)(jnp.array([2.0])), [expected])
    assert jax.jit(lambda x: call(jnp.sum, x))(X) == jnp.sum(X)
    assert compiled_once._program.cache_info().currsize == 0


def test_effects_happen_at_every_call():
    seen = []

    def loss(x):
        jax.debug.callback(seen.append, x[0])
        return jnp.sum(x)

    for _ in range(3):
        assert call(loss) == jnp.sum(X)
    jax.effects_barrier()
    assert len(seen) == 3
    assert compiled_once._program.cache_info().currsize == 0


def test_a_callback_is_the_one_of_this_call():
    def loss(value):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return lambda x: x[0] + jax.pure_callback(lambda: np.float32(value), shape)

    assert call(loss(1)) == 1
    assert call(loss(2)) == 2


@pytest.mark.parametrize("make", [captures, captures_in_jit])
def test_what_was_captured_is_not_kept_alive(make):
    class Model:
        def __init__(self):
            self.array = jnp.full(3, 2.0)

        def loss(self, x):
            return make(self.array)(x)

    model = Model()
    held = weakref.ref(model)
    array = weakref.ref(model.array)
    call(model.loss)
    del model
    jax.clear_caches()  # jax.jit itself keeps what the inner function captured
    gc.collect()
    assert held() is None
    assert compiled_once._program.cache_info().currsize == 1
    assert array() is None


def test_a_bounded_number_of_programs_is_kept():
    def times(i):
        return lambda x: jnp.sum(x) * float(i)

    kept = []
    for i in range(compiled_once.KEPT + 3):
        assert is_new(times(i))
        kept.append(weakref.ref(compiled_once._program(run, *_key(times(i)))))
    gc.collect()
    assert sum(ref() is not None for ref in kept) == compiled_once.KEPT
    assert is_new(times(0))


def _key(function):
    known = compiled_once._Jaxpr(jax.make_jaxpr(function)(X).jaxpr)
    return known, ()


@pytest.mark.parametrize("context", [jax.disable_jit, contextlib.nullcontext])
def test_without_jit_functions_run_by_themselves(context):
    @compiled_once.compiled("times")
    def scaled(x, *, times):
        runs.append(x)
        return x * times

    runs.clear()
    with context():
        for _ in range(3):
            np.testing.assert_array_equal(scaled(X, times=2), X * 2)
            call(captures(X))
    assert len(runs) == (6 if context is jax.disable_jit else 2)


def test_compiled_functions_take_tracers_and_numbers():
    @compiled_once.compiled()
    def double(x, y):
        return x * 2 + y

    assert jax.grad(double)(3.0, 1.0) == 2
    assert double(3, 1.5) == 7.5
