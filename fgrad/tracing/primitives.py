"""What is known of JAX's primitives: one table, and a few questions about equations.

Programs that read jaxprs (the evaluator, the finder of layers, the memory planner) ask
this table instead of keeping lists of names. To let fgrad follow another primitive, add
its line here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
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
      view: its output can lie in memory where its operand lies.
      elementwise: each value of its output depends on one value of each operand.
      reduction: it combines the values along some axes to one.
      derivative: what its derivative reads: its "operands", its "result" or "nothing";
        for a linear one nothing, whatever stands here. Empty if it depends on what is
        differentiated, as for a product, or is not known.
    """

    called: str = ""
    product: bool = False
    linear: bool = False
    linear_in: tuple[int, ...] = ()
    ends_layer: bool = False
    places: int | None = None
    awaited: bool = False
    view: bool = False
    elementwise: bool = False
    reduction: bool = False
    derivative: Literal["operands", "result", "nothing", ""] = ""


_LINEAR = Facts(linear=True)
_SUM = Facts(linear=True, ends_layer=True, elementwise=True)
_VIEW = Facts(linear=True, view=True)
_VIEW_IN_LAYER = Facts(linear=True, ends_layer=True, view=True)
_READS_OPERAND = Facts(elementwise=True, derivative="operands")
_READS_RESULT = Facts(elementwise=True, derivative="result")
_PIECEWISE_CONSTANT = Facts(elementwise=True, derivative="nothing")
_INDEX = Facts(reduction=True, derivative="nothing")
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
    "add": _SUM,
    "add_any": _SUM,
    "sub": _SUM,
    "neg": _SUM,
    "mul": Facts(linear_in=(0, 1), ends_layer=True, elementwise=True),
    "div": Facts(linear_in=(0,), ends_layer=True, elementwise=True),
    "select_n": Facts(elementwise=True),
    "convert_element_type": _SUM,
    "abs": _READS_OPERAND,
    "clamp": _READS_OPERAND,
    "cos": _READS_OPERAND,
    "erf": _READS_OPERAND,
    "erf_inv": _READS_OPERAND,
    "erfc": _READS_OPERAND,
    "expm1": _READS_OPERAND,
    "integer_pow": _READS_OPERAND,
    "log": _READS_OPERAND,
    "log1p": _READS_OPERAND,
    "pow": _READS_OPERAND,
    "sign": _READS_OPERAND,
    "sin": _READS_OPERAND,
    "square": _READS_OPERAND,
    "cbrt": _READS_RESULT,
    "exp": _READS_RESULT,
    "exp2": _READS_RESULT,
    "logistic": _READS_RESULT,
    "max": _READS_RESULT,
    "min": _READS_RESULT,
    "rsqrt": _READS_RESULT,
    "sqrt": _READS_RESULT,
    "tanh": _READS_RESULT,
    "eq": _PIECEWISE_CONSTANT,
    "ge": _PIECEWISE_CONSTANT,
    "gt": _PIECEWISE_CONSTANT,
    "is_finite": _PIECEWISE_CONSTANT,
    "le": _PIECEWISE_CONSTANT,
    "lt": _PIECEWISE_CONSTANT,
    "ne": _PIECEWISE_CONSTANT,
    "and": _PIECEWISE_CONSTANT,
    "or": _PIECEWISE_CONSTANT,
    "not": _PIECEWISE_CONSTANT,
    "ceil": _PIECEWISE_CONSTANT,
    "floor": _PIECEWISE_CONSTANT,
    "round": _PIECEWISE_CONSTANT,
    "nextafter": _PIECEWISE_CONSTANT,
    # Along axes.
    "reduce_sum": Facts(linear=True, awaited=True, reduction=True),
    "reduce_max": Facts(awaited=True, reduction=True),
    "reduce_and": Facts(reduction=True),
    "reduce_or": Facts(reduction=True),
    "argmax": _INDEX,
    "argmin": _INDEX,
    "cumsum": _LINEAR,
    "reduce_window_sum": _LINEAR,
    # Shapes and places.
    "broadcast_in_dim": _VIEW_IN_LAYER,
    "copy": _VIEW_IN_LAYER,
    "copy_p": _VIEW_IN_LAYER,
    "expand_dims": _VIEW_IN_LAYER,
    "reshape": _VIEW_IN_LAYER,
    "squeeze": _VIEW_IN_LAYER,
    "concatenate": _LINEAR,
    "optimization_barrier": _VIEW,
    "pad": _LINEAR,
    "rev": _VIEW,
    "slice": _VIEW,
    "transpose": _VIEW,
    "tile": _LINEAR,
    "iota": Facts(derivative="nothing"),
    "stop_gradient": Facts(view=True, derivative="nothing"),
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


@contextlib.contextmanager
def settings(equation: core.JaxprEqn) -> Iterator[None]:
    """The settings under which an equation was traced, such as matmul precision.

    A ``shard_map`` that was entered since then stays entered.
    """
    mesh = jax.sharding.get_abstract_mesh()
    traced_on: Any = getattr(equation.ctx, "cur_abstract_mesh", mesh)
    entered = bool(mesh.manual_axes) and not traced_on.manual_axes
    stay = jax.sharding.use_abstract_mesh(mesh) if entered else contextlib.nullcontext()
    with equation.ctx.manager, stay:
        yield


def bind(equation: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """The outputs of an equation for other operands.

    They are computed under the settings with which the equation was traced, such as
    the precision of products.
    """
    primitive = equation.primitive
    parameters = primitive.get_bind_params(equation.params)
    with settings(equation):
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


def multiply_adds(
    equations: Iterable[core.JaxprEqn],
    branch: Callable[[Iterable[float]], float] = max,
) -> float:
    """Multiply-adds of all products, those inside loops, branches and calls included.

    A ``while`` loop counts as one round.

    Args:
      equations: of a jaxpr.
      branch: which of the branches of a ``cond`` counts, by default the longest.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> closed = jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 5)))
      >>> multiply_adds(closed.jaxpr.eqns)
      30.0
    """
    return sum(_multiply_adds(equation, branch) for equation in equations)


def _multiply_adds(
    equation: core.JaxprEqn, branch: Callable[[Iterable[float]], float]
) -> float:
    if facts(equation).product:
        weight: Any = equation.invars[1].aval
        numbers = equation.params["dimension_numbers"]
        if isinstance(numbers, lax.ConvDimensionNumbers):
            outputs = weight.shape[numbers.rhs_spec[0]]
        else:
            contracted = (weight.shape[axis] for axis in numbers[0][1])
            outputs = weight.size // max(1, math.prod(contracted))
        out: Any = equation.outvars[0].aval
        per_output: float = weight.size / max(1, outputs)
        size: int = out.size
        return size * per_output
    if equation.primitive.name == "cond":
        branches = equation.params["branches"]
        return branch(multiply_adds(b.jaxpr.eqns, branch) for b in branches)
    inner = (
        getattr(parameter, "jaxpr", parameter) for parameter in equation.params.values()
    )
    once = sum(
        multiply_adds(jaxpr.eqns, branch)
        for jaxpr in inner
        if isinstance(jaxpr, core.Jaxpr)
    )
    rounds: int = equation.params.get("length", 1)
    return once * rounds
