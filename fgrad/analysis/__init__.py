"""What a step costs, how its loss looks, how good its gradient is, what it takes."""

from fgrad.analysis.compiled_memory import Memory, MemoryReport, memory_report
from fgrad.analysis.device_memory import DeviceBudget, device_budget
from fgrad.analysis.figures import plot_contour, plot_surface
from fgrad.analysis.gradient_quality import GradientQuality, gradient_quality
from fgrad.analysis.influence import (
    forward_traces,
    head_traces,
    influence,
    self_influence,
)
from fgrad.analysis.landscape import (
    Directions,
    Landscape,
    coordinates,
    loss_landscape,
    plane_through,
    random_directions,
    trajectory_directions,
)
from fgrad.analysis.training_time import (
    LinearModel,
    linear_model,
    predicted_losses,
    steps_to_reach,
)

__all__ = [
    "DeviceBudget",
    "Directions",
    "GradientQuality",
    "Landscape",
    "LinearModel",
    "Memory",
    "MemoryReport",
    "coordinates",
    "device_budget",
    "forward_traces",
    "gradient_quality",
    "head_traces",
    "influence",
    "linear_model",
    "loss_landscape",
    "memory_report",
    "plane_through",
    "plot_contour",
    "plot_surface",
    "predicted_losses",
    "random_directions",
    "self_influence",
    "steps_to_reach",
    "trajectory_directions",
]
