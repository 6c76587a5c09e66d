"""What a step of one pair takes where random numbers cost nothing.

A step makes z three times, on both sides of the weights and in the update. With a z
that is the same number everywhere, what is left is to read the weights, to write
perturbed ones, to read these again, and to write the update. No generator beats that.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from experiments.benchmarks import measure, programs, subjects
from experiments.benchmarks.measure import Effort
from experiments.benchmarks.table import Table
from fgrad import perturbations


def constant() -> perturbations.Perturbation:
    """A z that is one everywhere."""

    def words(key: jax.Array, indices: jax.Array) -> jax.Array:
        del key
        return jnp.zeros_like(indices)

    def decode(words: jax.Array) -> jax.Array:
        return jnp.ones((*words.shape[:-1], 4 * words.shape[-1]), jnp.int8)

    return perturbations.Perturbation("constant", 1.0, 4, decode, words)


def tables(smoke: bool) -> Iterator[Table]:
    """Times steps with and without random numbers.

    Args:
      smoke: whether to take a tiny network, one batch and one round.
    """
    effort = measure.SMOKE if smoke else Effort(rounds=9)
    rows, raw = [], []
    for name, arithmetic, batch_size in subjects.cases(
        smoke, (2,) if smoke else (1, 16)
    ):
        problem = subjects.problem(subjects.chosen(smoke)[name], batch_size, arithmetic)
        compiled = {
            "inference": programs.inference(problem),
            "normal z": programs.forward_step(problem),
            "constant z": programs.forward_step(problem, perturbation=constant()),
        }
        times = measure.interleave(compiled, effort)
        ratios = {
            step: times[step].ratio(times["inference"], 2)
            for step in ("normal z", "constant z")
        }
        cells = [
            f"{ratio[of]:.2f}" for ratio in ratios.values() for of in ("median", "min")
        ]
        milliseconds = f"{1000 * times['inference'].median:.3g}"
        rows.append([name, arithmetic, str(batch_size), milliseconds, *cells])
        raw.append(
            {
                "subject": name,
                "arithmetic": arithmetic,
                "batch_size": batch_size,
                "time_per_evaluation": ratios,
                "times": {what: t.asdict() for what, t in times.items()},
            }
        )
    yield Table(
        title="Time of a step of one pair over two inferences, and without z",
        columns=(
            *("network", "arithmetic", "batch", "inference, ms"),
            *("normal z", "of minima", "constant z", "of minima"),
        ),
        rows=rows,
        note=f"Ratios of median times and of the least, {effort.rounds} rounds. With a "
        "constant z nothing random is made: no generator can be faster.",
        raw=raw,
    )
