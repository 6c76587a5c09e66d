"""Digits, a small network that knows the upright ones, and steps in C beside JAX's."""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import ndimage
from sklearn import datasets

from experiments.benchmarks import emulation
from experiments.models import cnn
from fgrad.integer import convert, to_c, train_step

TRAIN = slice(0, 1297)
TEST = slice(1297, None)
MODEL = cnn.CNN(features=(8, 16), strides=(2, 2))


def function(params, images):
    return MODEL.apply({"params": params}, images)


@pytest.fixture(scope="session")
def digits():
    """Upright and rotated images [1797, 8, 8, 1] in [0, 1], and labels."""
    images, labels = datasets.load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1) / 16
    rotated = ndimage.rotate(images, 30, axes=(1, 2), reshape=False, order=1)
    return (
        images.astype(np.float32),
        np.clip(rotated, 0, 1).astype(np.float32),
        labels.astype(np.int32),
    )


@pytest.fixture(scope="session")
def pretrained(digits):
    images, _, labels = (jnp.asarray(x[TRAIN]) for x in digits)
    optimizer = optax.adam(5e-3)

    def loss_fn(params, images, labels):
        logits = function(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            chosen = jax.random.randint(key, (64,), 0, len(labels))
            gradient = jax.grad(loss_fn)(params, images[chosen], labels[chosen])
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        start = params, optimizer.init(params)
        return jax.lax.scan(step, start, jax.random.split(jax.random.key(1), 300))[0]

    return train(MODEL.init(jax.random.key(0), images[:1])["params"])[0]


def step_of_channels(bits):
    """A step of a network whose channels have scales of their own, and a batch."""
    rng = np.random.default_rng(0)
    sizes = np.geomspace(0.05, 5, 4, dtype=np.float32)
    params = {
        "kernel": rng.normal(size=(3, 3, 1, 4)).astype(np.float32) * sizes,
        "head": rng.normal(size=(4, 3)).astype(np.float32) * sizes[:3],
        "bias": rng.normal(size=3).astype(np.float32),
    }
    x = rng.normal(size=(4, 6, 6, 4)).astype(np.float32)

    def logits(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        kernel = params["kernel"]
        h = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=4
        )
        return jax.nn.relu(h).mean((1, 2)) @ params["head"] + params["bias"]

    program = convert(logits, params, x, bits=(bits, 8), channel_axis=-1)
    _, step = train_step(
        program,
        jax.random.key(0),
        learning_rate=0.05,
        epsilon=0.03,
        num_perturbations=3,
        decay_steps=20,
        estimator="normalized",
    )
    return step, (np.asarray(program.encode(x)), np.arange(4, dtype=np.int32) % 3)


def steps_in_c(step, batches, directory):
    """Takes steps in C on this machine and in JAX, checks that all bits are the same.

    Returns the program in C, and JAX's last weights and state.
    """
    weights, state = step.init()
    batches = list(batches)
    written = to_c(step, directory, batch_size=len(batches[0][1]))
    library = emulation.host_library(written)
    c_weights = emulation.filled(written, "weights", written.held(weights))
    c_state = emulation.filled(written, "state", list(state))
    advance = jax.jit(step)
    for batch in batches:
        c_batch = emulation.filled(written, "batch", batch)
        library.fgrad_step(*map(ctypes.byref, (c_weights, c_state, c_batch)))
        weights, state = advance(weights, state, batch)
    same_arrays(written, "weights", c_weights, written.held(weights))
    same_arrays(written, "state", c_state, state)
    return written, weights, state


def same_arrays(written, name, struct, arrays):
    """Checks the arrays in a struct of C."""
    found = emulation.arrays(written, name, struct)
    for ours, theirs in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(ours, theirs)
