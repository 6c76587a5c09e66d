r"""Gradients from perturbed activations, for layers deep inside a network.

A perturbation of a million weights says little about each of them. Here, an activation
at a narrow site is perturbed instead, for every example by itself,

.. math:: y' = y \pm ε s u, \quad s = rms(y),

and each example's own loss answers:

.. math::
  \frac{dL}{dy_i} ≈ \frac{1}{KB} \sum_k \frac{l_i^+ - l_i^-}{2εs} u_{ik}, \quad
  \frac{dL}{dW} = x^T \frac{dL}{dy}.

The second step needs the layer's own input only (`fgrad.activity.layer_gradients`), and
only what comes after the site is evaluated again. The site is found in the traced loss
by the name of the layer's parameters, so models stay as they are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from fgrad import _arguments, _checks, _loss_and_aux, estimators, perturbations
from fgrad.activity import layer_gradients
from fgrad.activity.example_losses import ExampleLosses, mean_of, traced
from fgrad.activity.layer_gradients import Layer
from fgrad.activity.site_gradients import (
    Directions,
    SiteGradient,
    evidence_for,
    site_gradient,
)
from fgrad.activity.sites import (
    Site,
    as_sites,
    check_values,
    exact_site,
    mean_jacobians,
    site_leaves,
)
from fgrad.fixed_point import is_qtensor
from fgrad.spread import Spread
from fgrad.tracing import compiled_once, primitives


class ActivityForwardGradState(NamedTuple):
    """State of `activity_forward_grad`.

    Attributes:
      key: the key that, with ``count``, addresses every u.
      count: int32 scalar, steps taken.
      loss: float32 scalar, mean over the last step's evaluations and examples; of
        several losses the sum. inf before the first step.
      nonfinite_pairs: int32 scalar, pairs of an example's losses that were left out.
      others: state of ``others``, or empty.
      jacobians: of sites with a `SyntheticGradient`, by their first name: float32
        [outputs, channels].
      aux: with ``has_aux`` what the losses of the last step came with, before it
        ``initial_aux``; or empty.
    """

    key: jax.Array
    count: jax.Array  # type: ignore[assignment]  # optax's name, and tuple's
    loss: jax.Array
    nonfinite_pairs: jax.Array
    others: Any = ()
    jacobians: Any = ()
    aux: Any = ()


def activity_forward_grad(
    key: jax.Array,
    sites: Sequence[str | Site],
    *,
    num_perturbations: int = 16,
    perturbation: perturbations.Perturbation | None = None,
    estimator: estimators.Estimator | None = None,
    vectorize: int = 1,
    others: optax.GradientTransformation | None = None,
    has_aux: bool = False,
    initial_aux: Any = (),
    spread: Spread | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Estimates the gradient of some layers by perturbing their output.

    .. math:: \frac{dL}{dW} = x^T \; \frac{1}{KB} \sum_k
      \frac{l_i(y + εs u_k) - l_i(y - εs u_k)}{2εs} u_{ik}

    for layers ``y = x · W + b`` of any kind: dense, convolution (strided, grouped,
    depthwise), projections of attention, embeddings, float or of `fgrad.layers` with
    integer weights. ``value_fn`` returns a loss for each example, and the gradient is
    that of their mean. The memory is that of inference and one activation per site.

    Args:
      key: PRNG key, the only source of randomness.
      sites: names of the layers to train, or a `Site` for more settings. Each is
        evaluated by itself.
      num_perturbations: K, the number of directions of each site; it costs 2K
        evaluations of what follows the site.
      perturbation: where u comes from; ``perturbations.rademacher()`` by default.
      estimator: how the losses of an example become a coefficient of u;
        `estimators.spsa` by default, whose mean is the gradient. `sign_m_spsa`
        forgets how much each example matters, and trains worse.
      vectorize: how many directions are evaluated at once, 1 to K. It trades memory
        for speed and leaves the result as it is, but for rounding.
      others: a transformation for the gradient of the other leaves, such as
        ``fixed_point_forward_grad(key, mask=activity.leaves_outside(sites))``. It
        receives the mean of the losses. By default the others' updates are zero.
      has_aux: whether ``value_fn`` returns ``(losses, aux)``, where aux is a pytree of
        arrays. The state's ``aux`` is that of the evaluation in which nothing is
        perturbed. ``others`` gets the losses alone.
      initial_aux: the state's ``aux`` before the first step, as in
        `fgrad.fixed_point_forward_grad`.
      spread: how the devices of a mesh share the directions, and the coordinates of
        exact sites. It has no ``batch``: a gradient is a product of the activations
        of all examples, which every device computes.

    Returns:
      A transformation whose ``update`` takes ``value_fn`` (or ``obj_fn``), called as
      ``value_fn(params, **those of the extra arguments that it names)``, with the
      batch among them. It returns losses [examples], or a dict of several by name.

    Raises:
      TypeError, ValueError: here for bad options; in ``init`` for a site that names
        no parameter, and for a `QTensor` that is no tensor on a grid; in ``update``
        for losses of another shape, and for a layer that cannot be followed from its
        parameters to its output: inside ``scan`` or ``vmap`` over layers, used twice,
        not linear.

    Example:
      >>> def losses(params, x, y):  # one for each example
      ...     hidden = jnp.tanh(x @ params["hidden"])
      ...     return jnp.sum((hidden @ params["head"] - y) ** 2, axis=-1)
      >>> sites = ["hidden", Site("head", exact=True)]
      >>> tx = optax.chain(
      ...     activity_forward_grad(jax.random.key(0), sites), optax.sgd(0.1)
      ... )
      >>> params = {"hidden": jnp.eye(3), "head": jnp.zeros((3, 1))}
      >>> state = tx.init(params)
      >>> x = jax.random.normal(jax.random.key(1), (8, 3))
      >>> y = jnp.tanh(x[:, :1])
      >>> for _ in range(50):
      ...     zeros = jax.tree.map(jnp.zeros_like, params)
      ...     updates, state = jax.jit(tx.update, static_argnames="value_fn")(
      ...         zeros, state, params, value_fn=losses, x=x, y=y
      ...     )
      ...     params = optax.apply_updates(params, updates)
      >>> bool(jnp.mean(losses(params, x, y)) < 0.01)
      True

    Reference:
      Ren et al., "Scaling forward gradient with local losses", ICLR 2023, section 3.
    """
    _arguments.key(key)
    options = _Options(
        sites=as_sites(sites),
        num_perturbations=num_perturbations,
        perturbation=_arguments.perturbation(perturbation, perturbations.rademacher),
        estimator=_arguments.estimator(
            estimator, estimators.spsa, "fgrad.estimators.spsa or sign_m_spsa"
        ),
        vectorize=vectorize,
        spread=spread,
        others=None if others is None else _arguments.transformation(others),
        aux=_loss_and_aux.Aux.of(has_aux, initial_aux),
    )

    def init_fn(params: Any) -> ActivityForwardGradState:
        _arguments.visible(params)
        _checks.arrays(params, is_qtensor)
        if jax.tree.leaves(params):  # optax.tree.map_params has a placeholder
            site_leaves(options.sites, params)
        check_values(params)
        return ActivityForwardGradState(
            key=jnp.array(key, copy=True),
            count=jnp.zeros([], jnp.int32),
            loss=jnp.array(jnp.inf, jnp.float32),
            nonfinite_pairs=jnp.zeros([], jnp.int32),
            others=() if options.others is None else options.others.init(params),
            jacobians=mean_jacobians(options.sites, params),
            aux=options.aux.at_first(),
        )

    def update_fn(
        updates: Any,
        state: ActivityForwardGradState,
        params: Any = None,
        *,
        value_fn: Callable[..., Any] | None = None,
        obj_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, ActivityForwardGradState]:
        loss_fn = _arguments.loss("activity_forward_grad", params, value_fn, obj_fn)
        _arguments.visible(params)
        if spread is not None:  # or the compiler would sum up each device's examples
            extra_args = spread.whole(extra_args)
        return _update(options, updates, state, params, loss_fn, extra_args)

    return _arguments.link(init_fn, update_fn, spread)


@dataclasses.dataclass(frozen=True, eq=False)
class _Options:
    """The arguments of `activity_forward_grad`, checked."""

    sites: Sequence[Site]
    num_perturbations: int
    perturbation: perturbations.Perturbation
    estimator: estimators.Estimator
    vectorize: int
    spread: Spread | None
    others: optax.GradientTransformationExtraArgs | None
    aux: _loss_and_aux.Aux

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError('sites is empty; name layers, for example sites=["head"].')
        for name in ("num_perturbations", "vectorize"):
            count = _arguments.count(name, getattr(self, name))
            object.__setattr__(self, name, count)
        self._check_spread()
        for site in self.sites:
            if site.synthetic is None:
                continue
            exact_site(site, self.sites)
            if self.estimator is not estimators.spsa:
                raise ValueError(
                    f"site {site.names} has a synthetic gradient, which is corrected "
                    "by differences of losses; leave out estimator."
                )

    def _check_spread(self) -> None:
        _arguments.spread(self.spread)
        if self.spread is None:
            return
        if self.spread.batch is not None or self.spread.shards > 1:
            raise ValueError(
                f"activity_forward_grad cannot spread a batch, got batch="
                f"{self.spread.batch!r}, shards={self.spread.shards}: the gradient of "
                "a layer is a product of the activations of all examples, not of "
                "losses. Share the directions by all axes of the mesh: "
                "fgrad.Spread(mesh, pairs=mesh.axis_names)."
            )
        for site in self.sites:
            if not site.exact:
                count = site.num_perturbations or self.num_perturbations
                self.spread.check_pairs(count, min(self.vectorize, count))

    def directions(self, site: Site, state: ActivityForwardGradState) -> Directions:
        """The random directions of a site in this step."""
        return Directions(
            step_key=functools.partial(
                perturbations.sample_key, state.key, state.count
            ),
            count=site.num_perturbations or self.num_perturbations,
            perturbation=self.perturbation,
            estimator=self.estimator,
            vectorize=self.vectorize,
            spread=self.spread,
        )


def _update(
    options: _Options,
    updates: Any,
    state: ActivityForwardGradState,
    params: Any,
    loss_fn: Callable[..., Any],
    extra_args: dict[str, Any],
) -> tuple[Any, ActivityForwardGradState]:
    kwargs = _arguments.named_arguments(loss_fn, extra_args)
    if options.others is None:
        gradient, others_state = jax.tree.map(jnp.zeros_like, params), ()
    else:
        mean_fn = mean_of(loss_fn, has_aux=options.aux.expected)
        gradient, others_state = options.others.update(
            updates, state.others, params, value_fn=mean_fn, **extra_args
        )
    program, names, aux = traced(loss_fn, params, kwargs, has_aux=options.aux.expected)
    known = options.estimator in (estimators.spsa, estimators.sign_m_spsa)
    # An estimator of the user may be another one at the next call.
    call: Any = compiled_once.call if known else _called
    addressed = state._replace(others=(), aux=())
    found = call(
        _find, program, params, kwargs, addressed, options=options, names=names
    )
    gradient = layer_gradients.with_gradients(params, gradient, found.gradients)
    return gradient, state._replace(
        count=optax.safe_increment(state.count),
        loss=found.loss,
        nonfinite_pairs=found.nonfinite_pairs,
        others=others_state,
        jacobians=found.jacobians,
        aux=options.aux.checked(jax.tree.unflatten(aux, found.aux)),
    )


def _called(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)


class _Found(NamedTuple):
    """What all sites found.

    Attributes:
      gradients: of the sites' leaves by their path.
      loss: float32 scalar, as in the state.
      nonfinite_pairs: int32 scalar, as in the state.
      jacobians: as in the state.
      aux: the leaves of what the losses came with.
    """

    gradients: dict[str, jax.Array]
    loss: jax.Array
    nonfinite_pairs: jax.Array
    jacobians: dict[str, jax.Array]
    aux: list[jax.Array]


def _find(
    program: core.ClosedJaxpr,
    params: Any,
    kwargs: Any,
    state: ActivityForwardGradState,
    *,
    options: _Options,
    names: tuple[str, ...],
) -> _Found:
    """What all sites find, from the traced losses."""
    losses = ExampleLosses(program, names, params, options.sites, kwargs)
    found = _site_gradients(options, losses, state)
    return _Found(
        gradients={k: v for one in found for k, v in one.gradients.items()},
        loss=sum({f.loss_name: f.loss for f in found}.values(), jnp.float32(0)),
        nonfinite_pairs=sum(
            (f.nonfinite_pairs for f in found), jnp.zeros([], jnp.int32)
        ),
        jacobians={
            site.names[0]: f.jacobian
            for site, f in zip(options.sites, found, strict=True)
            if f.jacobian is not None
        },
        aux=losses.aux,
    )


def _site_gradients(
    options: _Options, losses: ExampleLosses, state: ActivityForwardGradState
) -> list[SiteGradient]:
    """What each site found, in the order of the sites."""
    found: dict[Site, SiteGradient] = {}
    # Exact sites come first, because synthetic gradients are predicted from them.
    for site in sorted(options.sites, key=lambda site: not site.exact):
        evidence = None
        if site.synthetic is not None:
            exact = exact_site(site, options.sites)
            jacobian = state.jacobians[site.names[0]]
            evidence = evidence_for(
                losses, site, exact, found[exact], jacobian, state.count
            )
        directions = options.directions(site, state)
        found[site] = site_gradient(losses, site, directions, evidence)
    return [found[site] for site in options.sites]


class PerturbedActivation(NamedTuple):
    """What `explain` says of an activation that is perturbed.

    Attributes:
      leaves: paths of the parameters that get their gradient from it.
      primitives: the equations from the first of them to the activation.
      shape: of the activation.
      bytes: its size; this much is stored beside what inference needs, and as much
        again for its gradient.
      evaluated_again: share of the network's multiply-adds that come after it.
    """

    leaves: tuple[str, ...]
    primitives: tuple[str, ...]
    shape: tuple[int, ...]
    bytes: int
    evaluated_again: float


def explain(
    value_fn: Callable[..., Any],
    params: Any,
    sites: Sequence[str | Site],
    **kwargs: Any,
) -> list[PerturbedActivation]:
    """Says which activations `activity_forward_grad` perturbs, and what that costs.

    Nothing is computed.

    Args:
      value_fn: ``value_fn(params, **kwargs)`` gives the losses [examples], or these and
        an aux.
      params: pytree of float arrays and `QTensor`.
      sites: as in `activity_forward_grad`.
      **kwargs: passed to ``value_fn``.

    Returns:
      A `PerturbedActivation` for each activation.

    Raises:
      TypeError, ValueError: as ``update`` of `activity_forward_grad`.

    Example:
      >>> losses = lambda p, x: jnp.sum(jnp.tanh(x @ p["a"] + p["b"]) @ p["c"], -1)
      >>> params = {"a": jnp.ones((3, 3)), "b": jnp.ones(3), "c": jnp.ones((3, 1))}
      >>> explain(losses, params, [Site("a", "b")], x=jnp.ones((4, 3)))
      [PerturbedActivation(leaves=('a', 'b'), primitives=('dot_general', 'add'),
       shape=(4, 3), bytes=48, evaluated_again=0.25)]
    """
    chosen = as_sites(sites)
    _checks.function("value_fn", value_fn, "params", **kwargs)
    lines: list[PerturbedActivation] = []

    def collect(params: Any, kwargs: Any) -> None:
        losses = ExampleLosses.of(value_fn, params, chosen, kwargs)
        lines.extend(
            _explained(losses, output, layers)
            for site in chosen
            for output, layers in losses.outputs(site).items()
        )

    jax.eval_shape(collect, params, kwargs)
    return lines


def _explained(
    losses: ExampleLosses, output: int, layers: Mapping[str, Layer]
) -> PerturbedActivation:
    """What `explain` says of one activation."""
    program = losses.program
    total = primitives.multiply_adds(n.equation for n in program.nodes)
    after = program.depending([output]) - {output}
    again = primitives.multiply_adds(
        n.equation for n in program.nodes if not after.isdisjoint(n.outputs)
    )
    aval = program.avals[output]
    return PerturbedActivation(
        leaves=tuple(layers),
        primitives=max((layer.path for layer in layers.values()), key=len),
        shape=aval.shape,
        bytes=aval.size * aval.dtype.itemsize,
        evaluated_again=again / max(total, 1),
    )
