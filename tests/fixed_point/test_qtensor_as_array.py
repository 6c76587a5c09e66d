"""A QTensor is, to all that asks for an array, the array of its dequantized values.

The oracle is NumPy on ``scale * qvalue``, computed by NumPy.
"""

import copy
import operator
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lanes import every

import fgrad
from fgrad import fixed_point
from fgrad.fixed_point import QTensor, array_like

FUZZ_ROUNDS = 20 if os.environ.get("FGRAD_FUZZ") else 1


def tensor(seed=0, shape=(3, 3), bits=16, channel_axis=None):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    x.reshape(-1)[:1] = 0
    return fixed_point.quantize(jnp.array(x), bits, channel_axis=channel_axis)


def value_of(q):
    return np.asarray(q.qvalue, np.float32) * np.asarray(q.scale)


def assert_same(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    if got.dtype == bool or not np.issubdtype(got.dtype, np.inexact):
        np.testing.assert_array_equal(got, expected)
    else:
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


# The issue's own example.


def test_the_usual_penalties_read_values():
    q = fixed_point.quantize(jnp.array([[0.0, 1, -2], [3, 0, 1]]), headroom=1.0)
    assert jnp.sum(q != 0) == 4
    assert (q == q).all()
    assert [row.shape for row in q] == [(3,), (3,)]
    np.testing.assert_allclose(jnp.sum(q**2), 15, rtol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(q), 15**0.5, rtol=1e-4)
    assert np.asarray(q).dtype == np.float32


# ------------------------------------------------------------------------- operators

BINARY = """
add sub mul truediv floordiv mod pow matmul eq ne lt le gt ge
"""


@pytest.mark.parametrize("name", BINARY.split())
@pytest.mark.parametrize("kind", ["jax", "numpy", "qtensor", "numpy_scalar"])
def test_operators_are_those_of_the_value(name, kind):
    function = getattr(operator, name)
    q, value = abs(tensor()), None
    q = fixed_point.quantize(q + 0.5)
    value = value_of(q)
    other = np.random.default_rng(1).uniform(0.5, 2, (3, 3)).astype(np.float32)
    given = {
        "jax": jnp.array(other),
        "numpy": other,
        "qtensor": fixed_point.quantize(jnp.array(other)),
        "numpy_scalar": np.float32(0.75),
    }[kind]
    if kind == "numpy_scalar" and name == "matmul":
        pytest.skip("a scalar is no operand of a matrix product")
    known = value_of(given) if kind == "qtensor" else np.asarray(given)
    assert_same(function(q, given), function(value, known))
    assert_same(function(given, q), function(known, value))


def test_a_tensor_equals_itself_everywhere():
    q = tensor()
    assert_same(q == value_of(q), np.full((3, 3), True))
    assert_same(value_of(q) != q, np.full((3, 3), False))
    assert (q == "text") is False


@pytest.mark.parametrize("function", [abs, operator.neg, operator.pos, round])
def test_unary_operators(function):
    q = tensor(2)
    expected = np.round(value_of(q)) if function is round else function(value_of(q))
    assert_same(function(q), expected)


def test_divmod_both_ways():
    q = fixed_point.quantize(jnp.array([1.0, 2.0, 3.5]))
    for got, expected in zip(divmod(q, 0.75), divmod(value_of(q), 0.75), strict=True):
        assert_same(got, expected)
    for got, expected in zip(divmod(5.0, q), divmod(5.0, value_of(q)), strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("convert", [float, int, bool, complex])
def test_conversions_of_a_scalar(convert):
    q = fixed_point.quantize(jnp.float32(2.75))
    assert convert(q) == convert(float(value_of(q)))


def test_what_has_no_answer_raises_as_arrays_do():
    q, scalar = tensor(), fixed_point.quantize(jnp.float32(1.5))
    with pytest.raises(ValueError, match="ambiguous"):
        bool(q)
    with pytest.raises(TypeError):
        float(q)
    with pytest.raises(TypeError):
        operator.index(scalar)
    with pytest.raises(TypeError, match="without axes"):
        len(scalar)
    with pytest.raises(TypeError):
        iter(scalar)
    with pytest.raises(TypeError, match="unhashable"):
        hash(q)
    with pytest.raises(TypeError):
        q[0] = 1.0


def test_len_iteration_membership_and_reversal():
    q = tensor(3, (4, 2))
    value = value_of(q)
    assert len(q) == 4
    assert_same(np.stack(list(q)), value)
    assert_same(np.stack(list(reversed(q))), value[::-1])
    assert float(value[1, 1]) in q
    assert 1234.5 not in q


# ---------------------------------------------------------------- methods, and copies


@pytest.mark.parametrize("name", sorted(array_like.OF_THE_VALUE))
def test_methods_of_the_value_are_there(name):
    q = tensor(4)
    array = jnp.array(value_of(q))
    got, expected = getattr(q, name), getattr(array, name)
    assert callable(got) == callable(expected)


def test_methods_compute_what_numpy_does():
    q = tensor(5, (3, 4))
    value = value_of(q)
    assert_same(q.T, value.T)
    assert_same(q.mT, value.mT)
    assert_same(q.sum(0), value.sum(0))
    assert_same(q.mean(-1, keepdims=True), value.mean(-1, keepdims=True))
    assert_same(q.astype(jnp.int32), value.astype(np.int32))
    assert_same(q.at[1].set(0.0)[1], np.zeros(4))
    for name in ("flatten", "ravel", "squeeze", "max", "min", "argmax", "std"):
        assert_same(getattr(q, name)(), getattr(value, name)())
    assert_same(q.reshape(2, 6), value.reshape(2, 6))
    assert_same(q.transpose(1, 0), value.transpose(1, 0))
    assert_same(q.dot(value.T), value.dot(value.T))
    assert q.tolist() == value.tolist()
    assert q[0, 0].item() == value[0, 0]


@pytest.mark.parametrize("name", sorted(array_like.OF_MEMORY))
def test_questions_of_memory_are_sent_to_the_parts(name):
    with pytest.raises(AttributeError, match=f"q.qvalue.{name}"):
        getattr(tensor(), name)


def test_unknown_names_raise_with_advice():
    with pytest.raises(AttributeError, match=r"q\.dequantize\(\)\.median"):
        _ = tensor().median
    assert "sum" in dir(tensor())


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))]
)
def test_copies_are_qtensors(duplicate):
    q = tensor(6, bits=12, channel_axis=-1)
    same = duplicate(q)
    assert isinstance(same, QTensor)
    assert same.bits == 12
    np.testing.assert_array_equal(same.qvalue, q.qvalue)
    np.testing.assert_array_equal(same.scale, q.scale)


def test_formats():
    q = fixed_point.quantize(jnp.float32(1.5))
    assert f"{q:.2f}" == "1.50"
    assert f"{q}" == repr(q)
    assert repr(q).startswith("QTensor(qvalue=Array(")


# ---------------------------------------------------------------------------- NumPy


def test_numpy_reads_values():
    q = tensor(7)
    value = value_of(q)
    assert_same(np.asarray(q), value)
    assert np.asarray(q, np.float64).dtype == np.float64
    written = np.array(q)
    written[0, 0] = 5  # a copy of its own
    assert_same(q, value)
    for function in (np.sin, np.sum, np.linalg.norm, np.transpose, np.sort, np.ravel):
        assert_same(function(q), function(value))
    assert_same(np.add(q, value), value + value)
    with pytest.raises(ValueError, match="copy"):
        np.asarray(q, copy=False)
    assert q.__array_namespace__() is jnp


def test_a_traced_tensor_cannot_become_a_numpy_array():
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(np.asarray)(tensor())


def test_jax_lax_refuses_it_loudly():
    q = tensor()
    for function in (jax.lax.dot, jax.lax.add, jax.lax.max):
        with pytest.raises((TypeError, ValueError)):
            function(q, q)
    assert_same(jax.lax.dot(jnp.asarray(q), jnp.asarray(q)), value_of(q) @ value_of(q))


# ------------------------------------------------ a fuzz over the array API's functions

ELEMENTWISE = """
abs acos acosh asin asinh atan atanh ceil conj cos cosh exp expm1 floor imag
isfinite isinf isnan log log1p log2 log10 logical_not negative positive real
reciprocal round sign signbit sin sinh sqrt square tan tanh trunc
"""
OF_TWO = """
add arctan2 copysign divide equal floor_divide greater greater_equal hypot less
less_equal logaddexp logical_and logical_or logical_xor matmul maximum minimum
multiply nextafter not_equal pow remainder subtract tensordot vecdot dot inner outer
kron allclose array_equal isclose
"""
REDUCTIONS = """
all any argmax argmin count_nonzero cumsum cumprod max mean min prod std sum var
median argsort sort flip ptp diff
"""
SHAPES = """
atleast_2d diagonal diag expand_dims fliplr flipud matrix_transpose moveaxis ravel
repeat reshape roll rot90 squeeze swapaxes tile trace transpose tril triu zeros_like
ones_like full_like broadcast_to permute_dims pad unstack nonzero take searchsorted
where clip concat stack hstack vstack unique_values split array_split
"""
FUNCTIONS = ELEMENTWISE + OF_TWO + REDUCTIONS + SHAPES
ARGUMENTS = {
    "expand_dims": (1,),
    "moveaxis": (0, 1),
    "repeat": (2,),
    "reshape": ((1, 9),),
    "roll": (2,),
    "swapaxes": (0, 1),
    "tile": ((2, 1),),
    "broadcast_to": ((2, 3, 3),),
    "permute_dims": ((1, 0),),
    "pad": (1,),
    "take": (np.array([2, 0]),),
    "clip": (-0.5, 0.5),
    "full_like": (2.0,),
    "split": (3,),
    "array_split": (2,),
}


def called(module, name, x, y):
    """The result of a function of the array API on the arrays x and y."""
    function = getattr(module, name)
    if name in OF_TWO.split():
        return function(x, y)
    if name == "where":
        return function(y > 0, x, y)
    if name in ("concat", "stack", "hstack", "vstack"):
        return function([x, y])
    if name == "searchsorted":
        return function(x[0], y)
    return function(x, *ARGUMENTS.get(name, ()))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", every(3, FUNCTIONS.split()))
def test_functions_of_the_array_api(name):
    rng = np.random.default_rng(sum(map(ord, name)))
    for round_ in range(FUZZ_ROUNDS):
        axis = (None, 0, -1)[rng.integers(3)]
        bits = (4, 8, 12, 16)[rng.integers(4)]
        x = tensor(int(rng.integers(2**31)), bits=bits, channel_axis=axis)
        y = tensor(int(rng.integers(2**31)), bits=8)
        if name == "searchsorted":
            x = fixed_point.quantize(jnp.sort(x, axis=1), headroom=1.0)
        values = value_of(x), value_of(y)
        # JAX's function of the values, by NumPy's arithmetic of the tensor...
        expected = called(jnp, name, *map(jnp.array, values))
        got = called(jnp, name, x, y)
        jax.tree.map(assert_same, got, expected)
        # ... and NumPy's own of the tensor, where there is one that takes JAX's arrays.
        if round_ == 0 and hasattr(np, name) and name != "take":
            got, expected = called(np, name, x, y), called(np, name, *values)
            jax.tree.map(assert_same, got, expected)


# --------------------------------------------------------------- tensors that cannot be


@pytest.mark.parametrize("bits", [1, 17, 64, -8])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(ValueError, match="bits must lie in"):
        QTensor(jnp.ones(2, jnp.int16), jnp.float32(1), bits)


@pytest.mark.parametrize("bits", ["8", 8.0])
def test_bits_are_an_integer(bits):
    with pytest.raises(TypeError, match="bits must be an integer"):
        QTensor(jnp.ones(2, jnp.int16), jnp.float32(1), bits)


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.int8, 16), (jnp.int8, 9)])
def test_a_grid_that_does_not_fit_its_storage_is_refused(dtype, bits):
    with pytest.raises(ValueError, match="do not fit"):
        QTensor(jnp.ones(2, dtype), jnp.float32(1), bits)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bool_, jnp.complex64])
def test_storage_of_another_kind_is_refused(dtype):
    with pytest.raises(TypeError, match="signed integers"):
        QTensor(jnp.ones(2, dtype), jnp.float32(1), 8)


@pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 2), (1, 1, 3), (4, 3)])
def test_scales_of_a_shape_that_does_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"of length 1 or that of the tensor"):
        QTensor(jnp.ones((3, 3), jnp.int8), jnp.ones(shape))
    for fits in ((), (1, 3), (3, 1), (3, 3), (1, 1)):
        QTensor(jnp.ones((3, 3), jnp.int8), jnp.ones(fits))


def test_scales_are_floats():
    with pytest.raises(TypeError, match="scale of a QTensor is a float"):
        QTensor(jnp.ones(2, jnp.int8), jnp.int32(1))
    q = QTensor(jnp.ones(2, jnp.int8), 0.5)
    assert q.dtype == jnp.float32
    assert_same(q, [0.5, 0.5])


def test_tree_maps_may_put_anything_in_the_place_of_the_parts():
    q = tensor(8, (3, 4), channel_axis=-1)
    for function in (jnp.ravel, jnp.shape, jnp.sum, lambda x: None, lambda x: x == 0):
        assert isinstance(jax.tree.map(function, q), QTensor)
    axes = QTensor(0, None, 16)
    assert jax.vmap(lambda q: q.qvalue, in_axes=(axes,))(q).shape == (3, 4)


@pytest.mark.parametrize(
    ("qvalue", "scale", "words"),
    [
        (np.int8([1]), np.float32(-1), "positive and finite, got -1"),
        (np.int8([1]), np.float32(0), "positive and finite, got 0"),
        (np.int8([1]), np.float32(np.nan), "positive and finite, got nan"),
        (np.int8([1]), np.float32(np.inf), "positive and finite, got inf"),
        (np.int8([1, -128]), np.float32(1), "holds -128, outside the grid"),
        (np.float32([1, 200]), np.float32(1), "holds 200, outside the grid"),
        (np.float32([1, np.nan]), np.float32(1), "holds nan, outside the grid"),
        (np.float32([1, 0.5]), np.float32(1), "fractions"),
    ],
)
def test_check_values_names_the_leaf_and_the_number(qvalue, scale, words):
    for array in (np.asarray, jnp.asarray):
        with pytest.raises(ValueError, match=f"leaf 'a/w' .*{words}"):
            fixed_point.check_values(QTensor(array(qvalue), array(scale), 8), "a/w")


@pytest.mark.parametrize(
    ("qvalue", "scale", "words"),
    [
        (np.int8([1]), 1.0, "its scale must be an array, got a float"),
        ([1], np.float32(1), "its qvalue must be an array, got a list"),
        (np.int8([1]), np.int32(1), "is a float array, got dtype int32"),
        (np.int8([1, 2]), np.ones(3, np.float32), r"got shape \(3,\)"),
        (np.uint8([1]), np.float32(1), "signed integers, got dtype uint8"),
        (np.int16([1]), np.float32(1), "kept in int8, and its qvalue is int16"),
        (jax.ShapeDtypeStruct((1,), jnp.int16), np.float32(1), "kept in int8"),
    ],
)
def test_check_values_looks_at_what_tree_maps_may_put_in(qvalue, scale, words):
    structure = jax.tree.structure(QTensor(np.int8([1]), np.float32(1)))
    q = jax.tree.unflatten(structure, (qvalue, scale))
    with pytest.raises(ValueError, match=f"leaf 'w' is no tensor on a grid: .*{words}"):
        fixed_point.check_values(q, "w")


def test_check_values_accepts_grids_and_passes_over_what_is_traced():
    for q in (tensor(), tensor(bits=4), tensor(channel_axis=0), tensor(shape=(0, 3))):
        fixed_point.check_values(q, "w")
        jax.jit(lambda q: fixed_point.check_values(q, "w"))(q)
    fixed_point.check_values(jax.eval_shape(tensor), "w")


# -------------------------------------------------------------------------- quantize


@pytest.mark.parametrize("bits", every(3, [4, 8, 16]))
@pytest.mark.parametrize(
    "calibration",
    [fixed_point.abs_max, fixed_point.percentile(100), fixed_point.mse_optimal()],
)
@pytest.mark.parametrize("largest", [3e38, 3.4028235e38, 1.0, 1e-30])
def test_any_magnitude_of_float32_has_a_grid(bits, calibration, largest):
    x = np.float32(largest) * np.float32([1, -0.5, 0.25])
    q = fixed_point.quantize(jnp.array(x), bits, calibration=calibration)
    fixed_point.check_values(q, "w")
    value = value_of(q).astype(np.float64)
    assert np.isfinite(value).all()
    np.testing.assert_allclose(
        value / largest, [1, -0.5, 0.25], atol=0.8 / 2 ** (bits - 1)
    )


def test_a_value_beyond_the_grid_is_named():
    with pytest.raises(ValueError, match="magnitude 3e\\+38, but a grid of 2 bits"):
        fixed_point.quantize({"w": jnp.float32(3e38)}, 2)
    with pytest.raises(ValueError, match="beyond float32"):
        fixed_point.quantize({"w": np.array([1e300])})


@pytest.mark.parametrize("shape", every(3, [(0,), (0, 3), (3, 0)]))
@pytest.mark.parametrize("channel_axis", [None, -1])
def test_leaves_without_elements_quantize_and_train(shape, channel_axis):
    params = {"empty": jnp.zeros(shape), "w": jnp.array([1.0, -2.0])}
    params = fixed_point.quantize(params, channel_axis=channel_axis)
    assert params["empty"].shape == shape
    assert (np.asarray(params["empty"].scale) > 0).all()
    tx = fgrad.qzo_ff(0.1, jax.random.key(0), epsilon=0.1)

    def loss_fn(params):
        return jnp.sum(params["w"] ** 2) + jnp.sum(params["empty"])

    updates, _ = tx.update(params, tx.init(params), params, value_fn=loss_fn)
    after = optax.apply_updates(params, updates)
    assert after["empty"].shape == shape
    assert (after["w"].qvalue != params["w"].qvalue).any()


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ("abs_max", "must be a function.*got 'abs_max'"),
        (99.9, "must be a function"),
        (fixed_point.percentile, r"pass fgrad.fixed_point.percentile\(99.9\)"),
        (fixed_point.mse_optimal, r"pass fgrad.fixed_point.mse_optimal\(\)"),
    ],
)
def test_what_is_no_calibration_is_refused(calibration, words):
    with pytest.raises(TypeError, match=words):
        fixed_point.quantize(jnp.ones(3), calibration=calibration)


@pytest.mark.parametrize("name", ["headroom", "zero_bound"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_headroom_and_zero_bound_are_positive_and_finite(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
        fixed_point.quantize(jnp.ones(3), **{name: value})


def test_leaves_that_are_no_floats_stay_as_they_are():
    tree = {"f": jax.nn.relu, "s": "text", "n": None, "c": jnp.array(1j), "i": 3}
    quantized = fixed_point.quantize({**tree, "w": jnp.ones(2)})
    assert isinstance(quantized.pop("w"), QTensor)
    for name, leaf in tree.items():
        assert quantized[name] is leaf
    f8 = fixed_point.quantize(jnp.array([1.0, -0.5], jnp.float8_e4m3fn), headroom=1.0)
    assert_same(f8, [1.0, -0.5])


def test_an_equinox_model_keeps_its_functions():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    quantized = fixed_point.quantize(model)
    x = jnp.array([0.5, -1.0])
    np.testing.assert_allclose(quantized(x), model(x), rtol=1e-3, atol=1e-4)
    params, static = eqx.partition(quantized, eqx.is_array)
    np.testing.assert_array_equal(eqx.combine(params, static)(x), quantized(x))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    whole = eqx.combine(
        fixed_point.quantize(params), static, is_leaf=fixed_point.is_qtensor
    )
    np.testing.assert_array_equal(whole(x), quantized(x))
