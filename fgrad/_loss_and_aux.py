"""What a loss function returns: the loss, or the loss and an aux beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fgrad._trees import path_str


def is_pair(result: Any) -> bool:
    """Whether a loss function returned two things: ``(loss, aux)``."""
    return isinstance(result, tuple | list) and len(result) == 2


def loss_alone(result: Any) -> Any:
    """The loss of what a loss function returned, whether an aux is with it or not."""
    return result[0] if is_pair(result) else result


def split(result: Any) -> tuple[Any, Any]:
    """The loss, unchecked, and the aux of a function that has one.

    Raises:
      TypeError: for what is no pair, and for an aux of other things than arrays.

    Example:
      >>> split((2.0, {"accuracy": 0.5}))
      (2.0, {'accuracy': Array(0.5, dtype=float32, weak_type=True)})
    """
    if not is_pair(result):
        raise TypeError(
            "with has_aux=True value_fn must return (loss, aux), got a "
            f"{type(result).__name__}."
        )
    loss, aux = result
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
            raise TypeError(
                f"the aux of value_fn holds a {type(leaf).__name__}"
                f"{' at ' + repr(path_str(path)) if path else ''}; it is a pytree of "
                "arrays, such as metrics or the statistics of a batch."
            )
    return loss, jax.tree.map(jnp.asarray, aux)


class Aux(NamedTuple):
    """What ``value_fn`` returns beside the loss.

    Attributes:
      expected: whether it returns anything.
      initial: the aux before the first step, or ``()``.
    """

    expected: bool
    initial: Any

    @classmethod
    def of(cls, has_aux: Any, initial_aux: Any) -> Aux:
        """The options ``has_aux`` and ``initial_aux``, checked."""
        if not isinstance(has_aux, bool | np.bool_):
            raise TypeError(f"has_aux must be True or False, got {has_aux!r}.")
        is_given = not (isinstance(initial_aux, tuple) and not initial_aux)
        if is_given and not has_aux:
            raise ValueError(
                "initial_aux is what value_fn returns beside the loss, and "
                "has_aux=False says that it returns nothing; set has_aux=True."
            )
        return cls(bool(has_aux), initial_aux)

    def at_first(self) -> Any:
        """A copy of the initial aux, which a donated state may overwrite."""
        return jax.tree.map(_copied, self.initial)

    def checked(self, aux: Any) -> Any:
        """An aux, of the types of the initial one if there is one."""
        aux = jax.tree.map(_strong, aux)
        initial = self.at_first()
        if not jax.tree.leaves(initial):
            return aux
        wanted, got = (jax.tree.map(jax.typeof, tree) for tree in (initial, aux))
        same = len({jax.tree.structure(wanted), jax.tree.structure(got)}) == 1
        leaves = zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=False)
        if not same or any((w.shape, w.dtype) != (g.shape, g.dtype) for w, g in leaves):
            raise ValueError(
                f"value_fn returned an aux of {got}, and initial_aux is {wanted}. Both "
                "must have the same structure, shapes and dtypes."
            )
        return aux


def _copied(x: Any) -> jax.Array:
    return jnp.copy(_strong(x))


def _strong(x: Any) -> jax.Array:
    """An array whose dtype is not weak, as that of a Python number is."""
    array = jnp.asarray(x)
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return array
    return array.astype(array.dtype)
