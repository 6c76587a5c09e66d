"""Gradients from perturbed activations, for layers deep inside a network."""

from fgrad.activity.sites import Site, leaves_of, leaves_outside
from fgrad.activity.synthetic_gradients import SyntheticGradient
from fgrad.activity.transform import (
    ActivityForwardGradState,
    PerturbedActivation,
    activity_forward_grad,
    explain,
)

__all__ = [
    "ActivityForwardGradState",
    "PerturbedActivation",
    "Site",
    "SyntheticGradient",
    "activity_forward_grad",
    "explain",
    "leaves_of",
    "leaves_outside",
]
