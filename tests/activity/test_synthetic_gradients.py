import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lanes import some

import fgrad
from fgrad import activity, estimators, layers, perturbations
from fgrad.activity import Site, SyntheticGradient

EXAMPLES, CHANNELS, CLASSES = 12, 5, 3


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def sites(**settings):
    epsilon = settings.pop("epsilon", 1e-4)
    synthetic = SyntheticGradient("head", **settings)
    exact = Site("head", exact=True, epsilon=1e-4)
    return [Site("inner", epsilon=epsilon, synthetic=synthetic), exact]


def problem(*positions, curved=0.0):
    """Everything after the inner layer is linear, and alike at all positions."""
    x, y = normal(0, EXAMPLES, *positions, 4), jnp.arange(EXAMPLES) % CLASSES
    params = {
        "inner": {"kernel": normal(1, 4, CHANNELS), "bias": normal(2, CHANNELS)},
        "between": normal(3, CHANNELS, 6),
        "head": normal(4, 6, CLASSES),
    }

    def losses(params, x, y):
        hidden = x @ params["inner"]["kernel"] + params["inner"]["bias"]
        hidden += curved * jnp.sin(hidden)
        hidden = hidden.reshape(len(x), -1, CHANNELS).mean(1)
        logits = hidden @ params["between"] @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    return losses, params, {"x": x, "y": y}


def true_gradient(losses, params, kwargs):
    return jax.grad(lambda p: losses(p, **kwargs).mean())(params)


def estimates(tx, state, losses, params, kwargs, steps):
    """Gradients of some steps with the same parameters; the last state."""

    def step(state, _):
        updates, state = tx.update(params, state, params, value_fn=losses, **kwargs)
        return state, updates

    state, found = jax.jit(lambda s: jax.lax.scan(step, s, None, length=steps))(state)
    return found, state


def cosine(a, b):
    a, b = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (a, b))
    return float(a @ b / jnp.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("positions", some([(), (3,), (2, 3)], [(3,)]))
def test_what_is_linear_is_predicted_exactly(positions, float64):
    losses, params, kwargs = problem(*positions)
    # It must remember more than it forgets for the errors to die out.
    tx = activity.activity_forward_grad(
        jax.random.key(0), sites(memory=20), num_perturbations=4
    )
    found, state = estimates(tx, tx.init(params), losses, params, kwargs, 2000)
    expected = true_gradient(losses, params, kwargs)["inner"]
    last = jax.tree.map(lambda x: x[-1], found["inner"])
    for a, b in zip(*map(jax.tree.leaves, (last, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # Cross-entropy does not see what adds the same to all logits.
    jacobian = (params["between"] @ params["head"]).T / np.prod(positions)
    seen = np.eye(CLASSES) - 1 / CLASSES
    np.testing.assert_allclose(state.jacobians["inner"], seen @ jacobian, atol=1e-5)
    plain = activity.activity_forward_grad(
        jax.random.key(0), ["inner"], num_perturbations=4
    )
    found, _ = estimates(plain, plain.init(params), losses, params, kwargs, 1)
    first = jax.tree.map(lambda x: x[0], found["inner"])
    assert cosine(first, expected) < 0.99, "it is the prediction that was exact"


@pytest.mark.slow
@pytest.mark.optimized
def test_as_a_control_variate_it_is_unbiased(float64):
    losses, params, kwargs = problem(3, curved=1.0)
    tx = activity.activity_forward_grad(
        jax.random.key(0), sites(correction=1.0), num_perturbations=4
    )
    steps = 4000
    wrong = {"inner": normal(9, CLASSES, CHANNELS)}

    @jax.jit
    def gradients(counts):
        def gradient(count):
            state = tx.init(params)._replace(count=count, jacobians=wrong)
            return tx.update(params, state, params, value_fn=losses, **kwargs)[0]

        return jax.lax.map(gradient, counts)

    found = gradients(jnp.arange(steps))["inner"]
    expected = true_gradient(losses, params, kwargs)["inner"]
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        error = a.std(0, ddof=1) / np.sqrt(steps)
        scores = (a.mean(0) - b) / error
        assert np.abs(scores).max() < 5
        assert 0.3 < np.mean(scores**2) < 2.5
        assert jnp.linalg.norm(error) < 0.2 * jnp.linalg.norm(b)


@pytest.mark.slow
def test_less_noise_where_the_jacobian_differs_between_examples(float64):
    losses, params, kwargs = problem(3, curved=0.5)
    expected = true_gradient(losses, params, kwargs)["inner"]

    def quality(*chosen):
        tx = activity.activity_forward_grad(
            jax.random.key(0), chosen, num_perturbations=2
        )
        found, _ = estimates(tx, tx.init(params), losses, params, kwargs, 600)
        late = [jax.tree.map(lambda x, i=i: x[i], found["inner"]) for i in (-1, -50)]
        return np.mean([cosine(g, expected) for g in late])

    plain = quality("inner")
    controlled = quality(*sites(correction=1.0, memory=200))
    usual = quality(*sites(memory=200))
    assert plain < 0.5 < 0.8 < controlled < usual
    assert usual > 0.9


def test_the_first_step_has_nothing_but_the_correction():
    losses, params, kwargs = problem(3, curved=1.0)
    found = {}
    for name, chosen in {
        "synthetic": sites(correction=0.25, epsilon=0.03),
        "plain": ["inner", Site("head", exact=True, epsilon=1e-4)],
    }.items():
        tx = activity.activity_forward_grad(jax.random.key(0), chosen)
        found[name], _ = estimates(tx, tx.init(params), losses, params, kwargs, 1)
    for a, b in zip(
        *(jax.tree.leaves(found[name]["inner"]) for name in ("synthetic", "plain")),
        strict=True,
    ):
        np.testing.assert_allclose(a, 0.25 * b, rtol=1e-5)


@pytest.mark.slow
def test_one_step_of_the_running_mean(float64):
    """Against loops in NumPy over directions and examples."""
    losses, params, kwargs = problem(2, curved=1.0)
    count, memory, directions = 7, 4.0, 3
    before = np.asarray(normal(9, CLASSES, CHANNELS), np.float32)
    tx = activity.activity_forward_grad(
        jax.random.key(5),
        sites(memory=memory, correction=0.5),
        num_perturbations=directions,
    )
    state = tx.init(params)._replace(
        count=jnp.int32(count), jacobians={"inner": jnp.asarray(before)}
    )
    updates, after = tx.update(params, state, params, value_fn=losses, **kwargs)

    x, y = kwargs["x"], kwargs["y"]
    hidden = x @ params["inner"]["kernel"] + params["inner"]["bias"]

    def example_loss(hidden, y):
        mean = (hidden + jnp.sin(hidden)).mean(0)
        logits = mean @ params["between"] @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    true = np.asarray(jax.vmap(jax.grad(example_loss))(hidden, y))
    logits = (hidden + jnp.sin(hidden)).mean(1) @ params["between"] @ params["head"]
    delta = np.asarray(jax.nn.softmax(logits) - jax.nn.one_hot(y, CLASSES))
    us = directions_of(hidden.shape, count, directions)
    excess = np.zeros(hidden.shape)
    for i in range(EXAMPLES):
        guess = delta[i] @ before
        for u in us[:, i]:
            excess[i] += ((true[i] - guess) * u).sum() * u / directions
    dy = (delta @ before)[:, None] + 0.5 * excess
    expected = np.einsum("bpi,bpo->io", x, dy) / EXAMPLES
    np.testing.assert_allclose(updates["inner"]["kernel"], expected, atol=1e-6)
    rate = 1 / (1 + memory + CHANNELS / (directions * EXAMPLES))
    change = delta.T @ excess.mean(1) / (delta**2).sum()
    np.testing.assert_allclose(
        after.jacobians["inner"], before + rate * change, atol=1e-6
    )


def directions_of(shape, count, directions):
    """u of a step with the key of 5, [directions, *shape]."""
    found, u = [], perturbations.rademacher()
    for index in range(directions):
        key = perturbations.sample_key(jax.random.key(5), count, index)
        # Of the layer's first leaf.
        key = perturbations.leaf_keys(key, ["inner/bias"])["inner/bias"]
        found.append(u.step * np.asarray(u.sample(key, shape)))
    return np.stack(found)


@pytest.mark.slow
def test_an_example_whose_loss_is_not_finite_teaches_nothing():
    losses, params, kwargs = problem(3)

    def broken(params, x, y):
        return jnp.where(jnp.arange(EXAMPLES) == 2, jnp.nan, losses(params, x, y))

    tx = activity.activity_forward_grad(jax.random.key(0), sites(), vectorize=4)
    found, state = estimates(tx, tx.init(params), broken, params, kwargs, 3)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))
    assert bool(jnp.isfinite(state.jacobians["inner"]).all())
    assert bool(state.jacobians["inner"].any())


class Net(nn.Module):
    bits: object = None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(layers.Conv(6, (3, 3), bits=self.bits, name="inner")(x))
        x = nn.relu(layers.Conv(8, (3, 3), bits=self.bits, name="between")(x))
        return layers.Dense(3, bits=self.bits, name="head")(x.mean((1, 2)))


@pytest.mark.slow
def test_integers_follow_the_floats_and_learn():
    x, y = normal(0, 32, 4, 4, 3), jnp.arange(32) % 3
    start = Net().init(jax.random.key(1), x)["params"]

    def chain():
        return optax.chain(
            activity.activity_forward_grad(
                jax.random.key(2), sites(epsilon=0.03), num_perturbations=2, vectorize=2
            ),
            fgrad.on_values(optax.adam(1e-2)),
            fgrad.quantized_update(),
        )

    def train(bits):
        begin = start if bits is None else fgrad.quantize(start, bits=16, headroom=3.0)
        model = Net(bits)
        scales = {}
        if bits:
            variables = layers.calibrate(model, {"params": begin}, x, headroom=2.0)
            scales = {layers.SCALES: variables[layers.SCALES]}

        def losses(params, x, y):
            logits = model.apply({"params": params, **scales}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y)

        tx = chain()

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params, value_fn=losses, x=x, y=y)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=150))(
            (begin, tx.init(begin))
        )
        end = losses(params, x, y).mean()
        # The Jacobian where training began.
        tx = activity.activity_forward_grad(
            jax.random.key(2),
            sites(epsilon=0.03, memory=400),
            num_perturbations=8,
            vectorize=8,
        )
        _, state = estimates(tx, tx.init(begin), losses, begin, {"x": x, "y": y}, 400)
        return end, state.jacobians["inner"]

    loss, jacobian = train(None)
    integer_loss, integer_jacobian = train((16, 8))
    assert loss < 0.7 < np.log(3)
    assert integer_loss < 0.85
    assert cosine(jacobian, integer_jacobian) > 0.98
    assert integer_jacobian.shape == (3, 6)
    assert integer_jacobian.dtype == jnp.float32


def test_the_state_is_small_and_has_the_structure_that_optax_expects():
    _, params, _ = problem(3)
    tx = optax.chain(
        activity.activity_forward_grad(jax.random.key(0), sites()), optax.adam(0.1)
    )
    state = tx.init(params)
    assert state[0].jacobians["inner"].shape == (CLASSES, CHANNELS)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    plain = activity.activity_forward_grad(jax.random.key(0), ["inner"])
    assert not plain.init(params).jacobians


HEAD = Site("head", exact=True)
# name: (function, part of the message)
ERRORS = {
    "no name": (lambda: SyntheticGradient(""), "name of an exact site"),
    "memory": (
        lambda: SyntheticGradient("head", memory=-1),
        "at least 0, got -1",
    ),
    "correction": (lambda: SyntheticGradient("head", correction=2), "between 0 and 1"),
    "a name": (lambda: Site("inner", synthetic="head"), "SyntheticGradient"),
    "exact": (
        lambda: Site("inner", exact=True, synthetic=SyntheticGradient("head")),
        "no noise",
    ),
    "no such site": (
        lambda: tx_of(Site("inner", synthetic=SyntheticGradient("tail")), HEAD),
        "no exact site",
    ),
    "not exact": (
        lambda: tx_of(Site("inner", synthetic=SyntheticGradient("head")), "head"),
        "Add for example",
    ),
    "another loss": (
        lambda: tx_of(
            Site("inner", loss="local", synthetic=SyntheticGradient("head")), HEAD
        ),
        "same loss",
    ),
    "signs": (
        lambda: activity.activity_forward_grad(
            jax.random.key(0), sites(), estimator=estimators.sign_m_spsa
        ),
        "leave out estimator",
    ),
    "two layers": (
        lambda: updated(
            Site("inner", "between", synthetic=SyntheticGradient("head")), HEAD
        ),
        "single layer",
    ),
    "two layers of a size": (
        lambda: updated(
            Site("inner", "between", synthetic=SyntheticGradient("head")),
            HEAD,
            between=normal(3, CHANNELS, CHANNELS),
            head=normal(4, CHANNELS, CLASSES),
        ),
        "Name one layer",
    ),
    "head without classes": (
        lambda: updated(
            Site("inner", synthetic=SyntheticGradient("head")),
            HEAD,
            head=normal(4, 6),
            losses=lambda p, x, y: (
                jnp.tanh(x @ p["inner"]["kernel"] + p["inner"]["bias"])
                @ p["between"]
                @ p["head"]
            ),
        ),
        "has to be [examples, 6]",
    ),
}


def tx_of(*chosen):
    return activity.activity_forward_grad(jax.random.key(0), chosen)


def updated(*chosen, losses=None, **changes):
    usual, params, kwargs = problem()
    params |= changes
    tx = tx_of(*chosen)
    state = tx.init(params)
    tx.update(params, state, params, value_fn=losses or usual, **kwargs)


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong(name):
    function, message = ERRORS[name]
    with pytest.raises((TypeError, ValueError)) as error:
        function()
    assert message in str(error.value)
