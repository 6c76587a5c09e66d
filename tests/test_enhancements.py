import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import fast_jit
from hypothesis import given, settings
from hypothesis import strategies as st
from light_keys import light_key

import fgrad
from fgrad import checks, evaluation, perturbations
from fgrad.enhancements import (
    kernel_normalization,
    sharpness_aware,
    sparse,
    sparse_update,
)
from fgrad.enhancements.kernel_normalization import (
    integer_root,
    square_root,
    sum_of_squares,
)
from fgrad.fixed_point import is_qtensor

Z = perturbations.normal()
KEY, SAM_KEY, CHOICE_KEY = light_key(1, 2), light_key(3, 4), jax.random.key(5)
EPSILON, RHO, LR, M, STEPS = 0.05, 0.1, 0.02, 3, 4


# ------------------------------------------------------- a network, and its reference


def net(values, x):
    """A loss that NumPy and JAX compute alike."""
    h = x @ values["w1"] + values["b1"]
    y = (h / (1 + abs(h))) @ values["w2"]
    return ((y - 1) ** 2).mean()


def loss_fn(params, batch):
    return net({name: jnp.asarray(leaf) for name, leaf in params.items()}, batch)


def problem(bits=None, channel_axis=None):
    """Params of which 60% of w1 are above `perturbations.SMALL`, and a batch."""
    rng = np.random.default_rng(0)
    shapes = {"b1": (40,), "w1": (48, 40), "w2": (40, 3)}
    params = {
        name: jnp.asarray(rng.normal(size=shape) / math.sqrt(shape[0]), jnp.float32)
        for name, shape in shapes.items()
    }
    if bits:
        params = fgrad.quantize(params, bits=bits, channel_axis=channel_axis)
    return params, jnp.asarray(rng.normal(size=(8, 48)), jnp.float32)


class Grid(NamedTuple):
    """A `QTensor` in NumPy."""

    q: Any
    scale: Any
    limit: int


def to_numpy(leaf):
    if not is_qtensor(leaf):
        return np.asarray(leaf, np.float64)
    scale = np.broadcast_to(np.asarray(leaf.scale, np.float64), leaf.shape)
    return Grid(np.asarray(leaf.qvalue, np.int64), scale, leaf.max_qvalue)


def value(leaf):
    return leaf.q * leaf.scale if isinstance(leaf, Grid) else leaf


def moved(leaf, z, amplitude):
    """Equation (6), or the same in floats; z in units of Δ_z = 1/32."""
    if not isinstance(leaf, Grid):
        return leaf + amplitude * z / 32
    steps = np.rint(np.float32(amplitude) / leaf.scale.astype(np.float32))
    q = np.rint((32 * leaf.q + steps.astype(np.int64) * z) / 32).astype(np.int64)
    return leaf._replace(q=np.clip(q, -leaf.limit, leaf.limit))


def taken(leaf, index):
    if not isinstance(leaf, Grid):
        return leaf.reshape(-1)[index]
    return Grid(leaf.q.reshape(-1)[index], leaf.scale.reshape(-1)[index], leaf.limit)


def put_back(leaf, index, part):
    if not isinstance(leaf, Grid):
        whole = leaf.copy()
        whole.reshape(-1)[index] = part
        return whole
    q = leaf.q.copy()
    q.reshape(-1)[index] = part.q
    return leaf._replace(q=q)


def draw(key, step, index, leaves):
    """int64 z_q of each leaf, by the addresses that fgrad.perturbations documents."""
    names = [f"['{name}']" for name in leaves]
    keys = perturbations.leaf_keys(perturbations.sample_key(key, step, index), names)
    return {
        name: np.asarray(Z.sample(keys[path], np.shape(value(leaf))), np.int64)
        for path, (name, leaf) in zip(names, leaves.items(), strict=True)
    }


def apart(plus, minus):
    """``sign(plus - minus)``, of losses that float32 tells apart as well."""
    assert abs(plus - minus) > 1e-6 * abs(plus)
    return int(np.sign(plus - minus))


def reference(params, x, indices, *, sam, normalised, optimizer):
    """The params after a few steps, in float64 and Python's rounding."""
    x = np.asarray(x, np.float64)
    leaves = {name: to_numpy(leaf) for name, leaf in params.items()}
    indices = {
        name: np.arange(np.size(value(leaf))) if indices is None else indices[name]
        for name, leaf in leaves.items()
    }
    first = {name: np.zeros(len(index)) for name, index in indices.items()}
    second = {name: np.zeros(len(index)) for name, index in indices.items()}
    sparse = any(len(i) < np.size(value(leaves[n])) for n, i in indices.items())

    def shifted(loss, leaves, key, step):
        """The loss one ascent step away."""
        z = draw(key, step, 2**32 - 1, leaves)

        def at(leaves, sign):
            return loss({n: moved(v, sign * z[n], RHO) for n, v in leaves.items()})

        side = apart(at(leaves, 1), at(leaves, -1))
        return lambda leaves: at(leaves, side)

    for step in range(STEPS):

        def loss(leaves):
            return net({name: value(leaf) for name, leaf in leaves.items()}, x)

        if sam == "outside":
            loss = shifted(loss, leaves, SAM_KEY, step)
        parts = leaves
        part_loss = loss
        if sparse:
            parts = {n: taken(leaf, indices[n]) for n, leaf in leaves.items()}

            def part_loss(parts, loss=loss, leaves=leaves):
                return loss(
                    {n: put_back(v, indices[n], parts[n]) for n, v in leaves.items()}
                )

        if sam == "inside":
            part_loss = shifted(part_loss, parts, SAM_KEY, step)
        gradient = dict.fromkeys(parts, 0)
        for i in range(M):
            z = draw(KEY, step, i, parts)
            plus, minus = (
                part_loss({n: moved(v, s * z[n], EPSILON) for n, v in parts.items()})
                for s in (1, -1)
            )
            side = apart(plus, minus)
            gradient = {n: g + side * z[n] / 32 / M for n, g in gradient.items()}
        for name, part in parts.items():
            g = gradient[name].reshape(-1)
            if normalised:
                w = np.linalg.norm(value(part))
                g = g / np.linalg.norm(g) * w
            if optimizer == "adam":
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g**2
                g = first[name] / (1 - 0.9 ** (step + 1))
                g = g / (np.sqrt(second[name] / (1 - 0.999 ** (step + 1))) + 1e-8)
            if optimizer == "momentum":
                g = first[name] = 0.9 * first[name] + g
            g = g.reshape(np.shape(value(part)))
            if isinstance(part, Grid):
                q = part.q + np.rint(-LR * g / part.scale).astype(np.int64)
                new = part._replace(q=np.clip(q, -part.limit, part.limit))
            else:
                new = part - LR * g
            leaves[name] = put_back(leaves[name], indices[name], new) if sparse else new
    return leaves


def chain(*links, optimizer="sgd", vectorize=1, **options):
    optimizers = {
        "sgd": optax.sgd(LR),
        "momentum": optax.sgd(LR, momentum=0.9),
        "adam": optax.adam(LR),
    }
    options = {"epsilon": EPSILON, "num_perturbations": M, **options}
    return optax.chain(
        fgrad.fixed_point_forward_grad(KEY, vectorize=vectorize, **options),
        *links,
        optimizers[optimizer],
        fgrad.quantized_update(),
    )


def train(tx, params, steps=STEPS, loss_fn=loss_fn, **extra):
    """Params and state after a few steps, in a scan."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params, value_fn=loss_fn, **extra)
        return (optax.apply_updates(params, updates), state), None

    start = (params, tx.init(params))
    return fast_jit(lambda start: jax.lax.scan(step, start, length=steps))(start)[0]


@pytest.mark.parametrize(
    ("bits", "channel_axis", "density", "sam", "normalised", "optimizer", "vectorize"),
    [
        (None, None, None, "outside", False, "sgd", 1),
        (8, -1, None, "outside", True, "sgd", 1),
        (None, None, 0.1, None, False, "adam", 2),
        (8, None, 0.1, None, False, "sgd", M),
        (16, None, 0.6, "inside", True, "momentum", 1),
        (16, -1, 0.6, "outside", True, "adam", 1),
    ],
)
def test_training_is_the_float64_reference(
    bits, channel_axis, density, sam, normalised, optimizer, vectorize
):
    params, x = problem(bits, channel_axis)
    links = [kernel_normalization()] if normalised else []
    tx = chain(*links, optimizer=optimizer, vectorize=vectorize)
    ascent = functools.partial(sharpness_aware, key=SAM_KEY, rho=RHO)
    indices = None
    if sam == "inside" or (sam and not density):
        tx = ascent(tx)
    if density:
        tx = sparse_update(tx, density=density)
        indices = {n: magnitude_reference(v, density) for n, v in params.items()}
    if sam == "outside" and density:
        tx = ascent(tx)
    trained, _ = train(tx, params, batch=x)
    expected = reference(
        params, x, indices, sam=sam, normalised=normalised, optimizer=optimizer
    )
    for name, leaf in trained.items():
        before, after = to_numpy(params[name]), to_numpy(leaf)
        change = value(after) - value(before)
        wanted = value(expected[name]) - value(before)
        # float32 against float64: a tie may be rounded to the other side, once a step.
        grid = STEPS * np.max(after.scale) if bits else 0.0
        assert np.abs(change - wanted).max() <= grid + 1e-4 * np.abs(wanted).max()
        exact = np.mean(np.abs(change - wanted) <= 1e-4 * np.abs(wanted).max())
        assert exact > 0.99
        assert np.abs(wanted).max() > 0
        if density:
            outside = np.delete(change, indices[name])
            assert outside.size == 0 or np.all(outside == 0)
        assert jax.tree.map(lambda a: a.dtype, leaf) == jax.tree.map(
            lambda a: a.dtype, params[name]
        )


# ------------------------------------------------------------------ normalisation


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**64 - 1))
def test_integer_root_is_pythons(x):
    high, low = jnp.uint32(x >> 32), jnp.uint32(x & 0xFFFFFFFF)
    assert int(jax.jit(integer_root)(high, low)) == math.isqrt(x)


def test_square_root_at_the_edges():
    edges = {0, 1, 2, 3, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**62, 2**64 - 1}
    edges |= {n**2 + d for n in (7, 2**16, 46341, 2**31 + 5) for d in (-1, 0, 1)}
    values = sorted(edges)
    high = jnp.array([v >> 32 for v in values], jnp.uint32)
    low = jnp.array([v & 0xFFFFFFFF for v in values], jnp.uint32)
    assert integer_root(high, low).tolist() == [math.isqrt(v) for v in values]
    # One rounding to float32, and 2**-31 of the root of the shifted integer.
    np.testing.assert_allclose(
        square_root(high, low), np.sqrt(np.array(values, float)), rtol=2.0**-23
    )


@pytest.mark.parametrize("axes", [(0, 1), (0,), (1,)])
def test_sum_of_squares_is_that_of_big_integers(axes):
    rng = np.random.default_rng(1)
    q = rng.integers(-32768, 32768, (3, 70_000)).astype(np.int16)
    q[0] = 32767  # sums to 2**46
    high, low = jax.jit(sum_of_squares, static_argnums=1)(q, axes)
    total = np.sum(q.astype(object) ** 2, axis=axes)
    got = np.asarray(high).astype(object) * 2**32 + np.asarray(low).astype(object)
    assert np.all(got == total)
    floats = sum_of_squares(q[:, :5].astype(np.float32), axes)
    integers = sum_of_squares(q[:, :5], axes)
    jax.tree.map(np.testing.assert_array_equal, floats, integers)


def norm(array, per):
    axes = tuple(range(array.ndim - 1)) if per == "channel" and array.ndim > 1 else None
    return np.sqrt(np.sum(array.astype(np.float64) ** 2, axis=axes, keepdims=True))


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize(
    ("bits", "channel_axis"), [(None, None), (16, None), (16, -1), (16, 0), (8, None)]
)
def test_gradients_get_the_norms_of_the_weights(per, bits, channel_axis):
    rng = np.random.default_rng(2)
    shapes = {"k": (3, 4, 5), "v": (7,), "s": ()}
    params = {
        n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()
    }
    gradient = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    given = gradient
    if bits:
        params = fgrad.quantize(params, bits=bits, channel_axis=channel_axis)
        given = {
            n: fgrad.QTensor(gradient[n], jnp.zeros_like(p.scale), p.bits)
            for n, p in params.items()
        }
    tx = kernel_normalization(per=per)
    updates, _ = fast_jit(tx.update)(given, tx.init(params), params)
    for name, leaf in params.items():
        g = np.asarray(gradient[name])
        wanted = g / norm(g, per) * norm(value(to_numpy(leaf)), per)
        got = updates[name].qvalue if bits else updates[name]
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
        assert got.dtype == jnp.float32


def test_zeros_make_no_nan_and_zero_weights_move():
    params = {
        "zero": jnp.zeros(4),
        "grid": fgrad.quantize(jnp.zeros((2, 3))),
        "bias": jnp.ones(2),
        "tiny": jnp.array([3e-16, 4e-16]),
    }
    gradient = {
        "zero": jnp.array([0.0, 0.0, 2.0, 0.0]),
        "grid": fgrad.QTensor(jnp.ones((2, 3)), jnp.float32(0), 16),
        "bias": jnp.zeros(2),
        "tiny": jnp.array([0.0, 1e-12]),
    }
    tx = kernel_normalization(floor=0.01)
    updates, _ = fast_jit(tx.update)(gradient, tx.init(params), params)
    # The floor is a root mean square: 0.01 √4, 0.01 √6 / √6 and 0.01 √2.
    np.testing.assert_allclose(updates["zero"], [0, 0, 0.02, 0], rtol=1e-6)
    np.testing.assert_allclose(updates["grid"].qvalue, np.full((2, 3), 0.01), rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], [0, 0])
    np.testing.assert_allclose(updates["tiny"], [0, 0.01 * math.sqrt(2)], rtol=1e-6)


def test_one_direction_is_the_papers_equation():
    params, x = problem(16)
    tx = optax.chain(
        fgrad.fixed_point_forward_grad(KEY, epsilon=EPSILON, num_perturbations=1),
        kernel_normalization(mask={"w1": True, "b1": True, "w2": False}),
    )
    update = fast_jit(functools.partial(tx.update, value_fn=loss_fn))
    updates, state = update(params, tx.init(params), params, batch=x)
    sign = np.sign(state[0].loss_differences[0])
    z = draw(KEY, 0, 0, {n: to_numpy(p) for n, p in params.items()})
    for name in ("w1", "b1"):
        w = np.linalg.norm(value(to_numpy(params[name])))
        wanted = sign * z[name] / np.linalg.norm(z[name]) * w
        np.testing.assert_allclose(updates[name].qvalue, wanted, rtol=1e-5)
    np.testing.assert_allclose(updates["w2"].qvalue, sign * z["w2"] / 32, rtol=1e-6)


def test_float_dtypes_are_kept():
    params = {"w": jnp.ones(8, jnp.bfloat16)}
    tx = kernel_normalization()
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16


# ---------------------------------------------------------------------- sharpness


def test_forward_passes_are_those_that_happen():
    params = {"w": jnp.ones(8)}
    calls = []

    def counted(params):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(params["w"] ** 2)

    inner = sparse_update(
        chain(),
        density=0.5,
        criterion="importance",
        key=CHOICE_KEY,
        num_perturbations=2,
    )
    tx = sharpness_aware(inner, SAM_KEY, rho=RHO)
    update = fast_jit(functools.partial(tx.update, value_fn=counted))
    state, passes = tx.init(params), []
    for _ in range(2):
        _, state = update(params, state, params)
        jax.effects_barrier()
        passes.append((int(state.forward_passes), len(calls)))
        calls.clear()
    assert passes == [(2 + 2 * 2 + 2 * M,) * 2, (2 + 2 * M,) * 2]
    assert int(state.count) == 2


def test_the_ascent_waits_for_a_difference():
    params = {"w": jnp.ones(8)}
    tx = sharpness_aware(chain(num_perturbations=1), SAM_KEY, rho=RHO)

    @fast_jit
    def ascent(factor):
        def loss(params):
            return factor * jnp.sum(params["w"])

        return tx.update(params, tx.init(params), params, obj_fn=loss)[1].ascent

    up = int(ascent(1.0))
    assert abs(up) == 1
    assert [int(ascent(f)) for f in (-1.0, 0.0, jnp.nan)] == [-up, 0, 0]


def test_masked_leaves_take_no_part_in_the_ascent():
    params = {"w": jnp.array([1.0]), "v": jnp.array([1.0])}
    seen = []

    def loss(p):
        jax.debug.callback(
            lambda *p: seen.append([float(x[0]) for x in p]), *p.values()
        )
        return jnp.sum(p["w"] + p["v"])

    inner = fgrad.fixed_point_forward_grad(
        KEY, num_perturbations=1, mask=False, epsilon=EPSILON
    )
    tx = sharpness_aware(
        inner,
        SAM_KEY,
        rho=optax.constant_schedule(0.5),
        perturbation=perturbations.rademacher(),
        mask={"w": True, "v": False},
    )
    fast_jit(functools.partial(tx.update, value_fn=loss))(
        params, tx.init(params), params
    )
    jax.effects_barrier()
    # Leaves come in the order of their names. Up is where w is larger.
    assert sorted(seen) == [[1.0, 0.5], [1.0, 1.5], [1.0, 1.5], [1.0, 1.5]]


@pytest.mark.parametrize("wrap", ["sharpness", "sparse"])
def test_the_loss_gets_what_it_names_and_inner_gets_all(wrap):
    seen = {}

    def loss(params, batch, *, scale=1.0):
        seen.update(batch=batch, scale=scale)
        return jnp.sum(params["w"]) * scale

    def update(updates, state, params=None, **extra):
        seen.update(extra=set(extra))
        return updates, state

    listener = optax.GradientTransformationExtraArgs(lambda p: (), update)
    inner = optax.chain(chain(num_perturbations=1), listener)
    tx = (
        sharpness_aware(inner, SAM_KEY, rho=RHO)
        if wrap == "sharpness"
        else sparse_update(inner, density=0.5)
    )
    params = {"w": jnp.ones(4)}
    extra = {"batch": jnp.ones(1), "scale": 2.0, "unknown": 3}
    fast_jit(lambda p: tx.update(p, tx.init(p), p, obj_fn=loss, **extra)[0])(params)
    assert seen["scale"] == 2.0
    assert seen["extra"] == {"value_fn", *extra}
    with pytest.raises(TypeError, match="value_fn needs batch"):
        tx.update(params, tx.init(params), params, value_fn=loss)


# ------------------------------------------------------------------------- choice


def largest(score, k):
    """Sorted positions of the k largest; ties to the lower index."""
    return np.sort(np.argsort(-score.reshape(-1), kind="stable")[:k])


def share(size, density):
    return max(1, round(density * size))


def magnitude_reference(leaf, density):
    array = value(to_numpy(leaf))
    return largest(np.abs(array), share(array.size, density))


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
    assert adam.mu["w1"].qvalue.shape == (192,)
    assert adam.nu["w1"].qvalue.dtype == jnp.float32
    assert adam.nu["w2"].qvalue.shape == (12,)


# -------------------------------------------------------------------- re-selection


def test_weights_are_chosen_anew_when_due_and_only_momenta_restart():
    weights = np.random.default_rng(4).normal(size=40).astype(np.float32)
    params = {"w1": fgrad.quantize(jnp.asarray(weights))}

    def loss(params):
        return jnp.sum(jnp.asarray(params["w1"]) ** 2)

    inner = optax.chain(
        fgrad.fixed_point_forward_grad(KEY, epsilon=EPSILON),
        optax.scale_by_adam(),
        optax.scale_by_schedule(optax.linear_schedule(-0.1, -0.05, 10)),
        optax.trace(0.9),
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
    gradient = restarted[1].mu["w1"].qvalue / 0.1
    assert np.all(np.isin(np.rint(gradient * 32 * 3), np.arange(-400, 400)))
    scale = -0.1 + 0.05 * 2 / 10
    np.testing.assert_allclose(
        restarted[3].trace["w1"].qvalue,
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
    merged = sparse._restarted((old,), (fresh,), (marks,))[0]
    assert (merged.key, merged.count, merged.direction.tolist()) == (1, 7, [0, 0])


def test_inner_wrappers_restart_too():
    params = {"w": jnp.linspace(-1, 1, 40)}

    def loss(params):
        return jnp.sum(params["w"] ** 2)

    tx = sparse_update(
        sharpness_aware(chain(optimizer="momentum"), SAM_KEY, rho=RHO),
        density=0.2,
        criterion="importance",
        key=CHOICE_KEY,
        num_perturbations=1,
        reselect_every=2,
    )
    trained, state = train(tx, params, steps=3, loss_fn=loss)
    assert int(state.inner_state.count) == 3
    assert int(state.inner_state.inner_state[0].count) == 3
    assert int(state.importance_passes) == 2
    assert float(loss(trained)) < float(loss(params))


# -------------------------------------------------------------------------- memory


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


def test_the_ascent_makes_no_copy_of_the_weights():
    layers, width = 6, 256
    params = {f"w{i}": jnp.full((width, width), 0.01) for i in range(layers)}

    def deep(params, batch):
        for i in range(layers):
            batch = jnp.tanh(batch @ params[f"w{i}"])
        return jnp.mean(batch)

    inner = fgrad.fixed_point_forward_grad(KEY, num_perturbations=1)
    tx = sharpness_aware(inner, SAM_KEY, rho=RHO)
    state = jax.eval_shape(tx.init, params)

    @jax.jit
    def losses(params, state, batch):
        _, state = tx.update(params, state, params, value_fn=deep, batch=batch)
        return state.inner_state.loss_differences

    compiled = losses.lower(params, state, jnp.ones((8, width))).compile()
    layer = 4 * width**2
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * layer


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

    plus, minus, *there = both_ways(loss, params, x, Z)
    for got, wanted in zip((plus, minus), there, strict=True):
        # A sum of 120 sines of up to 1, in another order.
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)
    lines = evaluation.explain(loss, params, Z, x=x)
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


# -------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda t: kernel_normalization(per="row"), ValueError, "got 'row'"),
        (lambda t: kernel_normalization(floor=0.0), ValueError, "positive, got 0.0"),
        (lambda t: sharpness_aware(t, KEY, rho=0.0), ValueError, "positive, got 0.0"),
        (lambda t: sharpness_aware(t, 0, rho=1.0), TypeError, "jax.random.key"),
        (lambda t: sharpness_aware(1, KEY, rho=1.0), TypeError, "inner must be"),
        (
            lambda t: sharpness_aware(t, KEY, rho=fgrad.relative_epsilon(1.0)),
            TypeError,
            "number or a schedule",
        ),
        (
            lambda t: sharpness_aware(t, KEY, rho=1.0, perturbation="normal"),
            TypeError,
            "use for example fgrad.perturbations",
        ),
        (lambda t: sparse_update(t, density=0.0), ValueError, r"\(0, 1\], got 0.0"),
        (lambda t: sparse_update(t, density=1.5), ValueError, r"\(0, 1\], got 1.5"),
        (lambda t: sparse_update(1, density=0.5), TypeError, "inner must be"),
        (
            lambda t: sparse_update(t, density=0.5, criterion="top"),
            ValueError,
            "magnitude, random, threshold, importance, got 'top'",
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
    threshold = sparse_update(
        chain(), density=0.5, criterion="threshold", threshold=0.5
    )
    with pytest.raises(TypeError, match=r"call tx.init outside jax.jit"):
        jax.jit(threshold.init)(params)
    assert threshold.init(params).indices["w"].shape == (2,)
    with pytest.raises(ValueError, match=r"none is above threshold=0.5"):
        threshold.init({"w": jnp.zeros(4)})
    with pytest.raises(ValueError, match="mask leaves out every leaf"):
        sparse_update(chain(), density=0.5, mask=False).init(params)
    sharp = sharpness_aware(chain(), KEY, rho=1e-3)
    with pytest.raises(ValueError, match=r"rho of sharpness_aware.*half a weight"):
        sharp.init({"w": fgrad.quantize(jnp.ones(4), bits=8)})
    for tx in (sharp, threshold):
        state = tx.init(params)
        with pytest.raises(ValueError, match="needs the parameters"):
            tx.update(params, state, value_fn=lambda p: 0.0)
        with pytest.raises(ValueError, match="needs the loss"):
            tx.update(params, state, params)
    with pytest.raises(ValueError, match="needs the parameters"):
        kernel_normalization().update(params, optax.EmptyState())
    assert checks.loss("x", params, None, jnp.sum) is jnp.sum
