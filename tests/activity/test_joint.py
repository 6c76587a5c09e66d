"""Joint pairs against `jax.grad`, `jax.jacobian` and the network itself."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lanes import some

import fgrad
from fgrad import activity, layers
from fgrad.activity import joint_step
from fgrad.tracing import primitives

EXAMPLES, CLASSES = 12, 3
KEY = jax.random.key(0)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def convolved(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout
    )


def problem():
    """A convolution, a residual block, a position-wise layer, a normalised head."""
    x, y = normal(0, EXAMPLES, 3, 3, 1), jnp.arange(EXAMPLES) % CLASSES
    params = {
        "stem": {"kernel": normal(1, 3, 3, 1, 2) / 2, "bias": normal(2, 2) / 3},
        "residual": {"kernel": normal(3, 3, 3, 2, 2) / 4},
        "inner": {"kernel": normal(4, 2, 4) / 2, "bias": normal(5, 4) / 4},
        "head": {"kernel": normal(6, 4, CLASSES), "bias": normal(7, CLASSES)},
    }

    def losses(params, x, y):
        layer = params["stem"]
        h = jax.nn.relu(convolved(x, layer["kernel"]) + layer["bias"])
        h = h + convolved(h, params["residual"]["kernel"])
        layer = params["inner"]
        h = jax.nn.gelu(h @ layer["kernel"] + layer["bias"]).mean((1, 2))
        h = (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(h.var(-1)[:, None] + 1e-3)
        layer = params["head"]
        logits = h @ layer["kernel"] + layer["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    return losses, params, {"x": x, "y": y}


def linear_problem():
    """Behind the inner layer everything is linear, and alike at all positions."""
    x, y = normal(0, EXAMPLES, 3, 4), jnp.arange(EXAMPLES) % CLASSES
    params = {
        "inner": {"kernel": normal(1, 4, 5), "bias": normal(2, 5)},
        "head": normal(4, 5, CLASSES),
    }

    def losses(params, x, y):
        hidden = x @ params["inner"]["kernel"] + params["inner"]["bias"]
        logits = hidden.mean(1) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    return losses, params, {"x": x, "y": y}


def true_gradient(losses, params, kwargs):
    return jax.grad(lambda p: losses(p, **kwargs).mean())(params)


def steps(tx, losses, params, kwargs, count, state=None):
    """Gradients of some steps at the same parameters, and the last state."""
    state = tx.init(params) if state is None else state

    def step(state, _):
        updates, state = tx.update(params, state, params, value_fn=losses, **kwargs)
        return state, updates

    state, found = jax.jit(lambda s: jax.lax.scan(step, s, None, length=count))(state)
    return found, state


def assert_close(found, expected, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, **tolerance), found, expected
    )


@pytest.mark.slow
def test_steps_with_correction_1_average_to_the_gradient(float64):
    """Whatever the mean Jacobians are: here they are wrong."""
    losses, params, kwargs = problem()
    tx = activity.joint_forward_grad(
        KEY, "head", every=1, num_perturbations=4, correction=1.0, epsilon=1e-4
    )
    state = tx.init(params)
    wrong = {k: normal(9, *v.shape) / 4 for k, v in state.jacobians.items()}
    state, count = state._replace(jacobians=wrong), 600
    found = jax.jit(
        lambda state: jax.lax.map(
            lambda i: tx.update(
                params, state._replace(count=i), params, value_fn=losses, **kwargs
            )[0],
            jnp.arange(count),
        )
    )(state)
    expected = true_gradient(losses, params, kwargs)
    assert_close(
        jax.tree.map(lambda x: x[0], found["head"]), expected["head"], atol=1e-3
    )
    for name in ("stem", "residual", "inner"):
        pairs = zip(*map(jax.tree.leaves, (found[name], expected[name])), strict=True)
        for a, b in pairs:
            error = a.std(0, ddof=1) / np.sqrt(count)
            assert np.abs((a.mean(0) - b) / error).max() < 5
            assert jnp.linalg.norm(error) < 0.3 * jnp.linalg.norm(b)


@pytest.mark.slow
def test_what_is_linear_is_predicted_exactly(float64):
    losses, params, kwargs = linear_problem()
    tx = activity.joint_forward_grad(
        KEY, "head", every=1, num_perturbations=4, epsilon=1e-4, memory=20
    )
    found, state = steps(tx, losses, params, kwargs, 2000)
    expected = true_gradient(losses, params, kwargs)["inner"]
    last = jax.tree.map(lambda x: x[-1], found["inner"])
    assert_close(last, expected, atol=1e-5)
    # Cross-entropy does not see what adds the same to all logits.
    seen = np.eye(CLASSES) - 1 / CLASSES
    np.testing.assert_allclose(
        state.jacobians["inner/bias"], seen @ params["head"].T / 3, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("per_position", [False, True])
def test_the_running_mean_is_that_of_the_jacobians(per_position, float64):
    """Where the gate is open, and up to what it knows of few examples."""
    losses, params, kwargs = problem()
    shapes = activity.explain_joint(losses, params, "head", **kwargs)
    tx = activity.joint_forward_grad(
        KEY,
        "head",
        sites=["residual"],
        every=1,
        num_perturbations=64,
        epsilon=1e-4,
        memory=400,
        activations=[a for a in shapes if "stem" not in a.leaves[0]][:1] + shapes[-1:],
        per_position=per_position,
    )
    _, state = steps(tx, losses, params, kwargs, 400)
    found = state.jacobians["residual/kernel"]

    def logits(h):
        layer = params["inner"]
        h = jax.nn.gelu(h @ layer["kernel"] + layer["bias"]).mean((0, 1))
        h = (h - h.mean()) * jax.lax.rsqrt(h.var() + 1e-3)
        return h @ params["head"]["kernel"] + params["head"]["bias"]

    layer = params["stem"]
    h = jax.nn.relu(convolved(kwargs["x"], layer["kernel"]) + layer["bias"])
    h = h + convolved(h, params["residual"]["kernel"])
    jacobians = jax.vmap(jax.jacobian(logits))(h)  # [examples, classes, 3, 3, 2]
    p = jax.nn.softmax(jax.vmap(logits)(h))
    signal = p - jax.nn.one_hot(kwargs["y"], CLASSES)
    gradients = jnp.einsum("ic,ichwd->ihwd", signal, jacobians)
    # The mean is that in the sense of least squares: it explains the gradients best.
    if not per_position:
        gradients = gradients.mean((1, 2))
    best = jnp.linalg.lstsq(signal, gradients.reshape(EXAMPLES, -1), rcond=1e-6)[0]
    best = best.reshape(found.shape)
    assert jnp.linalg.norm(found - best) < 0.25 * jnp.linalg.norm(best)


@pytest.mark.slow
def test_the_last_activation_by_the_transposed_head_is_exact(float64):
    """Through a pooling and a normalisation, and the GELU in front."""
    losses, params, kwargs = problem()
    tx = activity.joint_forward_grad(KEY, "head", transposed_head=True)
    found, state = steps(tx, losses, params, kwargs, 1)
    found = jax.tree.map(lambda x: x[0], found)
    expected = true_gradient(losses, params, kwargs)
    assert_close(found["inner"], expected["inner"], atol=2e-4)
    assert not np.any(state.jacobians["inner/bias"])
    assert np.any(state.jacobians["stem/bias"])


@pytest.mark.parametrize(
    "options",
    some(
        [
            {},
            {"correction": 0.5, "transposed_head": True},
            {"correction": "auto", "num_perturbations": 2},
        ],
        [{"correction": 0.5, "transposed_head": True}],
    ),
    ids=str,
)
def test_updates_on_the_way_are_the_same(options, float64):
    losses, params, kwargs = problem()
    found = []
    for on_the_way in (False, True):
        tx = activity.joint_forward_grad(
            KEY, "head", every=2, on_the_way=on_the_way, **options
        )
        updates, state = steps(tx, losses, params, kwargs, 5)
        found.append((updates, state.jacobians, state.errors, state.loss))
    assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_steps_between_perturbations_follow_the_mean():
    losses, params, kwargs = problem()
    tx = activity.joint_forward_grad(KEY, "head", every=3)

    def step(state, _):
        state = tx.update(params, state, params, value_fn=losses, **kwargs)[1]
        return state, state.jacobians["stem/bias"]

    start = tx.init(params)
    _, found = jax.jit(lambda s: jax.lax.scan(step, s, None, length=5))(start)
    assert np.any(found[0])
    for i, moves in enumerate([False, False, True, False], start=1):
        assert np.any(found[i] != found[i - 1]) == moves


def test_silent_units_are_not_perturbed(float64):
    """A unit below zero has no gradient, and adds no noise to that of others."""
    params = {"hidden": jnp.array([[1.0, -1.0]]), "head": jnp.ones((2, 2))}

    def losses(params, x):
        outputs = jax.nn.relu(x @ params["hidden"]) @ params["head"]
        return outputs.sum(-1) ** 2

    x = jnp.abs(normal(1, EXAMPLES, 1)) + 1  # the second unit is always silent
    tx = activity.joint_forward_grad(KEY, "head", every=1, correction=1.0, epsilon=1e-5)
    found, _ = steps(tx, losses, params, {"x": x}, 3)
    expected = true_gradient(losses, params, {"x": x})["hidden"]
    for hidden in found["hidden"]:  # one unit is left, so each sign says all
        np.testing.assert_allclose(hidden, expected, rtol=1e-5)


def cost(depth, **options):
    """Multiply-adds of a step with and without a pair, by those of the losses."""
    width = 32
    params = {f"layer_{i}": normal(i, width, width) for i in range(depth)}
    params["out"] = normal(99, width, 1)

    def losses(params, x):
        for i in range(depth):
            x = jnp.tanh(x @ params[f"layer_{i}"])
        return jnp.sum((x @ params["out"]) ** 2, -1)

    x = normal(0, 5, width)
    tx = activity.joint_forward_grad(KEY, "out", **options)
    state = tx.init(params)

    def update(params, state, x):
        return tx.update(params, state, params, value_fn=losses, x=x)

    jaxpr = jax.make_jaxpr(update)(params, state, x).jaxpr
    once = primitives.multiply_adds(jax.make_jaxpr(losses)(params, x).jaxpr.eqns)
    return [
        primitives.multiply_adds(jaxpr.eqns, branch) / once for branch in (max, min)
    ]


def test_the_cost_does_not_grow_with_the_number_of_sites():
    """One clean pass, two of a pair and the weights' products, however deep."""
    for depth in (2, 6):
        pair, none = cost(depth)
        # What lies before the first activation is not evaluated again.
        assert 3 < pair < 4.3, "evaluations: 3; products of weights: 1"
        assert 1.8 < none < 2.3
        pair, none = cost(depth, on_the_way=True)
        assert 4.5 < pair < 5.3, "evaluations: 4; products of weights: 1"
        assert 2.8 < none < 3.3


def test_no_derivative_of_a_program_is_taken(monkeypatch):
    """Neither jvp nor vjp: that is what devices without them have to do without."""

    def refuse(*args, **kwargs):
        raise AssertionError("the training path took a derivative")

    for name in ("jvp", "vjp", "grad", "value_and_grad", "linearize", "jacfwd"):
        monkeypatch.setattr(jax, name, refuse)
    losses, params, kwargs = problem()
    for on_the_way in (False, True):
        tx = activity.joint_forward_grad(
            KEY, "head", transposed_head=True, correction="auto", on_the_way=on_the_way
        )
        state = tx.init(params)
        jax.eval_shape(
            functools.partial(tx.update, value_fn=losses),
            params,
            state,
            params,
            **kwargs,
        )


class Network(nn.Module):
    """A convolution and two dense layers, float or fixed point."""

    bits: layers.Bits = None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(layers.Conv(4, (3, 3), strides=2, bits=self.bits)(x))
        x = nn.silu(layers.Dense(8, bits=self.bits)(x.reshape(len(x), -1)))
        return layers.Dense(2, bits=self.bits, name="head")(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "on_the_way"), [(None, False), ((16, 8), True), ((8, 8), False)]
)
def test_a_network_learns_with_900_evaluations(bits, on_the_way):
    model = Network(bits)
    x = normal(1, 64, 6, 6, 1)
    y = (x[:, :3].mean((1, 2, 3)) > x[:, 3:].mean((1, 2, 3))).astype(jnp.int32)
    variables = Network().init(jax.random.key(2), x)
    if bits:
        params = fgrad.quantize(variables["params"], bits=bits[0], headroom=3.0)
        variables = layers.calibrate(model, {"params": params}, x, headroom=2.0)
    params = variables.pop("params")

    def losses(params, variables, x, y):
        logits = model.apply({"params": params, **variables}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    tx = optax.chain(
        activity.joint_forward_grad(
            KEY, "head", transposed_head=True, on_the_way=on_the_way
        ),
        fgrad.on_values(optax.adam(5e-3)),
        fgrad.quantized_update(stochastic_below=16),
    )

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(
            params, state, params, value_fn=losses, variables=variables, x=x, y=y
        )
        return (optax.apply_updates(params, updates), state), state[0].loss

    start = params, tx.init(params)
    train = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=720))
    _, curve = train(start)  # 720 clean passes and 90 pairs
    assert curve[0] > 0.5
    assert curve[-1] < 0.05


def test_the_correction_weighs_error_against_noise(float64):
    """Halves of a batch agree on the error of the prediction, and not on noise."""
    rng = np.random.default_rng(0)
    error, noise = rng.normal(size=40), 3 * rng.normal(size=(2, 4000, 40))
    halves = [{"w": jnp.asarray((error + x) / 2)} for x in noise]
    first, second = halves
    energies = jax.vmap(joint_step._energies)(first, second).mean(0)
    expected = error @ error, error @ error + 40 * 9 / 2
    np.testing.assert_allclose(energies, expected, rtol=0.05)
    weight = joint_step.correction_of(energies)
    np.testing.assert_allclose(weight, expected[0] / expected[1], rtol=0.1)
    assert joint_step.correction_of(jnp.zeros(2)) == 0
    assert joint_step.correction_of(jnp.array([-1.0, 2.0])) == 0


def test_pairs_that_are_not_finite_are_left_out():
    params = {"hidden": jnp.eye(3), "head": jnp.ones((3, 2))}

    def losses(params, x):
        hidden = jnp.tanh(x @ params["hidden"])
        out = hidden @ params["head"]
        broken = jnp.where(hidden.sum(-1) != 3 * jnp.tanh(1.0), jnp.inf, 0)
        return out.sum(-1) + jnp.where(jnp.arange(len(x)) == 0, broken, 0)

    tx = activity.joint_forward_grad(KEY, "head", every=1, correction=1.0)
    found, state = steps(tx, losses, params, {"x": jnp.ones((4, 3))}, 1)
    assert state.nonfinite_pairs == 1
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))


BAD = {
    "no layer but the head": {"head": ["stem", "residual", "inner", "head"]},
    "names no parameter": {"sites": ["stern"]},
    "belongs to two sites": {"sites": ["head/bias"]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_names_are_told_in_init(message):
    _, params, _ = problem()
    tx = activity.joint_forward_grad(KEY, **{"head": "head", **BAD[message]})
    with pytest.raises(ValueError, match=message):
        tx.init(params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a positive integer"),
        ({"num_perturbations": 0}, "num_perturbations must be"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"correction": 2.0}, "correction must be between 0 and 1"),
        ({"correction": "much"}, "correction must be between 0 and 1"),
        ({"memory": -1.0}, "memory must be 0 steps or more"),
        ({"per_position": True}, "explain_joint"),
    ],
)
def test_bad_options_are_told_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        activity.joint_forward_grad(KEY, "head", **options)


def test_what_cannot_be_followed_is_told_by_name():
    params = {"shared": jnp.eye(3), "head": jnp.ones((3, 2))}

    def twice(params, x):
        return (jnp.tanh(x @ params["shared"]) @ params["shared"] @ params["head"])[
            :, 0
        ]

    tx = activity.joint_forward_grad(KEY, "head")
    with pytest.raises(ValueError, match="leaf 'shared' has no output to perturb"):
        tx.update(params, tx.init(params), params, value_fn=twice, x=jnp.ones((4, 3)))


def test_other_layouts_of_weights_need_the_activations():
    """Leaves that end in the axis of their inputs, as those of PyTorch do."""
    params = {"hidden": jnp.ones((5, 3)) / 3, "head": jnp.ones((2, 5))}
    x, y = normal(0, 6, 3), jnp.arange(6) % 2

    def losses(params, x, y):
        logits = jnp.tanh(x @ params["hidden"].T) @ params["head"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    def jacobian(**options):
        tx = activity.joint_forward_grad(KEY, "head", **options)
        return steps(tx, losses, params, {"x": x, "y": y}, 1)[1].jacobians["hidden"]

    with pytest.raises(ValueError, match="give activations="):
        jacobian()
    told = activity.explain_joint(losses, params, "head", x=x, y=y)
    assert jacobian(activations=told).shape == (2, 5)


def test_several_losses_are_refused():
    params = {"hidden": jnp.eye(3), "head": jnp.ones((3, 2))}

    def losses(params, x):
        out = x @ params["hidden"] @ params["head"]
        return {"a": out[:, 0], "b": out[:, 1]}

    tx = activity.joint_forward_grad(KEY, "head")
    with pytest.raises(ValueError, match="joint pairs need one"):
        tx.update(params, tx.init(params), params, value_fn=losses, x=jnp.ones((4, 3)))


@pytest.mark.slow
def test_others_train_what_is_no_site():
    losses, params, kwargs = problem()
    tx = activity.joint_forward_grad(
        KEY,
        "head",
        ["inner"],
        correction=0.5,
        others=fgrad.fixed_point_forward_grad(
            KEY, mask=activity.leaves_outside(["inner", "head"])
        ),
    )
    found, _ = steps(tx, losses, params, kwargs, 1)
    assert all(np.any(x) for x in jax.tree.leaves(found))
    tx = activity.joint_forward_grad(KEY, "head", ["inner"])
    found, _ = steps(tx, losses, params, kwargs, 1)
    assert not np.any(found["stem"]["kernel"])
    assert list(tx.init(params).jacobians) == ["inner/bias", "inner/kernel"]


def residual_problem():
    """Two blocks on a stream, one branch with a product of two of its values."""
    x, y = normal(0, EXAMPLES, 3, 4), jnp.arange(EXAMPLES) % CLASSES
    params = {
        "embedding": normal(1, 4, 5) / 2,
        "key": normal(2, 5, 5) / 3,
        "value": normal(3, 5, 5) / 3,
        "out": normal(7, 5, 5) / 3,
        "up": normal(4, 5, 7) / 2,
        "down": normal(5, 7, 5) / 3,
        "scale": jnp.ones(5),
        "head": normal(6, 5, CLASSES),
    }

    def losses(params, x, y, held=False):
        """``held``: what blocks add does not change with the stream."""
        hold = jax.lax.stop_gradient if held else (lambda h: h)
        h = x @ params["embedding"]
        u = hold(h)
        weights = jax.nn.softmax((u @ params["key"]) @ jnp.swapaxes(u, 1, 2))
        h = h + weights @ (u @ params["value"]) @ params["out"]
        h = h + jax.nn.silu(hold(h) @ params["up"]) @ params["down"]
        h = h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-3) * params["scale"]
        logits = h.mean(1) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    return losses, params, {"x": x, "y": y}


@pytest.mark.slow
@pytest.mark.parametrize("on_the_way", [False, True])
def test_the_stream_carries_the_gradient_as_if_blocks_were_the_identity(
    on_the_way, float64
):
    """The same as backpropagation through a network whose blocks read a copy."""
    losses, params, kwargs = residual_problem()
    tx = activity.joint_forward_grad(KEY, "head", residual=True, on_the_way=on_the_way)
    found, state = steps(tx, losses, params, kwargs, 1)
    found = jax.tree.map(lambda x: x[0], found)
    held = functools.partial(losses, held=True)
    expected = true_gradient(held, params, kwargs)
    assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not any(np.any(x) for x in state.jacobians.values()), "none is perturbed"


def test_a_network_without_skip_connections_has_no_stream():
    losses, params, kwargs = linear_problem()
    tx = activity.joint_forward_grad(KEY, "head", residual=True)
    with pytest.raises(ValueError, match="no skip connection"):
        jax.eval_shape(
            functools.partial(tx.update, value_fn=losses),
            params,
            tx.init(params),
            params,
            **kwargs,
        )
