"""The optax chain of a method: estimator, enhancements, optimizer, weight grid."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from optax import contrib

import fgrad
from experiments.learners import rivals
from experiments.usage import UsageError, check_names
from fgrad import activity, enhancements, estimators, leaves, perturbations

GRADIENTS = ("backward", "forward", "activity", "joint")

ESTIMATORS: dict[str, Callable[..., Any]] = {
    "sign_m_spsa": estimators.sign_m_spsa,
    "spsa": estimators.spsa,
    "normalized_spsa": estimators.normalized_spsa,
    "one_sided": rivals.over_deviation,
}

PERTURBATIONS: dict[str, Callable[..., perturbations.Perturbation]] = {
    "normal": perturbations.normal,
    "rademacher": perturbations.rademacher,
    "binomial": perturbations.binomial,
    "low_rank": perturbations.low_rank,
}

# What optimizers that find the rate themselves begin with. Their own 1e-6 is less than
# half a weight step, so that weights on a grid would never leave their start.
_FIRST_RATE = 1e-4
_FIRST_DISTANCE = 1e-3

# The last five find the rate themselves; theirs is a factor on what they find.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "muon": rivals.muon,
    "prodigy": functools.partial(contrib.prodigy, estim_lr0=_FIRST_RATE),
    "dadapt": functools.partial(contrib.dadapt_adamw, estim_lr0=_FIRST_RATE),
    "dog": functools.partial(contrib.dog, init_step=("heuristic", _FIRST_DISTANCE)),
    "dowg": contrib.dowg,
    "mechanic": lambda rate: contrib.mechanize(optax.adam(rate), s_init=_FIRST_RATE),
}

# Names in fgrad.enhancements that a method may have, and "cone", of the rivals.
ENHANCEMENTS = (
    "cone",
    "error_feedback",
    "extrapolation",
    "kernel_normalization",
    "momentum_guided_sampling",
    "sharpness_aware",
    "sparse_update",
)

EPSILON_UNITS: dict[str, Callable[[float], Any]] = {
    "weights": lambda epsilon: epsilon,
    "rms": fgrad.relative_epsilon,
    "step": fgrad.step_epsilon,
}


# What `fgrad.activity.joint_forward_grad` does by default.
_JOINT = {"every": 8, "num_perturbations": 1, "on_the_way": False, "residual": False}


def check_method(method: ConfigDict) -> None:
    """Makes sure that the chain of a method can be built.

    Args:
      method: see ``configs/quickstart.py``.

    Raises:
      UsageError: for names that there are not.
    """
    if method.gradient not in GRADIENTS:
        raise UsageError(
            'gradient must be "backward", "forward", "activity" or "joint", got '
            f"{method.gradient!r}."
        )
    check_names("optimizer", [method.optimizer], OPTIMIZERS)
    if method.gradient == "backward":
        chosen = method.get("enhancements", {})
        check_names("enhancement of backpropagation", chosen, ("sparse_update",))
        return
    check_names("estimator", [method.estimator], ESTIMATORS)
    check_names("perturbation", [method.perturbation], PERTURBATIONS)
    check_names("unit of epsilon", [method.epsilon_unit], EPSILON_UNITS)
    check_names("enhancement", method.enhancements, ENHANCEMENTS)


def differentiated(method: ConfigDict) -> bool:
    """Whether the chain of a method is given a gradient, by backpropagation.

    Sparse weights are chosen by the chain, so that of them it takes the gradient by
    itself, of a loss.

    Args:
      method: see ``configs/quickstart.py``.
    """
    sparse = "sparse_update" in method.get("enhancements", {})
    return method.gradient == "backward" and not sparse


def _backpropagated() -> optax.GradientTransformationExtraArgs:
    """The first link of a chain that takes the gradient of its loss itself."""

    def update(
        updates: Any, state: Any, params: Any = None, *, value_fn: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        del updates
        return jax.grad(value_fn)(params, **kwargs), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


def make_optimizer(
    method: ConfigDict,
    learning_rate: Any,
    steps: Any,
    key: jax.Array,
    spread: fgrad.Spread | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds the chain.

    Args:
      method: see ``configs/quickstart.py``.
      learning_rate: at the start; it decays linearly to 0. May be traced.
      steps: length of the run. May be traced.
      key: of all random choices: perturbations, ascents and sparse weights.
      spread: how devices share the evaluations of the gradient "forward", or None.

    Raises:
      UsageError: for names that there are not.
    """
    check_method(method)
    schedule = _linear_decay(learning_rate, steps)
    optimizer = optax.chain(
        OPTIMIZERS[method.optimizer](schedule), _scaled(method.get("rate_factors", {}))
    )
    if differentiated(method):
        return optax.with_extra_args_support(optimizer)
    ascent_key, choice_key = (jax.random.fold_in(key, i) for i in (1, 2))
    chosen: Mapping[str, Any] = method.enhancements

    def links(name: str) -> list[Any]:
        return [getattr(enhancements, name)(**chosen[name])] if name in chosen else []

    guides = links("momentum_guided_sampling")
    if "cone" in chosen:
        guides.append(rivals.Cone(**chosen["cone"]))
    chain = optax.chain(
        make_estimator(method, key, schedule, next(iter(guides), None), spread),
        *links("kernel_normalization"),
        fgrad.on_values(optimizer),
        *links("error_feedback"),
        # Without grid steps weights of few bits are treated as those of 16, as in the
        # paper: every update is rounded to the nearest step.
        fgrad.quantized_update(stochastic_below=16 if method.get("low_bit") else 0),
    )
    if "extrapolation" in chosen:
        chain = enhancements.extrapolation(chain, **chosen["extrapolation"])
    if "sharpness_aware" in chosen:
        settings = chosen["sharpness_aware"]
        chain = enhancements.sharpness_aware(chain, ascent_key, **settings)
    if "sparse_update" in chosen:
        settings = chosen["sparse_update"]
        chain = enhancements.sparse_update(chain, key=choice_key, **settings)
    return optax.with_extra_args_support(chain)


def make_estimator(
    method: ConfigDict,
    key: jax.Array,
    schedule: optax.Schedule,
    guide: Any = None,
    spread: fgrad.Spread | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds the first link of a chain: it estimates the gradient, or computes it.

    Args:
      method: see ``configs/quickstart.py``.
      key: of the perturbations.
      schedule: learning rate, which weights of less than 16 bits are estimated with.
      guide: of momentum-guided sampling, or None.
      spread: how devices share the evaluations of the gradient "forward", or None.
    """

    def weights(mask: Any = None) -> optax.GradientTransformationExtraArgs:
        return fgrad.fixed_point_forward_grad(
            key,
            mask=mask,
            epsilon=EPSILON_UNITS[method.epsilon_unit](method.epsilon),
            num_perturbations=method.num_perturbations,
            vectorize=method.vectorize,
            perturbation=_perturbation(method),
            estimator=ESTIMATORS[method.estimator],
            # `fgrad.on_grid` would look for the peak of a schedule that may be traced.
            low_bit=leaves.OnGrid(
                schedule, probe=None, below=16, peak=schedule(jnp.int32(0))
            )
            if method.low_bit
            else None,
            guide=guide,
            spread=spread,
        )

    if method.gradient == "backward":
        return _backpropagated()
    if method.estimator == "one_sided":
        return rivals.one_sided(
            key,
            method.num_perturbations,
            epsilon=EPSILON_UNITS[method.epsilon_unit](method.epsilon),
            perturbation=_perturbation(method),
        )
    if method.gradient == "joint":
        return activity.joint_forward_grad(key, **method.joint)
    if method.gradient != "activity":
        return weights()
    sites = [_site(name, **given) for name, given in method.sites.items()]
    return fgrad.activity_forward_grad(
        key,
        sites,
        num_perturbations=method.num_perturbations,
        vectorize=method.vectorize,
        others=weights(activity.leaves_outside(sites)) if method.others else None,
    )


def forward_passes(method: ConfigDict) -> float:
    """Forward passes of a step; a backward pass counts as two.

    Behind a perturbed activation only the rest of the network is evaluated again. That
    counts as a whole pass as well. Joint pairs that come in some steps only count with
    their mean. With ``residual`` nothing is perturbed, unless a method that leaves some
    activations to pairs says so by ``every``.
    """
    if method.gradient == "backward":
        return 3
    if method.gradient == "joint":
        joint = {**_JOINT, **method.joint}
        pairs = 2 * joint["num_perturbations"] / joint["every"]
        if joint["residual"]:  # products transposed inside blocks
            pairs = 1 + pairs * ("every" in method.joint)
        return 1 + joint["on_the_way"] + pairs
    if method.estimator == "one_sided":
        return method.num_perturbations + 1
    chosen = method.enhancements
    ahead = chosen.get("extrapolation", {}).get("two_pass", False)
    pairs = method.num_perturbations * (1 + ahead) + ("sharpness_aware" in chosen)
    if method.gradient == "activity":
        # One pass reaches the loss without perturbations. An exact site evaluates
        # nothing but the loss function again, which counts for nothing here.
        random = sum(not site.get("exact") for site in method.sites.values())
        return 1 + 2 * pairs * (random + bool(method.others))
    return 2 * pairs


def passes_with_products(method: ConfigDict) -> float:
    """Forward passes of a step, with the products of the weights' gradients as one.

    Backpropagation multiplies twice for each product of a forward pass: once for the
    gradient of the layer's input and once for that of its weights. Perturbed
    activations need the second as well. That of an exact head alone, which is a small
    part of a network, counts for nothing.
    """
    random = [
        site for site in method.get("sites", {}).values() if not site.get("exact")
    ]
    local = method.gradient == "joint" or (method.gradient == "activity" and random)
    return forward_passes(method) + bool(local)


def _site(
    name: str, synthetic: Mapping[str, Any] | None = None, **settings: Any
) -> activity.Site:
    """Makes the site of a configuration's settings.

    Args:
      name: of the perturbed layer.
      synthetic: settings of its synthetic gradient, such as ``{"site": "classifier"}``.
      **settings: other arguments of `fgrad.activity.Site`.
    """
    if synthetic is not None:
        settings["synthetic"] = activity.SyntheticGradient(**synthetic)
    return activity.Site(name, **settings)


def _perturbation(method: ConfigDict) -> perturbations.Perturbation:
    arguments = {"rank": method.rank} if method.perturbation == "low_rank" else {}
    return PERTURBATIONS[method.perturbation](**arguments)


def _scaled(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of layers, which are named by the start of their paths."""

    def scaled(updates: Any) -> Any:
        for name, factor in factors.items():
            updates = jax.tree.map(
                lambda update, inside, factor=factor: (
                    update * factor if inside else update
                ),
                updates,
                activity.leaves_of([name])(updates),
            )
        return updates

    return optax.stateless(lambda updates, params: scaled(updates))


def _linear_decay(learning_rate: Any, steps: Any) -> optax.Schedule:
    """A schedule down to 0; unlike those of optax it takes traced ``steps``."""
    return lambda count: learning_rate * jnp.maximum(1 - count / steps, 0)
