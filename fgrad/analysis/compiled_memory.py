"""What a training step needs of memory, as the compiler plans it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import tree_util

from fgrad import _checks


class Memory(NamedTuple):
    """Bytes of one call of a compiled function.

    Attributes:
      arguments: parameters, state and data.
      outputs: results, wherever they lie.
      aliased: those results that take the place of donated arguments.
      temporaries: scratch memory of the call.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int

    @classmethod
    def planned(cls, compiled: jax.stages.Compiled) -> Memory:
        """What ``memory_analysis()`` says of a compiled function.

        Raises:
          NotImplementedError: if the backend makes no such plan.
        """
        plan: Any = compiled.memory_analysis()
        if plan is None:
            raise NotImplementedError(
                f"the backend {jax.default_backend()!r} does not report its memory "
                "plan; compile for a CPU, a GPU or a TPU."
            )
        return cls(
            plan.argument_size_in_bytes,
            plan.output_size_in_bytes,
            plan.alias_size_in_bytes,
            plan.temp_size_in_bytes,
        )

    @property
    def live(self) -> int:
        """All bytes that the call needs: arguments, new outputs, temporaries."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    def asdict(self) -> dict[str, int]:
        """For JSON."""
        return {**self._asdict(), "live": self.live}


class MemoryReport(NamedTuple):
    """Memory of a step, and what its arguments are.

    Attributes:
      memory: the compiler's plan.
      arguments: bytes of each argument by name; of one with named fields, such as a
        training state, those of each field. What the compiler adds (padding) or leaves
        out (arguments that the step does not read) is the entry "not read, or padding".
    """

    memory: Memory
    arguments: Mapping[str, int]

    @property
    def live(self) -> int:
        """All bytes that a call needs."""
        return self.memory.live

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.memory.asdict(), "by_argument": dict(self.arguments)}

    def table(self, **others: MemoryReport) -> str:
        """A Markdown table of MiB, beside other reports and with the ratios to them.

        Args:
          **others: reports of inference, of backpropagation, ..., by name.

        Returns:
          Rows for the arguments, the new outputs (those that take no donated
          argument's place), the temporaries and their sum.
        """
        reports = {"step": self, **others}
        names = dict.fromkeys(x for r in reports.values() for x in r.arguments)
        rows: dict[str, list[int | None]] = {
            name: [r.arguments.get(name) for r in reports.values()] for name in names
        }
        memories = [r.memory for r in reports.values()]
        rows["new outputs"] = [m.outputs - m.aliased for m in memories]
        rows["temporaries"] = [m.temporaries for m in memories]
        rows["live"] = [m.live for m in memories]
        heads = ["MiB", *reports, *(f"step / {name}" for name in others)]
        lines = [heads, ["---"] * len(heads)]
        for name, sizes in rows.items():
            ratios = [_ratio(sizes[0], other) for other in sizes[1:]]
            lines.append([name, *map(_mib, sizes), *ratios])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def __str__(self) -> str:
        return self.table()


def memory_report(step: Callable[..., Any], *args: Any, **kwargs: Any) -> MemoryReport:
    r"""What one call of a function needs, from the compiler; nothing runs.

    .. math::
        \text{live} = \text{arguments} + \text{outputs} - \text{aliased}
        + \text{temporaries}

    Args:
      step: a function under `jax.jit`, with the arguments donated that it shall reuse;
        one that is not is jitted here and donates nothing.
      *args: its arguments: arrays, or `jax.ShapeDtypeStruct` in their place.
      **kwargs: those by keyword.

    Returns:
      A `MemoryReport`. On a CPU and a GPU it is what the compiler allocates; code,
      constants and the runtime's own memory are not in it.

    Raises:
      NotImplementedError: if the backend makes no plan.

    Example:
      >>> import jax.numpy as jnp
      >>> def step(params, x):
      ...     return params - 0.1 * (x @ params)
      >>> report = memory_report(
      ...     jax.jit(step, donate_argnums=0), jnp.ones(256), jnp.ones((256, 256))
      ... )
      >>> report.arguments
      {'params': 1024, 'x': 262144}
      >>> inference = memory_report(
      ...     lambda params, x: x @ params, jnp.ones(256), jnp.ones((256, 256))
      ... )
      >>> report.live == report.memory.temporaries + 263168
      True
      >>> print(report.table(inference=inference).splitlines()[0])
      | MiB | step | inference | step / inference |
    """
    _checks.function("step", step, *["argument"] * len(args), **kwargs)
    jitted: Any = step if hasattr(step, "lower") else jax.jit(step)
    memory = Memory.planned(jitted.lower(*args, **kwargs).compile())
    parts: dict[str, int] = {}
    for name, argument in _named(step, args, kwargs).items():
        for path, leaf in tree_util.tree_leaves_with_path(argument):
            field = _field(path)
            full = f"{name}.{field}" if field else name
            parts[full] = parts.get(full, 0) + _bytes(leaf)
    if difference := memory.arguments - sum(parts.values()):
        parts["not read, or padding"] = difference
    return MemoryReport(memory, parts)


def _named(
    step: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        bound = inspect.signature(step).bind(*args, **kwargs)
    except (TypeError, ValueError):  # a builtin, or a callable without a signature
        return {**{f"argument {i}": x for i, x in enumerate(args)}, **kwargs}
    return bound.arguments


def _field(path: tuple[Any, ...]) -> str:
    """Name of the field that a leaf is in, if its argument has named fields."""
    match path:
        case (tree_util.GetAttrKey(name=name), _, *_):
            return str(name)
        case _:
            return ""


def _bytes(leaf: Any) -> int:
    aval = jax.typeof(leaf) if not isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        aval = jax.eval_shape(jax.random.key_data, aval)
    return int(aval.size * aval.dtype.itemsize)


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.3g}"


def _ratio(own: int | None, other: int | None) -> str:
    return f"{own / other:.2f}" if own is not None and other else ""
