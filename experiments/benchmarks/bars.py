"""The bars: what the library promises for a vision transformer, held or missed."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

from experiments.benchmarks import measure, programs, subjects
from experiments.benchmarks.measure import Program, Times
from experiments.benchmarks.table import NOTHING, Table
from fgrad.analysis import Memory

PAIRS = 8

# Steps of backpropagation that a step in some arithmetic is compared with.
BACKPROP = {"float32": ["float32"], "16w8a": ["float32", "simulated 16w8a"]}


class Bar(NamedTuple):
    """A ratio and the value that it must keep to.

    Attributes:
      name: what over what.
      arithmetic: a key of `subjects.ARITHMETIC`.
      value: the ratio; of times, that of the medians.
      bound: the value to keep to.
      at_least: whether the value may not be smaller, rather than not larger.
      of_minima: the ratio of the shortest times; None for memory.
    """

    name: str
    arithmetic: str
    value: float
    bound: float
    at_least: bool = False
    of_minima: float | None = None

    @property
    def held(self) -> bool:
        """Whether the value keeps to the bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def row(self) -> list[str]:
        """Cells of the table."""
        sign = "≥" if self.at_least else "≤"
        return [
            self.name,
            self.arithmetic,
            f"{self.value:.3g}",
            NOTHING if self.of_minima is None else f"{self.of_minima:.3g}",
            f"{sign} {self.bound:.3g}",
            "pass" if self.held else "**miss**",
        ]


def tables(smoke: bool) -> Iterator[Table]:
    """Measures the bars.

    Args:
      smoke: whether to measure a tiny network, once.
    """
    name = "mlp" if smoke else "vit"
    subject = subjects.chosen(smoke)[name]
    batch_size = 2 if smoke else 16
    effort = measure.SMOKE if smoke else measure.Effort(rounds=15)
    large_batch = 2 * PAIRS * batch_size

    compiled: dict[str, Program] = {}
    for arithmetic in BACKPROP:
        problem = subjects.problem(subject, batch_size, arithmetic)
        large = subjects.problem(subject, large_batch, arithmetic)
        for what, program in {
            "inference": programs.inference(problem),
            "batched inference": programs.inference(large),
            "step": programs.forward_step(problem),
            "low-rank": programs.low_rank_gradient(problem, PAIRS),
            "vmap": programs.vmap_gradient(problem, PAIRS),
        }.items():
            compiled[f"{what} {arithmetic}"] = program
    problem = subjects.problem(subject, batch_size, "8w8a")
    compiled["inference 8w8a"] = programs.inference(problem)
    # Only their memory counts.
    backprop = {
        "backprop float32": programs.backprop_step(
            subjects.problem(subject, batch_size)
        ),
        "backprop simulated 16w8a": programs.backprop_step(
            subjects.problem(subject, batch_size, "16w8a", simulated=True)
        ),
    }

    # What is compared is timed by itself: among programs that need ten times the
    # memory, inference in integers was half as fast again.
    groups = [
        *(("inference " + a, "step " + a) for a in BACKPROP),
        *((f"batched inference {a}", f"low-rank {a}", f"vmap {a}") for a in BACKPROP),
        tuple(f"inference {a}" for a in subjects.ARITHMETIC),
    ]
    times = {
        group: measure.interleave({name: compiled[name] for name in group}, effort)
        for group in groups
    }
    memory = measure.plan({**compiled, **backprop})
    bars = list(_bars(memory, times))
    yield Table(
        title=f"Bars: {name}, {problem.num_parameters:,} parameters, "
        f"batch {batch_size}",
        columns=("ratio", "arithmetic", "value", "of minima", "bar", ""),
        rows=[bar.row() for bar in bars],
        note=f"Step: m = 1, donated. Low-rank, vmap: gradients from {PAIRS} pairs at "
        f"once. Batched inference: {large_batch} examples, as many as those pairs "
        f"evaluate. Ratios of median times and of the least, {effort.rounds} rounds.",
        raw={
            "bars": [{**bar._asdict(), "held": bar.held} for bar in bars],
            "memory": {name: m.asdict() for name, m in memory.items()},
            "times": [
                {name: t.asdict() for name, t in group.items()}
                for group in times.values()
            ],
        },
    )


def _bars(
    memory: dict[str, Memory], times: dict[tuple[str, ...], dict[str, Times]]
) -> Iterator[Bar]:
    of_times = functools.partial(_of_times, times)
    for a, trained in BACKPROP.items():
        step, inference, low_rank, vmap = (
            memory[f"{what} {a}"] for what in ("step", "inference", "low-rank", "vmap")
        )
        yield Bar("live memory: step / inference", a, step.live / inference.live, 1.12)
        for name in trained:
            yield Bar(
                f"temporaries: step / {name} backprop step",
                a,
                step.temporaries / memory[f"backprop {name}"].temporaries,
                0.06,
            )
        yield of_times(
            a,
            "time: step / two inferences",
            f"step {a}",
            f"inference {a}",
            1.15,
            scale=2,
        )
        yield of_times(
            a,
            "throughput: low-rank / batched inference",
            f"batched inference {a}",
            f"low-rank {a}",
            0.85,
            at_least=True,
        )
        yield of_times(
            a,
            "speed: low-rank / vmap",
            f"vmap {a}",
            f"low-rank {a}",
            3.0,
            at_least=True,
        )
        yield Bar(
            "temporaries: low-rank / vmap",
            a,
            low_rank.temporaries / vmap.temporaries,
            1 / 15,
        )
    for a, bound in {"16w8a": 1.6, "8w8a": 1.0}.items():
        yield of_times(
            a,
            "time: inference / float32 inference",
            f"inference {a}",
            "inference float32",
            bound,
        )


def _of_times(
    times: dict[tuple[str, ...], dict[str, Times]],
    arithmetic: str,
    name: str,
    over: str,
    under: str,
    bound: float,
    *,
    scale: float = 1.0,
    at_least: bool = False,
) -> Bar:
    """The bar of one time over ``scale`` times another that was taken beside it."""
    both = next(group for names, group in times.items() if {over, under} <= set(names))
    ratio = both[over].ratio(both[under], scale)
    return Bar(name, arithmetic, ratio["median"], bound, at_least, ratio["min"])
