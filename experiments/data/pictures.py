"""Pictures in the files that others publish."""

import io

import numpy as np
from PIL import Image

from experiments.data import archives

# Others are not needed, and Pillow would hand some of them to programs.
_FORMATS = ("JPEG", "PNG")
_MOST_PIXELS = 1 << 26  # ImageNet's largest picture is a little smaller


def square(encoded: bytes, name: object, mode: str, side: int) -> np.ndarray:
    """A picture, resized to a square with Pillow's Lanczos filter.

    Args:
      encoded: as JPEG or PNG.
      name: of the picture, for messages.
      mode: Pillow's, "RGB" or "L" (grey levels).
      side: in pixels.

    Returns:
      uint8 [side, side, 3] or [side, side].

    Raises:
      ValueError: if it is no such picture, is damaged, or has more than 2**26 pixels.

    Example:
      >>> file = io.BytesIO()
      >>> Image.new("RGB", (5, 4), (1, 2, 3)).save(file, "png")
      >>> square(file.getvalue(), "a.png", "RGB", 2).tolist()[0]
      [[1, 2, 3], [1, 2, 3]]
    """
    with archives.naming(name):
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"it has {image.width}x{image.height} pixels.")
            converted = image.convert(mode) if image.mode != mode else image
            small = converted.resize((side, side), Image.Resampling.LANCZOS)
        return np.asarray(small)
