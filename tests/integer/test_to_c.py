"""The C program: the same bits as JAX, on this machine and on an emulated Cortex-M3."""

import ctypes
import subprocess

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import emulation
from experiments.models import cnn
from fgrad.integer import (
    ConversionError,
    Fixed,
    arena,
    convert,
    integers,
    to_c,
    train_step,
)
from tests.integer.conftest import (
    function,
    same_arrays,
    step_of_channels,
    steps_in_c,
)
from tests.integer.test_convert import LSTM, PIECES, Transformer, W, X

host = pytest.mark.skipif(
    not emulation.has_host_compiler(), reason="needs a C compiler (gcc or cc)"
)
emulated = pytest.mark.skipif(
    not emulation.has_emulator(), reason="needs unicorn and ziglang: fgrad[integer]"
)
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
BATCH = 4


@pytest.fixture(scope="module")
def training(digits, pretrained, tmp_path_factory):
    """A step, its C program, and batches."""
    program = convert(function, pretrained, digits[1][:256])
    init, step = train_step(
        program,
        jax.random.key(0),
        learning_rate=2e-2,
        epsilon=3e-2,
        num_perturbations=2,
        decay_steps=400,
        estimator="normalized",
    )
    written = to_c(step, tmp_path_factory.mktemp("c"), batch_size=BATCH)
    images, labels = program.encode(digits[1]), digits[2]
    chosen = np.random.default_rng(0).integers(0, 1297, (300, BATCH))
    return init, step, written, np.asarray(images)[chosen], labels[chosen]


def structs(written, weights, state):
    return (
        emulation.filled(written, "weights", jax.tree.leaves(weights)),
        emulation.filled(written, "state", list(state)),
    )


@host
@pytest.mark.optimized
def test_an_adaptation_of_300_steps_has_the_bits_of_jax(training, tmp_path):
    _, step, _, images, labels = training
    _, _, state = steps_in_c(step, zip(images, labels, strict=True), tmp_path)
    assert int(state.count) == 300


@emulated
@pytest.mark.optimized
def test_a_cortex_m3_has_the_bits_of_jax(training):
    _, step, written, images, labels = training
    batches = list(zip(images[:20], labels[:20], strict=True))
    machine = steps_on_a_cortex_m3(step, written, batches)
    assert 0 < machine.stack_bytes < 1024
    assert written.arena_bytes <= machine.ram_bytes < written.arena_bytes + 64


def steps_on_a_cortex_m3(step, written, batches):
    """Takes steps on the emulated machine and in JAX, checks that bits are equal."""
    machine = emulation.CortexM3(written)
    weights, state = step.init()
    c_weights, c_state = structs(written, weights, state)
    batch = emulation.filled(written, "batch", batches[0])
    at = emulation.pointers(
        machine, {"weights": c_weights, "state": c_state, "batch": batch}
    )
    advance = jax.jit(step)
    for x, y in batches:
        weights, state = advance(weights, state, (x, y))
        batch = emulation.filled(written, "batch", [x, y])
        machine.machine.mem_write(at["batch"], bytes(batch))
        machine.call("fgrad_step", at["weights"], at["state"], at["batch"])
    for name, arrays in (("weights", jax.tree.leaves(weights)), ("state", state)):
        kind = emulation.structure(written, name)
        data = machine.read(at[name], ctypes.sizeof(kind))
        same_arrays(written, name, kind.from_buffer_copy(data), arrays)
    return machine


@emulated
def test_a_power_cut_leaves_the_weights_before_or_after(training):
    init, _, written, _, _ = training
    machine = emulation.CortexM3(written)
    weights, state = init()
    sizes = [
        ctypes.sizeof(emulation.structure(written, n)) for n in ("weights", "state")
    ]
    slot = sum(sizes) + 8
    versions = []
    for step in range(3):
        moved = jax.tree.map(lambda x: x + step, weights)  # noqa: B023
        versions.append(structs(written, moved, state._replace(count=np.int32(step))))
    machine.write(0, bytes(2 * slot))  # slots as they come from the factory
    slots = machine.write(0, b"")
    ours, loaded = machine.write(2 * slot + 64, b""), machine.write(8 * slot, b"")
    state_at, loaded_state = ours + slot, loaded + slot
    assert machine.call("fgrad_load", slots, loaded, loaded_state) == 0
    rng = np.random.default_rng(0)

    def commit(version, stop_after=None):
        machine.machine.mem_write(ours, bytes(version[0]))
        machine.machine.mem_write(state_at, bytes(version[1]))
        return machine.call(
            "fgrad_commit", slots, ours, state_at, stop_after=stop_after
        )

    def load():
        assert machine.call("fgrad_load", slots, loaded, loaded_state) == 1
        data = machine.read(loaded, sizes[0]), machine.read(loaded_state, sizes[1])
        found = [tuple(map(bytes, v)) == data for v in versions]
        assert sum(found) == 1, "neither before nor after"
        return found.index(True)

    commit(versions[0])
    total = machine.instructions
    assert load() == 0
    current, cut = 0, 0
    for _ in range(25):
        following = (current + 1) % 3
        done = commit(versions[following], int(rng.integers(1, total)))
        cut += done is None
        after = load()
        assert after in (current, following)
        commit(versions[following])
        current = load()
        assert current == following
    assert cut > 15


@host
@pytest.mark.parametrize("name", PIECES)
def test_pieces_of_models_have_the_bits_of_jax(name, tmp_path):
    program = convert(lambda p, x: PIECES[name](x @ p["w"]), {"w": W}, X)
    check_prediction(program, X, tmp_path)


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), padding="SAME")(x))
        x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=2, strides=2)(x))
        x = nn.leaky_relu(nn.Conv(6, (2, 2), kernel_dilation=2)(x), 0.1)
        return nn.Dense(3)(nn.max_pool(x, (2, 2), (2, 2)).mean((1, 2)))


@host
@pytest.mark.parametrize(
    ("network", "shape"),
    [
        pytest.param(LSTM(), (7, 5), id="lstm"),
        pytest.param(Transformer(), (7, 5), id="vit", marks=pytest.mark.slow),
        pytest.param(
            Convolutions(), (8, 8, 2), id="convolutions", marks=pytest.mark.slow
        ),
    ],
)
def test_networks_have_the_bits_of_jax(network, shape, tmp_path):
    x = jax.random.normal(jax.random.key(0), (2, *shape))
    params = jax.jit(network.init)(jax.random.key(1), x)["params"]
    program = convert(lambda p, x: network.apply({"params": p}, x), params, x)
    check_prediction(program, x, tmp_path)


def check_prediction(program, x, directory):
    encoded = program.encode(x)
    weights = integers(program.params)
    written = to_c(program, directory, batch_size=len(x))
    # Undefined behaviour, such as an overflow, stops the process: loading the
    # sanitizer's library needs one of its own.
    library = emulation.host_library(written)
    inputs = emulation.filled(written, "inputs", [encoded])
    outputs = emulation.structure(written, "outputs")()
    c_weights = emulation.filled(written, "weights", jax.tree.leaves(weights))
    library.fgrad_predict(*map(ctypes.byref, (c_weights, inputs, outputs)))
    same_arrays(written, "outputs", outputs, [jax.jit(program)(weights, encoded)])


@host
@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 8])
def test_channels_with_scales_of_their_own_have_the_bits_of_jax(bits, tmp_path):
    step, batch = step_of_channels(bits)
    written, weights, _ = steps_in_c(step, [batch] * 5, tmp_path)
    assert "scale per channel [1, 1, 1, 4]" in written.header.read_text()
    start = integers(step.program.params)
    assert all(np.any(weights[name] != start[name]) for name in ("kernel", "head"))
    if bits == 8 and emulation.has_emulator():
        steps_on_a_cortex_m3(step, written, [batch] * 2)


@host
def test_nothing_overflows_and_nothing_but_stdint_is_used(training, tmp_path):
    written = training[2]
    source = written.source.read_text() + written.header.read_text()
    assert [line for line in source.splitlines() if line.startswith("#include")] == [
        '#include "fgrad_model.h"',
        "#include <stdint.h>",
    ]
    for word in ("malloc", "float", "double", "int64_t", "long "):
        assert word not in source
    main = tmp_path / "main.c"
    main.write_text(
        '#include "fgrad_model.h"\n'
        "static fgrad_weights w; static fgrad_state s; static fgrad_batch b;\n"
        "int main(void) { w = fgrad_initial_weights; s = fgrad_initial_state;\n"
        "  for (int i = 0; i < 3; ++i) fgrad_step(&w, &s, &b); return s.count - 3; }\n"
    )
    command = ["gcc", "-std=c99", *UNDEFINED, f"-I{written.header.parent}"]
    target = tmp_path / "main"
    files = [str(main), str(written.source), "-o", str(target)]
    if subprocess.run([*command, *files], capture_output=True, check=False).returncode:
        pytest.skip("the compiler has no sanitizer of undefined behaviour")
    subprocess.run([str(target)], check=True)


def test_layers_are_named_in_the_source(training):
    source = training[2].source.read_text()
    assert "Conv_0" in source
    assert "Dense_0" in source


def test_a_perturbed_kernel_is_never_stored(training):
    program, written = training[1].program, training[2]
    largest = max(
        leaf.qvalue.nbytes
        for leaf in jax.tree.leaves(
            program.params, is_leaf=lambda x: hasattr(x, "qvalue")
        )
    )
    only_inference = to_c(program, written.source.parent / "p", batch_size=BATCH)
    assert written.arena_bytes - only_inference.arena_bytes < largest / 2


def test_a_step_of_the_quickstart_needs_little_more_memory_than_inference(tmp_path):
    network = cnn.CNN()  # 25,866 parameters
    x = jax.random.uniform(jax.random.key(0), (16, 8, 8, 1))
    params = jax.jit(network.init)(jax.random.key(1), x)["params"]
    program = convert(lambda p, x: network.apply({"params": p}, x), params, x)
    _, step = train_step(
        program,
        jax.random.key(0),
        learning_rate=2e-2,
        epsilon=3e-2,
        num_perturbations=16,
        decay_steps=700,
        estimator="normalized",
    )
    arenas = [
        to_c(model, tmp_path, batch_size=16).arena_bytes for model in (program, step)
    ]
    # A row of a perturbed kernel, and the losses of 16 pairs.
    assert arenas[1] <= 1.1 * arenas[0], arenas


def test_an_arena_keeps_what_lives_at_one_time_apart():
    rng = np.random.default_rng(0)
    lives = []
    for _ in range(60):
        first = int(rng.integers(0, 40))
        size, length = int(rng.integers(1, 90)), int(rng.integers(0, 12))
        lives.append(arena.Lifetime(size, first, first + length))
    offsets, total = arena.place(lives)
    for i, a in enumerate(lives):
        assert offsets[a] % 4 == 0
        assert offsets[a] + a.size <= total
        for b in lives[:i]:
            if a.first <= b.last and b.first <= a.last:
                apart = offsets[a] + a.size <= offsets[b]
                assert apart or offsets[b] + b.size <= offsets[a]
    busiest = max(
        sum(x.size for x in lives if x.first <= t <= x.last) for t in range(60)
    )
    assert busiest <= total < 1.6 * busiest + 240


def sorted_loss(outputs, labels):
    worst = jnp.sort(jnp.max(outputs.wide, axis=1))[-2:]
    return Fixed(jnp.sum(worst), outputs.scale, -(2**17), 2**17)


def largest_loss(outputs, labels):
    values, _ = jax.lax.top_k(outputs.wide, 2)
    return Fixed(jnp.sum(values), outputs.scale, -(2**22), 2**22)


def branching_loss(outputs, labels):
    total = jnp.sum(outputs.wide)
    total = jax.lax.cond(total > 0, lambda x: x, lambda x: -x, total)
    return Fixed(total, outputs.scale, -(2**22), 2**22)


def looping_loss(outputs, labels):
    total = jax.lax.while_loop(
        lambda x: x > 100, lambda x: x >> 1, jnp.max(outputs.wide)
    )
    return Fixed(total, outputs.scale, -(2**15), 2**15)


def float_loss(outputs, labels):
    total = jnp.sum(jnp.tanh(outputs.q * outputs.scale))
    return Fixed((total * 100).astype(jnp.int32), 0.01, -(2**15), 2**15)


@pytest.mark.parametrize(
    ("made", "name", "remedy"),
    [
        (sorted_loss, "sort", "sort what it returns"),
        (largest_loss, "top_k", "sort what it returns"),
        (branching_loss, "cond", "jnp.where"),
        (looping_loss, "while", "lax.scan"),
        (float_loss, "float32", "integers of up to 32 bits"),
    ],
)
def test_a_loss_that_c_is_not_written_for_says_what_to_do(made, name, remedy, tmp_path):
    program = convert(lambda p, x: x @ p["w"], {"w": W}, X)
    _, step = train_step(
        program, jax.random.key(0), learning_rate=0.1, epsilon=0.1, loss=made
    )
    with pytest.raises(ConversionError) as error:
        to_c(step, tmp_path, batch_size=4)
    assert name in str(error.value)
    assert remedy in str(error.value)
    if name != "float32":
        assert "test_to_c.py:" in str(error.value)
        assert made.__name__ in str(error.value)


def batch_groups(params, x):
    h = (x @ params["w"])[:, None, :]
    return jax.lax.conv_general_dilated(
        h,
        jnp.ones((1, 6, 2)),
        (1,),
        "VALID",
        dimension_numbers=("NHC", "HIO", "NHC"),
        batch_group_count=2,
    )


def test_a_convolution_over_groups_of_the_batch_is_an_error(tmp_path):
    program = convert(batch_groups, {"w": W}, X)
    with pytest.raises(ConversionError, match="feature_group_count"):
        to_c(program, tmp_path, batch_size=4)
