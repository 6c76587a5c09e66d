"""A step spread over devices: who evaluates which losses.

The losses of a step are a table [shard of the batch, side, pair]. Each device fills its
part of it, by a program whose shapes do not depend on how many devices there are. The
table, which is all that goes over the wire, is gathered and summed in one order. So
every device makes the same update, and the bits of a run do not depend on its devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fgrad._trees import path_str
from fgrad.tracing import execution_order

# Names of one axis of a mesh, of several, or none.
Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Spread:
    """How the evaluations of a step are shared by the devices of a mesh.

    Given as ``spread=`` to a link. The losses of a step form a table [shard of the
    batch, side, pair]; a device evaluates the pairs and the shards that are its own.
    Losses, parameters and state have the same bits whatever the mesh, on devices of one
    kind, as long as ``shards`` and the number of pairs stay as they are.

    The parameters and the state are on every device, or sharded over axes of the mesh
    that are not named here. The loss has to be a mean over the examples of its batch:
    that of the batch is the mean over its shards. Whatever the loss takes beside the
    examples, such as a key for dropout, is the same for all shards.

    A step may be inside of a ``shard_map`` over the axes that are named here. There it
    takes parameters, state and batch whole on each of their devices.

    Attributes:
      mesh: the devices.
      pairs: axis of the mesh that shares the pairs, or several; None if each device
        evaluates them all.
      batch: axis of the mesh that shares the examples, or several; None if each device
        evaluates them all.
      shards: into how many parts the batch is cut, a multiple of the devices along
        ``batch``. It is a part of the result, as the order of a sum is: keep it when
        the number of devices changes.
      examples: names of the loss's arguments that hold examples along the first axis
        of their arrays. By default all arguments do, but for scalars and keys.

    Raises:
      TypeError, ValueError: for something that is no mesh, for axes that the mesh does
        not have, and for shards that its devices cannot share evenly.

    Example:
      >>> mesh = jax.make_mesh((1, 1), ("seeds", "data"))
      >>> spread = Spread(mesh, pairs="seeds", batch="data", shards=4)
      >>> spread.devices_of_pairs, spread.devices_of_batch
      (1, 1)
    """

    mesh: Mesh
    _: dataclasses.KW_ONLY
    pairs: Axes = None
    batch: Axes = None
    shards: int = 1
    examples: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh):
            raise TypeError(
                f"mesh must be a jax.sharding.Mesh, got {self.mesh!r}; make one with "
                'jax.make_mesh((8,), ("seeds",)).'
            )
        named = [*_names(self.pairs), *_names(self.batch)]
        unknown = [name for name in named if name not in self.mesh.axis_names]
        if unknown:
            raise ValueError(
                f"the mesh has no axis {unknown[0]!r}; its axes are "
                f"{', '.join(map(repr, self.mesh.axis_names))}."
            )
        if len(set(named)) < len(named):
            raise ValueError(
                f"pairs={self.pairs!r} and batch={self.batch!r} name an axis twice; "
                "an axis of the mesh shares either pairs or examples."
            )
        if isinstance(self.examples, str):
            object.__setattr__(self, "examples", (self.examples,))
        count, shards = self.devices_of_batch, self.shards
        whole = isinstance(shards, int) and not isinstance(shards, bool)
        if not whole or shards < 1 or shards % count:
            raise ValueError(
                f"shards={shards!r} parts of a batch cannot be shared evenly by the "
                f"{count} devices along batch={self.batch!r}; use shards={count} or a "
                f"multiple of {count}."
            )

    @property
    def devices_of_pairs(self) -> int:
        """How many devices share the pairs."""
        return math.prod(self.mesh.shape[name] for name in _names(self.pairs))

    @property
    def devices_of_batch(self) -> int:
        """How many devices share the examples."""
        return math.prod(self.mesh.shape[name] for name in _names(self.batch))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of arrays that every device has whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def of_batch(self) -> NamedSharding:
        """The sharding of arrays whose first axis has the examples."""
        return NamedSharding(self.mesh, PartitionSpec(self.batch))

    def replicate(self, tree: Any) -> Any:
        """Puts the arrays of a tree on every device.

        Args:
          tree: parameters, the state of a transformation. Where a run has several
            processes, all give the same values.

        Example:
          >>> spread = Spread(jax.make_mesh((1,), ("seeds",)), pairs="seeds")
          >>> spread.replicate({"w": jnp.ones(2)})["w"].is_fully_replicated
          True
        """
        return jax.tree.map(lambda x: _put(x, self.replicated), tree)

    def split(self, tree: Any) -> Any:
        """Puts the examples of a batch on the devices that evaluate them.

        Args:
          tree: arrays with the examples along the first axis. A process of several
            gives the examples of its own devices; ``jax.process_index`` says which it
            is, and ``of_batch.devices_indices_map`` which those are.
        """
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(
                self.of_batch, np.asarray(x)
            ),
            tree,
        )

    def check_pairs(self, count: int, vectorize: int = 1) -> None:
        """Raises unless the devices can share ``count`` pairs evenly.

        Args:
          count: m.
          vectorize: how many pairs a device evaluates at once.
        """
        devices = self.devices_of_pairs
        if count % devices:
            fitting = [n for n in range(1, devices + 1) if count % n == 0]
            raise ValueError(
                f"num_perturbations={count} pairs cannot be shared evenly by the "
                f"{devices} devices along pairs={self.pairs!r}; use a multiple of "
                f"{devices}, or {' or '.join(map(str, fitting))} devices."
            )
        if count // devices % vectorize:
            raise ValueError(
                f"vectorize={vectorize} does not divide the {count // devices} pairs "
                f"of each device (num_perturbations={count}, {devices} devices along "
                f"pairs={self.pairs!r}); the last group would be smaller, and other "
                "devices would round differently."
            )

    def without_pairs(self) -> Spread:
        """The same, but every device evaluates all pairs."""
        return dataclasses.replace(self, pairs=None)

    def whole(self, tree: Any) -> Any:
        """The arrays of a tree, whole on every device."""
        sharding = NamedSharding(_with_auto_axes(self.mesh), PartitionSpec())
        return jax.tree.map(lambda x: lax.with_sharding_constraint(x, sharding), tree)

    # ---------------------------------------------------------------- filling the table

    def table(
        self,
        evaluate: Callable[[jax.Array, Any, dict[str, Any]], jax.Array],
        pairs: Any,
        arguments: Mapping[str, Any],
        *,
        vectorize: int = 1,
    ) -> jax.Array:
        """Evaluates every shard, side and pair, each on the device whose it is.

        Args:
          evaluate: ``evaluate(sign, pair, arguments)`` is one entry, an array. It is
            traced more than once.
          pairs: pytree of arrays [m, ...]: what differs between pairs.
          arguments: of the loss; each shard gets its examples.
          vectorize: how many pairs a device evaluates at once.

        Returns:
          [shards, 2, m, ...], on every device.
        """
        count = len(jax.tree.leaves(pairs)[0])
        self.check_pairs(count, vectorize)
        batch = _Batch(self, arguments)

        own_pairs = count // self.devices_of_pairs
        own_shards = self.shards // self.devices_of_batch

        def local(rows: list[jax.Array]) -> jax.Array:
            # The pairs come whole, and each device takes its own. If they came cut, the
            # compiler would cut what makes them, and the update that uses them as well.
            first = own_pairs * _index(self.pairs)
            own = jax.tree.map(
                lambda x: lax.dynamic_slice_in_dim(x, first, own_pairs), pairs
            )
            cells = _Cells(evaluate, own, batch, rows, vectorize)
            return self._gathered(cells.filled(own_shards))

        axes = set(self._named)
        if not axes:
            return local(batch.rows)
        if self._is_inside():
            own = self._own_rows
            return local([own(x) for x in batch.rows])
        mapped = jax.shard_map(
            local,
            mesh=_with_auto_axes(self.mesh),
            in_specs=PartitionSpec(self.batch),
            out_specs=PartitionSpec(),
            axis_names=axes,
            # The user's loss runs inside, and its loops may begin with constants.
            check_vma=False,
        )
        table: jax.Array = jax.jit(mapped)(batch.rows)
        return table

    def _is_inside(self) -> bool:
        """Whether a ``shard_map`` around has taken the axes that are named here.

        Raises:
          ValueError: if it has taken some of them, or others of the mesh only.
        """
        taken = jax.sharding.get_abstract_mesh().manual_axes
        inside = set(self._named) <= set(taken)
        if taken and not inside:
            raise ValueError(
                f"the step is inside of a shard_map over {tuple(taken)}, and spread= "
                f"is to share evaluations along {self._named}; give those axes to the "
                "shard_map as well (axis_names=), with what the step takes whole on "
                "each of their devices."
            )
        return bool(taken)

    def _own_rows(self, array: jax.Array) -> jax.Array:
        """The examples of a device, of an array that has them all."""
        size = array.shape[0] // self.devices_of_batch
        first = size * _index(self.batch)
        found: jax.Array = lax.dynamic_slice_in_dim(array, first, size)
        return found

    @property
    def _named(self) -> tuple[str, ...]:
        return (*_names(self.pairs), *_names(self.batch))

    def _gathered(self, part: jax.Array) -> jax.Array:
        """The whole table from the part [own shards, 2, own pairs, ...] of each."""
        axes = (*_names(self.batch), *_names(self.pairs))
        devices = self.devices_of_batch, self.devices_of_pairs
        parts = lax.all_gather(part, axes)
        parts = parts.reshape(*devices, *part.shape)
        # [of batch, of pairs, own shards, 2, own pairs, ...]
        parts = jnp.moveaxis(parts, 1, 3)
        own_shards, sides, own_pairs, *rest = part.shape
        # Otherwise the sums that follow would be compiled together with this change of
        # order, which is another one for other devices, and could round differently.
        vector = execution_order.stored(parts.reshape(-1))
        return vector.reshape(
            devices[0] * own_shards, sides, devices[1] * own_pairs, *rest
        )


@dataclasses.dataclass(frozen=True)
class _Cells:
    """The entries of the table that are one device's own.

    Attributes:
      evaluate: as in `Spread.table`.
      pairs: those of the device, [n, ...].
      batch: what the arguments of the loss are.
      rows: the device's examples.
      vectorize: how many pairs are evaluated at once.
    """

    evaluate: Callable[[jax.Array, Any, dict[str, Any]], jax.Array]
    pairs: Any
    batch: _Batch
    rows: list[jax.Array]
    vectorize: int

    def filled(self, shards: int) -> jax.Array:
        """The part [shards, 2, n, ...] of the table.

        One loop, of which the compiler does not know how often it runs, evaluates one
        group of entries after the other. What the compiler knows of it is the same
        on all devices of all meshes, and so is the order of each sum in it.
        """
        pairs = len(jax.tree.leaves(self.pairs)[0])
        sides_at_once = 2 if self.vectorize > 1 else 1
        groups = 2 * pairs // (sides_at_once * self.vectorize)
        shape = jax.eval_shape(functools.partial(self._group, groups, shards), 0)
        start = jnp.zeros((shards * groups, *shape.shape), shape.dtype)
        first: Any = jax.tree.leaves(self.pairs)[0]
        if jnp.issubdtype(first.dtype, jax.dtypes.prng_key):
            first = jax.random.key_data(first)
        count = execution_order.hidden(
            shards * groups, execution_order.dependent_zero(first)
        ).astype(jnp.int32)

        def fill(index: Any, table: jax.Array) -> jax.Array:
            found = self._group(groups, shards, index)
            filled: jax.Array = lax.dynamic_update_index_in_dim(table, found, index, 0)
            return filled

        table: jax.Array = lax.fori_loop(0, count, fill, start)
        table = table.reshape(shards, pairs, 2, *shape.shape[1:])
        return jnp.moveaxis(table, 2, 1)

    def _group(self, groups: int, shards: int, index: Any) -> jax.Array:
        """The entries [pairs at once * sides at once, ...] of a group, pairs first."""
        number = index % groups
        if self.vectorize == 1:
            places = number // 2 + jnp.arange(1)
            signs = (1 - 2 * (number % 2) + jnp.zeros(1)).astype(jnp.int32)
        else:
            each = jnp.arange(2 * self.vectorize)
            places = number * self.vectorize + each // 2
            signs = 1 - 2 * (each % 2)
        pairs = jax.tree.map(lambda x: x[places], self.pairs)
        arrays = [_slice(x, index // groups, shards) for x in self.rows]
        # Otherwise the compiler sees where a device has one pair or one shard, and
        # moves what it then knows out of the loop.
        signs, pairs, arrays, _ = lax.optimization_barrier(
            (signs, pairs, arrays, jnp.asarray(index))
        )
        arguments = self.batch.arguments(arrays)
        if self.vectorize == 1:
            pair = jax.tree.map(lambda x: x[0], pairs)
            return self.evaluate(signs[0], pair, arguments)[None]
        return jax.vmap(lambda sign, pair: self.evaluate(sign, pair, arguments))(
            signs, pairs
        )


class _Batch:
    """The arguments of a loss, taken apart into examples and the rest.

    Attributes:
      rows: the arrays whose first axis has the examples.
    """

    def __init__(self, spread: Spread, arguments: Mapping[str, Any]) -> None:
        """Raises a ValueError for examples that cannot be cut into the shards."""
        paths, self._treedef = jax.tree_util.tree_flatten_with_path(dict(arguments))
        self._leaves = [leaf for _, leaf in paths]
        cut = spread.shards > 1 or spread.batch is not None
        self._places = [
            i
            for i, (path, leaf) in enumerate(paths)
            if cut and _has_examples(spread, path, leaf)
        ]
        self.rows = [jnp.asarray(self._leaves[i]) for i in self._places]
        if cut:
            names = [path_str(paths[i][0]) for i in self._places]
            _check_rows(spread, names, self.rows, list(arguments))

    def arguments(self, rows: Sequence[jax.Array]) -> dict[str, Any]:
        """The arguments with other examples."""
        leaves = list(self._leaves)
        for place, array in zip(self._places, rows, strict=True):
            leaves[place] = array
        found: dict[str, Any] = jax.tree.unflatten(self._treedef, leaves)
        return found


def mean_over_shards(table: jax.Array) -> jax.Array:
    """The mean of a table over its first axis, summed in the order of the shards.

    Of integers it is the whole part of the mean.
    """
    shards = len(table)
    mean: jax.Array
    if jnp.issubdtype(table.dtype, jnp.integer):
        # The sum itself could overflow.
        mean = _sum(table // shards) + _sum(table % shards) // shards
    else:
        mean = _sum(table) / shards
    return mean


def _sum(table: jax.Array) -> jax.Array:
    """The sum over the first axis, in its order."""
    total: jax.Array = functools.reduce(jnp.add, list(table))
    return total


def with_auto_axes(
    update_fn: Callable[..., Any], around: Mesh | None = None
) -> Callable[..., Any]:
    """An optax ``update`` that computes on axes that the compiler places.

    On a mesh of explicit axes, as ``jax.make_mesh`` makes, types say how arrays are
    sharded, and a ``shard_map`` cannot read the arrays around it. Here the arguments
    are of such types outside only. Updates are sharded as the parameters, and the new
    state as the old one.

    Args:
      update_fn: of a transformation.
      around: the mesh of a `Spread`; weights may be sharded over its other axes.
    """

    @functools.wraps(update_fn)
    def wrapped(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        inputs = updates, state, params, extra
        leaves, treedef = jax.tree.flatten(inputs)
        places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]
        mesh = _explicit_mesh([leaves[i] for i in places])
        if mesh is None:
            with _known(around, leaves):
                return update_fn(updates, state, params, **extra)
        structure: list[Any] = []

        def inside(arrays: list[jax.Array]) -> Any:
            for place, array in zip(places, arrays, strict=True):
                leaves[place] = array
            updates, state, params, extra = jax.tree.unflatten(treedef, leaves)
            changes, state = update_fn(updates, state, params, **extra)
            # A gradient and its parameters are trees of different nodes.
            found, of_changes = jax.tree.flatten(changes)
            structure.append(of_changes)
            return found, state

        places_of = [jax.tree.leaves(params), state]
        shardings = jax.tree.map(functools.partial(_sharding_on, mesh), places_of)
        spread_fn = jax.sharding.auto_axes(
            inside, axes=mesh.axis_names, out_sharding=tuple(shardings)
        )
        found, state = spread_fn([leaves[i] for i in places])
        return jax.tree.unflatten(structure[-1], found), state

    return wrapped


def _known(
    mesh: Mesh | None, leaves: Sequence[Any]
) -> contextlib.AbstractContextManager[Any]:
    """Tells what is traced of a mesh, unless it is inside of one already."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    if mesh is None or not traced or jax.sharding.get_abstract_mesh().axis_names:
        return contextlib.nullcontext()
    found: contextlib.AbstractContextManager[Any] = jax.sharding.use_abstract_mesh(
        _with_auto_axes(mesh).abstract_mesh
    )
    return found


def _explicit_mesh(arrays: Sequence[jax.Array]) -> Any:
    """The mesh that the types of arrays, or the context, are about; None if none is."""
    meshes = [jax.typeof(x).sharding.mesh for x in arrays]
    explicit = jax.sharding.AxisType.Explicit
    for mesh in (*meshes, jax.sharding.get_abstract_mesh()):
        if explicit in mesh.axis_types:
            return mesh
    return None


def _sharding_on(mesh: Any, array: Any) -> NamedSharding:
    sharding: Any = getattr(jax.typeof(array), "sharding", None)
    known = sharding is not None and sharding.mesh.axis_names == mesh.axis_names
    return NamedSharding(mesh, sharding.spec if known else PartitionSpec())


def _with_auto_axes(mesh: Mesh) -> Mesh:
    """The same devices, on axes that the compiler places."""
    return Mesh(mesh.devices, mesh.axis_names)


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array with a sharding whose devices may be those of several processes."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        words = _put(jax.random.key_data(array), sharding)
        impl = jax.random.key_impl(array)
        key: jax.Array = jax.random.wrap_key_data(words, impl=impl)
        return key
    if getattr(array, "is_fully_addressable", False) and jax.process_count() > 1:
        array = np.asarray(array)
    put: jax.Array = jax.device_put(array, sharding)
    return put


def _has_examples(spread: Spread, path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a leaf of the arguments has examples along its first axis."""
    if spread.examples is not None:
        return path[0].key in spread.examples
    dtype = getattr(leaf, "dtype", None)
    is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return dtype is not None and not is_key and len(leaf.shape) > 0


def _check_rows(
    spread: Spread, names: list[str], rows: list[jax.Array], arguments: list[str]
) -> None:
    missing = [name for name in spread.examples or () if name not in arguments]
    if missing or not rows:
        raise ValueError(
            f"the batch is to be cut into {spread.shards} shards, but value_fn takes "
            + (f"no argument {missing[0]!r}" if missing else "no arrays of examples")
            + f", only {arguments}. Give the examples as arguments: "
            "tx.update(..., value_fn=loss_fn, batch=batch)."
        )
    counts = {
        name: x.shape[0] if x.ndim else 0 for name, x in zip(names, rows, strict=True)
    }
    if len(set(counts.values())) > 1:
        raise ValueError(
            "the arguments of value_fn have different numbers of examples along their "
            f"first axis, {counts}. Name those that hold examples: "
            "fgrad.Spread(..., examples=[...])."
        )
    count = next(iter(counts.values()))
    if count == 0 or count % spread.shards:
        raise ValueError(
            f"{count} examples cannot be cut into shards={spread.shards} equal parts; "
            f"use batches of a multiple of {spread.shards}."
        )


def _slice(array: jax.Array, index: Any, shards: int) -> jax.Array:
    """The examples of one of the shards that a device has."""
    size = array.shape[0] // shards
    found: jax.Array = lax.dynamic_slice_in_dim(array, index * size, size)
    return found


def _index(axes: Axes) -> jax.Array:
    """The place of a device along axes of the mesh."""
    names = _names(axes)
    index: jax.Array = lax.axis_index(names) if names else jnp.int32(0)
    return index


def _names(axes: Axes) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)
