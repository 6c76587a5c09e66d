"""The step in another process, and by another compiler."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fgrad.integer import convert, export, integers, train_step
from tests.integer.conftest import function, step_of_channels

BATCH = 4


@pytest.fixture(scope="module")
def training(digits, pretrained):
    program = convert(function, pretrained, digits[1][:256])
    _, step = train_step(
        program,
        jax.random.key(0),
        learning_rate=2e-2,
        epsilon=3e-2,
        num_perturbations=2,
        decay_steps=400,
        estimator="normalized",
    )
    images, labels = np.asarray(program.encode(digits[1])), digits[2]
    chosen = np.random.default_rng(0).integers(0, 1297, (300, BATCH))
    return step, images[chosen], labels[chosen]


def after(step, images, labels):
    weights, state = step.init()
    advance = jax.jit(step)
    for x, y in zip(images, labels, strict=True):
        weights, state = advance(weights, state, (jnp.asarray(x), jnp.asarray(y)))
    return jax.tree.leaves((weights, state))


@pytest.mark.slow
def test_a_fresh_process_without_fgrad_takes_the_same_steps(training, tmp_path):
    pytest.importorskip("flatbuffers", reason="needs fgrad[export]")
    step, images, labels = training
    (tmp_path / "step.bin").write_bytes(export(step, batch_size=BATCH).serialize())
    leaves = jax.tree.leaves(step.init())
    files = {f"leaf{i:02}": np.asarray(x) for i, x in enumerate(leaves)}
    np.savez(tmp_path / "start.npz", images=images[:5], labels=labels[:5], **files)
    script = """
import sys
import jax.export
import numpy as np
data = np.load("start.npz")
step = jax.export.deserialize(open("step.bin", "rb").read())
leaves = [data[name] for name in sorted(data) if name.startswith("leaf")]
for x, y in zip(data["images"], data["labels"]):
    leaves = step.call(*leaves, x, y)
assert not any(name.startswith("fgrad") for name in sys.modules)
np.savez("end.npz", **{f"leaf{i:02}": x for i, x in enumerate(leaves)})
"""
    command = [sys.executable, "-c", script]
    subprocess.run(command, cwd=tmp_path, check=True, env={"JAX_PLATFORMS": "cpu"})
    found = np.load(tmp_path / "end.npz")
    expected = after(step, images[:5], labels[:5])
    for name, exact in zip(sorted(found), expected, strict=True):
        np.testing.assert_array_equal(found[name], exact)


def test_a_program_is_exported_without_custom_calls(training):
    step = training[0]
    text = str(export(step, batch_size=BATCH).mlir_module())
    assert "stablehlo.custom_call" not in text
    # What keeps XLA from computing a value twice is not for other compilers.
    assert "stablehlo.case" not in text
    program = step.program
    exported = export(program, batch_size=2)
    x = jnp.zeros((2, 8, 8, 1), jnp.int8)
    leaves = jax.tree.leaves(integers(program.params))
    (found,) = exported.call(*leaves, x)
    np.testing.assert_array_equal(found, program(program.params, x))


@pytest.mark.slow
@pytest.mark.optimized
def test_iree_has_the_bits_of_jax_over_an_adaptation(training):
    step, images, labels = training
    check_by_iree(step, zip(images, labels, strict=True))


@pytest.mark.slow
def test_iree_has_the_bits_of_channels_with_scales_of_their_own():
    step, batch = step_of_channels(8)
    check_by_iree(step, [batch] * 5)


def check_by_iree(step, batches):
    """Takes steps by IREE and in JAX, checks that all bits are the same."""
    compiler = pytest.importorskip("iree.compiler", reason="needs fgrad[integer]")
    runtime = pytest.importorskip("iree.runtime", reason="needs fgrad[integer]")
    batches = list(batches)
    module = compiler.compile_str(
        str(export(step, batch_size=len(batches[0][1])).mlir_module()),
        target_backends=["llvm-cpu"],
        input_type="stablehlo",
        extra_args=["--iree-llvmcpu-target-cpu=generic"],
    )
    context = runtime.SystemContext(config=runtime.Config("local-sync"))
    context.add_vm_module(runtime.VmModule.copy_buffer(context.instance, module))
    advance = context.modules.jit_flat.main
    leaves = [np.asarray(x) for x in jax.tree.leaves(step.init())]
    for x, y in batches:
        leaves = advance(*leaves, x, y)
    expected = after(step, *zip(*batches, strict=True))
    for found, exact in zip(leaves, expected, strict=True):
        np.testing.assert_array_equal(found.to_host(), exact)
