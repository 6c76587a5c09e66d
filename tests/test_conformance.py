"""Every transformation through the same matrix of optax and Flax.

A new transformation is tested by a line in `TRANSFORMATIONS`. The numbers come from an
oracle that runs optax on float trees and lands on the grid in float64 NumPy.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state
from lanes import some

import fgrad
from fgrad import enhancements
from fgrad.fixed_point import is_qtensor

# On 8 bits a weight step is about 0.015: these are several steps.
EPSILON, LEARNING_RATE = 0.05, 0.03
OPTIONS = {"epsilon": EPSILON, "num_perturbations": 2}


def on_examples(key):
    """`activity_forward_grad` of all leaves, given `losses_fn` for `loss_fn`.

    Its gradient is no multiple of z but the loss's own, and small here. A large epsilon
    keeps the rounding of the losses out of the comparisons.
    """

    def link(params):
        names = list(params) if isinstance(params, Mapping) else ["a"]
        sites = [fgrad.activity.Site(name, epsilon=1.0) for name in names]
        return optax.chain(
            fgrad.activity_forward_grad(key, sites, num_perturbations=2),
            optax.scale(20.0),
        )

    def update(updates, state, params=None, *, value_fn=None, **extra):
        losses = value_fn and losses_fn
        return link(params).update(updates, state, params, value_fn=losses, **extra)

    return optax.GradientTransformationExtraArgs(lambda p: link(p).init(p), update)


def jointly(key):
    """`joint_forward_grad` of all leaves, of which the last is the head.

    A single leaf is a head alone, whose gradient `activity_forward_grad` has exactly.
    """

    def link(params):
        names = list(params) if isinstance(params, Mapping) else ["a"]
        if isinstance(params, Mapping) and len(names) == 1:
            head = fgrad.activity.Site(*names, exact=True, epsilon=1.0)
            estimator = fgrad.activity_forward_grad(key, [head])
        else:
            options = {"every": 1, "epsilon": 1.0, "correction": 1.0}
            estimator = fgrad.activity.joint_forward_grad(key, names[-1], **options)
        return optax.chain(estimator, optax.scale(20.0))

    def update(updates, state, params=None, *, value_fn=None, **extra):
        losses = value_fn and losses_fn
        return link(params).update(updates, state, params, value_fn=losses, **extra)

    return optax.GradientTransformationExtraArgs(lambda p: link(p).init(p), update)


def private(key):
    """`private_forward_grad` by signs, without noise, given `losses_fn`."""
    link = enhancements.private_forward_grad(
        key,
        jax.random.fold_in(key, 1),
        clip=0.1,
        batch_size=8,
        mechanism="sign",
        **OPTIONS,
    )

    def update(updates, state, params=None, *, value_fn=None, **extra):
        losses = value_fn and losses_fn
        return link.update(updates, state, params, value_fn=losses, **extra)

    return optax.GradientTransformationExtraArgs(link.init, update)


# name: constructor from a key. What emits a gradient is completed by SGD and
# `quantized_update` where a test needs new weights (see `complete`).
TRANSFORMATIONS = {
    "fixed_point_forward_grad": lambda key: fgrad.fixed_point_forward_grad(
        key, **OPTIONS
    ),
    "qzo_ff": lambda key: fgrad.qzo_ff(LEARNING_RATE, key, **OPTIONS),
    "quantized_update": lambda key: fgrad.quantized_update(stochastic_below=0),
    "kernel_normalization": lambda key: optax.chain(
        fgrad.fixed_point_forward_grad(key, **OPTIONS),
        enhancements.kernel_normalization(),
    ),
    "sharpness_aware": lambda key: enhancements.sharpness_aware(
        fgrad.qzo_ff(LEARNING_RATE, key, **OPTIONS), key, rho=EPSILON
    ),
    "sparse_update": lambda key: enhancements.sparse_update(
        fgrad.qzo_ff(LEARNING_RATE, key, **OPTIONS), density=0.5
    ),
    "momentum_guided_sampling": lambda key: fgrad.fixed_point_forward_grad(
        key, **OPTIONS, guide=enhancements.momentum_guided_sampling()
    ),
    "extrapolation": lambda key: enhancements.extrapolation(
        fgrad.qzo_ff(LEARNING_RATE, key, **OPTIONS), scale=0.5
    ),
    "activity_forward_grad": on_examples,
    "joint_forward_grad": jointly,
    "private_forward_grad": private,
    "error_feedback": lambda key: optax.chain(
        enhancements.error_feedback(below=17), fgrad.quantized_update()
    ),
}
# These use the incoming updates; the others must ignore them.
USES_UPDATES = {"quantized_update", "error_feedback"}
ESTIMATORS = [name for name in TRANSFORMATIONS if name not in USES_UPDATES]

# The leaves a, b, ... of params. One leaf where one will do: compiling takes the time.
LEAVES = {
    "float32": ("float32",),
    "bfloat16": ("bfloat16",),
    "16 bits": (16,),
    "8 bits": (8,),
    "mixed": ("float32", "bfloat16", 16, 8),
}
KINDS = dict(zip("abcd", LEAVES["mixed"], strict=True))

every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)
every_kind = pytest.mark.parametrize("leaves", some(LEAVES, ["mixed"]))
# For what a transformation leaves to optax and Flax, the core lane takes one of each
# kind: a gradient, a chain, a wrapper.
SOME = ["fixed_point_forward_grad", "error_feedback", "sparse_update"]
all_but_some_slow = pytest.mark.parametrize("name", some(TRANSFORMATIONS, SOME))


# ---------------------------------------------------------------------- the problem


def make_params(leaves="mixed"):
    params = {}
    for i, (name, kind) in enumerate(zip("abcd", LEAVES[leaves], strict=False)):
        w = 0.5 * jax.random.normal(jax.random.key(i), (4, 4))
        is_float = isinstance(kind, str)
        params[name] = w.astype(kind) if is_float else fgrad.quantize(w, bits=kind)
    return params


def losses_fn(params, x):
    """A loss for each example."""
    y = x[::-1]
    for name in params:
        x = jnp.tanh(x @ jnp.asarray(params[name]).astype(jnp.float32))
    return jnp.mean((x - 0.3 * y) ** 2, axis=-1)


def loss_fn(params, x):
    return jnp.mean(losses_fn(params, x))


X = jax.random.normal(jax.random.key(7), (8, 4))
# Nobody names `unknown`; an object() cannot be turned into an array by accident.
UNKNOWN = {"value": 3.0, "unknown": object()}


def with_values(params, values):
    """Gradients or updates ``values`` in the form that they have for params."""
    return jax.tree.map(
        lambda leaf, v: (
            fgrad.QTensor(v, jnp.zeros_like(leaf.scale), leaf.bits)
            if is_qtensor(leaf)
            else v
        ),
        params,
        values,
        is_leaf=is_qtensor,
    )


def values_of(tree):
    """Gradients or updates as a tree of arrays."""
    return jax.tree.map(
        lambda leaf: leaf.qvalue if is_qtensor(leaf) else leaf, tree, is_leaf=is_qtensor
    )


def descent(params, x):
    """Incoming updates that descend, for a transformation that uses them."""
    gradient = jax.grad(loss_fn)(fgrad.dequantize(params), x)
    return with_values(params, jax.tree.map(lambda g: -0.3 * g, gradient))


def complete(tx):
    """The transformation with what it takes to land on the weight grid."""
    params = make_params("16 bits")
    shapes = jax.eval_shape(
        lambda p, s: tx.update(descent(p, X), s, p, value_fn=loss_fn, x=X)[0],
        params,
        jax.eval_shape(tx.init, params),
    )
    if jnp.issubdtype(shapes["a"].qvalue.dtype, jnp.integer):
        return tx
    # Another order of float operations would draw other numbers.
    to_nearest = fgrad.quantized_update(stochastic_below=0)
    return optax.chain(tx, optax.sgd(LEARNING_RATE), to_nearest)


@functools.cache
def completed(name, seed=0):
    return complete(TRANSFORMATIONS[name](jax.random.key(seed)))


def make_step(tx, incoming=descent, **extra):
    def step(params, state, x=X):
        updates, state = tx.update(
            incoming(params, x), state, params, value_fn=loss_fn, x=x, **extra
        )
        return optax.apply_updates(params, updates), state

    return step


def run(step, tx, params, steps):
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


class Reference(NamedTuple):
    """Three jitted steps of a completed transformation, as others are compared to."""

    tx: optax.GradientTransformationExtraArgs
    step: object
    traces: list
    carries: list  # (params, state) before and after each step


def reference(name, leaves="mixed"):
    return cached_reference(name, leaves)  # the cache takes a default for a new call


@functools.cache
def cached_reference(name, leaves):
    tx, traces = completed(name), []
    step = make_step(tx)

    @jax.jit
    def counted(params, state, x=X):
        traces.append(1)
        return step(params, state, x)

    params = make_params(leaves)
    carries = [(params, tx.init(params))]
    for _ in range(3):
        carries.append(counted(*carries[-1]))
    return Reference(tx, counted, traces, carries)


# ------------------------------------------------------------------- the comparisons


def is_key(x):
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def as_numpy(x):
    if is_key(x):
        return np.asarray(jax.random.key_data(x))
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype == jnp.bfloat16 else x


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(as_numpy(x), as_numpy(y))


def assert_close(a, b):
    """Integers bit for bit; floats as far as another order of operations allows."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert jnp.result_type(x) == jnp.result_type(y)
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            rtol = 2.0**-7 if jnp.result_type(x) == jnp.bfloat16 else 1e-5
            np.testing.assert_allclose(as_numpy(x), as_numpy(y), rtol=rtol, atol=1e-6)
        else:
            np.testing.assert_array_equal(as_numpy(x), as_numpy(y))


def avals(tree):
    """Shape, dtype and weak type of each leaf, and the structure."""
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]
    weak = [getattr(t, "weak_type", False) for t in types]
    return jax.tree.structure(tree), [(t.shape, t.dtype) for t in types], weak


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def assert_moved(new, old):
    """Every leaf moved: a comparison of things at rest shows nothing."""
    for name in old:
        difference = jnp.asarray(new[name], jnp.float32) - jnp.asarray(
            old[name], jnp.float32
        )
        assert np.abs(np.asarray(difference)).max() > 1e-3, name


# -------------------------------------------------------------- every kind of leaf


@every_kind
@every_transformation
def test_types_are_stable_and_nothing_is_compiled_twice(name, leaves):
    ref = reference(name, leaves)
    start_params, start_state = ref.carries[0]
    assert len(ref.traces) == 1
    for params, state in ref.carries[1:]:
        assert avals(params) == avals(start_params)
        assert avals(state) == avals(start_state)
    assert_moved(ref.carries[-1][0], start_params)
    # A restart from shapes alone, as a checkpoint is restored.
    shapes = jax.eval_shape(ref.tx.init, start_params)
    assert jax.tree.structure(shapes) == jax.tree.structure(start_state)


@every_kind
@every_transformation
def test_the_loss_falls_and_weights_stay_on_their_grid(name, leaves):
    ref = reference(name, leaves)
    params, state = start = ref.carries[0]
    for _ in range(100):
        params, state = ref.step(params, state)
    assert loss_fn(params, X) < 0.7 * loss_fn(start[0], X)
    for before, after in zip(start[0].values(), params.values(), strict=True):
        if is_qtensor(before):
            assert_equal(after.scale, before.scale)
            assert np.abs(np.asarray(after.qvalue, np.int32)).max() <= after.max_qvalue


def test_the_gradient_is_in_real_units_for_every_kind_of_leaf():
    # With coefficients of one it is the mean z, which knows no types.
    def gradient(params):
        tx = fgrad.fixed_point_forward_grad(
            jax.random.key(3), estimator=lambda p, m, e: jnp.ones_like(p), **OPTIONS
        )
        update = jax.jit(lambda p, s: tx.update(p, s, p, value_fn=loss_fn, x=X)[0])
        return update(params, tx.init(params))

    params = make_params()
    found = gradient(params)
    floats = optax.tree.cast(fgrad.dequantize(params), jnp.float32)
    for name, expected in gradient(floats).items():
        assert np.abs(np.asarray(expected)).max() > 0.5
        value = values_of(found)[name]
        if is_qtensor(params[name]):
            assert value.dtype == jnp.float32
            assert not np.any(found[name].scale)
            # The evaluations took whole steps, in place of ε.
            steps = np.float32(EPSILON) / np.asarray(params[name].scale)
            expected = np.asarray(expected) * (steps / np.rint(steps))
            np.testing.assert_allclose(value, expected, rtol=3e-7)  # three roundings
            continue
        if name == "b":
            # What bfloat16 left of z, over its own length; see tests/leaves.
            assert value.dtype == jnp.bfloat16
            pair = (as_numpy(value).ravel(), as_numpy(expected).ravel())
            assert np.corrcoef(*pair)[0, 1] > 0.99
            continue
        assert value.dtype == params[name].dtype
        np.testing.assert_array_equal(as_numpy(value), as_numpy(expected))


# ---------------------------------------------------------------- JAX's transformations


@pytest.mark.parametrize("leaves", some(["float32", "8 bits"], ["8 bits"]))
@every_transformation
def test_jit_equals_no_jit(name, leaves):
    ref = reference(name, leaves)
    assert_close(make_step(ref.tx)(*ref.carries[0]), ref.carries[1])


@every_transformation
def test_init_under_jit(name):
    ref = reference(name)
    state = jax.jit(ref.tx.init)(make_params())
    assert avals(state) == avals(ref.carries[0][1])
    assert_equal(state, ref.carries[0][1])


@all_but_some_slow
def test_scan_over_steps(name):
    ref = reference(name)
    step = make_step(ref.tx)
    scan = jax.jit(
        lambda carry, xs: jax.lax.scan(lambda c, x: (step(*c, x), None), carry, xs)[0]
    )
    assert_close(scan(ref.carries[0], jnp.stack([X] * 3)), ref.carries[3])


@all_but_some_slow
def test_vmap_over_keys_and_params(name):
    ref = reference(name, "8 bits")
    params = ref.carries[2][0]
    carries = [ref.carries[0], (params, completed(name, 1).init(params))]
    step = jax.jit(jax.vmap(make_step(ref.tx), in_axes=(0, 0, None)))
    found = step(*stacked(carries), X)
    assert_close(found, stacked([ref.step(*carry) for carry in carries]))
    # The key matters, and so does the step; not for an exact head, which is alone here.
    if name in ESTIMATORS and name != "joint_forward_grad":
        params, _ = ref.carries[0]
        for other in (carries[1][1], ref.carries[1][1]):
            assert np.any(
                ref.step(params, other)[0]["a"].qvalue != ref.carries[1][0]["a"].qvalue
            )


@every_transformation
def test_init_under_vmap(name):
    params = make_params("8 bits")
    keys = jax.random.split(jax.random.key(0), 2)

    def init(key, params):
        return TRANSFORMATIONS[name](key).init(params)

    expected = stacked([init(key, params) for key in keys])
    found = jax.vmap(init)(keys, stacked([params, params]))
    assert_equal(found, expected)
    assert avals(found) == avals(expected)


# -------------------------------------------------------------------- optax's wrappers


@all_but_some_slow
def test_unknown_arguments_and_incoming_updates_are_ignored(name):
    ref = reference(name, "8 bits")
    zeros = lambda params, x: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    incoming = descent if name in USES_UPDATES else zeros
    step = jax.jit(make_step(ref.tx, incoming, **UNKNOWN))
    assert_close(step(*ref.carries[0]), ref.carries[1])


@pytest.mark.parametrize("name", some(ESTIMATORS, ["qzo_ff", "sparse_update"]))
def test_links_before_an_estimator_change_nothing(name):
    ref = reference(name, "8 bits")
    tx = optax.chain(
        optax.clip_by_global_norm(0.1),
        optax.add_decayed_weights(0.1),
        optax.adam(0.1),
        optax.sgd(0.1),
        ref.tx,
    )
    nans = lambda params, x: jax.tree.map(lambda v: jnp.nan * v, params)  # noqa: E731
    params = make_params("8 bits")
    params, state = jax.jit(make_step(tx, nans))(params, tx.init(params))
    assert_close((params, state[-1]), ref.carries[1])


def test_an_estimator_may_be_the_first_a_middle_or_the_last_link():
    estimator = fgrad.fixed_point_forward_grad(jax.random.key(0), **OPTIONS)
    optimizer = fgrad.on_values(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    )

    @jax.jit
    def run_all(params):
        def update(*links):
            tx = optax.chain(*links)
            state = tx.init(params)
            return tx.update(params, state, params, value_fn=loss_fn, x=X)[0]

        gradient = update(estimator)
        expected, _ = optimizer.update(gradient, optimizer.init(params), params)
        return {
            "last": (update(optax.sgd(0.1), estimator), gradient),
            "first": (update(estimator, optimizer), expected),
            "middle": (update(optax.adam(0.1), estimator, optimizer), expected),
        }

    for found, expected in run_all(make_params("8 bits")).values():
        assert_close(found, expected)
        # The first step of Adam is its rate; z = 0 makes some gradients 0.
        assert np.abs(np.asarray(found["a"].qvalue)).max() > 0.05


@every_transformation
def test_map_params(name):
    tx, _, _, carries = reference(name)
    state = carries[2][1]
    for map_params in (optax.tree_map_params, optax.tree.map_params):
        assert_equal(map_params(tx, lambda v: v, state), state)
        params_like = any(jnp.shape(leaf) == (4, 4) for leaf in jax.tree.leaves(state))
        if not params_like and name != "sparse_update":  # which keeps indices of them
            # What optax documents it for: sharding specs of the non-params.
            specs = map_params(tx, lambda v: 5, state, transform_non_params=lambda v: 1)
            assert set(jax.tree.leaves(specs)) == {1}


MASK = {"a": True, "b": False, "c": True, "d": False}
MASKS = {"tree": MASK, "function": lambda params: {name: MASK[name] for name in params}}


@pytest.mark.parametrize("mask", MASKS)
def test_map_params_with_a_mask(mask):
    tx = optax.chain(
        fgrad.fixed_point_forward_grad(jax.random.key(0), mask=MASKS[mask], **OPTIONS),
        fgrad.on_values(optax.trace(0.9, accumulator_dtype=jnp.float32)),
        fgrad.quantized_update(mask=MASKS[mask]),
    )
    state = tx.init(make_params())
    fives = optax.tree.map_params(tx, lambda v: v * 0 + 5, state)
    assert_equal(fives[::2], state[::2])
    assert all(np.all(v == 5) for v in jax.tree.leaves(fives[1]))


def static(constructor):
    """Under inject_hyperparams, which takes functions for schedules."""
    static_args = ("num_perturbations", "vectorize", "estimator")
    return optax.inject_hyperparams(constructor, static_args=static_args)


def test_inject_hyperparams():
    # Not with a bfloat16 leaf: an array of a learning rate, unlike a Python number,
    # makes its updates float32, and the result is right in another last bit.
    key, leaves = jax.random.key(0), "16 bits"
    ref = reference("qzo_ff", leaves)
    tx = static(fgrad.qzo_ff)(learning_rate=LEARNING_RATE, key=key, **OPTIONS)
    step = jax.jit(make_step(tx))
    params, state = run(step, tx, make_params(leaves), 2)
    assert_close((params, state.inner_state), ref.carries[2])
    assert avals(state) == avals(tx.init(params))
    # Set by hand between two steps: the hyperparameter is what the step uses.
    state.hyperparams["learning_rate"] = jnp.float32(0)
    assert_equal(step(params, state)[0], params)


@functools.cache
def with_epsilon():
    """A jitted update at an epsilon that is an argument."""
    params = make_params("8 bits")

    @jax.jit
    def update(state, epsilon):
        tx = fgrad.fixed_point_forward_grad(
            jax.random.key(0), epsilon=epsilon, num_perturbations=2
        )
        return tx.update(params, state, params, value_fn=loss_fn, x=X)

    return update


@pytest.mark.parametrize("how", ["epsilon=schedule", "inject_hyperparams"])
def test_epsilon_may_be_a_schedule(how):
    schedule = optax.piecewise_constant_schedule(EPSILON, {1: 2.0})
    constructor = fgrad.fixed_point_forward_grad
    constructor = static(constructor) if how == "inject_hyperparams" else constructor
    tx = constructor(jax.random.key(0), epsilon=schedule, num_perturbations=2)
    params = make_params("8 bits")
    update = jax.jit(lambda s: tx.update(params, s, params, value_fn=loss_fn, x=X))

    def own(state):
        return state.inner_state if how == "inject_hyperparams" else state

    start = state = tx.init(params)
    for epsilon in (EPSILON, 2 * EPSILON):
        expected, expected_state = with_epsilon()(own(state), epsilon)
        _, other_state = with_epsilon()(own(state), 1.5 * epsilon)
        found, state = update(state)
        assert_equal(found, expected)
        assert_close(own(state), expected_state)
        # The comparison sees ε: another makes other losses.
        difference = other_state.loss_differences - expected_state.loss_differences
        assert np.all(np.abs(difference) > 1e-4)
    assert avals(state) == avals(start)


def test_inject_hyperparams_without_static_args_says_so():
    tx = optax.inject_hyperparams(fgrad.qzo_ff)(LEARNING_RATE, jax.random.key(0))
    with pytest.raises((TypeError, ValueError), match="static_args"):
        tx.init(make_params())


@all_but_some_slow
def test_multi_steps_around_everything(name):
    # It accumulates incoming updates: an estimator steps with the last mini batch.
    leaves = "16 bits"
    ref = reference(name, leaves)
    tx = optax.MultiSteps(ref.tx, every_k_schedule=2)
    step = jax.jit(make_step(tx))
    params, state = run(step, tx, make_params(leaves), 1)
    assert_equal(params, make_params(leaves))
    params, state = step(params, state)
    assert_close((params, state.inner_opt_state), ref.carries[1])
    params, state = step(*step(params, state))
    assert_close((params, state.inner_opt_state), ref.carries[2])
    assert avals(params) == avals(make_params(leaves))
    assert avals(state) == avals(tx.init(params))


def test_multi_steps_around_the_optimizer_averages_gradients():
    params = make_params()
    gradients = gradients_at(params, 2)
    multi = optax.MultiSteps(optax.sgd(LEARNING_RATE), every_k_schedule=2)
    tx = optax.chain(
        fgrad.on_values(multi.gradient_transformation()),
        fgrad.quantized_update(stochastic_below=0),
    )
    update = jax.jit(tx.update)
    updates, state = update(gradients[0], tx.init(params), params)
    assert_equal(optax.apply_updates(params, updates), params)
    updates, state = update(gradients[1], state, params)
    assert avals(state) == avals(tx.init(params))
    found = optax.apply_updates(params, updates)
    values = [values_of(gradient) for gradient in gradients]
    mean = jax.tree.map(lambda a, b: -LEARNING_RATE * (a + b) / 2, *values)
    assert_landed(found, landed(params, mean))
    assert_moved(found, params)


def test_apply_if_finite_around_the_optimizer():
    # Quotients of such losses overflow: the gradient is not finite, the loss is.
    tx = optax.chain(
        fgrad.fixed_point_forward_grad(
            jax.random.key(0), estimator=fgrad.estimators.spsa, **OPTIONS
        ),
        optax.apply_if_finite(optax.sgd(1.0), max_consecutive_errors=5),
        fgrad.quantized_update(),
    )

    @jax.jit
    def step(params, state, factor):
        updates, state = tx.update(
            params,
            state,
            params,
            value_fn=lambda p, factor: factor * loss_fn(p, X),
            factor=factor,
        )
        return optax.apply_updates(params, updates), state

    params = make_params("8 bits")
    rejected, state = step(params, tx.init(params), 1e38)
    assert_equal(rejected, params)
    assert int(state[1].total_notfinite) == 1
    accepted, state = step(params, state, 1.0)
    assert int(state[1].total_notfinite) == 1
    assert_moved(accepted, params)


@pytest.mark.parametrize(
    "leaves",
    [
        "float32",
        pytest.param(
            "16 bits",
            marks=pytest.mark.xfail(
                strict=True,
                raises=TypeError,
                reason="apply_if_finite rejects with zeros of the incoming dtype, "
                "float32, where quantized_update gives int32",
            ),
        ),
    ],
)
@all_but_some_slow
def test_apply_if_finite_around_everything(name, leaves):
    ref = reference(name, leaves)
    tx = optax.apply_if_finite(ref.tx, max_consecutive_errors=5)
    step = jax.jit(make_step(tx))
    params, state = step(make_params(leaves), tx.init(make_params(leaves)))
    assert_close((params, state.inner_state), ref.carries[1])


# ---------------------------------------------- optimizers after an estimator: numbers


@functools.cache
def jitted_gradient():
    tx = fgrad.fixed_point_forward_grad(jax.random.key(0), **OPTIONS)
    return tx, jax.jit(lambda p, s: tx.update(p, s, p, value_fn=loss_fn, x=X))


def gradients_at(params, steps):
    """The gradients of an estimator's first steps, at the same params."""
    tx, update = jitted_gradient()
    gradients, state = [], tx.init(params)
    for _ in range(steps):
        gradient, state = update(params, state)
        gradients.append(gradient)
    return gradients


def landed(params, updates):
    """``w + u``; for a leaf on a grid in grid steps of float64, not rounded yet."""

    def leaf_fn(leaf, update):
        if not is_qtensor(leaf):
            return (leaf + update).astype(leaf.dtype)
        steps = as_numpy(update).astype(np.float64) / np.float64(leaf.scale)
        qvalue = np.asarray(leaf.qvalue, np.float64) + steps
        return np.clip(qvalue, -leaf.max_qvalue, leaf.max_qvalue)

    return jax.tree.map(leaf_fn, params, updates, is_leaf=is_qtensor)


def assert_landed(found, expected):
    for name, value in expected.items():
        if is_qtensor(found[name]):
            qvalue = np.asarray(found[name].qvalue, np.float64)
            # Half a step is the rounding; a float32 update of 1,000 steps errs by 1e-4.
            assert np.abs(qvalue - value).max() <= 0.5 + 1e-3, name
        else:
            assert_close(found[name], value)


SCHEDULE = optax.piecewise_constant_schedule(LEARNING_RATE, {1: 0.5, 2: 3.0})
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(LEARNING_RATE),
    "sgd, schedule": lambda: optax.sgd(SCHEDULE),
    "momentum": lambda: optax.sgd(LEARNING_RATE, momentum=0.9),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.sgd)(SCHEDULE),
    "clip_by_global_norm": lambda: optax.chain(
        optax.clip_by_global_norm(2.0), optax.sgd(LEARNING_RATE)
    ),
    "add_decayed_weights": lambda: optax.chain(
        optax.add_decayed_weights(0.3), optax.sgd(LEARNING_RATE)
    ),
    "adam": lambda: optax.adam(LEARNING_RATE),
    "adamw": lambda: optax.adamw(LEARNING_RATE, weight_decay=0.3),
    "lion": lambda: optax.lion(LEARNING_RATE, weight_decay=0.0),
    "partition": lambda: optax.partition(
        {"fast": optax.sgd(2 * LEARNING_RATE), "slow": optax.sgd(LEARNING_RATE)},
        {"a": "fast", "b": "slow", "c": "fast", "d": "slow"},
    ),
    "masked": lambda: optax.masked(optax.scale(-LEARNING_RATE), MASK),
}


class Run(NamedTuple):
    """Steps of an optimizer and `quantized_update` after an estimator."""

    found: list  # params after each step
    expected: list  # what the step should have made of the params before it
    before: optax.OptState
    after: optax.OptState


@functools.cache
def with_optimizer(name, wrapped):
    """The oracle's optimizer sees the same gradients, as trees of floats."""
    params = make_params()
    optimizer = OPTIMIZERS[name]()
    link = fgrad.on_values(optimizer) if wrapped else optimizer
    tx = optax.chain(link, fgrad.quantized_update(stochastic_below=0))
    state = before = tx.init(params)
    oracle_state = optimizer.init(fgrad.dequantize(params))
    update, oracle_update = jax.jit(tx.update), jax.jit(optimizer.update)
    founds, expecteds = [], []
    for gradient in gradients_at(params, 3):
        values, floats = values_of(gradient), fgrad.dequantize(params)
        updates, oracle_state = oracle_update(values, oracle_state, floats)
        expecteds.append(landed(params, updates))
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        founds.append(params)
    return Run(founds, expecteds, before, state)


# These neither have moments nor read the params: no wrapper is needed.
UNWRAPPED = {"sgd", "sgd, schedule", "inject_hyperparams", "clip_by_global_norm"}
UNWRAPPED |= {"partition", "masked"}
every_optimizer = pytest.mark.parametrize(
    ("optimizer", "wrapped"),
    [
        (o, wrapped)
        for o in OPTIMIZERS
        for wrapped in (True, False)[: 1 + (o in UNWRAPPED)]
    ],
)


@every_optimizer
def test_an_optimizer_after_an_estimator_takes_its_own_step(optimizer, wrapped):
    result = with_optimizer(optimizer, wrapped)
    for found, expected in zip(result.found, result.expected, strict=True):
        assert_landed(found, expected)
    assert_moved(result.found[-1], make_params())


@every_optimizer
def test_an_optimizers_state_keeps_its_types(optimizer, wrapped):
    result = with_optimizer(optimizer, wrapped)
    assert avals(result.after) == avals(result.before)


# --------------------------------------------------------------------------- the traps


@pytest.mark.parametrize("wrapper", ["masked", "partition"])
@pytest.mark.parametrize("loss", ["fails", "goes on"])
def test_a_wrapper_that_hides_leaves_from_the_loss_says_mask(wrapper, loss):
    tx = fgrad.qzo_ff(LEARNING_RATE, jax.random.key(0), **OPTIONS)
    if wrapper == "masked":
        tx = optax.masked(tx, MASK)
    else:
        labels = {name: "train" if on else "freeze" for name, on in MASK.items()}
        tx = optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)

    def sum_of_squares(params):
        return sum(jnp.sum(jnp.asarray(p) ** 2) for p in params.values())

    params = make_params()
    with pytest.raises((TypeError, ValueError), match="mask="):
        jax.eval_shape(
            lambda p, s: tx.update(
                p, s, p, value_fn=loss_fn if loss == "fails" else sum_of_squares, x=X
            ),
            params,
            tx.init(params),
        )


def test_our_mask_hides_no_leaf_from_the_loss():
    tx = fgrad.qzo_ff(LEARNING_RATE, jax.random.key(0), mask=MASK, **OPTIONS)
    start = make_params()
    params, state = run(jax.jit(make_step(tx)), tx, start, 2)
    for name, trained in MASK.items():
        if trained:
            assert_moved({name: params[name]}, {name: start[name]})
        else:
            assert_equal(params[name], start[name])
    assert avals(state) == avals(tx.init(start))
    assert avals(params) == avals(start)
    # The reported loss is that of the whole network, near w: at w ± εz.
    np.testing.assert_allclose(state[0].loss, loss_fn(params, X), rtol=0.2)


@pytest.mark.parametrize("bits", [8, 16])
def test_apply_updates_neither_truncates_nor_wraps(bits):
    params = fgrad.quantize(jnp.array([0.5, 0.5, 0.5, 1.0, -1.0]), bits, headroom=1.0)
    q, limit = params.qvalue.tolist(), params.max_qvalue
    steps = jnp.array([0.7, -0.7, 0.4, 1e9, -1e9])
    updates = fgrad.QTensor(steps * params.scale, jnp.float32(0), bits)
    tx = fgrad.quantized_update(stochastic_below=0)
    landing, _ = tx.update(updates, tx.init(params), params)
    new = optax.apply_updates(params, landing)
    assert landing.qvalue.dtype == jnp.int32
    assert new.qvalue.dtype == params.qvalue.dtype
    assert new.qvalue.tolist() == [q[0] + 1, q[1] - 1, q[2], limit, -limit]


@pytest.mark.parametrize("how", ["scale_by_schedule", "inject_hyperparams", "scale"])
@pytest.mark.parametrize("leaves", ["16 bits", "8 bits"])
def test_a_learning_rate_is_not_cast_to_zero_on_integer_leaves(how, leaves):
    rate = 0.7  # int16(0.7) is 0
    optimizer = {
        "scale_by_schedule": lambda: optax.scale_by_schedule(lambda count: -rate),
        "inject_hyperparams": lambda: optax.inject_hyperparams(optax.scale)(-rate),
        "scale": lambda: optax.scale(-rate),
    }[how]()
    params = make_params(leaves)
    gradient = with_values(params, {n: jnp.full((4, 4), 0.1) for n in params})
    tx = optax.chain(optimizer, fgrad.quantized_update(stochastic_below=0))
    updates, _ = tx.update(gradient, tx.init(params), params)
    for name, leaf in params.items():
        expected = np.rint(-rate * 0.1 / np.float64(leaf.scale))
        assert expected < -1
        np.testing.assert_array_equal(updates[name].qvalue, np.full((4, 4), expected))


# ------------------------------------------------------------------------- checkpoints


@all_but_some_slow
def test_training_goes_on_from_a_checkpoint(name, tmp_path):
    ref = reference(name)
    # From shapes alone: the process that restores has no state of its own.
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, ref.carries[1])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "carry", ref.carries[1])
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "carry", target)
    assert_equal(restored, ref.carries[1])
    assert avals(restored) == avals(ref.carries[1])
    carry = ref.step(*ref.step(*restored))
    assert_equal(carry, ref.carries[3])


# -------------------------------------------------------------------------------- Flax


@all_but_some_slow
def test_flax_train_state(name):
    ref = reference(name, "16 bits")
    state = train_state.TrainState.create(
        apply_fn=None, params=make_params("16 bits"), tx=ref.tx
    )

    @jax.jit
    def train_step(state, x):
        # What `state.apply_gradients` does, with the loss for `value_fn`.
        updates, opt_state = state.tx.update(
            descent(state.params, x),
            state.opt_state,
            state.params,
            value_fn=loss_fn,
            x=x,
        )
        return state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
        )

    for _ in range(2):
        state = train_step(state, X)
    assert int(state.step) == 2
    assert_close((state.params, state.opt_state), ref.carries[2])


@every_estimator
def test_flax_apply_gradients_says_what_to_do(name):
    state = train_state.TrainState.create(
        apply_fn=None, params=make_params(), tx=completed(name)
    )
    with pytest.raises(ValueError, match=r"call tx.update\(updates, .*value_fn=loss"):
        state.apply_gradients(grads=state.params)


class Model(nnx.Module):
    def __init__(self, params):
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))

    def __call__(self, x):
        for name in "abcd":  # reads its parameters as Flax's layers do
            x = jnp.tanh(x @ getattr(self, name)[...].astype(jnp.float32))
        return x


def model_loss_fn(model, x):
    return jnp.mean((model(x) - 0.3 * x[::-1]) ** 2)


@all_but_some_slow
def test_nnx_optimizer(name):
    ref = reference(name)
    model = Model(make_params())
    optimizer = nnx.Optimizer(model, ref.tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, x):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def value_fn(params, x):
            return model_loss_fn(nnx.merge(graphdef, params, rest), x)

        # An estimator ignores the gradients: anything of their structure will do.
        grads = params
        if name in USES_UPDATES:
            updates = descent(nnx.to_pure_dict(params), x)
            grads = nnx.State(jax.tree.map(nnx.Param, updates, is_leaf=is_qtensor))
        optimizer.update(model, grads, value_fn=value_fn, x=x)

    for _ in range(2):
        train_step(model, optimizer, X)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_close(params, ref.carries[2][0])
    assert int(optimizer.step[...]) == 2


@pytest.mark.parametrize("bits", [8, 16])
def test_an_nnx_layer_reads_a_qtensor(bits):
    layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(fgrad.quantize(layer.kernel[...], bits))
    expected = np.asarray(X) @ np.asarray(layer.kernel.get_value().dequantize())
    np.testing.assert_allclose(layer(X), expected, rtol=1e-5, atol=1e-6)
