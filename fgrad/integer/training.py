r"""QZO-FF in integers: perturb, compare two losses, update.

.. math::
  w_q^{\pm} &= clip(w_q \pm \lfloor ε_q z_q Δ_z \rceil), \quad
  ε_q = \lfloor ε/Δ_w \rceil

  c_i &= sign(L(w_q^{+}) - L(w_q^{-}))

  w_q &← clip(w_q - \lfloor \tfrac{μ}{2^s} \sum_i c_i z_{q,i} \rceil), \quad
  \tfrac{μ}{2^s} ≈ \frac{η Δ_z}{m Δ_w}

Equations (6) to (8) of the paper, with the learning rate as a multiplier and a shift.
z comes from a hash of its address, the same that ``fgrad.fixed_point_forward_grad``
draws. Weights of less than 16 bits move by whole grid steps, as ``fgrad.on_grid`` does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fgrad import _arguments, _checks, fixed_point, perturbations
from fgrad import spread as spreads
from fgrad.fixed_point import QTensor, is_qtensor
from fgrad.integer import arithmetic, ranges
from fgrad.integer import exact_head as exact_heads
from fgrad.integer import loss as losses
from fgrad.integer.addresses import Address, Words, address_of, counter_hash, fold_in
from fgrad.integer.convert import Program, integers
from fgrad.integer.exact_head import ExactHead
from fgrad.integer.ranges import INT32
from fgrad.spread import Spread

# Coefficients of a pair are multiples of 1/64.
_COEFFICIENT_BITS = 6
# How much wider than the update the probe of a weight on its grid is, first and at
# most, found in runs on digits with `fgrad.on_grid`.
PROBE = (4, 16)
_RATE_BITS = 15


class State(NamedTuple):
    """What a step keeps beside the weights.

    Attributes:
      key: uint32 [2], the words of the key that every z is addressed by.
      count: int32 scalar, steps taken.
      loss: int32 scalar, the last step's first loss; 0 before it.
      differences: int32 [m], ``L₊ - L₋`` of the last step's pairs; zero if no leaf is
        perturbed.
    """

    key: jax.Array
    count: jax.Array  # type: ignore[assignment]  # the name that optax has, and tuple's
    loss: jax.Array
    differences: jax.Array


@dataclasses.dataclass(frozen=True)
class Rounded:
    """How a leaf of 16 bits moves: equations (6) to (8).

    Attributes:
      address: of its z.
      bits: width of its grid.
      epsilon_q: ε in grid steps, an array if channels have scales of their own.
      rate: (multiplier, shift) of the update, or two arrays.
      table: int8 z by the bits that choose it.
      per_word: how many values a random word makes.
      step: Δ_z.
    """

    address: Address
    bits: int
    epsilon_q: int | np.ndarray
    rate: tuple[int, int] | tuple[np.ndarray, np.ndarray]
    table: np.ndarray
    per_word: int
    step: float

    def z(self, key: Words, decay: Any) -> jax.Array:
        """int32 z of a key's words."""
        del decay
        width = 32 // self.per_word
        index = self.address.indices(key[0])
        words = counter_hash(key, index >> (self.per_word.bit_length() - 1))
        place = (index & np.uint32(self.per_word - 1)) * np.uint32(width)
        field = (words >> place) & np.uint32(2**width - 1)
        table = jnp.asarray(self.table)
        z = table.at[field.astype(jnp.int32)].get(
            mode="promise_in_bounds", wrap_negative_indices=False
        )
        return z.astype(jnp.int32)

    def perturbed(
        self, q: jax.Array, z: jax.Array, sign: jax.Array, decay: Any
    ) -> jax.Array:
        """``w ± εz`` on the grid."""
        del decay
        epsilon_q: Any = self.epsilon_q
        if isinstance(epsilon_q, np.ndarray):  # a table, which is read as it is
            z = z * sign
        else:
            epsilon_q = epsilon_q * sign
        return fixed_point.perturb_qvalue(q, z, epsilon_q, self.step, self.bits)

    def updated(
        self, q: jax.Array, total: jax.Array, bound: int, decay: Any
    ) -> jax.Array:
        """The weights after an update by ``Σ c z``, of magnitude up to ``bound``."""
        most, shift = self.rate
        if isinstance(most, np.ndarray):
            change = ranges.multiply_channels(
                total, most, np.asarray(shift), bound, decay
            )
        else:
            multiplier: Any = most if decay is None else (most * decay) >> _RATE_BITS
            change = ranges.multiply(total, multiplier, int(shift), bound, most)
        limit = fixed_point.max_qvalue(self.bits)
        return jnp.clip(q.astype(jnp.int32) - change, -limit, limit).astype(q.dtype)


@dataclasses.dataclass(frozen=True)
class OnGrid:
    """How a leaf of few bits moves: by whole, sparse grid steps.

    Attributes:
      address: of its z.
      bits: width of its grid.
      largest: M, the size of a non-zero z; an array if channels have scales of their
        own.
      threshold: P(z ≠ 0) times 2**31, uint32 of the same shape.
      probe: how much wider than the update the probe is, first and at most.
    """

    address: Address
    bits: int
    largest: np.ndarray
    threshold: np.ndarray
    probe: tuple[int, int]

    def z(self, key: Words, decay: Any) -> jax.Array:
        """int32 z of a key's words: -M, 0 or M."""
        words = counter_hash(key, self.address.indices(key[0]))
        threshold: Any = self.threshold
        if decay is not None:  # the probability falls as the square of the rate
            share = (decay * decay >> _RATE_BITS).astype(jnp.uint32)
            threshold = (threshold >> 16) * share << 1
        sign = 1 - 2 * (words & 1).astype(jnp.int32)
        return jnp.where(words >> 1 < threshold, sign * self.largest, 0)

    def perturbed(
        self, q: jax.Array, z: jax.Array, sign: jax.Array, decay: Any
    ) -> jax.Array:
        """``w ± κz`` on the grid."""
        first, most = self.probe
        widening: Any = first
        if decay is not None:
            widening = jnp.clip((first << _RATE_BITS) // jnp.maximum(decay, 1), 1, most)
        limit = fixed_point.max_qvalue(self.bits)
        moved = q.astype(jnp.int32) + sign * widening * z
        return jnp.clip(moved, -limit, limit).astype(q.dtype)

    def updated(
        self, q: jax.Array, total: jax.Array, bound: int, decay: Any
    ) -> jax.Array:
        """The weights after the steps ``Σ c z``."""
        del bound, decay
        limit = fixed_point.max_qvalue(self.bits)
        return jnp.clip(q.astype(jnp.int32) - total, -limit, limit).astype(q.dtype)


Rule = Rounded | OnGrid


class TrainStep:
    """One step of training on integers; made by `train_step`.

    ``step(weights, state, (encoded, labels)) -> (weights, state)`` is a pure function
    that ``jax.jit``, ``lax.scan``, ``jax.export`` and `fgrad.integer.to_c` take.

    Attributes:
      program: what is trained.
      rules: how each leaf that is perturbed moves, by its place among the leaves.
      head: the last layer, if it learns by its exact gradient. Other leaves stay.
      num_perturbations: m; 1 if no leaf is perturbed.
    """

    def __init__(
        self,
        program: Program,
        key: jax.Array,
        rules: dict[int, Rule],
        *,
        head: ExactHead | None = None,
        num_perturbations: int,
        decay_steps: int | None,
        normalized: bool,
        loss: losses.Loss,
        spread: Spread | None,
    ):
        """Takes what `train_step` made of its arguments."""
        self.program = program
        self.rules = rules
        self.head = head
        self.num_perturbations = num_perturbations
        self._key = key
        self._decay_steps = decay_steps
        self._normalized = normalized
        self._loss = loss
        self._spread = spread

    def init(self, params: Any = None) -> tuple[Any, State]:
        """Weights and state to start from.

        Args:
          params: as ``program.params``, which is the default.

        Returns:
          Integer arrays in the structure of params, and a `State`.
        """
        weights = integers(self.program.params if params is None else params)
        words = jnp.asarray(jax.random.key_data(self._key), jnp.uint32)
        zero = jnp.zeros([], jnp.int32)
        differences = jnp.zeros([self.num_perturbations], jnp.int32)
        return weights, State(words, zero, zero, differences)

    def __call__(self, weights: Any, state: State, batch: Any) -> tuple[Any, State]:
        """The next weights and state.

        Args:
          weights: integer arrays, from `init` or the last step.
          state: from the same.
          batch: ``(encoded, labels)``: what ``program.encode`` returns, and what the
            loss takes beside the outputs.
        """

        def update(_: Any, state: State, weights: Any, *, batch: Any) -> Any:
            return self._stepped(weights, state, batch)

        if self._spread is None:
            return self._stepped(weights, state, batch)
        weights, state = spreads.with_auto_axes(update)(
            None, state, weights, batch=batch
        )
        return weights, state

    def _stepped(self, weights: Any, state: State, batch: Any) -> tuple[Any, State]:
        """What calling the step returns."""
        leaves, structure = jax.tree.flatten(weights)
        decay = self._decay(state.count)
        loss, differences = state.loss, state.differences
        updated = dict(enumerate(leaves))
        if self.rules:
            moved, loss, differences = self._perturbed(weights, state, batch, decay)
            updated.update(moved)
        if self.head is not None:
            moved, loss = self._learned(self.head, weights, state, batch, decay)
            updated.update(moved)
        state = State(state.key, state.count + 1, loss, differences)
        return jax.tree.unflatten(structure, updated.values()), state

    def _perturbed(
        self, weights: Any, state: State, batch: Any, decay: Any
    ) -> tuple[dict[int, jax.Array], jax.Array, jax.Array]:
        """Leaves after equations (6) to (8), the first loss, and the differences."""
        leaves, structure = jax.tree.flatten(weights)
        keys = self._keys(state)

        def evaluate(sign: jax.Array, leaf_keys: Any, arguments: Any) -> jax.Array:
            moved = list(leaves)
            for i, rule in self.rules.items():
                with jax.named_scope("perturb"):
                    z = rule.z(leaf_keys[i], decay)
                    moved[i] = rule.perturbed(leaves[i], z, sign, decay)
            return self.loss(jax.tree.unflatten(structure, moved), arguments["batch"])

        pairs = self._pairs(evaluate, keys, {"batch": batch})
        differences = pairs[:, 0] - pairs[:, 1]
        coefficients = {rule: jnp.sign(differences) for rule in (Rounded, OnGrid)}
        bound = self.num_perturbations
        if self._normalized:
            coefficients[Rounded] = normalized(differences)
            bound *= math.ceil(self.num_perturbations**0.5) << _COEFFICIENT_BITS
        updated = {}
        for i, rule in self.rules.items():
            with jax.named_scope("update"):
                shape = [self.num_perturbations, *[1] * leaves[i].ndim]
                first, second = (word.reshape(shape) for word in keys[i])
                z = rule.z((first, second), decay)
                total = jnp.sum(coefficients[type(rule)].reshape(shape) * z, axis=0)
                updated[i] = rule.updated(leaves[i], total, 128 * bound, decay)
        return updated, pairs[0, 0], differences

    def _learned(
        self, head: ExactHead, weights: Any, state: State, batch: Any, decay: Any
    ) -> tuple[dict[int, jax.Array], jax.Array]:
        """Leaves of the head after a step along its exact gradient, and the loss."""
        encoded, labels = _split(batch)
        leaves = jax.tree.leaves(weights)
        with jax.named_scope("loss"):
            logits, factors, numbers = head.evaluated(self.program, weights, encoded)
            error = losses.softmax_error(logits, labels)
            loss = self._loss(logits, labels)
        key = self._step_key(state)
        updated = {}
        with jax.named_scope("update"):
            for leaf, change in head.changes(factors, numbers, error):
                q = leaves[leaf.index]
                updated[leaf.index] = leaf.updated(q, change, decay, key)
        return updated, loss.q

    def _pairs(
        self, evaluate: Callable[..., jax.Array], keys: Any, arguments: dict[str, Any]
    ) -> jax.Array:
        """int32 [m, 2], the losses of all pairs."""
        if self._spread is not None:
            table = self._spread.table(evaluate, keys, arguments)
            return spreads.mean_over_shards(table).T
        # IREE runs neither Threefry nor a slice at a computed place in this loop, so
        # both sides of a pair have their keys in memory.
        signs = np.tile(np.array([1, -1], np.int32), self.num_perturbations)
        twice = jax.tree.map(lambda k: jnp.repeat(k, 2), keys)
        _, found = lax.scan(
            lambda _, x: ((), evaluate(*x, arguments)), (), (signs, twice)
        )
        return found.reshape(self.num_perturbations, 2)

    def loss(self, weights: Any, batch: Any) -> jax.Array:
        """int32 scalar, the loss of a batch at given weights."""
        encoded, labels = _split(batch)
        with jax.named_scope("loss"):
            value = self._loss(self.program.values(weights, *encoded), labels)
            ranges.prove(value.low, value.high, "the loss")
            ranges.prove(value.low - value.high, value.high - value.low, "a difference")
        q: jax.Array = value.q
        return q

    def restore(self, weights: Any) -> Any:
        """Weights as parameters: `QTensor` leaves with the scales of the program."""
        own, structure = jax.tree.flatten(self.program.params, is_leaf=is_qtensor)
        return jax.tree.unflatten(
            structure,
            [
                dataclasses.replace(leaf, qvalue=q) if is_qtensor(leaf) else q
                for leaf, q in zip(own, jax.tree.leaves(weights), strict=True)
            ],
        )

    def _keys(self, state: State) -> dict[int, Words]:
        """The words of the keys [m] of each leaf."""
        numbers = jnp.arange(self.num_perturbations, dtype=jnp.uint32)
        sample = fold_in(self._step_key(state), numbers)
        return {i: rule.address.key(sample) for i, rule in self.rules.items()}

    def _step_key(self, state: State) -> Words:
        return fold_in((state.key[0], state.key[1]), state.count.astype(jnp.uint32))

    def _decay(self, count: jax.Array) -> jax.Array | None:
        """The share of the learning rate, in units of 2**-15."""
        steps = self._decay_steps
        if steps is None:
            return None
        drop = max(0, steps.bit_length() - 16)
        left = jnp.maximum(steps - count, 0) >> drop
        return lax.div(left << _RATE_BITS, jnp.int32(max(1, steps >> drop)))


def train_step(
    program: Program,
    key: jax.Array,
    *,
    learning_rate: float,
    epsilon: float | None = None,
    num_perturbations: int = 3,
    decay_steps: int | None = None,
    estimator: str = "sign",
    loss: losses.Loss = losses.softmax_cross_entropy,
    where: Callable[[str], bool] | None = None,
    spread: Spread | None = None,
    exact_head: str | Sequence[str] | None = None,
) -> tuple[Callable[..., tuple[Any, State]], TrainStep]:
    """The paper's QZO-FF, without a float anywhere in the step.

    With ``exact_head`` the last linear layer learns by its gradient, which one forward
    pass gives exactly: features times softmax error. The backbone may be frozen, or
    perturbed as well.

    Args:
      program: from `fgrad.integer.convert`.
      key: Threefry PRNG key (JAX's default); z is that of
        ``fgrad.fixed_point_forward_grad(key)`` with its default perturbation.
      learning_rate: η in units of the weights.
      epsilon: ε in units of the weights, for leaves of 16 bits that are perturbed.
      num_perturbations: m; a step costs 2m forward passes. An exact head costs one.
      decay_steps: the learning rate decays linearly to zero over as many steps, in
        integers; by default it stays.
      estimator: "sign", equation (7), or "normalized", which weighs the directions of
        a step by how much the loss changes along them, in multiples of 1/64.
      loss: ``loss(outputs, labels)``, from the program's result as `Fixed` and the
        batch's labels to a `Fixed` scalar.
      where: ``where(path) -> bool`` picks the leaves that are perturbed: all by
        default, none beside an exact head.
      spread: how the devices of a mesh share the evaluations. The loss of a batch is
        then the whole part of the mean over its shards. `fgrad.integer.to_c` and
        ``export`` take steps of one device.
      exact_head: path of the last layer, such as "Dense_0", or of its kernel and bias.
        The learning rate is then one for the mean loss of a batch.

    Returns:
      ``(init, step)``: ``weights, state = init()`` and
      ``weights, state = step(weights, state, (encoded, labels))``.

    Raises:
      ValueError: for a rate, epsilon or number that is out of range, and for an
        epsilon that rounds to zero on the grid of a leaf.
      ConversionError: if ``exact_head`` is not the last linear layer.

    Example:
      >>> x, y = jnp.array([[0.5, -1.0]]), jnp.array([1])
      >>> from fgrad.integer import convert
      >>> program = convert(lambda w, x: x @ w, jnp.eye(2), x)
      >>> init, step = train_step(
      ...     program, jax.random.key(0), learning_rate=1e-2, epsilon=1e-2
      ... )
      >>> weights, state = init()
      >>> weights, state = step(weights, state, (program.encode(x), y))
      >>> weights.dtype, int(state.count)
      (dtype('int16'), 1)

    Reference:
      Equations (6) to (8) of Feng et al., "Stepping Forward on the Last Mile", NeurIPS
      2024.
    """
    _check_program(program, "train_step")
    _checks.key(key)
    _check(learning_rate, epsilon, num_perturbations, decay_steps, estimator)
    _checks.function("loss", loss, "outputs", "labels")
    if where is not None:
        _checks.function("where", where, "path")
    learning_rate = float(learning_rate)
    epsilon = None if epsilon is None else float(epsilon)
    _arguments.spread(spread, num_perturbations)
    head = None
    if exact_head is not None:
        if loss is not losses.softmax_cross_entropy:
            raise ValueError(
                "exact_head= has the gradient of loss.softmax_cross_entropy alone: "
                "leave loss= out, or train the head by perturbations."
            )
        head = exact_heads.find(program, exact_head, learning_rate)
    chosen = _chosen(program, where, head)
    if not chosen and head is None:
        raise ValueError("no leaf trains; where= must pick one of program.params.")
    if chosen and epsilon is None:
        raise ValueError(
            "epsilon must be given for leaves that are perturbed, got None."
        )
    rate = learning_rate / num_perturbations
    rules = {
        i: _rule(path, leaf, rate, epsilon or 0.0, decay_steps, estimator)
        for i, (path, leaf) in chosen.items()
    }
    step = TrainStep(
        program,
        key,
        rules,
        head=head,
        num_perturbations=num_perturbations if rules else 1,
        decay_steps=decay_steps,
        normalized=estimator == "normalized",
        loss=loss,
        spread=spread,
    )
    return step.init, step


def _chosen(
    program: Program, where: Callable[[str], bool] | None, head: ExactHead | None
) -> dict[int, tuple[Any, QTensor]]:
    """Path and leaf of what is perturbed, by its place among the leaves."""
    if where is None and head is not None:
        return {}
    exact = {leaf.index for leaf in head.leaves} if head is not None else set()
    leaves = jax.tree_util.tree_flatten_with_path(program.params, is_leaf=is_qtensor)[0]
    return {
        i: (path, leaf)
        for i, (path, leaf) in enumerate(leaves)
        if is_qtensor(leaf)
        and i not in exact
        and (where is None or where(fixed_point.path_str(path)))
    }


def _rule(
    path: Any,
    leaf: QTensor,
    learning_rate: float,
    epsilon: float,
    decay_steps: int | None,
    estimator: str,
) -> Rule:
    """How a leaf that is perturbed moves, at a learning rate for one direction."""
    address = address_of(path, leaf)
    if leaf.bits < 16:
        return _on_grid(address, leaf, learning_rate)
    factor = 64 if estimator == "normalized" else 1
    name = fixed_point.path_str(path)
    return _rounded(name, address, leaf, learning_rate / factor, epsilon, decay_steps)


def _split(batch: Any) -> tuple[tuple[Any, ...], Any]:
    """The encoded arguments of a batch, and its labels."""
    encoded, labels = batch
    return (encoded if isinstance(encoded, tuple) else (encoded,)), labels


def normalized(differences: jax.Array) -> jax.Array:
    """``⌊64 d / rms(d)⌉`` of int32 [m], within 0.2% and one unit.

    Example:
      >>> normalized(jnp.array([300, -400]))
      Array([ 54, -72], dtype=int32)
    """
    largest = jnp.max(jnp.abs(differences))
    # To 12 bits, so that the sum of up to 127 squares fits.
    up = jnp.maximum(lax.clz(largest) - 20, 0)
    down = jnp.maximum(20 - lax.clz(largest), 0)
    d = jnp.left_shift(differences, up) >> down
    count = differences.shape[0]
    mean_log = arithmetic.log2(jnp.maximum(jnp.sum(d * d), 1)) - round(
        math.log2(count) * 2**arithmetic.LOG_BITS
    )
    inverse = arithmetic.exp2_negative(jnp.maximum(mean_log, 0) >> 1)
    shift = arithmetic.POWER_BITS - _COEFFICIENT_BITS
    coefficients: jax.Array = arithmetic.multiply_shift(d, inverse, shift)
    return coefficients


def _rounded(
    name: str,
    address: Address,
    leaf: QTensor,
    learning_rate: float,
    epsilon: float,
    decay_steps: int | None,
) -> Rounded:
    source = perturbations.normal()
    scale = np.asarray(leaf.scale, np.float64)
    epsilon_q = np.rint(epsilon / scale).astype(np.int64)
    if np.any(epsilon_q == 0):
        raise ValueError(
            f"epsilon={epsilon} is less than half a step ({np.max(scale):.2g}) of "
            f"the grid of {name!r}, whose weights it would not move: raise epsilon."
        )
    rate: Any
    ratio = learning_rate * source.step / scale
    if scale.size > 1:
        rate = ranges.ratios_of(ratio)
        digits = _RATE_BITS - np.frexp(rate[0])[1] if decay_steps is not None else 0
        shift = int(np.min(rate[1] + digits))
    else:
        multiplier, shift = ranges.ratio_of(float(ratio.reshape(())))
        if decay_steps is not None:  # with all its digits, for they will be fewer
            digits = _RATE_BITS - multiplier.bit_length()
            multiplier, shift = multiplier << digits, shift + digits
        rate = multiplier, shift
    if shift > 46:
        raise ValueError(
            f"a learning rate of {learning_rate:.2g} for a direction never "
            f"moves the weights of {name!r}: raise it."
        )
    every = np.arange(256, dtype=np.uint32)
    table = np.asarray(source.decode(jnp.asarray(every)))[::4]
    # A unit of z crosses the grid many times beyond this.
    steps = np.minimum(epsilon_q, 2**22)
    return Rounded(
        address,
        leaf.bits,
        steps.astype(np.int32) if scale.size > 1 else int(epsilon_q.reshape(())),
        rate,
        table,
        source.values_per_word,
        source.step,
    )


def _on_grid(address: Address, leaf: QTensor, learning_rate: float) -> OnGrid:
    scale = np.asarray(leaf.scale, np.float64)
    rate = learning_rate / (scale if scale.size > 1 else scale.reshape(()))
    largest = np.clip(np.ceil(rate), 1, 127)
    probability = np.minimum(rate / largest, 1.0) ** 2
    threshold = np.minimum(np.rint(probability * 2.0**31), 2**31 - 1)
    return OnGrid(
        address,
        leaf.bits,
        largest.astype(np.int32),
        threshold.astype(np.uint32),
        PROBE,
    )


def _check_program(program: Any, name: str) -> None:
    if not isinstance(program, Program):
        raise TypeError(
            f"{name} needs a program, got {program!r:.60}; make it by "
            "fgrad.integer.convert(fn, params, *calibration_args)."
        )


def check_model(name: str, model: Any) -> None:
    """Raises unless a model that is handed over is a step or a program."""
    if not isinstance(model, TrainStep | Program):
        raise TypeError(
            f"{name} takes a step or a program as its model, got {model!r:.60}; of "
            "init, step = fgrad.integer.train_step(...) give it step."
        )


def _check(
    learning_rate: float,
    epsilon: float | None,
    num_perturbations: int,
    decay_steps: int | None,
    estimator: str,
) -> None:
    for name, value in (("learning_rate", learning_rate), ("epsilon", epsilon)):
        if name == "epsilon" and value is None:
            continue  # an exact head needs none
        hint = "; a program of integers has no schedule, but decay_steps"
        _checks.positive(name, value, hint=hint if callable(value) else "")
    _checks.integer("num_perturbations", num_perturbations, 1, 127)
    if decay_steps is not None:
        _checks.integer("decay_steps", decay_steps, 1, INT32 - 1)
    _checks.choice("estimator", estimator, ("sign", "normalized"))
