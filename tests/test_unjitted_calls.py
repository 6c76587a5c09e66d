"""Outside `jax.jit` a second call compiles nothing, and computes what it is given.

Compilations are counted by the events that JAX reports, not by the clock.
"""

import functools

import jax
import jax.numpy as jnp
import lanes
import numpy as np
import optax
import pytest

import fgrad
from fgrad import activity, enhancements, estimators, perturbations

KEY = jax.random.key(0)
PARAMS = {"w": jnp.linspace(-1, 1, 48).reshape(8, 6), "b": jnp.zeros(6)}
X = jnp.linspace(-1, 1, 32).reshape(4, 8)
compilations = []

jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: (
        compilations.append(name) if name.endswith("backend_compile_duration") else None
    )
)


def losses(params, x):
    return jnp.mean(jnp.square(jnp.tanh(x @ params["w"]) + params["b"] - 0.3), axis=1)


def loss(params, x):
    return jnp.mean(losses(params, x))


def chain(**options):
    options = {"epsilon": 0.1, "num_perturbations": 2, **options}
    return optax.chain(
        fgrad.fixed_point_forward_grad(KEY, **options),
        optax.sgd(1e-2),
        fgrad.quantized_update(),
    )


LINKS = {
    "chain": (chain, loss),
    "qzo_ff": (lambda: fgrad.qzo_ff(1e-2, KEY, epsilon=0.1), loss),
    "schedules": (
        lambda: fgrad.qzo_ff(
            optax.linear_schedule(1e-2, 1e-3, 9),
            KEY,
            epsilon=optax.linear_schedule(0.1, 0.05, 9),
            mask=lambda params: {"w": True, "b": False},
        ),
        loss,
    ),
    "low rank": (
        lambda: chain(perturbation=perturbations.low_rank(), vectorize=2, epsilon=0.2),
        loss,
    ),
    "guided": (lambda: chain(guide=enhancements.momentum_guided_sampling()), loss),
    "sharpness": (
        lambda: enhancements.sharpness_aware(chain(), jax.random.key(1), rho=0.1),
        loss,
    ),
    "sparse": (lambda: enhancements.sparse_update(chain(), density=0.5), loss),
    "activity": (
        lambda: optax.chain(
            activity.activity_forward_grad(
                KEY,
                ["w"],
                others=fgrad.fixed_point_forward_grad(
                    KEY, epsilon=0.1, mask=activity.leaves_outside(["w"])
                ),
            ),
            optax.sgd(1e-2),
            fgrad.quantized_update(),
        ),
        losses,
    ),
}
# Links, and the bits of the weights: None for floats.
CASES = [("qzo_ff", 16), *((link, 16) for link in LINKS if link != "qzo_ff")]
CASES += [("activity", None), ("qzo_ff", 8), ("qzo_ff", None)]


def capturing(value_fn, x):
    """The loss as one that takes nothing and captures its data."""
    return lambda params: value_fn(params, x)


@pytest.mark.parametrize(("link", "bits"), lanes.every_row(8, CASES))
def test_a_second_update_compiles_nothing(link, bits):
    make, value_fn = LINKS[link]
    params = fgrad.quantize(PARAMS, bits=bits) if bits else PARAMS
    tx = make()

    def step(params, state, x):
        grad_fn = capturing(value_fn, x)
        if link == "activity":  # it has to know what is data
            updates = tx.update(params, state, params, value_fn=value_fn, x=x)
        else:
            updates = tx.update(params, state, params, value_fn=grad_fn)
        return updates

    def steps(step):
        _, state = step(params, tx.init(params), X)
        return step(params, state, 2 * X + 1)

    steps(step)
    before = len(compilations)
    found = steps(step)
    assert len(compilations) == before
    # The data of the second step is that of the second step.
    expected = steps(jax.jit(step))
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda value_fn: fgrad.dual_forward(value_fn, PARAMS, KEY, 0.1),
        lambda value_fn: estimators.forward_gradient(
            value_fn, PARAMS, KEY, epsilon=0.1
        ),
    ],
)
def test_a_second_evaluation_compiles_nothing(evaluate):
    twice = 2 * X
    evaluate(capturing(loss, X))
    before = len(compilations)
    found = evaluate(capturing(loss, twice))
    assert len(compilations) == before
    expected = jax.jit(lambda x: evaluate(capturing(loss, x)))(2 * X)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4), found, expected
    )


def test_functions_of_the_user_are_asked_at_every_call():
    setting = {"epsilon": 0.1, "sign": 1, "calls": 0}

    def estimator(plus, minus, epsilon):
        return setting["sign"] * np.sign(np.asarray(plus - minus)).astype(np.int32)

    def counted(params, x):
        setting["calls"] += 1
        return loss(params, x)

    tx = fgrad.fixed_point_forward_grad(
        KEY, epsilon=lambda count: setting["epsilon"], estimator=estimator
    )
    state = tx.init(PARAMS)

    def update():
        return tx.update(PARAMS, state, PARAMS, value_fn=counted, x=X)

    first, first_state = update()
    setting["sign"] = -1
    second, _ = update()
    jax.tree.map(
        np.testing.assert_array_equal, first, jax.tree.map(jnp.negative, second)
    )
    setting["epsilon"] = 0.2
    _, third_state = update()
    assert setting["calls"] == 3
    wider = third_state.loss_differences / first_state.loss_differences
    np.testing.assert_allclose(wider, 2, rtol=0.2)


def test_not_a_number_is_still_found():
    tx = fgrad.fixed_point_forward_grad(KEY)
    state = tx.init(PARAMS)

    def root(params):
        return jnp.sum(jnp.sqrt(params["w"] - 9))

    for _ in range(2):
        _, after = tx.update(PARAMS, state, PARAMS, value_fn=root)
        assert after.nonfinite_pairs == 3
        with jax.debug_nans(True), pytest.raises(FloatingPointError):
            tx.update(PARAMS, state, PARAMS, value_fn=root)
    raising = fgrad.fixed_point_forward_grad(KEY, on_nonfinite="raise")

    def update():
        raising.update(PARAMS, state, PARAMS, value_fn=root)
        jax.effects_barrier()

    for _ in range(2):
        with pytest.raises(Exception, match="non-finite loss at step 0"):
            update()


def test_double_precision_is_another_program():
    def single(params):
        return jnp.sum(params["w"] * 1.0)

    first = fgrad.dual_forward(single, PARAMS, KEY, 0.1)
    with jax.enable_x64(True):
        wide = {name: x.astype(jnp.float64) for name, x in PARAMS.items()}
        second = fgrad.dual_forward(single, wide, KEY, 0.1)
    assert (first[0].dtype, second[0].dtype) == (jnp.float32, jnp.float64)
    np.testing.assert_allclose(first, second, rtol=1e-5)
