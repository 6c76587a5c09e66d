"""Ways to adapt a pre-trained network: which leaves exist, and which of them train.

A way (`WAYS`) makes of a Flax module an `Adapted` one, which initialises and applies
like the module, adds the leaves of the way inside it, and splits the parameters into
those that train and those that are frozen. Gradients, forward or backward, and
optimizers are given the first only, so that the others cost neither.

All ways but `full` and `norms` need a module that is a sequence of stages: an
embedding, blocks, a stage that makes one vector of features of each example, and a
head. ``module.stages`` holds the names of the parameters of each, and ``module(x,
start, stop)`` runs a slice of them. Stages before the first that trains can run once
for all steps: see `Adapted.cut`.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from experiments.usage import UsageError, check_names
from fgrad import fixed_point, layers

Path = tuple[str, ...]  # of a leaf, such as ("Block_0", "Dense_1", "kernel")
Params = dict[str, Any]

_LOCAL = "local_logits"  # the Flax collection that local heads write into


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A module and a way to adapt it; made by the functions in `WAYS`.

    Attributes:
      module: the network.
      trains: whether the leaf of a path trains.
      interceptor: adds leaves to the layers that it intercepts, in the form that
        ``flax.linen.intercept_methods`` takes; None if the way adds none.

    Example:
      >>> from experiments.models import vit
      >>> network = vit.ViT(patch=4, width=8, depth=2, num_heads=2, mlp_width=8)
      >>> images = jnp.ones((1, 8, 8, 1))
      >>> pretrained = network.init(jax.random.key(0), images)["params"]
      >>> model = last_blocks(network, num_blocks=1)
      >>> params = model.begin(pretrained, jax.random.key(1), images)
      >>> trained, frozen = model.split(params)
      >>> sorted(trained), sorted(frozen)
      (['Block_1', 'Dense_0', 'LayerNorm_0'],
       ['Block_0', 'Conv_0', 'class_token', 'positions'])
      >>> cut = model.cut(trained)
      >>> tokens = model.apply({"params": frozen}, images, stop=cut)  # once
      >>> model.apply({"params": trained}, tokens, start=cut).shape
      (1, 10)
    """

    module: nn.Module
    trains: Callable[[Path], bool]
    interceptor: Callable[..., Any] | None = None

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Calls ``module.init`` with the leaves that the way adds."""
        with self._intercepted():
            return self.module.init(*args, **kwargs)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Calls ``module.apply`` with the leaves that the way adds."""
        with self._intercepted():
            return self.module.apply(*args, **kwargs)

    def outputs(
        self, variables: Any, x: jax.Array, **kwargs: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Gives the logits, and those of local heads by the names of their blocks."""
        logits, sown = self.apply(variables, x, mutable=_LOCAL, **kwargs)
        local = traverse_util.flatten_dict(sown.get(_LOCAL, {}))
        return logits, {"/".join(path[:-1]): x for path, (x,) in local.items()}

    def begin(
        self, pretrained: Mapping[str, Any], key: jax.Array, images: jax.Array
    ) -> Params:
        """Gives the parameters where training starts.

        Args:
          pretrained: float parameters of the module. Leaves that train may be missing,
            such as a head for other classes.
          key: PRNG key of the leaves that are new or missing.
          images: an input of the module, of which only the shape counts.

        Returns:
          The pre-trained leaves and the new ones.

        Raises:
          ValueError: if a leaf of ``pretrained`` is not the module's or has another
            shape; if it lacks one that does not train; if the way adds no leaf.
        """
        given = traverse_util.flatten_dict(pretrained)
        shapes = jax.eval_shape(self.init, key, images)["params"]
        leaves = traverse_util.flatten_dict(shapes)
        missing = [path for path in leaves if path not in given]
        for path, leaf in given.items():
            shape = leaves[path].shape if path in leaves else None
            if jnp.shape(leaf) != shape:
                raise ValueError(
                    f"the pre-trained leaf {'/'.join(path)} has shape "
                    f"{jnp.shape(leaf)}, in the module it has {shape}; leave it out if "
                    "it is to begin anew."
                )
        if lacking := ["/".join(path) for path in missing if not self.trains(path)]:
            raise ValueError(
                f"the pre-trained parameters lack {lacking}, which do not train here; "
                "choose a way that trains them."
            )
        if self.interceptor is not None and not missing:
            raise ValueError(
                "the way adds no leaf, since no layer is chosen; the module has "
                f"{sorted({'/'.join(path[:-1]) for path in leaves})}."
            )
        drawn = _drawn(self, key, images, tuple(missing))
        return traverse_util.unflatten_dict({**given, **drawn})

    def split(self, params: Mapping[str, Any]) -> tuple[Params, Params]:
        """Splits parameters into the leaves that train and those that do not.

        Both are nested as the parameters are.
        """
        trained: dict[tuple[str, ...], Any] = {}
        frozen: dict[tuple[str, ...], Any] = {}
        for path, leaf in traverse_util.flatten_dict(params).items():
            (trained if self.trains(path) else frozen)[path] = leaf
        unflatten = traverse_util.unflatten_dict
        return unflatten(trained), unflatten(frozen)

    def cut(self, trained: Mapping[str, Any]) -> int:
        """Finds the first stage that has one of these leaves.

        All stages before it are frozen.
        """
        for index, names in enumerate(getattr(self.module, "stages", ())):
            if not trained.keys().isdisjoint(names):
                return index
        return 0

    def _intercepted(self) -> contextlib.AbstractContextManager[None]:
        if self.interceptor is None:
            return contextlib.nullcontext()
        return nn.intercept_methods(self.interceptor)


def merge(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> Params:
    """Puts together what `Adapted.split` divided.

    Example:
      >>> merge({"a": {"w": 1}}, {"a": {"b": 2}, "c": 3})
      {'a': {'b': 2, 'w': 1}, 'c': 3}
    """
    flat = traverse_util.flatten_dict(frozen) | traverse_util.flatten_dict(trained)
    return traverse_util.unflatten_dict(flat)


def num_weights(params: Any) -> int:
    """How many weights there are, of which a `fgrad.QTensor` holds its integers.

    Example:
      >>> import fgrad
      >>> num_weights({"kernel": fgrad.quantize(jnp.ones((3, 2))), "bias": jnp.ones(2)})
      8
    """
    leaves = jax.tree.leaves(params, is_leaf=fixed_point.is_qtensor)
    return sum(leaf.size for leaf in leaves)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _drawn(
    model: Adapted, key: jax.Array, images: jax.Array, paths: tuple[Path, ...]
) -> dict[Path, jax.Array]:
    """Draws some initial leaves of a model; the others are not computed."""
    leaves = traverse_util.flatten_dict(model.init(key, images)["params"])
    return {path: leaves[path] for path in paths}


def full(network: nn.Module) -> Adapted:
    """Full fine-tuning: every leaf trains, of any Flax module.

    Args:
      network: the module.
    """
    return Adapted(network, lambda path: True)


def linear_probe(network: nn.Module, *, num_layers: int = 1) -> Adapted:
    r"""Trains the head, before which hidden layers may be added.

    .. math:: x_{i+1} = x_i + ReLU(x_i) W_i + b_i, \quad logits = x_n W + b

    The hidden layers begin as zeros, so that training starts from the pre-trained
    network's predictions.

    Args:
      network: a module with stages.
      num_layers: layers that train, the head included.

    Raises:
      TypeError, ValueError: for a module without stages, and for no layers.

    Example:
      >>> from experiments.models import efficientnet
      >>> model = linear_probe(efficientnet.EfficientNetLite0(), num_layers=3)
      >>> model.trains(("classifier", "hidden_0", "kernel"))
      True
      >>> model.cut({"classifier": {}})  # after the stem, 16 blocks and the pooling
      18
    """
    head = _stages(network)[-1]
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}.")

    def deepen(layer: Any, layer_fn: Callable[[Any], Any], x: jax.Array) -> jax.Array:
        for index in range(num_layers - 1):
            hidden = layers.Dense(
                x.shape[-1],
                kernel_init=nn.initializers.zeros,
                name=f"hidden_{index}",
                **_settings(layer),
            )
            x += hidden(nn.relu(x))
        return layer_fn(x)

    return Adapted(
        network,
        lambda path: path[0] in head,
        _around(lambda layer: layer.path == head, deepen) if num_layers > 1 else None,
    )


def last_blocks(network: nn.Module, *, num_blocks: int = 1) -> Adapted:
    """Trains the last blocks and what follows them.

    Args:
      network: a module with stages.
      num_blocks: k, up to all blocks.

    Raises:
      TypeError, ValueError: for a module without stages, and for another k.
    """
    stages = _stages(network)
    _check_blocks(stages, num_blocks)
    names = {name for stage in stages[-2 - num_blocks :] for name in stage}
    return Adapted(network, lambda path: path[0] in names)


def norms(network: nn.Module) -> Adapted:
    """Trains the scale and the shift of every normalisation, and nothing else.

    Args:
      network: any Flax module with normalisations, under Flax's names for them.

    Example:
      >>> from experiments.models import vit
      >>> norms(vit.ViT()).trains(("Block_0", "LayerNorm_1", "scale"))
      True

    Reference:
      Wang et al., "Tent: fully test-time adaptation by entropy minimization", ICLR
      2021.
    """
    pattern = re.compile("(Layer|Batch|Group|RMS|Instance)Norm_[0-9]+")
    return Adapted(
        network, lambda path: any(pattern.fullmatch(name) for name in path[:-1])
    )


def deep_prompts(
    network: nn.Module,
    *,
    num_prompts: int = 8,
    stddev: float = 0.3,
    with_head: bool = True,
) -> Adapted:
    r"""Trains deep visual prompts, which are tokens at the input of every block.

    .. math:: [T_{i+1}, \_] = Block_i([T_i, P_i])

    The outputs of a block at its prompts P are dropped, since the next block has its
    own prompts.

    Args:
      network: a vision transformer: a module with stages whose blocks take tokens
        [batch, tokens, width].
      num_prompts: of each block.
      stddev: of their normal initial values.
      with_head: whether the head trains as well.

    Raises:
      TypeError, ValueError: for a module without stages, and for no prompts; when the
        network runs, for blocks that take no tokens.

    Reference:
      Jia et al., "Visual prompt tuning", ECCV 2022, VPT-deep.
    """
    _, *blocks, _, head = _stages(network)
    if num_prompts < 1:
        raise ValueError(f"num_prompts must be at least 1, got {num_prompts}.")

    def prompt(layer: Any, layer_fn: Callable[[Any], Any], x: jax.Array) -> jax.Array:
        if x.ndim != 3:
            raise ValueError(
                "prompts need blocks that take tokens [batch, tokens, width]; those of "
                f"{type(network).__name__} take an array of shape {x.shape}."
            )
        shape = (1, num_prompts, x.shape[-1])
        prompts = layer.param("prompts", nn.initializers.normal(stddev), shape)
        # Attention does not see the order of tokens: they may stand behind the others.
        prompts = jnp.tile(jnp.asarray(prompts), (len(x), 1, 1))
        return layer_fn(jnp.concatenate([x, prompts], axis=1))[:, : x.shape[1]]

    return Adapted(
        network,
        lambda path: path[-1] == "prompts" or (with_head and path[0] in head),
        _around(lambda layer: layer.path in blocks, prompt),
    )


def lora(
    network: nn.Module, *, rank: int = 4, kernels: str = ".*/(query|value)"
) -> Adapted:
    r"""Trains a low-rank change of chosen kernels, and the head.

    .. math:: y = x W + (x U) V + b, \quad V = 0 \text{ at first}

    Args:
      network: a module with stages.
      rank: of the change U V.
      kernels: a regular expression that matches the whole path of a layer, such as
        "Block_0/Dense_0": dense layers, and 1x1 convolutions of stride 1. By default
        the queries and values of attention.

    Raises:
      TypeError, ValueError: for a module without stages, and for a rank below 1; from
        ``begin`` if no layer matches.

    Example:
      >>> from experiments.models import efficientnet
      >>> network = efficientnet.EfficientNetLite0(num_classes=10)
      >>> model = lora(network, rank=2, kernels="blocks_15/project")
      >>> images = jnp.ones((1, 32, 32, 3))
      >>> params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
      >>> params["blocks_15"]["project"]["lora_down"]["kernel"].shape
      (1152, 2)

    Reference:
      Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022.
    """
    head = _stages(network)[-1]
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    pattern, added = re.compile(kernels), ("lora_down", "lora_up")

    def chosen(layer: Any) -> bool:
        path = layer.path
        own = bool(path) and path[-1] in added
        return not own and _is_dense(layer) and bool(pattern.fullmatch("/".join(path)))

    def add(layer: Any, layer_fn: Callable[[Any], Any], x: jax.Array) -> jax.Array:
        settings = {"use_bias": False, **_settings(layer)}
        axis = getattr(layer, "axis", -1)  # several of attention's output
        down = layers.DenseGeneral(rank, axis=axis, name=added[0], **settings)
        zeros = nn.initializers.zeros
        up = layers.DenseGeneral(
            layer.features, kernel_init=zeros, name=added[1], **settings
        )
        return layer_fn(x) + up(down(x))

    return Adapted(
        network,
        lambda path: path[0] in head or not set(added).isdisjoint(path),
        _around(chosen, add),
    )


def adapter(
    network: nn.Module,
    *,
    num_blocks: int = 1,
    num_adapters: int = 1,
    width: int | None = None,
    local_heads: bool = False,
) -> Adapted:
    r"""Trains residual adapters before some of the last blocks, and the head.

    .. math:: x \leftarrow x + x A + b, \quad A = 0 \text{ and } b = 0 \text{ at first}

    A has a row and a column for each channel of x. All information passes through this
    narrow place, which suits perturbed activations (`fgrad.activity_forward_grad`).

    Args:
      network: a module with stages.
      num_blocks: how many blocks come after the first adapter.
      num_adapters: how many of these blocks, from the first, have an adapter before
        them.
      width: of a hidden layer, :math:`x + ReLU(x D + d) A + b`; none by default.
      local_heads: whether each block with an adapter, but for the last of them, gets a
        head of its own for a local loss (`Adapted.outputs`). The head sees the mean
        over the positions of the block's output. No gradient then passes from later
        blocks to earlier ones.

    Raises:
      TypeError, ValueError: as `last_blocks`; for more adapters than blocks, no width,
        and local heads for one adapter.

    Example:
      >>> from experiments.models import efficientnet
      >>> network = efficientnet.EfficientNetLite0(num_classes=10)
      >>> model = adapter(network)
      >>> images = jnp.ones((1, 32, 32, 3))
      >>> params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
      >>> params["blocks_15"]["adapter"]["kernel"].shape
      (192, 192)

    Reference:
      Local heads: Belilovsky et al., "Greedy layerwise learning can scale to
      ImageNet", ICML 2019.
    """
    stages = _stages(network)
    _check_blocks(stages, num_blocks)
    least = 2 if local_heads else 1
    if not least <= num_adapters <= num_blocks:
        raise ValueError(
            f"num_adapters must be {least} to {num_blocks}, which is num_blocks, got "
            f"{num_adapters}."
        )
    if width is not None and width < 1:
        raise ValueError(f"width must be at least 1, got {width}.")
    places = stages[-2 - num_blocks :][:num_adapters]
    added = ("adapter", "adapter_down", "local_head")

    def add(layer: Any, layer_fn: Callable[[Any], Any], x: jax.Array) -> jax.Array:
        dense = functools.partial(
            layers.Dense, bits=layer.bits, calibration=layer.calibration
        )
        hidden = x if width is None else nn.relu(dense(width, name="adapter_down")(x))
        zeros = nn.initializers.zeros
        residual = dense(x.shape[-1], kernel_init=zeros, name="adapter")
        y = layer_fn(x + residual(hidden))
        if local_heads and layer.path != places[-1]:
            head = dense(network.num_classes, name="local_head")
            layer.sow(_LOCAL, "logits", head(y.mean(axis=tuple(range(1, y.ndim - 1)))))
            y = jax.lax.stop_gradient(y)
        return y

    return Adapted(
        network,
        lambda path: path[0] in stages[-1] or not set(added).isdisjoint(path),
        _around(lambda layer: layer.path in places, add),
    )


def branch_scales(network: nn.Module, *, head: bool = False) -> Adapted:
    """Trains what scales the branches of re-parameterized blocks.

    Args:
      network: a module with stages whose blocks fold branches, such as
        `experiments.models.reparameterized.ReparameterizedCNN`.
      head: whether the head trains as well.

    Raises:
      TypeError: for a module without stages or without branches.

    Example:
      >>> from experiments.models import reparameterized
      >>> model = branch_scales(reparameterized.ReparameterizedCNN())
      >>> model.trains(("Block_0", "scales")), model.trains(("Block_0", "branches"))
      (True, False)
    """
    stages, name = _stages(network), getattr(network, "branch_scales", None)
    if name is None:
        raise TypeError(
            f"{type(network).__name__} has no branches with scales, which this way "
            "trains; use a network of experiments.models.reparameterized."
        )
    return Adapted(
        network, lambda path: path[-1] == name or (head and path[0] in stages[-1])
    )


WAYS: dict[str, Callable[..., Adapted]] = {
    way.__name__: way
    for way in (
        full,
        linear_probe,
        last_blocks,
        norms,
        deep_prompts,
        lora,
        adapter,
        branch_scales,
    )
}


def check_way(chosen: Mapping[str, Any]) -> None:
    """Makes sure that a configuration names one way to adapt, or none.

    Args:
      chosen: the name of a way and its options, ``{"lora": {"rank": 2}}``.

    Raises:
      UsageError: for more than one name, or for one that is not in `WAYS`.
    """
    check_names("way to adapt", chosen, WAYS)
    if len(chosen) > 1:
        raise UsageError(
            f"choose one way to adapt of {list(WAYS)}, got {list(chosen)}."
        )


def make(network: nn.Module, chosen: Mapping[str, Any]) -> Adapted:
    """Adapts a network in the way of a configuration.

    Args:
      network: the module.
      chosen: the name of a way and its options, ``{"lora": {"rank": 2}}``; `full` if
        there is none.

    Raises:
      UsageError: as `check_way`.

    Example:
      >>> from experiments.models import vit
      >>> make(vit.ViT(), {"linear_probe": {}}).trains(("Dense_0", "bias"))
      True
    """
    check_way(chosen)
    for name, options in chosen.items():
        return WAYS[name](network, **options)
    return full(network)


def _stages(network: Any) -> tuple[Path, ...]:
    if not hasattr(network, "stages"):
        raise TypeError(
            f"{type(network).__name__} has no stages, which this way needs; see the "
            "module experiments.learners.adapt, or use full()."
        )
    return network.stages


def _check_blocks(stages: tuple[Path, ...], num_blocks: int) -> None:
    if not 1 <= num_blocks <= len(stages) - 3:
        raise ValueError(
            f"num_blocks must be 1 to {len(stages) - 3}, which the network has, got "
            f"{num_blocks}."
        )


def _settings(layer: Any) -> dict[str, Any]:
    """The arithmetic of a layer, as settings for the layers that are added to it."""
    return {
        "bits": layer.bits,
        "activation_scale": layer.activation_scale,
        "calibration": layer.calibration,
    }


def _is_dense(layer: Any) -> bool:
    if isinstance(layer, layers.Conv):
        return layer.kernel_size == (1, 1) and layer.strides in (None, 1, (1, 1))
    return isinstance(layer, layers.Dense | layers.DenseGeneral)


def _around(
    chosen: Callable[[Any], bool], change: Callable[..., Any]
) -> Callable[..., Any]:
    """Makes an interceptor that calls ``change(layer, layer_fn, x)`` for chosen layers.

    All other layers are called as they are.
    """

    def interceptor(next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__" or not chosen(context.module):
            return next_fn(*args, **kwargs)
        return change(context.module, next_fn, *args, **kwargs)

    return interceptor
