"""A small network, and its training by the enhancements in float64 and Python integers.

The tests of `fgrad.enhancements` share it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compiling import fast_jit
from light_keys import light_key

import fgrad
from fgrad import perturbations
from fgrad.fixed_point import is_qtensor

Z = perturbations.normal()


KEY, SAM_KEY, CHOICE_KEY = light_key(1, 2), light_key(3, 4), jax.random.key(5)


EPSILON, RHO, LR, M, STEPS = 0.05, 0.1, 0.02, 3, 4


def net(values, x):
    """A loss that NumPy and JAX compute alike."""
    h = x @ values["w1"] + values["b1"]
    y = (h / (1 + abs(h))) @ values["w2"]
    return ((y - 1) ** 2).mean()


def loss_fn(params, batch):
    return net({name: jnp.asarray(leaf) for name, leaf in params.items()}, batch)


def problem(bits=None, channel_axis=None):
    """Params of which 60% of w1 are above `perturbations.SMALL`, and a batch."""
    rng = np.random.default_rng(0)
    shapes = {"b1": (40,), "w1": (48, 40), "w2": (40, 3)}
    params = {
        name: jnp.asarray(rng.normal(size=shape) / math.sqrt(shape[0]), jnp.float32)
        for name, shape in shapes.items()
    }
    if bits:
        params = fgrad.quantize(params, bits=bits, channel_axis=channel_axis)
    return params, jnp.asarray(rng.normal(size=(8, 48)), jnp.float32)


class Grid(NamedTuple):
    """A `QTensor` in NumPy."""

    q: Any
    scale: Any
    limit: int


def to_numpy(leaf):
    if not is_qtensor(leaf):
        return np.asarray(leaf, np.float64)
    scale = np.broadcast_to(np.asarray(leaf.scale, np.float64), leaf.shape)
    return Grid(np.asarray(leaf.qvalue, np.int64), scale, leaf.max_qvalue)


def value(leaf):
    return leaf.q * leaf.scale if isinstance(leaf, Grid) else leaf


def moved(leaf, z, amplitude):
    """Equation (6), or the same in floats; z in units of Δ_z = 1/32."""
    if not isinstance(leaf, Grid):
        return leaf + amplitude * z / 32
    steps = np.rint(np.float32(amplitude) / leaf.scale.astype(np.float32))
    q = np.rint((32 * leaf.q + steps.astype(np.int64) * z) / 32).astype(np.int64)
    return leaf._replace(q=np.clip(q, -leaf.limit, leaf.limit))


def taken(leaf, index):
    if not isinstance(leaf, Grid):
        return leaf.reshape(-1)[index]
    return Grid(leaf.q.reshape(-1)[index], leaf.scale.reshape(-1)[index], leaf.limit)


def put_back(leaf, index, part):
    if not isinstance(leaf, Grid):
        whole = leaf.copy()
        whole.reshape(-1)[index] = part
        return whole
    q = leaf.q.copy()
    q.reshape(-1)[index] = part.q
    return leaf._replace(q=q)


def draw(key, step, index, leaves):
    """int64 z_q of each leaf, by the addresses that fgrad.perturbations documents."""
    names = [f"['{name}']" for name in leaves]
    keys = perturbations.leaf_keys(perturbations.sample_key(key, step, index), names)
    return {
        name: np.asarray(Z.sample(keys[path], np.shape(value(leaf))), np.int64)
        for path, (name, leaf) in zip(names, leaves.items(), strict=True)
    }


def apart(plus, minus):
    """``sign(plus - minus)``, of losses that float32 tells apart as well."""
    assert abs(plus - minus) > 1e-6 * abs(plus)
    return int(np.sign(plus - minus))


def shifted(loss, leaves, key, step):
    """The loss one ascent step away."""
    z = draw(key, step, 2**32 - 1, leaves)

    def at(leaves, sign):
        return loss({n: moved(v, sign * z[n], RHO) for n, v in leaves.items()})

    side = apart(at(leaves, 1), at(leaves, -1))
    return lambda leaves: at(leaves, side)


def sign_gradient(loss, leaves, step):
    """The gradient of sign-m-SPSA."""
    gradient = dict.fromkeys(leaves, 0)
    for i in range(M):
        z = draw(KEY, step, i, leaves)
        plus, minus = (
            loss({n: moved(v, s * z[n], EPSILON) for n, v in leaves.items()})
            for s in (1, -1)
        )
        side = apart(plus, minus)
        gradient = {n: g + side * z[n] / 32 / M for n, g in gradient.items()}
    return gradient


class Optimizer:
    """SGD, momentum or Adam of one leaf."""

    def __init__(self, name, size):
        self.name, self.steps = name, 0
        self.first, self.second = np.zeros(size), np.zeros(size)

    def direction(self, g):
        """What the learning rate multiplies."""
        self.steps += 1
        if self.name == "momentum":
            self.first = 0.9 * self.first + g
            return self.first
        if self.name == "adam":
            self.first = 0.9 * self.first + 0.1 * g
            self.second = 0.999 * self.second + 0.001 * g**2
            mean = self.first / (1 - 0.9**self.steps)
            return mean / (np.sqrt(self.second / (1 - 0.999**self.steps)) + 1e-8)
        return g


def stepped(leaf, direction):
    """The leaf after a step, on its grid if it has one."""
    g = direction.reshape(np.shape(value(leaf)))
    if not isinstance(leaf, Grid):
        return leaf - LR * g
    q = leaf.q + np.rint(-LR * g / leaf.scale).astype(np.int64)
    return leaf._replace(q=np.clip(q, -leaf.limit, leaf.limit))


def reference(params, x, indices, *, sam, normalised, optimizer):
    """The params after a few steps, in float64 and Python's rounding."""
    x = np.asarray(x, np.float64)
    leaves = {name: to_numpy(leaf) for name, leaf in params.items()}
    sparse = indices is not None
    optimizers = {
        name: Optimizer(optimizer, len(indices[name]) if sparse else value(leaf).size)
        for name, leaf in leaves.items()
    }
    for step in range(STEPS):

        def loss(leaves):
            return net({name: value(leaf) for name, leaf in leaves.items()}, x)

        if sam == "outside":
            loss = shifted(loss, leaves, SAM_KEY, step)
        parts, part_loss = leaves, loss
        if sparse:
            parts = {n: taken(leaf, indices[n]) for n, leaf in leaves.items()}

            def part_loss(parts, loss=loss, leaves=leaves):
                return loss(
                    {n: put_back(v, indices[n], parts[n]) for n, v in leaves.items()}
                )

        if sam == "inside":
            part_loss = shifted(part_loss, parts, SAM_KEY, step)
        gradient = sign_gradient(part_loss, parts, step)
        for name, part in parts.items():
            g = gradient[name].reshape(-1)
            if normalised:
                g = g / np.linalg.norm(g) * np.linalg.norm(value(part))
            new = stepped(part, optimizers[name].direction(g))
            leaves = leaves | {
                name: put_back(leaves[name], indices[name], new) if sparse else new
            }
    return leaves


def chain(*links, optimizer="sgd", vectorize=1, **options):
    optimizers = {
        "sgd": optax.sgd(LR),
        "momentum": optax.sgd(LR, momentum=0.9),
        "adam": optax.adam(LR),
    }
    options = {"epsilon": EPSILON, "num_perturbations": M, **options}
    return optax.chain(
        fgrad.fixed_point_forward_grad(KEY, vectorize=vectorize, **options),
        *links,
        optimizers[optimizer],
        fgrad.quantized_update(),
    )


def train(tx, params, steps=STEPS, loss_fn=loss_fn, **extra):
    """Params and state after a few steps, in a scan."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params, value_fn=loss_fn, **extra)
        return (optax.apply_updates(params, updates), state), None

    start = (params, tx.init(params))
    return fast_jit(lambda start: jax.lax.scan(step, start, length=steps))(start)[0]


def largest(score, k):
    """Sorted positions of the k largest; ties to the lower index."""
    return np.sort(np.argsort(-score.reshape(-1), kind="stable")[:k])


def share(size, density):
    return max(1, round(density * size))


def magnitude_reference(leaf, density):
    array = value(to_numpy(leaf))
    return largest(np.abs(array), share(array.size, density))
