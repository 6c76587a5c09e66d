"""Time of an inference in integers over that of the same network in float32."""

from collections.abc import Iterator

from experiments.benchmarks import measure, programs, subjects
from experiments.benchmarks.measure import Effort
from experiments.benchmarks.table import Table


def tables(smoke: bool) -> Iterator[Table]:
    """Times the inferences of a network in turn.

    Args:
      smoke: whether to take a tiny network, once.
    """
    effort = measure.SMOKE if smoke else Effort(rounds=15)
    networks = ("mlp",) if smoke else ("vit", "resnet18")
    rows, raw = [], []
    for name in networks:
        for batch_size in (2,) if smoke else (1, 16):
            subject = subjects.chosen(smoke)[name]
            times = measure.interleave(
                {
                    arithmetic: programs.inference(
                        subjects.problem(subject, batch_size, arithmetic)
                    )
                    for arithmetic in subjects.ARITHMETIC
                },
                effort,
            )
            ratios = {what: t.ratio(times["float32"]) for what, t in times.items()}
            cells = [
                f"{ratios[what][of]:.2f}"
                for what in ("16w8a", "8w8a")
                for of in ("median", "min")
            ]
            milliseconds = f"{1000 * times['float32'].median:.3g}"
            rows.append([name, str(batch_size), milliseconds, *cells])
            raw.append(
                {
                    "subject": name,
                    "batch_size": batch_size,
                    "ratios": ratios,
                    "times": {what: t.asdict() for what, t in times.items()},
                }
            )
    yield Table(
        title="Time of an inference in integers over float32",
        columns=(
            *("network", "batch", "float32, ms"),
            *("16w8a", "of minima", "8w8a", "of minima"),
        ),
        rows=rows,
        note=f"Ratios of median times and of the least, {effort.rounds} rounds.",
        raw=raw,
    )
