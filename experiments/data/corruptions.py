"""The fifteen corruptions of CIFAR-10-C and ImageNet-C, of images at hand.

The package ``imagecorruptions-imaug`` makes them (Apache-2.0; a fork of
``imagecorruptions``, whose fog needs NumPy 1 and whose glass blur an old scikit-image).
Install it with ``pip install -e '.[corruptions]'``.

The kinds are those of CIFAR-10-C, the strengths are not: the package has ImageNet-C's.
Their noise is two to four times as strong, and a blur is as many pixels wide on a small
image as on a large one (a disk of radius 3 at severity 1, where CIFAR-10-C has 0.3). So
results are comparable among themselves, not with numbers published for CIFAR-10-C.

Reference: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations, ICLR 2019.
"""

import threading
import types
from collections.abc import Sequence

import numpy as np

KINDS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SEVERITIES = (1, 3, 5)  # what experiments report; 2 and 4 work as well
_SMALLEST = 32  # pixels, the package's
_SEEDED = ("impulse_noise", "glass_blur")  # these do not draw from NumPy's global state
_lock = threading.Lock()


def corrupt(
    images: np.ndarray,
    kind: str,
    severity: int,
    *,
    seed: int = 0,
    indices: Sequence[int] | np.ndarray | None = None,
) -> np.ndarray:
    """Corrupts images; the same arguments give the same images.

    What is random depends on the seed, the kind and the example's index, neither on the
    other images nor on the severity. The package draws from NumPy's global state,
    which is left as it was; a thread that draws from it meanwhile disturbs both.

    Args:
      images: uint8 [examples, height, width, channels], from 32x32, of 1 or 3 channels.
        Of one channel, an image is corrupted as grey RGB and the first channel kept.
      kind: one of `KINDS`.
      severity: 1 (mild) to 5.
      seed: from 0.
      indices: int [examples], which examples of a dataset these are; by default
        0, 1, 2, ...

    Returns:
      uint8, of the shape of the images.

    Raises:
      ModuleNotFoundError: if the package is missing.
      TypeError: if the images are not uint8.
      ValueError: if another argument is not as above.
    """
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    _check(images, kind, severity, indices)
    library, out = _library(), np.empty_like(images)
    with _lock:
        state = np.random.get_state()
        try:
            for i, (image, index) in enumerate(zip(images, indices, strict=True)):
                entropy = (seed, KINDS.index(kind), int(index))
                words = np.random.SeedSequence(entropy).generate_state(2)
                np.random.seed(words[:1])
                seeded = {"seed": int(words[1])} if kind in _SEEDED else {}
                corrupted = library.corrupt(
                    image, severity=severity, corruption_name=kind, **seeded
                )
                # A mean over channels would weaken noise.
                out[i] = corrupted[..., : image.shape[-1]]
        finally:
            np.random.set_state(state)
    return out


def _check(images: np.ndarray, kind: str, severity: int, indices: np.ndarray) -> None:
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8 from 0 to 255, got {images.dtype}.")
    shape = images.shape
    if len(shape) != 4 or shape[-1] not in (1, 3) or min(shape[1:3]) < _SMALLEST:
        raise ValueError(
            f"images must be [examples, height, width, 1 or 3] from {_SMALLEST} pixels "
            f"of height and width, got shape {shape}."
        )
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    if severity not in range(1, 6):
        raise ValueError(f"severity must be 1 to 5, got {severity!r}.")
    if indices.shape != shape[:1]:
        raise ValueError(
            f"indices must be one for each of {shape[0]} images, got shape "
            f"{indices.shape}."
        )


def _library() -> types.ModuleType:
    try:
        import imagecorruptions
    except ModuleNotFoundError as error:
        if error.name != "imagecorruptions":
            raise
        raise ModuleNotFoundError(
            "Corruptions need a package that is not installed: "
            "pip install 'imagecorruptions-imaug>=1.1.5'"
        ) from error
    return imagecorruptions
