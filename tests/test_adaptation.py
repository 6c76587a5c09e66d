"""The best known method in one call: what it chooses, and that it learns."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fgrad
from fgrad.activity import joint_structure

KEY = jax.random.key(0)


def data():
    x = jax.random.normal(jax.random.key(1), (64, 8))
    return {"x": x, "y": (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)}


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


class Transformer(nn.Module):
    """One block on the values of an example as tokens."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(8)(x[..., None]) + self.param("place", nn.initializers.ones, (8,))
        h = h + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(h))
        h = h + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(h))))
        return nn.Dense(2, name="last")(nn.LayerNorm()(h).mean(1))


def linen():
    """An unmodified model of Flax."""
    model, batch = Transformer(), data()
    params = model.init(jax.random.key(2), batch["x"])["params"]

    def losses(params, x, y):
        return cross_entropy(model.apply({"params": params}, x), y)

    return losses, params, batch


@pytest.mark.slow
def test_head_and_layers_are_found():
    losses, params, batch = linen()
    head, sites = joint_structure.find_head(losses, params, batch)
    assert head == ["last/bias", "last/kernel"]
    assert len(sites) == len(jax.tree.leaves(params)) - 2
    tx = fgrad.adapt(KEY, losses, params, jax.eval_shape(lambda: batch))
    jacobians = tx.init(params)[0].jacobians
    assert {len(x) for x in jacobians.values()} == {2}
    shapes = {x.shape for x in jacobians.values()}
    assert shapes == {(2, 8), (2, 4), (2, 16)}
    assert joint_structure.has_stream(losses, params, head, sites, batch)


def trained(losses, params, batch, steps, **options):
    tx = fgrad.adapt(KEY, losses, params, batch, steps=steps, **options)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params, value_fn=losses, **batch)
        return (optax.apply_updates(params, updates), state), None

    start = params, tx.init(params)
    run = jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps)[0][0])
    return run(start)


@pytest.mark.slow
@pytest.mark.parametrize("on_the_way", [False, True])
def test_a_transformer_of_flax_learns_more_than_its_head(on_the_way):
    losses, params, batch = linen()
    batch["y"] = (batch["x"][:, 0] > batch["x"][:, 1]).astype(jnp.int32)
    rate = {"learning_rate": 1e-2}
    inside = [name for name in params if name != "last"]
    head = trained(losses, params, batch, 400, frozen=inside, **rate)
    found = trained(losses, params, batch, 400, on_the_way=on_the_way, **rate)
    assert losses(found, **batch).mean() < 0.9 * losses(head, **batch).mean()


@pytest.mark.slow
def test_an_unmodified_model_of_nnx_learns_in_fixed_point():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(8, 32, rngs=rngs)
            self.head = nnx.Linear(32, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.hidden(x)))

    graph, state = nnx.split(Network(nnx.Rngs(0)))

    def losses(params, x, y):
        model = nnx.merge(graph, fgrad.dequantize(params))
        return cross_entropy(model(x), y)

    params = fgrad.quantize(nnx.to_pure_dict(state), bits=16, headroom=3.0)
    batch = data()
    before = losses(params, **batch).mean()
    found = trained(losses, params, batch, 300, learning_rate=1e-2, every=4)
    assert losses(found, **batch).mean() < 0.3 * before
    assert found["hidden"]["kernel"].qvalue.dtype == jnp.int16


class Normalised(nn.Module):
    """Batches are normalised, and the running statistics come beside the output."""

    hidden: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.hidden):
            x = nn.Dense(8)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9)(x))
        return nn.Dense(2, name="last")(x)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [0, 1])
def test_what_comes_beside_the_losses_is_handed_from_step_to_step(hidden):
    """The running statistics after three steps are those of the three networks."""
    model, batch = Normalised(hidden), data()
    variables = model.init(jax.random.key(2), batch["x"])
    params, stats = variables["params"], variables.get("batch_stats", {})
    start = {"batch_stats": stats, "largest": jnp.float32(0)}

    def losses(params, x, y, batch_stats, largest):
        logits, kept = model.apply(
            {"params": params, "batch_stats": batch_stats}, x, mutable="batch_stats"
        )
        found = cross_entropy(logits, y)
        largest = jnp.maximum(largest, found.max())
        return found, {"batch_stats": kept.get("batch_stats", {}), "largest": largest}

    tx = fgrad.adapt(
        KEY, losses, params, batch | start, steps=9, has_aux=True, initial_aux=start
    )

    @jax.jit
    def step(params, state):
        aux = optax.tree.get(state, "aux")
        updates, state = tx.update(
            params, state, params, value_fn=losses, **batch, **aux
        )
        return optax.apply_updates(params, updates), state

    state, expected = tx.init(params), start
    for _ in range(3):
        _, expected = losses(params, **batch, **expected)
        before, (params, state) = params, step(params, state)
        changed = jax.tree.map(lambda a, b: np.any(a != b), before, params)
        assert changed["last"]["kernel"]
    found = optax.tree.get(state, "aux")
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert len(jax.tree.leaves(found)) == 1 + 2 * hidden


def test_an_aux_that_is_not_announced_is_refused():
    params = {"kernel": jnp.zeros((8, 2))}

    def losses(params, x, y):
        return cross_entropy(x @ params["kernel"], y)

    with pytest.raises(ValueError, match="set has_aux=True"):
        fgrad.adapt(KEY, losses, params, data(), initial_aux={"n": 0})


def test_a_linear_model_is_its_head_alone():
    batch = data()
    params = {"kernel": jnp.zeros((8, 2)), "bias": jnp.zeros(2)}

    def losses(params, x, y):
        return cross_entropy(x @ params["kernel"] + params["bias"], y)

    tx = fgrad.adapt(KEY, losses, params, batch)
    assert isinstance(tx.init(params)[0], fgrad.activity.ActivityForwardGradState)


def test_what_cannot_be_adapted_is_told_by_name_and_may_be_frozen():
    batch = data()
    params = {"tied": jnp.eye(8), "layer": jnp.eye(8), "head": jnp.ones((8, 2))}

    def losses(params, x, y):
        hidden = jnp.tanh(jnp.tanh(x @ params["tied"]) @ params["tied"])
        return cross_entropy(hidden @ params["layer"] @ params["head"], y)

    with pytest.raises(ValueError, match=r"leaf 'tied' has no output.*frozen="):
        fgrad.adapt(KEY, losses, params, batch)
    found = trained(losses, params, batch, 9, frozen=["tied"])
    np.testing.assert_array_equal(found["tied"], params["tied"])
    assert np.any(found["layer"] != params["layer"])


def test_a_head_of_another_shape_has_to_be_named():
    params = {"layer": jnp.eye(8), "head": jnp.ones((8, 2)), "scale": jnp.ones(64)}
    batch = data()

    def losses(params, x, y):
        hidden = jnp.tanh(x @ params["layer"]) @ params["head"]
        return cross_entropy(hidden, y) * params["scale"]

    with pytest.raises(ValueError, match="head cannot be found"):
        fgrad.adapt(KEY, losses, params, batch)
    tx = fgrad.adapt(KEY, losses, params, batch, head="head", frozen=["scale"])
    assert list(tx.init(params)[0].jacobians) == ["layer"]


@pytest.mark.parametrize("steps", [0, 1.5, True])
def test_steps_are_checked(steps):
    losses, params, batch = linen()
    with pytest.raises(ValueError, match="steps must be a positive integer"):
        fgrad.adapt(KEY, losses, params, batch, steps=steps)


def prodigy(x, y, w, steps):
    """Prodigy in float64 on the mean square error of a linear model.

    As in Mishchenko and Defazio, arXiv 2306.06101, algorithm 4, with Adam's correction
    of biases in the rate, which decays linearly.
    """
    start, d, r = w.copy(), 1e-4, 0.0
    m, v, s = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for k in range(steps):
        gradient = 2 / len(x) * x.T @ (x @ w - y)
        rate = 1 - k / steps
        rate *= np.sqrt(1 - 0.999 ** (k + 1)) / (1 - 0.9 ** (k + 1))
        r = np.sqrt(0.999) * r + rate * d**2 * np.sum(gradient * (start - w))
        s = np.sqrt(0.999) * s + rate * d**2 * gradient
        m = 0.9 * m + 0.1 * d * gradient
        v = 0.999 * v + 0.001 * (d * gradient) ** 2
        w = w - rate * d * m / (np.sqrt(v) + d * 1e-8)
        d = max(d, r / np.abs(s).sum())
    return w, d


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "steps", "atol"), [(None, 60, 1e-3), (16, 300, 0.02)])
def test_a_rate_is_found_as_prodigy_finds_it(bits, steps, atol):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(32, 4)), rng.normal(size=(4, 2))
    y = x @ rng.normal(size=(4, 2))
    params = {"w": jnp.asarray(w, jnp.float32)}
    if bits:
        params = fgrad.quantize(params, bits=bits, headroom=3.0)

    def losses(params, x, y):
        return jnp.sum((x @ jnp.asarray(params["w"]) - y) ** 2, axis=-1)

    batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    found = trained(losses, params, batch, steps, learning_rate="auto")
    expected, rate = prodigy(x, y, w, steps)
    # The rate grew 100-fold and more, and the weights went far.
    assert rate > 1e-2
    assert np.abs(expected - w).max() > 0.3
    # The first steps are of the length of the grid's, so that a rate on a grid is
    # another for a while; both end at the minimum.
    np.testing.assert_allclose(found["w"], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("rate", ["prodigy", -1.0, None])
def test_other_rates_are_refused(rate):
    params = {"kernel": jnp.zeros((8, 2))}

    def losses(params, x, y):
        return cross_entropy(x @ params["kernel"], y)

    with pytest.raises((TypeError, ValueError), match=r'rate must be .*"auto"'):
        fgrad.adapt(KEY, losses, params, data(), learning_rate=rate)
