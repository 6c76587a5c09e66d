"""Values that XLA computes once, in the place of once for each loop that reads them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from fgrad.tracing import execution_order

# To compute fewer values again takes less time than to store them.
FEW = 2**12

# One equation ``stored(x) = x`` of a traced program. The writer of C decides for itself
# what to store, and what is exported leaves it to those who compile it.
stored_p = Primitive("stored")


def stored(x: jax.Array) -> jax.Array:
    """The same array; on a CPU XLA stores it before anything reads it.

    XLA for CPUs drops ``lax.optimization_barrier`` and computes what is elementwise
    again for every loop that needs it. Integers pay for that: a network in floats has a
    few operations between two products, one in integers has dozens.

    Args:
      x: an array, perhaps one that `jax.jit` traces.

    Example:
      >>> stored(jnp.arange(3))
      Array([0, 1, 2], dtype=int32)
    """
    if x.size < FEW:
        return x
    result: jax.Array = stored_p.bind(x)
    return result


def _from_a_branch(x: jax.Array) -> jax.Array:
    """The array, out of a branch of which no compiler knows that it is always taken."""
    one = execution_order.hidden(1, execution_order.dependent_zero(x))
    result: jax.Array = lax.cond(one > 0, lambda v: v, jnp.zeros_like, x)
    return result


def _lower_for_cpu(context: Any, x: Any) -> Any:
    if context.module_context.lowering_parameters.for_export:
        return [x]
    rule = mlir.lower_fun(_from_a_branch, multiple_results=False)
    return rule(context, x)


stored_p.def_impl(lambda x: x)
stored_p.def_abstract_eval(lambda x: x)
batching.primitive_batchers[stored_p] = lambda args, axes: (stored(*args), axes[0])
mlir.register_lowering(stored_p, lambda context, x: [x])
mlir.register_lowering(stored_p, _lower_for_cpu, platform="cpu")
