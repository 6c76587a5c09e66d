"""The log of a run, and the run made again of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lanes import some
from sklearn import datasets

import fgrad
from fgrad import enhancements, estimators

X = jax.random.normal(jax.random.key(1), (8, 40))


def initial(bits=None):
    k = jax.random.split(jax.random.key(2), 2)
    params = {
        "a": jax.random.normal(k[0], (40, 32)) / 6,
        "b": jax.random.normal(k[1], (32,)),
    }
    return fgrad.quantize(params, bits=bits) if bits else params


def loss_fn(params, x):
    return jnp.mean(jnp.tanh(x @ jnp.asarray(params["a"])) @ jnp.asarray(params["b"]))


def estimate(**options):
    options = {"epsilon": 1e-2, "estimator": estimators.spsa, **options}
    return fgrad.fixed_point_forward_grad(jax.random.key(0), **options)


def guided():
    guide = enhancements.momentum_guided_sampling()
    return optax.chain(estimate(guide=guide), optax.sgd(0.1), fgrad.quantized_update())


def adam():
    inner = fgrad.on_values(optax.adamw(optax.linear_schedule(1e-2, 0.0, 9)))
    return optax.chain(estimate(), inner, fgrad.quantized_update())


def sharp():
    return enhancements.sharpness_aware(guided(), jax.random.key(5), rho=0.05)


def sparse():
    return enhancements.sparse_update(guided(), density=0.1, reselect_every=3)


def trained(tx, params, steps=5):
    """The parameters and the state after a run, and its log."""
    log, state = fgrad.RunLog(params), tx.init(params)

    @jax.jit
    def step(params, state, x):
        updates, state = tx.update(params, state, params, value_fn=loss_fn, x=x)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, jnp.roll(X, i))
        log.append(state)
    return params, state, log


def assert_same_bits(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.optimized
@pytest.mark.parametrize("bits", some([None, 16], [16]))
@pytest.mark.parametrize("chain", some([guided, adam], [adam]))
def test_a_run_is_made_again_to_the_bit(chain, bits, tmp_path):
    params, state, log = trained(chain(), initial(bits))
    log.save(tmp_path / "log")
    read = fgrad.RunLog.load(tmp_path / "log")
    assert len(read) == 5
    np.testing.assert_array_equal(read.losses, log.losses)
    assert_same_bits(read.replay(chain(), initial(bits)), (params, state))


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("chain", [sharp, sparse])
def test_the_weights_of_links_around_the_estimator_are_made_again(chain):
    params, _, log = trained(chain(), initial())
    again, _ = log.replay(chain(), initial())
    assert_same_bits(again, params)


@pytest.mark.slow
def test_a_log_may_begin_at_a_checkpoint():
    tx = guided()
    params, state, log = trained(tx, initial(), 4)
    half, half_state = log.until(2).replay(tx, initial())
    assert_same_bits((half, half_state), log.replay(tx, initial(), steps=2))
    later = fgrad.RunLog()
    later._key, later._steps = log._key, log._steps[2:]
    assert later.start == 2
    assert_same_bits(later.replay(tx, half, half_state), (params, state))
    with pytest.raises(ValueError, match="after step 0, and the log begins after step"):
        later.replay(tx, half)


@pytest.mark.slow
@pytest.mark.optimized
def test_a_thousand_steps_are_kilobytes(tmp_path):
    """The quickstart's task: a network that adapts to digits, 16 bits."""
    images, labels = datasets.load_digits(return_X_y=True)
    images = images.astype("float32") / 16
    model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(10)])
    initial = fgrad.quantize(model.init(jax.random.key(1), images[:1])["params"])

    def loss_fn(params, x, y):
        logits = model.apply({"params": fgrad.dequantize(params)}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def chain():
        return fgrad.qzo_ff(1e-3, jax.random.key(0), num_perturbations=20)

    tx, log = chain(), fgrad.RunLog(initial)
    params, state = initial, tx.init(initial)

    @jax.jit
    def step(params, state, x, y):
        updates, state = tx.update(params, state, params, value_fn=loss_fn, x=x, y=y)
        return optax.apply_updates(params, updates), state

    rows = np.random.default_rng(0).integers(0, 1500, (1000, 16))
    for index in rows:
        params, state = step(params, state, images[index], labels[index])
        log.append(state)
    path = tmp_path / "log"
    log.save(path)
    assert path.stat().st_size <= 200_000
    assert_same_bits(fgrad.RunLog.load(path).replay(chain(), initial), (params, state))


# ------------------------------------------------------------------------- errors


@pytest.fixture(scope="module")
def run():
    return trained(guided(), initial(), 2)


def test_another_beginning_or_key_is_an_error(run):
    _, _, log = run
    other = {**initial(), "b": initial()["b"].at[3].add(2.0**-20)}
    with pytest.raises(ValueError, match="not the parameters that the run began with"):
        log.replay(guided(), other)
    tx = fgrad.qzo_ff(0.1, jax.random.key(7))
    with pytest.raises(ValueError, match=r"chain has the key \[0 7\], and the run had"):
        log.replay(tx, initial())


def test_a_missing_step_is_an_error(run):
    _, state, log = run
    wrong = fgrad.RunLog()
    wrong.append(state)
    wrong.append(state)
    with pytest.raises(ValueError, match="the log has step 2 after step 2"):
        _ = wrong.losses
    with pytest.raises(ValueError, match="1 to 2, and the run goes on from step 5"):
        run[2].until(5)
    with pytest.raises(ValueError, match="the log has no step"):
        fgrad.RunLog().save("never written")
    with pytest.raises(ValueError, match="one fixed_point_forward_grad in it, got 0"):
        log.append(optax.sgd(0.1).init(initial()))


def test_a_damaged_file_is_an_error(run, tmp_path):
    _, _, log = run
    path = tmp_path / "log"
    log.save(path)
    content = path.read_bytes()
    for cut in (len(content) - 1, len(content) // 2, 3):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="is no valid safetensors file"):
            fgrad.RunLog.load(path)
    flipped = bytearray(content)
    flipped[-5] ^= 16
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="is damaged"):
        fgrad.RunLog.load(path)
    fgrad.save(path, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="is no log of a run"):
        fgrad.RunLog.load(path)


def test_losses_have_one_number_for_each_side_and_pair():
    tx, params = estimate(num_perturbations=4), initial()
    with pytest.raises(
        ValueError, match=r"\[2, m\] of the losses of m=4 pairs.* \(4, 2"
    ):
        tx.update(params, tx.init(params), params, losses=jnp.ones((4, 2)))


def test_a_state_keeps_the_losses_of_both_sides():
    tx, params = estimate(num_perturbations=2), initial()
    update = jax.jit(lambda s: tx.update(params, s, params, value_fn=loss_fn, x=X)[1])
    state = update(tx.init(params))
    plus, minus = state.losses
    np.testing.assert_allclose(plus - minus, state.loss_differences, atol=1e-6)
    np.testing.assert_allclose(jnp.mean(state.losses), state.loss, rtol=1e-6)
