"""Compiles a step whose weights are sharded over 8 devices, and says what is in it.

    python sharded_steps.py int16:columns,float:both,float:columns:odd:explicit

Prints a line of JSON for each kind of weights and way to shard them. The devices' parts
of "odd" weights hold no whole random words; "explicit" axes are in the arrays' types.
"""

import contextlib
import functools
import json
import os
import re
import sys

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"
)

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fgrad

SHAPE, ODD, PAIRS = (256, 512), (264, 520), 4
SPECS = {
    "columns": (None, ("r", "c")),
    "rows": (("r", "c"), None),
    "both": ("r", "c"),
}


def problem(kind, shape):
    params = {"w": jax.random.normal(jax.random.key(1), shape) / 16}
    bits = {"int16": 16, "on grid": 8}.get(kind)
    if bits:
        params = fgrad.quantize(params, bits=bits, channel_axis=-1)
    options = {
        "low rank": {"perturbation": fgrad.perturbations.low_rank()},
        "rademacher": {"perturbation": fgrad.perturbations.rademacher()},
        "on grid": {"low_bit": fgrad.on_grid(1e-2)},
    }
    estimate = fgrad.fixed_point_forward_grad(
        jax.random.key(0),
        epsilon=1e-2,
        num_perturbations=PAIRS,
        estimator=fgrad.estimators.spsa,
        **options.get(kind, {}),
    )
    tx = optax.chain(estimate, optax.sgd(1e-2), fgrad.quantized_update())
    if kind == "sparse":
        tx = fgrad.enhancements.sparse_update(tx, density=0.1)
    return tx, params


def loss_fn(params, x):
    return jnp.mean(jnp.tanh(x @ jnp.asarray(params["w"])) ** 2)


def largest_array(text):
    """Numbers in the largest array of a program."""
    shapes = re.findall(r"\b[a-z]\w*\[([\d,]+)\]", text)
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


def memory(compiled):
    plan = compiled.memory_analysis()
    arguments = plan.argument_size_in_bytes + plan.temp_size_in_bytes
    return arguments + plan.output_size_in_bytes - plan.alias_size_in_bytes


def placed(mesh, spec, array):
    """A leaf, or its scales, which have axes of length 1."""
    axes = [name if n > 1 else None for n, name in zip(array.shape, spec, strict=True)]
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    return jax.device_put(array, sharding)


def step_of(tx, params, state, **given):
    updates, state = tx.update(params, state, params, **given)
    return optax.apply_updates(params, updates), state


def sharded(kind, how, options):
    shape = ODD if "odd" in options else SHAPE
    tx, params = problem(kind, shape)
    x = jax.random.normal(jax.random.key(2), (4, shape[0]))
    losses = jax.random.normal(jax.random.key(3), (2, PAIRS))
    update = jax.jit(functools.partial(step_of, tx))
    step = jax.jit(
        functools.partial(step_of, tx, value_fn=loss_fn), donate_argnums=(0, 1)
    )
    state = tx.init(params)
    one, _ = update(params, state, losses=losses)
    alone = step.lower(params, state, x=x).compile()

    explicit = "explicit" in options
    axis_type = jax.sharding.AxisType.Explicit if explicit else None
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()).reshape(2, 4),
        ("r", "c"),
        axis_types=axis_type and (axis_type,) * 2,
    )
    with jax.set_mesh(mesh) if options else contextlib.nullcontext():
        put = functools.partial(placed, mesh, SPECS[how])
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        there = jax.tree.map(put, params)
        state_there = jax.device_put(tx.init(there), whole)
        # From given losses the update of sharded weights is that of whole ones.
        many, _ = update(there, state_there, losses=losses)
        there = jax.tree.map(put, params)
        x = jax.device_put(x, whole)
        together = step.lower(there, state_there, x=x).compile()
    same = [
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
    ]
    return {
        "same": all(same),
        "largest": largest_array(together.as_text()),
        "memory": memory(together),
        "memory alone": memory(alone),
        "share": int(np.prod(shape)) // 8,
        # What every device has: data, activations, and of sharded rows the scales.
        "whole": 4 * (x.size + len(x) * shape[1] + shape[1]),
    }


if __name__ == "__main__":
    for case in sys.argv[1].split(","):
        kind, how, *options = case.split(":")
        found = sharded(kind, how, options)
        layout = ":".join([how, *options])
        print(json.dumps({"kind": kind, "layout": layout, **found}), flush=True)
