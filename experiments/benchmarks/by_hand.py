"""A step that is called outside of `jax.jit`, beside the same step inside.

The first call compiles. From the second on, a plain loss mostly takes its trace,
which happens at every call: nothing less tells what Python would compute. What the
trace alone takes is in the table. A loss under `jax.jit` is traced once, as JAX
promises for any function that is.
"""

from collections.abc import Iterator
from typing import Any

import jax
import optax

import fgrad
from experiments.benchmarks import compile_time, measure, programs, subjects
from experiments.benchmarks.measure import Effort
from experiments.benchmarks.problem import Problem
from experiments.benchmarks.table import Table

# A step by hand may take so many steps under `jax.jit`, and so much longer.
FACTOR, SECONDS = 1.5, 0.05


def tables(smoke: bool) -> Iterator[Table]:
    """Times steps by hand.

    Args:
      smoke: whether to take a tiny network, once.
    """
    networks = {"mlp": subjects.stack(8, 1)}
    if not smoke:
        networks = {
            "cnn": subjects.SUBJECTS["cnn"],
            "lstm": subjects.SUBJECTS["lstm"],
            "4 blocks": compile_time.unrolled(4),
            "12 blocks": compile_time.unrolled(12),
        }
    effort = measure.SMOKE if smoke else Effort(rounds=9)
    rows, raw = [], []
    for name, subject in networks.items():
        for arithmetic in ("float32", "16w8a"):
            problem = subjects.problem(subject, 2, arithmetic)
            times = measure.interleave(_steps(problem), effort)
            bound = FACTOR * times["under jax.jit"].median + SECONDS
            cells = [f"{1000 * each.median:.1f}" for each in times.values()]
            rows.append([name, arithmetic, *cells, f"{1000 * bound:.1f}"])
            raw.append(
                {
                    "network": name,
                    "arithmetic": arithmetic,
                    "bound": bound,
                    "times": {what: t.asdict() for what, t in times.items()},
                }
            )
    yield Table(
        title="A step by hand, once it has been called: milliseconds",
        columns=("network", "arithmetic", *times, "bar"),
        rows=rows,
        note=f"Batch 2, m = 1; medians of {effort.rounds} rounds. The bar is "
        f"{FACTOR:g} steps under jax.jit and {1000 * SECONDS:g} ms. A loss that is "
        "under jax.jit itself is traced once, a plain one at every call.",
        raw=raw,
    )


def _steps(problem: Problem) -> dict[str, Any]:
    """Steps without arguments, which all start from the same parameters."""
    tx = fgrad.qzo_ff(
        programs.LEARNING_RATE,
        jax.random.key(2),
        epsilon=programs.EPSILON,
        num_perturbations=1,
    )
    state = tx.init(problem.params)

    def step_of(loss_fn: Any) -> Any:
        def step(params: Any, state: Any, data: Any) -> Any:
            updates, state = tx.update(params, state, params, value_fn=loss_fn, **data)
            return optax.apply_updates(params, updates), state

        return step

    steps = {
        "under jax.jit": jax.jit(step_of(problem.loss_fn)),
        "by hand": step_of(problem.loss_fn),
        "by hand, the loss under jax.jit": step_of(jax.jit(problem.loss_fn)),
    }

    def called(step: Any) -> Any:
        arguments = problem.params, state, problem.data
        return lambda: jax.block_until_ready(step(*arguments))

    def traced() -> Any:
        # JAX knows a function that it has traced by its identity.
        return jax.make_jaxpr(lambda p: problem.loss_fn(p, **problem.data))(
            problem.params
        )

    return {name: called(step) for name, step in steps.items()} | {
        "the trace of the loss alone": traced
    }
