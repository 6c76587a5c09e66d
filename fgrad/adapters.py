r"""Few new weights for a model that stays as it is: LoRA, adapters and prompts.

Each function takes a loss of the parameters and returns the new weights and a loss of
these, for any pytree of parameters: of Flax, NNX, Equinox, or your own. The loss is
traced, and where it multiplies an activation by a chosen kernel, the new weights take
part, as LoRA or as an adapter:

.. math:: x W + (x D) U, \quad x W + f(x D) U

So no changed kernel is made, and the model has to know of nothing.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from fgrad._trees import is_concrete, path_str
from fgrad.evaluation import factored_products
from fgrad.evaluation.factored_products import Factored
from fgrad.fixed_point import (
    QTensor,
    dequantize,
    integers_of,
    is_qtensor,
    quantize_to_scale,
    stored,
    with_stored,
)
from fgrad.tracing import primitives

# What picks leaves: a regular expression that is found in the path, or a function of
# the path and the leaf; None for all that the loss multiplies by.
Where = str | Callable[[str, Any], bool] | None


class Adaptation(NamedTuple):
    """New weights for a model, and what is done with them.

    Attributes:
      adapters: the new weights, nested dictionaries for an optimizer and `fgrad.save`.
      value_fn: ``value_fn(adapters, base=params, **kwargs)``, the loss of the model
        ``params`` with the new weights; ``kwargs`` are those of the given loss.
      merge: ``merge(params, adapters)``, the parameters of a model that is adapted for
        good, on the grids that they had. It raises a ValueError if a kernel would leave
        its grid.
    """

    adapters: dict[str, Any]
    value_fn: Callable[..., Any]
    merge: Callable[[Any, Any], Any]


def lora(
    value_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    *,
    rank: int = 4,
    where: Where = None,
    **kwargs: Any,
) -> Adaptation:
    r"""Adds a change of low rank to chosen kernels.

    .. math:: y = x W + (x D) U

    U is zero at first. Kernels of dense layers with any axes, and of convolutions. A
    kernel may be a `QTensor` that is dequantized, or multiplied in integers by
    `fgrad.layers`.

    Args:
      value_fn: ``value_fn(params, **kwargs)``, the loss.
      params: parameters of the model. They stay as they are.
      key: PRNG key of the initial D, which is normal with deviation 1/√(inputs).
      rank: of the change.
      where: the kernels: a regular expression that is found in their paths, such as
        ``"query|value"``, or a function of path and leaf. By default all leaves that
        the loss multiplies activations by.
      **kwargs: arguments of the loss, of which only shapes count.

    Returns:
      An `Adaptation`. For each kernel its adapters are ``{"down": D, "up": U}``, with
      the axes of the kernel after one of length ``rank``: D of length 1 along outputs,
      U along inputs.

    Raises:
      ValueError: for a rank below 1, or if nothing is chosen that the loss multiplies
        by.

    Example:
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> loss = lambda p, x: jnp.sum((x @ p["kernel"] + p["bias"]) ** 2)
      >>> x = jnp.ones((5, 3))
      >>> adapters, value_fn, merge = lora(loss, params, jax.random.key(0), rank=1, x=x)
      >>> jax.tree.map(jnp.shape, adapters)
      {'kernel': {'down': (1, 3, 1), 'up': (1, 1, 2)}}
      >>> value_fn(adapters, base=params, x=x) == loss(params, x=x)
      Array(True, dtype=bool)

    Reference:
      Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022.
    """
    chosen = _chosen(value_fn, params, where, kwargs)
    adapters = _drawn(chosen, key, rank)
    return Adaptation(adapters, _adapted(value_fn, None), _merge)


def adapter(
    value_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    *,
    width: int = 8,
    where: Where = None,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    **kwargs: Any,
) -> Adaptation:
    r"""Adds a small network of one hidden layer beside chosen kernels.

    .. math:: y = x W + f(x D) U

    U is zero at first.

    Args:
      value_fn: ``value_fn(params, **kwargs)``, the loss.
      params: parameters of the model. They stay as they are.
      key: PRNG key of the initial D.
      width: of the hidden layer.
      where: the kernels, as in `lora`.
      activation: f.
      **kwargs: arguments of the loss, of which only shapes count.

    Returns:
      An `Adaptation`, with adapters as those of `lora`. Its ``merge`` raises, since no
      kernel does what an adapter does.

    Raises:
      ValueError: as `lora`; from ``value_fn`` for a chosen kernel with which the loss
        does something else than to multiply by it.

    Example:
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> loss = lambda p, x: jnp.sum((x @ p["kernel"]) ** 2)
      >>> x = jnp.ones((5, 3))
      >>> adapted = adapter(loss, params, jax.random.key(0), width=4, x=x)
      >>> jax.tree.map(jnp.shape, adapted.adapters)
      {'kernel': {'down': (4, 3, 1), 'up': (4, 1, 2)}}

    Reference:
      He et al., "Towards a unified view of parameter-efficient transfer learning",
      ICLR 2022, the parallel adapter.
    """
    chosen = _chosen(value_fn, params, where, kwargs)
    adapters = _drawn(chosen, key, width)
    return Adaptation(adapters, _adapted(value_fn, activation), _no_merge)


def prompts(
    value_fn: Callable[..., Any], params: Any, *, table: str, tokens: Sequence[int]
) -> Adaptation:
    """Trains the embeddings of a few tokens, which stand in front of the text.

    Choose tokens that the data does not have, and put them before each sequence. The
    model sees a text as any other, and only their rows of its table train.

    Args:
      value_fn: ``value_fn(params, **kwargs)``, the loss.
      params: parameters of the model. They stay as they are.
      table: path of the table of embeddings, [tokens, features]; float or `QTensor`.
      tokens: numbers of the rows that train.

    Returns:
      An `Adaptation`; its adapters are ``{table: rows}``, at first the rows that the
      table has, float or a `QTensor` as the table.

    Raises:
      ValueError: if there is no such leaf, or no such row in it.

    Example:
      >>> params = {"embedding": jnp.eye(4)}
      >>> loss = lambda p, tokens: jnp.sum(p["embedding"][tokens] ** 2)
      >>> adapted = prompts(loss, params, table="embedding", tokens=[3])
      >>> adapted.adapters["embedding"]
      Array([[0., 0., 0., 1.]], dtype=float32)
      >>> rows = {"embedding": jnp.array([[0.0, 0.0, 0.0, 5.0]])}
      >>> adapted.value_fn(rows, base=params, tokens=jnp.array([3, 0]))
      Array(26., dtype=float32)

    Reference:
      Lester et al., "The power of scale for parameter-efficient prompt tuning", EMNLP
      2021.
    """
    leaves = dict(_named(params))
    if table not in leaves:
        raise ValueError(f"there is no leaf {table!r}; the leaves are {list(leaves)}.")
    leaf, rows = leaves[table], np.asarray(tokens, np.int32)
    if rows.ndim != 1 or not rows.size or not np.all((rows >= 0) & (rows < len(leaf))):
        raise ValueError(
            f"tokens must be rows of the table {table!r}, which has {len(leaf)}, got "
            f"{tokens}."
        )

    def of_rows(leaf: Any) -> Any:
        if not is_qtensor(leaf):
            return jnp.asarray(leaf)[rows]
        per_row = leaf.scale.ndim and leaf.scale.shape[0] > 1
        scale = leaf.scale[rows] if per_row else leaf.scale
        return dataclasses.replace(leaf, qvalue=leaf.qvalue[rows], scale=scale)

    def merge(params: Any, adapters: Any) -> Any:
        _check_names(adapters, [table])

        def replace(name: str, leaf: Any) -> Any:
            if name != table:
                return leaf
            new = adapters[table]
            integers = integers_of(new) if is_qtensor(new) else stored(new)
            return with_stored(leaf, stored(leaf).at[rows].set(integers))

        return _map_named(replace, params)

    def of_adapters(adapters: Any, *, base: Any, **kwargs: Any) -> Any:
        return value_fn(merge(base, adapters), **kwargs)

    return Adaptation({table: of_rows(leaf)}, of_adapters, merge)


# ------------------------------------------------------------------------- new weights


def _chosen(
    value_fn: Callable[..., Any], params: Any, where: Where, kwargs: Mapping[str, Any]
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """The kernels by their names, each with the axes that products contract."""
    picked = {
        name: leaf
        for name, leaf in _named(params)
        if _is_matrix(leaf) and _picks(where, name, leaf)
    }
    found: dict[str, tuple[int, ...]] = {}

    def note(weight: _Weight, contracted: Sequence[int]) -> None:
        found.setdefault(weight.name, tuple(weight.order[a] for a in contracted))

    def trace(kwargs: Mapping[str, Any]) -> Any:
        return _evaluate(value_fn, params, dict.fromkeys(picked), kwargs, note)

    jax.eval_shape(trace, dict(kwargs))
    if not found:
        raise ValueError(
            f"the loss multiplies no activation by a leaf of where={where!r}. It picks "
            f"{list(picked)} of {[name for name, _ in _named(params)]}."
        )
    return {name: (picked[name], axes) for name, axes in found.items()}


def _picks(where: Where, name: str, leaf: Any) -> bool:
    if isinstance(where, str):
        return re.search(where, name) is not None
    return where is None or bool(where(name, leaf))


def _drawn(
    chosen: Mapping[str, tuple[Any, tuple[int, ...]]], key: jax.Array, rank: int
) -> dict[str, Any]:
    """D, normal, and U, zero, for each kernel."""
    if rank < 1:
        raise ValueError(f"the rank of an adapter must be at least 1, got {rank}.")
    adapters = {}
    for number, name in enumerate(sorted(chosen)):
        leaf, inputs = chosen[name]
        shape = np.array(np.shape(leaf))
        is_input = np.isin(np.arange(len(shape)), inputs)
        down = (rank, *map(int, np.where(is_input, shape, 1)))
        up = (rank, *map(int, np.where(is_input, 1, shape)))
        deviation = 1 / math.sqrt(math.prod(down[1:]))
        normal = jax.random.normal(jax.random.fold_in(key, number), down)
        adapters[name] = {"down": deviation * normal, "up": jnp.zeros(up)}
    return adapters


def _adapted(value_fn: Callable[..., Any], between: Any) -> Callable[..., Any]:
    """The loss of adapters, as a function of them and of the base."""

    def of_adapters(adapters: Any, *, base: Any, **kwargs: Any) -> Any:
        _check_fit(adapters, base)
        return _evaluate(value_fn, base, adapters, kwargs, None, between)

    return of_adapters


def _merge(params: Any, adapters: Any) -> Any:
    """The parameters with ``W + D U`` in the place of W, rounded to the grid of W."""
    _check_fit(adapters, params)

    def merged(name: str, leaf: Any) -> Any:
        if name not in adapters:
            return leaf
        parts = dequantize(adapters[name])
        value = jnp.asarray(leaf) + jnp.sum(parts["down"] * parts["up"], 0)
        if is_qtensor(leaf):
            _check_on_grid(name, value, leaf)
            return quantize_to_scale(value, leaf.scale, leaf.bits)
        return value.astype(leaf.dtype)

    return _map_named(merged, params)


def _check_on_grid(name: str, value: jax.Array, leaf: QTensor) -> None:
    """Raises if a changed kernel leaves its grid, where its numbers are here."""
    if not is_concrete(value):
        return
    beyond = jnp.max(jnp.abs(value) / leaf.scale, initial=0) / leaf.max_qvalue
    if float(beyond) > 1 + 0.5 / leaf.max_qvalue:
        raise ValueError(
            f"with its adapters the kernel {name!r} reaches {float(beyond):.3g} times "
            "as far as its grid. Merge floats and choose a new grid: "
            "fgrad.quantize(merge(fgrad.dequantize(params), adapters))."
        )


def _no_merge(params: Any, adapters: Any) -> Any:
    raise ValueError(
        "an adapter has a nonlinearity inside, which no kernel has: keep the adapters "
        "beside the parameters, or use fgrad.lora."
    )


def _check_fit(adapters: Any, params: Any) -> None:
    """Raises unless adapters are those of leaves of the parameters."""
    leaves = dict(_named(params))
    _check_names(adapters, list(leaves))
    for name, parts in adapters.items():
        shape = np.shape(leaves[name])
        down, up = np.shape(parts["down"]), np.shape(parts["up"])
        if np.broadcast_shapes(down, up)[1:] != shape:
            raise ValueError(
                f"the adapters of {name!r}, of shapes {down} and {up}, do not fit a "
                f"kernel of shape {shape}; they are those of another model."
            )


def _check_names(adapters: Any, names: Sequence[str]) -> None:
    if unknown := [name for name in adapters if name not in names]:
        raise ValueError(
            f"there are adapters of {unknown}, and the leaves are {list(names)}; they "
            "are those of another model."
        )


def _is_matrix(leaf: Any) -> bool:
    """Whether a leaf may be a kernel; models in Equinox have functions as leaves."""
    is_array = is_qtensor(leaf) or isinstance(leaf, jax.Array | np.ndarray)
    return is_array and leaf.ndim > 1 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _named(tree: Any) -> list[tuple[str, Any]]:
    with_paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qtensor)
    return [(path_str(path), leaf) for path, leaf in with_paths]


def _map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(path_str(path), leaf), tree, is_leaf=is_qtensor
    )


# --------------------------------------------------------------------- the traced loss


@dataclasses.dataclass
class _Weight:
    """A chosen kernel on its way into a product.

    Attributes:
      name: of the leaf.
      array: the kernel as the loss has it by now.
      order: the axes of the leaf, in the order of those of ``array``.
      amplitude: what the adapters are multiplied by, which has the axes of ``array`` or
        none: what the loss did to the kernel, and for integers one over their scale.
    """

    name: str
    array: jax.Array
    order: tuple[int, ...]
    amplitude: jax.Array


_Note = Callable[[_Weight, Sequence[int]], None] | None


def _evaluate(
    value_fn: Callable[..., Any],
    params: Any,
    adapters: Mapping[str, Any],
    kwargs: Mapping[str, Any],
    note: _Note,
    between: Any = None,
) -> Any:
    """The loss with adapters; or with none, noting which axes products contract."""
    leaves = {name: leaf for name, leaf in _named(params) if name in adapters}

    def of_kernels(kernels: Mapping[str, jax.Array]) -> Any:
        def replaced(name: str, leaf: Any) -> Any:
            return with_stored(leaf, kernels[name]) if name in kernels else leaf

        return value_fn(_map_named(replaced, params), **kwargs)

    arrays = {name: stored(leaf) for name, leaf in leaves.items()}
    closed, shapes = jax.make_jaxpr(of_kernels, return_shape=True)(arrays)
    inputs = []
    for name in sorted(arrays):  # the order of a flat dictionary
        leaf, array = leaves[name], arrays[name]
        amplitude = jnp.ones(()) if not is_qtensor(leaf) else 1 / leaf.scale
        inputs.append(_Weight(name, array, tuple(range(array.ndim)), amplitude))
    interpreter = _Interpreter(adapters, note, between)
    outputs = interpreter.run(closed.jaxpr, closed.consts, inputs)
    arrays_out = [interpreter.dense(x, "return") for x in outputs]
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays_out)


class _Interpreter:
    """Runs a jaxpr in which some values are chosen kernels."""

    def __init__(self, adapters: Mapping[str, Any], note: _Note, between: Any) -> None:
        self.adapters, self.note, self.between = adapters, note, between

    def run(
        self, jaxpr: core.Jaxpr, consts: Sequence[Any], values: Sequence[Any]
    ) -> list[Any]:
        names: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        names.update(zip(jaxpr.invars, values, strict=True))

        def read(variable: Any) -> Any:
            is_literal = isinstance(variable, core.Literal)
            return variable.val if is_literal else names[variable]

        for equation in jaxpr.eqns:
            outputs = self.equation(equation, [read(x) for x in equation.invars])
            names.update(zip(equation.outvars, outputs, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def equation(self, equation: core.JaxprEqn, inputs: list[Any]) -> Sequence[Any]:
        name = equation.primitive.name
        weights = [x for x in inputs if isinstance(x, _Weight)]
        if not weights:
            return primitives.bind(equation, inputs)
        called = primitives.called_jaxpr(equation)
        if called is not None:
            return self.run(*called, inputs)
        if len(weights) == 1 and name in _VIEWS:
            viewed = _VIEWS[name](*inputs, equation=equation)
            if viewed is not None:
                return [viewed]
        if len(weights) == 1 and name in factored_products.PRODUCTS:
            product = self.product(equation, inputs, weights[0])
            if product is not None:
                return [product]
        return primitives.bind(equation, [self.dense(x, name) for x in inputs])

    def product(
        self, equation: core.JaxprEqn, inputs: list[Any], weight: _Weight
    ) -> jax.Array | None:
        """A product with an adapted kernel; None if its sum must be made first."""
        if self.note is not None:
            self.note(weight, _contracted(equation, inputs.index(weight)))
        parts = self.adapters[weight.name]
        if parts is None:  # no adapters yet
            return None
        output: Any = equation.outvars[0].aval
        if not jnp.issubdtype(output.dtype, jnp.floating):
            return None
        order = (0, *(axis + 1 for axis in weight.order))
        parts = dequantize(parts)
        factored = Factored(
            weight.array,
            parts["down"].transpose(order),
            parts["up"].transpose(order),
            weight.amplitude,
            self.between,
        )
        operands = [factored if x is weight else x for x in inputs]
        result: jax.Array | None
        result = factored_products.PRODUCTS[equation.primitive.name](
            *operands, equation=equation
        )
        return result

    def dense(self, x: Any, primitive: str) -> Any:
        """A kernel with its change, for what is no product."""
        if not isinstance(x, _Weight):
            return x
        parts = self.adapters[x.name]
        if parts is None:
            return x.array
        integers = jnp.issubdtype(x.array.dtype, jnp.integer)
        if integers or self.between is not None:
            what = "integers" if integers else "a kernel with an adapter"
            raise ValueError(
                f"the loss uses {x.name!r}, {what}, in the operation {primitive!r}, "
                "where nothing can be added. Leave it out by where=, or dequantize it."
            )
        order = (0, *(axis + 1 for axis in x.order))
        parts = dequantize(parts)
        change = jnp.sum(parts["down"] * parts["up"], 0, keepdims=True)
        change = change.transpose(order)[0] * x.amplitude
        return x.array + change.astype(x.array.dtype)


def _contracted(equation: core.JaxprEqn, position: int) -> tuple[int, ...]:
    """The axes of a product's operand that it sums over."""
    numbers = equation.params["dimension_numbers"]
    if isinstance(numbers, jax.lax.ConvDimensionNumbers):
        out_feature, *rest = numbers.rhs_spec
        del out_feature
        return tuple(rest)
    contracted: tuple[int, ...] = numbers[0][position]
    return tuple(contracted)


def _convert(weight: _Weight, *, equation: core.JaxprEqn) -> _Weight | None:
    dtype = equation.params["new_dtype"]
    was_float = jnp.issubdtype(weight.array.dtype, jnp.floating)
    if was_float and not jnp.issubdtype(dtype, jnp.floating):
        return None
    return dataclasses.replace(weight, array=weight.array.astype(dtype))


def _multiply(x: Any, y: Any, *, equation: core.JaxprEqn) -> _Weight:
    weight, factor = (x, y) if isinstance(x, _Weight) else (y, x)
    (array,) = primitives.bind(
        equation, [weight.array if v is weight else v for v in (x, y)]
    )
    amplitude = weight.amplitude * factor
    return dataclasses.replace(weight, array=array, amplitude=amplitude)


def _transpose(weight: _Weight, *, equation: core.JaxprEqn) -> _Weight:
    axes = equation.params["permutation"]
    amplitude = weight.amplitude
    return dataclasses.replace(
        weight,
        array=weight.array.transpose(axes),
        order=tuple(weight.order[a] for a in axes),
        amplitude=amplitude.transpose(axes) if amplitude.ndim else amplitude,
    )


def _copy(weight: _Weight, *, equation: core.JaxprEqn) -> _Weight:
    del equation
    return weight


_VIEWS: dict[str, Callable[..., _Weight | None]] = {
    "convert_element_type": _convert,
    "copy": _copy,
    "copy_p": _copy,
    "mul": _multiply,
    "transpose": _transpose,
}
