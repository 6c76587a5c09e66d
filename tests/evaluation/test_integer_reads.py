"""Inside a loss nothing reads the integers of a QTensor in silence."""

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fgrad
from fgrad import activity, enhancements, fixed_point, layers, products
from fgrad.evaluation import integer_reads

X = jnp.linspace(-1, 1, 8).reshape(4, 2)


def make_params():
    floats = {"w": jnp.array([[0.0, 1, -2], [3, 0, 1]]), "b": jnp.array([1.0, 2, 3])}
    return fgrad.quantize(floats, headroom=1.0)


def base(params):
    return jnp.mean((X @ params["w"] + params["b"]) ** 2)


def over_leaves(function):
    return lambda p: base(p) + sum(function(x) for x in jax.tree.leaves(p))


def scanned_sum(params):
    qvalue = params["w"].qvalue
    return jax.lax.scan(lambda c, row: (c + row.sum(), None), 0, qvalue)[0]


WRONG = {
    "L2 over leaves": over_leaves(lambda x: jnp.sum(x**2)),
    "L1 over leaves": over_leaves(lambda x: jnp.sum(abs(x))),
    "count over leaves": over_leaves(lambda x: jnp.sum(x != 0)),
    "largest over leaves": over_leaves(jnp.max),
    "vdot over leaves": over_leaves(lambda x: jnp.vdot(x, x)),
    "mean over leaves": over_leaves(jnp.mean),
    "norm of optax": lambda p: base(p) + optax.tree.norm(p),
    "scaled tree": lambda p: base(jax.tree.map(lambda x: 0.9 * x, p)),
    "shifted tree": lambda p: base(jax.tree.map(lambda x: x + 1, p)),
    "clipped tree": lambda p: base(jax.tree.map(lambda x: jnp.clip(x, -1, 1), p)),
    "narrowed tree": lambda p: base(jax.tree.map(lambda x: x.astype(jnp.int8), p)),
    "raveled tree": lambda p: jnp.sum(jax.flatten_util.ravel_pytree(p)[0]),
    "float leaves only": lambda p: (
        base(p) + sum(jnp.abs(x) for x in jax.tree.leaves(p) if x.dtype == jnp.float32)
    ),
    "in jit": jax.jit(over_leaves(lambda x: jnp.sum(x**2))),
    "in remat": jax.checkpoint(over_leaves(lambda x: jnp.sum(x**2))),
    "in vmap": lambda p: jax.vmap(lambda x: x * jnp.sum(p["w"].qvalue))(X).sum(),
    "in scan": lambda p: jnp.float32(scanned_sum(p)),
    "in cond": lambda p: jax.lax.cond(
        X[0, 0] > 0, lambda q: 1.0 * q.qvalue.sum(), lambda q: 0.0, p["w"]
    ),
    "in while": lambda p: jax.lax.while_loop(
        lambda c: c < p["b"].qvalue[0], lambda c: c + 1, jnp.int16(0)
    ).astype(jnp.float32),
    "as an index": lambda p: jnp.arange(9.0)[p["b"].qvalue[0]],
    "returned": lambda p: p["b"].scale,
    "integers times another scale": lambda p: jnp.sum(p["w"].qvalue * p["b"].scale),
}
RIGHT = {
    "base": (base, base),
    "L2 of values": (
        lambda p: base(p) + optax.tree.norm(fgrad.dequantize(p), squared=True),
        lambda p: base(p) + sum(jnp.sum(x**2) for x in p.values()),
    ),
    "map over tensors": (
        lambda p: sum(
            jax.tree.leaves(jax.tree.map(jnp.sum, p, is_leaf=fixed_point.is_qtensor))
        ),
        lambda p: jnp.sum(p["w"]) + jnp.sum(p["b"]),
    ),
    "as arrays": (
        lambda p: abs(p["w"]).sum() + jnp.sum(p["b"] != 0) + p["w"].T[0, 1],
        lambda p: abs(p["w"]).sum() + jnp.sum(p["b"] != 0) + p["w"].T[0, 1],
    ),
    "dequantized by hand": (
        lambda p: jnp.mean(p["w"].qvalue[:1].T * p["w"].scale),
        lambda p: jnp.mean(p["w"][:1]),
    ),
    "scale after the product": (
        lambda p: jnp.mean((X @ p["w"].qvalue.astype(jnp.float32)) * p["w"].scale),
        lambda p: jnp.mean(X @ p["w"]),
    ),
    "jit, remat, vmap": (
        lambda p: (
            jax.jit(jax.checkpoint(base))(p)
            + jax.vmap(lambda x, q: x @ q, (0, None))(X, p["w"]).sum()
        ),
        lambda p: base(p) + (X @ p["w"]).sum(),
    ),
    "scan over stacked tensors": (
        lambda p: jax.lax.scan(
            lambda c, q: (c + jnp.sum(q**2), None),
            0.0,
            jax.tree.map(lambda *x: jnp.stack(x), p["b"], p["b"]),
        )[0],
        lambda p: 2 * jnp.sum(p["b"] ** 2),
    ),
    "cond": (
        lambda p: jax.lax.cond(X[0, 0] < 0, lambda q: q.sum(), lambda q: 0.0, p["w"]),
        lambda p: jnp.sum(p["w"]),
    ),
    "gradient inside": (
        lambda p: jnp.sum(jax.grad(lambda w: jnp.sum(w**2))(jnp.asarray(p["w"]))),
        lambda p: 2 * jnp.sum(p["w"]),
    ),
    "on purpose": (
        lambda p: (
            jnp.sum(fixed_point.integers_of(p["b"]) ** 2.0)
            * fixed_point.scale_of(p["b"]) ** 2
        ),
        lambda p: jnp.sum(p["b"] ** 2),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_loss_that_reads_integers_is_refused(name):
    loss, params = WRONG[name], make_params()
    with pytest.raises(TypeError, match=r"the loss reads the .* of leaf '(w|b)'"):
        integer_reads.checked(loss)(params)


@pytest.mark.parametrize("name", RIGHT)
def test_a_loss_of_values_has_their_loss(name):
    loss, oracle = RIGHT[name]
    params = make_params()
    values = {
        key: jnp.array(np.asarray(q.qvalue, np.float32) * np.asarray(q.scale))
        for key, q in params.items()
    }
    got = integer_reads.checked(loss)(params)
    np.testing.assert_allclose(got, oracle(values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "mask", [None, {"w": False, "b": True}, {"w": True, "b": False}]
)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "name", ["L2 over leaves", "norm of optax", "float leaves only"]
)
def test_dual_forward_refuses_it_for_trained_and_frozen_leaves(mask, jit, name):
    def pair(params):
        return fgrad.dual_forward(
            WRONG[name], params, jax.random.key(0), 0.1, mask=mask
        )

    with pytest.raises(TypeError, match=r"fgrad.dequantize\(params\)"):
        (jax.jit(pair) if jit else pair)(make_params())


def test_a_frozen_leaf_alone_is_found():
    params = make_params()
    mask = {"w": False, "b": True}
    for part in ("qvalue", "scale"):

        def loss(p, part=part):
            return base(p) + jnp.sum(1.0 * abs(getattr(p["w"], part)))

        with pytest.raises(TypeError, match="of leaf 'w'"):
            fgrad.dual_forward(loss, params, jax.random.key(0), 0.1, mask=mask)


def test_the_message_names_the_leaf_the_operation_and_the_line():
    with pytest.raises(TypeError) as error:
        integer_reads.checked(lambda p: jnp.sum(jnp.square(p["w"].qvalue)))(
            make_params()
        )
    text = str(error.value)
    assert "stored integers of leaf 'w'" in text
    assert "'square'" in text
    assert "test_integer_reads.py:" in text
    assert "is_leaf=fgrad.fixed_point.is_qtensor" in text


def test_functions_of_jax_are_blamed_on_who_calls_them():
    params = make_params()
    fixed_point.perturb_qvalue(  # traces jnp.clip for the same shape and dtype first
        params["w"].qvalue, jnp.ones((2, 3), jnp.int8), jnp.int32(1), 1.0, 16
    )
    with pytest.raises(TypeError, match="test_integer_reads"):
        integer_reads.checked(lambda p: jnp.clip(p["w"].qvalue, -1, 1).sum())(params)


def test_trees_without_qtensors_are_left_alone():
    params = {"w": jnp.array([1.0, 2.0])}
    loss = over_leaves(lambda x: jnp.sum(x**2))

    def plain(p):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    assert integer_reads.checked(plain)(params) == 5
    with pytest.raises(KeyError):
        integer_reads.checked(loss)(params)


# ------------------------------------------------------------------ who uses the check


def step(tx, params, loss):
    updates, _ = tx.update(params, tx.init(params), params, value_fn=loss)
    return optax.apply_updates(params, updates)


def links():
    key = jax.random.key(0)
    inner = fgrad.qzo_ff(0.1, key, epsilon=0.1)
    yield "plain", inner
    yield "sharpness", enhancements.sharpness_aware(inner, key, rho=0.05)
    yield "sparse", enhancements.sparse_update(inner, density=0.5, key=key)
    sharp = enhancements.sharpness_aware(inner, key, rho=0.05)
    yield "both", enhancements.sparse_update(sharp, density=0.5, key=key)


@pytest.mark.parametrize(("name", "tx"), list(links()))
def test_links_train_on_values_and_refuse_integers(name, tx):
    params = make_params()
    after = step(tx, params, base)
    assert (after["w"].qvalue != params["w"].qvalue).any()
    with pytest.raises(TypeError, match="the loss reads the"):
        step(tx, params, WRONG["L2 over leaves"])


def test_activities_refuse_integers_as_well():
    params = make_params()

    def losses(p, x):
        return jnp.sum((x @ p["w"] + p["b"]) ** 2, axis=1)

    def wrong(p, x):
        return losses(p, x) + sum(jnp.sum(x**2) for x in jax.tree.leaves(p["b"]))

    tx = activity.activity_forward_grad(
        jax.random.key(0),
        ["w"],
        others=fgrad.fixed_point_forward_grad(
            jax.random.key(1), epsilon=0.1, mask={"w": False, "b": True}
        ),
    )
    tx.update(params, tx.init(params), params, value_fn=losses, x=X)
    with pytest.raises(TypeError, match="of leaf 'b'"):
        tx.update(params, tx.init(params), params, value_fn=wrong, x=X)


def test_integer_products_and_lookups_pass():
    params = make_params()
    q = fixed_point.quantize_to_scale(X, jnp.float32(0.01), 8)
    numbers = (((1,), (0,)), ((), ()))

    def integer_product(p):
        return jnp.sum(products.dot_general(q, p["w"], numbers))

    got = integer_reads.checked(integer_product)(params)
    assert got == integer_product(params)
    embed = layers.Embed(3, 4)
    tokens = jnp.array([2, 0])
    for axis in (None, 0, -1):
        table = embed.init(jax.random.key(0), tokens)
        table = fixed_point.quantize(table, channel_axis=axis)

        def look_up(table):
            return jnp.sum(embed.apply(table, tokens))

        assert integer_reads.checked(look_up)(table) == look_up(table)


def test_a_replaced_part_is_still_of_its_leaf():
    def loss(p):
        zeroed = dataclasses.replace(p["b"], qvalue=p["b"].qvalue.at[0].set(0))
        return jnp.sum(zeroed**2)

    np.testing.assert_allclose(
        integer_reads.checked(loss)(make_params()), 2**2 + 3**2, rtol=1e-4
    )
