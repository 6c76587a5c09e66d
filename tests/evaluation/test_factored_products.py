"""Base product plus correction against the product with the perturbed weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from lanes import every

import fgrad
from fgrad import evaluation, perturbations
from fgrad.evaluation import factored_products
from fgrad.fixed_point import QTensor, products
from fgrad.leaves import Plan, Policy

KEY = jax.random.key(0)
EPSILON = 0.25  # large against the weights, so that an error in z shows


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def ways(value_fn, params, rank=1):
    lines = evaluation.explain(value_fn, params, perturbations.low_rank(rank))
    return {line.name: line.way for line in lines}


def assert_equals_dense(value_fn, params, rank, rtol=2e-5):
    """The evaluator's losses are those at the explicitly perturbed parameters."""
    z = perturbations.low_rank(rank)
    got = jax.jit(lambda p: fgrad.dual_forward(value_fn, p, KEY, EPSILON, z))(params)
    for loss, sign in zip(got, (1, -1), strict=True):
        perturbed = evaluation.perturb(params, KEY, EPSILON, z, sign=sign)
        np.testing.assert_allclose(loss, value_fn(perturbed), rtol=rtol)
    assert abs(got[0] - got[1]) > 1e-3 * abs(got[0])  # the perturbation does something


def weighed(y):
    """A scalar that tells every element of y from every other."""
    return jnp.sum(jnp.sin(jnp.arange(y.size)).reshape(y.shape) * y) + 3.0


DOTS = {
    # name: shape of x, shape of w, dimension numbers, weight on the left
    "dense": ((4, 6), (6, 5), (((1,), (0,)), ((), ())), False),
    "transposed": ((4, 6), (5, 6), (((1,), (1,)), ((), ())), False),
    "weight_first": ((4, 6), (5, 6), (((1,), (1,)), ((), ())), True),
    "heads": ((2, 4, 6), (6, 3, 5), (((2,), (0,)), ((), ())), False),
    "from_heads": ((2, 4, 3, 5), (3, 5, 6), (((2, 3), (0, 1)), ((), ())), False),
    "all_contracted": ((2, 6, 5), (6, 5), (((1, 2), (0, 1)), ((), ())), False),
    "batched": ((3, 4, 6), (3, 6, 5), (((2,), (1,)), ((0,), (0,))), False),
    "batched_by_the_last": ((5, 4, 6), (6, 5), (((2,), (0,)), ((0,), (1,))), False),
    "vector_of_inputs": ((6,), (6, 5), (((0,), (0,)), ((), ())), False),
    "one_output": ((4, 6), (6, 1), (((1,), (0,)), ((), ())), False),
}
every_dot = pytest.mark.parametrize("case", every(3, DOTS))


def swapped(numbers):
    return tuple(tuple(pair[::-1]) for pair in numbers)


@every_dot
@pytest.mark.parametrize("rank", every(2, [3, 1]))
def test_dot_general_of_floats(case, rank):
    x_shape, w_shape, numbers, first = DOTS[case]
    x, params = normal(1, x_shape), {"w": normal(2, w_shape)}

    def value_fn(p):
        if first:
            return weighed(lax.dot_general(p["w"], x, swapped(numbers)))
        return weighed(lax.dot_general(x, p["w"], numbers))

    assert ways(value_fn, params, rank) == {"w": "low rank"}
    assert_equals_dense(value_fn, params, rank)


@every_dot
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channel_axis", every(2, [-1, None]))
def test_dot_general_of_integers(case, bits, channel_axis):
    x_shape, w_shape, numbers, first = DOTS[case]
    contracts_last = len(w_shape) - 1 in numbers[0][1]
    if first or (channel_axis is not None and contracts_last):
        pytest.skip("weights come second, and their scales are not contracted")
    x = QTensor(jnp.round(40 * normal(1, x_shape)).astype(jnp.int8), jnp.float32(0.02))
    params = fgrad.quantize(
        {"w": normal(2, w_shape)}, bits=bits, channel_axis=channel_axis
    )

    def value_fn(p):
        return weighed(products.dot_general(x, p["w"], numbers))

    assert ways(value_fn, params) == {"w": "low rank"}
    assert_equals_dense(value_fn, params, rank=2)


CONVS = {
    # name: shape of x, shape of w (HWIO), strides, padding, dilation of w
    "same": ((2, 6, 7, 3), (3, 3, 3, 4), (1, 1), "SAME", (1, 1)),
    "strided": ((2, 6, 7, 3), (3, 2, 3, 4), (2, 3), "SAME", (1, 1)),
    "valid": ((2, 6, 7, 3), (3, 2, 3, 4), (1, 2), "VALID", (1, 1)),
    "dilated": ((2, 9, 9, 3), (3, 3, 3, 4), (1, 1), "SAME", (2, 2)),
    "one_by_one": ((2, 6, 7, 3), (1, 1, 3, 4), (1, 1), "SAME", (1, 1)),
    "patches": ((2, 9, 8, 3), (4, 4, 3, 4), (4, 4), "VALID", (1, 1)),
    "dilated_patches": ((2, 9, 9, 3), (3, 3, 3, 4), (3, 3), "VALID", (2, 2)),
    "negative_padding": ((2, 6, 7, 3), (3, 3, 3, 4), (1, 1), ((-1, 2), (1, 0)), (1, 1)),
    "one_dimension": ((2, 9, 3), (3, 3, 4), (2,), "SAME", (1,)),
}
LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}


@pytest.mark.parametrize("case", every(3, CONVS))
@pytest.mark.parametrize("bits", [None, 8, 16])
def test_conv_general_dilated(case, bits):
    x_shape, w_shape, strides, padding, dilation = CONVS[case]
    x, params = normal(1, x_shape), {"w": normal(2, w_shape)}
    settings = {
        "window_strides": strides,
        "padding": padding,
        "rhs_dilation": dilation,
        "dimension_numbers": LAYOUTS[len(strides)],
    }
    conv = lax.conv_general_dilated
    if bits:
        params = fgrad.quantize(params, bits=bits, channel_axis=-1)
        x = QTensor(jnp.round(40 * x).astype(jnp.int8), jnp.float32(0.02))
        conv = products.conv_general_dilated

    def value_fn(p):
        return weighed(conv(x, p["w"], **settings))

    assert ways(value_fn, params) == {"w": "low rank"}
    assert_equals_dense(value_fn, params, rank=2)


def test_an_output_layout_with_channels_first():
    x, params = normal(1, (2, 3, 6, 7)), {"w": normal(2, (3, 3, 3, 4))}

    def value_fn(p):
        numbers = ("NCHW", "HWIO", "NCHW")
        y = lax.conv_general_dilated(
            x, p["w"], (2, 1), "SAME", dimension_numbers=numbers
        )
        return weighed(y)

    assert ways(value_fn, params) == {"w": "low rank"}
    assert_equals_dense(value_fn, params, rank=2)


@pytest.mark.parametrize(
    ("w_shape", "settings"),
    [
        # v would lie along the width of the window.
        ((4, 3, 3, 3), {"dimension_numbers": ("NHWC", "OIHW", "NHWC")}),
        ((3, 3, 1, 6), {"feature_group_count": 3}),
        ((3, 3, 3, 4), {"lhs_dilation": (2, 2)}),
    ],
)
def test_convolutions_that_stay_dense_are_right_too(w_shape, settings):
    x, params = normal(1, (2, 6, 7, 3)), {"w": normal(2, w_shape)}
    settings = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), **settings}

    def value_fn(p):
        return weighed(
            lax.conv_general_dilated(x, p["w"], (1, 1), ((1, 1), (1, 1)), **settings)
        )

    assert ways(value_fn, params) == {"w": "at use"}
    assert_equals_dense(value_fn, params, rank=2)


VIEWS = {
    "bfloat16": lambda w: w.astype(jnp.bfloat16).astype(jnp.float32),
    "transposed": lambda w: w.T.T,
    "scaled": lambda w: 0.5 * w * jnp.float32(3),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_weight_stays_factored_through(view):
    x, params = normal(1, (4, 6)), {"w": normal(2, (6, 5))}

    def value_fn(p):
        return weighed(x @ VIEWS[view](p["w"]))

    assert ways(value_fn, params) == {"w": "low rank"}
    # bfloat16 rounds the perturbed weight on one way and its base on the other.
    rtol = 0.02 if view == "bfloat16" else 2e-5
    assert_equals_dense(value_fn, params, rank=1, rtol=rtol)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_dequantized_weight_stays_factored(bits):
    x, params = normal(1, (4, 6)), fgrad.quantize({"w": normal(2, (6, 5))}, bits=bits)

    def value_fn(p):
        return weighed(x @ fgrad.dequantize(p)["w"].T.T)

    assert ways(value_fn, params) == {"w": "low rank"}
    assert_equals_dense(value_fn, params, rank=2)


def test_other_uses_of_a_factored_leaf_get_the_same_weight():
    x, params = normal(1, (4, 6)), {"w": normal(2, (6, 5))}

    def value_fn(p):
        return weighed(x @ p["w"]) + weighed(jnp.tanh(p["w"]))

    assert_equals_dense(value_fn, params, rank=2)


def test_scan_over_stacked_weights_is_factored_in_every_layer():
    x, params = normal(1, (4, 6)), {"w": 0.3 * normal(2, (5, 6, 6))}

    def value_fn(p):
        y, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])
        return weighed(y)

    assert ways(value_fn, params) == {"w": "low rank"}
    assert_equals_dense(value_fn, params, rank=2)


def shapes_within(jaxpr):
    """The shapes of all values of a jaxpr, those inside of loops and calls included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from shapes_within(inner)


def in_scan(step, x):
    return lax.scan(lambda h, _: (step(h), None), x, length=3)[0]


def in_while(step, x):
    return lax.fori_loop(0, jnp.int32(3), lambda _, h: step(h), x)


def losses_of_low_rank(value_fn, params, vectorize):
    """The losses of three pairs of low rank, so many at once."""
    policy = Policy(0.1, num_perturbations=3, perturbation=perturbations.low_rank())
    plan = Plan(params, policy)
    keys = plan.keys(KEY)
    return evaluation.evaluate_pairs(value_fn, plan, keys, vectorize=vectorize)[:2]


@pytest.mark.parametrize("loop", [in_scan, in_while])
@pytest.mark.parametrize("bits", every(2, [None, 16]))
def test_evaluations_that_run_together_share_the_products_inside_a_loop(loop, bits):
    x, params = normal(1, (4, 7)), {"w": 0.3 * normal(2, (7, 7))}
    if bits:
        params = fgrad.quantize(params, bits=bits)

    def value_fn(p):
        return weighed(loop(lambda h: jnp.tanh(h @ fgrad.dequantize(p)["w"]), x))

    losses = functools.partial(losses_of_low_rank, value_fn, params)
    # One after the other, each has a weight that is perturbed before the loop.
    np.testing.assert_allclose(losses(3), losses(1), rtol=2e-5)
    shapes = set(shapes_within(jax.make_jaxpr(lambda: losses(3))().jaxpr))
    assert (6, 4, 7) in shapes
    assert (6, 7, 7) not in shapes


def test_a_weight_that_a_loop_uses_otherwise_is_perturbed_before_it():
    x, params = normal(1, (4, 7)), {"w": 0.3 * normal(2, (7, 7))}

    def value_fn(p):
        return weighed(in_scan(lambda h: jnp.tanh(h @ jnp.abs(p["w"])), x))

    losses = functools.partial(losses_of_low_rank, value_fn, params)
    np.testing.assert_allclose(losses(3), losses(1), rtol=2e-5)
    closed = jax.make_jaxpr(lambda: losses(3))()
    scans = [e for e in closed.jaxpr.eqns if e.primitive.name == "scan"]
    (scan,) = [e for e in scans if e.params["length"] == 3]
    assert (6, 7, 7) in {v.aval.shape for v in scan.invars}


def test_weights_at_the_end_of_the_grid_leave_room_for_z():
    x = QTensor(jnp.array([[3, -2]], jnp.int8), jnp.float32(1))
    params = fgrad.quantize(
        {"w": jnp.array([[1.0, -1.0], [0.5, 1.0]])}, bits=16, headroom=1.0
    )

    def value_fn(p):
        return weighed(products.dot_general(x, p["w"], (((1,), (0,)), ((), ()))))

    z = perturbations.low_rank(2)
    step = round(EPSILON * z.step / float(params["w"].scale))
    for sign in (1, -1):
        perturbed = evaluation.perturb(params, KEY, EPSILON, z, sign=sign)["w"].qvalue
        base = np.clip(params["w"].qvalue, -32767 + 2 * step, 32767 - 2 * step)
        key = perturbations.leaf_keys(KEY, ["['w']"])["['w']"]
        z_q = np.asarray(z.sample(key, (2, 2)), np.int64)
        np.testing.assert_array_equal(perturbed, base + sign * step * z_q)
    assert_equals_dense(value_fn, params, rank=2)


@pytest.mark.parametrize("bits", every(2, [16, None]))
def test_directions_at_once_share_one_base_product(bits):
    """Under vmap no dot has a weight that is batched over the directions."""
    x, params = normal(1, (4, 32)), {"w": normal(2, (32, 48)), "v": normal(3, (48, 40))}

    def value_fn(p):
        if bits is None:
            return weighed(jnp.tanh(x @ p["w"]) @ p["v"])
        h = QTensor(jnp.round(9 * x).astype(jnp.int8), jnp.float32(0.1))
        h = products.dot_general(h, p["w"], (((1,), (0,)), ((), ())))
        h = QTensor(jnp.clip(jnp.round(h), -127, 127).astype(jnp.int8), jnp.float32(1))
        return weighed(products.dot_general(h, p["v"], (((1,), (0,)), ((), ()))))

    if bits:
        params = fgrad.quantize(params, bits=bits)
    policy = Policy(EPSILON, perturbation=perturbations.low_rank(1))
    keys = jax.random.split(KEY, 8)

    def losses(p, vectorize=8):
        plan = Plan(p, policy)
        leaf_keys = jax.vmap(plan.leaf_keys)(keys)
        found = evaluation.evaluate_pairs(
            value_fn, plan, leaf_keys, vectorize=vectorize
        )
        return found[:2]

    def operands(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in factored_products.PRODUCTS:
                yield [v.aval.shape for v in equation.invars]
            for p in equation.params.values():
                if hasattr(p, "jaxpr"):
                    yield from operands(p.jaxpr)

    sizes = [
        np.prod(s) for pair in operands(jax.make_jaxpr(losses)(params)) for s in pair
    ]
    assert 48 * 40 in sizes
    assert 16 * 48 * 40 not in sizes
    one_by_one = losses(params, vectorize=1)
    np.testing.assert_allclose(losses(params), one_by_one, rtol=1e-4)
