"""Memory of every method on every network, as the compiler plans it; nothing runs."""

from collections.abc import Callable, Iterator

from experiments.benchmarks import measure, programs, subjects
from experiments.benchmarks.measure import Program
from experiments.benchmarks.subjects import Problem
from experiments.benchmarks.table import Table, mib

METHODS: dict[str, Callable[[Problem], Program]] = {
    "inference": programs.inference,
    "m=1": programs.forward_step,
    "m=1, sparse 10%": lambda problem: programs.sparse_step(problem, 0.1),
    "m=4": lambda problem: programs.forward_step(problem, 4),
    "K=4": lambda problem: programs.forward_step(problem, 4, vectorize=4),
    "K=8 low-rank": lambda problem: programs.low_rank_step(problem, 8),
    "K=4 vmap": lambda problem: programs.vmap_step(problem, 4),
}


def tables(smoke: bool) -> Iterator[Table]:
    """Compiles the methods.

    Args:
      smoke: whether to take a tiny network and one batch.
    """
    batch_sizes = (2,) if smoke else (1, 4, 16, 64)
    rows, raw = [], []
    for name, arithmetic, batch_size in subjects.cases(smoke, batch_sizes):
        subject = subjects.chosen(smoke)[name]
        problem = subjects.problem(subject, batch_size, arithmetic)
        trained = subjects.problem(subject, batch_size, arithmetic, simulated=True)
        compiled = {method: make(problem) for method, make in METHODS.items()}
        compiled["backprop"] = programs.backprop_step(trained)
        memory = measure.plan(compiled)
        cells = [f"{mib(m.temporaries)} / {mib(m.live)}" for m in memory.values()]
        rows.append([name, arithmetic, str(batch_size), *cells])
        raw.append(
            {
                "subject": name,
                "arithmetic": arithmetic,
                "parameters": problem.num_parameters,
                "batch_size": batch_size,
                "memory": {method: m.asdict() for method, m in memory.items()},
            }
        )
    yield Table(
        title="Memory in MiB, temporaries / live",
        columns=("network", "arithmetic", "batch", *METHODS, "backprop"),
        rows=rows,
        note="Live: parameters, state, data and temporaries of one call. "
        "Steps are donated. m: pairs one after the other; K: pairs at once; vmap: "
        "weights perturbed by hand under jax.vmap; backprop in 16w8a: float32 weights "
        "that are rounded on the way.",
        raw=raw,
    )
