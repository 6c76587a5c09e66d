"""Time of an evaluation in a training step, over the time of an inference."""

from collections.abc import Callable, Iterator, Mapping

from experiments.benchmarks import measure, programs, subjects
from experiments.benchmarks.measure import Effort, Program, Times
from experiments.benchmarks.problem import Problem
from experiments.benchmarks.table import NOTHING, Table

METHODS: dict[str, Callable[[Problem, int], Program]] = {
    "m": programs.forward_step,
    "K": programs.low_rank_step,
}


# Of a step, as estimated from inference; what takes longer is left out.
MAX_SECONDS = 2.0


def tables(smoke: bool) -> Iterator[Table]:
    """Times the steps.

    Args:
      smoke: whether to take a tiny network, one batch and one pair.
    """
    batch_sizes, counts = ((2,), (1,)) if smoke else ((1, 16), (1, 4, 16, 64))
    effort = measure.SMOKE if smoke else Effort(rounds=5)
    steps = {f"{method}={n}": (method, n) for method in METHODS for n in counts}
    rows, raw = [], []
    for name, arithmetic, batch_size in subjects.cases(smoke, batch_sizes):
        subject = subjects.chosen(smoke)[name]
        problem = subjects.problem(subject, batch_size, arithmetic)
        times = _times(problem, steps, effort)
        ratios = {
            step: times[step].ratio(times["inference"], 2 * count)
            for step, (_, count) in steps.items()
            if step in times
        }
        cells = [
            f"{ratios[step]['median']:.2f}" if step in ratios else NOTHING
            for step in steps
        ]
        rows.append([name, arithmetic, str(batch_size), *cells])
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
        title="Time of a step per evaluation, over one inference of the same batch",
        columns=("network", "arithmetic", "batch", *steps),
        rows=rows,
        note="A step of m pairs has 2m evaluations and an update. m: normal "
        "z, one pair after the other; K: rank-1 z, all pairs at once. Ratios of median "
        f"times, {effort.rounds} rounds; {NOTHING}: over {MAX_SECONDS:g} s a step.",
        raw=raw,
    )


def _times(
    problem: Problem, steps: Mapping[str, tuple[str, int]], effort: Effort
) -> dict[str, Times]:
    """Times of inference and of those steps that are quick enough."""
    compiled = {"inference": programs.inference(problem)}
    once = measure.interleave(compiled, Effort(1, effort.optimize))
    for step, (method, count) in steps.items():
        if 2 * count * once["inference"].median <= MAX_SECONDS:
            compiled[step] = METHODS[method](problem, count)
    return measure.interleave(compiled, effort)
