"""Gradients from perturbed activations, for layers deep inside a network."""

from fgrad.activity.joint import JointForwardGradState, joint_forward_grad
from fgrad.activity.joint_structure import explain_joint
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
    "JointForwardGradState",
    "PerturbedActivation",
    "Site",
    "SyntheticGradient",
    "activity_forward_grad",
    "explain",
    "explain_joint",
    "joint_forward_grad",
    "leaves_of",
    "leaves_outside",
]
