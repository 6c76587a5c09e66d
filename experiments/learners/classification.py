"""The objective of ordinary training: cross-entropy on batches of labelled examples."""

import functools
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from experiments.data.arrays import Split
from experiments.learners.augmentation import augmented
from experiments.learners.learner import Outputs


class Classification:
    """Cross-entropy of the classes of examples; an `Objective` of `Learner`."""

    def __init__(self, method: ConfigDict):
        """Reads the settings of the batches.

        Args:
          method: ``batch_size``, and optionally ``input_shift``, ``input_noise`` and
            ``label_smoothing``; see ``configs/quickstart.py``.
        """
        self._method = method

    def batch(self, key: jax.Array, data: Split) -> Split:
        """Draws a batch with replacement and augments it.

        Args:
          key: PRNG key of the batch.
          data: the split to draw from.
        """
        index_key, *keys = jax.random.split(key, 3)
        size = (self._method.batch_size,)
        indices = jax.random.randint(index_key, size, 0, data.labels.shape[0])
        images = augmented(self._method, keys, data.images[indices])
        return Split(images, data.labels[indices])

    def losses(self, outputs: Outputs, batch: Split) -> Any:
        """The cross-entropy of each example.

        Args:
          outputs: gives the logits of images, and those of local heads by name.
          batch: examples and their labels.

        Returns:
          Float [batch]; of a network with local heads a dictionary of such losses: the
          network's under "network", and each local head's under its name.
        """
        logits, local = outputs(batch.images)
        labels = jax.nn.one_hot(batch.labels, logits.shape[-1])
        labels = optax.smooth_labels(labels, self._method.get("label_smoothing", 0.0))
        losses = functools.partial(optax.softmax_cross_entropy, labels=labels)
        if not local:
            return losses(logits)
        return {"network": losses(logits), **jax.tree.map(losses, local)}
