import functools
import json
import math
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import some

import fgrad
from experiments.benchmarks import measure, peers, programs, subjects, suite
from experiments.benchmarks.bars import Bar
from experiments.benchmarks.measure import Effort, Program
from experiments.models import lstm, resnet, vit
from fgrad import layers
from fgrad.analysis import Memory


def numbers(tree):
    """All numbers of a JSON value, with the keys that lead to them."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        is_number = isinstance(tree, int | float) and not isinstance(tree, bool)
        return [((), tree)] if is_number else []
    return [((k, *path), x) for k, value in items for path, x in numbers(value)]


@pytest.mark.parametrize("arithmetic", some(["float32", "16w8a"], ["float32"]))
def test_a_step_takes_little_more_memory_than_inference(arithmetic):
    subject = subjects.Subject(functools.partial(vit.ViT, depth=2), (96, 96, 3))
    problem = subjects.problem(subject, 16, arithmetic)
    compared = {
        "inference": programs.inference(problem),
        "step": programs.forward_step(problem),
    }
    memory = measure.plan(compared)
    # Deeper networks come closer to 1, since what is added stays the same.
    assert memory["step"].live <= 1.12 * memory["inference"].live


def test_the_smoke_command_writes_every_table(tmp_path):
    command = [sys.executable, "-m", "experiments.benchmarks.main", "--smoke"]
    process = subprocess.run(
        [*command, f"--workdir={tmp_path}"], check=False, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    device = jax.devices()[0]
    assert results["device"] == device.device_kind
    assert results["platform"] == device.platform
    assert results["jax"] == jax.__version__
    assert list(results["tables"]) == [
        "bars",
        "fine_tuning",
        "memory",
        "time",
        "peers",
        "growth",
        "by_hand",
        "floor",
        "arithmetics",
    ]
    markdown = (tmp_path / "tables.md").read_text()
    for tables in results["tables"].values():
        assert tables
        for table in tables:
            heading = f"### {table['title']}\n\n| {' | '.join(table['columns'])} |\n"
            assert heading in process.stdout
            assert heading in markdown
            assert all(len(row) == len(table["columns"]) for row in table["rows"])
            found = numbers(table["raw"])
            assert found
            for path, number in found:
                assert math.isfinite(number), path
                # Only the parts of a plan may be nothing: no donation, no scratch.
                parts = ("outputs", "aliased", "temporaries")
                assert number > 0 or (number == 0 and path[-1] in parts), path
    for tuned in results["tables"]["fine_tuning"][0]["raw"]:
        live = {name: memory["live"] for name, memory in tuned["memory"].items()}
        assert tuned["of_inference"] == live["m=1"] / live["inference"]
        assert tuned["of_backprop"] == live["m=1"] / live["backprop"]
    bars = results["tables"]["bars"][0]["raw"]["bars"]
    assert len(bars) == 15
    assert {bar["arithmetic"] for bar in bars} == {"float32", "16w8a", "8w8a"}


def test_unknown_tables_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no tables \['speed'\]; choose from"):
        suite.run(str(tmp_path), ["bars", "speed"])


def test_memory_counts_donated_arguments_once():
    ones = jnp.ones(2**18)  # a MiB
    program = Program(lambda w, x: w + x, ones, ones, carries=True)
    memory = program.plan()
    assert memory == Memory(2 * 2**20, 2**20, 2**20, 0)
    assert memory.live == 2 * 2**20
    assert Program(lambda w, x: w + x, ones, ones).plan().live == 3 * 2**20


def test_the_plan_does_not_depend_on_the_quality_of_the_code():
    problem = subjects.problem(subjects.stack(64, 2), 4)
    program = programs.backprop_step(problem)
    quick = program.plan()
    program.compile()
    assert program.plan() == quick
    assert quick.temporaries > 0


def test_a_program_carries_its_state_and_spares_the_callers():
    start = jnp.zeros(3)
    program = Program(lambda w, x: w + x, start, jnp.float32(2), carries=True)
    program.compile()
    for _ in range(3):
        result = program()
    np.testing.assert_array_equal(result, np.full(3, 6.0))
    np.testing.assert_array_equal(start, np.zeros(3))  # not donated


def test_programs_are_timed_in_turn(monkeypatch):
    now, called = 0.0, []

    def program(name, seconds):
        def run():
            nonlocal now
            now += seconds
            called.append(name)

        return run

    clock = types.SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(measure, "time", clock)
    runs = {"slow": program("slow", 3.0), "fast": program("fast", 1.0)}
    times = measure.interleave(runs, Effort(rounds=4))
    assert called[-8:] == ["slow", "fast"] * 4
    assert times["slow"].seconds == [3.0] * 4
    assert times["slow"].ratio(times["fast"]) == {"median": 3.0, "min": 3.0}
    assert times["slow"].ratio(times["fast"], 2) == {"median": 1.5, "min": 1.5}


def test_short_programs_are_timed_over_several_calls(monkeypatch):
    calls = 0

    def program():
        nonlocal calls
        calls += 1

    clock = types.SimpleNamespace(perf_counter=lambda: calls * 1e-3)
    monkeypatch.setattr(measure, "time", clock)
    times = measure.interleave({"short": program}, Effort(rounds=2))
    assert calls >= 2 * 20  # 20 ms each
    np.testing.assert_allclose(times["short"].median, 1e-3)


@pytest.mark.parametrize(
    ("value", "at_least", "held"),
    [(0.9, False, True), (1.1, False, False), (0.9, True, False), (1.1, True, True)],
)
def test_a_bar_is_held_on_its_side(value, at_least, held):
    bar = Bar("a / b", "float32", value, 1.0, at_least)
    assert bar.held == held
    mark = "pass" if held else "**miss**"
    assert bar.row()[-2:] == ["≥ 1" if at_least else "≤ 1", mark]


def test_a_peer_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert not peers.installed("evosax")
    assert "evosax is not installed" in capsys.readouterr().out


def test_the_gradient_by_hand_points_uphill():
    # For a linear loss the mean of sign(g·z) z is g/|g| times the mean of |N(0, 1)|.
    slope = jnp.array([3.0, -4.0])
    problem = subjects.Problem(
        lambda params, x: jnp.sum(params * x), jnp.zeros(2), {"x": slope}
    )
    program = programs.vmap_gradient(problem, 4000)
    program.compile()
    expected = math.sqrt(2 / math.pi) * slope / 5
    # Six standard errors of a mean of 4,000 values of variance at most one.
    np.testing.assert_allclose(program(), expected, atol=6 / math.sqrt(4000))


def test_the_gradient_by_hand_moves_integers_on_their_grid():
    params = fgrad.quantize(jnp.array([1.0, -2.0]), bits=8)
    moved = programs._moved(params, jnp.array([1.0, -1.0]), 0.1)
    assert moved.qvalue.dtype == jnp.int8
    steps = moved.qvalue.astype(int) - params.qvalue.astype(int)
    expected = np.rint(0.1 / np.asarray(params.scale))
    # The weight was rounded to the grid before, so the sum is within half a step.
    np.testing.assert_allclose(steps, [expected, -expected], atol=1)


def count(network, *input_shape):
    inputs = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), inputs)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_deit_tiny_has_the_published_size():
    assert count(vit.ViT(num_classes=1000), 224, 224, 3) == 5_717_416
    assert count(vit.ViT(), 96, 96, 3) == 5_495_626


@pytest.mark.parametrize("small_images", [False, True])
def test_resnet18_has_the_published_size_less_its_normalisation(small_images):
    torchvision = 11_689_512
    # The stem, and per stage two blocks of two convolutions; from the second stage on
    # the first block has a third, on its shortcut.
    normalised = 64 + 64 * 4 + (128 + 256 + 512) * 5
    assert normalised == 4_800
    # Scale and shift of each channel become one bias.
    expected = torchvision - 2 * normalised + normalised
    assert expected == 11_684_712
    if small_images:
        expected -= (7 * 7 - 3 * 3) * 3 * 64
    network = resnet.ResNet(num_classes=1000, small_images=small_images)
    assert count(network, 224, 224, 3) == expected


def test_the_lstm_has_the_documented_size():
    gates = 4 * (40 * 256 + 256 * 256 + 256)
    assert count(lstm.LSTM(), 50, 40) == gates + 256 * 12 + 12 == 307_212


def test_a_problem_counts_its_parameters_whatever_their_type():
    floats = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    for params in (floats, fgrad.quantize(floats)):
        assert subjects.Problem(jnp.sum, params, {}).num_parameters == 3 * 2 + 2


@pytest.mark.parametrize(
    ("network", "input_shape"),
    [
        (vit.ViT(depth=1), (32, 32, 3)),
        (resnet.ResNet(width=8, stage_sizes=(1, 1, 1)), (32, 32, 3)),
        (resnet.ResNet(width=8, stage_sizes=(2,), small_images=True), (8, 8, 3)),
        (lstm.LSTM(features=32), (12, 40)),
    ],
)
def test_a_network_in_16w8a_is_near_its_float_self(network, input_shape):
    inputs = jax.random.normal(jax.random.key(1), (4, *input_shape))

    @functools.partial(jax.jit, compiler_options=measure.quick_options())
    def both(key):
        params = network.init(key, inputs)["params"]
        fixed_point = network.clone(bits=(16, 8))
        variables = {"params": fgrad.quantize(params, bits=16)}
        variables = layers.calibrate(fixed_point, variables, inputs)
        logits = network.apply({"params": params}, inputs)
        return logits, fixed_point.apply(variables, inputs)

    expected, logits = both(jax.random.key(0))
    # An activation is rounded to 1/127 of its maximum, about four times its standard
    # deviation: 4/127/√12 = 1% of it each time, and some dozen roundings add up.
    error = jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)
    assert 0 < error < 0.06


def test_mezo_follows_the_slope_along_its_noise(monkeypatch):
    torch = pytest.importorskip("torch")
    from experiments.benchmarks import mezo

    # Small enough for the difference to be a derivative.
    monkeypatch.setattr(programs, "EPSILON", 1e-4)
    network = vit.ViT(
        num_classes=3, patch=4, width=8, depth=2, num_heads=2, mlp_width=16
    )
    run = mezo.Mezo(network, (8, 8, 3), batch_size=4)
    assert run.num_parameters == count(network, 8, 8, 3)
    before = [p.detach().clone() for p in run._model.parameters()]
    loss = torch.nn.functional.cross_entropy(run._model(run._images), run._labels)
    gradient = torch.autograd.grad(loss, list(run._model.parameters()))
    generator = torch.Generator().manual_seed(1)
    z = [torch.randn(p.shape, generator=generator) for p in before]
    slope = sum(float((g * n).sum()) for g, n in zip(gradient, z, strict=True))
    run.step()
    for old, new, noise in zip(before, run._model.parameters(), z, strict=True):
        expected = -programs.LEARNING_RATE * slope * noise
        # 5% for the difference of float32 losses; four roundings of weights up to one.
        torch.testing.assert_close(new.detach() - old, expected, rtol=0.05, atol=1e-6)
