"""Influence of training examples, beside `jax.grad` and beside what a step did."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import fast_jit
from scipy import stats

import fgrad
from fgrad import analysis

KEY = jax.random.key(0)
EXAMPLES, INPUTS, HIDDEN, CLASSES = 12, 5, 4, 3
X = jax.random.normal(jax.random.key(1), (EXAMPLES, INPUTS))
Y = jnp.arange(EXAMPLES) % CLASSES


def make_params(seed=2):
    body, head, bias = jax.random.split(jax.random.key(seed), 3)
    return {
        "body": {"kernel": 0.7 * jax.random.normal(body, (INPUTS, HIDDEN))},
        "head": {
            "kernel": jax.random.normal(head, (HIDDEN, CLASSES)),
            "bias": jax.random.normal(bias, (CLASSES,)),
        },
    }


def losses_fn(params, x, y):
    hidden = jnp.tanh(x @ jnp.asarray(params["body"]["kernel"]))
    head = params["head"]
    logits = hidden @ jnp.asarray(head["kernel"]) + jnp.asarray(head["bias"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def true_gradients(params, part=None, x=X, y=Y):
    """[examples, weights], by `jax.grad` of one example after the other."""

    def of_one(x, y):
        def loss(part_of):
            whole = part_of if part is None else params | {part: part_of}
            return losses_fn(whole, x[None], y[None])[0]

        found = jax.grad(loss)(params if part is None else params[part])
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(found)])

    return np.stack([of_one(*pair) for pair in zip(x, y, strict=True)])


def test_products_of_forward_traces_are_unbiased_and_as_noisy_as_promised():
    params, m, repeats = make_params(), 16, 200
    gradients = true_gradients(params)
    true = gradients @ gradients.T

    def found(key):
        a = analysis.forward_traces(
            losses_fn, params, key, epsilon=1e-2, num_perturbations=m, x=X, y=Y
        )
        return analysis.influence(a, a), analysis.self_influence(a)

    keys = jax.random.split(KEY, repeats)
    products, own = fast_jit(lambda keys: jax.lax.map(found, keys))(keys)
    products, own = np.asarray(products), np.asarray(own)
    np.testing.assert_allclose(own, np.einsum("rii->ri", products), rtol=1e-5)
    # Var(d d') = (g·g')² + |g|²|g'|² for normal directions, over m and the repeats.
    squares = np.diag(true)
    deviation = np.sqrt((true**2 + np.outer(squares, squares)) / m)
    errors = (products.mean(0) - true) / (deviation / np.sqrt(repeats))
    assert np.abs(errors).max() < 5
    assert np.abs(errors).mean() < 1.1  # of normal errors 0.8
    assert np.mean(products.std(0) / deviation) == pytest.approx(1, abs=0.1)


def test_more_directions_rank_examples_as_the_gradient_does():
    params = make_params()
    true = np.sum(true_gradients(params) ** 2, axis=1)
    found = {}
    for m in (4, 400):
        traces = fast_jit(
            lambda m=m: analysis.forward_traces(
                losses_fn, params, KEY, num_perturbations=m, x=X, y=Y
            )
        )()
        found[m] = stats.spearmanr(analysis.self_influence(traces), true).statistic
    assert found[400] > 0.97
    assert found[400] > found[4]


@pytest.mark.parametrize("bits", [None, 16])
def test_the_traces_of_a_head_are_its_gradients(bits):
    params = make_params()
    given = fgrad.quantize(params, bits=bits) if bits else params
    values = fgrad.dequantize(given)
    found = fast_jit(
        lambda p: analysis.head_traces(
            losses_fn, p, "head", epsilon=0.01, vectorize=3, x=X, y=Y
        )
    )(given)
    true = true_gradients(values, "head")
    # The leaves come in the order of their names here, as in jax.tree.leaves.
    assert found.shape == (EXAMPLES, (HIDDEN + 1) * CLASSES)
    np.testing.assert_allclose(found @ found.T, true @ true.T, rtol=2e-3, atol=2e-4)


def test_an_aux_beside_the_losses_changes_no_trace_of_a_head():
    def with_aux(params, **kwargs):
        return losses_fn(params, **kwargs), {"rows": kwargs["x"].sum()}

    plain, same = (
        analysis.head_traces(fn, make_params(), "head", x=X, y=Y)
        for fn in (losses_fn, with_aux)
    )
    np.testing.assert_array_equal(plain, same)


def test_influence_adds_up_checkpoints_by_their_learning_rates():
    rates, test, train = [0.5, 0.1], slice(0, 3), slice(3, None)
    traces = [true_gradients(make_params(seed)).astype(np.float32) for seed in (2, 3)]
    found = analysis.influence(
        [a[test] for a in traces], [a[train] for a in traces], rates
    )
    expected = sum(r * a[test] @ a[train].T for r, a in zip(rates, traces, strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    own = analysis.self_influence([a[train] for a in traces], rates)
    whole = analysis.influence(
        [a[train] for a in traces], [a[train] for a in traces], rates
    )
    np.testing.assert_allclose(own, np.diag(whole), rtol=1e-4)


def test_the_directions_of_a_run_share_out_what_its_step_did():
    """η/B Σ_j I(i, j) is how much a step of SPSA lowered the loss of example i."""
    params, rate, step = make_params(), 1e-3, 1
    options = {"epsilon": 1e-2, "num_perturbations": 3}
    batch = {"x": X[:8], "y": Y[:8]}
    test = {"x": X[8:], "y": Y[8:]}
    tx = optax.chain(
        fgrad.fixed_point_forward_grad(KEY, estimator=fgrad.estimators.spsa, **options),
        optax.sgd(rate),
    )
    state = tx.init(params)
    for _ in range(step):  # the directions of step 1 are not those of step 0
        _, state = tx.update(params, state, params, value_fn=lambda p: jnp.float32(0))
    updates, _ = fast_jit(
        lambda p, s: tx.update(
            p, s, p, value_fn=lambda p, x, y: losses_fn(p, x, y).mean(), **batch
        )
    )(params, state)
    change = losses_fn(optax.apply_updates(params, updates), **test) - losses_fn(
        params, **test
    )
    traces = [
        fast_jit(
            lambda x, y: analysis.forward_traces(
                losses_fn, params, KEY, step=step, x=x, y=y, **options
            )
        )(**data)
        for data in (test, batch)
    ]
    shares = (
        analysis.influence(
            *traces,
        )
        * rate
        / 8
    )
    np.testing.assert_allclose(change, -shares.sum(1), rtol=0.05, atol=2e-5)
    assert np.abs(change).max() > 1e-3


def test_a_loss_that_is_not_finite_has_no_slope():
    def broken(w, x):
        return jnp.where(x > 0, jnp.nan, x) * w

    found = analysis.forward_traces(
        broken, jnp.float32(1), KEY, num_perturbations=2, x=jnp.array([1.0, -1.0])
    )
    assert not np.any(found[0])
    assert np.all(found[1])


def test_what_it_refuses():
    params = make_params()
    with pytest.raises(TypeError, match=r"one loss for each example.*shape \(\)"):
        analysis.forward_traces(
            lambda p, x, y: losses_fn(p, x, y).mean(), params, KEY, x=X, y=Y
        )
    with pytest.raises(TypeError, match="got a dict"):
        analysis.forward_traces(lambda p: {"a": p}, jnp.ones(3), KEY)
    with pytest.raises(TypeError, match="number, got relative_epsilon"):
        analysis.forward_traces(
            losses_fn, params, KEY, epsilon=fgrad.relative_epsilon(0.01), x=X, y=Y
        )
    with pytest.raises(ValueError, match="'neck' names no parameter"):
        analysis.head_traces(losses_fn, params, "neck", x=X, y=Y)
    traces = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"2 learning rates and \[1\] arrays"):
        analysis.self_influence(traces, [0.1, 0.2])
    with pytest.raises(ValueError, match=r"1 learning rates and \[1, 2\] arrays"):
        analysis.influence([traces], [traces, traces], [0.1])
