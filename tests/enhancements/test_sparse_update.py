"""Which weights a sparse update chooses, when it chooses anew, and its memory."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import fast_jit
from training_reference import (
    CHOICE_KEY,
    EPSILON,
    KEY,
    chain,
    draw,
    largest,
    loss_fn,
    magnitude_reference,
    moved,
    net,
    nominal_over_realised,
    problem,
    share,
    to_numpy,
    value,
)

import fgrad
from fgrad import perturbations
from fgrad.enhancements import sparse_update
from fgrad.enhancements.sparse_update import _restarted

FORMS = [(None, None), (8, -1)]


@pytest.mark.parametrize(("bits", "channel_axis"), FORMS)
def test_magnitude_random_and_threshold_are_numpys_choice(bits, channel_axis):
    params, _ = problem(bits, channel_axis)
    sizes = {n: np.size(value(to_numpy(p))) for n, p in params.items()}

    def chosen(**options):
        init = sparse_update(chain(), density=0.3, **options).init
        traced = options.get("criterion") != "threshold"
        state = (fast_jit(init) if traced else init)(params)
        for index in state.indices.values():
            assert index.dtype == jnp.int32
            assert np.all(np.diff(index) > 0)
        return state.indices

    for name, index in chosen().items():
        np.testing.assert_array_equal(index, magnitude_reference(params[name], 0.3))
    for name, index in chosen(criterion="threshold", threshold=0.25).items():
        size = np.abs(value(to_numpy(params[name])))
        k = min(share(sizes[name], 0.3), int(np.sum(size > 0.25)))
        np.testing.assert_array_equal(index, largest(size, k))
    now = perturbations.sample_key(CHOICE_KEY, 0, 2**32 - 2)
    keys = perturbations.leaf_keys(now, [f"['{n}']" for n in params])
    for name, index in chosen(criterion="random", key=CHOICE_KEY).items():
        places = jnp.arange(sizes[name], dtype=jnp.uint32)
        score = perturbations.counter_hash(keys[f"['{name}']"], places)
        score = np.asarray(score).astype(np.int64) >> 8
        k = share(sizes[name], 0.3)
        np.testing.assert_array_equal(index, largest(score, k))


def test_threshold_leaves_leaves_without_such_weights_alone():
    params = {"w": jnp.array([0.1, -3.0, 2.0, 4.0]), "b": jnp.zeros(3)}
    tx = sparse_update(chain(), density=0.5, criterion="threshold", threshold=1.0)
    state = tx.init(params)
    assert state.indices["w"].tolist() == [1, 3]
    assert state.indices["b"].shape == (0,)
    loss = lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["b"])  # noqa: E731
    update = fast_jit(functools.partial(tx.update, value_fn=loss))
    updates, _ = update(params, state, params)
    assert np.all(updates["b"] == 0)
    assert np.all(np.asarray(updates["w"] != 0) == [False, True, False, True])


@pytest.mark.parametrize(("bits", "channel_axis"), FORMS)
def test_importance_is_numpys_choice(bits, channel_axis):
    params, x = problem(bits, channel_axis)
    tx = sparse_update(
        chain(),
        density=0.3,
        criterion="importance",
        key=CHOICE_KEY,
        epsilon=EPSILON,
        num_perturbations=2,
        mask={"w1": True, "b1": True, "w2": False},
    )
    state = tx.init(params)
    assert state.indices["w1"].tolist() == list(range(share(48 * 40, 0.3)))
    updates, state = fast_jit(functools.partial(tx.update, value_fn=loss_fn))(
        params, state, params, batch=x
    )
    now = perturbations.sample_key(CHOICE_KEY, 0, 2**32 - 2)
    leaves = {n: to_numpy(p) for n, p in params.items()}
    score = dict.fromkeys(leaves, 0.0)
    for i in range(2):
        z = draw(now, 0, i, leaves) | {"w2": 0}
        plus, minus = (
            net(
                {n: value(moved(v, s * z[n], EPSILON)) for n, v in leaves.items()},
                np.asarray(x, np.float64),
            )
            for s in (1, -1)
        )
        score = {n: c + (plus - minus) * z[n] for n, c in score.items()}
    # Each channel has a step of its own, whose rounding the losses are about.
    score = {n: c * nominal_over_realised(leaves[n], EPSILON) for n, c in score.items()}
    for name in ("b1", "w1"):
        k = share(score[name].size, 0.3)
        wanted, got = np.abs(score[name]).reshape(-1), np.asarray(state.indices[name])
        # Where two scores are the same up to float32, either may be chosen.
        least = np.sort(wanted)[-k]
        assert len(set(got)) == k
        assert np.all(wanted[got] >= least * (1 - 1e-3))
        assert np.abs(np.asarray(jax.tree.leaves(updates[name])[0])).sum() > 0
    assert state.indices["w2"].size == 0
    assert np.all(np.asarray(jax.tree.leaves(updates["w2"])[0]) == 0)
    assert int(state.importance_passes) == 4


def test_the_state_shrinks_and_masked_leaves_are_none():
    params, _ = problem(16)
    mask = {"w1": True, "b1": False, "w2": True}
    tx = sparse_update(chain(optimizer="adam"), density=0.1, mask=mask)
    adam = tx.init(params).inner_state[1][0]
    assert adam.mu["b1"] is None
    assert adam.mu["w1"].shape == (192,)
    assert adam.nu["w1"].dtype == jnp.float32
    assert adam.nu["w2"].shape == (12,)


def test_weights_are_chosen_anew_when_due_and_only_momenta_restart():
    weights = np.random.default_rng(4).normal(size=40).astype(np.float32)
    params = {"w1": fgrad.quantize(jnp.asarray(weights))}

    def loss(params):
        return jnp.sum(jnp.asarray(params["w1"]) ** 2)

    inner = optax.chain(
        fgrad.fixed_point_forward_grad(KEY, epsilon=EPSILON),
        fgrad.on_values(optax.scale_by_adam()),
        optax.scale_by_schedule(optax.linear_schedule(-0.1, -0.05, 10)),
        fgrad.on_values(optax.trace(0.9)),
        fgrad.quantized_update(),
    )
    tx = sparse_update(
        inner, density=0.2, criterion="random", key=CHOICE_KEY, reselect_every=2
    )
    update = fast_jit(functools.partial(tx.update, value_fn=loss))
    state = tx.init(params)
    history = []
    for _ in range(5):
        updates, new = update(params, state, params)
        changed = np.flatnonzero(np.asarray(updates["w1"].qvalue))
        assert set(changed) <= set(np.asarray(new.indices["w1"]))
        history.append((state, new))
        params, state = optax.apply_updates(params, updates), new
    for count, (old, new) in enumerate(history):
        same = np.array_equal(old.indices["w1"], new.indices["w1"])
        assert same == (count not in (2, 4))
        estimate, adam, schedule, _, _ = new.inner_state
        assert int(estimate.count) == int(schedule.count) == count + 1
        assert int(adam.count) == count % 2 + 1
    # After one step from zero, the momentum is the gradient.
    restarted = history[2][1].inner_state
    gradient = restarted[1].mu["w1"] / 0.1
    gradient /= nominal_over_realised(to_numpy(params["w1"]), EPSILON)[0]
    assert np.all(np.isin(np.rint(gradient * 32 * 3), np.arange(-400, 400)))
    scale = -0.1 + 0.05 * 2 / 10
    np.testing.assert_allclose(
        restarted[3].trace["w1"],
        scale * np.sign(gradient),
        rtol=1e-4,
        atol=1e-6,
    )


def test_magnitude_follows_the_weights():
    params = {"w": jnp.array([4.0, 3.0, 2.9, 0.1])}
    # The sign of z is found out: each step is -1 for the largest weight.
    tx = sparse_update(
        optax.chain(
            fgrad.fixed_point_forward_grad(
                KEY, perturbation=perturbations.rademacher(), num_perturbations=1
            ),
            optax.sgd(1.0),
        ),
        density=0.25,
        reselect_every=1,
    )
    update = functools.partial(tx.update, value_fn=lambda p: jnp.sum(p["w"]))
    update = fast_jit(update)
    state, chosen = tx.init(params), []
    for _ in range(3):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
        chosen.append(int(state.indices["w"][0]))
    assert chosen == [0, 0, 1]


def test_a_state_with_a_key_keeps_its_count():
    class Drawn(NamedTuple):
        key: Any
        count: Any
        direction: Any

    old, fresh = Drawn(1, 7, jnp.ones(2)), Drawn(1, 0, jnp.zeros(2))
    marks = Drawn(False, False, True)
    merged = _restarted((old,), (fresh,), (marks,))[0]
    assert (merged.key, merged.count, merged.direction.tolist()) == (1, 7, [0, 0])


@pytest.mark.parametrize(
    ("density", "options"),
    [
        (0.1, {}),
        (0.003, {}),  # vectors so small that they are perturbed at the start
        (0.01, {"criterion": "random", "key": CHOICE_KEY, "reselect_every": 9}),
    ],
)
def test_a_sparse_step_needs_the_memory_of_one_layer(density, options):
    layers, width = 8, 512
    params = {f"w{i}": jnp.full((width, width), 0.01) for i in range(layers)}

    def deep(params, batch):
        for i in range(layers):
            batch = jnp.tanh(batch @ params[f"w{i}"])
        return jnp.mean(batch)

    tx = sparse_update(chain(num_perturbations=1), density=density, **options)
    state = jax.eval_shape(tx.init, params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        updates, state = tx.update(params, state, params, value_fn=deep, batch=batch)
        return optax.apply_updates(params, updates), state

    compiled = step.lower(params, state, jnp.ones((8, width))).compile()
    layer = 4 * width**2
    vectors = density * layers * layer
    # One layer, the chosen values or their gradients, and little else.
    bound = 1.2 * layer + 1.5 * vectors
    assert compiled.memory_analysis().temp_size_in_bytes < bound


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda t: sparse_update(t, density=0.0), ValueError, r"\(0, 1\], got 0.0"),
        (lambda t: sparse_update(t, density=1.5), ValueError, r"\(0, 1\], got 1.5"),
        (lambda t: sparse_update(1, density=0.5), TypeError, "inner must be"),
        (
            lambda t: sparse_update(t, density=0.5, criterion="top"),
            ValueError,
            "importance., got 'top'",
        ),
        (
            lambda t: sparse_update(t, density=0.5, criterion="random"),
            ValueError,
            "'random' draws random numbers and got no key",
        ),
        (
            lambda t: sparse_update(t, density=0.5, criterion="importance"),
            ValueError,
            "'importance' draws random numbers and got no key",
        ),
        (
            lambda t: sparse_update(t, density=0.5, criterion="threshold"),
            ValueError,
            "give both",
        ),
        (
            lambda t: sparse_update(t, density=0.5, threshold=1.0),
            ValueError,
            "or neith",
        ),
        (
            lambda t: sparse_update(
                t, density=0.5, criterion="threshold", threshold=1.0, reselect_every=2
            ),
            ValueError,
            "reselect_every=2 with a threshold",
        ),
        (
            lambda t: sparse_update(t, density=0.5, reselect_every=0),
            ValueError,
            "reselect_every must be a positive integer, got 0",
        ),
        (
            lambda t: sparse_update(t, density=0.5, num_perturbations=0),
            ValueError,
            "num_perturbations must be a positive integer, got 0",
        ),
    ],
)
def test_bad_options_fail_when_the_transformation_is_built(build, error, message):
    with pytest.raises(error, match=message):
        build(chain())


def test_what_init_and_update_refuse():
    params = {"w": jnp.ones(4)}
    tx = sparse_update(chain(), density=0.5, criterion="threshold", threshold=0.5)
    with pytest.raises(TypeError, match=r"call tx.init outside jax.jit"):
        jax.jit(tx.init)(params)
    assert tx.init(params).indices["w"].shape == (2,)
    with pytest.raises(ValueError, match=r"none is above threshold=0.5"):
        tx.init({"w": jnp.zeros(4)})
    with pytest.raises(ValueError, match="mask leaves out every leaf"):
        sparse_update(chain(), density=0.5, mask=False).init(params)
    state = tx.init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state, value_fn=lambda p: 0.0)
    with pytest.raises(ValueError, match="needs the loss"):
        tx.update(params, state, params)
