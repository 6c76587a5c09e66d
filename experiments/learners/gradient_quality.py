"""How good a method's estimates of the gradient are."""

from collections.abc import Callable
from typing import Any

import jax

import fgrad
from experiments.data.arrays import Split
from experiments.learners.learner import Learner, TrainState, make_learner
from fgrad import analysis

_LEAST_BITS = 16  # weights of fewer bits move by sparse steps on their grid

# compare(state, batch, key, num_estimates, layer) -> GradientQuality
Comparison = Callable[..., analysis.GradientQuality]


def comparison(network: Callable[..., Any], learner: Learner) -> Comparison | None:
    """Compares a method's estimates with the gradient of the float network.

    Args:
      network: ``network(bits=...)`` gives the Flax module.
      learner: the method's functions.

    Returns:
      ``compare(state, batch, key, num_estimates, layer=None)``, which gives a
      `fgrad.analysis.GradientQuality` of all weights that train, or of the part of
      that name at the top of their tree. None for backpropagation, whose gradient is
      exact, and for weights of less than 16 bits, whose sparse steps are no estimates
      of a gradient.
    """
    method = learner.method
    bits = method.get("bits")
    if method.gradient == "backward" or (bits and bits[0] < _LEAST_BITS):
        return None
    in_floats = method.copy_and_resolve_references()
    with in_floats.ignore_type():
        in_floats.bits = None
    exact = make_learner(in_floats, network, learner.objective)
    gradient_fn = jax.jit(jax.grad(exact.loss_fn))
    estimate_fn = jax.jit(learner.estimate)

    def compare(
        state: TrainState,
        batch: Split,
        key: jax.Array,
        num_estimates: int,
        layer: str | None = None,
    ) -> analysis.GradientQuality:
        def part(tree: Any) -> Any:
            return tree if layer is None else tree[layer]

        values, frozen = fgrad.dequantize((state.params, state.frozen))
        return analysis.gradient_quality(
            lambda key: part(estimate_fn(state, key, batch)),
            part(gradient_fn(values, frozen, {}, batch)),
            key,
            num_estimates=num_estimates,
        )

    return compare
