r"""Private forward gradients: what leaves a step is m noisy numbers, or m signs.

An update by forward passes is a sum of directions that everybody may know, each times
one number that depends on the data. To hide any single example only these numbers need
noise, however many weights there are. Each example's slopes are clipped and put on an
integer grid, so that what one example can change is bounded exactly, and not up to
rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fgrad import _arguments, estimators, perturbations
from fgrad.evaluation import evaluate_examples
from fgrad.fixed_point import is_concrete
from fgrad.leaves import Epsilon, Mask, OnGrid, Plan, Policy

MECHANISMS = ("gaussian", "sign", "unanimous")
# The clip bound in units of the integer grid, and the bounds that keep sums in int32.
_UNITS = 2**14
_MOST_EXAMPLES = 2**15
_MOST_NOISE = 2**30
# Norms are computed in floats; their rounding is far below this margin for so many.
_MARGIN = 1 - 2.0**-12
_MOST_DIRECTIONS = 1024


class PrivateForwardGradState(NamedTuple):
    """State of `private_forward_grad`.

    It holds nothing that was computed from the data without noise, such as a loss: the
    state may be published as the weights may. Its ``noise_key`` may not.

    Attributes:
      key: the key that, with ``count``, addresses every z.
      noise_key: the key of the noise, a secret.
      count: int32 scalar, steps taken.
      released: float32 [m], what the last step released: the noisy mean slopes, or
        their signs.
    """

    key: jax.Array
    noise_key: jax.Array
    count: jax.Array  # type: ignore[assignment]  # optax's name, and tuple's
    released: jax.Array


def private_forward_grad(
    key: jax.Array,
    noise_key: jax.Array,
    *,
    clip: float,
    batch_size: int,
    noise_multiplier: float = 0.0,
    mechanism: str = "gaussian",
    epsilon: Epsilon = 1e-3,
    num_perturbations: int = 1,
    perturbation: perturbations.Perturbation | None = None,
    low_bit: OnGrid | None = None,
    vectorize: int = 1,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A gradient of forward passes that hides every single example.

    .. math:: v_{ik} = \frac{l_i(w + εz_k) - l_i(w - εz_k)}{2ε}, \quad
      \bar v_i = v_i \min\left(1, \frac{C}{\|v_i\|}\right), \quad
      c = \frac{1}{B} \left(\sum_i \bar v_i + N(0, σ^2 C^2 I_m)\right), \quad
      ĝ = \frac{1}{m} \sum_k c_k z_k

    The slopes of an example along the m directions of a step are a vector of m numbers.
    It is clipped to the length C and rounded towards zero on a grid of C / 2**14; then
    the sum over the batch is one of integers. Adding an example to the batch, or
    removing it, changes the sum by a vector of length C at most, which holds for the
    integers exactly. The noise is rounded to the grid as well.

    With "gaussian" the step is a Gaussian mechanism of noise multiplier σ, and an
    accountant such as `privacy_spent` says what a run of them costs. That asks for
    batches into which each example comes with the same probability, independently of
    others (Poisson sampling); ``batch_size`` is the number expected. Pad batches to a
    fixed length and multiply the losses by zero for what is padding: such an example
    has no slope.

    "sign" releases the signs of the same numbers, which costs as much privacy, is one
    bit for each direction, and keeps the step's length whatever C is.

    "unanimous" adds no noise. ``update`` gets ``candidates``, bool [examples, M]: the
    batch's part in M subsets of the data, of which one, which is secret, is the
    training set. If the sums of all M subsets have the same sign it is released; else a
    coin decides. Then nothing that is released depends on which of the subsets is the
    secret one. This is PAC privacy with zero mutual information, and it says nothing of
    examples that are in all candidates or in none.

    Args:
      key: PRNG key of the directions, as in ``fixed_point_forward_grad``.
      noise_key: PRNG key of the noise, which must stay secret, and differ.
      clip: C, in units of loss per unit of weight. The length of a gradient times
        :math:`\sqrt m` is what is usual for v.
      batch_size: B, the expected number of examples of a batch.
      noise_multiplier: σ, for "gaussian" and "sign". 0 clips only.
      mechanism: "gaussian", "sign" or "unanimous".
      epsilon: ε in units of the weights, as in ``fixed_point_forward_grad``, like all
        that follow.
      num_perturbations: m, at most 1,024.
      perturbation: where z comes from; ``perturbations.normal()`` by default.
      low_bit: how weights of few bits are trained; they move by the signs of c.
      vectorize: how many directions are evaluated at once, 1 to m.
      mask: leaves to train.

    Returns:
      A transformation whose ``update`` takes ``value_fn`` (or ``obj_fn``), which
      returns losses [examples], each of its own example only: batch normalisation would
      mix them. A slope that is not finite counts as zero.

    Raises:
      TypeError, ValueError: here for bad options; in ``init`` as
        ``fixed_point_forward_grad``; in ``update`` without params or value_fn, for
        losses of another shape, and for more than 32,768 examples.

    Example:
      >>> def losses(w, x, y):
      ...     return (x @ w - y) ** 2
      >>> tx = optax.chain(
      ...     private_forward_grad(
      ...         jax.random.key(0),
      ...         jax.random.key(1),  # in earnest from `secrets.randbits`
      ...         clip=4.0,
      ...         batch_size=64,
      ...         noise_multiplier=1.0,
      ...         num_perturbations=2,
      ...     ),
      ...     optax.sgd(0.1),
      ... )
      >>> x = jax.random.normal(jax.random.key(2), (64, 2))
      >>> w, y = jnp.zeros(2), x @ jnp.array([1.0, -1.0])
      >>> state = tx.init(w)
      >>> step = jax.jit(lambda w, s: tx.update(w, s, w, value_fn=losses, x=x, y=y))
      >>> for _ in range(150):
      ...     updates, state = step(w, state)
      ...     w = optax.apply_updates(w, updates)
      >>> bool(jnp.abs(w - jnp.array([1.0, -1.0])).max() < 0.3)
      True

    Reference:
      Tang et al., "Private fine-tuning of large language models with zeroth-order
      optimization" (DP-ZO, arXiv 2401.04343); Zhang et al., "DPZero" (arXiv
      2310.09639); for "unanimous" Ertan et al., "PACZero" (arXiv 2605.06505).
    """
    _arguments.key(key)
    _arguments.key(noise_key)
    options = _Options(
        clip=clip,
        batch_size=batch_size,
        noise_multiplier=noise_multiplier,
        mechanism=mechanism,
        policy=_arguments.policy(epsilon, num_perturbations, perturbation, low_bit),
        vectorize=vectorize,
        mask=mask,
    )
    _check_secret(key, noise_key)

    def init_fn(params: Any) -> PrivateForwardGradState:
        _arguments.visible(params)
        plan = Plan(params, options.policy, mask=mask)
        plan.check_values()
        plan.check_epsilon()
        return PrivateForwardGradState(
            key=jnp.array(key, copy=True),
            noise_key=jnp.array(noise_key, copy=True),
            count=jnp.zeros([], jnp.int32),
            released=jnp.zeros([num_perturbations], jnp.float32),
        )

    def update_fn(
        updates: Any,
        state: PrivateForwardGradState,
        params: Any = None,
        *,
        value_fn: Callable[..., jax.Array] | None = None,
        obj_fn: Callable[..., jax.Array] | None = None,
        candidates: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[Any, PrivateForwardGradState]:
        del updates
        loss_fn = _arguments.loss("private_forward_grad", params, value_fn, obj_fn)
        _arguments.visible(params)
        named = _arguments.named_arguments(loss_fn, extra_args)
        plan = Plan(params, options.policy, mask=mask, step=state.count)
        return _update(
            options, plan, state, functools.partial(loss_fn, **named), candidates
        )

    return _arguments.link(init_fn, update_fn)


@dataclasses.dataclass(frozen=True)
class _Options:
    """The arguments of `private_forward_grad`, checked."""

    clip: float
    batch_size: int
    noise_multiplier: float
    mechanism: str
    policy: Policy
    vectorize: int
    mask: Mask

    def __post_init__(self) -> None:
        _arguments.count("batch_size", self.batch_size)
        _arguments.count("vectorize", self.vectorize)
        if is_concrete(self.clip) and not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be positive and finite, got {self.clip}.")
        sigma = self.noise_multiplier
        if is_concrete(sigma) and not 0 <= sigma < math.inf:
            raise ValueError(
                f"noise_multiplier must be at least 0 and finite, got {sigma}."
            )
        if self.mechanism not in MECHANISMS:
            raise ValueError(
                f"mechanism must be one of {', '.join(MECHANISMS)}, got "
                f"{self.mechanism!r}."
            )
        if self.mechanism == "unanimous" and is_concrete(sigma) and sigma:
            raise ValueError(
                f'"unanimous" adds no noise, got noise_multiplier={sigma}; leave it '
                "out."
            )
        if self.policy.num_perturbations > _MOST_DIRECTIONS:
            raise ValueError(
                f"num_perturbations must be at most {_MOST_DIRECTIONS} here, got "
                f"{self.policy.num_perturbations}: the bound on an example's part is "
                "proven for so many."
            )


def _update(
    options: _Options,
    plan: Plan,
    state: PrivateForwardGradState,
    losses_fn: Callable[[Any], jax.Array],
    candidates: jax.Array | None,
) -> tuple[Any, PrivateForwardGradState]:
    keys = plan.keys(state.key)
    plus, minus = evaluate_examples(losses_fn, plan, keys, vectorize=options.vectorize)
    _check_batch(options, plus.shape[1], candidates)
    parts = clipped_parts(estimators.spsa(plus, minus, plan.epsilon), options.clip)
    noise_key = jax.random.fold_in(state.noise_key, state.count)
    if candidates is not None and options.mechanism == "unanimous":
        coefficients = unanimous_signs(parts, candidates, noise_key)
    else:
        noisy = noisy_sum(parts, options.noise_multiplier, noise_key)
        coefficients = jnp.sign(noisy)
        if options.mechanism == "gaussian":
            unit = jnp.float32(options.clip) / (_UNITS * options.batch_size)
            coefficients = noisy.astype(jnp.float32) * unit
    signs = jnp.sign(coefficients).astype(jnp.int32)
    return plan.gradient(keys, coefficients, signs), PrivateForwardGradState(
        key=state.key,
        noise_key=state.noise_key,
        count=optax.safe_increment(state.count),
        released=coefficients.astype(jnp.float32),
    )


def clipped_parts(slopes: jax.Array, clip: jax.typing.ArrayLike) -> jax.Array:
    r"""Each example's part in the sum, in integers.

    .. math:: q_i = \left\lfloor 2^{14} \frac{v_i}{\max(C, \|v_i\|)}
      \right\rfloor_0, \quad \sum_k q_{ki}^2 \le 2^{28}

    Args:
      slopes: float32 [m, examples]; those that are not finite count as zero.
      clip: C.

    Returns:
      int32 [m, examples], in units of C / 2**14. The inequality holds for the integers,
      so it bounds what adding or removing an example does to a sum of them.

    Example:
      >>> clipped_parts(jnp.array([[3.0, 0.1], [4.0, 0.0]]), 1.0)
      Array([[ 9828,  1638],
             [13104,     0]], dtype=int32)
    """
    slopes = jnp.where(jnp.isfinite(slopes), slopes, 0).astype(jnp.float32)
    # In units of the largest, whose square cannot overflow.
    largest = jnp.maximum(jnp.max(jnp.abs(slopes), axis=0), 2.0**-100)
    # A compiler may divide by its inverse, which must not be subnormal.
    factor = jnp.where(largest > 2.0**64, jnp.float32(2.0**-64), jnp.float32(1))
    largest = largest * factor
    shares = slopes * factor / largest
    norm = jnp.sqrt(jnp.sum(jnp.square(shares), axis=0))  # 1 to √m, or 0
    # Of the longer of the vector and C, again as a share of the largest.
    length = jnp.maximum(norm, jnp.float32(clip) * factor / largest)
    return jnp.trunc(shares / length * (_UNITS * _MARGIN)).astype(jnp.int32)


def noisy_sum(
    parts: jax.Array, noise_multiplier: jax.typing.ArrayLike, key: jax.Array
) -> jax.Array:
    """The sum over examples with Gaussian noise, both in integers.

    Args:
      parts: int32 [m, examples], from `clipped_parts`.
      noise_multiplier: σ.
      key: of the noise.

    Returns:
      int32 [m]. It is the sum with noise, rounded; to round is no new look at the data.

    Example:
      >>> noisy_sum(jnp.array([[5, -2, 4]]), 0.0, jax.random.key(0))
      Array([7], dtype=int32)
    """
    noise = jax.random.normal(key, parts.shape[:1], jnp.float32)
    steps = jnp.round(noise * (jnp.float32(noise_multiplier) * _UNITS))
    steps = jnp.clip(steps, -_MOST_NOISE, _MOST_NOISE).astype(jnp.int32)
    return jnp.sum(parts, axis=1, dtype=jnp.int32) + steps


def unanimous_signs(
    parts: jax.Array, candidates: jax.Array, key: jax.Array
) -> jax.Array:
    """The sign of which all candidates are, or that of a coin.

    Args:
      parts: int32 [m, examples], from `clipped_parts`.
      candidates: bool [examples, M], which examples belong to each subset.
      key: of the coins.

    Returns:
      int32 [m] of -1 and 1. It is the same whichever subset is the secret.

    Example:
      >>> subsets = jnp.array([[True, False], [False, True]])
      >>> unanimous_signs(jnp.array([[3, 1], [-2, -5]]), subsets, jax.random.key(0))
      Array([ 1, -1], dtype=int32)
    """
    chosen = candidates.astype(bool)

    def of_direction(part: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(chosen, part[:, None], 0), axis=0, dtype=jnp.int32)

    sums = jax.lax.map(of_direction, parts)  # [m, M]
    coins = jnp.where(jax.random.bernoulli(key, shape=parts.shape[:1]), 1, -1)
    up, down = jnp.all(sums > 0, axis=1), jnp.all(sums < 0, axis=1)
    return jnp.where(up, 1, jnp.where(down, -1, coins)).astype(jnp.int32)


def privacy_spent(
    *, noise_multiplier: float, sampling_probability: float, steps: int, delta: float
) -> float:
    """The ε of (ε, δ) differential privacy that a run of `private_forward_grad` costs.

    Neighbours are data sets of which one has one example more. The number of directions
    does not matter, for an example's slopes are clipped together.

    Args:
      noise_multiplier: σ of each step.
      sampling_probability: with which each example comes into a batch.
      steps: of the run. Runs that tuned its settings on the same data cost as well.
      delta: δ; well below one over the number of examples.

    Returns:
      ε, from the privacy loss distribution of the package dp-accounting; infinite
      without noise.

    Raises:
      ModuleNotFoundError: without dp-accounting, which the extra ``privacy`` installs.
      ValueError: for numbers out of range.

    Reference:
      Doroshenko et al., "Connect the dots: tighter discrete approximations of privacy
      loss distributions", PETS 2022, as implemented in Google's dp-accounting.
    """
    if not 0 < sampling_probability <= 1 or not 0 < delta < 1 or steps < 1:
        raise ValueError(
            "sampling_probability must lie in (0, 1], delta in (0, 1), and steps must "
            f"be positive, got {sampling_probability}, {delta} and {steps}."
        )
    if not noise_multiplier >= 0:
        raise ValueError(f"noise_multiplier must be >= 0, got {noise_multiplier}.")
    if noise_multiplier == 0:
        return math.inf
    try:
        import dp_accounting
        from dp_accounting.pld import PLDAccountant
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "privacy_spent needs the package dp-accounting: pip install "
            "'fgrad[privacy]'."
        ) from error
    event = dp_accounting.GaussianDpEvent(noise_multiplier)
    if sampling_probability < 1:
        event = dp_accounting.PoissonSampledDpEvent(sampling_probability, event)
    accountant = PLDAccountant()
    accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))


def _check_batch(
    options: _Options, examples: int, candidates: jax.Array | None
) -> None:
    if examples > _MOST_EXAMPLES:
        raise ValueError(
            f"a batch of {examples} examples is more than {_MOST_EXAMPLES}, whose "
            "integer sum could overflow int32; take smaller batches."
        )
    if (candidates is None) == (options.mechanism == "unanimous"):
        raise ValueError(
            f"candidates= belongs to mechanism='unanimous', got {options.mechanism!r} "
            f"{'without' if candidates is None else 'with'} it."
        )
    if candidates is not None and (
        jnp.ndim(candidates) != 2 or jnp.shape(candidates)[0] != examples
    ):
        raise ValueError(
            f"candidates must be bool [{examples}, M], which examples of the batch "
            f"belong to each subset, got shape {jnp.shape(candidates)}."
        )


def _check_secret(key: jax.Array, noise_key: jax.Array) -> None:
    """Raises if the noise is drawn from the key that everybody may know."""
    a, b = (jax.random.key_data(k) for k in (key, noise_key))
    if is_concrete(a) and is_concrete(b) and jnp.array_equal(a, b):
        raise ValueError(
            "key and noise_key are the same: whoever knows the directions would know "
            "the noise. Draw the noise from a key of its own that stays secret."
        )
