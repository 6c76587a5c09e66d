"""Runs a few steps of training on meshes of devices, and says what came out.

    python spread_layouts.py float,int16 1x1,2x4 [process processes address]

Prints a line of JSON for each kind of training and each mesh: digests of what a run
leaves, and the bytes that a device receives in a step. It is a program of its own, as
the number of devices is fixed before JAX starts.
"""

import collections
import functools
import hashlib
import json
import os
import pathlib
import re
import signal
import sys
import tempfile

PROCESS, PROCESSES, ADDRESS = ([*sys.argv[3:], "0", "1", ""])[:3]
DEVICES = 8 // int(PROCESSES)
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={DEVICES} "
    "--xla_cpu_multi_thread_eigen=false"
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import orbax.checkpoint as orbax  # noqa: E402

import fgrad  # noqa: E402
import fgrad.integer  # noqa: E402
from fgrad import activity, enhancements, estimators  # noqa: E402

PAIRS, SHARDS, STEPS = 8, 4, 3
ONCE = ("after death", "gathered", "killed", "own parts")  # on the first mesh only
BYTES = {"f32": 4, "s32": 4, "u32": 4, "s16": 2, "s8": 1, "u8": 1, "pred": 1}
Kind = collections.namedtuple("Kind", "tx loss params extra")


def problem():
    """Parameters of two layers, one of them larger than what is sampled together."""
    k = jax.random.split(jax.random.key(1), 4)
    params = {
        "a": jax.random.normal(k[0], (40, 32)) / 6,
        "b": jnp.zeros(32),
        "c": jax.random.normal(k[1], (32, 4)) / 6,
    }
    x = jax.random.normal(k[2], (8, 40))
    y = jax.random.normal(k[3], (8, 4))
    return params, {"x": x, "y": y}


def losses(params, x, y):
    hidden = jnp.tanh(x @ jnp.asarray(params["a"]) + jnp.asarray(params["b"]))
    return jnp.sum((hidden @ jnp.asarray(params["c"]) - y) ** 2, -1)


def mean_loss(params, x, y):
    return losses(params, x, y).mean()


def with_dropout(params, x, y, key, rate):
    """Takes arguments that have no examples: a key and a number."""
    kept = jax.random.bernoulli(key, 1 - rate, (40,))
    return mean_loss(params, x * kept, y)


def chain(spread, *links, **options):
    """SPSA, whose coefficients hide no rounding, SGD, and what follows it."""
    estimate = fgrad.fixed_point_forward_grad(
        jax.random.key(0),
        epsilon=2e-2,
        num_perturbations=PAIRS,
        estimator=estimators.spsa,
        spread=spread,
        **options,
    )
    return optax.chain(estimate, optax.sgd(5e-2), *links, fgrad.quantized_update())


def activity_chain(mesh):
    estimate = fgrad.activity_forward_grad(
        jax.random.key(0),
        [activity.Site("a", "b"), activity.Site("c", exact=True)],
        num_perturbations=PAIRS,
        spread=fgrad.Spread(mesh, pairs=tuple(mesh.axis_names)),
    )
    return optax.chain(estimate, optax.sgd(5e-2))


def kind_of(name, spread):
    params, _ = problem()
    quantized = {b: fgrad.quantize(params, bits=b, channel_axis=-1) for b in (8, 16)}
    key = jax.random.key(3)
    factored = fgrad.perturbations.low_rank()
    kinds = {
        "float": lambda: (chain(spread), params),
        "int16": lambda: (chain(spread), quantized[16]),
        "int8": lambda: (chain(spread, low_bit=fgrad.on_grid(5e-2)), quantized[8]),
        "low rank": lambda: (chain(spread, perturbation=factored), params),
        "guided": lambda: (
            chain(spread, guide=enhancements.momentum_guided_sampling()),
            params,
        ),
        "normalized": lambda: (
            chain(spread, enhancements.kernel_normalization(per="channel")),
            quantized[16],
        ),
        "feedback": lambda: (
            chain(spread, enhancements.error_feedback()),
            quantized[8],
        ),
        "sharpness": lambda: (
            enhancements.sharpness_aware(chain(spread), key, rho=0.05, spread=spread),
            quantized[16],
        ),
        "sparse": lambda: (
            enhancements.sparse_update(
                chain(spread),
                key=key,
                density=0.2,
                criterion="importance",
                num_perturbations=PAIRS,
                spread=spread,
            ),
            params,
        ),
        "activity": lambda: (activity_chain(spread.mesh), params),
    }
    tx, params = kinds[name]()
    if name == "guided":
        extra = {"key": key, "rate": jnp.float32(0.1)}
        return Kind(tx, with_dropout, params, extra)
    return Kind(tx, losses if name == "activity" else mean_loss, params, {})


def digest(tree):
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def bytes_received(text):
    """Bytes of the results of all collectives in the text of a program."""
    pattern = (
        r"= (\S+) (?:all-reduce|all-gather|reduce-scatter|all-to-all"
        r"|collective-permute|collective-broadcast)(?:-start)?\("
    )
    return sum(
        BYTES[dtype] * int(np.prod([int(n) for n in axes.split(",") if n]))
        for shape in re.findall(pattern, text)
        for dtype, axes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    )


def mesh_of(layout):
    shape = tuple(map(int, layout.split("x")))
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("seeds", "data"), devices=devices)


def step_of(name, layout):
    """A step on a mesh, its data, and what it begins with."""
    spread = fgrad.Spread(mesh_of(layout), pairs="seeds", batch="data", shards=SHARDS)
    kind = kind_of(name, spread)
    start = kind.params, kind.tx.init(kind.params)
    start, extra = spread.replicate((start, kind.extra))
    batch = spread.split(problem()[1])

    def step(params, state, batch, extra):
        updates, state = kind.tx.update(
            params, state, params, value_fn=kind.loss, **batch, **extra
        )
        return optax.apply_updates(params, updates), state

    return step, (batch, extra), start


def step_on(name, layout):
    """As `step_of`, compiled."""
    step, data, start = step_of(name, layout)
    return jax.jit(step).lower(*start, *data).compile(), data, start


def trained(name, layout):
    """What a run of some steps on a mesh leaves."""
    step, data, start = step_on(name, layout)
    params, state = start
    for _ in range(STEPS):
        params, state = step(params, state, *data)
    return {
        "params": digest(params),
        "state": digest(state),
        "bytes": bytes_received(step.as_text()),
    }


def resumed(layout):
    """As `trained`, of a run that stops on 8 devices and goes on with others."""
    step, data, run = step_on("float", "8x1")
    for _ in range(STEPS - 1):
        run = step(*run, *data)
    step, data, start = step_on("float", layout)
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = orbax.StandardCheckpointer()
        checkpointer.save(pathlib.Path(folder) / "run", run)
        checkpointer.wait_until_finished()
        shapes = jax.tree.map(orbax.utils.to_shape_dtype_struct, start)
        run = checkpointer.restore(pathlib.Path(folder) / "run", shapes)
    params, state = step(*run, *data)
    return {"params": digest(params), "state": digest(state)}


def killed(layout):
    """As `trained` of "float", but the last process dies before the last step.

    The losses so far are in the file that LOSSES names.
    """
    step, data, run = step_on("float", layout)
    log = fgrad.RunLog()
    for number in range(STEPS):
        if number == STEPS - 1 and int(PROCESS) == int(PROCESSES) - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        run = jax.block_until_ready(step(*run, *data))
        log.append(run[1])
        if number < STEPS - 1 and PROCESS == "0":
            log.save(os.environ["LOSSES"])
    return {"ended": "as if nobody had died"}


def after_death(layout):
    """Goes on where the processes of `killed` were."""
    step, data, (params, _) = step_on("float", layout)
    spread = fgrad.Spread(mesh_of(layout), pairs="seeds", batch="data", shards=SHARDS)
    log = fgrad.RunLog.load(os.environ["LOSSES"])
    run = spread.replicate(log.replay(chain(spread), params))
    params, state = step(*run, *data)
    return {"params": digest(params), "state": digest(state)}


def elsewhere(layout):
    """A chain's beginning, and `fgrad.save`, for columns that other processes have."""
    mesh = mesh_of(layout)
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    weights = fgrad.quantize(problem()[0]["a"], bits=16, channel_axis=-1)
    params = {
        "a": jax.tree.map(
            lambda x: jax.make_array_from_callback(
                x.shape, columns, np.asarray(x).__getitem__
            ),
            weights,
        )
    }
    here = jax.tree.map(np.asarray, weights)
    state = chain(None, guide=enhancements.momentum_guided_sampling()).init(params)
    (guide,) = jax.tree.leaves(state[0].guide)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "params"
        try:
            fgrad.save(path, params)
            same = np.array_equal(fgrad.load(path)["a"].qvalue, here.qvalue)
            saved = "the same" if same else "others"
        except ValueError as error:
            saved = str(error)
    return {
        "guide": guide.sharding.shard_shape(guide.shape),
        "saved": saved,
    }


def trained_in_integers(layout):
    """As `trained`, of a step without floats."""
    spread = fgrad.Spread(mesh_of(layout), pairs="seeds", batch="data", shards=SHARDS)
    params, batch = problem()
    params = fgrad.quantize({"a": params["a"], "c": params["c"]})
    program = fgrad.integer.convert(
        lambda p, x: jax.nn.relu(x @ p["a"]) @ p["c"], params, batch["x"]
    )
    init, step = fgrad.integer.train_step(
        program,
        jax.random.key(0),
        learning_rate=5e-2,
        epsilon=2e-2,
        num_perturbations=PAIRS,
        estimator="normalized",
        spread=spread,
    )
    weights, state = spread.replicate(init())
    data = spread.split((program.encode(batch["x"]), jnp.arange(8) % 4))
    compiled = jax.jit(step).lower(weights, state, data).compile()
    for _ in range(STEPS):
        weights, state = compiled(weights, state, data)
    return {
        "params": digest(weights),
        "state": digest(state),
        "bytes": bytes_received(compiled.as_text()),
    }


def gathered(layout):
    """As `trained` of "float", from weights that are sharded where `Spread` is."""
    step_fn, (batch, extra), (params, state) = step_of("float", layout)
    rows = jax.sharding.NamedSharding(
        mesh_of(layout), jax.sharding.PartitionSpec(("data", "seeds"))
    )
    params = {name: jax.device_put(leaf, rows) for name, leaf in params.items()}
    step = jax.jit(step_fn)
    for _ in range(STEPS):
        params, state = step(params, state, batch, extra)
        params = {name: jax.device_put(leaf, rows) for name, leaf in params.items()}
    return {"params": digest(params), "state": digest(state)}


def with_own_parts(layout):
    """A loss with a ``shard_map`` of its own, over an axis that `Spread` leaves alone.

    Its step has to be that of the same loss without it.
    """
    del layout
    mesh = jax.make_mesh((2, 2, 2), ("seeds", "data", "model"))
    P = jax.sharding.PartitionSpec

    def columns(x, a):
        # Each device multiplies with some columns of the weights.
        product = functools.partial(
            jax.shard_map,
            in_specs=(P(), P(None, "model")),
            out_specs=P(None, "model"),
            axis_names={"model"},
        )
        return product(lambda x, a: jnp.tanh(x @ a))(x, a)

    def loss(product, params, x, y):
        return jnp.mean((product(x, params["a"]) @ params["c"] - y) ** 2)

    params, batch = problem()
    spread = fgrad.Spread(mesh, pairs="seeds", batch="data", shards=SHARDS)
    tx = chain(spread)
    batch = spread.split(batch)
    start = spread.replicate((params, tx.init(params)))
    products = {"own": columns, "plain": lambda x, a: jnp.tanh(x @ a)}
    ends = {}
    for name, product in products.items():
        value_fn = functools.partial(loss, product)
        update = jax.jit(functools.partial(tx.update, value_fn=value_fn, **batch))
        updates, _ = update(start[0], *start[::-1])
        ends[name] = np.asarray(updates["a"])
    largest = np.max(np.abs(ends["plain"]))
    return {"off": float(np.max(np.abs(ends["own"] - ends["plain"])) / largest)}


def evaluations(layout):
    """How many evaluations of the loss each device makes in a step."""
    spread = fgrad.Spread(mesh_of(layout), pairs="seeds", batch="data", shards=SHARDS)
    counts = collections.Counter()

    def count(seeds, data):
        counts[int(seeds), int(data)] += 1

    def counted(params, x, y):
        place = (jax.lax.axis_index(name) for name in ("seeds", "data"))
        jax.debug.callback(count, *place)
        return mean_loss(params, x, y)

    params, batch = problem()
    tx = chain(spread)
    state = tx.init(params)
    update = jax.jit(lambda p, s: tx.update(p, s, p, value_fn=counted, **batch))
    jax.block_until_ready(update(params, state))
    jax.effects_barrier()
    return {"evaluations": list(counts.values())}


def main():
    if ADDRESS:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            ADDRESS, int(PROCESSES), int(PROCESS), heartbeat_timeout_seconds=10
        )
    others = {
        "after death": after_death,
        "gathered": gathered,
        "killed": killed,
        "own parts": with_own_parts,
        "counted": evaluations,
        "elsewhere": elsewhere,
        "integer": trained_in_integers,
        "resumed": resumed,
    }
    for name in sys.argv[1].split(","):
        layouts = sys.argv[2].split(",")
        for layout in layouts[:1] if name in ONCE else layouts:
            run = others.get(name)
            found = run(layout) if run else trained(name, layout)
            print(json.dumps({"kind": name, "layout": layout, **found}), flush=True)


if __name__ == "__main__":
    main()
