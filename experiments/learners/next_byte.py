r"""The objective of text: the next byte, and a label that stands in the text.

A sequence begins after a newline, which is its first input, and ends in a padding of
zeros, which count for nothing:

.. math:: L = \frac{\sum_{i t} m_{it} \, (-\log p(x_{it} | x_{i, <t}))}
  {\sum_{i t} m_{it}}

To classify, a text is followed by a word for each class, as in MeZO. Training sees the
right word, and m chooses its bytes. The class is the one whose word is most probable.

Reference:
  Malladi et al., "Fine-tuning language models with just forward passes", NeurIPS 2023.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import texts

_NEWLINE = 10
_BETWEEN = b"\n= "  # a text and the word for its class

# logits(tokens), of the byte after each position.
Logits = Callable[[jax.Array], jax.Array]


def byte_losses(logits: Logits, tokens: jax.Array) -> jax.Array:
    """The loss of every byte, in nats; 0 where there is none.

    Args:
      logits: gives float [batch, positions, 256] of int [batch, positions].
      tokens: [batch, positions], padded with zeros.

    Returns:
      Float [batch, positions].
    """
    tokens = tokens.astype(jnp.int32)
    inputs = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=_NEWLINE)
    log_p = jax.nn.log_softmax(logits(inputs))
    chosen = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    return jnp.where(tokens > 0, -chosen, 0.0)


def mean_loss(
    logits: Logits, tokens: jax.Array, counted: jax.Array | None = None
) -> jax.Array:
    """The mean loss of the bytes that count, in nats.

    Args:
      logits: as for `byte_losses`.
      tokens: [batch, positions], padded with zeros.
      counted: bool [batch, positions], which bytes count; all by default. Padding never
        does.
    """
    losses = byte_losses(logits, tokens)
    mask = tokens > 0
    mask = mask if counted is None else mask & counted
    return jnp.sum(jnp.where(mask, losses, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def prompted(
    found: Sequence[bytes], words: Sequence[bytes], buckets: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    r"""Puts words behind texts, one behind each.

    Args:
      found: texts.
      words: one for each text.
      buckets: lengths that there may be.

    Returns:
      Tokens [texts, bucket], and which of them are bytes of the words.

    Example:
      >>> tokens, counted = prompted([b"x = 1"], [b"python"], [16])
      >>> bytes(tokens[0]), bytes(tokens[0][counted[0]])
      (b'x = 1\n= python\x00\x00', b'python')
    """
    whole = [followed(*pair) for pair in zip(found, words, strict=True)]
    tokens = texts.padded(whole, buckets)
    place = np.arange(tokens.shape[1])
    starts = np.array([len(one) + len(_BETWEEN) for one in found])[:, None]
    ends = np.array([len(one) for one in whole])[:, None]
    return tokens, (place >= starts) & (place < ends)


def followed(text: bytes, word: bytes) -> bytes:
    """A text, and behind it the word for its class."""
    return text + _BETWEEN + word


def word_scores(losses: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """The mean log-probability of the bytes that count in each sequence.

    Args:
      losses: float [sequences, positions], of every byte.
      counted: bool, of the same shape.

    Returns:
      Float [sequences].
    """
    return -np.sum(losses, axis=-1, where=counted) / counted.sum(-1)
