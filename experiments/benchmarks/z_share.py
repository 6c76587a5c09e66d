"""The share of a training step that generating z takes, on 5 M parameters.

    python -m experiments.benchmarks.z_share

The network is a stack of dense layers on a batch of images' worth of rows. A step with
m = 1 generates z three times: for the +, for the - and for the update. Each time is the
median of repeated calls in one process; the share is a ratio of times of that process.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

import fgrad
from fgrad import perturbations
from fgrad.leaves import Plan, Policy

_WIDTH = flags.DEFINE_integer("width", 1024, "Width of the dense layers.")
_LAYERS = flags.DEFINE_integer("layers", 5, "Number of dense layers.")
_ROWS = flags.DEFINE_integer("rows", 512, "Rows of the batch.")
_REPEATS = flags.DEFINE_integer("repeats", 15, "Calls timed.")
_JSON = flags.DEFINE_string("json", None, "File to write the results to.")


def _median_seconds(fn: Callable[..., Any], *args: Any) -> float:
    jax.block_until_ready(fn(*args))
    times = []
    for _ in range(_REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(bits: int | None, z: perturbations.Perturbation) -> dict[str, Any]:
    """Times a step and the z of a step for float (None) or b-bit weights."""
    key, width = jax.random.key(0), _WIDTH.value
    keys = jax.random.split(key, _LAYERS.value)
    params: Any = {
        f"w{i}": jax.random.normal(k, (width, width)) / width**0.5
        for i, k in enumerate(keys)
    }
    size = sum(w.size for w in params.values())
    if bits:
        params = fgrad.quantize(params, bits=bits)
    rows = jax.random.normal(key, (_ROWS.value, width))

    def loss_fn(params: Any, rows: jax.Array) -> jax.Array:
        for w in fgrad.dequantize(params).values():
            rows = jax.nn.relu(rows @ w)
        return jnp.mean(rows**2)

    tx = fgrad.qzo_ff(1e-4, key, epsilon=1e-2, num_perturbations=1, perturbation=z)

    @jax.jit
    def step(params: Any, state: Any, rows: jax.Array) -> Any:
        updates, state = tx.update(params, state, params, value_fn=loss_fn, rows=rows)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def generate(params: Any, key: jax.Array) -> Any:
        plan = Plan(params, Policy(perturbation=z))
        keys = plan.leaf_keys(key)
        return [z.sample(keys[name], (width, width)) for name in plan.arithmetic]

    step_seconds = _median_seconds(step, params, tx.init(params), rows)
    z_seconds = _median_seconds(generate, params, key)
    return {
        "weights": f"{bits} bits" if bits else "float32",
        "perturbation": z.name,
        "parameters": size,
        "share": 3 * z_seconds / step_seconds,
    }


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    device = jax.devices()[0].device_kind
    rows = [
        measure(bits, z)
        for bits in (None, 16)
        for z in (
            perturbations.normal(),
            perturbations.rademacher(),
            perturbations.binomial(),
        )
    ]
    print(f"| weights | z | parameters | share of a step (m = 1) on {device} |")
    print("|---|---|---|---|")
    for row in rows:
        share = f"{100 * row['share']:.1f}%"
        print(
            f"| {row['weights']} | {row['perturbation']} | {row['parameters']:,} "
            f"| {share} |"
        )
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump({"device": device, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    app.run(main)
