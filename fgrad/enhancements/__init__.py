"""What can be added to the estimator: links and wrappers for optax, one file each."""

from fgrad.enhancements.error_feedback import error_feedback
from fgrad.enhancements.extrapolation import extrapolation
from fgrad.enhancements.guided_sampling import momentum_guided_sampling
from fgrad.enhancements.kernel_normalization import kernel_normalization
from fgrad.enhancements.private import privacy_spent, private_forward_grad
from fgrad.enhancements.sharpness import sharpness_aware
from fgrad.enhancements.sparse_update import sparse_update

__all__ = [
    "error_feedback",
    "extrapolation",
    "kernel_normalization",
    "momentum_guided_sampling",
    "privacy_spent",
    "private_forward_grad",
    "sharpness_aware",
    "sparse_update",
]
