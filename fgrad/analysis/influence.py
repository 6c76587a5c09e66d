r"""Which training examples a prediction was learned from: TracIn, by forward passes.

A step of gradient descent on example z changes the loss of another example z' by about
the product of their gradients. Summed over the checkpoints of a run that is the
influence of z on z',

.. math:: I(z, z') = \sum_t η_t \, ∇l(w_t, z) \cdot ∇l(w_t, z').

No gradient is needed for it. Along directions u_k of unit variance the slopes of both
losses say as much on average,

.. math:: ∇l(z) \cdot ∇l(z') = E[d_k(z) \, d_k(z')], \quad
  d_k(z) = \frac{l(w + εu_k, z) - l(w - εu_k, z)}{2ε},

and each slope is a pair of forward passes. What is kept of an example is a *trace*, a
short vector whose products with other traces are influences: m slopes, or at the
network's head the gradient itself, which forward passes give without noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fgrad import estimators, perturbations
from fgrad.activity import Site, site_gradients
from fgrad.activity.example_losses import ExampleLosses
from fgrad.activity.layer_gradients import Layer, gradient
from fgrad.evaluation import evaluate_examples
from fgrad.fixed_point import is_qtensor, path_str
from fgrad.leaves import LeafEpsilon, Mask, Plan, Policy
from fgrad.tracing.promotion import usual_rules


@usual_rules
def forward_traces(
    value_fn: Callable[..., jax.Array],
    params: Any,
    key: jax.Array,
    *,
    step: jax.typing.ArrayLike = 0,
    epsilon: float = 1e-2,
    num_perturbations: int = 16,
    perturbation: perturbations.Perturbation | None = None,
    mask: Mask = None,
    vectorize: int = 1,
    **kwargs: Any,
) -> jax.Array:
    r"""The slopes of each example's loss along m random directions.

    .. math:: a_{ik} = \frac{1}{\sqrt m} \,
      \frac{l_i(w + εu_k) - l_i(w - εu_k)}{2ε}, \quad
      E[a_i \cdot a_j] = ∇l_i \cdot ∇l_j

    It costs 2m forward passes and the memory of inference. Of normal directions the
    relative standard deviation of an example's product with itself is
    :math:`\sqrt{2/m}`, and of a product with another :math:`\sqrt{(1 + 1/c^2)/m}`,
    where c is the cosine of the two gradients: to rank examples by the influence on
    themselves takes few directions, and to find those that speak for or against a
    prediction takes many.

    The directions are those of `fgrad.fixed_point_forward_grad` with the same key,
    step and perturbation. With the key of a run and the number of one of its steps of
    SPSA, products of traces are no estimates: they share out, to first order, what the
    step did to a loss among the examples of its batch.

    Args:
      value_fn: ``value_fn(params, **kwargs)`` gives losses [examples].
      params: pytree of float arrays and `QTensor`, a checkpoint of the run.
      key: with ``step`` it addresses the directions. Traces can be multiplied only if
        they have both in common.
      step: a number for each checkpoint, so that each has directions of its own.
      epsilon: ε in units of the weights.
      num_perturbations: m, the number of directions.
      perturbation: where they come from; ``perturbations.normal()`` by default.
      mask: leaves that count, as in `fgrad.dual_forward`.
      vectorize: how many directions are evaluated at once, 1 to m.
      **kwargs: passed to ``value_fn``: the examples.

    Returns:
      float32 [examples, m]. A slope is 0 where a loss is not finite.

    Raises:
      TypeError: for an epsilon of each leaf, and for losses of another shape.

    Example:
      >>> def losses(w, x):
      ...     return 0.5 * (x @ w) ** 2
      >>> w, x = jnp.ones(2), jnp.eye(2)
      >>> traces = forward_traces(
      ...     losses, w, jax.random.key(0), num_perturbations=4000, x=x
      ... )
      >>> jnp.round(influence(traces, traces)) + 0  # the gradients are x themselves
      Array([[1., 0.],
             [0., 1.]], dtype=float32)

    Reference:
      Pruthi et al., "Estimating training data influence by tracing gradient descent",
      NeurIPS 2020 (arXiv 2002.08484); for random projections its section 3.4.
    """
    if isinstance(epsilon, LeafEpsilon):
        raise TypeError(
            f"epsilon must be a number, got {epsilon.name}: with one for each leaf the "
            "leaves would count by their size."
        )
    source = perturbations.normal() if perturbation is None else perturbation
    policy = Policy(epsilon, num_perturbations, source)
    plan = Plan(params, policy, mask=mask, step=step)
    plus, minus = evaluate_examples(
        functools.partial(value_fn, **kwargs), plan, plan.keys(key), vectorize=vectorize
    )
    slopes = estimators.spsa(plus, minus, plan.epsilon)
    slopes = jnp.where(jnp.isfinite(slopes), slopes, 0)
    return slopes.T / jnp.sqrt(jnp.float32(num_perturbations))


@usual_rules
def head_traces(
    value_fn: Callable[..., jax.Array],
    params: Any,
    head: str,
    *,
    epsilon: float = 0.03,
    vectorize: int = 1,
    **kwargs: Any,
) -> jax.Array:
    r"""The gradient of each example's loss by the weights of the head.

    .. math:: a_i = x_i \otimes \frac{∂l_i}{∂y_i}, \quad
      \left(\frac{∂l_i}{∂y_i}\right)_c = \frac{l_i(y_i + εe_c) - l_i(y_i - εe_c)}{2ε}

    for a head y = x · W + b of C outputs. Each output is perturbed in turn, which
    evaluates the loss function 2C times, and not the network. There is no noise, and an
    error of order ε².

    Args:
      value_fn: ``value_fn(params, **kwargs)`` gives losses [examples], or these and an
        aux, which does not count.
      params: pytree of float arrays and `QTensor`, a checkpoint of the run.
      head: name of the layer, as in `fgrad.activity.Site`.
      epsilon: ε in units of the outputs.
      vectorize: how many outputs are perturbed at once.
      **kwargs: passed to ``value_fn``: the examples.

    Returns:
      float32 [examples, weights of the head]. That is large for many examples: call it
      for some at a time.

    Raises:
      TypeError, ValueError: for losses of another shape, a name of no layer, and a
        layer that cannot be followed, as `fgrad.activity_forward_grad`.

    Example:
      >>> def losses(params, x):
      ...     return 0.5 * jnp.sum((x @ params["head"]) ** 2, axis=-1)
      >>> params = {"head": jnp.array([[1.0], [2.0]])}
      >>> traces = head_traces(losses, params, "head", x=jnp.array([[3.0, 1.0]]))
      >>> jnp.round(traces)  # 5 x
      Array([[15.,  5.]], dtype=float32)

    Reference:
      Pruthi et al. 2020, the last layer of section 3.3.
    """
    site = Site(head, exact=True, epsilon=epsilon)
    losses = ExampleLosses.of(value_fn, params, [site], kwargs)
    # An exact site draws nothing: of the directions only how many run at once counts.
    directions = site_gradients.Directions(
        lambda _: jax.random.key(0),
        1,
        perturbations.rademacher(),
        estimators.spsa,
        vectorize,
    )
    signals = site_gradients.site_gradient(losses, site, directions).dy
    leaves = {
        path_str(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            params, is_leaf=is_qtensor
        )
    }
    parts = [
        _example_gradients(losses, layer, signals[output], leaves[path])
        for output, layers in losses.outputs(site).items()
        for path, layer in layers.items()
    ]
    return jnp.concatenate(parts, axis=1)


def influence(
    test: jax.Array | Sequence[jax.Array],
    train: jax.Array | Sequence[jax.Array],
    learning_rates: Sequence[float] | None = None,
) -> jax.Array:
    r"""The influence of training examples on the losses of others.

    .. math:: I_{ij} = \sum_t η_t \, a^t_i \cdot b^t_j

    A positive number says that training on example j lowered the loss of example i: j
    is a proponent of it. A negative one says that j is an opponent.

    Args:
      test: traces [tests, n] of the examples that are explained, or a sequence of such
        arrays, one for each checkpoint.
      train: traces [examples, n] of the training examples, likewise.
      learning_rates: η of each checkpoint; 1 by default.

    Returns:
      float32 [tests, examples].

    Raises:
      ValueError: if there are not as many of one as of the other.

    Example:
      >>> influence(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 0.0], [0.0, -1.0]]))
      Array([[ 3., -2.]], dtype=float32)
    """
    total: jax.Array = jnp.float32(0)
    for rate, a, b in _checkpoints(learning_rates, test, train):
        total = total + rate * jnp.matmul(a, b.T, precision="highest")
    return total


def self_influence(
    train: jax.Array | Sequence[jax.Array],
    learning_rates: Sequence[float] | None = None,
) -> jax.Array:
    r"""The influence of each training example on its own loss.

    .. math:: I_{jj} = \sum_t η_t \, \|b^t_j\|^2

    An example that the network could learn from itself only has a large one, such as an
    example with a wrong label.

    Args:
      train: traces [examples, n], or a sequence of them, one for each checkpoint.
      learning_rates: η of each checkpoint; 1 by default.

    Returns:
      float32 [examples].

    Raises:
      ValueError: if there are not as many of one as of the other.

    Example:
      >>> self_influence([jnp.array([[3.0, 4.0], [0.0, 1.0]])], [0.1])
      Array([2.5, 0.1], dtype=float32)
    """
    total: jax.Array = jnp.float32(0)
    for rate, a in _checkpoints(learning_rates, train):
        total = total + rate * jnp.sum(jnp.square(a), axis=1)
    return total


def _example_gradients(
    losses: ExampleLosses, layer: Layer, signal: jax.Array, leaf: Any
) -> jax.Array:
    """[examples, weights]: the gradient of each example's loss by one leaf.

    Args:
      losses: the losses of the examples.
      layer: the leaf's.
      signal: gradient of the mean loss at the layer's output.
      leaf: the weights.
    """

    def of_one(index: jax.Array) -> jax.Array:
        shape = (losses.examples, *[1] * (signal.ndim - 1))
        chosen = (jnp.arange(losses.examples) == index).reshape(shape)
        alone = jnp.where(chosen, signal * losses.examples, 0)
        found = gradient(losses.program, layer, losses.values, alone)
        # Per unit of the weight's value, not per grid step.
        return found / leaf.scale if is_qtensor(leaf) else found

    found = jax.vmap(of_one)(jnp.arange(losses.examples))
    return found.reshape(losses.examples, -1).astype(jnp.float32)


def _checkpoints(
    learning_rates: Sequence[float] | None, *traces: Any
) -> list[tuple[Any, ...]]:
    """The learning rate and the traces of each checkpoint."""
    lists = [[one] if hasattr(one, "ndim") else list(one) for one in traces]
    rates = [1.0] * len(lists[0]) if learning_rates is None else list(learning_rates)
    counts = [len(rates), *map(len, lists)]
    if len(set(counts)) != 1 or not rates:
        raise ValueError(
            "each checkpoint has one learning rate and one array of traces of each "
            f"kind, got {counts[0]} learning rates and {counts[1:]} arrays."
        )
    return list(zip(rates, *lists, strict=True))
