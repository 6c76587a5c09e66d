"""Random changes of images that leave their class as it is."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict


def augmented(
    settings: ConfigDict, keys: Sequence[jax.Array], images: jax.Array
) -> jax.Array:
    """Shifts images and adds noise to them, as far as the settings say.

    Args:
      settings: ``input_shift``, the most pixels that an image moves along each axis,
        and ``input_noise``, the standard deviation of the noise; none of either where
        a field is missing. See ``configs/quickstart.py``.
      keys: two PRNG keys, one of the shifts and one of the noise.
      images: [examples, height, width, channels].

    Returns:
      Images of the same shape.
    """
    shift_key, noise_key = keys
    if shift := settings.get("input_shift", 0):
        size = (len(images), 2)
        offsets = jax.random.randint(shift_key, size, -shift, shift + 1)
        images = jax.vmap(translated)(images, offsets)
    if noise := settings.get("input_noise", 0.0):
        images += noise * jax.random.normal(noise_key, images.shape)
    return images


def translated(image: jax.Array, offset: jax.Array) -> jax.Array:
    """Moves an image by whole pixels; zeros come in at the sides that it leaves.

    Args:
      image: [height, width, channels].
      offset: int [2], how far it moves along the first and the second axis.

    Returns:
      An image of the same shape.
    """
    height, width, _ = image.shape
    padded = jnp.pad(image, ((height, height), (width, width), (0, 0)))
    start = (height - offset[0], width - offset[1], 0)
    return jax.lax.dynamic_slice(padded, start, image.shape)
