"""What is measured: a loss, its weights and its data."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

import fgrad


class Problem(NamedTuple):
    """A subject in some arithmetic with a batch of data.

    Attributes:
      loss_fn: ``loss_fn(params, **data) -> scalar``, the mean cross-entropy; or that of
        each example.
      params: weights, float or `fgrad.QTensor`.
      data: what the loss takes beside the weights, by name: the ``batch``, and where
        activations are integers, their ``scales``.
    """

    loss_fn: Callable[..., jax.Array]
    params: Any
    data: Mapping[str, Any]

    @property
    def num_parameters(self) -> int:
        """How many weights there are."""
        leaves = jax.tree.leaves(self.params, is_leaf=fgrad.fixed_point.is_qtensor)
        return sum(leaf.size for leaf in leaves)
