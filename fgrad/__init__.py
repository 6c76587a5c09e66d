"""Fixed-point forward gradients: adapt networks where backpropagation cannot go."""

from fgrad import (
    _interchange,
    activity,
    adapters,
    analysis,
    enhancements,
    estimators,
    evaluation,
    fixed_point,
    layers,
    leaves,
    perturbations,
    spread,
    transform,
)
from fgrad.activity import activity_forward_grad
from fgrad.adaptation import adapt
from fgrad.adapters import adapter, lora, prompts
from fgrad.estimators import gradient_from_losses, pair_losses
from fgrad.evaluation import dual_forward
from fgrad.fixed_point import QTensor, dequantize, from_served, products, quantize
from fgrad.leaves import on_grid, relative_epsilon, step_epsilon
from fgrad.run_log import RunLog
from fgrad.serialization import load, save
from fgrad.spread import Spread
from fgrad.transform import (
    fixed_point_forward_grad,
    on_values,
    quantized_update,
    qzo_ff,
)

__version__ = "0.2.0.dev0"

_interchange.register()

__all__ = [
    "QTensor",
    "RunLog",
    "Spread",
    "activity",
    "activity_forward_grad",
    "adapt",
    "adapter",
    "adapters",
    "analysis",
    "dequantize",
    "dual_forward",
    "enhancements",
    "estimators",
    "evaluation",
    "fixed_point",
    "fixed_point_forward_grad",
    "from_served",
    "gradient_from_losses",
    "layers",
    "leaves",
    "load",
    "lora",
    "on_grid",
    "on_values",
    "pair_losses",
    "perturbations",
    "products",
    "prompts",
    "quantize",
    "quantized_update",
    "qzo_ff",
    "relative_epsilon",
    "save",
    "spread",
    "step_epsilon",
    "transform",
]
