r"""All layers' activations perturbed in one pair of evaluations, to teach feedback.

A pair of evaluations for each layer costs more the deeper the network is, and what it
says of one step's gradient is noisy. Here one pair moves the activations of all layers
together. What the pairs of many steps say is averaged into a mean Jacobian for each
activation. It predicts the gradient there from that of the logits, which is exact:

.. math:: \frac{dL}{dy_{il}} ≈ \frac{1}{B} f'(y_{il}) ∘ (δ_i \bar J_l + c \, r_{il})

The noise of a step's own directions stays out of its update with c = 0, so a pair in
every eighth step is enough. `fgrad.activity.joint_step` has the equations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fgrad import _arguments, _loss_and_aux, estimators, fixed_point, perturbations
from fgrad.activity import joint_sites, joint_structure, layer_gradients
from fgrad.activity.example_losses import ExampleLosses, mean_of, traced
from fgrad.activity.joint_parts import nodes_of
from fgrad.activity.joint_split import Split
from fgrad.activity.joint_step import JointStep, Learned
from fgrad.activity.mean_jacobians import Teaching
from fgrad.activity.site_gradients import Directions, SiteGradient, site_gradient
from fgrad.activity.sites import Site, check_values, site_leaves
from fgrad.activity.transform import PerturbedActivation
from fgrad.tracing import execution_order

# In at most so many parts of the batch an update on the way goes through an activation.
_PARTS = 16


class JointForwardGradState(NamedTuple):
    """State of `joint_forward_grad`.

    Attributes:
      key: the key that, with ``count``, addresses every u.
      count: int32 scalar, steps taken.
      loss: float32 scalar, the mean loss at the parameters of the last step. inf before
        the first step.
      nonfinite_pairs: int32 scalar, pairs of an example's losses that the last step
        left out.
      jacobians: by the path of a leaf: float32 [outputs, channels], the mean Jacobian
        of the logits by the activation of the leaf's layer; with positions [outputs,
        ..., channels]. Of several leaves at one activation the first holds it.
      errors: likewise float32 [2], for ``correction="auto"``; else empty.
      others: state of ``others``, or empty.
      aux: with ``has_aux`` what the losses of the last step came with, before it
        ``initial_aux``; or empty.
    """

    key: jax.Array
    count: jax.Array  # type: ignore[assignment]  # optax's name, and tuple's
    loss: jax.Array
    nonfinite_pairs: jax.Array
    jacobians: Any
    errors: Any
    others: Any = ()
    aux: Any = ()


def joint_forward_grad(
    key: jax.Array,
    head: str | Sequence[str],
    sites: Sequence[str] | None = None,
    *,
    every: int = 8,
    num_perturbations: int = 1,
    epsilon: float = 0.1,
    correction: float | Literal["auto"] = 0.0,
    memory: float = 200.0,
    transposed_head: bool = False,
    residual: bool = False,
    on_the_way: bool = False,
    activations: Sequence[PerturbedActivation] | None = None,
    per_position: bool = False,
    perturbation: perturbations.Perturbation | None = None,
    others: optax.GradientTransformation | None = None,
    has_aux: bool = False,
    initial_aux: Any = (),
) -> optax.GradientTransformationExtraArgs:
    r"""Estimates the gradient of all layers from joint pairs of evaluations.

    A step costs one forward pass and the products of the weights' gradients, and in
    every ``every``-th step a pair of forward passes more, however many layers there
    are. ``value_fn`` returns a loss for each example, and the gradient is that of their
    mean. The head's own gradient is exact.

    Activations are perturbed behind the function that follows their layer, if that acts
    on each value by itself (ReLU, GELU, SiLU, tanh and all that
    ``fgrad.tracing.derivatives`` can differentiate), and only where it is not flat.
    Behind anything else, such as a normalisation, a pooling or a residual connection,
    the layer's output itself is perturbed.

    A ``scan`` over layers is followed through its rounds, each of which is a layer of
    its own: of a leaf ``[layers, ...]`` every row has an activation. ``activations`` is
    needed then.

    Args:
      key: PRNG key, the only source of randomness.
      head: the layer that gives the logits, by the names of its parameters as in
        `Site`. Its output is [examples, outputs].
      sites: names of the other layers to train; all that are not the head's by default.
      every: n, to perturb in every n-th step only. The steps between follow the mean
        Jacobians.
      num_perturbations: K, directions in a step that perturbs; 2K evaluations.
      epsilon: perturbation scale in units of each activation's rms.
      correction: c, the weight of what this step's pairs say beyond the prediction.
        With 0 they only teach. With 1 and ``every=1`` the mean over u is the gradient,
        whatever the mean Jacobians are. "auto" takes, for each activation, the energy
        of the prediction's error as a share of that with its noise, both from running
        means.
      memory: steps that the mean Jacobians go back.
      transposed_head: whether the last activation before the head gets its gradient
        exactly, by the head's own transposed product (and what lies between the two),
        and is not perturbed. This needs the weights of the head a second time,
        transposed, and no other layer's.
      residual: whether the residual stream that ends at the last activation carries the
        gradient there, that of each example and position, to all activations that skip
        connections lead from, as if the blocks between were the identity. An activation
        inside a block gets it through the rest of its own block, transposed. None of
        these are perturbed; any others are, such as those before a change of width.
        For transformers and other pre-activation networks.
      on_the_way: whether to compute each layer's gradient on one more forward pass,
        with one activation alive at a time, instead of keeping all activations. It
        gives the same result, but for rounding, with four passes in a step that
        perturbs and two in any other.
      activations: what `explain_joint` says. The shapes of the mean Jacobians follow
        from it; by default they are taken from the last axes of the leaves, which have
        to be those of the layers' outputs.
      per_position: whether each position of an activation has a mean Jacobian of its
        own; needs ``activations``.
      perturbation: where u comes from; ``perturbations.rademacher()`` by default.
      others: a transformation for the gradient of the leaves of no site. It receives
        the mean of the losses. By default their updates are zero.
      has_aux: whether ``value_fn`` returns ``(losses, aux)``, where aux is a pytree of
        arrays. The state's ``aux`` is that of the evaluation in which nothing is
        perturbed. ``others`` gets the losses alone.
      initial_aux: the state's ``aux`` before the first step, as in
        `fgrad.fixed_point_forward_grad`.

    Returns:
      A transformation whose ``update`` takes ``value_fn`` (or ``obj_fn``), called as
      ``value_fn(params, **those of the extra arguments that it names)``, with the
      batch among them.

    Raises:
      TypeError, ValueError: here for bad options; in ``init`` for names of no parameter
        and leaves that are no floats or `QTensor`; in ``update`` for losses of another
        shape, and for a layer that cannot be followed from its parameters to its
        output: inside ``vmap`` over layers, or used twice.

    Example:
      >>> def losses(params, x, y):  # one for each example
      ...     hidden = jax.nn.relu(x @ params["first"])
      ...     hidden = jax.nn.relu(hidden @ params["second"])
      ...     return jnp.sum((hidden @ params["head"] - y) ** 2, axis=-1)
      >>> tx = optax.chain(
      ...     joint_forward_grad(jax.random.key(0), "head", every=2), optax.adam(0.02)
      ... )
      >>> normal = jax.random.normal
      >>> params = {
      ...     "first": normal(jax.random.key(1), (3, 8)) / 2,
      ...     "second": normal(jax.random.key(2), (8, 8)) / 3,
      ...     "head": jnp.zeros((8, 1)),
      ... }
      >>> state = tx.init(params)
      >>> x = normal(jax.random.key(3), (32, 3))
      >>> y = jnp.abs(x[:, :1])
      >>> for _ in range(200):
      ...     updates, state = jax.jit(tx.update, static_argnames="value_fn")(
      ...         params, state, params, value_fn=losses, x=x, y=y
      ...     )
      ...     params = optax.apply_updates(params, updates)
      >>> bool(jnp.mean(losses(params, x, y)) < 0.05)
      True

    Reference:
      Akrout et al., "Deep learning without weight transport", NeurIPS 2019, and
      Lansdell et al., "Learning to solve the credit assignment problem", ICLR 2020, for
      feedback that perturbations teach.
    """
    _arguments.key(key)
    options = _Options(
        key=key,
        head=joint_structure.as_head(head),
        names=None if sites is None else tuple(sites),
        every=every,
        num_perturbations=num_perturbations,
        epsilon=epsilon,
        correction=correction,
        memory=memory,
        transposed_head=transposed_head,
        residual=residual,
        on_the_way=on_the_way,
        activations=activations,
        per_position=per_position,
        perturbation=_arguments.perturbation(perturbation, perturbations.rademacher),
        others=None if others is None else _arguments.transformation(others),
        aux=_loss_and_aux.Aux.of(has_aux, initial_aux),
    )

    def init_fn(params: Any) -> JointForwardGradState:
        _arguments.visible(params)
        check_values(params)
        return options.init(params)

    def update_fn(
        updates: Any,
        state: JointForwardGradState,
        params: Any = None,
        *,
        value_fn: Callable[..., Any] | None = None,
        obj_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, JointForwardGradState]:
        loss_fn = _arguments.loss("joint_forward_grad", params, value_fn, obj_fn)
        _arguments.visible(params)
        return _update(options, updates, state, params, loss_fn, extra_args)

    return _arguments.link(init_fn, update_fn)


@dataclasses.dataclass(frozen=True, eq=False)
class _Options:
    """The arguments of `joint_forward_grad`, checked."""

    key: jax.Array
    head: Site
    names: tuple[str, ...] | None
    every: int
    num_perturbations: int
    epsilon: Any
    correction: float | Literal["auto"]
    memory: float
    transposed_head: bool
    residual: bool
    on_the_way: bool
    activations: Sequence[PerturbedActivation] | None
    per_position: bool
    perturbation: perturbations.Perturbation
    others: optax.GradientTransformationExtraArgs | None
    aux: _loss_and_aux.Aux

    def __post_init__(self) -> None:
        _arguments.count("every", self.every)
        _arguments.count("num_perturbations", self.num_perturbations)
        if fixed_point.is_concrete(self.epsilon) and not self.epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {self.epsilon}.")
        if self.correction != "auto" and not (
            isinstance(self.correction, int | float) and 0 <= self.correction <= 1
        ):
            raise ValueError(
                'correction must be between 0 and 1, or "auto", got '
                f"{self.correction!r}; 1 leaves the gradient unbiased where every=1."
            )
        if not self.memory >= 0:
            raise ValueError(f"memory must be 0 steps or more, got {self.memory}.")
        if self.per_position and self.activations is None:
            raise ValueError(
                "per_position=True needs the shapes of the activations: give "
                "activations=fgrad.activity.explain_joint(losses, params, head, ...)."
            )

    def sites(self, params: Any) -> Site:
        """The layers that are perturbed, as one site.

        Raises:
          ValueError: for names of no parameter, a leaf of the head, and no layers.
        """
        names = self.names
        if names is None:
            names = joint_structure.outside_of(self.head, params)
        if not names:
            raise ValueError(
                f"there is no layer but the head {self.head.names} to train; for the "
                "head alone use fgrad.activity_forward_grad(key, [Site(..., "
                "exact=True)])."
            )
        hidden = Site(*names)
        site_leaves([hidden, self.head], params)
        return hidden

    def trace(
        self,
        loss_fn: Callable[..., Any],
        hidden: Site,
        params: Any,
        kwargs: Mapping[str, Any],
    ) -> tuple[ExampleLosses, list[joint_sites.JointSite]]:
        """The losses of some data, and the activations in their trace."""
        has_aux, sites = self.aux.expected, [hidden, self.head]
        found = traced(loss_fn, params, kwargs, has_aux=has_aux, over_layers=True)
        losses = ExampleLosses(
            found.program, found.names, params, sites, kwargs, over_layers=True
        )
        losses.aux = jax.tree.unflatten(found.aux, losses.aux)
        return losses, joint_sites.joint_sites(
            losses,
            hidden,
            self.head,
            transposed_head=self.transposed_head,
            residual=self.residual,
        )

    def init(self, params: Any) -> JointForwardGradState:
        """The state before the first step."""
        # The placeholder of optax.tree.map_params has no leaves to be learned of.
        jacobians: Any = jnp.zeros([])
        errors: Any = jnp.zeros([])
        if jax.tree.leaves(params):
            shapes = self._shapes(params)
            jacobians = {name: jnp.zeros(shape) for name, shape in shapes.items()}
            auto = self.correction == "auto"
            errors = {name: jnp.zeros(2) for name in shapes} if auto else {}
        return JointForwardGradState(
            key=jnp.array(self.key, copy=True),
            count=jnp.zeros([], jnp.int32),
            loss=jnp.array(jnp.inf, jnp.float32),
            nonfinite_pairs=jnp.zeros([], jnp.int32),
            jacobians=jacobians,
            errors=errors,
            others=() if self.others is None else self.others.init(params),
            aux=self.aux.at_first(),
        )

    def _shapes(self, params: Any) -> dict[str, tuple[int, ...]]:
        """The shapes of the mean Jacobians by the paths of leaves."""
        hidden = self.sites(params)
        if self.activations is not None:
            *inner, head = self.activations
            kept = {
                a.leaves[0]: a.shape[1:] if self.per_position else a.shape[-1:]
                for a in inner
            }
            return {name: (head.shape[-1], *shape) for name, shape in kept.items()}
        found = site_leaves([hidden, self.head], params)
        axes = joint_sites.last_axes(params, [*found[hidden], *found[self.head]])
        outputs = {axes[path] for path in found[self.head]}
        if len(outputs) != 1 or outputs == {()}:
            raise ValueError(
                f"the leaves of the head {self.head.names} end in axes "
                f"{sorted(outputs)}, and not in one of the logits; give "
                "activations=fgrad.activity.explain_joint(losses, params, head, ...)."
            )
        (logits,) = outputs
        return {path: (*logits, *(axes[path] or (1,))) for path in found[hidden]}

    def learned(
        self, state: JointForwardGradState, found: Sequence[joint_sites.JointSite]
    ) -> dict[str, Learned]:
        """What the sites of a traced loss have learned so far."""
        nothing = jnp.zeros(2)
        names = {site.name: _stored(site.name, state.jacobians) for site in found}
        if missing := [name for name, stored in names.items() if stored is None]:
            raise ValueError(
                f"the activations of {missing} are not among those that the state was "
                f"made for, {list(state.jacobians)}; make activations= of the same "
                "loss, head and sites."
            )
        return {
            name: Learned(state.jacobians[stored], state.errors.get(stored, nothing))
            for name, stored in names.items()
            if stored is not None
        }


def _stored(name: str, jacobians: Mapping[str, Any]) -> str | None:
    """The name under which a state keeps what an activation has learned.

    The optimizer of Flax NNX hands variables to ``init``, and their values to
    ``update``.
    """
    return next((x for x in (name, f"{name}/value") if x in jacobians), None)


def _update(
    options: _Options,
    updates: Any,
    state: JointForwardGradState,
    params: Any,
    loss_fn: Callable[..., Any],
    extra_args: dict[str, Any],
) -> tuple[Any, JointForwardGradState]:
    kwargs = _arguments.named_arguments(loss_fn, extra_args)
    if options.others is None:
        gradient, others_state = jax.tree.map(jnp.zeros_like, params), ()
    else:
        mean_fn = mean_of(loss_fn, has_aux=options.aux.expected)
        gradient, others_state = options.others.update(
            updates, state.others, params, value_fn=mean_fn, **extra_args
        )
    hidden = options.sites(params)
    trace = functools.partial(options.trace, loss_fn, hidden)
    losses, sites = trace(params, kwargs)
    loss_name = losses.only_loss()
    at_head = _at_head(losses, options.head)
    whole = Split(losses, sites, 1, losses.program)
    split = _in_parts(trace, whole, params, kwargs) if options.on_the_way else whole
    step = _step(options, state, whole, split, loss_name, at_head)
    results, nonfinite = step.results()
    learned = {
        _stored(name, state.jacobians): result.learned
        for name, result in results.items()
    }
    gradients = dict(at_head.gradients)
    for result in results.values():
        gradients.update(result.gradients)
    gradients = losses.whole_leaves(gradients)
    auto = options.correction == "auto"
    errors = {name: x.errors for name, x in learned.items()} if auto else {}
    clean = losses.values[losses.output(loss_name)]
    return layer_gradients.with_gradients(params, gradient, gradients), state._replace(
        count=optax.safe_increment(state.count),
        loss=jnp.mean(clean.astype(jnp.float32)),
        nonfinite_pairs=nonfinite,
        jacobians=state.jacobians | {name: x.jacobian for name, x in learned.items()},
        errors=state.errors | errors,
        others=others_state,
        aux=options.aux.checked(losses.aux),
    )


def _at_head(losses: ExampleLosses, head: Site) -> SiteGradient:
    """The exact gradient by the logits, and of the head."""
    joint_sites.logits_of(losses, head)
    # An exact site draws no directions.
    directions = Directions(
        lambda index: index, 1, perturbations.rademacher(), estimators.spsa, 1
    )
    return site_gradient(losses, head, directions)


def _step(
    options: _Options,
    state: JointForwardGradState,
    whole: Split,
    split: Split,
    loss_name: str,
    at_head: SiteGradient,
) -> JointStep:
    """The step of joint pairs."""
    losses, sites = whole.losses, whole.sites
    learned = options.learned(state, sites)
    logits = joint_sites.logits_of(losses, options.head)
    signal = losses.examples * at_head.dy[logits]
    _check_shapes(losses, sites, learned, signal)
    if options.on_the_way:  # the head's input is not needed any more after this
        for gradient in at_head.gradients.values():
            signal = execution_order.delayed(signal, gradient)
    return JointStep(
        losses=losses,
        sites=sites,
        logits=logits,
        loss_name=loss_name,
        signal=signal,
        learned=learned,
        step_key=functools.partial(perturbations.sample_key, state.key, state.count),
        asked=state.count % options.every == 0,
        teaching=Teaching(
            state.count, options.every, options.memory, options.num_perturbations
        ),
        perturbation=options.perturbation,
        epsilon=options.epsilon,
        correction=options.correction,
        on_the_way=options.on_the_way,
        split=split,
    )


def _in_parts(
    trace: Callable[..., tuple[ExampleLosses, list[joint_sites.JointSite]]],
    whole: Split,
    params: Any,
    kwargs: Mapping[str, Any],
) -> Split:
    """The losses of a part of the examples, if the trace of them is alike.

    Args:
      trace: gives the losses and sites of parameters and data.
      whole: those of all examples, which are returned if parts are not alike.
      params: the parameters.
      kwargs: the data of all examples.
    """
    losses = whole.losses
    # Of one example alone the trace would often be another one.
    count = next(
        n for n in range(_PARTS, 0, -1) if losses.examples % (2 * n) == 0 or n == 1
    )
    examples = losses.examples // count
    found: list[Split] = []

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        whole = jnp.shape(x)
        mine = (examples, *whole[1:]) if whole[:1] == (losses.examples,) else whole
        return jax.ShapeDtypeStruct(mine, jnp.result_type(x))

    def collect(params: Any, kwargs: Any) -> None:
        found.append(Split(*trace(params, kwargs), count, losses.program))

    if count == 1:
        return whole
    try:
        jax.eval_shape(collect, params, jax.tree.map(shape, dict(kwargs)))
    except (TypeError, ValueError):
        # An argument that is no data has as many entries as there are examples, or the
        # loss knows how many there are. Then the activation is taken as a whole.
        return whole
    (split,) = found
    nodes = [n for x in split.sites for n in nodes_of(split.losses.program, x)]
    return split if split.fits(nodes) else whole


def _check_shapes(
    losses: ExampleLosses,
    sites: Sequence[joint_sites.JointSite],
    learned: Mapping[str, Learned],
    signal: jax.Array,
) -> None:
    """Raises a ValueError for a mean Jacobian that does not fit its activation."""
    for site in sites:
        shape = losses.program.avals[site.activation].shape
        outputs, *inner = learned[site.name].jacobian.shape
        fits = inner in ([*shape[1:]], [*shape[-1:]], [1])
        if outputs != signal.shape[1] or not fits:
            raise ValueError(
                f"the mean Jacobian of {site.name!r} has shape {[outputs, *inner]}, "
                f"made of the leaves' last axes, but its activation has shape {shape} "
                f"and the logits {signal.shape}; give activations="
                "fgrad.activity.explain_joint(losses, params, head, ...)."
            )
