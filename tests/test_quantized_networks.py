"""A step on networks of AQT and Qwix: which products of the compiled step are integers.

That the losses are those of explicitly perturbed weights is tested by the cases of
`loss_cases` whose names say AQT or Qwix.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quantized_networks

import fgrad
from fgrad import evaluation, perturbations
from fgrad.fixed_point import is_qtensor

X = quantized_networks.images()
LABELS = np.array([0, 2])
Z = {"normal": perturbations.normal(), "low rank": perturbations.low_rank()}

# The dense layers, of which four are those of attention, and the convolutions of `Net`.
DENSE, CONVOLUTIONS = 5, 1


def network(library, mode):
    """Parameters and ``apply(params, x)``."""
    weights = quantized_networks.weights(X, attention=True)
    weights = jax.tree.map(jnp.asarray, weights)
    if mode == "serving":
        make = {
            "AQT": lambda: quantized_networks.aqt_serving(
                8, {"params": weights}, X, attention=True
            ),
            "Qwix": lambda: quantized_networks.qwix_serving(weights, X, attention=True),
        }[library]
        _, params, apply = make()
        return params, apply
    if library == "AQT":
        net = quantized_networks.aqt_net(8, attention=True)

        def apply(params, x):
            return net.apply({"params": params}, x)

    else:
        train = quantized_networks.qwix_training(attention=True)

        def apply(params, x):
            return train(fgrad.dequantize(params), x)

    return fgrad.quantize(weights) if mode == "QTensor" else weights, apply


def integer_products(text, operation):
    """How many products in the text of a compiled program add up integers."""
    return len(re.findall(rf"= s32\[[\d,]*\]\S* {operation}\(", text))


@pytest.mark.parametrize(
    ("library", "mode", "z"),
    [
        (library, mode, z)
        for library in ("AQT", "Qwix")
        for mode, z in [
            ("float", "normal"),
            ("QTensor", "low rank"),
            ("serving", "normal"),
            ("serving", "low rank"),
        ]
    ],
)
def test_a_step_multiplies_integers(library, mode, z):
    params, apply = network(library, mode)

    def value_fn(params, x, labels):
        logits = apply(params, x)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    tx = fgrad.qzo_ff(
        1e-2, jax.random.key(0), epsilon=0.05, num_perturbations=2, perturbation=Z[z]
    )
    update = functools.partial(tx.update, value_fn=value_fn, x=X, labels=LABELS)
    state = tx.init(params)
    compiled = jax.jit(update).lower(params, state, params).compile()
    text = compiled.as_text()
    assert integer_products(text, "dot") >= DENSE
    # AQT 0.9 convolves the integers in float32.
    wanted = CONVOLUTIONS if library == "Qwix" else 0
    assert integer_products(text, "convolution") == wanted or z == "low rank"

    updates, state = compiled(params, state, params)
    moved = optax.apply_updates(params, updates)
    assert np.isfinite(optax.tree.get(state, "loss"))
    changed = jax.tree.map(
        lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), params, moved
    )
    assert any(jax.tree.leaves(changed))


WAYS = {"serving": {"low rank"}, "QTensor": {"at use", "first"}}


@pytest.mark.parametrize("mode", WAYS)
@pytest.mark.parametrize("library", ["AQT", "Qwix"])
def test_directions_of_low_rank_share_the_product_of_what_is_served(library, mode):
    """A kernel that is quantized anew in each evaluation has no product to share."""
    params, apply = network(library, mode)
    lines = evaluation.explain(
        lambda params: jnp.sum(apply(params, X)), params, Z["low rank"]
    )
    kernels = [line for line in lines if re.search("kernel|qrhs", line.name)]
    assert {line.way for line in kernels} <= WAYS[mode]
    assert len(kernels) == DENSE + CONVOLUTIONS


@pytest.mark.parametrize("library", ["AQT", "Qwix"])
def test_served_integers_learn(library):
    weights = jax.tree.map(jnp.asarray, quantized_networks.weights(X))
    serve = {
        "AQT": lambda: quantized_networks.aqt_serving(8, {"params": weights}, X),
        "Qwix": lambda: quantized_networks.qwix_serving(weights, X),
    }[library]
    _, params, apply = serve()

    def value_fn(params):
        logits = apply(params, X) / 16
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, LABELS)
        return losses.mean()

    tx = fgrad.qzo_ff(1.0, jax.random.key(1), epsilon=0.05, num_perturbations=4)
    state = tx.init(params)
    update = jax.jit(functools.partial(tx.update, value_fn=value_fn))
    start = value_fn(params)
    for _ in range(60):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert value_fn(params) < 0.5 * start
    for leaf in jax.tree.leaves(params, is_leaf=is_qtensor):
        assert not is_qtensor(leaf) or leaf.qvalue.dtype == jnp.int8
