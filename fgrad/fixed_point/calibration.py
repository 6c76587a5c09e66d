"""Calibration: which values the ends of a fixed-point grid stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fgrad import _checks
from fgrad._trees import is_concrete
from fgrad.fixed_point.integers import max_qvalue

# calibration(x, axes, bits) -> bound: the largest magnitude to be represented, shared
# over `axes`, which are kept with length 1.
Calibration = Callable[[jax.Array, tuple[int, ...], int], jax.Array]

# Largest end of a grid: so far below the largest float32 that neither the step nor
# its multiples round to infinity.
_END = float(jnp.finfo(jnp.float32).max) * (1 - 2**-20)
# Largest step: XLA may multiply by the inverse, which must not be subnormal.
_LARGEST_STEP = 2.0**126


def abs_max(x: jax.Array, axes: tuple[int, ...], bits: int) -> jax.Array:
    """Bound = ``max|x|``: nothing is clipped. Equation (5)."""
    del bits
    return jnp.max(jnp.abs(x), axis=axes, keepdims=True)


def percentile(q: float) -> Calibration:
    """Bound = the q-th percentile of ``|x|``: outliers are clipped.

    Args:
      q: percentile in (0, 100].

    Returns:
      A calibration for `quantize` or for the layers' activations.
    """
    _checks.number("percentile", q, "in (0, 100]", lambda x: 0 < x <= 100)

    def calibrate(x: jax.Array, axes: tuple[int, ...], bits: int) -> jax.Array:
        del bits
        return jnp.percentile(jnp.abs(x), q, axis=axes, keepdims=True)

    return calibrate


def mse_optimal(num_candidates: int = 64) -> Calibration:
    """Bound that minimises the mean squared quantization error on the b-bit grid.

    ``argmin_c mean((x - quantize(x, bound=c))**2)`` over ``num_candidates`` bounds
    that divide ``(0, max|x|]`` evenly.

    Args:
      num_candidates: resolution of the search.

    Returns:
      A calibration for `quantize` or for the layers' activations.
    """
    num_candidates = _checks.integer("num_candidates", num_candidates, 1, 2**20)

    def calibrate(x: jax.Array, axes: tuple[int, ...], bits: int) -> jax.Array:
        largest = abs_max(x, axes, bits)
        # Near 1, by a power of two that changes no digit: or squares would overflow
        # or vanish, and all bounds look the same.
        exponent = jnp.frexp(largest)[1]
        x, unit = jnp.ldexp(x, -exponent), jnp.ldexp(largest, -exponent)

        def error(fraction: jax.Array) -> jax.Array:
            bound = unit * fraction
            scale = jnp.where(bound > 0, bound, 1.0) / max_qvalue(bits)
            rounded = round_to_grid(x, scale, bits) * scale
            return jnp.mean((x - rounded) ** 2, axis=axes, keepdims=True)

        fractions = jnp.arange(1, num_candidates + 1) / num_candidates
        best = jnp.argmin(jax.lax.map(error, fractions), axis=0)
        return largest * fractions[best]

    return calibrate


def calibrate_scale(
    x: jax.Array,
    bits: int,
    *,
    channel_axis: int | None = None,
    calibration: Calibration = abs_max,
    headroom: float = 1.0,
    zero_bound: float = 1.0,
) -> jax.Array:
    """Grid step of an array: ``headroom * bound / (2**(bits - 1) - 1)``.

    Args:
      x: float array.
      bits: width of the grid, 2 to 16.
      channel_axis: axis with a scale per entry; None for one scale per tensor.
      calibration: gives the bound; `abs_max`, `percentile` or `mse_optimal`.
      headroom: room for the weights to grow, as a multiple of the bound.
      zero_bound: the bound where ``x`` is all zeros.

    Returns:
      float32 scale; a scalar per tensor, or ``x.ndim`` axes with one entry per channel.
    """
    limit = max_qvalue(bits)
    check_calibration(calibration)
    _checks.positive("headroom", headroom)
    _checks.positive("zero_bound", zero_bound)
    x = jnp.asarray(x, jnp.float32)
    axes = tuple(range(x.ndim))
    if channel_axis is not None:
        axis = _checks.integer("channel_axis", channel_axis, -x.ndim, x.ndim - 1)
        axes = tuple(a for a in axes if a != axis % x.ndim)
    if x.size:
        bound = _bound_of(calibration, x, axes, bits)
        # A percentile of a sparse tensor can be 0 where the tensor is not.
        bound = jnp.where(bound == 0, abs_max(x, axes, bits), bound)
    else:
        bound = jnp.zeros([1 if a in axes else n or 1 for a, n in enumerate(x.shape)])
    bound = jnp.where(bound == 0, zero_bound, bound)
    if channel_axis is None:
        bound = bound.reshape(())
    scale = (bound * headroom / limit).astype(jnp.float32)
    if headroom > 1:
        # Where the ends of the grid would lie beyond float32, they lie at its end.
        largest = min(_END / limit, _LARGEST_STEP)
        scale = jnp.where(jnp.isfinite(bound), jnp.minimum(scale, largest), scale)
    return jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)


def largest_value(bits: int) -> float:
    """The largest magnitude that a b-bit grid reaches with a step of float32."""
    return min(float(jnp.finfo(jnp.float32).max), _LARGEST_STEP * max_qvalue(bits))


def round_to_grid(x: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
    """``clip(⌊x / scale⌉)`` on the b-bit grid, still as floats."""
    limit = max_qvalue(bits)
    return jnp.clip(jnp.round(x / scale), -limit, limit)


def check_calibration(calibration: Any) -> None:
    """Raises for what is no calibration, or makes one only when it is called."""
    if calibration is percentile or calibration is mse_optimal:
        name = calibration.__name__
        call = f"{name}({'99.9' if calibration is percentile else ''})"
        raise TypeError(
            f"calibration={name} makes a calibration when it is called: pass "
            f"fgrad.fixed_point.{call}."
        )
    if not callable(calibration):
        raise TypeError(
            "calibration must be a function, fgrad.fixed_point.abs_max, "
            ".percentile(q) or .mse_optimal(), or one of your own; got "
            f"{calibration!r}."
        )
    _checks.function("calibration", calibration, "x", "axes", "bits")


def _bound_of(
    calibration: Calibration, x: jax.Array, axes: tuple[int, ...], bits: int
) -> jax.Array:
    """What a calibration returns, if it is a bound for each channel."""
    bound: Any = calibration(x, axes, bits)
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    dtype = getattr(bound, "dtype", None)
    of_floats = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if not of_floats or bound.shape not in (shape, ()):
        raise TypeError(
            "calibration must return the largest magnitude to be represented, floats "
            f"of shape {shape}, got {bound!r:.80}."
        )
    if is_concrete(bound) and is_concrete(x):
        values = np.asarray(bound).reshape(-1)
        wrong = values[~(values >= 0)]
        # NaN of x has an error of its own, which names the leaf or the layer.
        if wrong.size and not np.isnan(np.asarray(x)).any():
            raise ValueError(f"calibration must return magnitudes, got {wrong[0]}.")
    found: jax.Array = bound if bound.shape == shape else jnp.broadcast_to(bound, shape)
    return found
