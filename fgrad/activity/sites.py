"""Sites: the layers whose activations are perturbed, found by their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fgrad import _arguments, _checks, fixed_point
from fgrad.activity.synthetic_gradients import SyntheticGradient
from fgrad.fixed_point import is_qtensor


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """Layers whose output is perturbed, and how.

    Attributes:
      names: names of layers or of their parameters, such as ``"blocks_3/project"``:
        the beginning of a parameter's path, joined by slashes. Several layers are
        perturbed at the same time, which costs no more evaluations but adds to the
        noise.
      epsilon: perturbation scale in units of the activation's rms.
      num_perturbations: K, the number of directions; ``activity_forward_grad``'s by
        default.
      exact: whether to perturb each coordinate of the output in turn, instead of
        along random directions. This suits narrow outputs near the end: the gradient
        by the logits costs two evaluations of the loss function alone for each class,
        has no noise, and is exact up to ε². ``epsilon`` is then in the units of the
        activation.
      loss: the name of this site's loss where ``value_fn`` returns several, such as
        the local loss of a block.
      synthetic: a `SyntheticGradient`, which takes most of the noise away. The site
        must then be one activation.

    Example:
      >>> Site("adapter", "norm/scale", epsilon=0.05).names
      ('adapter', 'norm/scale')
    """

    names: tuple[str, ...]
    epsilon: float = 0.03
    num_perturbations: int | None = None
    exact: bool = False
    loss: str | None = None
    synthetic: SyntheticGradient | None = None

    def __init__(
        self,
        *names: str,
        epsilon: float = 0.03,
        num_perturbations: int | None = None,
        exact: bool = False,
        loss: str | None = None,
        synthetic: SyntheticGradient | None = None,
    ) -> None:
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(
                f"a site needs the names of layers, got {names!r}; use for example "
                'fgrad.activity.Site("head").'
            )
        _checks.positive("epsilon", epsilon)
        if num_perturbations is not None:
            num_perturbations = _arguments.count("num_perturbations", num_perturbations)
        if not isinstance(exact, bool):
            raise TypeError(f"exact must be True or False, got {exact!r}.")
        if loss is not None and not isinstance(loss, str):
            raise TypeError(
                "loss must be the name of one of the losses that value_fn returns, "
                f"got {loss!r}."
            )
        if synthetic is not None and not isinstance(synthetic, SyntheticGradient):
            raise TypeError(
                "synthetic must be fgrad.activity.SyntheticGradient(name of an exact "
                f"site), got {synthetic!r}."
            )
        if synthetic is not None and exact:
            raise ValueError(
                f"site {names} is exact and has no noise to take away; leave out "
                "synthetic."
            )
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "epsilon", epsilon)
        object.__setattr__(self, "num_perturbations", num_perturbations)
        object.__setattr__(self, "exact", exact)
        object.__setattr__(self, "loss", loss)
        object.__setattr__(self, "synthetic", synthetic)


def leaves_of(sites: Sequence[str | Site]) -> Callable[[Any], Any]:
    """A mask of the leaves that belong to some sites.

    Args:
      sites: as in `activity_forward_grad`.

    Returns:
      A function from params to a pytree of bools, for ``mask=``.

    Example:
      >>> leaves_of(["head"])({"head": {"bias": 0.0}, "body": {"kernel": 0.0}})
      {'body': {'kernel': False}, 'head': {'bias': True}}
    """
    names = [name for site in as_sites(sites) for name in site.names]

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: any(_matches(name, path) for name in names),
            params,
            is_leaf=is_qtensor,
        )

    return mask


def leaves_outside(sites: Sequence[str | Site]) -> Callable[[Any], Any]:
    """A mask of the leaves that belong to none of some sites; see `leaves_of`."""
    inside = leaves_of(sites)
    return lambda params: jax.tree.map(lambda x: not x, inside(params))


def as_sites(sites: Any) -> list[Site]:
    """The sites, each of which may be given by its name."""
    if isinstance(sites, str) or not isinstance(sites, Sequence):
        raise TypeError(
            f"sites must be a list of layers' names or of Site, got {sites!r}; use for "
            'example sites=["head"].'
        )
    return [as_site(site) for site in sites]


def as_site(site: str | Site) -> Site:
    """A site, which may be given by its name alone."""
    if isinstance(site, str):
        return Site(site)
    if not isinstance(site, Site):
        raise TypeError(
            f"a site is a layer's name or fgrad.activity.Site(name), got {site!r}."
        )
    return site


def _matches(name: str, path: tuple[Any, ...]) -> bool:
    """Whether a leaf is the one of this name, or in the layer of this name."""
    text = fixed_point.path_str(path)
    return text == name or text.startswith(name + "/")


def site_leaves(sites: Sequence[Site], params: Any) -> dict[Site, list[str]]:
    """The paths of the leaves of each site.

    Raises:
      ValueError: for a name of no parameter, and for a leaf of two sites.
      TypeError: for a leaf of integers that is no `QTensor`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor)
    found: dict[Site, list[str]] = {}
    owner: dict[str, Site] = {}
    for site in sites:
        for name in site.names:
            paths = [path for path, _ in leaves if _matches(name, path)]
            if not paths:
                known = [fixed_point.path_str(path) for path, _ in leaves]
                raise ValueError(
                    f"site {name!r} names no parameter; there are {known}."
                )
            for path in paths:
                text = fixed_point.path_str(path)
                if text in owner:
                    raise ValueError(
                        f"leaf {text!r} belongs to two sites, {owner[text].names} and "
                        f"{site.names}; name it once."
                    )
                owner[text] = site
                found.setdefault(site, []).append(text)
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        text = fixed_point.path_str(path)
        if text in owner and not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"leaf {text!r} of site {owner[text].names} has dtype {dtype}, and a "
                "site has floats or a QTensor; wrap integers with their step, "
                "fgrad.QTensor(qvalue, scale, bits)."
            )
    return found


def check_values(params: Any) -> None:
    """Raises a ValueError for a `QTensor` that is no tensor on a grid."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor):
        if is_qtensor(leaf):
            fixed_point.check_values(leaf, fixed_point.path_str(path))


def exact_site(site: Site, sites: Sequence[Site]) -> Site:
    """The exact site that a site's synthetic gradient names.

    Raises:
      ValueError: if there is none, or if it has another loss.
    """
    assert site.synthetic is not None
    name = site.synthetic.site
    exact = [s for s in sites if s.exact]
    for other in exact:
        if name in other.names:
            if other.loss != site.loss:
                raise ValueError(
                    f"the synthetic gradient of site {site.names} with the loss "
                    f"{site.loss!r} names {name!r}, whose loss is {other.loss!r}; it "
                    "needs an exact site of the same loss."
                )
            return other
    raise ValueError(
        f"the synthetic gradient of site {site.names} names {name!r}, which is no "
        f"exact site; there are {[s.names for s in exact]}. Add for example "
        f"Site({name!r}, exact=True)."
    )


def mean_jacobians(sites: Sequence[Site], params: Any) -> dict[str, jax.Array]:
    """The first running means: zeros, by the first name of each site that has one.

    The shape is [outputs, channels], the last axes of the leaves of the exact site and
    of the site itself.

    Raises:
      ValueError: if the leaves of a site end in different axes.
    """
    if not jax.tree.leaves(params):  # optax.tree.map_params has a placeholder
        return {s.names[0]: jnp.zeros((0, 0)) for s in sites if s.synthetic is not None}
    sizes = {}
    leaves = {
        fixed_point.path_str(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            params, is_leaf=is_qtensor
        )
    }
    for site, paths in site_leaves(sites, params).items():
        sizes[site] = {jnp.shape(leaves[path])[-1:] for path in paths}
    found = {}
    for site in sites:
        if site.synthetic is None:
            continue
        shape: list[int] = []
        for one in (exact_site(site, sites), site):
            if len(sizes[one]) != 1 or sizes[one] == {()}:
                raise ValueError(
                    f"a synthetic gradient of site {site.names} needs a single layer "
                    f"here and at {site.synthetic.site!r}, but the leaves of "
                    f"{one.names} end in axes {sorted(sizes[one])}; name each layer "
                    "as a site of its own."
                )
            shape += next(iter(sizes[one]))
        found[site.names[0]] = jnp.zeros(shape, jnp.float32)
    return found
