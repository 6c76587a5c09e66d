r"""Products that keep a part of their input for the backward pass.

The gradient of a kernel is a sum over examples, which are rows of the input and of the
gradient at the output, :math:`X^T D = \sum_i x_i d_i^T`, or for a convolution a sum of
the gradients that single images give. Backpropagation keeps all rows of X for it.
Column-row sampling keeps k of them, drawn with probabilities p, and divides by k p, so
that the sum is right on average. Winner-take-all sampling keeps the rows of the largest
probabilities as they are, which have no variance, and draws the rest. It is the
backpropagation that forward gradients have to be compared with where memory is short.

`dense` and `conv` are such products. Inside the context `products` all layers of
`fgrad.layers` use them.
"""

import contextlib
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.usage import UsageError, check_names
from fgrad import layers


def column_row(
    key: jax.Array, probabilities: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Draws rows with replacement.

    Args:
      key: PRNG key.
      probabilities: p of each row [rows], which sum to 1.
      count: k, how many are drawn.

    Returns:
      Indices [k], and the weight 1 / (k p) of each.
    """
    chosen = jax.random.categorical(key, jnp.log(probabilities), shape=(count,))
    return chosen, 1 / (count * probabilities[chosen])


def winner_take_all(
    key: jax.Array, probabilities: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    r"""Keeps the most probable rows as they are, and draws the others.

    .. math:: \sum_{i \in C} x_i d_i^T +
      \frac{1 - P_C}{k - |C|} \sum_{j \sim p, \, j \notin C} \frac{x_j d_j^T}{p_j},
      \quad P_C = \sum_{i \in C} p_i

    C is the set of the largest probabilities that makes
    :math:`(1 - P_C) / (k - |C|)` least, to which the variance is proportional. With
    equal probabilities, C is empty and this is `column_row`.

    Args:
      key: PRNG key.
      probabilities: p of each row [rows], which sum to 1.
      count: k, how many rows are kept in all; at most as many as there are.

    Returns:
      Indices [k], and the weight of each: 1 for those in C.

    Reference:
      Liu et al., "Winner-take-all column row sampling for memory efficient adaptation
      of language model", NeurIPS 2023 (arXiv 2305.15265).
    """
    order = jnp.argsort(-probabilities)
    ranked = probabilities[order]
    left = 1 - jnp.concatenate([jnp.zeros(1), jnp.cumsum(ranked[: count - 1])])
    left = jnp.maximum(left, 0)  # of sizes 0 to k - 1 of C
    winners = jnp.argmin(left / (count - jnp.arange(count)))
    outside = jnp.arange(len(ranked)) >= winners
    others = jnp.where(outside, ranked, 0)
    drawn = jax.random.categorical(key, jnp.log(others), shape=(count,))
    places = jnp.arange(count)
    keeps = places < winners
    rank = jnp.where(keeps, places, drawn)
    scale = left[winners] / jnp.maximum(count - winners, 1)
    return order[rank], jnp.where(keeps, 1.0, scale / ranked[rank])


SAMPLERS = {"column_row": column_row, "winner_take_all": winner_take_all}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def dense(
    x: jax.Array, kernel: jax.Array, key: jax.Array, count: int, sampler: str
) -> jax.Array:
    """``x @ kernel``, of whose input the backward pass keeps ``count`` rows.

    The gradient by x needs the kernel only and is exact. That by the kernel is right on
    average over keys. A row is drawn with a probability proportional to its length,
    since the gradient at the output is not known yet.

    Args:
      x: [rows, inputs], rows being examples, or examples and positions.
      kernel: [inputs, outputs].
      key: PRNG key of the choice, another in each step and layer.
      count: how many rows are kept.
      sampler: a key of `SAMPLERS`.

    Raises:
      ValueError: for a count that is not 1 to the number of rows, and for an input of
        other than two axes.
    """
    del key
    if x.ndim != 2:
        raise ValueError(f"x must be [rows, inputs], got shape {x.shape}.")
    _check(x, count, sampler)
    return x @ kernel


def _check(x: jax.Array, count: int, sampler: str) -> None:
    if not 1 <= count <= len(x):
        raise ValueError(f"count must be 1 to {len(x)} rows, got {count}.")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {list(SAMPLERS)}, got {sampler!r}.")


def row_probabilities(x: jax.Array) -> jax.Array:
    """Of each row of x [rows, inputs] in proportion to its length; equal for zeros."""
    lengths = jnp.linalg.norm(x, axis=1)
    total = jnp.sum(lengths)
    return jnp.where(total > 0, lengths / jnp.where(total > 0, total, 1), 1 / len(x))


def _forward(
    x: jax.Array, kernel: jax.Array, key: jax.Array, count: int, sampler: str
) -> tuple[jax.Array, Any]:
    y = dense(x, kernel, key, count, sampler)
    part, rows = _kept(x, key, count, sampler)
    return y, (part, rows, kernel)


def _kept(
    x: jax.Array, key: jax.Array, count: int, sampler: str
) -> tuple[jax.Array, jax.Array]:
    """The chosen rows of x [rows, ...] times their weights, and which they are.

    Whoever keeps as many as there are keeps each once.
    """
    if count == len(x):
        return x, jnp.arange(count)
    probabilities = row_probabilities(x.reshape(len(x), -1))
    rows, weights = SAMPLERS[sampler](key, probabilities, count)
    return weights.reshape(-1, *[1] * (x.ndim - 1)) * x[rows], rows


def _backward(count: int, sampler: str, kept: Any, cotangent: jax.Array) -> Any:
    del count, sampler
    x, rows, kernel = kept
    return cotangent @ kernel.T, x.T @ cotangent[rows], None


dense.defvjp(_forward, _backward)


# The settings of a convolution as jax.lax.conv_general_dilated has them, name by name.
_Settings = tuple[tuple[str, Any], ...]


def conv(
    x: jax.Array,
    kernel: jax.Array,
    key: jax.Array,
    count: int,
    sampler: str,
    **settings: Any,
) -> jax.Array:
    """A convolution, of whose input the backward pass keeps ``count`` examples.

    The gradient by x is exact, that by the kernel right on average over keys, as for
    `dense`. An example is drawn with a probability proportional to its length, over all
    its pixels and channels.

    Args:
      x: [examples, ...], examples coming first.
      kernel: see ``jax.lax.conv_general_dilated``.
      key: PRNG key of the choice, another in each step and layer.
      count: how many examples are kept.
      sampler: a key of `SAMPLERS`.
      **settings: further arguments of ``jax.lax.conv_general_dilated``, hashable.

    Raises:
      ValueError: for a count that is not 1 to the number of examples, and an unknown
        sampler.
    """
    _check(x, count, sampler)
    chosen = tuple(sorted(settings.items()))
    return _conv(x, kernel, key, count, sampler, chosen, x.shape)


def _plain_conv(x: jax.Array, kernel: jax.Array, settings: _Settings) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, **dict(settings))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _conv(
    x: jax.Array,
    kernel: jax.Array,
    key: jax.Array,
    count: int,
    sampler: str,
    settings: _Settings,
    shape: tuple[int, ...],
) -> jax.Array:
    del key, count, sampler, shape
    return _plain_conv(x, kernel, settings)


def _conv_forward(
    x: jax.Array,
    kernel: jax.Array,
    key: jax.Array,
    count: int,
    sampler: str,
    settings: _Settings,
    shape: tuple[int, ...],
) -> tuple[jax.Array, Any]:
    del shape
    part, rows = _kept(x, key, count, sampler)
    return _plain_conv(x, kernel, settings), (part, rows, kernel)


def _conv_backward(
    count: int,
    sampler: str,
    settings: _Settings,
    shape: tuple[int, ...],
    kept: Any,
    cotangent: jax.Array,
) -> Any:
    del count, sampler
    part, rows, kernel = kept
    x = jax.ShapeDtypeStruct(shape, part.dtype)
    by_x = jax.linear_transpose(lambda x: _plain_conv(x, kernel, settings), x)
    by_kernel = jax.linear_transpose(lambda k: _plain_conv(part, k, settings), kernel)
    return *by_x(cotangent), *by_kernel(cotangent[rows]), None


_conv.defvjp(_conv_forward, _conv_backward)


def check_settings(chosen: Mapping[str, Any]) -> None:
    """Makes sure that a configuration's settings of sampling have a meaning.

    Args:
      chosen: ``{"share": 0.125, "sampler": "winner_take_all"}``, or nothing.

    Raises:
      UsageError: for other names, a share outside (0, 1], or an unknown sampler.
    """
    if not chosen:
        return
    if set(chosen) != {"share", "sampler"}:
        raise UsageError(
            f'sampled takes "share" and "sampler", got {sorted(chosen)}; leave it '
            "empty to keep all activations."
        )
    check_names("sampler", [chosen["sampler"]], SAMPLERS)
    if not 0 < chosen["share"] <= 1:
        raise UsageError(f"sampled.share must lie in (0, 1], got {chosen['share']!r}.")


@contextlib.contextmanager
def products(key: jax.Array, share: float, sampler: str) -> Iterator[None]:
    """Inside it, float products of `fgrad.layers` sample what their gradient keeps.

    Of a dense layer the rows are sampled, be they examples or positions of them; of a
    convolution the examples. Layers with ``bits`` or an AQT configuration, and products
    of two activations, keep all.

    Args:
      key: PRNG key of all choices; each layer gets its own.
      share: of the rows that is kept, at least one row.
      sampler: a key of `SAMPLERS`.
    """

    def interceptor(
        next_fn: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        module = context.module
        make = _SAMPLED.get(type(module))
        if make is None or module.bits is not None or module.aqt is not None:
            return next_fn(*args, **kwargs)
        if not all(isinstance(x, jax.Array) for x in args[:2]):
            return next_fn(*args, **kwargs)
        name = "/".join(module.path)
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        made = make(own, share, sampler, *args, **kwargs)
        return next_fn(*args, **kwargs) if made is None else made

    with nn.intercept_methods(interceptor):
        yield


def _count(share: float, rows: int) -> int:
    return max(1, round(share * rows))


def _sampled_dot(
    key: jax.Array,
    share: float,
    sampler: str,
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    **ignored: Any,
) -> jax.Array | None:
    """A product with a kernel by `dense`, or None if its axes lie otherwise."""
    del ignored  # precision and the type of the result
    (left, right), batch = dimension_numbers
    start = lhs.ndim - len(left)
    trailing = tuple(left) == tuple(range(start, lhs.ndim))
    leading = tuple(right) == tuple(range(len(right)))
    if any(map(len, batch)) or not (trailing and leading):
        return None
    rows = math.prod(lhs.shape[:start])
    x = lhs.reshape(rows, -1)
    y = dense(x, rhs.reshape(x.shape[1], -1), key, _count(share, rows), sampler)
    return y.reshape(*lhs.shape[:start], *rhs.shape[len(right) :])


def _sampled_conv(
    key: jax.Array,
    share: float,
    sampler: str,
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **ignored: Any,
) -> jax.Array | None:
    """A convolution by `conv`, or None if examples do not come first."""
    del ignored  # precision
    numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    if numbers.lhs_spec[0] != 0 or numbers.out_spec[0] != 0:
        return None
    given = {"lhs_dilation": lhs_dilation, "rhs_dilation": rhs_dilation}
    return conv(
        lhs,
        rhs,
        key,
        _count(share, len(lhs)),
        sampler,
        window_strides=tuple(window_strides),
        padding=padding if isinstance(padding, str) else tuple(map(tuple, padding)),
        dimension_numbers=numbers,
        feature_group_count=feature_group_count,
        **{name: tuple(value) for name, value in given.items() if value is not None},
    )


_SAMPLED: dict[type, Callable[..., jax.Array | None]] = {
    layers.DotGeneral: _sampled_dot,
    layers.ConvGeneralDilated: _sampled_conv,
}
