"""Side by side with what else one could use, on the same model in the same run.

Libraries that are not installed are left out with a word on how to get them;
``pip install 'fgrad[benchmarks]'`` brings those that the Python at hand can have.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks import block, measure, programs, subjects
from experiments.benchmarks.measure import Effort, Program
from experiments.benchmarks.problem import Problem
from experiments.benchmarks.subjects import Subject
from experiments.benchmarks.table import NOTHING, Table, mib

_INSTALL = {
    "evosax": "pip install evosax",
    "shardes": "pip install shardes, from Python 3.12 on; on 3.11 it runs after "
    "pip install --no-deps --ignore-requires-python shardes",
    "torch": "pip install torch --index-url https://download.pytorch.org/whl/cpu",
}


class Entry(NamedTuple):
    """A line of the table.

    Attributes:
      run: one inference, or one step; from the compiler or from elsewhere.
      evaluations: of the batch's loss, which a step is worth.
    """

    run: Callable[[], Any]
    evaluations: int


def tables(smoke: bool) -> Iterator[Table]:
    """Measures the peers.

    Args:
      smoke: whether to take tiny networks, once.
    """
    if smoke:
        yield _network("mlp", subjects.chosen(smoke)["mlp"], 2, 2, measure.SMOKE)
    else:
        yield _network("vit", subjects.SUBJECTS["vit"], 16, 8, Effort(rounds=5))
        # It runs on the CPU.
        if jax.default_backend() == "cpu" and installed("torch"):
            yield _torch(subjects.SUBJECTS["vit"], 16, Effort(rounds=5))
    if installed("shardes"):
        if smoke:
            yield _block(block.Sizes(4, 2, 8, 3), 2, 2, measure.SMOKE)
        else:
            yield _block(block.Sizes(), 16, 16, Effort(rounds=5))


def _network(
    name: str, subject: Subject, batch_size: int, pairs: int, effort: Effort
) -> Table:
    """Whatever trains a network as it is."""
    problem = subjects.problem(subject, batch_size)
    large = subjects.problem(subject, 2 * pairs * batch_size)
    entries = _fgrad(problem, large, pairs)
    # A backward pass counts as two evaluations, as everywhere in this project.
    entries["optax, backprop"] = Entry(programs.backprop_step(problem), 3)
    if installed("evosax"):
        entries[f"evosax, Open_ES({2 * pairs})"] = Entry(
            evosax_generation(problem, 2 * pairs), 2 * pairs
        )
    about = f"{name}, {problem.num_parameters:,} parameters, batch {batch_size}"
    return _table(about, entries, effort)


def _block(sizes: block.Sizes, batch_size: int, pairs: int, effort: Effort) -> Table:
    """A transformer block, since shardes needs its model written for it.

    Its products with weights are ``shardes.nn.dense``; fgrad takes the plain ones.
    """
    problem = block.problem(sizes, batch_size)
    large = block.problem(sizes, 2 * pairs * batch_size)
    entries = _fgrad(problem, large, pairs)
    entries[f"shardes, Mirrored(LowRank(1)), n={2 * pairs}"] = Entry(
        shardes_generation(sizes, batch_size, 2 * pairs), 2 * pairs
    )
    about = (
        f"a transformer block of width {sizes.width}, "
        f"{problem.num_parameters:,} parameters, {batch_size} x {sizes.tokens} tokens"
    )
    return _table(about, entries, effort)


def _torch(subject: Subject, batch_size: int, effort: Effort) -> Table:
    """The vision transformer in PyTorch, and the same task in JAX."""
    from experiments.benchmarks import mezo

    problem = subjects.problem(subject, batch_size)
    network: Any = subject.network(num_classes=subject.num_classes)
    run = mezo.Mezo(network, subject.input_shape, batch_size)
    entries = {
        "inference": Entry(run.inference, 1),
        "MeZO": Entry(run.step, 2),
        "inference in JAX": Entry(programs.inference(problem), 1),
        "fgrad, m=1": Entry(programs.forward_step(problem), 2),
    }
    about = f"vit in PyTorch, {run.num_parameters:,} parameters, batch {batch_size}"
    return _table(about, entries, effort)


def _fgrad(problem: Problem, large: Problem, pairs: int) -> dict[str, Entry]:
    """Inference, this library, and its task written by hand."""
    count = 2 * pairs
    return {
        "inference": Entry(programs.inference(problem), 1),
        f"inference, {count} batches at once": Entry(programs.inference(large), count),
        "fgrad, m=1": Entry(programs.forward_step(problem), 2),
        f"fgrad, K={pairs} low-rank": Entry(
            programs.low_rank_step(problem, pairs), count
        ),
        f"jax.vmap, K={pairs}": Entry(programs.vmap_step(problem, pairs), count),
    }


def evosax_generation(problem: Problem, population_size: int) -> Program:
    """A generation of evosax's OpenAI-ES: ask, evaluate under `jax.vmap`, tell."""
    from evosax.algorithms import Open_ES

    strategy = Open_ES(
        population_size=population_size,
        solution=problem.params,
        optimizer=optax.sgd(programs.LEARNING_RATE),
        std_schedule=optax.constant_schedule(programs.EPSILON),
    )
    settings = strategy.default_params

    def generation(carry: Any, data: Any) -> Any:
        key, state = carry
        key, ask_key, tell_key = jax.random.split(key, 3)
        population, state = strategy.ask(ask_key, state, settings)
        losses = jax.vmap(lambda params: problem.loss_fn(params, **data))(population)
        state, _ = strategy.tell(tell_key, population, losses, state, settings)
        return key, state

    key = jax.random.key(2)
    state = strategy.init(key, problem.params, settings)
    return Program(generation, (key, state), problem.data, carries=True)


def shardes_generation(
    sizes: block.Sizes, batch_size: int, population_size: int
) -> Program:
    """A generation of shardes: rank-1 perturbations in mirrored pairs."""
    import shardes

    problem = block.problem(sizes, batch_size, shardes.nn.dense)
    # Its dense takes weights as [out, in].
    params = jax.tree.map(jnp.transpose, problem.params)
    strategy = shardes.ShardedES(
        shardes.Mirrored(shardes.LowRank(r=1)),
        n=population_size,
        sigma=programs.EPSILON,
        lr=programs.LEARNING_RATE,
        mesh=shardes.make_mesh(),
    )

    def generation(state: Any, data: Any) -> Any:
        perturbation, state = strategy.ask(state)
        evaluate = strategy.apply(
            lambda params, data: problem.loss_fn(params, **data), state, perturbation
        )
        return strategy.tell(state, perturbation, evaluate(data))

    state = strategy.init(jax.random.key(2), params)
    return Program(generation, state, problem.data, carries=True)


def _table(about: str, entries: dict[str, Entry], effort: Effort) -> Table:
    runs = {name: entry.run for name, entry in entries.items()}
    times = measure.interleave(runs, effort)
    memory = measure.plan(
        {name: run for name, run in runs.items() if isinstance(run, Program)}
    )
    rows, raw = [], []
    for name, entry in entries.items():
        ratio = times[name].ratio(times["inference"], entry.evaluations)
        plan = memory.get(name)
        rows.append(
            [
                name,
                str(entry.evaluations),
                f"{ratio['median']:.2f}",
                mib(plan.temporaries) if plan else NOTHING,
                mib(plan.live) if plan else NOTHING,
            ]
        )
        raw.append(
            {
                "name": name,
                "evaluations": entry.evaluations,
                "time_per_evaluation": ratio,
                "times": times[name].asdict(),
                "memory": plan and plan.asdict(),
            }
        )
    return Table(
        title=f"Peers: {about}",
        columns=(
            "one step of",
            "evaluations",
            "time per evaluation",
            "temporaries MiB",
            "live MiB",
        ),
        rows=rows,
        note="float32. Time per evaluation: over this table's inference of one batch, "
        f"ratio of median times, {effort.rounds} rounds. A backward pass counts as two "
        f"evaluations. {NOTHING}: the memory is not planned by a compiler.",
        raw=raw,
    )


def installed(package: str) -> bool:
    """Whether a package is there; if not, prints how to get it."""
    if importlib.util.find_spec(package):
        return True
    print(f"{package} is not installed, so it is left out: {_INSTALL[package]}\n")
    return False
