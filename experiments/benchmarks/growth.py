"""How memory and time grow with parameters and with perturbations."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments.benchmarks import measure, programs, subjects
from experiments.benchmarks.measure import Effort, Program
from experiments.benchmarks.problem import Problem
from experiments.benchmarks.table import Table, mib
from fgrad.analysis import Memory

_TIMES = "Ratios of median times to as many inferences as there are evaluations"


def tables(smoke: bool) -> Iterator[Table]:
    """Measures a multilayer perceptron that grows, then one with more perturbations.

    Args:
      smoke: whether to take a tiny one, once.
    """
    width, depth, batch_size = (8, 1, 2) if smoke else (512, 4, 64)
    factors, counts = ((2,), (2,)) if smoke else ((1, 2, 4, 8, 16), (1, 4, 16, 64))
    effort = measure.SMOKE if smoke else Effort(rounds=7)
    yield _parameters(width, depth, batch_size, factors, effort)
    yield _perturbations(width, depth, batch_size, counts, effort)


def _parameters(
    width: int,
    depth: int,
    batch_size: int,
    factors: tuple[int, ...],
    effort: Effort,
) -> Table:
    rows, raw = [], []
    grown = {f"{n}x by depth": (width, n * depth) for n in factors}
    # Parameters grow with the square of the width.
    grown |= {
        f"{n}x by width": (round(width * n**0.5), depth) for n in factors if n > 1
    }
    for name, size in grown.items():
        problem = subjects.problem(subjects.stack(*size), batch_size)
        compiled = {
            "inference": programs.inference(problem),
            "m=1": programs.forward_step(problem),
            "backprop": programs.backprop_step(problem),
        }
        times = measure.interleave(compiled, effort)
        ratio = times["m=1"].ratio(times["inference"], 2)
        memory = measure.plan(compiled)
        temporaries = [mib(plan.temporaries) for plan in memory.values()]
        rows.append(
            [
                name,
                f"{problem.num_parameters:,}",
                *temporaries,
                f"{ratio['median']:.2f}",
            ]
        )
        raw.append(
            {
                "grown": name,
                "parameters": problem.num_parameters,
                "time_per_evaluation": ratio,
                **_costs(memory, times),
            }
        )
    return Table(
        title="Growth with parameters: temporaries in MiB, and time",
        columns=("grown", "parameters", "inference", "m=1", "backprop", "time, m=1"),
        rows=rows,
        note=f"Perceptron, {depth} layers of {width} and up, batch {batch_size}, "
        f"float32. {_TIMES}, {effort.rounds} rounds.",
        raw=raw,
    )


def _perturbations(
    width: int,
    depth: int,
    batch_size: int,
    counts: tuple[int, ...],
    effort: Effort,
) -> Table:
    methods: dict[str, Callable[[Problem, int], Program]] = {
        "m": programs.forward_step,
        "K": lambda problem, count: programs.forward_step(
            problem, count, vectorize=count
        ),
        "K low-rank": programs.low_rank_step,
    }
    problem = subjects.problem(subjects.stack(width, depth), batch_size)
    rows, raw = [], []
    for count in counts:
        compiled = {name: make(problem, count) for name, make in methods.items()}
        times = measure.interleave(
            {"inference": programs.inference(problem), **compiled}, effort
        )
        ratios = {
            name: times[name].ratio(times["inference"], 2 * count) for name in methods
        }
        memory = measure.plan(compiled)
        temporaries = [mib(plan.temporaries) for plan in memory.values()]
        medians = [f"{ratio['median']:.2f}" for ratio in ratios.values()]
        rows.append([str(count), *temporaries, *medians])
        raw.append(
            {
                "perturbations": count,
                "time_per_evaluation": ratios,
                **_costs(memory, times),
            }
        )
    return Table(
        title="Growth with perturbations: temporaries in MiB, and time",
        columns=("pairs", *methods, *(f"time, {name}" for name in methods)),
        rows=rows,
        note=f"Perceptron, {depth} layers of {width}, {problem.num_parameters:,} "
        f"parameters, batch {batch_size}, float32. m: one pair after the other; K: all "
        f"at once. {_TIMES}, {effort.rounds} rounds.",
        raw=raw,
    )


def _costs(
    memory: Mapping[str, Memory], times: Mapping[str, measure.Times]
) -> dict[str, Any]:
    return {
        "memory": {name: plan.asdict() for name, plan in memory.items()},
        "times": {name: t.asdict() for name, t in times.items()},
    }
