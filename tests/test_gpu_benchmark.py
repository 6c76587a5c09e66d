import json
import math
import multiprocessing
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fgrad
from experiments.benchmarks import (
    gpu_run,
    gpu_sections,
    h100,
    measure,
    programs,
    transformer,
)
from experiments.benchmarks.gpu_run import Section
from experiments.benchmarks.gpu_sections import Entry, Row
from experiments.benchmarks.measure import Program
from experiments.benchmarks.transformer import Transformer

DECODER = Transformer(16, 3, 2, 8, 11)
ENCODER = Transformer(16, 2, 2, 5, 3, inputs=12)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_the_networks_have_the_published_sizes():
    # timm's vit_base_patch16_224.
    assert size(transformer.abstract_params(transformer.VIT_B16, "float32")) == (
        86_567_656
    )
    decoder = transformer.DECODER
    params = transformer.abstract_params(decoder, "bfloat16")
    # OPT-1.3B, but for its positions: 2,050 there, as many as there are tokens here.
    assert size(params) + (2050 - decoder.tokens) * decoder.width == 1_315_758_080


@pytest.mark.parametrize("arithmetic", list(transformer.ARITHMETIC))
@pytest.mark.parametrize("network", [DECODER, ENCODER._replace(outputs_first=True)])
def test_the_weights_are_as_they_were_announced(arithmetic, network):
    abstract = transformer.abstract_params(network, arithmetic)
    params = transformer.random_params(network, arithmetic)
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    for leaf, expected in zip(
        jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
    values = fgrad.dequantize(params)
    up = np.asarray(values["stages"][0]["up"]["kernel"], np.float32)
    # 5 standard errors of the deviation of as many values.
    tolerance = 5 / math.sqrt(2 * up.size)
    np.testing.assert_allclose(up.std() * network.width**0.5, 1, rtol=tolerance)


def reference(network, params, batch):
    """The loss in float64 NumPy, block by block."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, layer):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * layer["scale"] + layer["bias"]

    def dense(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def gelu(x):
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attention(x, layers):
        shape = (*x.shape[:2], network.num_heads, -1)
        q, k, v = (
            dense(x, layers[n]).reshape(shape).transpose(0, 2, 1, 3)
            for n in ("query", "key", "value")
        )
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
        if not network.inputs:
            scores = np.where(np.tri(scores.shape[-1]), scores, -np.inf)
        return dense(
            (softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(x.shape), layers["out"]
        )

    if network.inputs:
        patches, labels = batch
        x = dense(np.asarray(patches, np.float64), params["patches"])
        token = np.tile(params["class_token"], (len(x), 1, 1))
        x = np.concatenate([token, x], axis=1)
    else:
        labels = batch[:, 1:]
        x = params["embedding"][batch[:, :-1]]
    x = x + params["positions"]
    for stage in params["stages"]:
        for i in range(len(stage["up"]["bias"])):
            layers = jax.tree.map(lambda leaf, i=i: leaf[i], stage)
            x = x + attention(norm(x, layers["before_attention"]), layers)
            y = dense(norm(x, layers["before_perceptron"]), layers["up"])
            x = x + dense(gelu(y), layers["down"])
    x = norm(x, params["norm"])
    if network.inputs:
        logits = dense(x[:, 0], params["head"])
    else:
        logits = x @ params["embedding"].T
    picked = np.take_along_axis(softmax(logits), np.asarray(labels)[..., None], -1)
    return -np.log(picked).mean()


@pytest.mark.parametrize("network", [DECODER._replace(stages=2), ENCODER])
def test_the_loss_is_that_of_a_transformer(network):
    problem = transformer.problem(network, 2)
    expected = reference(network, problem.params, problem.data["batch"])
    loss = jax.jit(problem.loss_fn)(problem.params, **problem.data)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    # 8 bits of mantissa, and of an activation on its grid: a few roundings of 1/256 of
    # each, which the mean over tokens evens out.
    for arithmetic in ("bfloat16", "16w8a"):
        other = transformer.problem(network, 2, arithmetic)
        loss = jax.jit(other.loss_fn)(other.params, **other.data)
        np.testing.assert_allclose(loss, expected, rtol=0.02)


def test_matrices_may_be_stored_either_way():
    problem = transformer.problem(DECODER, 2, "8w8a")

    def turned(layer):
        kernel = layer["kernel"]
        qvalue = jnp.swapaxes(kernel.qvalue, -1, -2)
        return {**layer, "kernel": fgrad.QTensor(qvalue, kernel.scale)}

    stages = [
        {k: turned(v) if "kernel" in v else v for k, v in stage.items()}
        for stage in problem.params["stages"]
    ]
    other = transformer.problem(
        DECODER._replace(outputs_first=True),
        2,
        "8w8a",
        params={**problem.params, "stages": stages},
    )
    expected = jax.jit(problem.loss_fn)(problem.params, **problem.data)
    np.testing.assert_array_equal(
        jax.jit(other.loss_fn)(other.params, **other.data), expected
    )


def test_stages_keep_leaves_within_31_bits():
    for arithmetic, network in gpu_sections.LARGEST.items():
        staged = network.staged()
        params = transformer.abstract_params(staged, arithmetic)
        leaves = jax.tree.leaves(params)
        assert max(leaf.size for leaf in leaves) < 2**31
        blocks = [stage["up"]["bias"].shape[0] for stage in params["stages"]]
        assert sum(blocks) == network.depth
        assert len(blocks) == staged.stages
        assert max(blocks) - min(blocks) <= 1


def test_the_largest_network_fills_what_there_is():
    for arithmetic, network in gpu_sections.LARGEST.items():
        room = 75 * 2**30
        fitted = gpu_sections.fitting(network, arithmetic, room)

        def held(depth, network=network, arithmetic=arithmetic):
            params = transformer.abstract_params(
                network._replace(depth=depth), arithmetic
            )
            return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))

        # What is left is for activations and for the update of a leaf.
        assert 3 * 2**30 < room - held(fitted.depth) < 9 * 2**30


def test_a_plan_is_that_of_the_arrays():
    network = DECODER._replace(depth=1)
    inference, step = gpu_sections.planned(network, "float32").memory
    problem = transformer.problem(network, 1)
    assert inference == programs.inference(problem).plan()
    assert step == programs.forward_step(problem).plan()
    assert step.aliased > 0


def test_comparisons_go_on_without_what_fails():
    ones = jnp.ones(4)

    def broken():
        raise MemoryError("no room\nfor it")

    entries = {
        "base": Entry(lambda: Program(jnp.sum, ones), Row("a")),
        "broken": Entry(broken, Row("b"), "base"),
        "half": Entry(lambda: Program(jnp.sin, ones), Row("c"), "base", 2),
    }
    base, lost, half = gpu_sections.compared(entries, measure.SMOKE)
    assert lost.remark == "MemoryError: no room"
    assert lost.milliseconds is None
    assert half.time == pytest.approx(half.milliseconds / (2 * base.milliseconds))
    assert (base.live, half.live) == (16 + 4, 16 + 16)
    assert half.live_ratio == 32 / 20


def test_products_are_found_in_a_compiled_program():
    text = """
%gemm_fusion (p0: s8[8,8], p1: s8[8,8]) -> s32[8,8] {
  %p0 = s8[8,8]{1,0} parameter(0)
  %p1 = s8[8,8]{0,1} parameter(1)
  ROOT %d = s32[8,8]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}
}

%slow (p2: s32[8,8], p3: s32[8,8]) -> s32[8,8] {
  %p2 = s32[8,8]{1,0} parameter(0)
  %p3 = s32[8,8]{1,0} parameter(1)
  ROOT %e = s32[8,8]{1,0} dot(%p2, %p3), lhs_contracting_dims={1}
}

ENTRY %main (a: s8[8,8], b: s8[8,8]) -> s32[8,8] {
  %a = s8[8,8]{1,0} parameter(0)
  %b = s8[8,8]{1,0} parameter(1)
  %f = s32[8,8] fusion(%a, %b), calls=%gemm_fusion, kind="__triton_nested_gemm_fusion"
  %c = (s32[8,8], s8[9]) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul"
  ROOT %g = s32[8,8]{1,0} fusion(%a, %b), calls=%slow
}
"""
    found = gpu_sections.product_kernels(text)
    assert found == (
        "1 Triton s8 x s8 to s32, 1 loop s32 x s32 to s32, "
        "1 cublas$lt$matmul s8 x s8 to s32"
    )
    compiled = jax.jit(jnp.add).lower(1.0, 2.0).compile()
    assert gpu_sections.product_kernels(compiled.as_text()) == "no product"


def quick(smoke):
    yield Row("quick", where=gpu_sections.where())
    raise RuntimeError("and then | it failed")


def slow(smoke):
    yield Row("slow", remark=os.environ["SECTION_OF"])
    time.sleep(60)


def dead(smoke):
    os._exit(3)
    yield


@pytest.fixture
def sections(monkeypatch):
    chosen = {
        "quick": Section(quick, 60),
        "slow": Section(slow, 60, {"SECTION_OF": "a test"}),
        "dead": Section(dead, 60),
    }
    monkeypatch.setattr(gpu_run, "SECTIONS", chosen)
    # Forked, the processes of the sections have this dictionary as well.
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(gpu_run.multiprocessing, "get_context", lambda _: fork)
    return chosen


def test_a_section_that_fails_or_hangs_is_one_row(sections, tmp_path):
    sections["slow"] = sections["slow"]._replace(seconds=2)
    results = gpu_run.run(str(tmp_path), ["slow", "dead"], False, 100)
    assert [row["remark"] for row in results["rows"]] == [
        "a test",
        "stopped after 2 s",
        "its process ended with code 3",
    ]
    assert "SECTION_OF" not in os.environ
    results = gpu_run.run(str(tmp_path), ["quick", "slow"], True, 100)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == results
    assert results["device"] == jax.devices()[0].device_kind
    assert results["rows"][1]["remark"] == "RuntimeError: and then / it failed"
    table = (tmp_path / "table.md").read_text()
    assert table.startswith(f"### {results['device']}, JAX {jax.__version__}")
    assert table.splitlines()[-2].startswith("| quick |")


def test_what_no_longer_fits_is_left_out(sections, tmp_path):
    results = gpu_run.run(str(tmp_path), ["quick", "slow"], False, 1)
    remarks = [row["remark"] for row in results["rows"]]
    assert remarks == 2 * ["left out: 1 s were not enough"]
    with pytest.raises(ValueError, match=r"no sections \['loud'\]; choose from"):
        gpu_run.run(str(tmp_path), ["loud"], True, 1)


def test_the_smoke_command_measures_every_section(tmp_path):
    command = [sys.executable, "-m", "experiments.benchmarks.gpu", "--smoke"]
    only = ",".join(gpu_run.SECTIONS)
    process = subprocess.run(
        [*command, f"--out={tmp_path}", f"--only={only}"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    failed = [row for row in results["rows"] if "Error" in row.get("remark", "")]
    # Only PyTorch need not be there.
    assert [row["network"] for row in failed] in ([], ["mezo"]), failed
    assert len(results["rows"]) > 15
    assert process.stdout == (tmp_path / "table.md").read_text()
    lines = process.stdout.splitlines()
    columns = len(gpu_sections._COLUMNS)
    assert all(line.count(" | ") == columns - 1 for line in lines if line[:2] == "| ")


def test_the_command_imports_little():
    """What a machine with a GPU has to have beside JAX, Flax, optax and PyTorch."""
    code = (
        "import sys, experiments.benchmarks.gpu\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    heavy = {"tensorflow_datasets", "matplotlib", "ml_collections", "sklearn", "PIL"}
    assert not heavy & set(process.stdout.split())


def test_mezo_takes_a_dtype():
    torch = pytest.importorskip("torch")
    from experiments.benchmarks import mezo
    from experiments.models import vit

    network = vit.ViT(3, 4, 8, 1, 2, 16)
    run = mezo.Mezo(network, (8, 8, 3), 2, dtype=torch.bfloat16)
    before = [p.detach().clone() for p in run._model.parameters()]
    run.step()
    after = list(run._model.parameters())
    assert all(p.dtype == torch.bfloat16 for p in after)
    assert any((a != b).any() for a, b in zip(after, before, strict=True))


def test_an_h100_is_planned_for_without_one():
    if not h100.available():
        pytest.skip("JAX's CUDA plug-in is not installed")
    code = (
        "from experiments.benchmarks import gpu_sections as g\n"
        "network = g._TINY_LARGEST['8w8a']\n"
        "print(g.planned(network, '8w8a', for_h100=True).memory)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **h100.ENVIRONMENT},
    )
    assert "Memory(arguments=" in process.stdout
