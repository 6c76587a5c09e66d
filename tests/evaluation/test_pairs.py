import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import fast_jit
from jax import lax
from jax.experimental import io_callback
from lanes import every, every_row
from light_keys import light_key
from loss_cases import CASES, LINEAR, X, affine, integers, size, weights

import fgrad
from fgrad import QTensor, estimators, evaluation, perturbations
from fgrad.evaluation import point_of_use
from fgrad.fixed_point import is_qtensor
from fgrad.leaves import trained_leaves

M = 3
Z = perturbations.normal()

KEY = light_key(1, 2)


class Form(NamedTuple):
    """How leaves are held: they take turns at the widths, 0 for floats."""

    bits: tuple[int, ...]
    epsilon: float


FORMS = {
    # A power of two, so that w + εz is exact for the cases' multiples of 1/64.
    "float32": Form((0,), 2.0**-4),
    # ε is no multiple of a step, nor is εz: the integers of equation (6) round.
    "int16": Form((16, 8), 0.05),
    "int8": Form((8, 16), 0.05),
}
# Powers of two, to stay exact. Both grids end just below 2.
STEPS = {16: 2.0**-14, 8: 2.0**-6}


@pytest.fixture(autouse=True)
def way(request, monkeypatch):
    """Where leaves are perturbed, which must make no difference.

    The leaves here are few values, and those the evaluator perturbs ahead of the call:
    "first". For leaves to go the way of large ones, what counts as small has to be
    smaller: "at use" takes none for small, "mixed" takes vectors, and leaves the
    weights of loops outside of them.
    """
    name = getattr(request, "param", "at use")
    ways = {"first": (1024, 256), "mixed": (4, 256), "at use": (0, 0)}
    small, loop_work = ways[name]
    monkeypatch.setattr(perturbations, "SMALL", small)
    monkeypatch.setattr(point_of_use, "LOOP_WORK", loop_work)
    return name


# ------------------------------------------------------------------------ the oracle


@functools.cache
def sample_key(index: int) -> jax.Array:
    return perturbations.sample_key(KEY, 0, index)


@functools.cache
def draw(index: int, name: str, shape: Any, perturbation: Any = Z) -> np.ndarray:
    """z_q of one leaf, which is all that the oracle takes from the library."""
    key = _leaf_keys(sample_key(index), (name,))[name]
    return np.asarray(_sample(key, perturbation, shape), np.int64)


_leaf_keys = fast_jit(perturbations.leaf_keys, static_argnums=1)
_sample = fast_jit(
    lambda key, perturbation, shape: perturbation.sample(key, shape),
    static_argnums=(1, 2),
)


def tree_of_bools(mask: Any, params: Any) -> Any:
    treedef = jax.tree.structure(params, is_leaf=is_qtensor)
    return treedef.unflatten(trained_leaves(mask, params))


def explicit(
    params: Any,
    index: int,
    epsilon: float,
    sign: int,
    mask: Any = None,
    perturbation: perturbations.Perturbation = Z,
) -> Any:
    """``w + sign * εz`` in numpy: float32, or equation (6) in 64-bit integers."""
    mask = tree_of_bools(mask, params)
    step = perturbation.step

    def leaf_fn(path, leaf, trained):
        if not trained:
            return leaf
        z = draw(index, jax.tree_util.keystr(path), np.shape(leaf), perturbation)
        if not is_qtensor(leaf):
            amplitude = np.float32(step) * np.float32(epsilon) * sign
            moved = np.asarray(leaf, np.float32) + amplitude * z.astype(np.float32)
            return moved.astype(jnp.result_type(leaf))
        w = np.asarray(leaf.qvalue, np.int64)
        limit = 2 ** (leaf.bits - 1) - 1
        if isinstance(perturbation, perturbations.LowRank):
            # In whole steps, from where z cannot reach the ends of the grid.
            steps = np.rint(np.float32(epsilon * step) / np.asarray(leaf.scale))
            steps = np.minimum(steps, limit // perturbation.rank).astype(np.int64)
            room = limit - steps * perturbation.rank
            qvalue = np.clip(w, -room, room) + sign * steps * z
        else:
            one_q = round(1 / step)
            steps = np.rint(np.float32(epsilon) / np.asarray(leaf.scale))
            accumulator = one_q * w + sign * steps.astype(np.int64) * z
            qvalue = np.clip(np.rint(accumulator / one_q), -limit, limit)
        qvalue = qvalue.astype(np.asarray(leaf.qvalue).dtype)
        return QTensor(qvalue, leaf.scale, leaf.bits)

    return jax.tree_util.tree_map_with_path(leaf_fn, params, mask, is_leaf=is_qtensor)


# --------------------------------------------------------------------- every case


class Problem(NamedTuple):
    """A case in one form."""

    value_fn: Callable[..., Any]
    loss: Callable[..., Any]  # of explicitly perturbed parameters
    params: Any
    kwargs: dict[str, Any]
    mask: Any  # a pytree of bools
    epsilon: float
    z: perturbations.Perturbation
    exact: bool
    unused: tuple[str, ...]
    vmap: bool

    def explicit(self, index: int, sign: int, mask: Any = None) -> np.ndarray:
        mask = self.mask if mask is None else mask
        params = explicit(self.params, index, self.epsilon, sign, mask, self.z)
        return np.asarray(self.loss(params, **self.kwargs))

    def pairs(self, mask: Any = None) -> np.ndarray:
        """Losses at explicitly perturbed parameters, [2, M]."""
        return np.array(
            [[self.explicit(i, sign, mask) for i in range(M)] for sign in (1, -1)]
        )

    def tolerance(self, losses: Any) -> np.ndarray:
        """Room for another order of float operations: some 100 roundings of 6e-8."""
        losses = np.asarray(losses, np.float64)
        return np.zeros_like(losses) if self.exact else 1e-5 * np.abs(losses) + 1e-6


@functools.cache
def problem(name: str, form: str, z: perturbations.Perturbation = Z) -> Problem:
    widths, epsilon = FORMS[form]
    case, in_floats = CASES[name](widths[0]), CASES[name](0)
    mask = tree_of_bools(case.mask, case.params)
    params, value_fn = case.params, case.value_fn
    if widths[0]:
        turn = itertools.cycle(widths[:1] if case.same_bits else widths)

        def quantize(path, leaf, trained):
            stacked = case.stacked.get(jax.tree_util.keystr(path), 0)
            return on_grid(leaf, next(turn), stacked) if trained else leaf

        params = jax.tree_util.tree_map_with_path(quantize, params, mask)
    if case.dequantize:

        def value_fn(params, **kwargs):
            return case.value_fn(fgrad.dequantize(params), **kwargs)

    if case is in_floats:  # nothing in it knows of QTensors: they act as their values
        compiled = _jitted(case.value_fn)

        def loss(params, **kwargs):
            return compiled(fgrad.dequantize(params), **kwargs)

    else:
        loss = fast_jit(value_fn)

    return Problem(
        value_fn,
        loss,
        params,
        case.kwargs,
        mask,
        epsilon,
        z,
        case.exact,
        case.unused,
        case.vmap,
    )


_jitted = functools.cache(fast_jit)


def on_grid(leaf: Any, bits: int, stacked: int = 0) -> QTensor:
    """A leaf on a grid; entries along its first axes have steps of their own."""
    limit = 2 ** (bits - 1) - 1
    shape = np.shape(leaf)[:stacked] + (1,) * (np.ndim(leaf) - stacked)
    factors = 2.0 ** -(np.arange(math.prod(shape[:stacked])) % 2)
    scale = np.float32(STEPS[bits] * (factors.reshape(shape) if stacked else 1))
    qvalue = np.rint(np.asarray(leaf, np.float32) / scale)
    return QTensor(np.clip(qvalue, -limit, limit).astype(f"int{bits}"), scale, bits)


def half_frozen(mask: Any) -> Any:
    """The mask with the first, third, ... of its trained leaves frozen, if not all."""
    leaves, treedef = jax.tree.flatten(mask)
    if sum(leaves) == 1:
        return mask
    order = np.cumsum(leaves)
    return treedef.unflatten(
        [bool(on and i % 2 == 0) for on, i in zip(leaves, order, strict=True)]
    )


def dual_losses(task: Problem, mask: Any, keys: Any) -> jax.Array:
    """Losses of a jitted `dual_forward`: [2], or [2, m] for m keys."""

    def program(params, keys, kwargs):
        def pair(key):
            return fgrad.dual_forward(
                task.value_fn, params, key, task.epsilon, task.z, mask=mask, **kwargs
            )

        return jnp.stack((jax.vmap(pair) if keys.ndim else pair)(keys))

    return fast_jit(program)(task.params, keys, task.kwargs)


def estimate(task: Problem, vectorize: int, pick: Callable[..., Any]) -> Any:
    """Picks from the losses [2, M] and the gradient of a jitted `forward_gradient`.

    What is not picked is not compiled.
    """
    pairs = []

    def estimator(plus, minus, epsilon):
        pairs.append(jnp.stack([plus, minus]))
        return estimators.sign_m_spsa(plus, minus, epsilon)

    def program(params, kwargs):
        result = estimators.forward_gradient(
            task.value_fn,
            params,
            KEY,
            epsilon=task.epsilon,
            num_perturbations=M,
            perturbation=task.z,
            estimator=estimator,
            vectorize=vectorize,
            mask=task.mask,
            kwargs=kwargs,
        )
        return pick(pairs.pop(), result.gradient)

    return fast_jit(program)(task.params, task.kwargs)


def assert_losses(actual: Any, expected: Any, task: Problem) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    error = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    close = bool(np.all(error <= task.tolerance(expected)))
    assert close, f"{actual} is not {expected}"


# Programs that the compiler of JAX 0.12 for CPUs stumbles over (RET_CHECK in its
# fusion_compiler.cc), with and without its optimizations.
NOT_COMPILED = (
    {"concatenated_and_stacked", "linear_algebra_of_a_leaf"}
    if jax.__version_info__ >= (0, 12)
    else set()
)


@pytest.mark.parametrize("name", every(5, CASES))
def test_float_leaves(name, request):
    if name in NOT_COMPILED:
        request.applymarker(
            pytest.mark.xfail(
                raises=jax.errors.JaxRuntimeError,
                reason="XLA: Failed to translate module to LLVM IR",
            )
        )
    task = problem(name, "float32")
    losses = dual_losses(task, task.mask, sample_key(0))
    assert_losses(losses, task.pairs()[:, 0], task)


# Networks are made of the other cases, and would bring time rather than news.
@pytest.mark.parametrize("way", ["mixed"], indirect=True)
@pytest.mark.parametrize(
    "name",
    every(
        8,
        [
            name
            for name in CASES
            if not name.startswith(("linen", "nnx", "aqt", "qwix"))
            and "lstm" not in name
        ],
    ),
)
def test_fixed_point_leaves_some_of_them_frozen(name):
    task = problem(name, "int16")
    mask = half_frozen(task.mask)
    losses = dual_losses(task, mask, sample_key(0))
    assert_losses(losses, task.pairs(mask)[:, 0], task)


@pytest.mark.parametrize("name", every(10, CASES))
def test_fixed_point_leaves_in_several_directions_at_once(name):
    task = problem(name, "int8")
    vectorize = M if task.vmap else 1
    losses = estimate(task, vectorize, lambda losses, gradient: losses)
    assert_losses(losses, task.pairs(), task)


@pytest.mark.parametrize("name", every(4, CASES))
def test_the_case_would_notice(name):
    """A leaf that is left alone changes the loss by far more than the tolerance."""
    task = problem(name, "float32")
    paths, treedef = jax.tree_util.tree_flatten_with_path(task.mask)
    base = task.explicit(0, 0).astype(np.float64)
    for i, (path, trained) in enumerate(paths):
        if not trained:
            continue
        alone = treedef.unflatten([j == i for j in range(len(paths))])
        change = np.abs(task.pairs(alone).astype(np.float64) - base).max()
        if jax.tree_util.keystr(path) in task.unused:
            assert change <= task.tolerance(base)
        else:
            assert change > 10 * task.tolerance(base), path


LOW_RANK = perturbations.low_rank(rank=4)
PRODUCTS = [
    "a_dict_of_arrays",
    "a_leaf_used_twice",
    "cast_to_bfloat16_first",
    "weight_decay",
    "concatenated_and_stacked",
    "reshaped_transposed_and_broadcast",
    "gathered_rows",
    "convolved",
    "contracted_by_einsum",
    "an_unrolled_recurrence",
    "jits_in_jits",
    "rematerialized",
    "a_gradient_penalty",
    "an_exported_program",
    "a_leaf_in_many_places",
    "a_branch_that_hands_leaves_on",
    *(n for n in CASES if n.startswith(("vmap", "scan", "nested_scans"))),
    *(n for n in CASES if n.startswith(("linen", "nnx", "fixed_point"))),
    *(n for n in CASES if "aqt" in n or "qwix" in n),
]


@pytest.mark.parametrize(
    ("name", "form"), every_row(5, zip(PRODUCTS, itertools.cycle(["int16", "float32"])))
)
def test_products_with_low_rank_perturbations(name, form):
    """They are taken apart: x (W + ε u vᵀ) = x W + ε (x u) vᵀ."""
    task = problem(name, form, LOW_RANK)
    vectorize = M if task.vmap else 1
    losses = estimate(task, vectorize, lambda losses, gradient: losses)
    assert_losses(losses, task.pairs(), task)


WAYS = {
    ("linen_mlp", "at use"): {"at use"},
    ("linen_mlp", "mixed"): {"first", "at use"},
    ("linen_mlp", "first"): {"first"},
    ("scan_with_leaves_as_constants", "at use"): {"at use"},
    ("scan_with_leaves_as_constants", "mixed"): {"first", "before"},
    ("nested_scans_over_stacked_stages", "at use"): {"at use"},
    ("a_branch_with_leaves_of_its_own", "at use"): {"at use"},
    ("while_with_leaves_in_the_carry", "at use"): {"before"},
    ("scan_that_trains_its_carry", "at use"): {"before"},
    ("an_unused_leaf", "at use"): {"at use", "unused"},
}


@pytest.mark.parametrize(("name", "way"), WAYS, indirect=["way"])
def test_leaves_go_the_way_that_is_tested(name, way):
    task, found = problem(name, "int8"), []

    def program(params, kwargs):
        found.extend(evaluation.explain(task.value_fn, params, Z, **kwargs))
        return 0

    jax.eval_shape(program, task.params, task.kwargs)
    assert {line.way for line in found} == WAYS[name, way]


SOME = [
    "frozen_integers_and_keys",
    "scan_over_stacked_layers",
    "a_branch_that_a_leaf_decides",
    "fixed_point_convolutions",
]


@pytest.mark.parametrize("name", every(2, SOME))
def test_keys_may_be_mapped_over(name):
    task = problem(name, "int8")
    keys = jnp.stack([sample_key(i) for i in range(M)])
    assert_losses(dual_losses(task, task.mask, keys), task.pairs(), task)


@pytest.mark.parametrize("name", every(4, SOME))
def test_vectorize_changes_no_coefficient(name):
    task = problem(name, "int8")
    plus, minus = task.pairs()
    coefficients = np.sign(plus - minus)
    assert np.any(coefficients != 0)

    def check(path, leaf, gradient, trained):
        if trained:
            path, shape = jax.tree_util.keystr(path), np.shape(leaf)
            total = sum(c * draw(i, path, shape) for i, c in enumerate(coefficients))
            steps = np.float32(task.epsilon) / np.asarray(leaf.scale)
            factor = np.where(np.rint(steps) > 0, steps / np.rint(steps), 0)
            expected = np.float32(total) * np.float32(Z.step / M) * np.float32(factor)
            # Two products and a quotient of float32.
            np.testing.assert_allclose(gradient.qvalue, expected, rtol=3e-7)

    first = None
    for vectorize in (1, 2, M):
        losses, gradient = estimate(task, vectorize, lambda *both: both)
        values = jax.tree.leaves(gradient)
        first = first or values
        for found, wanted in zip(values, first, strict=True):
            if jnp.issubdtype(found.dtype, jnp.number):
                np.testing.assert_array_equal(found, wanted)
        assert_losses(losses, np.stack([plus, minus]), task)
        jax.tree_util.tree_map_with_path(
            check, task.params, gradient, task.mask, is_leaf=is_qtensor
        )


# ------------------------------------------------------------ explicit perturbation


def many_kinds() -> dict[str, Any]:
    """A leaf of each kind, with values at the ends of the grids."""
    w = weights(w=(4, 3))["w"]
    w[0] = 127 / 64, -127 / 64, 1.5
    per_channel = np.float32([[2.0**-13, 2.0**-14, 2.0**-10]])
    limit = 2**15 - 1
    grid = np.clip(np.rint(w / per_channel), -limit, limit)
    return {
        "bfloat16": w.astype(jnp.bfloat16),
        "bits4": QTensor(np.int8([[7, -7, 3]]), np.float32(2.0**-2), 4),
        "empty": np.zeros((0, 3), np.float32),
        "float32": w,
        "int16": on_grid(w, 16),
        "int8": on_grid(w, 8),
        "per_channel": QTensor(grid.astype(np.int16), per_channel, 16),
        "scalar": np.float32(0.5),
        "simulated": QTensor(grid.astype(np.float32), per_channel, 16),
        "uneven": fgrad.quantize(jnp.asarray(w) * 0.7, bits=16, headroom=1.0),
    }


PERTURBATIONS = [
    Z,
    perturbations.normal(bits=4),
    perturbations.rademacher(),
    perturbations.binomial(),
    LOW_RANK,
    perturbations.low_rank(),
]


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=lambda p: p.name)
def test_perturb_is_equation_6(perturbation):
    params = many_kinds()
    mask = {name: name != "int8" for name in params}

    @fast_jit
    def program(params, sign):
        arguments = (params, sample_key(1), 0.25, perturbation)
        full = evaluation.perturb(*arguments, sign=sign)
        return full, evaluation.perturb(*arguments, sign=-1, mask=mask)

    full, masked = program(params, 1)
    for result, sign, used in ((full, 1, None), (masked, -1, mask)):
        expected = explicit(params, 1, 0.25, sign, used, perturbation)
        jax.tree.map(np.testing.assert_array_equal, result, expected)
        same = jax.tree.map(lambda a, b: a.dtype == b.dtype, result, expected)
        assert all(jax.tree.leaves(same))
    saturated = np.abs(np.asarray(full["int16"].qvalue)) == 2**15 - 1
    assert np.any(saturated) or isinstance(perturbation, perturbations.LowRank)


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=lambda p: p.name)
def test_any_perturbation_of_any_leaf(perturbation):
    params = many_kinds()

    def value_fn(p):
        return sum(size(jnp.asarray(leaf, jnp.float32)) for leaf in p.values())

    del params["uneven"]  # its value rounds, so that a sum depends on the order
    program = fast_jit(
        lambda p: fgrad.dual_forward(value_fn, p, sample_key(1), 0.25, perturbation)
    )
    for loss, sign in zip(program(params), (1, -1), strict=True):
        moved = explicit(params, 1, 0.25, sign, None, perturbation)
        expected = sum(
            np.abs(np.asarray(fgrad.dequantize(leaf), np.float64)).sum()
            for leaf in moved.values()
        )
        assert float(loss) == expected


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=lambda p: p.name)
def test_blocks_of_any_perturbation(perturbation):
    """A scan takes blocks of z that start anywhere in a random word."""
    params = weights(w=(2, 3, 3, 3), b=(2, 3, 3), v=(5, 3))

    def value_fn(p, x):
        def inner(total, layer):
            return total + size(x @ layer["w"] + layer["b"]), None

        def outer(total, layers):
            return lax.scan(inner, total, layers)

        total, _ = lax.scan(outer, 0.0, {"w": p["w"], "b": p["b"]})
        return (
            total + lax.scan(lambda t, row: (t + size(x @ row), None), 0.0, p["v"])[0]
        )

    x = integers(2, 3)
    program = fast_jit(
        lambda p: fgrad.dual_forward(
            value_fn, p, sample_key(1), 2.0**-4, perturbation, x=x
        )
    )
    for loss, sign in zip(program(params), (1, -1), strict=True):
        p = explicit(params, 1, 2.0**-4, sign, None, perturbation)
        expected = np.abs(x @ p["w"] + p["b"][:, :, None]).sum()
        assert float(loss) == expected + np.abs(x @ p["v"].T).sum()


# --------------------------------------------------------------- where it is called


def linear_loss(p: Any, x: Any) -> jax.Array:
    return size(affine(p, jnp.asarray(x)))


def linear_pair(params: Any, mask: Any = None, index: int = 0) -> list[float]:
    """Losses of `linear_loss` at explicitly perturbed parameters, in numpy."""
    losses = []
    for sign in (1, -1):
        p = fgrad.dequantize(explicit(params, index, 2.0**-4, sign, mask))
        losses.append(float(np.abs(affine(jax.tree.map(np.asarray, p), X)).sum()))
    return losses


def linear_dual(params: Any, key: Any = None, epsilon: Any = 2.0**-4, **options: Any):
    key = sample_key(0) if key is None else key
    return fgrad.dual_forward(linear_loss, params, key, epsilon, x=X, **options)


CALLS = {
    # A jit of linear_dual itself would remember the way that was traced first.
    "jitted": lambda p: fast_jit(lambda p: linear_dual(p))(p),
    "a traced epsilon": lambda p: fast_jit(lambda e: linear_dual(p, epsilon=e))(
        2.0**-4
    ),
    "eager": linear_dual,
    "in a scan": lambda p: [
        both[0]
        for both in lax.scan(
            lambda carry, key: (carry, linear_dual(p, key)),
            None,
            jnp.stack([sample_key(0), sample_key(1)]),
        )[1]
    ],
    "rematerialized": lambda p: jax.checkpoint(linear_dual)(p),
    "jax arrays": lambda p: linear_dual(jax.tree.map(jnp.array, p)),
}


@pytest.mark.parametrize("way", every(2, ["at use", "first"]), indirect=True)
@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("how", CALLS)
def test_it_is_the_same_wherever_it_is_called(how, bits):
    params = LINEAR()
    if bits:
        params = jax.tree.map(lambda leaf: on_grid(leaf, bits), params)
    assert [float(loss) for loss in CALLS[how](params)] == linear_pair(params)


@pytest.mark.slow
def test_it_runs_without_jit():
    params = {"w": on_grid(LINEAR()["w"], 8), "b": LINEAR()["b"]}
    key = sample_key(0)
    with jax.disable_jit():
        losses = linear_dual(params, key)
    assert [float(loss) for loss in losses] == linear_pair(params)


def test_a_uint32_key_is_the_threefry_key_of_its_words():
    key = jax.random.key(3)
    losses = linear_dual(LINEAR(), key)
    assert linear_dual(LINEAR(), jax.random.key_data(key)) == losses
    assert losses[0] != losses[1]


def test_its_shapes_can_be_asked_for():
    losses = jax.eval_shape(linear_dual, LINEAR())
    assert [(loss.shape, loss.dtype) for loss in losses] == [((), jnp.float32)] * 2


def mesh(**options: Any) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",), **options)


@pytest.mark.parametrize("weights_are_sharded", [False, True])
def test_it_runs_inside_a_shard_map(weights_are_sharded):
    """Data parallel: each device has its rows, and the loss is the sum of all."""
    spec = jax.sharding.PartitionSpec

    def program(p, x):
        def value_fn(p, x):
            return lax.psum(linear_loss(p, x), "d")

        return fgrad.dual_forward(value_fn, p, sample_key(0), 2.0**-4, x=x)

    sharded = jax.shard_map(
        program,
        mesh=mesh(),
        in_specs=(spec("d" if weights_are_sharded else None), spec("d")),
        out_specs=spec(),
    )
    params = LINEAR()
    assert [float(loss) for loss in fast_jit(sharded)(params, X)] == linear_pair(params)


def test_leaves_may_be_sharded_explicitly():
    explicit_mesh = mesh(axis_types=(jax.sharding.AxisType.Explicit,))
    params = LINEAR()
    with jax.set_mesh(explicit_mesh):
        spec = jax.sharding.PartitionSpec(None, "d")
        sharding = jax.sharding.NamedSharding(explicit_mesh, spec)
        placed = {**params, "w": jax.device_put(params["w"], sharding)}
        losses = fast_jit(linear_dual)(placed)
    assert [float(loss) for loss in losses] == linear_pair(params)


def test_it_may_be_mapped_over_parameters():
    several = [LINEAR(seed=seed) for seed in (1, 2)]
    losses = jax.vmap(linear_dual)(jax.tree.map(lambda *p: np.stack(p), *several))
    expected = [linear_pair(params) for params in several]
    np.testing.assert_array_equal(np.stack(losses, 1), expected)


def test_it_may_be_mapped_with_a_named_axis():
    def program(x):
        def value_fn(p):
            return lax.psum(linear_loss(p, x[None]), "batch")

        return fgrad.dual_forward(value_fn, params, sample_key(0), 2.0**-4)

    params = LINEAR()
    losses = fast_jit(jax.vmap(program, axis_name="batch"))(X)
    np.testing.assert_array_equal(losses, np.transpose([linear_pair(params)] * len(X)))


def test_leaves_of_64_bits():
    with jax.enable_x64(True):
        w = jnp.linspace(0, 1, 12, dtype=jnp.float64).reshape(4, 3)
        losses = fgrad.dual_forward(lambda w: size(X @ w), w, sample_key(0), 2.0**-4)
        assert losses[0].dtype == jnp.float64
    z = draw(0, "", (4, 3))
    # z itself is a float32, and 2**-9 z is one without rounding.
    w = np.linspace(0, 1, 12).reshape(4, 3)
    expected = [np.abs(X @ (w + sign * 2.0**-9 * z)).sum() for sign in (1, -1)]
    np.testing.assert_allclose(losses, expected, rtol=1e-14)


def test_no_parameters_at_all():
    losses = fgrad.dual_forward(lambda p, x: jnp.sum(x), {}, KEY, 0.1, x=X)
    assert [float(loss) for loss in losses] == [X.sum()] * 2


# ------------------------------------------------------------- what is a parameter


@pytest.mark.parametrize("jit", [fast_jit, lambda f: f], ids=["jit", "eager"])
def test_one_array_under_two_names_has_two_perturbations(jit):
    w = jnp.asarray(weights(w=(4, 3))["w"])

    @jit
    def pair(w):
        params = {"a": w, "b": w}
        return fgrad.dual_forward(
            lambda p: size(X @ p["a"] - X @ p["b"]), params, sample_key(0), 2.0**-4
        )

    moved = explicit({"a": w, "b": w}, 0, 2.0**-4, 1)
    expected = np.abs(X @ moved["a"] - X @ moved["b"]).sum()
    assert expected > 0
    assert float(pair(w)[0]) == expected


@pytest.mark.parametrize("jit", [fast_jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("how", ["closure", "argument"])
def test_the_start_that_a_loss_remembers_is_no_parameter(how, jit):
    """The distance to the start: its array is also that of the parameters."""

    @jit
    def pair(start):
        def value_fn(p, start=start):
            inner = jax.jit(lambda q: jax.tree.map(lambda a, b: size(a - b), q, start))
            return sum(jax.tree.leaves(inner(p)))

        kwargs = {"start": start} if how == "argument" else {}
        return fgrad.dual_forward(value_fn, start, sample_key(0), 2.0**-4, **kwargs)

    start = jax.tree.map(jnp.asarray, LINEAR())
    moved = explicit(start, 0, 2.0**-4, 1)
    expected = sum(np.abs(moved[name] - start[name]).sum() for name in start)
    assert [float(loss) for loss in pair(start)] == [expected] * 2


@pytest.mark.parametrize(
    "mask",
    [{"w": True, "b": False}, lambda p: {"w": True, "b": False}, False],
    ids=["tree", "function", "nothing"],
)
@pytest.mark.parametrize("bits", [0, 16])
def test_masks(mask, bits):
    params = LINEAR()
    if bits:
        params = jax.tree.map(lambda leaf: on_grid(leaf, bits), params)
    dual = fast_jit(functools.partial(linear_dual, mask=mask))
    losses = [float(loss) for loss in dual(params)]
    assert losses == linear_pair(params, mask)
    assert (losses[0] == losses[1]) == (mask is False)


def test_a_leaf_moves_alike_whatever_else_is_there():
    def value_fn(p):
        return size(X @ p["w"])

    few = {"w": weights(w=(4, 3))["w"]}
    more = {"a": np.ones(3, np.float32), **few, "z": [on_grid(np.ones(5), 8)]}
    dual = functools.partial(fgrad.dual_forward, value_fn, key=KEY, epsilon=2.0**-4)
    expected = [float(loss) for loss in dual(params=few)]
    for mask in (None, {"a": False, "w": True, "z": True}):
        losses = dual(params=more, mask=mask)
        assert [float(loss) for loss in losses] == expected


def test_frozen_leaves_arrive_as_they_are():
    """Outside jit a frozen leaf may decide shapes, as a mask says it is no weight."""
    ids = np.array([3, 1, 1])
    params = {"w": weights(w=(4, 3))["w"], "ids": ids, "n": 2}

    def value_fn(p):
        assert p["ids"] is ids
        return size(X[: p["n"]] @ p["w"]) * len(np.unique(p["ids"]))

    mask = {"w": True, "ids": False, "n": False}
    losses = fgrad.dual_forward(value_fn, params, sample_key(0), 2.0**-4, mask=mask)
    w = explicit(params, 0, 2.0**-4, 1, mask)["w"]
    assert float(losses[0]) == 2 * np.abs(X[:2] @ w).sum()


# -------------------------------------------------------------- the loss's arguments


def test_arguments_arrive_as_they_are():
    given = {
        "text": "mean",
        "none": None,
        "number": 3,
        "flag": True,
        "function": jnp.tanh,
        "numpy": np.array([2, 0, 2]),
        "concrete": jnp.array(2),
        "key": jax.random.key(1),
        "tree": {"a": (X, [None, "b"])},
    }
    seen = {}

    def value_fn(w, **kwargs):
        seen.update(kwargs)
        y = kwargs["function"](w[: kwargs["number"]]).reshape(kwargs["number"], -1)
        assert len(np.unique(kwargs["numpy"])) == int(kwargs["concrete"])
        return getattr(jnp, kwargs["text"])(y) if kwargs["flag"] else None

    w = weights(w=(4, 3))["w"]
    renamed = {"rng" if name == "key" else name: v for name, v in given.items()}
    plus, minus = fgrad.dual_forward(value_fn, w, sample_key(0), 0.1, **renamed)
    assert float(plus) != float(minus)
    assert set(seen) == set(renamed)
    assert all(seen[name] is renamed[name] for name in renamed)


class Model:
    def loss(self, p: Any, x: Any) -> jax.Array:
        return linear_loss(p, x)

    __call__ = loss


@pytest.mark.parametrize(
    ("value_fn", "kwargs"),
    [
        (functools.partial(linear_loss, x=X), {}),
        (Model().loss, {"x": X}),
        (Model(), {"x": X}),
        (lambda p, /, *, x: linear_loss(p, x), {"x": X}),
        (
            jax.jit(
                lambda p, x, rows: linear_loss(p, x[:rows]), static_argnames="rows"
            ),
            {"x": X, "rows": 3},
        ),
        (jax.vmap(linear_loss, (None, 0)), None),
    ],
    ids=["partial", "method", "object", "keyword only", "static argument", "vmap"],
)
def test_a_loss_may_be_any_callable(value_fn, kwargs):
    params = LINEAR()
    if kwargs is None:  # per-example losses, reduced
        per_example, kwargs = value_fn, {"x": X[:, None]}

        def value_fn(p, x):
            return jnp.sum(per_example(p, x))

    losses = fgrad.dual_forward(value_fn, params, sample_key(0), 2.0**-4, **kwargs)
    assert [float(loss) for loss in losses] == linear_pair(params)


# --------------------------------------------------------------- what a loss returns


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.int8]
)
def test_losses_keep_their_dtype(dtype):
    losses = jax.eval_shape(
        lambda w: fgrad.dual_forward(lambda w: w[0].astype(dtype), w, KEY, 0.1),
        jnp.ones(3),
    )
    assert [(loss.shape, loss.dtype) for loss in losses] == [((), dtype)] * 2


@pytest.mark.parametrize("constant", [2.0, 3, np.float32(2.0), np.zeros(())])
def test_a_loss_may_be_a_constant(constant):
    losses = fgrad.dual_forward(lambda w: constant, jnp.ones(3), KEY, 0.1)
    assert [float(loss) for loss in losses] == [constant] * 2


@pytest.mark.parametrize(
    ("value_fn", "message"),
    [
        (lambda w: w, r"must return a scalar loss, got shape \(3,\)"),
        (lambda w: w[:1], r"must return a scalar loss, got shape \(1,\)"),
        (lambda w: (w[0], w[1]), "must return a scalar loss, got a tuple"),
        (lambda w: {"loss": w[0]}, "must return a scalar loss, got a dict"),
        (lambda w: w[0] > 0, "must return a real loss, got dtype bool"),
        (lambda w: w[0].astype(jnp.uint8), "a real loss, got dtype uint8"),
        (lambda w: w[0] * 1j, "must return a real loss, got dtype complex64"),
    ],
)
@pytest.mark.parametrize("jit", [fast_jit, lambda f: f], ids=["jit", "eager"])
def test_a_loss_that_is_no_real_scalar(value_fn, message, jit):
    with pytest.raises(TypeError, match=message):
        jit(lambda w: fgrad.dual_forward(value_fn, w, KEY, 0.1))(jnp.ones(3))


def test_errors_of_the_loss_are_its_own():
    class OwnError(Exception):
        pass

    def value_fn(w, x):
        raise OwnError("as it was raised")

    with pytest.raises(OwnError, match="as it was raised"):
        fgrad.dual_forward(value_fn, jnp.ones(3), KEY, 0.1, x=X)
    with pytest.raises(TypeError, match=r"y=.*which value_fn does not take"):
        fgrad.dual_forward(value_fn, jnp.ones(3), KEY, 0.1, y=X)
    with pytest.raises(TypeError, match="dot_general"):
        fgrad.dual_forward(lambda w: jnp.sum(X @ w), jnp.ones(3), KEY, 0.1)


def test_a_loss_that_asks_for_values_is_told_that_they_are_traced():
    def value_fn(w):
        return w[0] if w[0] > 0 else -w[0]

    with pytest.raises(jax.errors.TracerBoolConversionError):
        fgrad.dual_forward(value_fn, jnp.ones(3), KEY, 0.1)


# -------------------------------------------------------------------------- effects


def reports() -> tuple[list[bytes], Callable[..., None]]:
    """What a callback saw, and the callback."""
    seen: list[bytes] = []
    return seen, lambda value: seen.append(np.asarray(value).tobytes())


def moved_weights(count: int) -> tuple[np.ndarray, list[bytes]]:
    """A leaf, and its values at both ends of the first directions."""
    w = weights(w=(4, 3))["w"]
    pairs = itertools.product(range(count), (1, -1))
    return w, [explicit(w, i, 2.0**-4, sign).tobytes() for i, sign in pairs]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("jit", [fast_jit, lambda f: f], ids=["jit", "eager"])
def test_a_callback_runs_once_per_evaluation(ordered, jit):
    seen, report = reports()

    def value_fn(w):
        jax.debug.callback(report, w, ordered=ordered)
        return size(w)

    w, expected = moved_weights(1)
    jit(lambda w: fgrad.dual_forward(value_fn, w, sample_key(0), 2.0**-4))(w)
    jax.effects_barrier()
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("vectorize", [1, 2, M])
def test_a_callback_runs_once_per_evaluation_of_every_direction(vectorize):
    seen, report = reports()

    def value_fn(w):
        jax.debug.callback(report, w)
        return size(w)

    w, expected = moved_weights(M)
    run = functools.partial(
        estimators.forward_gradient,
        value_fn,
        key=KEY,
        epsilon=2.0**-4,
        num_perturbations=M,
        vectorize=vectorize,
    )
    fast_jit(lambda w: run(w).loss)(w)
    jax.effects_barrier()
    assert sorted(seen) == sorted(expected)


def test_a_callback_in_a_loop_runs_once_per_step():
    seen, report = reports()

    def value_fn(w):
        def body(total, row):
            jax.debug.callback(report, w)
            return total + size(row @ w), None

        def branch(w):
            jax.debug.callback(report, w)
            return size(w)

        total, _ = lax.scan(body, 0.0, jnp.asarray(X))
        return total + lax.cond(jnp.sum(w) > 1e9, jnp.sum, branch, w)

    w, expected = moved_weights(1)
    fgrad.dual_forward(value_fn, w, sample_key(0), 2.0**-4)
    jax.effects_barrier()
    assert sorted(seen) == sorted((len(X) + 1) * expected)


def test_a_loss_that_the_host_computes():
    seen, report = reports()

    def host(w):
        report(w)
        return np.abs(np.asarray(w)).sum()

    def value_fn(w):
        return io_callback(host, jax.ShapeDtypeStruct((), jnp.float32), w, ordered=True)

    w, expected = moved_weights(1)
    losses = fgrad.dual_forward(value_fn, w, sample_key(0), 2.0**-4)
    values = [np.abs(explicit(w, 0, 2.0**-4, sign)).sum() for sign in (1, -1)]
    assert [float(loss) for loss in losses] == values
    assert sorted(seen) == sorted(expected)


def test_a_loss_prints_once_per_evaluation(capfd):
    def value_fn(w):
        loss = size(w)
        jax.debug.print("loss {}", loss)
        return loss

    w, _ = moved_weights(1)
    losses = fgrad.dual_forward(value_fn, w, sample_key(0), 2.0**-4)
    jax.effects_barrier()
    lines = capfd.readouterr().out.split("\n")
    assert sorted(lines) == sorted(["", *(f"loss {float(loss)}" for loss in losses)])
