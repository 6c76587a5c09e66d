"""What a loss returns beside its value: ``has_aux`` in every link that evaluates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import fast_jit

import fgrad
from fgrad import activity, estimators
from fgrad.enhancements import sharpness_aware, sparse_update

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
PARAMS = {"w": jnp.array([0.5, 0.25, -0.125])}


def loss_fn(params, x):
    y = x @ jnp.asarray(params["w"])
    return jnp.mean((y - 1) ** 2), {"weights": jnp.asarray(params["w"]), "n": len(x)}


def without(params, x):
    return loss_fn(params, x)[0]


def gradient_link(**options):
    return fgrad.fixed_point_forward_grad(
        KEY, epsilon=0.1, num_perturbations=3, **options
    )


def update(tx, params, state, value_fn=loss_fn, **extra):
    step = functools.partial(tx.update, value_fn=value_fn, x=X, **extra)
    return fast_jit(step)(params, state, params)


@pytest.mark.parametrize("bits", [0, 16, 8])
@pytest.mark.parametrize("vectorize", [1, 2, 3])
def test_aux_is_that_of_the_last_evaluation(bits, vectorize):
    params = fgrad.quantize(PARAMS, bits=bits) if bits else PARAMS
    tx = gradient_link(vectorize=vectorize, has_aux=True)
    plain = gradient_link(vectorize=vectorize)
    updates, state = update(tx, params, tx.init(params))
    wanted, _ = update(plain, params, plain.init(params), without)
    for got, want in zip(*map(jax.tree.leaves, (updates, wanted)), strict=True):
        np.testing.assert_array_equal(got, want)
    # The minus side of the third pair.
    z_key = fgrad.perturbations.sample_key(KEY, 0, 2)
    last = fgrad.evaluation.perturb(
        params, z_key, 0.1, fgrad.perturbations.normal(), sign=-1
    )
    np.testing.assert_allclose(state.aux["weights"], jnp.asarray(last["w"]), rtol=1e-6)
    assert int(state.aux["n"]) == 5


@pytest.mark.parametrize("vectorize", [1, 2])
@pytest.mark.parametrize(("broken", "kept"), [((3,), 2), ((2, 3), 1), ((), 3)])
def test_a_loss_that_is_no_number_does_not_give_its_aux(vectorize, broken, kept):
    """Which of the evaluations 0 to 3 gave the aux is told by the weight itself."""
    w = jnp.float32(1)
    z_keys = [fgrad.perturbations.sample_key(KEY, 0, i) for i in range(2)]
    sides = [
        fgrad.evaluation.perturb(w, key, 0.5, fgrad.perturbations.normal(), sign=sign)
        for key in z_keys
        for sign in (1, -1)
    ]
    bad = jnp.array([sides[i] for i in broken])

    def value_fn(w):
        return jnp.where(jnp.any(jnp.abs(bad - w) < 1e-6), jnp.nan, w), w

    result = estimators.forward_gradient(
        value_fn,
        w,
        KEY,
        epsilon=0.5,
        num_perturbations=2,
        vectorize=vectorize,
        has_aux=True,
    )
    assert float(result.aux) == pytest.approx(float(sides[kept]))
    assert int(result.nonfinite_pairs) == len({i // 2 for i in broken})


def test_aux_of_the_last_evaluation_when_no_loss_is_a_number():
    result = estimators.forward_gradient(
        lambda w: (w * jnp.nan, 7), jnp.float32(1), KEY, has_aux=True
    )
    assert int(result.aux) == 7


def test_both_sides_of_dual_forward_have_an_aux():
    pairs = fgrad.dual_forward(loss_fn, PARAMS, KEY, 0.25, has_aux=True, x=X)
    losses = fgrad.dual_forward(without, PARAMS, KEY, 0.25, x=X)
    for (loss, aux), alone, sign in zip(pairs, losses, (1, -1), strict=True):
        z = fgrad.perturbations.normal()
        there = fgrad.evaluation.perturb(PARAMS, KEY, 0.25, z, sign=sign)
        assert float(loss) == float(alone)
        np.testing.assert_allclose(aux["weights"], there["w"], rtol=1e-6)


def test_a_state_with_an_initial_aux_keeps_its_structure():
    """In a scan, in the branches of MultiSteps, and beside typed keys."""

    def value_fn(params, x, counter, key):
        loss, _ = loss_fn(params, x)
        return loss, {"counter": counter + 1, "key": jax.random.split(key)[0]}

    initial = {"counter": jnp.int32(0), "key": jax.random.key(3)}
    tx = fgrad.qzo_ff(0.01, KEY, has_aux=True, initial_aux=initial)

    def body(carry, _):
        params, state = carry
        aux = optax.tree.get(state, "aux")
        updates, state = tx.update(params, state, params, value_fn=value_fn, x=X, **aux)
        return (optax.apply_updates(params, updates), state), aux["counter"]

    start = (PARAMS, tx.init(PARAMS))
    (_, state), counters = jax.lax.scan(body, start, length=4)
    assert counters.tolist() == [0, 1, 2, 3]
    key = initial["key"]
    for _ in range(4):
        key = jax.random.split(key)[0]
    assert jnp.all(
        jax.random.key_data(optax.tree.get(state, "aux")["key"])
        == jax.random.key_data(key)
    )
    every = optax.MultiSteps(
        gradient_link(has_aux=True, initial_aux={"weights": jnp.zeros(3), "n": 0}), 2
    )
    state = every.init(PARAMS)
    for wanted in (0, 5):
        _, state = every.update(PARAMS, state, PARAMS, value_fn=loss_fn, x=X)
        assert int(optax.tree.get(state, "aux")["n"]) == wanted


def test_without_an_initial_aux_the_first_step_gives_the_state_its_structure():
    tx = gradient_link(has_aux=True)
    state = tx.init(PARAMS)
    assert state.aux == ()
    steps = fast_jit(functools.partial(tx.update, value_fn=loss_fn, x=X))
    for _ in range(3):
        _, state = steps(PARAMS, state, PARAMS)
    assert set(state.aux) == {"weights", "n"}
    assert gradient_link().init(PARAMS).aux == ()


def test_a_donated_state_does_not_take_the_initial_aux_with_it():
    initial = {"weights": jnp.ones(3), "n": jnp.int32(1)}
    tx = gradient_link(has_aux=True, initial_aux=initial)
    step = functools.partial(tx.update, value_fn=loss_fn, x=X)
    jax.jit(step, donate_argnums=1)(PARAMS, tx.init(PARAMS), PARAMS)
    assert initial["weights"].tolist() == [1, 1, 1]
    assert tx.init(PARAMS).aux["weights"].tolist() == [1, 1, 1]


def test_wrapped_links_pass_the_aux_on():
    """The ascent of sharpness and the choice of sparse updates want the loss alone."""
    inner = fgrad.qzo_ff(0.01, KEY, epsilon=0.1, has_aux=True)
    tx = sharpness_aware(inner, jax.random.key(1), rho=0.05)
    _, state = update(tx, PARAMS, tx.init(PARAMS))
    assert int(optax.tree.get(state, "aux")["n"]) == 5
    tx = sparse_update(
        inner,
        density=0.5,
        criterion="importance",
        key=jax.random.key(1),
        reselect_every=2,
    )
    state = tx.init(PARAMS)
    for _ in range(4):
        _, state = update(tx, PARAMS, state)
        assert int(optax.tree.get(state, "aux")["n"]) == 5


@pytest.mark.parametrize("others", [False, True])
def test_aux_of_activities_is_that_of_the_weights_as_they_are(others):
    def losses(params, x):
        y = jnp.tanh(x @ params["w"][:, None])
        aux = {"y": y[:, 0] + params["b"], "n": len(x), "weights": params["w"]}
        return jnp.sum((y + params["b"] - 1) ** 2, axis=-1), aux

    params = PARAMS | {"b": jnp.zeros(1)}
    rest = gradient_link(mask=activity.leaves_outside(["w"])) if others else None
    tx = activity.activity_forward_grad(KEY, ["w"], has_aux=True, others=rest)
    _, state = update(tx, params, tx.init(params), losses)
    np.testing.assert_allclose(state.aux["y"], jnp.tanh(X @ params["w"]), rtol=1e-5)
    np.testing.assert_array_equal(state.aux["weights"], params["w"])
    assert int(state.aux["n"]) == 5


def add_one(params, x):
    return loss_fn(params, x)[0], 1


@pytest.mark.parametrize(
    ("options", "value_fn", "error", "words"),
    [
        ({"has_aux": True}, without, TypeError, r"must return \(loss, aux\), got a"),
        (
            {"has_aux": True},
            lambda params, x: (*loss_fn(params, x), 3),
            TypeError,
            r"must return \(loss, aux\), got a tuple",
        ),
        ({}, loss_fn, TypeError, r"got a tuple.*\(loss, aux\), and say has_aux=True"),
        (
            {"has_aux": True},
            lambda params, x: (without(params, x), {"name": "cat"}),
            TypeError,
            "the aux of value_fn holds a str at 'name'",
        ),
        (
            {"has_aux": True, "initial_aux": {"n": 0}},
            add_one,
            ValueError,
            r"an aux of .*, and initial_aux is \{'n'",
        ),
        (
            {"has_aux": True, "initial_aux": jnp.zeros(2)},
            add_one,
            ValueError,
            "the same structure, shapes and dtypes",
        ),
        ({"has_aux": True, "initial_aux": 0.5}, add_one, ValueError, "dtypes"),
    ],
)
def test_an_aux_that_was_not_agreed_on(options, value_fn, error, words):
    tx = gradient_link(**options)
    with pytest.raises(error, match=words):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value_fn=value_fn, x=X)


def test_options_that_contradict_each_other():
    with pytest.raises(ValueError, match=r"returns nothing; set has_aux=True"):
        gradient_link(initial_aux={"n": 0})
    with pytest.raises(TypeError, match="has_aux must be True or False, got 'yes'"):
        gradient_link(has_aux="yes")


def test_an_aux_may_not_hand_out_the_integers_of_a_grid():
    params = fgrad.quantize(PARAMS)
    tx = gradient_link(has_aux=True)

    def value_fn(params, x):
        return loss_fn(params, x)[0], params["w"].qvalue

    with pytest.raises(TypeError, match="reads the stored integers of leaf"):
        tx.update(params, tx.init(params), params, value_fn=value_fn, x=X)
