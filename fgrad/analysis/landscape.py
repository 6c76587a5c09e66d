"""The loss around a point, on the plane of two directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fgrad import _checks, fixed_point
from fgrad.fixed_point import QTensor, is_qtensor

# Below this share of the larger one, a second direction counts as parallel or zero.
_DEGENERATE = 1e-6
_GRID = np.linspace(-1, 1, 21)


class Directions(NamedTuple):
    """Two directions in the space of parameters.

    Attributes:
      first: pytree of float arrays like the parameters, a `QTensor` leaf as its value.
      second: likewise.
      explained: shares of the variance of a trajectory along each, or None.
    """

    first: Any
    second: Any
    explained: tuple[float, float] | None = None


class Landscape(NamedTuple):
    """Losses on a grid.

    Attributes:
      first: coordinates along the first direction, [n].
      second: along the second, [k].
      losses: float32 [n, k].
    """

    first: np.ndarray
    second: np.ndarray
    losses: np.ndarray


def random_directions(key: jax.Array, params: Any) -> Directions:
    r"""Two random directions, filter by filter as long as the weights.

    .. math:: d_{i} \leftarrow \frac{\|w_i\|}{\|d_i\|} d_i, \qquad d \sim N(0, I)

    for each filter i, the slice of a kernel that makes one output (its last axis).
    Leaves with fewer than two axes (biases, norms) stay where they are. So distances
    mean the same in networks whose layers differ in scale.

    Args:
      key: random key; each leaf draws from one of its own.
      params: pytree of float arrays and `QTensor` leaves.

    Raises:
      ValueError: if no leaf has two axes.

    Example:
      >>> params = {"w": jnp.full((4, 2), 0.5), "b": jnp.ones(2)}
      >>> directions = random_directions(jax.random.key(0), params)
      >>> lengths = jnp.linalg.norm(directions.first["w"], axis=0)
      >>> jnp.round(lengths, 3)  # as of the weights
      Array([1., 1.], dtype=float32)
      >>> directions.first["b"]
      Array([0., 0.], dtype=float32)

    Reference:
      Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018.
    """
    _checks.key(key)
    _checks.arrays(params, is_qtensor)
    values = fixed_point.dequantize(params)
    leaves, treedef = jax.tree.flatten(values)
    if all(leaf.ndim < 2 for leaf in leaves):
        raise ValueError(
            "no leaf has two or more axes, so there are no filters to normalise by: "
            "pass Directions of your own to loss_landscape."
        )

    def draw(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(leaves))
        drawn = [_filters(k, leaf) for k, leaf in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(treedef, drawn)

    first, second = jax.random.split(key)
    return Directions(draw(first), draw(second))


def trajectory_directions(trajectory: Sequence[Any], center: Any) -> Directions:
    """The two directions along which a training run moved most.

    The first two principal axes of the differences to ``center``, each of length 1,
    found from the matrix of their inner products.

    Args:
      trajectory: parameters at some steps, at least two that differ from ``center``.
      center: the parameters that the plane goes through, such as the last ones.

    Raises:
      ValueError: if the trajectory moves along fewer than two directions.

    Example:
      >>> center = jnp.zeros(3)
      >>> points = [jnp.array([3.0, 0.0, 0.0]), jnp.array([3.0, 1.0, 0.0])]
      >>> found = trajectory_directions(points, center)
      >>> float(abs(found.first[2])), round(sum(found.explained), 6)
      (0.0, 1.0)
    """
    origin = fixed_point.dequantize(center)
    steps = [_from(origin, point) for point in trajectory]
    if not steps:
        raise ValueError("trajectory is empty; it needs two points or more.")
    products = np.array([[_dot(a, b) for b in steps] for a in steps])
    values, vectors = np.linalg.eigh(products)
    values, vectors = values[::-1], vectors[:, ::-1]
    if len(steps) < 2 or not values[1] > _DEGENERATE**2 * values[0]:
        raise ValueError(
            f"{len(steps)} points of the trajectory lie on one line through the "
            "center: keep more steps, or use random_directions."
        )

    def axis(index: int) -> Any:
        weights = vectors[:, index] / math.sqrt(values[index])
        return jax.tree.map(
            lambda *leaves: sum(
                jnp.float32(w) * leaf for w, leaf in zip(weights, leaves, strict=True)
            ),
            *steps,
        )

    total = values.sum()
    explained = float(values[0] / total), float(values[1] / total)
    return Directions(axis(0), axis(1), explained)


def plane_through(center: Any, first: Any, second: Any) -> Directions:
    """The plane through three points, with axes of length 1 at right angles.

    Args:
      center: where the axes meet, such as the parameters that two runs start from.
      first: a point that the first axis goes through, such as where one run ended.
      second: a point of the plane, such as where the other ended.

    Raises:
      ValueError: if the points lie on one line.

    Example:
      >>> corner = jnp.zeros(2)
      >>> plane = plane_through(corner, jnp.array([0.0, 5.0]), jnp.array([2.0, 1.0]))
      >>> plane.first, plane.second
      (Array([0., 1.], dtype=float32), Array([1., 0.], dtype=float32))
    """
    origin = fixed_point.dequantize(center)
    along, across = (_from(origin, point) for point in (first, second))
    length, reach = _dot(along, along), _dot(across, across)
    share = _dot(along, across) / length if length else 0.0
    across = jax.tree.map(lambda b, a: b - jnp.float32(share) * a, across, along)
    left = _dot(across, across)
    if not (length and left > _DEGENERATE * reach):
        raise ValueError(
            "the three points lie on one line, so there is no plane through them: "
            "choose others, or use random_directions."
        )

    def unit(direction: Any, squared: float) -> Any:
        factor = jnp.float32(1 / math.sqrt(squared))
        return jax.tree.map(lambda leaf: leaf * factor, direction)

    return Directions(unit(along, length), unit(across, left))


def coordinates(
    points: Sequence[Any], center: Any, directions: Directions
) -> np.ndarray:
    """Where points lie on a plane: float [points, 2], by least squares.

    Raises:
      ValueError: if the directions are parallel, or one is zero.
    """
    _check_are_directions(directions)
    pair = directions[:2]
    gram = np.array([[_dot(a, b) for b in pair] for a in pair])
    if not np.linalg.det(gram) > _DEGENERATE**2 * gram.max() ** 2:
        raise ValueError(
            "the two directions are parallel, or one is zero; their inner products "
            f"are {gram.tolist()}."
        )
    origin = fixed_point.dequantize(center)
    found = []
    for point in points:
        step = jax.tree.map(jnp.subtract, fixed_point.dequantize(point), origin)
        found.append(np.linalg.solve(gram, [_dot(step, d) for d in pair]))
    return np.array(found).reshape(-1, 2)


def loss_landscape(
    value_fn: Callable[..., jax.Array],
    params: Any,
    directions: Directions,
    *,
    first: Sequence[float] | np.ndarray = _GRID,
    second: Sequence[float] | np.ndarray | None = None,
    chunk: int = 32,
    progress: Callable[[int], Any] = lambda done: None,
    **kwargs: Any,
) -> Landscape:
    r"""The loss on a grid of the plane through the parameters.

    .. math:: f(\alpha, \beta) = L(w + \alpha d_1 + \beta d_2)

    A `QTensor` leaf moves on its own grid: to the nearest integers, saturating. So the
    plain of a low-bit network is seen with its steps.

    Args:
      value_fn: ``value_fn(params, **kwargs)``, a scalar; any JAX function.
      params: pytree of float arrays and `QTensor` leaves, the point (0, 0).
      directions: from `random_directions`, `trajectory_directions` or your own.
      first: coordinates along the first direction.
      second: along the second; the same if None.
      chunk: how many points are evaluated at once, by `jax.vmap`.
      progress: called with the number of points just evaluated.
      **kwargs: passed to ``value_fn``, such as the batch.

    Returns:
      A `Landscape`.

    Raises:
      ValueError: if ``chunk`` is not positive, a direction does not fit the
        parameters, or the loss is not a scalar.

    Example:
      >>> def bowl(params):
      ...     return jnp.sum(jnp.array([1.0, 4.0]) * params**2)
      >>> axes = Directions(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
      >>> loss_landscape(bowl, jnp.zeros(2), axes, first=[0, 1], second=[0, 2]).losses
      array([[ 0., 16.],
             [ 1., 17.]], dtype=float32)
    """
    chunk = _checks.integer("chunk", chunk, 1, 2**20)
    _checks.function("progress", progress, "done")
    _check_directions(params, directions)
    first = _coordinates("first", first)
    second = first if second is None else _coordinates("second", second)
    grid = np.stack(np.meshgrid(first, second, indexing="ij"), -1).reshape(-1, 2)

    @jax.jit
    def losses_of(
        params: Any, pair: tuple[Any, Any], points: jax.Array, kwargs: Any
    ) -> jax.Array:
        def one(point: jax.Array) -> jax.Array:
            loss = value_fn(_moved(params, pair, point), **kwargs)
            if jnp.shape(loss):
                raise ValueError(
                    f"value_fn must return a scalar, got shape {jnp.shape(loss)}; "
                    "take the mean."
                )
            return loss

        return jax.vmap(one)(points)

    pair = (directions.first, directions.second)
    losses = np.empty(len(grid), np.float32)
    for start in range(0, len(grid), chunk):
        points = grid[start : start + chunk]
        # The last chunk is filled up, so that one program serves all.
        filled = np.resize(points, (chunk, 2))
        found = losses_of(params, pair, filled, kwargs)
        losses[start : start + chunk] = np.asarray(found)[: len(points)]
        progress(len(points))
    return Landscape(first, second, losses.reshape(len(first), len(second)))


def _filters(key: jax.Array, weights: jax.Array) -> jax.Array:
    if weights.ndim < 2:
        return jnp.zeros_like(weights)
    drawn = jax.random.normal(key, weights.shape, weights.dtype)
    axes = tuple(range(weights.ndim - 1))
    lengths = [jnp.sqrt(jnp.sum(x**2, axes, keepdims=True)) for x in (weights, drawn)]
    return drawn * lengths[0] / lengths[1]


def _moved(params: Any, pair: tuple[Any, Any], point: jax.Array) -> Any:
    def move(leaf: Any, first: jax.Array, second: jax.Array) -> Any:
        step = point[0] * first + point[1] * second
        if not is_qtensor(leaf):
            return leaf + step.astype(leaf.dtype)
        steps = jnp.round(step / leaf.scale)
        limit = leaf.max_qvalue
        moved = jnp.clip(leaf.qvalue + steps, -limit, limit)
        return QTensor(moved.astype(leaf.qvalue.dtype), leaf.scale, leaf.bits)

    return jax.tree.map(move, params, *pair, is_leaf=is_qtensor)


def _dot(a: Any, b: Any) -> float:
    products = jax.tree.map(lambda x, y: jnp.vdot(x, y).astype(jnp.float32), a, b)
    return float(sum(map(float, jax.tree.leaves(products))))


def _from(origin: Any, point: Any) -> Any:
    """The way from the center to a point, both as values."""
    values = fixed_point.dequantize(point)
    shapes, wanted = (jax.tree.map(jnp.shape, tree) for tree in (values, origin))
    if shapes != wanted:
        raise ValueError(
            "all points must have the structure and the shapes of the center, "
            f"{wanted}, got {shapes}."
        )
    return jax.tree.map(jnp.subtract, values, origin)


def _coordinates(name: str, values: Any) -> np.ndarray:
    """The coordinates along an axis, [n] float32."""
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError, OverflowError):
        array = np.zeros(())
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(
            f"{name} must be a list of finite coordinates, got {values!r}."
        )
    return array


def _check_are_directions(directions: Any) -> None:
    if not isinstance(directions, tuple) or len(directions) < 2:
        raise TypeError(
            "directions must be a fgrad.analysis.Directions, got "
            f"{directions!r:.60}; use fgrad.analysis.random_directions(key, params)."
        )


def _check_directions(params: Any, directions: Directions) -> None:
    _check_are_directions(directions)
    shapes = jax.tree.map(jnp.shape, params, is_leaf=is_qtensor)
    for direction in directions[:2]:
        if jax.tree.map(jnp.shape, direction) != shapes:
            raise ValueError(
                "each of directions must have the parameters' structure and shapes, "
                f"{shapes}, got {jax.tree.map(jnp.shape, direction)}."
            )
