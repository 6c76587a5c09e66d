"""The step of several runs as one program, on one device or on many."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from experiments.drivers.layouts import ALONE, Layout


class Program:
    """A compiled step of some runs that differ in seeds and learning rates.

    The states of the runs are stacked, but for what counts steps, which is the same in
    all of them. Along "seeds" each device has some of the runs, and no runs exchange
    anything.

    Attributes:
      traced: the traced step.
      compiled: the compiled one.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        like: Any,
        data: Any,
        count: int = 1,
        layout: Layout = ALONE,
    ) -> None:
        """Compiles the step.

        Args:
          step: ``step(state, learning_rate, steps, data)`` is the next state of a run.
          like: a state.
          data: what there is to train on.
          count: number of runs.
          layout: of the devices. Where they do not divide the runs, the last run is
            made several times.
        """
        self._layout = layout
        self._count = count
        self._slots = -(-count // layout.devices("seeds")) * layout.devices("seeds")
        self._data = self._placed(data)
        function = step if self._slots == 1 else self._of_all(step, like)
        states = self.joined([like] * count)
        rates = self._rates([0.0] * count)
        horizon = self._placed(jnp.float32(1))
        jitted = jax.jit(function, donate_argnums=0)
        self.traced = jitted.trace(states, rates, horizon, self._data)
        self.compiled = self.traced.lower().compile()

    def __call__(self, states: Any, rates: Any, horizon: Any) -> Any:
        """The next states; those that are given are used up.

        Args:
          states: of all runs, from `joined` or the step before.
          rates: learning rates, from `arguments`.
          horizon: number of steps, likewise.
        """
        return self.compiled(states, rates, horizon, self._data)

    def arguments(self, rates: Sequence[float], steps: int) -> tuple[Any, Any]:
        """The learning rates and the length of the runs, where the step takes them."""
        return self._rates(rates), self._placed(jnp.float32(steps))

    def joined(self, states: Sequence[Any]) -> Any:
        """The states of runs as those of one program; they are not used up."""
        states = [*states, *[states[-1]] * (self._slots - self._count)]
        if self._slots == 1:
            return self._placed(jax.tree.map(jnp.copy, states[0]))

        def together(path: Any, *leaves: Any) -> Any:
            stacked = _axis(path) is not None
            joined = jnp.stack(leaves) if stacked else jnp.copy(leaves[0])
            return self._placed(joined, "seeds" if stacked else None)

        return jax.tree_util.tree_map_with_path(together, *states)

    def each(self, states: Any) -> list[Any]:
        """The states of the runs, or a part of those, each on the first device."""
        first = jax.devices()[0]
        if self._slots == 1:
            one = states if self._layout.mesh is None else jax.device_put(states, first)
            return [one]

        def of_run(index: int) -> Any:
            def one(path: Any, leaf: Any) -> Any:
                own = leaf if _axis(path) is None else leaf[index]
                return jax.device_put(own, first)

            return jax.tree_util.tree_map_with_path(one, states)

        return [of_run(i) for i in range(self._count)]

    def _of_all(self, step: Callable[..., Any], like: Any) -> Callable[..., Any]:
        """The step of stacked states, on one device or on those along "seeds"."""
        axes = jax.tree_util.tree_map_with_path(lambda path, _: _axis(path), like)

        def local(states: Any, rates: Any, horizon: Any, data: Any) -> Any:
            def one(states: Any, rate: Any) -> Any:
                return step(states, rate, horizon, data)

            if self._layout.vmapped:
                both = jax.vmap(one, in_axes=(axes, 0), out_axes=axes)
                return both(states, rates)
            return _in_turn(one, states, rates)

        if self._layout.devices("seeds") == 1:
            return local
        whole, cut = PartitionSpec(), PartitionSpec("seeds")
        specs = jax.tree_util.tree_map_with_path(
            lambda path, _: whole if _axis(path) is None else cut, like
        )
        mapped: Callable[..., Any] = jax.shard_map(
            local,
            mesh=self._layout.mesh,
            in_specs=(specs, cut, whole, whole),
            out_specs=specs,
            check_vma=False,
        )
        return mapped

    def _rates(self, rates: Sequence[float]) -> jax.Array:
        if self._slots == 1:
            return self._placed(jnp.float32(rates[0]))
        padded = [*rates, *[rates[-1]] * (self._slots - self._count)]
        return self._placed(jnp.float32(padded), "seeds")

    def _placed(self, tree: Any, axis: str | None = None) -> Any:
        """The arrays of a tree on the devices, cut along an axis or whole."""
        if self._layout.mesh is None:
            return tree
        spec = PartitionSpec(axis) if axis else PartitionSpec()
        return jax.device_put(tree, NamedSharding(self._layout.mesh, spec))


def _in_turn(one: Callable[..., Any], states: Any, rates: jax.Array) -> Any:
    """The next states of stacked runs, one run after the other."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(states)
    build: Callable[[Any], Any] = functools.partial(jax.tree.unflatten, treedef)
    own = [_axis(path) is not None for path, _ in leaves]
    arrays = [leaf for _, leaf in leaves]

    def next_of(given: Any) -> list[Any]:
        stacked, rate = given
        of_run = iter(stacked)
        all_of_it = [
            next(of_run) if is_own else array
            for is_own, array in zip(own, arrays, strict=True)
        ]
        found: list[Any] = jax.tree.leaves(one(build(all_of_it), rate))
        return found

    stacked = [x for is_own, x in zip(own, arrays, strict=True) if is_own]
    if len(rates) == 1:
        alone = next_of(([x[0] for x in stacked], rates[0]))
        found = [x[None] for x in alone]
    else:
        found = jax.lax.map(next_of, (stacked, rates))
    # What counts steps is the same in all runs.
    return build([x if is_own else x[0] for is_own, x in zip(own, found, strict=True)])


def _axis(path: Sequence[Any]) -> int | None:
    """The axis of a state's leaf along which runs are stacked; None for counts."""
    return None if getattr(path[-1], "name", None) == "count" else 0
