"""Which device makes which runs, pairs and examples: what ``--mesh`` says.

    --mesh=seeds=4,data=2

``seeds`` devices share the runs of a method, which know nothing of each other; of each
step, ``pairs`` devices share the perturbations and ``data`` devices the examples.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

import fgrad
from experiments.usage import UsageError

AXES = ("seeds", "pairs", "data")
# What one program does with the runs that a device has.
TOGETHER = ("", "vmapped", "in_turn")


class Layout(NamedTuple):
    """How runs are laid out over devices.

    Attributes:
      mesh: of the axes `AXES`; None for one device.
      vmapped: whether a device evaluates its runs all at once, rather than in turn.
      shards: into how many parts a step cuts its batch.
    """

    mesh: Mesh | None = None
    vmapped: bool = False
    shards: int = 1

    @property
    def one_program(self) -> bool:
        """Whether all runs of a method are one program."""
        return self.vmapped or self.devices("seeds") > 1

    @property
    def of_step(self) -> int:
        """How many devices share a step."""
        return self.devices("pairs") * self.devices("data")

    def devices(self, axis: str) -> int:
        """How many devices there are along an axis."""
        return 1 if self.mesh is None else self.mesh.shape[axis]

    def of_method(self, method: ConfigDict) -> "Layout":
        """The layout of a method: joint pairs have products that JAX does not vmap."""
        return self._replace(vmapped=False) if method.gradient == "joint" else self

    def spread(self, method: ConfigDict) -> fgrad.Spread | None:
        """How devices share the evaluations of a method's step; None if they do not."""
        shared = self.of_step > 1 or self.shards > 1
        if not shared or method.gradient != "forward":
            return None
        mesh = _mesh(dict.fromkeys(AXES, 1)) if self.mesh is None else self.mesh
        return fgrad.Spread(
            mesh, pairs="pairs", batch="data", shards=self.shards, examples=["batch"]
        )


ALONE = Layout()  # one device, and runs one after the other


def parse(text: str) -> dict[str, int]:
    """The number of devices along each axis.

    Args:
      text: such as "seeds=4,data=2"; "" is one device.

    Raises:
      UsageError: for what cannot be read.

    Example:
      >>> parse("seeds=4,data=2")
      {'seeds': 4, 'pairs': 1, 'data': 2}
    """
    counts = dict.fromkeys(AXES, 1)
    for part in filter(None, text.split(",")):
        name, _, count = part.partition("=")
        if name not in AXES or not count.isdecimal() or int(count) < 1:
            raise UsageError(
                f"mesh={text!r} has the part {part!r}; give numbers of devices along "
                f"{', '.join(AXES)}, such as --mesh=seeds=4,data=2."
            )
        counts[name] = int(count)
    return counts


def check(config: ConfigDict) -> None:
    """Makes sure that devices share evenly what a configuration runs.

    Args:
      config: see ``configs/quickstart.py``.

    Raises:
      UsageError: where they do not; it says how many devices would.
    """
    counts = parse(config.get("mesh", ""))
    together = config.get("together", "")
    if together not in TOGETHER:
        raise UsageError(
            f'together must be "vmapped", "in_turn" or "" for the faster one, got '
            f"{together!r}."
        )
    _check_number(counts)
    _check_shares("seeds", f"{len(config.seeds)} seeds", len(config.seeds), counts)
    shared = [n for n in config.run if config.methods[n].gradient == "forward"]
    if counts["pairs"] * counts["data"] > 1 and not shared:
        raise UsageError(
            "of the methods to run none has pairs or a batch that devices can share: "
            'those of the gradient "forward" have; give --mesh=seeds=... only.'
        )
    shards = config.get("batch_shards", 0) or counts["data"]
    if shards % counts["data"]:
        raise UsageError(
            f"batch_shards={shards} parts of a batch cannot be shared evenly by "
            f"data={counts['data']} devices; use a multiple of {counts['data']}."
        )
    for name in shared:
        method = config.methods[name]
        pairs = method.num_perturbations
        _check_shares("pairs", f"{pairs} pairs of {name}", pairs, counts)
        size = method.batch_size
        if size % shards:
            raise UsageError(
                f"a batch of {size} of {name} cannot be cut into {shards} equal parts; "
                f"{_fitting(size, shards)} could be, by batch_shards or --mesh=data=."
            )


def resolved(config: ConfigDict) -> Layout:
    """The layout of a configuration, which then says what it is.

    Args:
      config: that `check` accepts. Its ``batch_shards``, on which results depend, is
        set to their number.
    """
    counts = parse(config.get("mesh", ""))
    shards = config.get("batch_shards", 0) or counts["data"]
    if "batch_shards" in config:
        config.batch_shards = shards
    alone = all(count == 1 for count in counts.values())
    together = config.get("together", "")
    # On CPUs runs in turn are faster, see docs/how_to/devices.md.
    vmapped = together == "vmapped" or (not together and jax.default_backend() != "cpu")
    return Layout(None if alone else _mesh(counts), vmapped, shards)


def _mesh(counts: Mapping[str, int]) -> Mesh:
    shape = tuple(counts[name] for name in AXES)
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(
        shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def _check_number(counts: Mapping[str, int]) -> None:
    needed, there = math.prod(counts.values()), jax.device_count()
    if needed > there:
        raise UsageError(
            f"the mesh has {needed} devices and there are {there}. A CPU shows more by "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}."
        )


def _check_shares(axis: str, what: str, number: int, counts: Mapping[str, int]) -> None:
    if number % counts[axis]:
        raise UsageError(
            f"{what} cannot be shared evenly by {axis}={counts[axis]} devices; use "
            f"{_fitting(number, counts[axis])} devices."
        )


def _fitting(number: int, most: int) -> str:
    """The divisors of a number up to some number, as text."""
    return " or ".join(str(n) for n in range(1, most + 1) if number % n == 0)
