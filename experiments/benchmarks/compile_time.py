"""What a program costs before it first runs: tracing, lowering and compilation apart.

A user meets the compiler first. Tracing is JAX's own, lowering makes StableHLO of what
was traced, and compilation is XLA's. On a CPU that goes by the number of kernels: XLA
compiles each distinct fusion as a module of its own and reuses identical ones.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from experiments.benchmarks import peers, programs, subjects, transformer
from experiments.benchmarks.measure import Program
from experiments.benchmarks.problem import Problem
from experiments.benchmarks.subjects import Subject
from experiments.benchmarks.table import NOTHING, Table
from experiments.models import vit

PHASES = ("trace", "lowering", "compilation")
DEPTHS = (4, 12, 48)
ARITHMETICS = ("float32", "16w8a")
_REFERENCE = "backprop"
# problem(arithmetic, simulated), see `subjects.problem`; None where there is no such.
Maker = Callable[[str, bool], Problem | None]


def unrolled(depth: int) -> Subject:
    """A vision transformer of width 64 whose blocks are traced one by one."""
    network = functools.partial(
        vit.ViT, patch=8, width=64, depth=depth, num_heads=4, mlp_width=256
    )
    return Subject(network, (32, 32, 3))


def scanned(depth: int, arithmetic: str, simulated: bool) -> Problem | None:
    """The like with its blocks in one scan; its integers are not simulated."""
    if simulated and arithmetic != "float32":
        return None
    network = transformer.Transformer(64, depth, 4, 17, 10, inputs=8 * 8 * 3)
    return transformer.problem(network, 2, arithmetic)


def _of_subject(subject: Subject, arithmetic: str, simulated: bool) -> Problem:
    return subjects.problem(subject, 2, arithmetic, simulated=simulated)


def _networks() -> dict[str, Maker]:
    """What is compiled, the deepest last."""
    makers: dict[str, Maker] = {}
    for depth in DEPTHS:
        if depth == DEPTHS[-1]:
            for name in ("resnet18", "lstm"):
                makers[name] = functools.partial(_of_subject, subjects.SUBJECTS[name])
        if depth > DEPTHS[0]:
            makers[f"{depth} blocks, scanned"] = functools.partial(scanned, depth)
        makers[f"{depth} blocks"] = functools.partial(_of_subject, unrolled(depth))
    return makers


def tables(smoke: bool) -> Iterator[Table]:
    """Compiles transformers of 4, 12 and 48 blocks, a ResNet18 and an LSTM.

    That takes about 20 minutes of a processor. `experiments.benchmarks.compile_run`
    does it in parts.

    Args:
      smoke: whether to take a tiny network of 1 and 2 layers instead.
    """
    yield from tables_of(list(records(smoke=smoke)))


def records(
    known: Sequence[Mapping[str, Any]] = (),
    *,
    arithmetics: Sequence[str] = ARITHMETICS,
    networks: Sequence[str] = (),
    chosen: Sequence[str] = (),
    smoke: bool = False,
) -> Iterator[dict[str, Any]]:
    """Measures every program of every network, one after the other.

    Args:
      known: records of earlier runs, which are not measured again.
      arithmetics: those to measure; with ``smoke`` it is float32.
      networks: names of those to measure; all by default.
      chosen: names of the programs to measure; all by default.
      smoke: whether to take a tiny network of 1 and 2 layers instead.

    Yields:
      Of each program its names, the CPU seconds of its `PHASES`, and its kernels.
    """
    names = ("network", "arithmetic", "program")
    done = {tuple(record[k] for k in names) for record in known}
    # What a process does once, such as to load JAX's rules, belongs to no program.
    measured(_programs(_smallest()["1 blocks"], "float32")["fgrad, m=1"])
    for arithmetic in ARITHMETICS[:1] if smoke else arithmetics:
        for network, maker in (_smallest() if smoke else _networks()).items():
            if networks and network not in networks:
                continue
            for program, make in _programs(maker, arithmetic).items():
                name = (network, arithmetic, program)
                if name not in done and (not chosen or program in chosen):
                    seconds = measured(make, optimize=not smoke)
                    yield {**dict(zip(names, name, strict=True)), **seconds}


def _smallest() -> dict[str, Maker]:
    return {
        f"{depth} blocks": functools.partial(_of_subject, subjects.stack(8, depth))
        for depth in (1, 2)
    }


def tables_of(raw: list[dict[str, Any]]) -> Iterator[Table]:
    """What `records` found, as tables."""
    rows = [_row(record, raw) for record in raw]
    yield Table(
        title="CPU seconds before the first run",
        columns=(
            *("network", "arithmetic", "program", *PHASES),
            *("trace + lowering / backprop", "compilation / backprop", "kernels"),
        ),
        rows=rows,
        note="Every program from empty caches, one after the other, on all threads. In "
        "16w8a backprop rounds float32 weights on the way. Kernels: distinct "
        f"computations that XLA fuses. {NOTHING}: without such a step of backprop. The "
        "bars for fgrad over backprop: trace and lowering 2; compilation 1.8 at 4 "
        "blocks, 2.5 at 12 and more.",
        raw=raw,
    )
    yield _growth(raw)


def _programs(maker: Maker, arithmetic: str) -> dict[str, Callable[[], Program]]:
    problem, trained = maker(arithmetic, False), maker(arithmetic, True)
    assert problem is not None
    found: dict[str, Callable[[], Program]] = {
        "inference": functools.partial(programs.inference, problem),
        "fgrad, m=1": functools.partial(programs.forward_step, problem),
    }
    if trained is not None:
        found[_REFERENCE] = functools.partial(programs.backprop_step, trained)
    if arithmetic == "float32" and peers.installed("evosax"):
        found["evosax, Open_ES(2)"] = functools.partial(
            peers.evosax_generation, problem, 2
        )
    found["jax.vmap, K=1"] = functools.partial(programs.vmap_step, problem, 1)
    return found


def measured(make: Callable[[], Program], *, optimize: bool = True) -> dict[str, Any]:
    """CPU seconds of each phase of a program from empty caches, and its kernels.

    Args:
      make: makes the program, which traces and lowers it.
      optimize: whether the compiler shall make good code, as it does for users.
    """
    jax.clear_caches()
    program = make()
    program.compile(optimize)
    return {**program.seconds, "kernels": distinct_kernels(program.text())}


def _row(record: Mapping[str, Any], raw: list[dict[str, Any]]) -> list[str]:
    same = ("network", "arithmetic")
    reference = next(
        (
            other
            for other in raw
            if other["program"] == _REFERENCE
            and all(other[k] == record[k] for k in same)
        ),
        None,
    )

    def ratio(*phases: str) -> str:
        if reference is None:
            return NOTHING
        return (
            f"{sum(record[p] for p in phases) / sum(reference[p] for p in phases):.2f}"
        )

    return [
        *(record[k] for k in (*same, "program")),
        *(f"{record[p]:.2f}" for p in PHASES),
        ratio("trace", "lowering"),
        ratio("compilation"),
        str(record["kernels"]),
    ]


def by_depth(
    raw: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str], dict[int, Mapping[str, Any]]]:
    """The records of unrolled blocks: by arithmetic and program, then by depth."""
    series: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for record in raw:
        if match := re.fullmatch(r"(\d+) blocks", record["network"]):
            key = (record["arithmetic"], record["program"])
            series.setdefault(key, {})[int(match[1])] = record
    return series


def _growth(raw: Sequence[Mapping[str, Any]]) -> Table:
    """What one unrolled block more costs, between the least depth and the largest."""
    rows, between = [], []
    for (arithmetic, program), records in by_depth(raw).items():
        shallow, deepest = min(records), max(records)
        if shallow == deepest:
            continue
        slope = {
            what: (records[deepest][what] - records[shallow][what])
            / (deepest - shallow)
            for what in (*PHASES, "kernels")
        }
        cells = [f"{value:.2f}" for value in slope.values()]
        rows.append([arithmetic, program, f"{shallow} to {deepest}", *cells])
        between.append(
            {
                "arithmetic": arithmetic,
                "program": program,
                "records": list(records.values()),
            }
        )
    return Table(
        title="CPU seconds for each further block",
        columns=("arithmetic", "program", "from", *PHASES, "kernels"),
        rows=rows,
        note="The difference between the two depths over the difference of depths.",
        raw=between,
    )


def distinct_kernels(text: str) -> int:
    """How many computations of a compiled program are fused, equal ones counted once.

    Args:
      text: the optimized HLO.

    Returns:
      Their number, whatever their instructions are called.
    """
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = bodies.setdefault(header[1], [])
        elif line.startswith(" "):
            lines.append(re.sub(r", metadata=\{.*?\}", "", line))

    @functools.cache
    def canonical(computation: str) -> str:
        names: dict[str, str] = {}

        def renamed(match: re.Match[str]) -> str:
            if match[1] in bodies:
                return f"{{{canonical(match[1])}}}"
            return names.setdefault(match[1], f"%{len(names)}")

        whole = "\n".join(bodies[computation])
        return re.sub(r"%([\w.\-]+)", renamed, whole)

    fused = re.findall(r" fusion\(.*calls=%?([\w.\-]+)", text)
    return len({canonical(name) for name in fused})
