"""The plan of a step: which leaves, which arithmetic, which z, which gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fgrad
from fgrad import perturbations
from fgrad.fixed_point import QGradient, QTensor, is_qtensor
from fgrad.leaves import Guidance, Plan, Policy, map_leaves, on_grid, trained_leaves
from fgrad.leaves.arithmetic import (
    FixedPointArithmetic,
    FixedPointLowRankArithmetic,
    FloatArithmetic,
    GridArithmetic,
    LowRankArithmetic,
    Side,
)

KEY = jax.random.key(0)
LOW_RANK = perturbations.low_rank(2)


def tree():
    """Small and large leaves, floats and integers, in the order of their paths."""
    wave = jnp.sin(jnp.arange(2400.0)).reshape(60, 40)
    return {
        "block": {"bias": wave[0], "kernel": wave},
        "coarse": fgrad.quantize(wave[:4], 4),
        "fine": fgrad.quantize(1.5 * wave, 16, channel_axis=-1),
    }


NAMES = ["['block']['bias']", "['block']['kernel']", "['coarse']", "['fine']"]


def leaves_of(params):
    return jax.tree.leaves(params, is_leaf=is_qtensor)


# ---------------------------------------------------------------------------- leaves


def test_leaves_names_and_arithmetic_are_in_flat_order():
    mask = {"block": {"bias": False, "kernel": True}, "coarse": True, "fine": True}
    plan = Plan(tree(), Policy(0.1), mask=mask)
    assert plan.names == NAMES
    assert plan.trained == (False, True, True, True)
    assert list(plan.arithmetic) == NAMES[1:]
    for found, leaf in zip(plan.leaves, leaves_of(tree()), strict=True):
        assert jax.tree.structure(found) == jax.tree.structure(leaf)
        jax.tree.map(np.testing.assert_array_equal, found, leaf)


@pytest.mark.parametrize(
    ("policy", "kinds"),
    [
        (
            Policy(0.1),
            [FloatArithmetic, FloatArithmetic, *[FixedPointArithmetic] * 2],
        ),
        (
            Policy(0.1, perturbation=LOW_RANK),
            [*[LowRankArithmetic] * 2, *[FixedPointLowRankArithmetic] * 2],
        ),
        (
            Policy(0.1, low_bit=on_grid(0.1)),
            [FloatArithmetic, FloatArithmetic, GridArithmetic, FixedPointArithmetic],
        ),
    ],
    ids=["dense", "low rank", "on grid"],
)
def test_the_type_of_a_leaf_and_the_policy_decide_its_arithmetic(policy, kinds):
    assert list(map(type, Plan(tree(), policy).arithmetic.values())) == kinds


def test_epsilon_is_that_of_the_step():
    policy = Policy(lambda count: 0.5**count)
    for step in (0, 3):
        plan = Plan({"w": jnp.ones(2)}, policy, step=jnp.int32(step))
        assert float(plan.epsilon) == 0.5**step
        assert float(plan.arithmetic["['w']"].epsilon) == 0.5**step


def test_stored_values_and_scales_are_put_back_where_they_were():
    params, mask = tree(), {"block": True, "coarse": False, "fine": True}
    plan = Plan(params, Policy(0.1), mask=mask)
    values = [params["block"]["bias"] + 1, params["block"]["kernel"] + 2]
    values.append(params["fine"].qvalue + 3)
    found = plan.with_stored(values, [params["fine"].scale * 2])
    assert jax.tree.structure(found) == jax.tree.structure(params)
    np.testing.assert_array_equal(found["block"]["bias"], values[0])
    np.testing.assert_array_equal(found["block"]["kernel"], values[1])
    np.testing.assert_array_equal(found["fine"].qvalue, values[2])
    np.testing.assert_array_equal(found["fine"].scale, 2 * params["fine"].scale)
    assert found["coarse"] is params["coarse"]


def test_guidance_reaches_the_leaves_that_can_be_guided():
    plan = Plan(tree(), Policy(0.1, low_bit=on_grid(0.1)))
    guided = [NAMES[0], NAMES[1], NAMES[3]]
    assert plan.guidable == guided
    assert plan.guided_mask == {
        "block": {"bias": True, "kernel": True},
        "coarse": False,
        "fine": True,
    }
    directions = {
        name: jnp.full(plan.arithmetic[name].shape, i, jnp.int8)
        for i, name in enumerate(guided)
    }
    guidance = Guidance(directions, jnp.float32(0.0), jnp.float32(1.0))
    after = plan.guided(guidance)
    key = perturbations.sample_key(KEY, 0, 0)
    keys = plan.leaf_keys(key)
    for name in NAMES:
        one, before = after.arithmetic[name], plan.arithmetic[name]
        z = one.sample(keys[name], jnp.zeros(one.shape))
        wanted = directions.get(name, before.sample(keys[name], jnp.zeros(one.shape)))
        np.testing.assert_array_equal(z, wanted)
        assert getattr(before, "guided", None) is None  # the plan itself stays


# --------------------------------------------------------------------------------- z


@pytest.mark.parametrize("step", [0, 5])
def test_the_keys_are_those_of_the_documented_addresses(step):
    plan = Plan(tree(), Policy(0.1, 3), step=step, mask=lambda p: True)
    keys = plan.keys(KEY)
    for i in range(3):
        z_key = perturbations.sample_key(KEY, step, i)
        for name in NAMES:
            alone = perturbations.leaf_keys(z_key, [name])[name]
            assert keys[name][i] == alone
            assert plan.leaf_keys(z_key)[name] == alone


POLICIES = {
    "dense": Policy(0.6),
    "low rank": Policy(0.6, perturbation=LOW_RANK),
    "on grid": Policy(0.6, low_bit=on_grid(0.3)),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("sign", [1, -1])
def test_sides_are_the_leaves_of_the_perturbed_tree(name, sign):
    plan = Plan(tree(), POLICIES[name])
    key = perturbations.sample_key(KEY, 0, 0)
    sides = plan.sides(plan.leaf_keys(key), jnp.int32(sign))
    there = leaves_of(plan.perturbed(key, sign))
    large = [isinstance(side, Side) for side in sides]
    # Those of more than SMALL values; with u and v also every matrix.
    assert large == [False, True, name == "low rank", True]
    for side, leaf, start in zip(sides, there, plan.leaves, strict=True):
        wanted = leaf.qvalue if is_qtensor(leaf) else leaf
        array = start.qvalue if is_qtensor(start) else start
        if isinstance(side, Side):
            side = side.dense(array, None, jnp.float32(2.5))
        np.testing.assert_array_equal(side, wanted)
        assert side.dtype == wanted.dtype
        assert np.mean(np.asarray(wanted) != np.asarray(array)) > 0.05


def test_untrained_leaves_of_the_perturbed_tree_stay():
    params = tree()
    mask = {"block": {"bias": True, "kernel": False}, "coarse": False, "fine": False}
    there = Plan(params, Policy(0.1), mask=mask).perturbed(KEY)
    assert there["block"]["kernel"] is params["block"]["kernel"]
    assert there["fine"] is params["fine"]
    assert np.all(there["block"]["bias"] != params["block"]["bias"])


# -------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("whole", [True, False], ids=["signs", "numbers"])
def test_the_gradient_is_the_mean_of_z_times_the_coefficients(whole):
    """Against a sum of one z after the other in float64."""
    params, m, rate = tree(), 4, 0.3
    policy = Policy(0.1, m, low_bit=on_grid(rate))
    mask = {"block": {"bias": True, "kernel": False}, "coarse": True, "fine": True}
    plan = Plan(params, policy, mask=mask, step=2)
    keys = plan.keys(KEY)
    signs = np.array([1, -1, 0, 1])
    c = signs if whole else np.array([0.5, -2.0, 0.0, 1.25])
    coefficients = jnp.asarray(c, jnp.int32 if whole else jnp.float32)
    gradient = jax.jit(plan.gradient)(keys, coefficients, jnp.asarray(signs, jnp.int32))
    structure = functools.partial(jax.tree.structure, is_leaf=is_qtensor)
    assert structure(gradient) == structure(params)
    kinds = [type(leaf) for leaf in leaves_of(gradient) if is_qtensor(leaf)]
    assert kinds == [QGradient, QGradient]
    z = {
        name: np.stack(
            [
                np.asarray(one.sample(keys[name][i], jnp.zeros(one.shape)))
                for i in range(m)
            ]
        ).astype(np.float64)
        for name, one in plan.arithmetic.items()
    }
    bias = np.tensordot(c, z[NAMES[0]], 1) * policy.perturbation.step / m
    np.testing.assert_allclose(gradient["block"]["bias"], bias, rtol=1e-6)
    np.testing.assert_array_equal(gradient["block"]["kernel"], 0)
    fine = np.tensordot(c, z[NAMES[3]], 1) * policy.perturbation.step / m
    # The evaluations took whole steps, in place of ε.
    steps = np.float32(0.1) / np.asarray(params["fine"].scale)
    fine *= steps / np.rint(steps)
    np.testing.assert_allclose(gradient["fine"].qvalue, fine, rtol=1e-6, atol=1e-7)
    # On the grid of few bits, SGD at this rate makes whole steps of it, by the signs.
    steps = rate * np.asarray(gradient["coarse"].qvalue) / params["coarse"].scale
    np.testing.assert_allclose(steps, np.tensordot(signs, z[NAMES[2]], 1), atol=1e-5)
    for name in ("coarse", "fine"):
        assert gradient[name].qvalue.dtype == jnp.float32
        assert not np.any(gradient[name].scale)


# --------------------------------------------------------------------------- reports


def test_the_frozen_fraction_counts_weights_whose_epsilon_rounds_to_zero():
    params = {
        "float": jnp.ones(30),
        "moves": QTensor(jnp.zeros(50, jnp.int16), jnp.float32(0.01)),
        "stays": QTensor(jnp.zeros(20, jnp.int16), jnp.float32(1.0)),
        "untrained": QTensor(jnp.zeros(99, jnp.int16), jnp.float32(1.0)),
    }
    mask = {"float": True, "moves": True, "stays": True, "untrained": False}
    plan = Plan(params, Policy(0.1), mask=mask)
    assert float(plan.frozen_fraction()) == pytest.approx(20 / 100)
    assert float(Plan({}, Policy(0.1)).frozen_fraction()) == 0
    assert float(Plan(jnp.ones(3), Policy(0.1)).frozen_fraction()) == 0


@pytest.mark.parametrize(
    ("dtype", "weights", "epsilon", "expected"),
    [
        (jnp.bfloat16, [0.5] * 4, 1e-6, 1.0),
        (jnp.float16, [0.5] * 4, 1e-6, 1.0),
        (jnp.float32, [0.5] * 4, 1e-30, 1.0),
        (jnp.float32, [1e8] * 4, 1e-3, 1.0),
        (jnp.float32, [0.5] * 4, 1e-3, 0.0),
        (jnp.float32, [0.0] * 4, 1e-30, 0.0),  # anything moves a zero
        (jnp.float32, [1e8, 0.5, -1e8, 0.0], 1e-3, 0.5),
        (jnp.bfloat16, [0.5, -0.5, 1e-6, 0.0], 1e-5, 0.5),
    ],
)
def test_the_frozen_fraction_counts_floats_to_which_epsilon_adds_nothing(
    dtype, weights, epsilon, expected
):
    plan = Plan({"w": jnp.asarray(weights, dtype)}, Policy(epsilon))
    assert float(plan.frozen_fraction()) == expected
    # Half as many among twice as many weights; those on a grid move.
    grid = fgrad.QTensor(jnp.zeros(4, jnp.int16), jnp.float32(epsilon), 16)
    both = Plan({"w": plan.leaves[0], "q": grid}, Policy(epsilon))
    assert float(both.frozen_fraction()) == expected / 2
    for seed in range(20):  # no z moves a weight that is said to be frozen
        there = plan.perturbed(jax.random.key(seed))["w"]
        if expected == 1:
            np.testing.assert_array_equal(there, plan.leaves[0])


def test_floats_of_which_none_can_move_are_refused():
    message = r"epsilon=1e-06 changes no weight of 'v', 'w': .*relative_epsilon"
    params = {"v": jnp.full(3, 0.5, jnp.bfloat16), "w": jnp.full(3, 1e8)}
    tx = fgrad.fixed_point_forward_grad(KEY, epsilon=1e-6)
    with pytest.raises(ValueError, match=message):
        tx.init(params)

    def reported():
        jax.block_until_ready(jax.jit(tx.init)(params))
        jax.effects_barrier()

    with pytest.raises(jax.errors.JaxRuntimeError, match="changes no weight"):
        reported()
    # One that moves, a mask or a leaf on a grid is enough.
    tx.init({**params, "b": jnp.zeros(3)})
    tx.init({**params, "q": QTensor(jnp.zeros(2, jnp.int16), jnp.float32(1e-6))})
    fgrad.fixed_point_forward_grad(KEY, epsilon=1e-6, mask=False).init(params)


def test_an_epsilon_that_moves_nothing_is_reported_now_or_by_the_program():
    coarse = QTensor(jnp.zeros(20, jnp.int16), jnp.float32(1.0))
    params, policy = {"a": {"w": coarse}, "b": jnp.ones(2)}, Policy(0.1)
    with pytest.raises(ValueError, match=r"epsilon=0.1 .* leaf 'a/w' \(step 1\)"):
        Plan(params, policy).check_epsilon()
    Plan(params, policy, mask={"a": False, "b": True}).check_epsilon()
    Plan(params, Policy(0.6)).check_epsilon()

    @jax.jit
    def program(epsilon):
        Plan(params, Policy(epsilon)).check_epsilon()
        return epsilon

    program(0.6)
    jax.effects_barrier()

    def reported():
        program(0.1)
        jax.effects_barrier()

    with pytest.raises(jax.errors.JaxRuntimeError, match="leaf 'a/w'"):
        reported()


def unchecked(qvalue, scale, bits):
    """A `QTensor` of any parts, as tree maps make them."""
    template = QTensor(np.zeros(1, np.int16), np.float32(1), bits)
    return jax.tree.unflatten(jax.tree.structure(template), (qvalue, scale))


ONES = np.ones((2, 3), np.int8)
NO_GRIDS = {
    "negative": (ONES, np.float32(-1), 8, "positive and finite, got -1"),
    "zero": (ONES, np.float32([[1, 0, 1]]), 8, "positive and finite, got 0"),
    "NaN": (ONES, np.float32(np.nan), 8, "positive and finite, got nan"),
    "narrow": (ONES, np.float32(1), 16, "32767, which do not fit into .* int8"),
    "wide": (
        np.int32(ONES),
        np.float32(1),
        16,
        "kept in int16, and its qvalue is int32",
    ),
    "lowest": (np.int8([-128]), np.float32(1), 8, "holds -128, outside the grid"),
    "beyond": (np.int16([7, 8]), np.float32(1), 12, None),
    "few bits": (8 * ONES, np.float32(1), 4, r"holds 8, outside .* \[-7, 7\]"),
    "fractions": (np.float32([0.5]), np.float32(1), 8, "holds fractions"),
    "stacked": (
        np.ones((4, 2, 3), np.int8),
        np.ones(4, np.float32),
        8,
        r"shape \(4,\)",
    ),
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", NO_GRIDS)
def test_tensors_that_are_on_no_grid_are_named(name, trained):
    qvalue, scale, bits, message = NO_GRIDS[name]
    params = {"a": {"w": unchecked(qvalue, scale, bits)}, "b": jnp.ones(2)}
    mask = {"a": trained, "b": True}
    if message is None:  # the numbers do not tell
        Plan(params, Policy(), mask=mask).check_values()
        return
    with pytest.raises(ValueError, match=f"leaf 'a/w' .*{message}"):
        Plan(params, Policy(), mask=mask).check_values()


def test_tensors_on_grids_and_what_has_no_numbers_pass():
    params = tree()
    Plan(params, Policy()).check_values()
    # A jitted init must not fail; what is wrong in it is not known there.
    wrong = {"w": QTensor(jnp.int8([1]), jnp.float32(-1))}
    for program in (jax.eval_shape, lambda fn, x: jax.jit(fn)(x)):
        program(lambda p: Plan(p, Policy()).check_values(), params)
        program(lambda p: Plan(p, Policy()).check_values(), wrong)


ADVICE = {
    "complex64": "real and its imaginary part .*jax.lax.complex, or exclude it .*mask=",
    "float8_e4m3fn": "Convert it to bfloat16, .*fgrad.quantize .*mask=",
    "int32": r"fgrad.QTensor\(qvalue, scale, bits\).*mask=",
    "bool": "It holds no weights: exclude it with mask=",
    "uint32": "It holds no weights: exclude it with mask=",
}


@pytest.mark.parametrize("dtype", ADVICE)
def test_the_advice_about_a_leaf_that_cannot_be_perturbed_works(dtype):
    leaf = jnp.ones(3, jnp.float32).astype(dtype)
    params = {"w": jnp.ones(3), "other": leaf}
    message = f"leaf 'other' has dtype {dtype} .*{ADVICE[dtype]}"
    with pytest.raises(TypeError, match=message):
        Plan(params, Policy())
    trained = {"w": True, "other": False}

    def step(params, mask=None, read=lambda x: x):
        def loss_fn(p):
            other = jnp.real(read(p["other"])).astype(jnp.float32)
            return jnp.sum((p["w"] + other) ** 2)

        tx = fgrad.qzo_ff(0.1, KEY, epsilon=0.1, mask=mask)
        updates, _ = tx.update(params, tx.init(params), params, value_fn=loss_fn)
        return jax.tree.map(lambda p, u: np.any(np.asarray(u)), params, updates)

    moved = step(params, mask=trained)
    assert moved == {"w": True, "other": False}
    ways = {
        "complex64": [
            (
                {"real": jnp.ones(3), "imaginary": jnp.ones(3)},
                lambda x: jax.lax.complex(x["real"], x["imaginary"]),
            )
        ],
        "float8_e4m3fn": [
            (leaf.astype(jnp.bfloat16), lambda x: x),
            (fgrad.quantize(leaf, bits=8), jnp.asarray),
        ],
        "int32": [(QTensor(leaf.astype(jnp.int8), 0.1, 8), jnp.asarray)],
    }
    for other, read in ways.get(dtype, []):
        moved = step({"w": jnp.ones(3), "other": other}, read=read)
        assert any(jax.tree.leaves(moved["other"]))


def test_integers_that_are_no_qtensor_are_refused_where_they_are_trained():
    params = {"w": jnp.ones(2), "table": {"ids": jnp.arange(3)}}
    with pytest.raises(TypeError, match="leaf 'table/ids' has dtype int32"):
        Plan(params, Policy(0.1))
    plan = Plan(params, Policy(0.1), mask={"w": True, "table": False})
    assert list(plan.arithmetic) == ["['w']"]


# ----------------------------------------------------------------------------- masks


@jax.tree_util.register_pytree_node_class
class Module:
    """A tree that can be called, like those of Equinox."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias

    def tree_flatten(self):
        return (self.weight, self.bias), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)

    def __call__(self, x):
        raise AssertionError("a tree of bools is a mask, and no function of params")


GRID = QTensor(jnp.zeros((2, 3), jnp.int8), jnp.float32(0.1))
PARAMS = {"a": {"w": GRID, "b": 1.0}, "c": [2.0, GRID]}


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, (True, True, True, True)),
        (True, (True, True, True, True)),
        (np.bool_(False), (False, False, False, False)),
        ({"a": False, "c": [True, False]}, (False, False, True, False)),
        ({"a": {"w": True, "b": False}, "c": True}, (False, True, True, True)),
        (lambda params: {"a": False, "c": True}, (False, False, True, True)),
    ],
    ids=["none", "true", "false", "prefix", "mixed", "function"],
)
def test_a_mask_is_a_prefix_of_the_params_or_a_function(mask, expected):
    assert trained_leaves(mask, PARAMS) == expected


def test_a_tree_of_bools_that_can_be_called_is_not_called():
    assert trained_leaves(Module(True, False), Module(1.0, 2.0)) == (True, False)


def test_placeholders_without_leaves_have_no_mask():
    assert trained_leaves({"w": True}, {}) == ()


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"a": True}, ValueError, "mask must be a bool, or a pytree of bools"),
        ({"a": True, "c": [True]}, ValueError, "prefix of it, got"),
        (1, TypeError, "Python bools.*got 1"),
        ({"a": True, "c": jnp.bool_(True)}, TypeError, "at trace time"),
    ],
)
def test_other_masks_are_refused(mask, error, message):
    with pytest.raises(error, match=message):
        trained_leaves(mask, PARAMS)


def test_leaves_are_mapped_with_what_other_trees_have_in_their_place():
    seen = []

    def fn(leaf, trained, other):
        seen.append((is_qtensor(leaf), trained, other))
        return len(seen)

    mask = {"a": True, "c": [False, True]}
    others = {"a": {"w": {"deep": 5}, "b": "x"}, "c": [None, (1, 2)]}
    found = map_leaves(fn, mask, PARAMS, others)
    assert seen == [
        (False, True, "x"),
        (True, True, {"deep": 5}),
        (False, False, None),
        (True, True, (1, 2)),
    ]
    assert found == {"a": {"b": 1, "w": 2}, "c": [3, 4]}
