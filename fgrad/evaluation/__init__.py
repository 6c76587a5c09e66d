"""The loss on both sides of the weights, of any JAX function, in inference's memory."""

from fgrad.evaluation.explanation import PerturbedLeaf, explain
from fgrad.evaluation.pairs import (
    TracedLoss,
    dual_forward,
    evaluate_examples,
    evaluate_pairs,
    perturb,
)

__all__ = [
    "PerturbedLeaf",
    "TracedLoss",
    "dual_forward",
    "evaluate_examples",
    "evaluate_pairs",
    "explain",
    "perturb",
]
