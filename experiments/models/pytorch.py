"""PyTorch's layers as Flax has them: what networks read their published weights with.

PyTorch keeps a dense kernel as [out, in] and a convolution's as [out, in, height,
width]; Flax as [in, out] and [height, width, in, out]. Networks are deployed without
batch normalisation: each is folded into the convolution before it.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

# Of a batch normalisation, in the order of `convolution`'s equation.
_STATISTICS = ("weight", "bias", "running_mean", "running_var")


def check_names(
    state: Mapping[str, np.ndarray], expected: Collection[str], network: str
) -> None:
    """Refuses another network's state dict.

    Args:
      state: name to array; the counters of batch normalisations are left aside.
      expected: the names that it must have, and no others.
      network: what it should be, for the message.

    Raises:
      ValueError: if names are missing or unknown.

    Example:
      >>> check_names({"fc.bias": np.zeros(3)}, {"head.bias"}, "ViT")
      Traceback (most recent call last):
      ...
      ValueError: this is no ViT: it lacks ['head.bias'] and has ['fc.bias'] ...
    """
    found = {name for name in state if not name.endswith(".num_batches_tracked")}
    missing, unknown = sorted(set(expected) - found), sorted(found - set(expected))
    if missing or unknown:
        raise ValueError(
            f"this is no {network}: it lacks {missing[:5]} and has {unknown[:5]} "
            "(5 at most of each)."
        )


def with_norm(convolution: str, norm: str) -> Iterator[str]:
    """The names that `convolution` reads."""
    yield f"{convolution}.weight"
    yield from (f"{norm}.{statistic}" for statistic in _STATISTICS)


def convolution(
    state: Mapping[str, np.ndarray], name: str, norm: str, epsilon: float
) -> dict[str, np.ndarray]:
    """A convolution K without bias and its batch normalisation, as one with a bias.

    K · γ / √(σ² + ε)   and   β − μ γ / √(σ² + ε).

    Args:
      state: name to array.
      name: of the convolution; its weight is [out, in, height, width].
      norm: of the batch normalisation: ``weight`` γ, ``bias`` β, ``running_mean`` μ
        and ``running_var`` σ², each [out].
      epsilon: ε.

    Returns:
      float32 ``kernel`` [height, width, in, out] and ``bias`` [out]; computed in
      float64.

    Example:
      >>> state = {"c.weight": np.ones((1, 1, 1, 1)), "n.weight": np.full(1, 3.0)}
      >>> state |= {"n.bias": np.ones(1), "n.running_mean": np.full(1, 2.0)}
      >>> state |= {"n.running_var": np.full(1, 8.0)}
      >>> layer = convolution(state, "c", "n", epsilon=1.0)  # 3/√(8 + 1) = 1
      >>> float(layer["kernel"].item()), float(layer["bias"].item())
      (1.0, -1.0)
    """
    gamma, beta, mean, variance = (
        state[f"{norm}.{statistic}"].astype(np.float64) for statistic in _STATISTICS
    )
    factor = gamma / np.sqrt(variance + epsilon)
    kernel = state[f"{name}.weight"].astype(np.float64).transpose(2, 3, 1, 0) * factor
    return float32(kernel=kernel, bias=beta - mean * factor)


def dense(state: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """A dense layer.

    Args:
      state: name to array; ``<name>.weight`` [out, in], ``<name>.bias`` [out].
      name: of the layer.

    Returns:
      float32 ``kernel`` [in, out] and ``bias`` [out].
    """
    return float32(kernel=state[f"{name}.weight"].T, bias=state[f"{name}.bias"])


def float32(**arrays: np.ndarray) -> dict[str, Any]:
    """Contiguous float32 copies."""
    return {k: np.array(v, np.float32, order="C") for k, v in arrays.items()}


def norm(state: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """A layer normalisation.

    Args:
      state: name to array.
      name: of the layer.

    Returns:
      float32 ``scale`` and ``bias``, [features] both.

    Example:
      >>> state = {"norm.weight": np.ones(3), "norm.bias": np.zeros(3)}
      >>> norm(state, "norm")["scale"].shape
      (3,)
    """
    return float32(scale=state[f"{name}.weight"], bias=state[f"{name}.bias"])
