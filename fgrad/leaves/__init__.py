"""The leaves of the parameters: the plan of a step, and each leaf's arithmetic."""

from fgrad.leaves.epsilon import (
    Epsilon,
    LeafEpsilon,
    relative_epsilon,
    step_epsilon,
)
from fgrad.leaves.guidance import Guidance, Guide
from fgrad.leaves.low_bit import OnGrid, on_grid
from fgrad.leaves.plan import Mask, Plan, Policy, map_leaves, trained_leaves

__all__ = [
    "Epsilon",
    "Guidance",
    "Guide",
    "LeafEpsilon",
    "Mask",
    "OnGrid",
    "Plan",
    "Policy",
    "map_leaves",
    "on_grid",
    "relative_epsilon",
    "step_epsilon",
    "trained_leaves",
]
