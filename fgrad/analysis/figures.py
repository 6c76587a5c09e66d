"""Pictures of a loss landscape, on axes of matplotlib that the caller makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fgrad.analysis.landscape import Landscape

_LEVELS = 20
_HEADROOM = 0.02  # how far over the surface a path is drawn, of the range of losses


def plot_contour(
    axes: Any,
    landscape: Landscape,
    paths: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Contour lines of the loss, with the ways of training runs on them.

    Args:
      axes: of matplotlib.
      landscape: from `fgrad.analysis.loss_landscape`; losses that are not finite are
        left blank.
      paths: coordinates [steps, 2] by name, from `fgrad.analysis.coordinates`; each
        ends with a dot.
    """
    losses = np.ma.masked_invalid(landscape.losses.T)
    lines = axes.contour(
        landscape.first, landscape.second, losses, _LEVELS, cmap="viridis"
    )
    axes.clabel(lines, inline=True, fontsize=7)
    for index, (name, path) in enumerate((paths or {}).items()):
        (line,) = axes.plot(*path.T, f"C{index + 1}-", label=name, linewidth=1.5)
        axes.plot(*path[-1], "o", color=line.get_color())
    if paths:
        axes.legend()


def plot_surface(
    axes: Any,
    landscape: Landscape,
    paths: Mapping[str, np.ndarray] | None = None,
) -> None:
    """The loss as a surface, with the ways of training runs over it.

    Args:
      axes: of matplotlib, with ``projection="3d"``, and ``computed_zorder=False`` if
        the surface is not to hide what lies behind it.
      landscape: from `fgrad.analysis.loss_landscape`.
      paths: coordinates [steps, 2] by name; drawn at the losses between the grid's.
    """
    first, second = np.meshgrid(landscape.first, landscape.second, indexing="ij")
    losses = np.ma.masked_invalid(landscape.losses)
    axes.plot_surface(first, second, losses, cmap="viridis", alpha=0.7)
    for index, (name, path) in enumerate((paths or {}).items()):
        heights = interpolated(landscape, path) + _HEADROOM * np.ptp(losses)
        axes.plot(*path.T, heights, f"C{index + 1}-", label=name, linewidth=2)
    if paths:
        axes.legend()


def interpolated(landscape: Landscape, points: np.ndarray) -> np.ndarray:
    """Losses at points [n, 2] between those of the grid, bilinear; outside the edge's.

    Example:
      >>> plane = np.array([[0.0, 1.0], [2.0, 3.0]])  # 2 a + b
      >>> axes = np.array([0.0, 1.0])
      >>> interpolated(Landscape(axes, axes, plane), np.array([[0.5, 0.25]]))
      array([1.25])
    """
    first = [
        np.interp(points[:, 0], landscape.first, column)
        for column in landscape.losses.T
    ]
    rows = np.stack(first, axis=1)  # [n, second]
    return np.array(
        [
            np.interp(y, landscape.second, row)
            for y, row in zip(points[:, 1], rows, strict=True)
        ]
    )
