"""Small losses of every kind that a user may bring, for the tests of the evaluator.

A new kind is tested by being written down here under `case`. Most values are multiples
of 1/64 and most data small integers: then float32 holds every intermediate of a case
marked ``exact``, so no order of summation and no fusion can change its loss.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import quantized_networks
from flax import nnx
from jax import lax
from jax.custom_batching import custom_vmap

import fgrad
from fgrad import layers

# Extras of the tests, which a small environment may lack.
if importlib.util.find_spec("equinox"):
    import equinox as eqx
if importlib.util.find_spec("haiku"):
    import haiku as hk


class Case(NamedTuple):
    """A loss, where it starts, and what holds for it."""

    value_fn: Callable[..., Any]
    params: Any  # pytree of float leaves; others are frozen by `mask`
    kwargs: dict[str, Any] = {}  # noqa: RUF012  # never changed
    # Every intermediate is a float32: losses must agree in every bit.
    exact: bool = False
    # The loss takes float leaves only, so QTensors are dequantized at its top.
    dequantize: bool = False
    # Leading axes of leaves, by `keystr`, along which each entry has its own scale.
    stacked: dict[str, int] = {}  # noqa: RUF012  # never changed
    mask: Any = True
    # Leaves, by `keystr`, that do not change the loss.
    unused: tuple[str, ...] = ()
    # jax.vmap has no rule for what the loss does.
    vmap: bool = True
    # All leaves have the same bits, for layers that are built for them.
    same_bits: bool = False


# name -> make(bits): `bits` is 0 for float leaves, else the width of the first QTensor.
CASES: dict[str, Callable[[int], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    """Lists a case under its function's name."""
    make = functools.cache(make)
    CASES[make.__name__] = lambda bits: make()
    return make


def optional_case(package: str) -> Callable[..., Any]:
    """Lists a case if what it is about is installed."""
    installed = importlib.util.find_spec(package) is not None
    return case if installed else lambda make: make


def layers_case(make: Callable[[int], Case]) -> Callable[[int], Case]:
    """Lists a case that is built for the width of its leaves."""
    CASES[make.__name__] = functools.cache(make)
    return make


def weights(*, span: int = 127, seed: int = 0, **shapes: Any) -> dict[str, Any]:
    """Multiples of 1/64 up to ``span / 64``; 127 is the end of the 8-bit grid."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(-span, span + 1, shape).astype(np.float32) / 64
        for name, shape in shapes.items()
    }


def integers(*shape: int, seed: int = 1) -> np.ndarray:
    """Data: -2, -1, 1 or 2 as float32."""
    return np.random.default_rng(seed).choice(
        np.array([-2, -1, 1, 2], np.float32), shape
    )


def small(tree: Any, deviation: float = 0.3) -> Any:
    """Normal values for the shapes of a tree."""
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> np.ndarray:
        return (rng.normal(size=leaf.shape) * deviation).astype(leaf.dtype)

    return jax.tree.map(draw, tree)


X = integers(3, 4)
LINEAR = functools.partial(weights, w=(4, 3), b=(3,))
DEEP = functools.partial(weights, span=48, w=(4, 4), b=(4,), v=(4,))


def size(y: Any) -> jax.Array:
    """A scalar that depends on every value, and is exact for few of them."""
    return jnp.sum(jnp.abs(y))


def affine(p: Any, x: Any) -> jax.Array:
    """``x w + b``."""
    return x @ p["w"] + p["b"]


def stage(h: Any, w: Any, b: Any) -> jax.Array:
    """One layer of a deep network."""
    return jnp.tanh(h @ w + b)


# ------------------------------------------------------------- containers and leaves


@case
def a_dict_of_arrays():
    return Case(lambda p, x: size(affine(p, x)), LINEAR(), {"x": X}, exact=True)


@case
def a_bare_array():
    def value_fn(w, x):
        return size(x @ w)

    return Case(value_fn, weights(w=(4, 3))["w"], {"x": X}, exact=True)


class Pair(NamedTuple):
    w: Any
    b: Any


@case
def nested_containers_with_none():
    w = weights(a=(4, 3), b=(4, 3), c=(3,), d=(3,))
    params = {
        "list": [Pair(w["a"], None), Pair(w["b"], w["c"])],
        "frozen": flax.core.freeze({"inner": {"d": w["d"]}}),
        "empty": (),
    }

    def value_fn(p, x):
        first, second = p["list"]
        assert first.b is None
        y = x @ first.w + p["frozen"]["inner"]["d"]
        return size(y) + size(x @ second.w + second.b)

    return Case(value_fn, params, {"x": X}, exact=True)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "bias"),
    meta_fields=("activation",),
)
@dataclasses.dataclass
class Layer:
    """A module that is itself the pytree, as in Equinox."""

    weight: Any
    bias: Any
    activation: Callable[[Any], Any]

    def __call__(self, x: Any) -> jax.Array:
        return self.activation(x @ self.weight + self.bias)


@case
def a_module_that_is_a_pytree():
    w = DEEP()
    model = [Layer(w["w"], w["b"], jnp.tanh), Layer(w["v"], np.float32(0.5), jnp.abs)]

    def value_fn(model, x):
        for layer in model:
            x = layer(x)
        return jnp.mean(x)

    return Case(value_fn, model, {"x": X})


@case
def a_scalar_leaf():
    def value_fn(p, x):
        return size(x @ p["w"] + p["s"]) - jnp.asarray(p["s"]) / 2

    return Case(value_fn, weights(w=(4, 3), s=()), {"x": X}, exact=True)


@case
def a_python_scalar_leaf():
    """Its perturbed value is a float32 that promotes bfloat16, not a weak scalar."""

    def value_fn(p, x):
        return jnp.sum((x.astype(jnp.bfloat16) * p["s"]).astype(jnp.float32) ** 2)

    return Case(value_fn, {"s": 0.640625}, {"x": X})


@case
def a_leaf_of_size_zero():
    def value_fn(p, x):
        return size(x @ p["w"]) + jnp.sum(jnp.asarray(p["none"]))

    params = weights(w=(4, 3), none=(0, 3))
    return Case(value_fn, params, {"x": X}, exact=True, unused=("['none']",))


@case
def an_unused_leaf():
    def value_fn(p, x):
        return size(x @ p["w"])

    return Case(value_fn, LINEAR(), {"x": X}, exact=True, unused=("['b']",))


@case
def a_constant_loss():
    return Case(
        lambda p: jnp.float32(2.5), LINEAR(), exact=True, unused=("['b']", "['w']")
    )


@case
def a_leaf_that_is_the_loss():
    def value_fn(p):
        return jnp.asarray(p["s"])

    return Case(value_fn, weights(s=(), w=(3,)), exact=True, unused=("['w']",))


@case
def bfloat16_leaves():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), LINEAR())

    def value_fn(p, x):
        y = x @ jnp.asarray(p["w"], jnp.float32) + jnp.asarray(p["b"], jnp.float32)
        return size(y)

    return Case(value_fn, params, {"x": X}, exact=True)


@case
def float16_and_float32_leaves():
    params = LINEAR()
    params["b"] = params["b"].astype(np.float16)

    def value_fn(p, x):
        return size(x @ p["w"] + jnp.asarray(p["b"]))

    return Case(value_fn, params, {"x": X}, exact=True)


@case
def frozen_integers_and_keys():
    params = {**weights(w=(4, 3)), "rows": np.array([2, 0]), "key": jax.random.key(4)}

    def value_fn(p, x):
        noise = jax.random.randint(p["key"], (3,), -2, 3)
        return size((x @ p["w"])[p["rows"]] + noise)

    mask = {"w": True, "rows": False, "key": False}
    return Case(value_fn, params, {"x": X}, exact=True, mask=mask)


@case
def a_frozen_python_scalar():
    """It stays weak: half precision times it is half precision."""

    def value_fn(p, x):
        y = (x @ p["w"]).astype(jnp.bfloat16) * p["s"]
        return size(y).astype(jnp.float32)

    params = {**weights(w=(4, 3)), "s": 0.3}
    return Case(value_fn, params, {"x": X}, mask={"w": True, "s": False})


@case
def a_leaf_used_twice():
    def value_fn(p, x):
        return size(x @ p["w"]) + size(-x @ p["w"] + p["b"])

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def an_integer_loss():
    def value_fn(p, x):
        return jnp.sum(jnp.round(8 * affine(p, x)).astype(jnp.int32))

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def a_bfloat16_loss():
    def value_fn(p, x):
        return size(affine(p, x)).astype(jnp.bfloat16)

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


# ------------------------------------------------------------ what is done to a leaf


@case
def dequantized_at_the_top():
    def value_fn(p, x):
        p = fgrad.dequantize(p)
        return size(x @ p["w"] + p["b"])

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def cast_to_bfloat16_first():
    def value_fn(p, x):
        p = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), fgrad.dequantize(p))
        return size((x @ p["w"].astype(jnp.float32)) + p["b"].astype(jnp.float32))

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def weight_decay():
    def value_fn(p, x):
        p = fgrad.dequantize(p)
        decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))
        return jnp.mean(stage(x, p["w"], p["b"]) ** 2) + 0.05 * decay

    return Case(value_fn, DEEP(), {"x": X})  # v has no other use


@case
def clipped_by_the_global_norm():
    def value_fn(p, x):
        p = fgrad.dequantize(p)
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p)))
        p = jax.tree.map(lambda leaf: leaf / norm, p)
        return jnp.mean(stage(x, p["w"], p["b"]) @ p["v"])

    return Case(value_fn, DEEP(), {"x": X})


@case
def raveled_to_one_vector():
    def value_fn(p, x):
        flat, unravel = jax.flatten_util.ravel_pytree(fgrad.dequantize(p))
        return size(affine(unravel(flat[::-1]), x))

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def concatenated_and_stacked():
    def value_fn(p, x):
        w = jnp.concatenate([jnp.asarray(p["w"]), jnp.asarray(p["b"])[None]])
        wide = jnp.hstack([w, jnp.stack([w[:, 0], w[:, 2]], 1)])
        return size(jnp.pad(x, ((0, 0), (0, 1)), constant_values=1) @ wide)

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def reshaped_transposed_and_broadcast():
    def value_fn(p, x):
        w = jnp.asarray(p["w"]).reshape(2, 6).T.reshape(4, 3)
        bias = jnp.broadcast_to(jnp.asarray(p["b"])[None, ::-1], (3, 3))
        return size(x @ w + bias)

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def gathered_rows():
    """Only some rows are read: their z is that of the whole leaf."""

    def value_fn(p, rows):
        return size(jnp.asarray(p["w"])[rows]) + jnp.asarray(p["b"])[rows[0]]

    kwargs = {"rows": np.array([5, 1, 1])}
    return Case(value_fn, weights(w=(7, 3), b=(7,)), kwargs, exact=True)


@case
def sliced_dynamically():
    def value_fn(p, start):
        part = lax.dynamic_slice(jnp.asarray(p["w"]), (start, 1), (2, 2))
        row = lax.dynamic_index_in_dim(jnp.asarray(p["w"]), start + 2, keepdims=False)
        return size(part) + 2 * size(row)

    return Case(value_fn, weights(w=(7, 3)), {"start": np.int32(3)}, exact=True)


@case
def updated_in_place():
    def value_fn(p, x, start):
        w = lax.dynamic_update_slice(
            jnp.asarray(p["w"]), jnp.asarray(p["b"])[None], (start, 0)
        )
        w = w.at[jnp.array([0, 0])].add(1.0).at[1].multiply(2)
        return size(x @ w)

    return Case(value_fn, LINEAR(), {"x": X, "start": np.int32(3)}, exact=True)


@case
def sorted_and_ranked():
    def value_fn(p, x):
        order = jnp.argsort(jnp.asarray(p["b"]))
        return size(jnp.sort(x @ p["w"]) * jnp.arange(3)) + size(
            (x @ p["w"])[:, order] * jnp.arange(3)
        )

    params = weights(w=(4, 3), b=(3,), seed=1)
    params["b"] = np.float32([0.5, 0.515625, 0.53125])  # near enough to change places
    return Case(value_fn, params, {"x": X}, exact=True)


@case
def reduced_by_a_function_of_the_user():
    def value_fn(p):
        w = jnp.asarray(p["w"])
        largest = lax.reduce(
            w, np.float32(0), lambda a, b: jnp.maximum(jnp.abs(a), jnp.abs(b)), (0,)
        )
        window = lax.reduce_window(w, 0.0, lax.add, (2, 2), (1, 1), "VALID")
        return jnp.sum(largest) + size(window) + jnp.sum(jnp.cumsum(w, 0)[2])

    return Case(value_fn, weights(w=(4, 3)), exact=True)


@case
def an_associative_scan():
    def value_fn(p):
        w, b = jnp.asarray(p["w"]), jnp.asarray(p["b"])

        def compose(f, g):
            return f[0] * g[0], g[0] * f[1] + g[1]

        _, y = lax.associative_scan(compose, (jnp.tanh(w), b))
        return jnp.mean(y**2)

    return Case(value_fn, weights(span=48, w=(6, 2), b=(6, 2)))


@case
def convolved():
    def value_fn(p, x):
        y = lax.conv_general_dilated(
            x, jnp.asarray(p["w"]), (2, 1), "SAME", feature_group_count=2
        )
        return size(y + jnp.asarray(p["b"])[:, None, None])

    kwargs = {"x": integers(1, 2, 4, 3)}
    return Case(value_fn, weights(w=(4, 1, 2, 2), b=(4,)), kwargs, exact=True)


@case
def contracted_by_einsum():
    def value_fn(p, x):
        y = jnp.einsum("nd,hde->nhe", x, jnp.asarray(p["w"]))
        return size(y + jnp.einsum("he->h", jnp.asarray(p["b"]))[:, None])

    return Case(value_fn, weights(w=(2, 4, 2), b=(2, 3)), {"x": X}, exact=True)


@case
def linear_algebra_of_a_leaf():
    def value_fn(p, x):
        a = jnp.asarray(p["a"])
        spd = a @ a.T + jnp.eye(3)
        solved = jnp.linalg.solve(spd, jnp.asarray(p["b"]))
        factor = jnp.linalg.cholesky(spd)
        return jnp.sum(solved**2) + jnp.sum(factor) + jnp.linalg.slogdet(spd)[1]

    return Case(value_fn, weights(span=64, a=(3, 3), b=(3,)), {"x": X})


@case
def a_stopped_gradient():
    def value_fn(p, x):
        return size(x @ lax.stop_gradient(jnp.asarray(p["w"])) + p["b"])

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def behind_a_barrier():
    def value_fn(p, x):
        w, b, x = lax.optimization_barrier(
            (jnp.asarray(p["w"]), jnp.asarray(p["b"]), x)
        )
        return size(x @ w + b)

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def in_a_mutable_array():
    def value_fn(p, x):
        ref = jax.new_ref(jnp.asarray(p["w"]))

        def body(i, total):
            ref[i] = ref[i] * 2
            return total + size(x @ ref[...])

        return lax.fori_loop(0, 2, body, 0.0) + size(jnp.asarray(p["b"]))

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def an_unrolled_recurrence():
    def value_fn(p, x):
        h = jnp.zeros(4)
        for row in x:
            h = stage(h, p["w"], p["b"]) + row
        return jnp.mean(h**2) + jnp.sum(h @ p["v"])

    return Case(value_fn, DEEP(), {"x": integers(5, 4)})


@case
def nan_and_infinity_on_the_way():
    def value_fn(p, x):
        y = jnp.log(x) @ jnp.asarray(p["w"])  # NaN wherever x is negative
        y = jnp.where(jnp.isnan(y), x, jnp.inf) @ jnp.asarray(p["v"])
        return size(jnp.where(jnp.isfinite(y), y, 0)) + size(x @ p["w"] + p["b"])

    params = weights(w=(4, 4), v=(4,), b=(4,))
    x = np.abs(X)
    x[1, 2] = -1  # one row of NaN
    return Case(value_fn, params, {"x": x}, exact=True)


@case
def complex_activations():
    def value_fn(p, x):
        y = jnp.fft.fft(x @ jnp.asarray(p["w"], jnp.complex64)) * p["b"]
        return jnp.mean(jnp.abs(y @ jnp.asarray(p["v"], jnp.complex64)))

    return Case(value_fn, DEEP(), {"x": X}, dequantize=True)


# -------------------------------------------------------------- jit, and derivatives


@case
def jitted_parts():
    layer = jax.jit(affine)

    def value_fn(p, x):
        return size(layer(p, x)) + size(jax.jit(lambda: affine(p, -x))())

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def jits_in_jits():
    @jax.jit
    def innermost(w, x):
        return x @ w

    @jax.jit
    def inner(p, x):
        return innermost(p["w"], x) + jnp.asarray(p["b"])

    @functools.partial(jax.jit, static_argnames="sign", inline=True)
    def outer(p, x, sign):
        return size(sign * inner(p, x))

    def value_fn(p, x):
        return outer(p, x, sign=1) + outer(p, x, sign=-1)

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def a_jit_that_hands_leaves_on():
    @jax.jit
    def swap(p, x):
        return {"w": p["v"], "v": p["w"], "b": p["b"]}, x + 1

    def value_fn(p, x):
        p, x = swap(p, x)
        p, x = swap(p, x)
        return size(x @ p["w"]) + 2 * size(x @ p["v"] + p["b"])

    return Case(value_fn, weights(w=(4, 3), v=(4, 3), b=(3,)), {"x": X}, exact=True)


@case
def a_jitted_loss():
    value_fn = jax.jit(lambda p, x: size(affine(p, x)))
    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def rematerialized():
    policy = jax.checkpoint_policies.nothing_saveable

    def value_fn(p, x):
        h = jax.checkpoint(stage)(x, jnp.asarray(p["w"]), p["b"])
        head = jax.checkpoint(lambda h: h @ p["v"], policy=policy, prevent_cse=False)
        return jnp.mean(head(h) ** 2)

    return Case(value_fn, DEEP(), {"x": X})


@case
def functions_with_custom_derivatives():
    def value_fn(p, x):
        h = jax.nn.gelu(jax.nn.relu(affine(p, x)) - 1)
        h = jax.nn.softmax(h) * jax.nn.silu(h)
        return jax.nn.logsumexp(h @ p["v"]) + jnp.sum(jax.nn.softplus(p["b"]))

    return Case(value_fn, DEEP(), {"x": X}, dequantize=True)


@case
def a_custom_jvp_of_the_leaves():
    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def layer(sign, p, x):
        return jnp.maximum(sign * affine(p, x), 0)

    @layer.defjvp
    def _(sign, primals, tangents):
        raise AssertionError("a forward pass has no derivative")

    def value_fn(p, x):
        return jnp.sum(layer(1, p, x)) + 2 * jnp.sum(layer(-1, p, x))

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def a_custom_vjp_of_the_leaves():
    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def layer(p, x, sign):
        return jnp.maximum(sign * affine(p, x), 0)

    def forward(p, x, sign):
        raise AssertionError("a forward pass has no residuals")

    layer.defvjp(forward, lambda sign, residuals, g: (g, g))

    def value_fn(p, x):
        return jnp.sum(layer(p, x, 1)) + 2 * jnp.sum(layer(p, x, -1))

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def a_gradient_penalty():
    def value_fn(p, x):
        def critic(x):
            return jnp.sum(stage(x, p["w"], p["b"]) @ p["v"])

        return jnp.mean(jax.grad(critic)(x) ** 2) + jnp.sum(
            jax.jvp(critic, (x,), (x,))[1]
        )

    return Case(value_fn, DEEP(), {"x": X}, dequantize=True)


@case
def an_inner_step_of_gradient_descent():
    def value_fn(p, x):
        def inner(p):
            return jnp.mean((jnp.tanh(affine(p, x)) @ p["v"] - 1) ** 2)

        p = fgrad.dequantize(p)
        fast = jax.tree.map(lambda w, g: w - 0.1 * g, p, jax.grad(inner)(p))
        return inner(fast)

    return Case(value_fn, DEEP(), {"x": X})


@case
def dual_forward_in_the_loss():
    def value_fn(p, x):
        def inner(q):
            return jnp.mean((x @ q) ** 2)

        key = jax.random.key(9)
        plus, minus = fgrad.dual_forward(inner, jnp.asarray(p["w"]), key, 0.25)
        return plus - 0.5 * minus + jnp.mean(jnp.asarray(p["b"]) ** 2)

    return Case(value_fn, LINEAR(), {"x": X})


# --------------------------------------------------------------------- vmap and shards


@case
def vmap_over_the_batch():
    def value_fn(p, x):
        return jnp.sum(jax.vmap(lambda row: size(affine(p, row)))(x))

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def vmap_over_stacked_leaves():
    def value_fn(p, x):
        heads = jax.vmap(lambda w, b: x @ w + b, in_axes=(0, 1))(p["w"], p["b"])
        return size(heads)

    return Case(
        value_fn, weights(w=(2, 4, 3), b=(3, 2)), {"x": X}, exact=True, dequantize=True
    )


@case
def vmap_with_a_named_axis():
    def value_fn(p, x):
        def row_fn(row):
            y = affine(p, row)
            return size(y - lax.pmax(y, "batch")) + jnp.sum(lax.psum(y, "batch"))

        return jnp.sum(jax.vmap(row_fn, axis_name="batch")(x))

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def a_custom_vmap():
    @custom_vmap
    def product(w, x):
        return x @ w

    @product.def_vmap
    def _(axis_size, in_batched, w, x):
        in_axes = [0 if batched else None for batched in in_batched]
        return jax.vmap(jnp.matmul, in_axes[::-1])(x, w), True

    def value_fn(p, x):
        return size(product(jnp.asarray(p["w"]), x) + p["b"])

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def a_shard_map():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = jax.sharding.PartitionSpec

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(spec("d"), spec(), spec(None, "d")),
        out_specs=spec(),
    )
    def layer(w, b, x):
        return lax.psum(x @ w, "d") + jnp.asarray(b)

    def value_fn(p, x):
        return size(layer(jnp.asarray(p["w"]), p["b"], x))

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def one_branch_per_platform():
    def value_fn(p, x):
        y = lax.platform_dependent(
            jnp.asarray(p["w"]), x, cpu=lambda w, x: x @ w, default=lambda w, x: x @ w
        )
        return size(y + p["b"])

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def an_exported_program():
    # Made where it is used: leaves of QTensors have other types.
    def value_fn(p, x):
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (p, x))
        exported = jax.export.export(jax.jit(affine))(*shapes)
        return size(exported.call(p, x))

    return Case(value_fn, LINEAR(), {"x": X}, exact=True, vmap=False)


# ------------------------------------------------------------------------------ scan


@case
def scan_with_leaves_as_constants():
    def value_fn(p, x):
        def body(h, row):
            h = stage(h, p["w"], p["b"]) + row
            return h, h @ p["v"]

        h, y = lax.scan(body, jnp.zeros(4), x)
        return jnp.sum(h) + jnp.sum(y)

    return Case(value_fn, DEEP(), {"x": X})


@case
def scan_with_leaves_carried_on():
    """The carry holds the leaves and hands them on: they are perturbed once."""

    def value_fn(p, x):
        def body(carry, row):
            p, total = carry
            return (p, total + size(affine(p, row))), None

        (p, total), _ = lax.scan(body, (p, 0.0), x)
        return total + size(x @ p["w"])

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def scan_that_trains_its_carry():
    def value_fn(p, x):
        def inner(p, row):
            return jnp.mean((stage(row, p["w"], p["b"]) @ p["v"] - 1) ** 2)

        def body(p, row):
            value, gradient = jax.value_and_grad(inner)(p, row)
            return jax.tree.map(lambda w, g: w - 0.1 * g, p, gradient), value

        p, values = lax.scan(body, fgrad.dequantize(p), x)
        return jnp.sum(values) + inner(p, x)

    return Case(value_fn, DEEP(), {"x": X})


def scanned_layers(**options: Any) -> Case:
    """A stack of layers, one step of a scan each."""

    def value_fn(p, x):
        def body(h, layer):
            return stage(h, layer["w"], layer["b"]), layer["b"]

        h, handed_on = lax.scan(body, x, p, **options)
        return jnp.mean(h**2) + jnp.sum(jnp.asarray(handed_on) ** 2)

    params = weights(span=48, w=(3, 4, 4), b=(3, 4))
    return Case(value_fn, params, {"x": X}, stacked={"['w']": 1, "['b']": 1})


@case
def scan_over_stacked_layers():
    return scanned_layers()


@case
def scan_over_stacked_layers_in_reverse():
    return scanned_layers(reverse=True, unroll=2)


@case
def scan_over_dequantized_layers():
    return scanned_layers()._replace(dequantize=True, stacked={})


@case
def scan_over_scalars():
    def value_fn(p, x):
        h, _ = lax.scan(lambda h, s: (h * s + 1, None), x, p["s"])
        return jnp.mean(h)

    return Case(value_fn, weights(s=(3,)), {"x": X}, stacked={"['s']": 1})


@case
def scan_over_one_layer():
    def value_fn(p, x):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])
        h, _ = lax.scan(lambda h, w: (h @ w, None), h, p["w"], length=1)
        return jnp.sum(h)

    params = weights(span=48, w=(1, 4, 4))
    return Case(value_fn, params, {"x": X}, stacked={"['w']": 1})


@case
def scan_of_no_steps():
    def value_fn(p, x):
        h, _ = lax.scan(lambda h, w: (h @ w @ p["v"], None), x, p["w"][:0])
        return size(h @ p["w"][1])

    params = weights(w=(3, 4, 4), v=(4, 4))
    return Case(
        value_fn, params, {"x": X}, exact=True, dequantize=True, unused=("['v']",)
    )


@case
def nested_scans_over_stacked_stages():
    def value_fn(p, x):
        def step(h, layer):
            return stage(h, layer["w"], p["b"]), None

        def block(h, layers):
            h, _ = lax.scan(step, h, layers, reverse=True)
            return h + p["b"], jnp.sum(h)

        h, sums = lax.scan(block, x, {"w": p["w"]})
        return jnp.mean(h) + jnp.sum(sums)

    params = weights(span=48, w=(2, 3, 4, 4), b=(4,))
    return Case(value_fn, params, {"x": X}, stacked={"['w']": 2})


@case
def scan_over_layers_of_scans_over_time():
    """A stack of recurrent layers: a slice of a leaf is an inner scan's constant."""

    def value_fn(p, x):
        def layer(sequence, p):
            def step(h, row):
                h = jnp.tanh(row @ p["w"] + h @ p["u"])
                return h, h

            return lax.scan(step, jnp.zeros(4), sequence)[1], None

        return jnp.mean(lax.scan(layer, x, p)[0] ** 2)

    params = weights(span=48, w=(2, 4, 4), u=(2, 4, 4))
    return Case(value_fn, params, {"x": X}, stacked={"['w']": 1, "['u']": 1})


@case
def scan_over_a_leaf_that_it_also_holds():
    """One leaf as sequence, as constant, as start of the carry, and outside."""

    def value_fn(p, x):
        def body(carry, row):
            return carry @ p["w"] / 4 + row, jnp.sum(carry * p["w"])

        h, y = lax.scan(body, p["w"], p["w"])
        return jnp.mean(h**2) + jnp.sum(y) + jnp.sum(x @ p["w"])

    return Case(value_fn, weights(span=48, w=(4, 4)), {"x": X}, dequantize=True)


@case
def a_map_over_the_batch():
    def value_fn(p, x):
        return jnp.sum(lax.map(lambda row: size(affine(p, row)), x))

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def a_rematerialized_scan_in_a_jit():
    def value_fn(p, x):
        @jax.checkpoint
        def body(h, layer):
            return jax.jit(stage)(h, layer["w"], p["b"]), None

        @jax.jit
        def network(x):
            h, _ = lax.scan(body, x, {"w": p["w"]})
            return h

        return jnp.mean(network(x) ** 2)

    params = weights(span=48, w=(3, 4, 4), b=(4,))
    return Case(value_fn, params, {"x": X}, stacked={"['w']": 1})


# -------------------------------------------------------------------------- while


@case
def while_with_leaves_in_body_and_condition():
    def value_fn(p, x):
        limit = jnp.sum(jnp.abs(jnp.asarray(p["b"])))

        def condition(carry):
            i, total = carry
            return (i < 3) | (total < limit + jnp.asarray(p["s"]))

        def body(carry):
            i, total = carry
            return i + 1, total + size(x @ p["w"]) / 8 + 1

        steps, total = lax.while_loop(condition, body, (0, 0.0))
        return total + steps + limit + jnp.asarray(p["s"])

    return Case(value_fn, weights(w=(4, 3), b=(3,), s=()), {"x": X}, exact=True)


@case
def while_with_leaves_in_the_carry():
    def value_fn(p, x):
        def condition(carry):
            p, _ = carry
            return jnp.sum(jnp.abs(jnp.asarray(p["b"]))) > 0.5

        def body(carry):
            p, total = carry
            total = total + size(affine(p, x))
            return {**p, "b": jnp.asarray(p["b"]) / 2}, total

        p, total = lax.while_loop(condition, body, (fgrad.dequantize(p), 0.0))
        return total + jnp.sum(jnp.asarray(p["w"]))

    return Case(value_fn, LINEAR(), {"x": X})


@case
def a_loop_that_changes_leaves():
    """The carry starts perturbed; what the loop makes of it is not perturbed again."""

    def value_fn(p, x):
        def body(i, carry):
            a, b, total = carry
            return b, a * 0.5, total + size(x @ a) + i

        p = fgrad.dequantize(p)
        a, b, total = lax.fori_loop(0, 3, body, (p["a"], p["b"], 0.0))
        return total + size(x @ a) - size(x @ b)

    return Case(value_fn, weights(a=(4, 3), b=(4, 3)), {"x": X})


@case
def a_loop_with_a_bound_from_the_data():
    def value_fn(p, x, steps):
        def body(i, total):
            return total + size(affine(p, x * (i + 1)))

        return lax.fori_loop(0, steps, body, 0.0)

    return Case(value_fn, LINEAR(), {"x": X, "steps": np.int32(2)}, exact=True)


@case
def a_loop_that_never_runs():
    def value_fn(p, x, steps):
        def body(i, carry):
            return jax.tree.map(jnp.zeros_like, carry)

        p = lax.fori_loop(0, steps, body, p)
        return size(affine(p, x))

    return Case(value_fn, LINEAR(), {"x": X, "steps": np.int32(0)}, exact=True)


# -------------------------------------------------------------------------- branches


@case
def a_branch_with_leaves_of_its_own():
    def value_fn(p, x):
        y = x @ p["w"]
        wide = lax.cond(
            jnp.sum(x) > 100, lambda: y + p["b"], lambda: y - 2 * jnp.asarray(p["c"])
        )
        return size(wide)

    params = weights(w=(4, 3), b=(3,), c=(3,))
    return Case(value_fn, params, {"x": X}, exact=True, unused=("['b']",))


@case
def a_branch_that_a_leaf_decides():
    def value_fn(p, x):
        def yes(p):
            return size(affine(p, x))

        def no(p):
            return size(-affine(p, x)) + 100

        return lax.cond(jnp.sum(x @ p["w"]) / 16 > jnp.asarray(p["s"]), yes, no, p)

    params = weights(w=(4, 3), b=(3,))
    # Where the branches meet, to be decided by the perturbation.
    params["s"] = np.sum(X @ params["w"], dtype=np.float32) / 16
    return Case(value_fn, params, {"x": X}, exact=True)


@case
def a_branch_that_hands_leaves_on():
    def value_fn(p, x, swap):
        w, v = lax.cond(swap, lambda p: (p["v"], p["w"]), lambda p: (p["w"],) * 2, p)
        return size(x @ w) + 2 * size(-x @ v + p["b"])

    params = weights(w=(4, 3), v=(4, 3), b=(3,))
    kwargs = {"x": X, "swap": np.bool_(True)}
    return Case(value_fn, params, kwargs, exact=True, same_bits=True)


@case
def a_switch():
    def value_fn(p, x, task):
        branches = [
            lambda p: x @ p["w"],
            lambda p: x @ p["v"] + p["b"],
            lambda p: jnp.zeros((3, 3)) + p["b"],
        ]
        total = sum(size(lax.switch(t, branches, p)) for t in task)
        return total + size(lax.switch(1, branches, p))

    params = weights(w=(4, 3), v=(4, 3), b=(3,))
    return Case(value_fn, params, {"x": X, "task": np.array([0, 2])}, exact=True)


@case
def branches_in_a_scan():
    def value_fn(p, x):
        def body(h, step):
            i, w = step
            h = lax.cond(i % 2 == 0, lambda h: stage(h, w, p["b"]), lambda h: h @ w, h)
            return h, None

        h, _ = lax.scan(body, x, (jnp.arange(3), p["w"]))
        return jnp.mean(h**2)

    params = weights(span=48, w=(3, 4, 4), b=(4,))
    return Case(value_fn, params, {"x": X}, stacked={"['w']": 1})


@case
def a_leaf_in_many_places():
    def value_fn(p, x):
        def product(h):
            return jnp.tanh(h @ p["w"] + p["b"])

        h = product(product(x))
        h = lax.scan(lambda h, _: (product(h), None), h, length=2)[0]
        h = lax.cond(jnp.sum(h) > 1e9, lambda h: h, product, h)
        h = lax.while_loop(lambda h: jnp.max(h) > 1e9, product, product(h))
        h = jax.jit(lambda h: product(product(h)))(h)
        h = lax.switch(1, [product, lambda h: product(product(h))], h)
        return jnp.mean(product(h) ** 2) + jnp.sum(jnp.asarray(p["w"]))

    return Case(value_fn, weights(span=48, w=(4, 4), b=(4,)), {"x": X})


# -------------------------------------------------------------------- implicit solvers


@case
def conjugate_gradients():
    def value_fn(p):
        a, b = jnp.asarray(p["a"]), jnp.asarray(p["b"])
        solution, _ = jax.scipy.sparse.linalg.cg(
            lambda v: a.T @ (a @ v) + v, b, maxiter=3
        )
        return jnp.sum(solution**2)

    return Case(value_fn, weights(span=64, a=(3, 3), b=(3,)))


@case
def a_custom_root():
    def value_fn(p):
        w, b = jnp.asarray(p["w"]), jnp.asarray(p["b"])

        def residual(y):
            return y + 0.25 * jnp.tanh(w @ y) - b

        def solve(f, y):
            return lax.fori_loop(0, 5, lambda _, y: y - f(y), y)

        def tangent_solve(g, y):
            return jnp.linalg.solve(jax.jacobian(g)(y), y)

        root = lax.custom_root(residual, jnp.zeros(3), solve, tangent_solve)
        return jnp.sum(root**2)

    return Case(value_fn, weights(span=64, w=(3, 3), b=(3,)))


# ---------------------------------------------------------------- effects, randomness


@case
def a_callback_to_the_host():
    def value_fn(p, x):
        y = jax.pure_callback(
            lambda w, x: np.asarray(x) @ np.asarray(w),
            jax.ShapeDtypeStruct((3, 3), jnp.float32),
            jnp.asarray(p["w"]),
            x,
            vmap_method="sequential",
        )
        return size(y + p["b"])

    return Case(value_fn, LINEAR(), {"x": X}, exact=True)


@case
def dropout_with_a_key():
    def value_fn(p, x, dropout_key):
        h = stage(x, p["w"], p["b"])
        keep = jax.random.bernoulli(dropout_key, 0.7, h.shape)

        def body(key, row):
            key, noise_key = jax.random.split(key)
            return key, row @ p["v"] + jax.random.normal(noise_key)

        _, y = lax.scan(body, dropout_key, jnp.where(keep, h, 0))
        return jnp.mean(y**2)

    return Case(value_fn, DEEP(), {"x": X, "dropout_key": jax.random.key(2)})


@case
def a_key_made_from_a_leaf():
    def value_fn(p, x):
        key = jax.random.fold_in(jax.random.key(0), jnp.argmax(jnp.asarray(p["b"])))
        noise = jax.random.randint(key, (3, 4), -2, 3)
        return size(noise @ jnp.asarray(p["w"]) + x @ p["w"])

    params = LINEAR()
    params["b"] = np.float32([0.5, 0.515625, 0.53125])  # near enough to change places
    return Case(value_fn, params, {"x": X}, exact=True)


# ------------------------------------------------------------------------ Flax models


def linen(module: nn.Module, x: Any, **options: Any) -> Case:
    """The mean square of a module's output; its other collections are closed over."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x))
    state = {k: jax.tree.map(np.ones_like, small(v)) for k, v in shapes.items()}
    del state["params"]

    def value_fn(params, x):
        return jnp.mean(module.apply({"params": params, **state}, x) ** 2)

    return Case(value_fn, small(shapes["params"]), {"x": x}, **options)


@case
def linen_mlp():
    return linen(nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(2)]), X)


@case
def linen_convolutions_with_batch_statistics():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(3, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = nn.relu(nn.Conv(3, (3, 3), strides=2, feature_group_count=3)(x))
            return nn.Dense(2)(nn.GroupNorm(1)(x).mean((1, 2)))

    return linen(Net(), integers(2, 4, 4, 2))


@case
def linen_batch_statistics_as_an_argument():
    norm = nn.BatchNorm(use_running_average=True)

    def value_fn(params, x, batch_stats):
        y = norm.apply({"params": params, "batch_stats": batch_stats}, x)
        return jnp.mean(y**3)

    shapes = jax.eval_shape(lambda: norm.init(jax.random.key(0), X))
    stats = jax.tree.map(np.ones_like, small(shapes["batch_stats"]))
    kwargs = {"x": X, "batch_stats": stats}
    return Case(value_fn, small(shapes["params"]), kwargs)


@case
def linen_transformer_block():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            return x + nn.Dense(4)(nn.gelu(nn.Dense(6)(nn.LayerNorm()(x))))

    # A softmax does not see a shift of its logits, nor the key's bias.
    unused = "['MultiHeadDotProductAttention_0']['key']['bias']"
    return linen(Block(), integers(2, 3, 4), unused=(unused,))


@case
def linen_lstm():
    return linen(nn.RNN(nn.LSTMCell(3)), integers(2, 3, 4))


@case
def linen_optimized_lstm_in_reverse():
    cell = nn.RNN(nn.OptimizedLSTMCell(3), reverse=True, keep_order=True)
    return linen(cell, integers(2, 3, 4))


@case
def linen_scan_over_layers():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nn.scan(
                lambda layer, x, _: (nn.tanh(layer(x)), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return block(nn.Dense(4), x, None)[0]

    stacked = {"['Dense_0']['bias']": 1, "['Dense_0']['kernel']": 1}
    return linen(Net(), X, stacked=stacked)


@case
def linen_remat():
    return linen(nn.Sequential([nn.remat(nn.Dense)(5), nn.tanh, nn.Dense(2)]), X)


@case
def linen_embedding_with_tied_weights():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(7, 4)
            return embed.attend(nn.tanh(nn.Dense(4)(embed(tokens))))

    return linen(Tied(), np.array([[1, 5], [5, 3]]))


class NnxNet(nnx.Module):
    """A network with parameters, statistics and a random stream."""

    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x: Any) -> jax.Array:
        return self.head(self.dropout(nnx.relu(self.norm(self.inner(x)))))


@case
def nnx_split_and_merge():
    graph, params, rest = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param, ...)

    def value_fn(params, x):
        # An nnx.Param indexes its value, which a QTensor does not take.
        model = nnx.merge(graph, fgrad.dequantize(params), rest)
        return jnp.mean(model(x) ** 2)

    return Case(value_fn, small(params), {"x": X})


@case
def nnx_state_with_all_but_its_parameters_frozen():
    graph, state = nnx.split(NnxNet(nnx.Rngs(0)))
    mask = nnx.map_state(lambda _, leaf: isinstance(leaf, nnx.Param), state)

    def value_fn(state, x):
        return jnp.mean(nnx.merge(graph, fgrad.dequantize(state))(x) ** 2)

    return Case(value_fn, state, {"x": X}, mask=mask)


# ------------------------------------------------------------ Equinox and Haiku models


def equinox(module: Any, apply: Callable[..., Any], x: Any, **options: Any) -> Case:
    """The mean square of what a module makes of each row of x."""
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def value_fn(params, x):
        # The part without arrays first: then a QTensor may stand where it has none.
        model = eqx.combine(static, params)
        return jnp.mean(jax.vmap(functools.partial(apply, model))(x) ** 2)

    return Case(value_fn, small(params), {"x": x}, **options)


@optional_case("equinox")
def equinox_mlp():
    module = eqx.nn.MLP(4, 2, 5, 1, key=jax.random.key(0))
    return equinox(module, lambda model, x: model(x), X)


@optional_case("equinox")
def equinox_dequantized_before_it_is_combined():
    """The other way: values in the place of QTensors, the arrays first."""
    module = eqx.nn.MLP(4, 2, 5, 1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def value_fn(params, x):
        model = eqx.combine(fgrad.dequantize(params), static)
        return jnp.mean(eqx.filter_jit(jax.vmap(model))(x) ** 2)

    return Case(value_fn, small(params), {"x": X})


@optional_case("equinox")
def equinox_convolutions_and_norm():
    class Net(eqx.Module):
        conv: Any
        norm: Any
        head: Any
        dropout: Any

        def __init__(self, key: jax.Array):
            self.conv = eqx.nn.Conv2d(2, 4, 2, key=key)
            self.norm = eqx.nn.GroupNorm(2, 4)
            self.head = eqx.nn.Linear(4, 2, key=key)
            self.dropout = eqx.nn.Dropout(0.5, inference=True)

        def __call__(self, x: Any) -> jax.Array:
            x = jax.nn.relu(self.norm(self.conv(x)))
            return self.head(self.dropout(jnp.mean(x, (1, 2))))

    module, x = Net(jax.random.key(0)), integers(2, 2, 3, 3)
    # Its convolution is one of jax.lax, which takes arrays alone.
    return equinox(module, lambda model, x: model(x), x, dequantize=True)


@optional_case("equinox")
def equinox_recurrence():
    module = eqx.nn.GRUCell(3, 4, key=jax.random.key(0))

    def apply(model, sequence):
        def body(h, row):
            return model(row, h), None

        return lax.scan(body, jnp.zeros(4), sequence)[0]

    return equinox(module, apply, integers(2, 3, 3))


def haiku(network: Callable[..., Any], x: Any, **options: Any) -> Case:
    """The mean square of a Haiku network, whose state is closed over."""
    transformed = hk.transform_with_state(network)
    init = functools.partial(transformed.init, is_training=True)
    shapes, state = jax.eval_shape(init, jax.random.key(0), x)
    state = jax.tree.map(np.ones_like, small(state))

    def value_fn(params, x):
        y, _ = transformed.apply(params, state, None, x, is_training=False)
        return jnp.mean(y**2)

    return Case(value_fn, small(shapes), {"x": x}, **options)


@optional_case("haiku")
def haiku_mlp():
    def network(x, is_training):
        return hk.nets.MLP([5, 2], activation=jnp.tanh)(x)

    return haiku(network, X)


@optional_case("haiku")
def haiku_convolutions_with_batch_statistics():
    def network(x, is_training):
        x = hk.Conv2D(3, 2, with_bias=False)(x)
        x = hk.BatchNorm(True, True, 0.9)(x, is_training)
        return hk.Linear(2)(jax.nn.relu(x).mean((1, 2)))

    return haiku(network, integers(2, 4, 4, 2), dequantize=True)


@optional_case("haiku")
def haiku_lstm():
    def network(x, is_training):
        core = hk.LSTM(3)
        return hk.dynamic_unroll(core, x, core.initial_state(2))[0]

    return haiku(network, integers(3, 2, 4))


# --------------------------------------------------------- fixed-point layers, integers


def quantized(net: type[nn.Module], x: Any, bits: int, **options: Any) -> Case:
    """A network of `fgrad.layers` that ends in a product of integers.

    All its scales are powers of two, so that scaling rounds nothing, and the loss is a
    maximum, which no order of evaluation changes. A network whose activations pass
    through functions like exp is as reproducible as their rounding to the 8-bit grid.
    """
    model = net((bits, 8) if bits else None)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
    params, state = small(shapes["params"], deviation=0.5), {}
    if bits:
        variables = jax.jit(functools.partial(layers.calibrate, model))(
            {"params": params}, x
        )
        scales = jax.tree.map(power_of_two, variables[layers.SCALES])
        state = {layers.SCALES: scales}
    labels = np.arange(len(x)) % 3

    def value_fn(params, x):
        logits = model.apply({"params": params, **state}, x)
        return jnp.max(jnp.abs(logits - jax.nn.one_hot(labels, 3)))

    return Case(value_fn, params, {"x": x}, exact=bool(bits), same_bits=True, **options)


def power_of_two(scale: Any) -> np.ndarray:
    """The next power of two above."""
    return np.ldexp(np.float32(1), np.frexp(np.asarray(scale))[1])


@layers_case
def fixed_point_convolutions(bits):
    class Net(nn.Module):
        bits: Any = None

        @nn.compact
        def __call__(self, x):
            x = nn.relu(layers.Conv(4, (3, 3), bits=self.bits)(x))
            x = nn.relu(
                layers.Conv(4, (3, 3), 2, feature_group_count=4, bits=self.bits)(x)
            )
            return layers.Dense(3, bits=self.bits)(x.reshape(len(x), -1))

    return quantized(Net, integers(3, 4, 4, 2), bits)


@layers_case
def fixed_point_attention(bits):
    class Net(nn.Module):
        bits: Any = None

        @nn.compact
        def __call__(self, tokens):
            x = layers.Embed(7, 4, bits=self.bits)(tokens)
            x = x + layers.MultiHeadDotProductAttention(2, bits=self.bits)(x)
            return layers.Dense(3, bits=self.bits)(x[:, 0])

    tokens = np.array([[1, 5], [5, 3], [0, 6]])
    # As above, until the key's bias moves the keys' grid.
    unused = "['MultiHeadDotProductAttention_0']['key']['bias']"
    return quantized(Net, tokens, bits, unused=(unused,))


@layers_case
def fixed_point_lstm(bits):
    class Net(nn.Module):
        bits: Any = None

        @nn.compact
        def __call__(self, x):
            x = layers.RNN(layers.LSTMCell(4, bits=self.bits))(x)
            return layers.Dense(3, bits=self.bits)(x[:, -1])

    return quantized(Net, integers(3, 3, 4), bits)


# ------------------------------------------------- networks that others have quantized


def largest(apply: Callable[[Any, Any], jax.Array]) -> Callable[..., jax.Array]:
    """The largest distance of a network's logits from labels."""

    def value_fn(params, x):
        labels = jax.nn.one_hot(np.arange(len(x)), 3)
        return jnp.max(jnp.abs(apply(params, x) - labels))

    return value_fn


@case
def aqt_training():
    """AQT quantizes a float kernel, or the values of a QTensor, in each evaluation."""
    x = quantized_networks.images()
    net = quantized_networks.aqt_net(8)
    value_fn = largest(lambda params, x: net.apply({"params": params}, x))
    return Case(value_fn, quantized_networks.weights(x), {"x": x}, exact=True)


@layers_case
def aqt_serving(bits):
    """The integers that AQT serves are the leaves."""
    if not bits:
        return aqt_training()
    x = quantized_networks.images()
    variables = {"params": quantized_networks.weights(x, attention=True)}
    _, params, apply = quantized_networks.aqt_serving(
        bits, variables, x, attention=True
    )
    floats = jax.tree.map(np.asarray, fgrad.dequantize(params))
    return Case(largest(apply), floats, {"x": x}, exact=True, same_bits=True)


@layers_case
def layers_of_aqt(bits):
    """`fgrad.layers` that take AQT's configuration."""
    x = quantized_networks.images()
    config = quantized_networks.aqt_dot(bits or 8)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(layers.Conv(4, (3, 3), aqt=config)(x))
            return layers.Dense(3, aqt=config)(x.reshape(len(x), -1))

    net = Net()
    value_fn = largest(lambda params, x: net.apply({"params": params}, x))
    params = quantized_networks.weights(x)
    return Case(value_fn, params, {"x": x}, exact=True, same_bits=True)


@layers_case
def qwix_training_and_serving(bits):
    """Qwix finds its weights among arrays, and serves integers of 8 bits at most."""
    x = quantized_networks.images()
    params = quantized_networks.weights(x)
    if bits == 8:
        _, leaves, apply = quantized_networks.qwix_serving(params, x)
        params = jax.tree.map(np.asarray, fgrad.dequantize(leaves))
    else:
        train = quantized_networks.qwix_training()

        def apply(params, x):
            return train(fgrad.dequantize(params), x)

    return Case(largest(apply), params, {"x": x}, exact=True, same_bits=True)
