"""Steps spread over devices: the same bits whatever the mesh."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fgrad
from fgrad import activity, enhancements, estimators, perturbations, spread
from fgrad.leaves import Plan, Policy

PROGRAM = pathlib.Path(__file__).parent / "spread_layouts.py"
SHARDED = PROGRAM.with_name("sharded_steps.py")
PAIRS, SHARDS = 8, 4  # those of the program
KINDS = ["float", "int16", "int8", "low rank", "activity"]
LINKS = ["guided", "normalized", "feedback", "sharpness", "sparse", "integer"]


def start(
    program: pathlib.Path, *arguments: str, fast: bool = False, **variables: str
) -> subprocess.Popen:
    root = str(PROGRAM.parent.parent)
    return subprocess.Popen(
        [sys.executable, str(program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": root,
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1" if fast else "0",
            **variables,
        },
    )


def results(process: subprocess.Popen) -> dict[tuple[str, str], dict[str, Any]]:
    """What a program printed, by kind and layout."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return lines_of(out)


def lines_of(out: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The lines of a program, by kind and layout."""
    lines = [json.loads(line) for line in out.splitlines() if line[:1] == "{"]
    return {(line.pop("kind"), line.pop("layout")): line for line in lines}


def check_same(found: dict[tuple[str, str], dict[str, Any]], kinds: list[str]) -> None:
    for kind in kinds:
        of_kind = {k: v for k, v in found.items() if k[0] == kind}
        digests = {(v["params"], v["state"]) for v in of_kind.values()}
        assert len(of_kind) > 1
        assert len(digests) == 1, of_kind


def test_the_bits_of_a_run_do_not_depend_on_its_devices():
    found = results(start(PROGRAM, "float,counted", "1x1,2x4"))
    check_same(found, ["float"])
    assert found["float", "2x4"]["bytes"] <= 4 * 2 * PAIRS * SHARDS
    # Every evaluation is made once, and each device makes as many.
    assert found["counted", "1x1"]["evaluations"] == [2 * PAIRS * SHARDS]
    assert found["counted", "2x4"]["evaluations"] == [2 * PAIRS * SHARDS // 8] * 8


@pytest.mark.slow
def test_no_mesh_and_no_process_changes_a_bit_of_any_kind_of_training(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    losses = {"LOSSES": str(tmp_path / "losses")}
    two = [
        start(
            PROGRAM,
            ",".join([*KINDS, "elsewhere", "killed"]),
            *("2x4", str(process), "2", address),
            **losses,
        )
        for process in range(2)
    ]
    two[1].communicate(timeout=600)
    assert two[1].returncode == -signal.SIGKILL
    # The other one ends by an error, in bounded time and not as if all were well.
    died = time.monotonic()
    found_by_two, _ = two[0].communicate(timeout=100)
    assert time.monotonic() - died < 60
    assert two[0].returncode != 0
    of_two = lines_of(found_by_two)
    assert ("killed", "2x4") not in of_two
    # State is made where the weights are, and what cannot be saved says so.
    assert of_two["elsewhere", "2x4"]["guide"] == [40, 8]
    assert "save such parameters by orbax" in of_two["elsewhere", "2x4"]["saved"]

    kinds = ",".join([*KINDS, "after death"])
    found = results(start(PROGRAM, kinds, "1x1,8x1,2x4,4x2", **losses))
    check_same(found, KINDS)
    for (kind, layout), one in found.items():
        if kind in KINDS and kind != "activity":
            assert one["bytes"] <= 4 * 2 * PAIRS * SHARDS, (kind, layout)
    for kind in KINDS:
        assert of_two[kind, "2x4"] == found[kind, "2x4"]
    # One process alone makes the rest of the run, from the losses so far.
    one = found["float", "1x1"]
    rest = {name: one[name] for name in ("params", "state")}
    assert found["after death", "1x1"] == rest


@pytest.mark.slow
def test_a_run_that_stops_goes_on_with_other_devices_to_the_same_bits():
    kinds = "gathered,own parts,resumed,float,elsewhere"
    found = results(start(PROGRAM, kinds, "4x2,1x1", fast=True))
    digests = {
        (one["params"], one["state"])
        for (kind, _), one in found.items()
        if kind in ("gathered", "resumed", "float")
    }
    assert len(digests) == 1
    assert found["elsewhere", "4x2"] == {"guide": [40, 16], "saved": "the same"}
    # A loss may have a shard_map of its own, which sums up in an order of its own.
    assert found["own parts", "4x2"]["off"] < 1e-5


@pytest.mark.slow
def test_no_mesh_changes_a_bit_of_what_enhancements_and_integer_steps_make():
    check_same(results(start(PROGRAM, ",".join(LINKS), "1x1,4x2", fast=True)), LINKS)


@pytest.mark.slow
def test_sharded_weights_are_perturbed_and_updated_where_they_are():
    cases = [
        *("int16:columns", "int16:rows", "on grid:both"),
        # The parts of the devices cut random words, or types say what is where.
        *("int16:both:odd", "float:columns:odd:explicit", "low rank:both:odd:explicit"),
    ]
    for (kind, how), one in results(start(SHARDED, ",".join(cases))).items():
        assert one["same"], (kind, how)
        assert one["largest"] <= one["share"], (kind, how)
        least = one["memory alone"] / 8 + one["whole"]
        assert one["memory"] <= 1.05 * least, (kind, how, one)


# --------------------------------------------------------------------- one device


def a_mesh(*names: str) -> jax.sharding.Mesh:
    return jax.make_mesh((1,) * len(names), names)


def of(shape: tuple[int, ...]) -> Any:
    """A mesh of more devices than this machine has, for checks of its sizes."""
    devices = np.array([jax.devices()[0]] * int(np.prod(shape))).reshape(shape)
    return jax.sharding.Mesh(devices, ("seeds", "data")[: len(shape)])


def test_the_loss_of_a_pair_is_the_mean_over_the_shards():
    params = {"w": jnp.arange(6.0).reshape(3, 2) / 7}
    x = jax.random.normal(jax.random.key(1), (8, 3))

    def loss_fn(params, x):
        return jnp.sum((x @ params["w"]) ** 2) / len(x)

    policy = Policy(0.1, 4)
    plan = Plan(params, policy)
    key = jax.random.key(2)
    mesh = a_mesh("seeds", "data")
    tx = fgrad.fixed_point_forward_grad(
        key,
        epsilon=0.1,
        num_perturbations=4,
        spread=fgrad.Spread(mesh, pairs="seeds", batch="data", shards=4),
    )
    update = jax.jit(lambda p, s: tx.update(p, s, p, value_fn=loss_fn, x=x))
    _, state = update(params, tx.init(params))
    for i, found in enumerate(state.loss_differences):
        z_key = perturbations.sample_key(key, 0, i)
        sides = [
            np.mean(
                [loss_fn(plan.perturbed(z_key, s), part) for part in x.reshape(4, 2, 3)]
            )
            for s in (1, -1)
        ]
        np.testing.assert_allclose(found, sides[0] - sides[1], rtol=1e-4)


def test_only_examples_are_cut():
    seen = []

    def loss_fn(params, x, key, rate, table):
        seen.append([jnp.shape(a) for a in (x["image"], key, rate, table)])
        return jnp.mean(x["image"]) * jnp.sum(params)

    spread = fgrad.Spread(a_mesh("data"), batch="data", shards=2, examples=["x"])
    arguments = {
        "x": {"image": jnp.ones((4, 3))},
        "key": jax.random.key(0),
        "rate": 0.5,
        "table": jnp.ones(7),
    }
    estimators.forward_gradient(
        loss_fn, jnp.ones(2), jax.random.key(0), kwargs=arguments, spread=spread
    )
    assert seen[-1] == [(2, 3), (), (), (7,)]


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_the_mean_over_shards(dtype):
    table = np.random.default_rng(0).integers(-(2**31), 2**31, (5, 2, 3))
    table = table.astype(dtype)
    found = spread.mean_over_shards(jnp.asarray(table))
    assert found.dtype == dtype
    if dtype == jnp.int32:
        np.testing.assert_array_equal(found, np.sum(table.astype(object), 0) // 5)
    else:
        np.testing.assert_allclose(found, table.astype(float).mean(0), rtol=1e-5)


def test_errors_say_what_devices_can_share():
    mesh = of((4, 2))
    with pytest.raises(ValueError, match="no axis 'seed'; its axes are 'seeds', 'dat"):
        fgrad.Spread(mesh, pairs="seed")
    with pytest.raises(ValueError, match="name an axis twice"):
        fgrad.Spread(mesh, pairs=("seeds", "data"), batch="data", shards=2)
    with pytest.raises(
        ValueError, match=r"shards=3 .* 2 devices .*; use shards=2 or a"
    ):
        fgrad.Spread(mesh, batch="data", shards=3)
    with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh, got 8"):
        fgrad.Spread(8, pairs="seeds")
    over = fgrad.Spread(mesh, pairs="seeds")
    key = jax.random.key(0)
    for link in (
        fgrad.fixed_point_forward_grad,
        lambda *a, **k: fgrad.qzo_ff(1, *a, **k),
    ):
        with pytest.raises(
            ValueError, match=r"=6 pairs .* multiple of 4, or 1 or 2 or 3 dev"
        ):
            link(key, num_perturbations=6, spread=over)
    with pytest.raises(ValueError, match="vectorize=4 does not divide the 2 pairs of"):
        fgrad.fixed_point_forward_grad(
            key, num_perturbations=8, vectorize=4, spread=over
        )
    with pytest.raises(TypeError, match=r"spread must be fgrad\.Spread"):
        fgrad.fixed_point_forward_grad(key, spread=mesh)
    with pytest.raises(ValueError, match="activity_forward_grad cannot spread a batch"):
        fgrad.activity_forward_grad(
            key, ["w"], spread=fgrad.Spread(mesh, batch="data", shards=2)
        )
    with pytest.raises(ValueError, match="num_perturbations=2 pairs cannot be shared"):
        fgrad.activity_forward_grad(
            key, [activity.Site("w", num_perturbations=2)], spread=over
        )
    with pytest.raises(ValueError, match="num_perturbations=6 pairs cannot be shared"):
        enhancements.sparse_update(
            optax.sgd(1.0),
            density=0.5,
            criterion="importance",
            key=key,
            num_perturbations=6,
            spread=over,
        )


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ({"x": np.ones((6, 2))}, {}, "6 examples cannot be cut into shards=4 equal"),
        ({"x": np.ones((4, 2)), "y": np.ones(8)}, {}, "different numbers of examples"),
        ({"x": np.ones((4, 2))}, {"examples": "y"}, "takes no argument 'y', only"),
        ({"rate": 0.5}, {}, "takes no arrays of examples, only"),
    ],
)
def test_errors_say_what_batches_can_be_cut(arguments, options, said):
    with pytest.raises(ValueError, match=said):
        estimators.forward_gradient(
            lambda params, **kwargs: jnp.sum(params),
            jnp.ones(2),
            jax.random.key(0),
            kwargs=arguments,
            spread=fgrad.Spread(a_mesh("data"), batch="data", shards=4, **options),
        )
