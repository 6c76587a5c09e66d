"""Work outside ``jax.jit`` that is compiled once, as long as it computes the same.

JAX compiles a loop for the function that is its body, and knows that function by its
identity. Outside ``jax.jit`` every call makes its functions anew, so that it would
compile its loops anew. Here a traced loss is known by what it computes, equation by
equation. The arrays that it captured are arguments of what was compiled: a loss that
captures others, of the same shapes, runs the same program on them.

Inside ``jax.jit``, ``jax.vmap`` and the like nothing of this happens: their tracers
pass through the same functions.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from fgrad._trees import is_concrete
from fgrad.tracing import primitives

R = TypeVar("R")

# Compiled programs that are kept, those of the last calls.
KEPT = 16

# Parameters of calls that hold rules of differentiation. Every trace has its own, and
# nothing here is differentiated.
_OF_DERIVATIVES = frozenset(
    {
        *("bwd", "fwd_jaxpr_thunk", "jvp_fun", "jvp_jaxpr_fun", "jvp_jaxpr_thunk"),
        *("out_trees", "symbolic_zeros"),
    }
)


def compiled(*static: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Makes a function of arrays be compiled where it is called outside of ``jit``.

    Args:
      *static: the arguments that are no pytrees of arrays, by name. They are passed by
        keyword and can be hashed.

    Example:
      >>> import jax.numpy as jnp
      >>> @compiled("times")
      ... def scaled(x, *, times):
      ...     return x * times
      >>> scaled(jnp.float32(2), times=3)
      Array(6., dtype=float32)
    """

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        jitted = jax.jit(function, static_argnames=static)

        @functools.wraps(function)
        def wrapped(*arrays: Any, **options: Any) -> R:
            if not _runs_now(arrays):
                return function(*arrays, **options)
            result: R = jitted(*arrays, **options)
            return result

        return wrapped

    return decorate


def call(
    function: Callable[..., R],
    program: core.ClosedJaxpr,
    *arrays: Any,
    **static: Hashable,
) -> R:
    """``function(program, *arrays, **static)``, compiled once for equal programs.

    Args:
      function: a function of a module, which is compiled with ``static``.
      program: a traced function. What it captured may differ from call to call.
      *arrays: pytrees of arrays.
      **static: all else.

    Example:
      >>> import jax.numpy as jnp
      >>> def run(program, x):
      ...     return core.jaxpr_as_fun(program)(x)[0]
      >>> for captured in (jnp.ones(2), jnp.zeros(2)):
      ...     program = jax.make_jaxpr(lambda x: jnp.sum(x * captured))(jnp.ones(2))
      ...     print(call(run, program, jnp.ones(2)))
      2.0
      0.0
    """
    if program.effects or not _runs_now((program.consts, arrays)):
        return function(program, *arrays, **static)
    if any(_captured(equation) for equation in program.jaxpr.eqns):
        program = _written_out(program)
    try:
        known = _Jaxpr(program.jaxpr)
    except _UnknownError:
        return function(program, *arrays, **static)
    run = _program(function, known, tuple(static.items()))
    result: R = run(program.consts, *arrays)
    return result


@functools.lru_cache(maxsize=KEPT)
def _program(
    function: Callable[..., Any], known: _Jaxpr, static: tuple[tuple[str, Any], ...]
) -> Callable[..., Any]:
    jaxpr = known.jaxpr

    def run(consts: Sequence[Any], *arrays: Any) -> Any:
        program = core.ClosedJaxpr(jaxpr, consts)
        return function(program, *arrays, **dict(static))

    compiled_run: Callable[..., Any] = jax.jit(run)
    return compiled_run


def _runs_now(arrays: Any) -> bool:
    """Whether work on these arrays is done now, and may be done by a program."""
    leaves = jax.tree.leaves(arrays)
    config: Any = jax.config
    return not config.jax_disable_jit and all(
        is_concrete(x) and (hasattr(x, "dtype") or isinstance(x, float | int))
        for x in leaves
    )


# --------------------------------------------------------- what a program computes


class _UnknownError(Exception):
    """A jaxpr has a part that is not known by what it computes."""


class _Jaxpr:
    """A jaxpr that equals any other that computes the same of its inputs."""

    def __init__(self, jaxpr: core.Jaxpr) -> None:
        # Without what was captured, which a jaxpr of JAX 0.12 holds itself.
        self.jaxpr = core.Jaxpr(
            *(jaxpr.constvars, jaxpr.invars, jaxpr.outvars, jaxpr.eqns),
            effects=jaxpr.effects,
            debug_info=jaxpr.debug_info,
        )
        self._parts = tuple(_parts(jaxpr))
        self._hash = hash(self._parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Jaxpr) and self._parts == other._parts


# A loss under `jax.jit` is the same jaxpr at every call, which is then read once.
_read: weakref.WeakKeyDictionary[core.Jaxpr, _Jaxpr] = weakref.WeakKeyDictionary()


def _known(jaxpr: core.Jaxpr) -> _Jaxpr:
    """The `_Jaxpr` of a jaxpr."""
    found = _read.get(jaxpr)
    if found is None:
        found = _read[jaxpr] = _Jaxpr(jaxpr)
    return found


def _parts(jaxpr: core.Jaxpr) -> Iterator[Hashable]:
    """All that a jaxpr computes, its variables numbered in their order."""
    numbers: dict[Any, int] = {}

    def operand(x: Any) -> Hashable:
        if isinstance(x, core.Literal):
            return _value(x.val), x.aval
        return numbers.setdefault(x, len(numbers))

    def named(x: Any) -> Hashable:
        return operand(x), x.aval

    yield from map(named, jaxpr.constvars)
    yield from map(named, jaxpr.invars)
    for equation in jaxpr.eqns:
        yield equation.primitive
        yield equation.ctx
        yield tuple(map(operand, equation.invars))
        yield tuple(map(named, equation.outvars))
        yield _value(
            {k: x for k, x in equation.params.items() if k not in _OF_DERIVATIVES}
        )
    yield tuple(map(operand, jaxpr.outvars))


def _value(x: Any) -> Hashable:
    """A parameter or a literal, so that equal ones compute the same.

    Raises:
      _UnknownError: for what has no such form.
    """
    if isinstance(x, core.ClosedJaxpr | core.Jaxpr):
        if getattr(x, "consts", ()):
            raise _UnknownError
        return _known(x.jaxpr if isinstance(x, core.ClosedJaxpr) else x)
    if isinstance(x, jax.Array):
        if x.ndim or jnp.issubdtype(x.dtype, jax.dtypes.extended):
            raise _UnknownError
        x = np.asarray(x)
    if isinstance(x, np.ndarray | np.generic):
        return str(x.dtype), x.shape, x.tobytes()
    if isinstance(x, tuple | list):
        return type(x), tuple(map(_value, x))
    if isinstance(x, Mapping):
        return tuple((k, _value(v)) for k, v in x.items())
    if isinstance(x, float | complex):
        return type(x), repr(x)  # 0.0 and -0.0 are equal, and NaN is not
    if not isinstance(x, Hashable):
        raise _UnknownError
    return type(x), x


# ------------------------------------------------------------------ captured arrays


def _captured(equation: core.JaxprEqn) -> bool:
    """Whether an equation is a call of a function that captured arrays."""
    called = primitives.called_jaxpr(equation)
    return called is not None and (
        bool(called[1]) or any(map(_captured, called[0].eqns))
    )


def _written_out(program: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The same program without calls of functions that captured arrays.

    What a function under ``jax.jit`` captured belongs to the equation that calls it.
    Once its own equations are part of the program, the program captured it.
    """

    def run(jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Any]) -> Any:
        names = dict(zip(jaxpr.constvars, consts, strict=True))
        names.update(zip(jaxpr.invars, inputs, strict=True))

        def read(x: Any) -> Any:
            return x.val if isinstance(x, core.Literal) else names[x]

        for equation in jaxpr.eqns:
            operands = [read(x) for x in equation.invars]
            called = primitives.called_jaxpr(equation) if _captured(equation) else None
            outputs = (
                primitives.bind(equation, operands)
                if called is None
                else run(*called, operands)
            )
            names.update(zip(equation.outvars, outputs, strict=True))
        return [read(x) for x in jaxpr.outvars]

    return jax.make_jaxpr(lambda *inputs: run(program.jaxpr, program.consts, inputs))(
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in program.in_avals)
    )
