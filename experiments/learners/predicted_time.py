"""How many steps a run will take to a share of its first loss, told before it begins.

A linear model of the network, measured by forward passes along random directions, is
trained in its place (`fgrad.analysis.linear_model`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments.data.arrays import Split
from experiments.learners import optimizers
from experiments.learners.learner import Learner, TrainState
from experiments.usage import UsageError
from fgrad import analysis

_EPSILON = 1e-2  # of the directions, in units of the weights


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, and what the answer may cost.

    Attributes:
      share: of the first loss, which is to be reached.
      directions: k of the linear model, which costs 2k forward passes.
      examples: how many of the train split are looked at.
    """

    share: float
    directions: int
    examples: int

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Question | None":
        """That of a configuration, see ``configs/quickstart.py``; None if it has none.

        Raises:
          UsageError: for a share outside [0, 1), and for no directions or examples.
        """
        if not settings or not settings["share"]:
            return None
        found = cls(**settings)
        if not 0 < found.share < 1:
            raise UsageError(
                f"estimate.share must lie in [0, 1), 0 for no estimate, got "
                f"{found.share}."
            )
        if min(found.directions, found.examples) < 1:
            raise UsageError(
                "estimate.directions and estimate.examples must be at least 1, got "
                f"{found.directions} and {found.examples}."
            )
        return found


def can_be_predicted(method: ConfigDict) -> bool:
    """Whether the linear model trains as the network does.

    It has other numbers than the network has weights, so what treats each weight by its
    own history or by its place means something else there: Adam, enhancements, factors
    of the rate. Perturbed activations are none of its either.

    Args:
      method: see ``configs/quickstart.py``.
    """
    return (
        method.gradient in ("backward", "forward")
        and method.optimizer in ("sgd", "momentum")
        and not method.get("enhancements", {})
        and not method.get("rate_factors", {})
        and not method.get("adaptation", {}).get("adapter")
    )


def predicted_steps(
    learner: Learner,
    state: TrainState,
    data: Split,
    learning_rate: float,
    steps: int,
    question: Question,
) -> int | None:
    """Predicts the steps until the mean loss is down to a share of the first.

    Args:
      learner: the method applied to the network, one that `can_be_predicted`.
      state: before the first step.
      data: as `Learner.step` takes it.
      learning_rate: at the start; it decays linearly to 0.
      steps: length of the run.
      question: see `Question`.

    Returns:
      The steps, or None if the run is predicted to end before.
    """
    some = jax.tree.map(lambda x: x[: question.examples], data)
    method = learner.method
    keys = jax.random.split(jax.random.fold_in(state.key, 2), 3)

    def apply_fn(params: Any, images: jax.Array) -> jax.Array:
        return learner.outputs(params, state.frozen, state.scales)(images)[0]

    def losses_of(logits: jax.Array, labels: jax.Array) -> jax.Array:
        def outputs(x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            return x, {}

        losses: jax.Array = learner.objective.losses(outputs, Split(logits, labels))
        return jnp.mean(losses)

    def predicted(params: Any) -> jax.Array:
        model = analysis.linear_model(
            apply_fn,
            params,
            keys[0],
            num_directions=question.directions,
            epsilon=_EPSILON,
            images=some.images,
        )
        tx = optimizers.make_optimizer(method, learning_rate, steps, keys[1])
        return analysis.predicted_losses(
            model,
            losses_of,
            some.labels,
            tx,
            keys[2],
            steps=steps,
            batch_size=method.batch_size,
        )

    losses = jax.jit(predicted)(state.params)
    return analysis.steps_to_reach(losses, question.share * float(losses[0]))


def told(predicted: int | None, steps: int, question: Question) -> str:
    """The answer in words.

    Args:
      predicted: from `predicted_steps`.
      steps: length of the run.
      question: what was asked.

    Example:
      >>> told(1_937, 4_000, Question(share=0.5, directions=256, examples=512))
      'about 1,900 of 4,000 steps until the loss is down to 0.5 of the first'
      >>> told(None, 700, Question(share=0.5, directions=256, examples=512))
      'more than its 700 steps until the loss is down to 0.5 of the first'
    """
    until = f"until the loss is down to {question.share:g} of the first"
    if predicted is None:
        return f"more than its {steps:,} steps {until}"
    return f"about {float(f'{predicted:.2g}'):,.0f} of {steps:,} steps {until}"
