"""Memory of a step of joint pairs, on the way and not, as the compiler plans it."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

import fgrad
from experiments.benchmarks import measure, programs, subjects
from experiments.benchmarks.measure import Program
from experiments.benchmarks.problem import Problem
from experiments.benchmarks.subjects import Subject
from experiments.benchmarks.table import Table, mib
from experiments.models import cnn
from fgrad import activity
from fgrad.activity import joint_structure
from fgrad.tracing import primitives

# Eight layers of one size, so that none is much larger than the others.
_CNN_8 = functools.partial(cnn.CNN, features=(16,) * 8, strides=(1,) * 8)
SUBJECTS = {
    "cnn": subjects.SUBJECTS["cnn"],
    "cnn_8": Subject(_CNN_8, (16, 16, 1)),
    "vit": subjects.SUBJECTS["vit"],
    "efficientnet_lite0": subjects.SUBJECTS["efficientnet_lite0"],
}
# A network and its arithmetic by a name, since each is minutes of compilation.
CASES = {
    f"joint_{name}_{arithmetic}": (name, arithmetic)
    for name, arithmetic in itertools.product(SUBJECTS, ("float32", "16w8a"))
}


def tables(
    smoke: bool,
    cases: Sequence[tuple[str, str]] = tuple(CASES.values()),
    *,
    way_only: bool = False,
) -> Iterator[Table]:
    """Compiles the gradient of all layers, and the whole step with Adam.

    Args:
      smoke: whether to take a tiny network.
      cases: networks, and their arithmetic.
      way_only: whether to compile nothing but inference and the gradient on the way.
    """
    chosen = subjects.chosen(True) if smoke else SUBJECTS
    batch_size = 8 if smoke else 64
    for name, arithmetic in dict.fromkeys(
        (next(iter(chosen)) if smoke else name, arithmetic)
        for name, arithmetic in cases
    ):
        yield table(name, chosen[name], arithmetic, batch_size, way_only)


def table(
    name: str, subject: Subject, arithmetic: str, batch_size: int, way_only: bool
) -> Table:
    """The table of one network in one arithmetic."""
    problem = subjects.problem(subject, batch_size, arithmetic, of_examples=True)
    compiled = {
        "inference": programs.inference(problem),
        "gradient, on the way": gradient(problem, on_the_way=True),
    }
    if not way_only:
        compiled["gradient"] = gradient(problem, on_the_way=False)
        compiled["Adam, on the way"] = adam_step(problem)
    memory = measure.plan(compiled)
    inference = memory["inference"].temporaries
    ratios = {name: plan.temporaries / inference for name, plan in memory.items()}
    evaluations, work = passes(problem)
    return Table(
        title=f"Joint pairs, {name}, {arithmetic}, batch {batch_size}",
        columns=("program", "temporaries, MiB", "of inference's"),
        rows=[
            [program, mib(plan.temporaries), f"{ratios[program]:.2f}"]
            for program, plan in memory.items()
        ],
        note="As `fgrad.adapt` sets them up. Gradients are results; in the step with "
        "Adam, whose weights and state are donated, they are temporaries too. A step "
        f"on the way has {evaluations} evaluations, if it perturbs, and {work:.2f} "
        "times the multiply-adds of inference, with the products of the weights' "
        "gradients.",
        raw={
            "subject": name,
            "arithmetic": arithmetic,
            "batch_size": batch_size,
            "memory": {program: plan.asdict() for program, plan in memory.items()},
            "ratios": ratios,
            "evaluations": evaluations,
            "multiply_adds": work,
        },
    )


def gradient(problem: Problem, *, on_the_way: bool) -> Program:
    """The gradients of all weights by joint pairs, as `fgrad.adapt` sets them up."""
    update, state = _update(problem, on_the_way)
    return Program(update, problem.params, state, problem.data)


def adam_step(problem: Problem) -> Program:
    """A step of `fgrad.adapt` on the way."""
    loss_fn, params, data = problem
    key = jax.random.key(2)
    return programs.step(
        problem, fgrad.adapt(key, loss_fn, params, data, on_the_way=True)
    )


def passes(problem: Problem) -> tuple[int, float]:
    """What a step on the way costs, one that perturbs if any does.

    Returns:
      Its evaluations of the network; and its multiply-adds over those of one inference,
      the products of the weights' gradients included.
    """
    loss_fn, params, data = problem
    update, state = _update(problem, on_the_way=True)
    step = jax.make_jaxpr(update)(params, state, data).jaxpr
    once = jax.make_jaxpr(lambda params, data: loss_fn(params, **data))(params, data)
    work, without = (primitives.multiply_adds(step.eqns, f) for f in (max, min))
    evaluations = 4 if work > without else 2
    return evaluations, work / primitives.multiply_adds(once.jaxpr.eqns)


def _update(problem: Problem, on_the_way: bool) -> tuple[Callable[..., Any], Any]:
    """The estimator as a function of parameters, state and data, and its state."""
    loss_fn, params, data = problem
    head, sites = joint_structure.find_head(loss_fn, params, data)
    tx = activity.joint_forward_grad(
        jax.random.key(2),
        head,
        sites,
        transposed_head=True,
        residual=joint_structure.has_stream(loss_fn, params, head, sites, data),
        on_the_way=on_the_way,
        activations=activity.explain_joint(loss_fn, params, head, sites, **data),
    )

    def update(params: Any, state: Any, data: Any) -> Any:
        return tx.update(params, state, params, value_fn=loss_fn, **data)

    return update, tx.init(params)
