"""Fixed-point numbers: grids, quantized tensors, exact integers and their products."""

from fgrad._trees import is_concrete, path_str
from fgrad.fixed_point import products
from fgrad.fixed_point.calibration import (
    Calibration,
    abs_max,
    calibrate_scale,
    mse_optimal,
    percentile,
    round_to_grid,
)
from fgrad.fixed_point.integers import (
    MAX_BITS,
    MIN_BITS,
    fixed_point_ratio,
    max_qvalue,
    perturb_qvalue,
    requantize,
    storage_dtype,
    update_qvalue,
)
from fgrad.fixed_point.qtensor import (
    QTensor,
    as_gradient,
    dequantize,
    fake_quantize,
    is_qtensor,
    quantize,
    quantize_to_scale,
    stored,
    with_stored,
)

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "Calibration",
    "QTensor",
    "abs_max",
    "as_gradient",
    "calibrate_scale",
    "dequantize",
    "fake_quantize",
    "fixed_point_ratio",
    "is_concrete",
    "is_qtensor",
    "max_qvalue",
    "mse_optimal",
    "path_str",
    "percentile",
    "perturb_qvalue",
    "products",
    "quantize",
    "quantize_to_scale",
    "requantize",
    "round_to_grid",
    "storage_dtype",
    "stored",
    "update_qvalue",
    "with_stored",
]
