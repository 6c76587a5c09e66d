"""What a training step costs, what its loss looks like, how good its gradient is."""

from fgrad.analysis.compiled_memory import Memory, MemoryReport, memory_report
from fgrad.analysis.device_memory import DeviceBudget, device_budget
from fgrad.analysis.figures import plot_contour, plot_surface
from fgrad.analysis.gradient_quality import GradientQuality, gradient_quality
from fgrad.analysis.landscape import (
    Directions,
    Landscape,
    coordinates,
    loss_landscape,
    plane_through,
    random_directions,
    trajectory_directions,
)

__all__ = [
    "DeviceBudget",
    "Directions",
    "GradientQuality",
    "Landscape",
    "Memory",
    "MemoryReport",
    "coordinates",
    "device_budget",
    "gradient_quality",
    "loss_landscape",
    "memory_report",
    "plane_through",
    "plot_contour",
    "plot_surface",
    "random_directions",
    "trajectory_directions",
]
