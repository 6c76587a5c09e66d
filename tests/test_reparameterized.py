"""Branches in one kernel: the fold is exact, in floats and in integers."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import fast_jit

import fgrad
from experiments.configs import quickstart
from experiments.configs import reparameterized as reparameterized_config
from experiments.data.arrays import Split
from experiments.learners import adapt
from experiments.learners.classification import Classification
from experiments.learners.learner import make_learner
from experiments.models import cnn, reparameterized
from experiments.models.reparameterized import fold

INPUTS, FEATURES = 3, 10
X = jax.random.normal(jax.random.key(0), (2, 6, 6, INPUTS))


def drawn(seed=0):
    keys = jax.random.split(jax.random.key(seed))
    branches = jax.random.normal(keys[0], (12, INPUTS, FEATURES))
    return branches, jax.random.normal(keys[1], (4, FEATURES))


def integers(bits, branches, scales):
    step = jnp.float32(2.0**-9), jnp.float32(2.0**-11)
    dtype = jnp.int8 if bits <= 8 else jnp.int16
    return (
        fgrad.QTensor(jnp.asarray(x, dtype), scale, bits)
        for x, scale in zip((branches, scales), step, strict=True)
    )


def convolved(x, kernel, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision="highest",
    )


def window(values):
    """A depthwise kernel [3, 3, 1, features]."""
    return np.broadcast_to(np.reshape(values, (3, 3, 1, -1)), (3, 3, 1, FEATURES))


def cosines():
    """Of the frequencies (down, across) of each channel, on the grid of 1/32."""
    angle = (np.arange(3) + 0.5) * np.pi / 3
    pairs = list(itertools.product(range(3), range(3)))[1:]
    waves = [np.outer(np.cos(a * angle), np.cos(b * angle)) for a, b in pairs]
    chosen = [waves[channel % len(pairs)] for channel in range(FEATURES)]
    return np.round(32 * np.stack(chosen, -1)) / 32


@pytest.mark.optimized
def test_the_folded_kernel_does_what_the_branches_do_one_by_one():
    branches, scales = drawn()
    kernels = branches[9:].reshape(3, 1, 1, INPUTS, FEATURES)
    fixed = [window(np.eye(9)[4]), window(np.full(9, 1 / 8)), window(cosines())]
    parts = [convolved(X, branches[:9].reshape(3, 3, INPUTS, FEATURES))]
    for kernel, filter_ in zip(kernels, fixed, strict=True):
        parts.append(convolved(convolved(X, kernel), filter_, groups=FEATURES))
    expected = sum(scale * part for scale, part in zip(scales, parts, strict=True))
    np.testing.assert_allclose(
        convolved(X, fold(branches, scales)), expected, rtol=1e-5, atol=1e-5
    )


def exact_fold(branches, scales, bits):
    """The fold of integers by Python's own, rounded once with ties to even."""
    fixed = reparameterized.windows(branches.shape[-1])
    kernel = np.zeros((9, *branches.shape[1:]), int)
    for tap, c, o in np.ndindex(kernel.shape):
        rows = [branches[tap], *branches[9:]]
        total = sum(
            int(scales[b, o]) * int(fixed[b, tap, o]) * int(rows[b][c, o])
            for b in range(4)
        )
        kernel[tap, c, o] = round(Fraction(total, 2 ** (bits + 6)))
    return kernel.reshape(3, 3, *branches.shape[1:])


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("kind", ["any", "extreme", "ties"])
def test_the_fold_of_integers_is_rounded_once(bits, kind):
    largest = 2 ** (bits - 1) - 1
    rng = np.random.default_rng(bits)
    shapes = (12, INPUTS, FEATURES), (4, FEATURES)
    if kind == "any":
        branches, scales = (rng.integers(-largest, largest + 1, s) for s in shapes)
    elif kind == "extreme":  # nothing overflows and nothing is clipped
        branches, scales = (largest * rng.choice([-1, 1], s) for s in shapes)
        branches[..., 0] = scales[:, 0] = largest
    else:  # odd multiples of half a step, and integers next to them
        branches, scales = np.zeros(shapes[0], int), np.zeros(shapes[1], int)
        scales[0], branches[:9] = 2 ** (bits - 2), rng.integers(-largest, largest, 10)
        scales[1], branches[9] = 1, rng.integers(-1, 2, (INPUTS, FEATURES))
    kernel = fast_jit(fold)(*integers(bits, branches, scales))
    assert kernel.bits == bits
    np.testing.assert_array_equal(kernel.qvalue, exact_fold(branches, scales, bits))
    # The value: by one rounding at most half a step from the sum of the branches.
    values = fold(*(q.dequantize() for q in integers(bits, branches, scales)))
    apart = np.abs(np.asarray(kernel.dequantize()) - values).max()
    assert apart <= 0.5001 * float(kernel.scale) + 1e-6 * float(jnp.abs(values).max())


def test_scales_of_each_channel_and_what_is_refused():
    branches, scales = (fgrad.quantize(x, channel_axis=-1) for x in drawn())
    kernel = fold(branches, scales)
    assert kernel.scale.shape == (1, 1, 1, FEATURES)
    expected = fold(branches.dequantize(), scales.dequantize())
    apart = jnp.abs(kernel.dequantize() - expected)
    assert float(jnp.max(apart / kernel.scale)) < 0.51
    with pytest.raises(ValueError, match="4 to 16, got 16 and 8"):
        fold(fgrad.quantize(drawn()[0]), fgrad.quantize(drawn()[1], bits=8))


def small(bits=None):
    return reparameterized.ReparameterizedCNN(
        num_classes=2, features=(4, 4), strides=(2, 1), bits=bits
    )


@pytest.mark.parametrize("bits", [None, (16, 8)], ids=["float", "16w8a"])
def test_forward_gradients_train_the_scales_and_nothing_else(bits):
    images = jax.random.normal(jax.random.key(1), (32, 8, 8, 1))
    split = Split(images, (images.mean((1, 2, 3)) > 0).astype(int))
    params = small().init(jax.random.key(0), images[:1])["params"]
    method = quickstart.changed(
        quickstart.base().methods.forward_fp32,
        {"adaptation": {"branch_scales": {}}, "bits": bits, "batch_size": 32},
    )
    learner = make_learner(method, small, Classification(method))
    state = learner.init(params, images, 0)
    assert {name: set(leaves) for name, leaves in state.params.items()} == {
        "Block_0": {"scales"},
        "Block_1": {"scales"},
    }
    step = jax.jit(learner.step)
    first = state
    losses = []
    for _ in range(40):
        state = step(state, jnp.float32(0.05), jnp.float32(1e9), split)
        losses.append(optax.tree.get(state.opt_state, "loss"))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.02
    jax.tree.map(np.testing.assert_array_equal, first.frozen, state.frozen)


def test_a_network_without_branches_is_refused():
    with pytest.raises(TypeError, match="CNN has no branches"):
        adapt.branch_scales(cnn.CNN())


def test_the_head_may_train_as_well():
    model = adapt.branch_scales(small(), head=True)
    assert model.trains(("Dense_0", "bias"))
    assert model.trains(("Block_0", "scales"))
    assert not model.trains(("Block_0", "branches"))
    assert not adapt.branch_scales(small()).trains(("Dense_0", "bias"))


def test_the_configuration_has_equal_passes():
    config = reparameterized_config.get_config()
    for part in config.parts.values():
        forward = [m for m in part.methods.values() if m.gradient != "backward"]
        passes = {
            m.steps * (1 if m.gradient == "activity" else 2 * m.num_perturbations)
            for m in forward
        }
        assert len(passes) == 1
