"""Memory of every method on every network, as the compiler plans it; nothing runs."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments.benchmarks import measure, programs, subjects
from experiments.benchmarks.measure import Program
from experiments.benchmarks.problem import Problem
from experiments.benchmarks.table import Table, mib
from fgrad.analysis import Memory

METHODS: dict[str, Callable[[Problem], Program]] = {
    "inference": programs.inference,
    "m=1": programs.forward_step,
    "m=1, sparse 10%": lambda problem: programs.sparse_step(problem, 0.1),
    "m=4": lambda problem: programs.forward_step(problem, 4),
    "K=4": lambda problem: programs.forward_step(problem, 4, vectorize=4),
    "K=8 low-rank": lambda problem: programs.low_rank_step(problem, 8),
    "K=4 vmap": lambda problem: programs.vmap_step(problem, 4),
}
_FINE_TUNED = ("vit", "efficientnet_lite0")
_KEPT = 1 / 8  # of its activations by sampled backpropagation, in float32
_SAMPLED = "backprop, 1/8 kept"
_TRAINED = (
    "backprop in 16w8a: float32 weights that are rounded on the way; 1/8 kept: an "
    "eighth of the rows of each product's input (experiments.models.sampled)."
)


def fine_tuning(smoke: bool) -> Iterator[Table]:
    """Compiles a step of all weights, forward and by backpropagation.

    Args:
      smoke: whether to take a tiny network.
    """
    networks, batch_size = (("mlp",), 2) if smoke else (_FINE_TUNED, 16)
    methods = {name: METHODS[name] for name in ("inference", "m=1")}
    columns = (*methods, "backprop", _SAMPLED)
    rows, raw = [], []
    for name, arithmetic in itertools.product(networks, ("float32", "16w8a")):
        memory, record = _plan(name, arithmetic, batch_size, methods, smoke)
        step = memory["m=1"]
        ratios = [step.live / memory[other].live for other in ("inference", "backprop")]
        live = [mib(memory[name].live) if name in memory else "" for name in columns]
        rows.append([name, arithmetic, *live, *(f"{r:.2f}" for r in ratios)])
        raw.append({**record, "of_inference": ratios[0], "of_backprop": ratios[1]})
    yield Table(
        title=f"Live memory in MiB of a full fine-tuning step, batch {batch_size}",
        columns=(
            *("network", "arithmetic", *columns),
            *("m=1 / inference", "m=1 / backprop"),
        ),
        rows=rows,
        note="Parameters, state, data and temporaries of a call; steps are donated and "
        f"train all weights; {_TRAINED}",
        raw=raw,
    )


def tables(smoke: bool) -> Iterator[Table]:
    """Compiles the methods.

    Args:
      smoke: whether to take a tiny network and one batch.
    """
    batch_sizes = (2,) if smoke else (1, 16, 64)
    rows, raw = [], []
    for name, arithmetic, batch_size in subjects.cases(smoke, batch_sizes):
        memory, record = _plan(name, arithmetic, batch_size, METHODS, smoke)
        cells = [
            f"{mib(memory[m].temporaries)} / {mib(memory[m].live)}"
            if m in memory
            else ""
            for m in (*METHODS, "backprop", _SAMPLED)
        ]
        rows.append([name, arithmetic, str(batch_size), *cells])
        raw.append(record)
    yield Table(
        title="Memory in MiB, temporaries / live",
        columns=("network", "arithmetic", "batch", *METHODS, "backprop", _SAMPLED),
        rows=rows,
        note="Live: parameters, state, data and temporaries of one call. "
        "Steps are donated. m: pairs one after the other; K: pairs at once; vmap: "
        f"weights perturbed by hand under jax.vmap; {_TRAINED}",
        raw=raw,
    )


def _plan(
    name: str,
    arithmetic: str,
    batch_size: int,
    methods: Mapping[str, Callable[[Problem], Program]],
    smoke: bool,
) -> tuple[dict[str, Memory], dict[str, Any]]:
    """Memory of the methods and of backpropagation, and all of it as JSON takes it.

    In float32 also that of backpropagation that samples its activations.
    """
    subject = subjects.chosen(smoke)[name]
    problem = subjects.problem(subject, batch_size, arithmetic)
    trained = subjects.problem(subject, batch_size, arithmetic, simulated=True)
    compiled = {method: make(problem) for method, make in methods.items()}
    compiled["backprop"] = programs.backprop_step(trained)
    if arithmetic == "float32":
        compiled[_SAMPLED] = programs.backprop_step(trained, _KEPT)
    memory = measure.plan(compiled)
    record = {
        "subject": name,
        "arithmetic": arithmetic,
        "parameters": problem.num_parameters,
        "batch_size": batch_size,
        "memory": {method: m.asdict() for method, m in memory.items()},
    }
    return memory, record
