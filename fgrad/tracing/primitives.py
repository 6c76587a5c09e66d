"""What is known of JAX's primitives: one table, and a few questions about equations.

Programs that read jaxprs (the evaluator, the finder of layers, the memory planner) ask
this table instead of keeping lists of names. To let fgrad follow another primitive, add
its line here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jax import lax
from jax.extend import core


class Facts(NamedTuple):
    """What is known of one primitive. The defaults say nothing special.

    Attributes:
      called: the name of the parameter that holds a jaxpr, if all that the equation
        does is to call that jaxpr.
      product: it multiplies an activation (operand 0) by a weight (operand 1).
      linear: it is linear in all of its operands taken together, as a sum is.
      linear_in: positions of the operands in which it is linear while the others stay
        as they are, as a product is.
      ends_layer: it may follow the product of a layer and still belong to that layer,
        as the addition of a bias does.
      places: the position of the operand that it writes into its first operand.
      awaited: its output is stored in memory, so that later work can wait for it
        without being torn out of a fused loop.
    """

    called: str = ""
    product: bool = False
    linear: bool = False
    linear_in: tuple[int, ...] = ()
    ends_layer: bool = False
    places: int | None = None
    awaited: bool = False


_LINEAR = Facts(linear=True)
_ELEMENTWISE = Facts(linear=True, ends_layer=True)
_PRODUCT = Facts(product=True, linear_in=(0, 1), awaited=True)
_INTEGER_PRODUCT = Facts(product=True, linear_in=(1,), awaited=True)

FACTS: dict[str, Facts] = {
    # Calls.
    "jit": Facts(called="jaxpr"),
    "pjit": Facts(called="jaxpr"),
    "closed_call": Facts(called="call_jaxpr"),
    "core_call": Facts(called="call_jaxpr"),
    "remat": Facts(called="jaxpr"),
    "remat2": Facts(called="jaxpr"),
    "checkpoint": Facts(called="jaxpr"),
    "custom_jvp_call": Facts(called="call_jaxpr"),
    "custom_vjp_call": Facts(called="call_jaxpr"),
    "custom_vjp_call_jaxpr": Facts(called="fun_jaxpr"),
    # Products; the integer ones are those of `fgrad.fixed_point.products`.
    "dot_general": _PRODUCT,
    "conv_general_dilated": _PRODUCT,
    "integer_dot_general": _INTEGER_PRODUCT,
    "integer_conv": _INTEGER_PRODUCT,
    # Arithmetic.
    "add": _ELEMENTWISE,
    "add_any": _ELEMENTWISE,
    "sub": _ELEMENTWISE,
    "neg": _ELEMENTWISE,
    "mul": Facts(linear_in=(0, 1), ends_layer=True),
    "div": Facts(linear_in=(0,), ends_layer=True),
    "convert_element_type": _ELEMENTWISE,
    "reduce_sum": Facts(linear=True, awaited=True),
    "reduce_max": Facts(awaited=True),
    # Shapes and places.
    "broadcast_in_dim": _ELEMENTWISE,
    "copy": _ELEMENTWISE,
    "copy_p": _ELEMENTWISE,
    "expand_dims": _ELEMENTWISE,
    "reshape": _ELEMENTWISE,
    "squeeze": _ELEMENTWISE,
    "concatenate": _LINEAR,
    "optimization_barrier": _LINEAR,
    "pad": _LINEAR,
    "rev": _LINEAR,
    "slice": _LINEAR,
    "transpose": _LINEAR,
    "dynamic_slice": Facts(linear_in=(0,)),
    "gather": Facts(linear_in=(0,), awaited=True),
    "scatter": Facts(places=2),
    "dynamic_update_slice": Facts(places=1),
}

_NOTHING_SPECIAL = Facts()


def facts(equation: core.JaxprEqn) -> Facts:
    """What is known of the primitive of an equation."""
    return FACTS.get(equation.primitive.name, _NOTHING_SPECIAL)


def called_jaxpr(
    equation: core.JaxprEqn,
) -> tuple[core.Jaxpr, Sequence[Any]] | None:
    """The jaxpr that an equation only calls, and its constants; or None."""
    closed = equation.params.get(facts(equation).called)
    if closed is None:
        return None
    # The jaxpr of remat is open: it has no constants of its own.
    return getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())


def bind(equation: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """The outputs of an equation for other operands.

    They are computed under the settings with which the equation was traced, such as
    the precision of products.
    """
    primitive = equation.primitive
    parameters = primitive.get_bind_params(equation.params)
    with equation.ctx.manager:
        outputs = primitive.bind(*operands, **parameters)
    return list(outputs) if primitive.multiple_results else [outputs]


def scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried.

    Those come first, in this order; what is scanned over follows.

    Args:
      params: the parameters of its equation.
    """
    if "ft_in" in params:  # JAX 0.12
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def multiply_adds(equations: Iterable[core.JaxprEqn]) -> float:
    """Multiply-adds of all products, those inside loops, branches and calls included.

    Of a branch the longest counts, and a ``while`` loop as one round.

    Example:
      >>> import jax.numpy as jnp
      >>> closed = jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 5)))
      >>> multiply_adds(closed.jaxpr.eqns)
      30.0
    """
    return sum(map(_multiply_adds, equations))


def _multiply_adds(equation: core.JaxprEqn) -> float:
    if facts(equation).product:
        weight: Any = equation.invars[1].aval
        numbers = equation.params["dimension_numbers"]
        if isinstance(numbers, lax.ConvDimensionNumbers):
            outputs = weight.shape[numbers.rhs_spec[0]]
        else:
            contracted = (weight.shape[axis] for axis in numbers[0][1])
            outputs = weight.size // max(1, math.prod(contracted))
        out: Any = equation.outvars[0].aval
        return out.size * (weight.size / max(1, outputs))
    if equation.primitive.name == "cond":
        branches = equation.params["branches"]
        return max(multiply_adds(branch.jaxpr.eqns) for branch in branches)
    inner = (
        getattr(parameter, "jaxpr", parameter) for parameter in equation.params.values()
    )
    once = sum(
        multiply_adds(jaxpr.eqns) for jaxpr in inner if isinstance(jaxpr, core.Jaxpr)
    )
    return once * equation.params.get("length", 1)
