"""The optax links: estimate a gradient, land on the weight grid, and both in one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fgrad import (
    _arguments,
    _checks,
    _loss_and_aux,
    estimators,
    fixed_point,
    perturbations,
)
from fgrad.fixed_point import as_update, is_qtensor, stored, with_stored
from fgrad.leaves import (
    Epsilon,
    Guide,
    Mask,
    OnGrid,
    Plan,
    Policy,
    on_grid,
    trained_leaves,
)
from fgrad.leaves import epsilon as epsilons
from fgrad.spread import Spread
from fgrad.tracing import compiled_once, execution_order


class ForwardGradState(NamedTuple):
    """State of `fixed_point_forward_grad`.

    Attributes:
      key: the key that, with ``count``, addresses every z.
      count: int32 scalar, steps taken.
      loss: float32 scalar, mean over the last step's 2m evaluations; inf before it.
      loss_differences: float32 [m], ``L₊ - L₋`` of the last step's pairs.
      nonfinite_pairs: int32 scalar, pairs that the last step left out.
      frozen_fraction: float32 scalar, share of the trained weights that the last
        step's epsilon could not move: on a grid ``ε_q = 0``, of floats those to which
        the largest εz is too little to be added.
      guide: state of the ``guide``, or empty.
      aux: with ``has_aux`` what the loss of the last step came with, before it
        ``initial_aux``; or empty.
      losses: float32 [2, m], L₊ and L₋ of the last step's pairs. With the key and the
        count they are all that is needed to make the step again; see `fgrad.RunLog`.
    """

    key: jax.Array
    count: jax.Array  # type: ignore[assignment]  # optax's name, and tuple's
    loss: jax.Array
    loss_differences: jax.Array
    nonfinite_pairs: jax.Array
    frozen_fraction: jax.Array
    guide: Any = ()
    aux: Any = ()
    losses: Any = ()


class QuantizedUpdateState(NamedTuple):
    """State of `quantized_update`.

    Attributes:
      moved_fraction: float32 scalar, share of the trained weights whose stored value
        the last update changed.
    """

    moved_fraction: jax.Array


def fixed_point_forward_grad(
    key: jax.Array,
    *,
    epsilon: Epsilon = 1e-3,
    num_perturbations: int = 3,
    perturbation: perturbations.Perturbation | None = None,
    low_bit: OnGrid | None = None,
    estimator: estimators.Estimator | None = None,
    vectorize: int = 1,
    mask: Mask = None,
    on_nonfinite: str = "skip",
    guide: Guide | None = None,
    has_aux: bool = False,
    initial_aux: Any = (),
    spread: Spread | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the incoming updates by a gradient made of forward passes only.

    .. math:: ĝ = \frac{1}{m} \sum_{i=1}^m sign(L(w + εz_i) - L(w - εz_i)) z_i

    The gradient has the structure of params and is in units of loss per unit of
    weight, for float and `QTensor` leaves alike, so any optax optimizer can follow:
    SGD as it is, one with moments or weight decay inside `on_values`.

    Args:
      key: PRNG key; z is a function of it, the step, the index i, the leaf's path
        and shape.
      epsilon: perturbation scale ε in units of the weights, or an optax schedule; or
        one for each leaf, by ``fgrad.relative_epsilon`` or ``fgrad.step_epsilon``.
      num_perturbations: m, the number of directions; a step costs 2m forward passes.
      perturbation: where z comes from; ``perturbations.normal()`` by default.
      low_bit: ``fgrad.on_grid(learning_rate)`` trains weights of less than 16 bits by
        sparse integer steps; by default they are treated as those of 16.
      estimator: `estimators.sign_m_spsa`, `estimators.normalized_spsa` or
        `estimators.spsa`.
      vectorize: how many directions are evaluated at once, 1 to m. It trades memory
        for speed. The directions are the same; the losses may differ in their last
        bits, since XLA adds up in another order.
      mask: leaves to train: a pytree of bools, a prefix of one, or a function from
        params to it. Use it rather than ``optax.masked``, which would hide leaves
        from ``value_fn``.
      on_nonfinite: "skip" leaves out a pair with a NaN or infinite loss and counts it
        in the state; "raise" stops the program. ``optax.apply_if_finite`` looks at
        incoming updates, which are ignored here: put it around the optimizer only.
      guide: draws z around a direction that it keeps in the state, such as
        ``enhancements.momentum_guided_sampling()``; none by default.
      has_aux: whether ``value_fn`` returns ``(loss, aux)``, where aux is a pytree of
        arrays such as metrics or the statistics of batch normalisation. The state's
        ``aux`` is that of the last evaluation, ``w - εz`` of the last pair; losses
        that are not finite are passed over, unless all are. The aux of all 2m
        evaluations is in memory until then.
      initial_aux: the state's ``aux`` before the first step. It gives the state its
        structure, which must not change in ``lax.scan``, ``optax.MultiSteps`` and
        ``nnx.Optimizer``. By default it is ``()``, and the first step changes it.
      spread: how the devices of a mesh share the evaluations, such as
        ``fgrad.Spread(mesh, pairs="seeds")``; with None the compiler decides.

    Returns:
      A transformation whose ``update`` takes ``value_fn`` (or ``obj_fn``), called as
      ``value_fn(params, **those of the extra arguments that it names)``; or instead
      ``losses``, an array [2, m] of the losses ``L₊`` and ``L₋`` that were evaluated
      elsewhere. Outside ``jax.jit`` it traces the loss at every call, and compiles what
      it did not compute before; inside, both are done once.

    Raises:
      TypeError, ValueError: here for bad options; in ``init`` for an integer leaf
        that is no `QTensor`, for a `QTensor` whose scale or integers are not those of
        a grid, and for an epsilon of at most half a weight step; in
        ``update`` without params or value_fn, for a loss that is no scalar, and for
        an aux that is not like ``initial_aux``.

    Example:
      >>> tx = optax.chain(
      ...     fixed_point_forward_grad(jax.random.key(0), epsilon=1e-2),
      ...     optax.sgd(0.01),
      ...     quantized_update(),
      ... )
      >>> params = fixed_point.quantize({"w": jnp.array([1.0, -2.0])}, bits=16)
      >>> state = tx.init(params)
      >>> loss_fn = lambda params, batch: jnp.sum((params["w"] * batch) ** 2)
      >>> zeros = jax.tree.map(jnp.zeros_like, params)
      >>> updates, state = tx.update(
      ...     zeros, state, params, value_fn=loss_fn, batch=jnp.ones(2)
      ... )
      >>> optax.apply_updates(params, updates)["w"].qvalue.dtype
      dtype('int16')

    Reference:
      Feng et al., "Stepping Forward on the Last Mile", NeurIPS 2024, section 3.
    """
    _arguments.key(key)
    policy = _arguments.policy(epsilon, num_perturbations, perturbation, low_bit)
    estimator = _arguments.estimator(
        estimator,
        estimators.sign_m_spsa,
        "fgrad.estimators.sign_m_spsa, normalized_spsa or spsa",
    )
    vectorize = _arguments.count("vectorize", vectorize)
    _check_together(policy, vectorize, guide)
    _arguments.spread(spread, policy.num_perturbations, vectorize)
    _checks.choice("on_nonfinite", on_nonfinite, ("skip", "raise"))

    aux = _loss_and_aux.Aux.of(has_aux, initial_aux)
    if aux.expected and spread is not None:
        raise ValueError(
            "has_aux=True and spread= do not go together, since each device evaluates "
            "losses of its own; leave out one of them, and compute what the loss "
            "returns beside its value by a call of its own."
        )
    how = {
        "vectorize": vectorize,
        "on_nonfinite": on_nonfinite,
        "spread": spread,
        "has_aux": aux.expected,
    }
    link = _ForwardGrad(key, policy, estimator, mask, guide, aux, how)

    def update_fn(
        updates: Any,
        state: ForwardGradState,
        params: Any = None,
        *,
        value_fn: Callable[..., jax.Array] | None = None,
        obj_fn: Callable[..., jax.Array] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, ForwardGradState]:
        del updates
        _arguments.visible(params)
        if _arguments.has_losses(value_fn, obj_fn, extra_args):
            return link.step_from(extra_args["losses"], params, state)
        loss_fn = _arguments.loss("fixed_point_forward_grad", params, value_fn, obj_fn)
        kwargs = _arguments.named_arguments(loss_fn, extra_args)
        return link.step(loss_fn, kwargs, params, state)

    return _arguments.link(link.init, update_fn, spread)


class _ForwardGrad(NamedTuple):
    """`fixed_point_forward_grad`, its options being those, checked.

    Attributes:
      how: the arguments of `estimators.estimate` that say how losses are evaluated.
    """

    key: jax.Array
    policy: Policy
    estimator: estimators.Estimator
    mask: Mask
    guide: Guide | None
    aux: _loss_and_aux.Aux
    how: dict[str, Any]

    def init(self, params: Any) -> ForwardGradState:
        """The state before the first step."""
        _arguments.visible(params)
        plan = Plan(params, self.policy, mask=self.mask)
        plan.check_values()
        plan.check_epsilon()
        guide = self.guide
        pairs = self.policy.num_perturbations
        return ForwardGradState(
            key=jnp.array(self.key, copy=True),
            count=jnp.zeros([], jnp.int32),
            loss=jnp.array(jnp.inf, jnp.float32),
            loss_differences=jnp.zeros([pairs], jnp.float32),
            nonfinite_pairs=jnp.zeros([], jnp.int32),
            frozen_fraction=jnp.zeros([], jnp.float32),
            guide=guide.init(params, plan.guided_mask) if guide else (),
            aux=self.aux.at_first(),
            losses=jnp.zeros([2, pairs], jnp.float32),
        )

    def step(
        self,
        loss_fn: Callable[..., jax.Array],
        kwargs: dict[str, Any],
        params: Any,
        state: ForwardGradState,
    ) -> tuple[Any, ForwardGradState]:
        """The gradient of a loss at params, and the state after the step."""

        def estimate(plan: Plan, key: jax.Array) -> estimators.Estimate:
            return estimators.estimate(
                loss_fn, plan, key, estimator=self.estimator, kwargs=kwargs, **self.how
            )

        return self._stepped(estimate, params, state)

    def step_from(
        self, losses: Any, params: Any, state: ForwardGradState
    ) -> tuple[Any, ForwardGradState]:
        """The same of losses [2, m] that were evaluated elsewhere."""
        _arguments.given("fixed_point_forward_grad", params)
        plus, minus = _arguments.losses(losses, self.policy.num_perturbations)

        def estimate(plan: Plan, key: jax.Array) -> estimators.Estimate:
            return estimators.estimate_from_losses(
                plan, plan.keys(key), plus, minus, self.estimator
            )

        return self._stepped(estimate, params, state)

    def _stepped(
        self,
        estimate: Callable[[Plan, jax.Array], estimators.Estimate],
        params: Any,
        state: ForwardGradState,
    ) -> tuple[Any, ForwardGradState]:
        """The gradient that ``estimate(plan, key)`` makes, and the next state."""
        plan = Plan(params, self.policy, mask=self.mask, step=state.count)
        frozen = plan.frozen_fraction()
        guide, names = self.guide, plan.guidable
        if guide:
            plan = plan.guided(guide.at(state.guide, state.count, names))
        # The weights are counted before anything else reads them. A count after the
        # update would make a donated buffer be copied.
        found = estimate(plan, execution_order.delayed_key(state.key, frozen))
        gradient = found.gradient
        return gradient, ForwardGradState(
            key=state.key,
            count=optax.safe_increment(state.count),
            loss=found.loss,
            loss_differences=found.loss_differences,
            nonfinite_pairs=found.nonfinite_pairs,
            frozen_fraction=frozen,
            guide=guide.advance(state.guide, gradient, names) if guide else (),
            aux=self.aux.checked(found.aux),
            losses=found.losses,
        )


def _check_together(policy: Policy, vectorize: int, guide: Guide | None) -> None:
    perturbation = policy.perturbation
    if vectorize > policy.num_perturbations:
        raise ValueError(
            f"vectorize={vectorize} exceeds num_perturbations="
            f"{policy.num_perturbations}; it is the number of perturbations evaluated "
            "at once."
        )
    if guide is None:
        return
    if isinstance(guide, type) or not isinstance(guide, Guide):
        raise TypeError(
            "guide must have the methods of fgrad.leaves.Guide, got "
            f"{guide!r}; use for example "
            "fgrad.enhancements.momentum_guided_sampling()."
        )
    if isinstance(perturbation, perturbations.LowRank):
        raise ValueError(
            f"a guide makes z dense, and {perturbation.name} shares products between "
            "perturbations of low rank; use fgrad.perturbations.normal() with a guide."
        )


def quantized_update(
    *, stochastic_below: int = 16, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    r"""Rounds updates to the weight grid; the last link of the chain.

    .. math:: \bar w_q = \lfloor u / Δ_w \rceil, \quad
      u_q = clip(w_q + \bar w_q) - w_q

    For a `QTensor` leaf the update becomes an int32 number of grid steps, so that
    ``optax.apply_updates`` keeps int16 or int8 storage and never leaves the grid. A
    NaN in an update counts as no change. Float leaves pass through.

    Weights of few bits have steps so long that most updates are a fraction of one, and
    the nearest integer to those is always zero. For them a fraction f is rounded up
    with probability f, so that they move by their update on average. Whole numbers of
    steps, which ``fgrad.on_grid`` makes, are taken as they are. Links between the two
    that rescale updates, such as ``optax.clip_by_global_norm``, or average them leave
    fractions, and this rounding keeps such chains moving. Its random numbers are a
    hash of the update itself: the same update is rounded in the same way.

    Args:
      stochastic_below: leaves of fewer bits are rounded in this way; 0 rounds all to
        the nearest, as the paper does.
      mask: leaves that may move, as in `fixed_point_forward_grad`; the update of any
        other is exactly zero, whatever the links before did.

    Returns:
      A transformation whose state holds ``moved_fraction``.

    Raises:
      ValueError: here for an impossible ``stochastic_below``; in ``update`` without
        params.

    Example:
      >>> params = fixed_point.quantize(jnp.array([1.0]), bits=16, headroom=1.0)
      >>> tx = quantized_update()
      >>> updates = fixed_point.as_gradient(params, jnp.array([-8e-5]))
      >>> updates, state = tx.update(updates, tx.init(params), params)
      >>> updates.qvalue, float(state.moved_fraction)  # -8e-5 / (1 / 32767) = -2.6
      (Array([-3], dtype=int32), 1.0)

    Reference:
      Equation (8) of Feng et al. 2024.
    """
    stochastic_below = _checks.integer(
        "stochastic_below, in bits,", stochastic_below, 0, 17
    )

    def init_fn(params: Any) -> QuantizedUpdateState:
        trained_leaves(mask, params)
        return QuantizedUpdateState(moved_fraction=jnp.zeros([], jnp.float32))

    def update_fn(
        updates: Any,
        state: QuantizedUpdateState,
        params: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, QuantizedUpdateState]:
        del state, extra_args
        _arguments.given("quantized_update", params)
        trained = trained_leaves(mask, params)
        updates, moved = _updates_on_the_grid(
            params, updates, trained=trained, stochastic_below=stochastic_below
        )
        return updates, QuantizedUpdateState(moved_fraction=moved)

    return _arguments.link(init_fn, update_fn)


@compiled_once.compiled("trained", "stochastic_below")
def _updates_on_the_grid(
    params: Any, updates: Any, *, trained: tuple[bool, ...], stochastic_below: int
) -> tuple[Any, jax.Array]:
    """The updates that leaves can take, and the share of the weights that move."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_qtensor)
    given = treedef.flatten_up_to(updates)
    at = [i for i, on in enumerate(trained) if on]
    small = [i for i in at if _is_small(leaves[i])]
    steps, number = _steps_together(
        [leaves[i] for i in small], [given[i] for i in small], stochastic_below
    )
    found = dict(zip(small, steps, strict=True))
    last: jax.Array | None = None
    for i in at:
        if i in found:
            continue
        found[i], count, last = _steps_of(leaves[i], given[i], stochastic_below, last)
        number += count
    for i, (leaf, update) in enumerate(zip(leaves, given, strict=True)):
        if i not in found:
            kind = jnp.int32 if is_qtensor(leaf) else None
            found[i] = jnp.zeros_like(stored(update), kind)
    size = sum(float(jnp.size(leaves[i])) for i in at)  # it may be beyond int32
    on_grid = [as_update(leaf, found[i]) for i, leaf in enumerate(leaves)]
    return treedef.unflatten(on_grid), number / max(size, 1)


def _is_small(leaf: Any) -> bool:
    """Whether a leaf has a count together with all other small ones."""
    array = stored(leaf)
    return array.size <= perturbations.SMALL and not execution_order.is_spread(array)


def _steps_together(
    leaves: Sequence[Any], updates: Sequence[Any], stochastic_below: int
) -> tuple[list[jax.Array], jax.Array]:
    """The updates that small leaves can take, and how many of their weights move.

    A sum for each of many biases takes longer to compile than to run.
    """
    if not leaves:
        return [], jnp.float32(0)
    found, moved = [], []
    for leaf, update in zip(leaves, updates, strict=True):
        salt = _salt(leaf, update, stochastic_below)
        steps, moves = _on_the_grid(leaf, update, salt)
        found.append(steps)
        moved.append(moves.reshape(-1))
    count = jnp.sum(jnp.concatenate(moved), dtype=jnp.float32)
    return [execution_order.delayed(steps, count) for steps in found], count


def _steps_of(
    leaf: Any, update: Any, stochastic_below: int, last: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The update that a leaf can take, how many of its weights move, and its weights.

    An update waits for its count. If the count compared with the new weights instead,
    a donated buffer would be copied to keep the old ones.

    A GPU would store the steps that it counted, in four bytes for each weight, for the
    update that waits. On a grid they are found again: then it stores z, in one. Floats
    are not, since what is added to them is rounded by what it is compiled with.

    Args:
      leaf: the weights.
      update: from an optimizer.
      stochastic_below: bits below which steps are rounded up or down at random.
      last: the weights of the leaf before, which are made first on a GPU. So it stores
        the z of one leaf at a time.
    """
    if is_qtensor(leaf) and last is not None and not execution_order.is_spread(last):
        leaf = dataclasses.replace(leaf, scale=_made_after(leaf.scale, last))
    salt = _salt(leaf, update, stochastic_below)
    steps, moves = _on_the_grid(leaf, update, salt)
    count = jnp.sum(moves, dtype=jnp.float32)
    if not is_qtensor(leaf):
        return execution_order.delayed(steps, count), count, last
    scale = execution_order.delayed(leaf.scale, count)
    later = dataclasses.replace(leaf, scale=scale)
    steps, _ = _on_the_grid(later, update, salt)
    # As `optax.apply_updates` makes them, so that they are made once.
    return steps, count, (leaf.qvalue + steps).astype(leaf.qvalue.dtype)


def _made_after(scale: jax.Array, weights: jax.Array) -> jax.Array:
    """The same scale, on a GPU not before an array of new weights is stored.

    A CPU drops the barrier. It would read the old weights again, after they have been
    overwritten, and copy them for that.
    """

    def later(scale: jax.Array, weights: jax.Array) -> jax.Array:
        made = jax.lax.optimization_barrier(weights)
        return execution_order.delayed(scale, made)

    found: jax.Array = jax.lax.platform_dependent(
        scale, weights, cpu=lambda scale, _: scale, default=later
    )
    return found


def _on_the_grid(
    leaf: Any, update: Any, salt: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The update that a leaf can take, and for each weight whether it moves.

    Args:
      leaf: the weights.
      update: from an optimizer.
      salt: from `_salt`.
    """
    if not is_qtensor(leaf):
        return update, (leaf + update).astype(jnp.result_type(leaf)) != leaf
    exact = update.qvalue / leaf.scale
    steps = jnp.round(exact) if salt is None else _rounded_up_or_down(exact, salt)
    steps = jnp.nan_to_num(steps, nan=0.0)
    steps = jnp.clip(steps, -(2.0**30), 2.0**30).astype(jnp.int32)
    steps = fixed_point.update_qvalue(leaf.qvalue, steps, leaf.bits)
    return steps, steps != 0


def _salt(leaf: Any, update: Any, stochastic_below: int) -> jax.Array | None:
    """A uint32 [1] that differs between updates, for the words of their rounding.

    None for a leaf whose update is rounded to the nearest, or not at all.
    """
    if not is_qtensor(leaf):
        return None
    if not is_qtensor(update):
        raise TypeError(
            f"the update of a QTensor is a {type(update).__name__} of shape "
            f"{jnp.shape(update)}; quantized_update takes what an estimator of fgrad "
            "and the links after it make."
        )
    if leaf.bits >= stochastic_below:
        return None
    exact = (update.qvalue / leaf.scale).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(exact, jnp.uint32)
    return jnp.sum(bits, dtype=jnp.uint32).reshape(1)


def _rounded_up_or_down(exact: jax.Array, salt: jax.Array) -> jax.Array:
    """Rounds a fraction f up with probability f; what is whole but for noise stays."""
    nearest, floor = jnp.round(exact), jnp.floor(exact)

    def hashes(salt: jax.Array) -> jax.Array:
        return perturbations.hashed(salt, perturbations.row_major(exact.shape))

    words = execution_order.laid_out(hashes, exact, salt)
    # 24 bits, all of which a float32 can tell apart.
    uniform = (words >> 8).astype(jnp.float32) * 2.0**-24
    drawn = floor + (uniform < exact - floor)
    return jnp.where(jnp.abs(exact - nearest) < 2.0**-10, nearest, drawn)


def on_values(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Lets an optimizer see the values of `QTensor` leaves, not their integers.

    An optimizer makes its moments like the parameters and adds weight decay to them.
    For a `QTensor` those would be its integers: moments cut to int16, and decay in
    grid steps. Between the estimator and `quantized_update`, wrap any optimizer that
    has moments or reads the parameters. Plain SGD does neither and needs no wrapper.

    Args:
      inner: any optax transformation.

    Returns:
      The same transformation on float32 arrays in the place of `QTensor` leaves. Its
      moments take four bytes for each weight, like those of any optimizer.

    Example:
      >>> tx = optax.chain(
      ...     fixed_point_forward_grad(jax.random.key(0), epsilon=1e-2),
      ...     on_values(optax.adamw(1e-3)),
      ...     quantized_update(),
      ... )
      >>> state = tx.init(fixed_point.quantize({"w": jnp.array([1.0, -2.0])}))
      >>> optax.tree.get(state, "mu")["w"].dtype
      dtype('float32')
    """
    inner = _arguments.transformation(inner, "optax.adam(1e-3)")

    def init_fn(params: Any) -> Any:
        return inner.init(fixed_point.dequantize(params))

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        values = jax.tree.map(
            lambda u: u.qvalue if is_qtensor(u) else u, updates, is_leaf=is_qtensor
        )
        floats = None if params is None else fixed_point.dequantize(params)
        values, state = inner.update(values, state, floats, **extra_args)
        updates = jax.tree.map(with_stored, updates, values, is_leaf=is_qtensor)
        return updates, state

    return _arguments.link(init_fn, update_fn)


def qzo_ff(
    learning_rate: optax.ScalarOrSchedule,
    key: jax.Array,
    *,
    epsilon: Epsilon = 1e-3,
    num_perturbations: int = 3,
    perturbation: perturbations.Perturbation | None = None,
    low_bit: OnGrid | bool = True,
    estimator: estimators.Estimator | None = None,
    vectorize: int = 1,
    mask: Mask = None,
    on_nonfinite: str = "skip",
    has_aux: bool = False,
    initial_aux: Any = (),
    spread: Spread | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""QZO-FF: sign-m-SPSA with SGD, in fixed point where the leaves are.

    .. math:: w_q \leftarrow clip(w_q - \lfloor η ĝ / Δ_w \rceil)

    The chain `fixed_point_forward_grad`, ``optax.sgd``, `quantized_update`, with the
    paper's defaults.

    Args:
      learning_rate: η in units of the weights, or an optax schedule.
      key: PRNG key.
      epsilon: see `fixed_point_forward_grad`, as for all that follow.
      num_perturbations: m.
      perturbation: where z comes from.
      low_bit: how weights of less than 16 bits are trained: True for
        ``fgrad.on_grid(learning_rate)``, False for the paper's way, which leaves most
        of them where they are.
      estimator: how losses become coefficients of z.
      vectorize: how many directions are evaluated at once.
      mask: leaves to train.
      on_nonfinite: what to do with a NaN or infinite loss.
      has_aux: whether ``value_fn`` returns ``(loss, aux)``.
      initial_aux: the state's ``aux`` before the first step.
      spread: how devices share the evaluations.

    Returns:
      A transformation; see `fixed_point_forward_grad` for its ``update``.

    Example:
      >>> loss_fn = lambda w: jnp.sum(jnp.asarray(w) ** 2)
      >>> tx = qzo_ff(1e-2, jax.random.key(0))
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(params, state, params, value_fn=loss_fn)
      ...     return optax.apply_updates(params, updates), state
      >>> params = fixed_point.quantize(jnp.array([1.0, -2.0]), bits=16)
      >>> state = tx.init(params)
      >>> for _ in range(300):
      ...     params, state = step(params, state)
      >>> bool(abs(params.dequantize()).max() < 0.05)
      True

    Reference:
      Feng et al. 2024, equations (6) to (8).
    """
    if isinstance(low_bit, bool) and low_bit:
        low_bit = on_grid(learning_rate)
    else:
        epsilons.check("learning_rate", learning_rate)
    low_bit = None if low_bit is False else low_bit
    if isinstance(learning_rate, np.integer):  # of no sign it may be, and SGD has one
        learning_rate = float(learning_rate)
    chain = optax.chain(
        fixed_point_forward_grad(
            key,
            epsilon=epsilon,
            num_perturbations=num_perturbations,
            perturbation=perturbation,
            low_bit=low_bit,
            estimator=estimator,
            vectorize=vectorize,
            mask=mask,
            on_nonfinite=on_nonfinite,
            has_aux=has_aux,
            initial_aux=initial_aux,
            spread=spread,
        ),
        optax.sgd(learning_rate),
        quantized_update(mask=mask),
    )
    return _arguments.link(chain.init, chain.update)
