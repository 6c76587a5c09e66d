import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from lanes import every, some

import fgrad
from fgrad import (
    activity,
    enhancements,
    estimators,
    evaluation,
    fixed_point,
    layers,
    perturbations,
)
from fgrad.fixed_point import is_qtensor


class Net(nn.Module):
    bits: layers.Bits = None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(layers.Conv(4, (3, 3), bits=self.bits)(x))
        x = nn.relu(layers.Conv(8, (3, 3), strides=2, bits=self.bits)(x))
        return layers.Dense(3, bits=self.bits)(x.reshape(x.shape[0], -1))


def problem(bits=None, seed=0):
    """Params, loss and batch of a small classifier, float or fixed point."""
    keys = jax.random.split(jax.random.key(seed), 3)
    images = jax.random.normal(keys[0], (8, 6, 6, 2))
    labels = jax.random.randint(keys[1], (8,), 0, 3)
    params = Net().init(keys[2], images)["params"]
    scales = {}
    if bits:
        params = fgrad.quantize(params, bits=bits[0])
        variables = layers.calibrate(Net(bits), {"params": params}, images)
        scales = {layers.SCALES: variables[layers.SCALES]}

    def loss_fn(params, batch):
        logits = Net(bits).apply({"params": params, **scales}, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return params, loss_fn, (images, labels)


def train(tx, params, loss_fn, steps, jit=True, **extra):
    def step(params, state):
        updates, state = tx.update(params, state, params, value_fn=loss_fn, **extra)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def reference_step(params, loss_fn, batch, key, step, *, epsilon, m, lr):
    """One step of QZO-FF in Python integers and float64, equations (6) to (8)."""
    z_step, one_q = 2.0**-5, 32
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    total = [np.zeros(leaf.shape, np.int64) for _, leaf in leaves]
    for i in range(m):
        z_key = perturbations.sample_key(key, step, i)
        names = [jax.tree_util.keystr(path) for path, _ in leaves]
        keys = perturbations.leaf_keys(z_key, names)
        zs = [
            np.asarray(perturbations.normal().sample(keys[n], leaf.shape), np.int64)
            for n, (_, leaf) in zip(names, leaves, strict=True)
        ]
        losses = []
        for sign in (1, -1):
            moved = []
            for z, (_, leaf) in zip(zs, leaves, strict=True):
                w = np.asarray(leaf.qvalue, np.int64)
                ratio = np.float32(epsilon) / np.asarray(leaf.scale)
                acc = one_q * w + sign * np.rint(ratio).astype(np.int64) * z
                q = np.clip(np.rint(acc / one_q), -leaf.max_qvalue, leaf.max_qvalue)
                dtype = leaf.qvalue.dtype
                moved.append(fgrad.QTensor(jnp.asarray(q, dtype), leaf.scale))
            tree = jax.tree.unflatten(treedef, moved)
            losses.append(float(jax.jit(loss_fn)(tree, batch)))
        sign = np.sign(losses[0] - losses[1])
        total = [t + int(sign) * z for t, z in zip(total, zs, strict=True)]
    new = []
    for t, (_, leaf) in zip(total, leaves, strict=True):
        w = np.asarray(leaf.qvalue, np.int64)
        # The losses are those at ε_q steps, not at ε, and so is the quotient.
        ratio = np.float32(epsilon) / np.asarray(leaf.scale)
        mean = t * z_step / m * (ratio / np.rint(ratio)).astype(np.float64)
        step_q = np.rint(-lr * mean / np.asarray(leaf.scale, np.float64))
        q = np.clip(w + step_q, -leaf.max_qvalue, leaf.max_qvalue)
        new.append(fgrad.QTensor(jnp.asarray(q, leaf.qvalue.dtype), leaf.scale))
    return jax.tree.unflatten(treedef, new)


# ----------------------------------------------------------------- the estimator


@pytest.mark.slow
def test_difference_quotient_is_the_directional_derivative():
    params, loss_fn, batch = problem()
    z = perturbations.normal()
    key, epsilon = jax.random.key(3), 1e-4
    plus, minus = fgrad.dual_forward(loss_fn, params, key, epsilon, z, batch=batch)
    there = evaluation.perturb(params, key, 1.0, z)
    direction = jax.tree.map(jnp.subtract, there, params)
    _, slope = jax.jvp(lambda p: loss_fn(p, batch), (params,), (direction,))
    # Kinks of the ReLU make the error linear in ε (3% at 1e-3): take it small;
    # float32 errs by 1e-7 / ε, a thousandth.
    np.testing.assert_allclose((plus - minus) / (2 * epsilon), slope, rtol=0.02)


@pytest.mark.slow
def test_mean_of_spsa_is_the_gradient():
    w = jnp.array([0.3, -1.2, 0.8])
    a = jnp.array([[2.0, 0.3, 0.0], [0.3, 1.0, -0.2], [0.0, -0.2, 0.5]])

    def loss_fn(w):
        return 0.5 * w @ a @ w + jnp.sum(w)

    m = 40_000
    estimate = estimators.forward_gradient(
        loss_fn,
        w,
        jax.random.key(0),
        epsilon=1e-2,
        num_perturbations=m,
        estimator=estimators.spsa,
        vectorize=2000,
    )
    gradient = jax.grad(loss_fn)(w)
    # For a quadratic the quotient is exact; one estimate has variance
    # |g|² + (kurtosis - 2) gᵢ² < 2 |g|² per component.
    error = np.sqrt(2 * jnp.sum(gradient**2) / m)
    np.testing.assert_allclose(estimate.gradient, gradient, atol=5 * error)


@pytest.mark.parametrize("bits", some([None, (16, 8)], [None]))
def test_sign_estimate_points_uphill_and_training_descends(bits):
    params, loss_fn, batch = problem(bits)
    tx = fgrad.qzo_ff(5e-3, jax.random.key(1), epsilon=1e-2, num_perturbations=8)
    trained, state = train(tx, params, loss_fn, 60, batch=batch)
    before, after = loss_fn(params, batch), loss_fn(trained, batch)
    assert after < 0.8 * before
    assert after < optax.tree.get(state, "loss") * 1.5


@pytest.mark.slow
def test_sign_estimate_has_a_positive_product_with_the_gradient():
    params, loss_fn, batch = problem()
    estimate = estimators.forward_gradient(
        loss_fn,
        params,
        jax.random.key(0),
        num_perturbations=64,
        kwargs={"batch": batch},
    )
    gradient = jax.grad(loss_fn)(params, batch)
    dot = optax.tree.vdot(estimate.gradient, gradient)
    # E[sign(g·z) g·z] = √(2/π) |g| with a deviation of 0.6 |g| / √64.
    norm = float(optax.tree.norm(gradient))
    np.testing.assert_allclose(dot, np.sqrt(2 / np.pi) * norm, atol=5 * 0.6 * norm / 8)


def test_state_reports_the_losses_of_the_step():
    params, loss_fn, batch = problem()
    key = jax.random.key(5)
    tx = fgrad.fixed_point_forward_grad(key, epsilon=1e-2, num_perturbations=3)
    _, state = tx.update(None, tx.init(params), params, value_fn=loss_fn, batch=batch)
    pairs = [
        fgrad.dual_forward(
            loss_fn, params, perturbations.sample_key(key, 0, i), 1e-2, batch=batch
        )
        for i in range(3)
    ]
    np.testing.assert_allclose(state.loss, np.mean(pairs), rtol=1e-6)
    differences = [p - m for p, m in pairs]
    np.testing.assert_allclose(state.loss_differences, differences, atol=1e-6)
    assert int(state.nonfinite_pairs) == 0
    assert int(state.count) == 1


# ------------------------------------------------------------------ fixed point


@pytest.mark.parametrize("channel_axis", [None, -1])
def test_a_step_is_equations_6_to_8_in_python_integers(channel_axis):
    _, _, batch = problem()
    params = {
        "w": jax.random.normal(jax.random.key(0), (72, 3)),
        "b": jnp.zeros(3),
    }
    params = fgrad.quantize(params, channel_axis=channel_axis)

    def loss_fn(params, batch):
        x = batch[0].reshape(8, -1)
        logits = x @ jnp.asarray(params["w"]) + jnp.asarray(params["b"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    key, settings = jax.random.key(7), {"epsilon": 1e-2, "m": 3, "lr": 5e-3}
    tx = fgrad.qzo_ff(5e-3, key, epsilon=1e-2, num_perturbations=3)
    expected = params
    for step in range(5):
        expected = reference_step(expected, loss_fn, batch, key, step, **settings)
    trained, _ = train(tx, params, loss_fn, 5, batch=batch)
    difference = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a, np.int64) - np.asarray(b, np.int64)).max(),
        [trained["w"].qvalue, trained["b"].qvalue],
        [expected["w"].qvalue, expected["b"].qvalue],
    )
    # float32 against float64 may round a tie of the update differently, once a step.
    assert max(difference) <= 5
    moved = np.abs(np.asarray(trained["w"].qvalue) - np.asarray(params["w"].qvalue))
    assert moved.max() > 100


@pytest.mark.slow
def test_int16_storage_and_floats_on_the_grid_take_the_same_trajectory():
    params, loss_fn, batch = problem((16, 8))
    on_grid = jax.tree.map(
        lambda q: fgrad.QTensor(q.qvalue.astype(jnp.float32), q.scale, q.bits),
        params,
        is_leaf=is_qtensor,
    )
    make = functools.partial(fgrad.qzo_ff, 5e-3, jax.random.key(0), epsilon=1e-2)
    integers, state = train(make(), params, loss_fn, 20, batch=batch)
    floats, float_state = train(make(), on_grid, loss_fn, 20, batch=batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
        jax.tree.leaves(integers),
        jax.tree.leaves(floats),
    )
    assert_equal(state[0].loss_differences, float_state[0].loss_differences)
    assert jax.tree.leaves(floats)[0].dtype == jnp.float32


@pytest.mark.parametrize("bits", some([(16, 8), (8, 8)], [(8, 8)]))
def test_weights_stay_integers_between_steps(bits):
    params, loss_fn, batch = problem(bits)
    tx = fgrad.qzo_ff(5e-3, jax.random.key(0), epsilon=3e-2)
    trained, state = train(tx, params, loss_fn, 2, batch=batch)
    storage = jnp.int16 if bits[0] == 16 else jnp.int8
    for leaf in jax.tree.leaves(trained, is_leaf=is_qtensor):
        assert leaf.qvalue.dtype == storage
        assert leaf.scale.dtype == jnp.float32
        assert np.abs(np.asarray(leaf.qvalue)).max() <= leaf.max_qvalue
    # No leaf of the state is as large as a kernel.
    assert max(jnp.size(leaf) for leaf in jax.tree.leaves(state)) <= 2 * 3

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(params, state, params, value_fn=loss_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    compiled = step.lower(trained, state).compile()
    weights = sum(leaf.size for leaf in jax.tree.leaves(trained))
    width = jnp.dtype(storage).itemsize
    # One word more per small array; a float copy would add 4 bytes for each weight.
    slack = 64 * len(jax.tree.leaves((trained, state)))
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes <= weights * width + slack
    assert memory.output_size_in_bytes <= weights * width + slack
    assert memory.argument_size_in_bytes < 4 * weights


def test_updates_below_half_a_step_freeze_and_are_reported():
    params, loss_fn, batch = problem((8, 8))
    frozen = fgrad.qzo_ff(1e-6, jax.random.key(0), epsilon=3e-2)
    trained, state = train(frozen, params, loss_fn, 3, batch=batch)
    assert_equal(trained, params)
    assert float(optax.tree.get(state, "moved_fraction")) == 0.0
    moving = fgrad.qzo_ff(1e-1, jax.random.key(0), epsilon=3e-2)
    _, state = train(moving, params, loss_fn, 1, batch=batch)
    assert 0.5 < float(optax.tree.get(state, "moved_fraction")) <= 1.0


def test_moved_fraction_counts_changed_weights():
    params = {"q": fgrad.quantize(jnp.ones(4), bits=8), "f": jnp.ones(4)}
    updates = {
        "q": fgrad.QTensor(
            jnp.array([1.0, 0.4, -2.0, 0.0]) * params["q"].scale, jnp.float32(0), 8
        ),
        "f": jnp.array([1e-12, 0.1, 0.0, -0.1]),
    }
    tx = fgrad.quantized_update(stochastic_below=0)
    updates, state = tx.update(updates, tx.init(params), params)
    assert updates["q"].qvalue.tolist() == [1, 0, -2, 0]
    assert float(state.moved_fraction) == 4 / 8


def test_quantized_update_saturates_and_ignores_nan():
    params = fgrad.quantize(jnp.array([1.0, -1.0, 0.5]), bits=16, headroom=1.0)
    huge = fgrad.QTensor(jnp.array([jnp.inf, -1e30, jnp.nan]), jnp.float32(0), 16)
    tx = fgrad.quantized_update()
    updates, _ = tx.update(huge, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert new.qvalue.tolist() == [32767, -32767, int(params.qvalue[2])]


CHAINS = {
    "sgd": lambda: optax.sgd(0.1),
    "scale": lambda: optax.scale(-0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "on_values": lambda: fgrad.on_values(optax.adam(0.1)),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1),
}


@pytest.mark.parametrize("bits", every(2, [8, 16]))
@pytest.mark.parametrize("name", every(3, CHAINS))
def test_a_chain_that_does_not_land_on_the_grid_is_refused(name, bits):
    """apply_updates would add loss per weight to integers, and cut the sum."""
    params = {"w": fgrad.quantize(jnp.linspace(-1.0, 1.0, 6), bits), "b": jnp.ones(2)}

    def loss_fn(p):
        return jnp.sum(jnp.asarray(p["w"]) ** 2) + jnp.sum(p["b"])

    estimator = fgrad.fixed_point_forward_grad(jax.random.key(0), epsilon=0.1)

    def step(optimizer, *last):
        tx = optax.chain(estimator, optimizer, *last)
        updates, _ = tx.update(params, tx.init(params), params, value_fn=loss_fn)
        return optax.apply_updates(params, updates)

    with pytest.raises(ValueError, match="QGradient"):
        step(CHAINS[name]())
    # As the message says it is right.
    new = step(fgrad.on_values(CHAINS[name]()), fgrad.quantized_update())
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert new["w"].qvalue.dtype == params["w"].qvalue.dtype


def test_a_gradient_says_what_takes_it_to_the_grid():
    params = fgrad.quantize(jnp.ones(3))
    gradient = fixed_point.as_gradient(params, jnp.ones(3))
    assert isinstance(gradient, fixed_point.QGradient)
    for advice in ("fgrad.quantized_update()", "fgrad.on_values"):
        assert advice in repr(gradient)
    # A tree map gives it back, and does not take it for the params.
    assert isinstance(optax.tree.scale(2.0, gradient), fixed_point.QGradient)
    with pytest.raises(ValueError, match="QGradient"):
        optax.apply_updates(params, gradient)


# ------------------------------------------------------------ what changes no bit


@pytest.mark.parametrize("bits", some([None, (16, 8), (8, 8)], [(16, 8)]))
@pytest.mark.parametrize("vectorize", some([2, 3, 5], [2]))
def test_vectorize_changes_no_bit(bits, vectorize):
    params, loss_fn, batch = problem(bits)
    make = functools.partial(
        fgrad.qzo_ff, 5e-3, jax.random.key(0), epsilon=3e-2, num_perturbations=5
    )
    expected, _ = train(make(), params, loss_fn, 4, batch=batch)
    trained, _ = train(make(vectorize=vectorize), params, loss_fn, 4, batch=batch)
    assert_equal(trained, expected)


@pytest.mark.parametrize("bits", some([None, (16, 8)], [None]))
def test_jit_scan_and_donation_change_no_bit(bits):
    params, loss_fn, batch = problem(bits)
    tx = fgrad.qzo_ff(5e-3, jax.random.key(0), epsilon=3e-2)
    jitted, _ = train(tx, params, loss_fn, 3, batch=batch)

    def step(carry, _=None):
        params, state = carry
        updates, state = tx.update(params, state, params, value_fn=loss_fn, batch=batch)
        return (optax.apply_updates(params, updates), state), None

    start = (params, tx.init(params))
    (scanned, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=3))(start)
    assert_equal(scanned, jitted)
    donated = jax.tree.map(jnp.copy, start)
    donating = jax.jit(lambda c: step(c)[0], donate_argnums=0)
    for _ in range(3):
        donated = donating(donated)
    assert_equal(donated[0], jitted)
    if bits:  # float arithmetic is fused differently outside jit
        eager, _ = train(tx, params, loss_fn, 3, jit=False, batch=batch)
        assert_equal(eager, jitted)


@pytest.mark.parametrize("bits", [None, (16, 8)])
def test_a_masked_leaf_never_moves(bits):
    params, loss_fn, batch = problem(bits)
    mask = {"Conv_0": False, "Conv_1": True, "Dense_0": {"kernel": True, "bias": False}}
    options = {"epsilon": 1e-2, "mask": mask}
    tx = optax.chain(
        fgrad.fixed_point_forward_grad(jax.random.key(0), **options),
        fgrad.on_values(optax.sgd(1e-2, momentum=0.9)),
        fgrad.quantized_update(mask=mask),
    )
    trained, _ = train(tx, params, loss_fn, 5, batch=batch)
    assert_equal(trained["Conv_0"], params["Conv_0"])
    assert_equal(trained["Dense_0"]["bias"], params["Dense_0"]["bias"])
    for moved in (("Conv_1", "kernel"), ("Dense_0", "kernel")):
        before, after = (jnp.asarray(p[moved[0]][moved[1]]) for p in (params, trained))
        assert np.abs(after - before).max() > 0


def test_a_mask_may_be_a_function_of_the_params():
    params = {"w": jnp.ones(3), "b": jnp.ones(3)}
    tx = fgrad.qzo_ff(0.1, jax.random.key(0), mask=lambda p: {"w": True, "b": False})
    trained, _ = train(tx, params, lambda p: jnp.sum(p["w"] + p["b"]), 2)
    assert_equal(trained["b"], params["b"])
    assert np.all(trained["w"] != params["w"])


@pytest.mark.slow
def test_an_added_leaf_changes_no_other_leafs_z():
    params = {"w": jnp.ones((3, 5)), "b": jnp.zeros(5)}
    more = {**params, "a": jnp.ones(7), "layer": {"w": jnp.ones(2)}}
    make = functools.partial(
        estimators.forward_gradient,
        key=jax.random.key(0),
        num_perturbations=4,
        estimator=lambda plus, minus, epsilon: jnp.ones_like(plus),
    )
    few = make(lambda p: jnp.sum(p["w"]), params).gradient
    many = make(lambda p: jnp.sum(p["w"]), more).gradient
    assert_equal({name: many[name] for name in few}, few)


@pytest.mark.slow
def test_qzo_ff_is_the_chain_of_its_links():
    params, loss_fn, batch = problem((16, 8))
    key, options = jax.random.key(2), {"epsilon": 1e-2, "num_perturbations": 2}
    chain = optax.chain(
        fgrad.fixed_point_forward_grad(key, **options),
        optax.sgd(1e-2),
        fgrad.quantized_update(),
    )
    alias = fgrad.qzo_ff(1e-2, key, **options)
    expected, expected_state = train(chain, params, loss_fn, 3, batch=batch)
    trained, state = train(alias, params, loss_fn, 3, batch=batch)
    assert_equal(trained, expected)
    assert_equal(state[0]._replace(key=0), expected_state[0]._replace(key=0))
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)


@pytest.mark.slow
def test_training_goes_on_from_a_checkpoint(tmp_path):
    params, loss_fn, batch = problem((16, 8))
    tx = fgrad.qzo_ff(5e-3, jax.random.key(0), epsilon=1e-2)

    @jax.jit
    def step(carry):
        params, state = carry
        updates, state = tx.update(params, state, params, value_fn=loss_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    carry = step(step((params, tx.init(params))))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", carry)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", carry)
    assert_equal(jax.tree.leaves(step(restored)[0]), jax.tree.leaves(step(carry)[0]))


# --------------------------------------------------------------- the user's side


def test_value_fn_gets_the_extra_arguments_that_it_names():
    params = jnp.ones(2)
    tx = fgrad.fixed_point_forward_grad(jax.random.key(0))
    seen = {}

    def loss_fn(w, batch, *, scale=1.0):
        seen.update(batch=batch, scale=scale)
        return jnp.sum(w) * scale

    extra = {"batch": jnp.zeros(1), "scale": 2.0, "value": 3.0, "unknown": object()}
    tx.update(None, tx.init(params), params, value_fn=loss_fn, **extra)
    assert seen["scale"] == 2.0
    assert set(seen) == {"batch", "scale"}

    def greedy(w, **kwargs):
        seen.update(kwargs)
        return jnp.sum(w)

    tx.update(None, tx.init(params), params, obj_fn=greedy, **extra)
    assert "unknown" in seen


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_float_leaves_keep_their_dtype(dtype):
    params = {"w": jnp.ones((4, 4), dtype)}
    tx = fgrad.qzo_ff(0.1, jax.random.key(0), epsilon=0.1)
    trained, _ = train(tx, params, lambda p: jnp.sum(p["w"].astype(jnp.float32)), 2)
    assert trained["w"].dtype == dtype
    assert np.mean(np.asarray(trained["w"]) != 1) > 0.8


def test_epsilon_may_be_a_schedule():
    params, seen = jnp.zeros(1), []

    def loss_fn(w):
        jax.debug.callback(lambda v: seen.append(abs(float(v[0]))), w)
        return jnp.sum(w)

    tx = fgrad.fixed_point_forward_grad(
        jax.random.key(0),
        epsilon=optax.linear_schedule(1.0, 0.5, 1),
        num_perturbations=1,
        perturbation=perturbations.rademacher(),
    )
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(None, state, params, value_fn=loss_fn)
    jax.effects_barrier()
    assert seen == [1.0, 1.0, 0.5, 0.5]


def test_a_non_finite_pair_is_left_out_and_counted():
    params = jnp.ones(3)

    def loss_fn(w):
        return jnp.where(w[0] > 1, jnp.nan, jnp.sum(w))

    tx = fgrad.fixed_point_forward_grad(jax.random.key(0), num_perturbations=4)
    gradient, state = tx.update(None, tx.init(params), params, value_fn=loss_fn)
    # One side of every pair has w[0] > 1 (or z = 0 there, which is finite).
    assert int(state.nonfinite_pairs) >= 3
    assert np.all(np.isfinite(gradient))


def test_legacy_uint32_keys_work():
    tx = fgrad.qzo_ff(0.1, jax.random.PRNGKey(0))
    trained, _ = train(tx, jnp.ones(3), jnp.sum, 1)
    assert np.all(trained != 1)


# -------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epsilon": 0.0}, ValueError, "epsilon must be positive and finite, got 0"),
        ({"num_perturbations": 0}, ValueError, "num_perturbations must be a positive"),
        ({"num_perturbations": 2.0}, ValueError, "num_perturbations must be a pos"),
        ({"vectorize": 0}, ValueError, "vectorize must be a positive"),
        ({"vectorize": 4}, ValueError, "vectorize=4 exceeds num_perturbations=3"),
        ({"perturbation": "normal"}, TypeError, "use for example fgrad.perturbations"),
        ({"estimator": "spsa"}, TypeError, "use fgrad.estimators.sign_m_spsa"),
        ({"on_nonfinite": "ignore"}, ValueError, 'must be "skip" or "raise"'),
        ({"num_seeds": 3}, TypeError, "unexpected keyword argument 'num_seeds'"),
    ],
)
def test_bad_options_fail_when_the_transformation_is_built(options, error, message):
    with pytest.raises(error, match=message):
        fgrad.fixed_point_forward_grad(jax.random.key(0), **options)
    with pytest.raises(error, match=message):
        fgrad.qzo_ff(0.1, jax.random.key(0), **options)


def test_a_seed_is_no_key():
    with pytest.raises(TypeError, match=r"use jax.random.key\(0\)"):
        fgrad.fixed_point_forward_grad(0)


def finish(result):
    """Waits for the computation and its callbacks, which may raise."""
    jax.block_until_ready(result)
    jax.effects_barrier()


def update(value_fn=jnp.sum, params=None, **options):
    params = jnp.ones(3) if params is None else params
    tx = fgrad.fixed_point_forward_grad(jax.random.key(0), **options)
    return tx.update(None, tx.init(params), params, value_fn=value_fn)


def test_missing_params_or_loss():
    tx = fgrad.fixed_point_forward_grad(jax.random.key(0))
    state = tx.init(jnp.ones(3))
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(None, state, value_fn=jnp.sum)
    with pytest.raises(ValueError, match="needs the loss"):
        tx.update(None, state, jnp.ones(3))
    with pytest.raises(ValueError, match="not both"):
        tx.update(None, state, jnp.ones(3), value_fn=jnp.sum, obj_fn=jnp.sum)
    with pytest.raises(ValueError, match="needs the parameters"):
        fgrad.quantized_update().update(jnp.ones(3), state)


def test_a_missing_argument_of_the_loss():
    with pytest.raises(TypeError, match="value_fn needs batch"):
        update(lambda w, batch: jnp.sum(w))


@pytest.mark.parametrize(
    ("value_fn", "message"),
    [
        (lambda w: w, r"scalar loss, got shape \(3,\)"),
        (lambda w: (jnp.sum(w), 1), "scalar loss, got a tuple"),
        (lambda w: jnp.sum(w) > 0, "real loss, got dtype bool"),
    ],
)
def test_a_loss_that_is_no_scalar(value_fn, message):
    with pytest.raises(TypeError, match=message):
        update(value_fn)


def test_an_integer_leaf_that_is_no_qtensor():
    params = {"w": jnp.ones(3), "steps": jnp.arange(3)}
    tx = fgrad.fixed_point_forward_grad(jax.random.key(0))
    with pytest.raises(TypeError, match=r"leaf 'steps' has dtype int32.*mask="):
        tx.init(params)
    with pytest.raises(TypeError, match="leaf 'steps' has dtype int32"):
        fgrad.dual_forward(lambda p: jnp.sum(p["w"]), params, jax.random.key(0), 0.1)
    masked = fgrad.qzo_ff(0.1, jax.random.key(0), mask={"w": True, "steps": False})
    trained, _ = train(masked, params, lambda p: jnp.sum(p["w"]), 2)
    assert_equal(trained["steps"], params["steps"])


def test_an_epsilon_that_rounds_to_zero():
    params = {"layer": {"w": fgrad.quantize(jnp.ones(3), bits=8)}}
    tx = fgrad.fixed_point_forward_grad(jax.random.key(0), epsilon=1e-3)
    message = r"epsilon=0.001 is at most half a weight step of leaf 'layer/w'"
    with pytest.raises(ValueError, match=message):
        tx.init(params)
    with pytest.raises(Exception, match=message):
        finish(jax.jit(tx.init)(params))
    fgrad.fixed_point_forward_grad(jax.random.key(0), epsilon=1e-2).init(params)
    masked = fgrad.fixed_point_forward_grad(jax.random.key(0), mask=False)
    masked.init(params)


def test_an_epsilon_that_decays_to_zero_on_the_grid_is_reported():
    params = fgrad.quantize(jnp.ones(3), bits=8)
    schedule = optax.piecewise_constant_schedule(1e-2, {1: 1e-3})
    tx = fgrad.fixed_point_forward_grad(jax.random.key(0), epsilon=schedule)
    state, fractions = tx.init(params), []
    for _ in range(2):
        _, state = tx.update(
            None, state, params, value_fn=lambda w: jnp.sum(jnp.asarray(w))
        )
        fractions.append(float(state.frozen_fraction))
    assert fractions == [0.0, 1.0]


def test_non_finite_losses_can_stop_the_program():
    with pytest.raises(Exception, match="non-finite loss at step 0"):
        finish(update(lambda w: w[0] * jnp.nan, on_nonfinite="raise"))


def test_bad_masks():
    with pytest.raises(ValueError, match="mask must be a bool, or a pytree"):
        update(lambda p: jnp.sum(p["w"]), {"w": jnp.ones(3)}, mask={"v": True})
    with pytest.raises(TypeError, match="mask must hold Python bools"):
        update(lambda p: jnp.sum(p["w"]), {"w": jnp.ones(3)}, mask={"w": jnp.ones(3)})


INNER = fgrad.qzo_ff(0.1, jax.random.key(0), epsilon=0.1)
LINKS = {
    "estimator": INNER,
    "sharpness": enhancements.sharpness_aware(INNER, jax.random.key(1), rho=0.1),
    "sparse": enhancements.sparse_update(INNER, density=0.5),
    "activity": activity.activity_forward_grad(jax.random.key(2), ["w"]),
}


@pytest.mark.parametrize("name", LINKS)
def test_init_names_a_tensor_that_is_on_no_grid(name):
    params = fgrad.quantize({"w": jnp.ones((2, 3)), "frozen": {"v": jnp.ones(3)}})
    LINKS[name].init(params)
    v = params["frozen"]["v"]
    params["frozen"]["v"] = fgrad.QTensor(v.qvalue, -v.scale)
    with pytest.raises(ValueError, match=r"the scale of leaf 'frozen/v' .* got -"):
        LINKS[name].init(params)
