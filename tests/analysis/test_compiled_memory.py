import jax
import jax.numpy as jnp
import optax
import pytest
from flax.training import train_state

import fgrad
from fgrad.analysis import memory_report

KIB = 1024


def loss_fn(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"]) ** 2)


def step(params, state, x):
    tx = fgrad.qzo_ff(1e-2, jax.random.key(0))
    updates, state = tx.update(params, state, params, value_fn=loss_fn, x=x)
    return optax.apply_updates(params, updates), state


@pytest.fixture(scope="module")
def arguments():
    params = {"w": jnp.ones((64, 32))}
    state = fgrad.qzo_ff(1e-2, jax.random.key(0)).init(params)
    return params, state, jnp.ones((16, 64))


@pytest.mark.parametrize("donated", [(), (0, 1)])
def test_it_is_what_the_compiler_says(arguments, donated):
    jitted = jax.jit(step, donate_argnums=donated)
    report = memory_report(jitted, *arguments)
    plan = jitted.lower(*arguments).compile().memory_analysis()
    assert report.memory.arguments == plan.argument_size_in_bytes
    assert report.memory.outputs == plan.output_size_in_bytes
    assert report.memory.aliased == plan.alias_size_in_bytes
    assert report.memory.temporaries == plan.temp_size_in_bytes
    assert (report.memory.aliased > 0) == bool(donated)
    assert report.live == (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        + plan.temp_size_in_bytes
    )


def test_the_parts_are_the_arguments_and_add_up(arguments):
    report = memory_report(jax.jit(step), *arguments)
    assert report.arguments["params"] == 64 * 32 * 4
    assert report.arguments["x"] == 16 * 64 * 4
    assert sum(report.arguments.values()) == report.memory.arguments


def test_shapes_stand_for_arrays(arguments):
    shapes = jax.eval_shape(lambda *x: x, *arguments)
    assert memory_report(step, *shapes) == memory_report(step, *arguments)


def test_a_training_state_is_told_by_its_fields():
    params = {"w": jnp.ones((256, 4))}
    state = train_state.TrainState.create(
        apply_fn=None, params=params, tx=optax.adam(1e-2)
    )

    def train(state, x):
        grads = jax.grad(loss_fn)(state.params, x)
        return state.apply_gradients(grads=grads)

    report = memory_report(train, state, jnp.ones((8, 256)))
    assert report.arguments["state.params"] == 4 * KIB
    assert report.arguments["state.opt_state"] == 8 * KIB + 4  # two moments, a count
    assert report.arguments["x"] == 8 * KIB


def test_integers_count_with_their_bytes():
    params = fgrad.quantize({"w": jnp.ones((64, 64))}, bits=8)
    report = memory_report(lambda params: fgrad.dequantize(params)["w"].sum(), params)
    assert report.arguments == {"params": 64 * 64 + 4}


def test_an_argument_that_is_not_read():
    report = memory_report(lambda x, y: x + 1, jnp.ones(256), jnp.ones(256))
    assert report.arguments["x"] == report.arguments["y"] == KIB
    assert report.arguments["not read, or padding"] == -KIB
    assert report.memory.arguments == KIB


def test_the_table_beside_others():
    ones = jnp.ones((256, 1024))
    fresh = memory_report(jax.jit(lambda x: x + 1), ones)
    donated = memory_report(jax.jit(lambda x: x + 1, donate_argnums=0), ones)
    assert donated.table(fresh=fresh).splitlines() == [
        "| MiB | step | fresh | step / fresh |",
        "| --- | --- | --- | --- |",
        "| x | 1 | 1 | 1.00 |",
        "| new outputs | 0 | 1 | 0.00 |",
        "| temporaries | 0 | 0 |  |",
        "| live | 1 | 2 | 0.50 |",
    ]
    assert str(fresh).splitlines()[-1] == "| live | 2 |"
    assert donated.asdict()["live"] == 2**20
