"""What the GPU's table measures: each section yields rows as they are finished."""

import functools
import itertools
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fgrad
from experiments.benchmarks import (
    h100,
    measure,
    perturbed_dot,
    programs,
    transformer,
)
from experiments.benchmarks.measure import Effort, Program
from experiments.benchmarks.perturbed_dot import Blocks
from experiments.benchmarks.problem import Problem
from experiments.benchmarks.table import NOTHING, mib
from experiments.benchmarks.transformer import Transformer
from fgrad import products
from fgrad.analysis import Memory

_COLUMNS = (
    *("network", "arithmetic", "batch", "what", "ms", "time", "live MiB", "live"),
    "remark",
)
_TINY_VIT = Transformer(16, 2, 2, 5, 3, inputs=12)
_TINY_DECODER = Transformer(16, 2, 2, 8, 11)
# Of a GPU's memory, what a step is planned to fill: the rest is the runtime's.
_FILLED = 0.82
# Of the largest models, one to warm up.
_CALLS = 4


class Row(NamedTuple):
    """A line of the table.

    Attributes:
      network: what is measured, or the name of a section that was not.
      arithmetic: of its weights.
      batch: examples at once.
      what: the program.
      milliseconds: median of a call.
      time: the time of an evaluation over that of the inference that it is compared
        with: a step of m pairs has 2m evaluations, backpropagation three.
      live: bytes of a call as the compiler plans it.
      live_ratio: those bytes over those of that inference.
      remark: what else there is to say.
      where: the device and the versions.
    """

    network: str
    arithmetic: str = ""
    batch: int | None = None
    what: str = ""
    milliseconds: float | None = None
    time: float | None = None
    live: int | None = None
    live_ratio: float | None = None
    remark: str = ""
    where: Mapping[str, str] = {}

    def markdown(self) -> str:
        """The line of a Markdown table."""

        def number(value: float | None, form: str) -> str:
            return NOTHING if value is None else format(value, form)

        cells = [
            self.network,
            self.arithmetic,
            number(self.batch, "d"),
            self.what,
            number(
                self.milliseconds, ".3g" if (self.milliseconds or 0) < 100 else ".0f"
            ),
            number(self.time, ".2f"),
            NOTHING if self.live is None else mib(self.live),
            number(self.live_ratio, ".3f"),
            self.remark,
        ]
        return f"| {' | '.join(cells)} |"

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return {k: v for k, v in self._asdict().items() if v not in (None, "", {})}


def head(row: Row) -> str:
    """The title of the table, what its columns mean, and its head."""
    where = row.where or {"device": "no device"}
    title = ", ".join(f"{k} {v}" if k != "device" else v for k, v in where.items())
    return (
        f"### {title}\n\nms: median of a call. time, live: of an evaluation, and of a "
        "call, over the inference that is named or stands above; a step of m pairs has "
        "2m evaluations, one of backpropagation three. float32 products are JAX's "
        "default, which is TF32 on this kind of device.\n\n"
        f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}"
    )


def where() -> dict[str, str]:
    """The device and the versions."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "JAX": jax.__version__,
        "fgrad": fgrad.__version__,
    }


def reason(error: BaseException) -> str:
    """The first line of an error, for a cell."""
    first = (str(error).splitlines() or [""])[0].replace("|", "/")
    return f"{type(error).__name__}: {first}"[:160]


# --------------------------------------------------------------------- comparisons


class Entry(NamedTuple):
    """A program to compare.

    Attributes:
      make: lowers it.
      row: its line, without numbers.
      reference: the name of the inference that it is compared with, if any.
      evaluations: how many of that inference's a call has.
    """

    make: Callable[[], Program]
    row: Row
    reference: str = ""
    evaluations: float = 1


def compared(entries: Mapping[str, Entry], effort: Effort) -> Iterator[Row]:
    """Times programs in turn and plans their memory.

    A program that cannot be compiled or run, for lack of memory, say, is a row with
    the reason.
    """
    made: dict[str, Program] = {}
    failed: dict[str, str] = {}

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            failed[name] = reason(error)
            made.pop(name, None)
            return None

    for name, entry in entries.items():
        program = attempt(name, entry.make)
        if program is not None:
            made[name] = program
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(
            pool.map(
                lambda n: attempt(n, lambda: made[n].compile(effort.optimize)),
                list(made),
            )
        )
    for name in list(made):
        # Twice, since a step's first result is what its second call reads.
        for _ in range(2):
            if name in made:
                attempt(name, made[name])
    times = measure.interleave(made, effort)
    memory: dict[str, Memory] = {name: made[name].plan() for name in made}
    for name, entry in entries.items():
        if name in failed:
            yield entry.row._replace(remark=failed[name], where=where())
            continue
        reference = entry.reference
        known = reference in made
        yield entry.row._replace(
            milliseconds=1e3 * times[name].median,
            time=times[name].ratio(times[reference], entry.evaluations)["median"]
            if known
            else None,
            live=memory[name].live,
            live_ratio=memory[name].live / memory[reference].live if known else None,
            where=where(),
        )


def _pairs(
    network: str, arithmetic: str, problems: Mapping[int, Problem]
) -> dict[str, Entry]:
    """An inference and a step of m = 1 for each batch size."""
    entries = {}
    for batch, problem in problems.items():
        row, name = Row(network, arithmetic, batch), f"inference {batch}"
        inference = functools.partial(programs.inference, problem)
        step = functools.partial(programs.forward_step, problem)
        entries[name] = Entry(inference, row._replace(what="inference"))
        entries[f"step {batch}"] = Entry(
            step, row._replace(what="step, m = 1"), name, 2
        )
    return entries


def _problems(
    network: Transformer, arithmetic: str, batch_sizes: tuple[int, ...]
) -> dict[int, Problem]:
    """Problems of several batch sizes with the same weights."""
    params = transformer.random_params(network, arithmetic)
    return {
        n: transformer.problem(network, n, arithmetic, params=params)
        for n in batch_sizes
    }


def _effort(smoke: bool) -> Effort:
    return measure.SMOKE if smoke else Effort(rounds=7)


def vit(smoke: bool) -> Iterator[Row]:
    """ViT-B/16: a step beside inference, in floats."""
    yield from _encoder(smoke, ("float32",) if smoke else ("bfloat16", "float32"))


def vit_integers(smoke: bool) -> Iterator[Row]:
    """ViT-B/16: a step beside inference, in integers."""
    yield from _encoder(smoke, ("8w8a",) if smoke else ("8w8a", "16w8a"))


def _encoder(smoke: bool, arithmetics: tuple[str, ...]) -> Iterator[Row]:
    network = _TINY_VIT if smoke else transformer.VIT_B16
    batch_sizes = (2,) if smoke else (1, 8, 64)
    for arithmetic in arithmetics:
        problems = _problems(network, arithmetic, batch_sizes)
        yield from compared(_pairs("ViT-B/16", arithmetic, problems), _effort(smoke))


def decoder(smoke: bool) -> Iterator[Row]:
    """A decoder of 1.3 billion weights: a step beside inference, in bfloat16."""
    network = _TINY_DECODER if smoke else transformer.DECODER
    yield from _decoder(network, "bfloat16", smoke)


def decoder_8w8a(smoke: bool) -> Iterator[Row]:
    """The same in 8w8a, in both layouts of the weights."""
    network = _TINY_DECODER if smoke else transformer.DECODER
    yield from _decoder(network._replace(outputs_first=True), "8w8a", smoke)
    if not smoke:
        yield from _decoder(network, "8w8a", smoke)


def decoder_16w8a(smoke: bool) -> Iterator[Row]:
    """The same in 16w8a."""
    network = _TINY_DECODER if smoke else transformer.DECODER
    yield from _decoder(network._replace(outputs_first=True), "16w8a", smoke)


def _decoder(network: Transformer, arithmetic: str, smoke: bool) -> Iterator[Row]:
    problems = _problems(network, arithmetic, (2,) if smoke else (1, 8))
    layout = ", weights [out, in]" if network.outputs_first else ""
    entries = _pairs(f"decoder of 1.3 B{layout}", arithmetic, problems)
    yield from compared(entries, _effort(smoke))


def peers(smoke: bool) -> Iterator[Row]:
    """ViT-B/16 by backpropagation and by perturbed copies of the weights."""
    network = _TINY_VIT if smoke else transformer.VIT_B16
    for arithmetic in ("bfloat16",) if smoke else ("bfloat16", "float32"):
        entries = _peers(network, arithmetic, smoke)
        yield from compared(entries, _effort(smoke))


def _peers(network: Transformer, arithmetic: str, smoke: bool) -> dict[str, Entry]:
    batch = 2 if smoke else 8
    problem = transformer.problem(network, batch, arithmetic)
    checkpointed = transformer.problem(
        network._replace(checkpointed=True), batch, arithmetic, params=problem.params
    )
    steps: dict[str, tuple[int, Callable[..., Program], Any]] = {
        "step, m = 1": (2, programs.forward_step, (problem,)),
        "backprop": (3, programs.backprop_step, (problem,)),
        "backprop, blocks computed again": (4, programs.backprop_step, (checkpointed,)),
        "jax.vmap, K = 1": (2, programs.vmap_step, (problem, 1)),
        "jax.vmap, K = 8": (16, programs.vmap_step, (problem, 8)),
    }
    steps = dict(list(steps.items())[:: 1 + smoke])
    row = Row("ViT-B/16", arithmetic, batch)
    inference = functools.partial(programs.inference, problem)
    entries = {"inference": Entry(inference, row._replace(what="inference"))}
    for what, (evaluations, make, arguments) in steps.items():
        entries[what] = Entry(
            functools.partial(make, *arguments),
            row._replace(what=what),
            "inference",
            evaluations,
        )
    return entries


def seeds(smoke: bool) -> Iterator[Row]:
    """K pairs of rank 1 at once, beside inference on as many examples."""
    yield from _seeds("float32" if smoke else "bfloat16", smoke)


def seeds_integers(smoke: bool) -> Iterator[Row]:
    """The same in integers."""
    yield from _seeds("8w8a", smoke)


def _seeds(arithmetic: str, smoke: bool) -> Iterator[Row]:
    network = _TINY_VIT if smoke else transformer.VIT_B16
    batch, counts = (1, (2,)) if smoke else (4, (1, 4, 16, 64))
    sizes = {2 * count * batch for count in counts} | {batch}
    problems = _problems(network, arithmetic, tuple(sorted(sizes)))
    entries = {}
    for count in counts:
        row, name = Row("ViT-B/16", arithmetic), f"inference {count}"
        many = 2 * count * batch
        entries[name] = Entry(
            functools.partial(programs.inference, problems[many]),
            row._replace(batch=many, what="inference"),
        )
        entries[f"K {count}"] = Entry(
            functools.partial(programs.low_rank_step, problems[batch], count),
            row._replace(batch=batch, what=f"step, K = {count}, rank 1"),
            name,
        )
    yield from compared(entries, _effort(smoke))


# -------------------------------------------------------------------- int8 products


def int8(smoke: bool) -> Iterator[Row]:
    """One product of square matrices in every arithmetic, and the kernel it becomes."""
    size = 32 if smoke else 4096
    key = jax.random.key(0)
    z = fgrad.perturbations.normal()

    def matrix(dtype: Any, units: int = 1) -> jax.Array:
        return (z.sample(key, (size, size)).astype(jnp.int32) * units).astype(dtype)

    def plain(x: jax.Array, w: jax.Array, **kwargs: Any) -> jax.Array:
        return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), **kwargs)

    def quantized(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
        one = jnp.float32(1)
        return products.dot_general(
            fgrad.QTensor(x, one), fgrad.QTensor(w, one), (((1,), (axis,)), ((), ()))
        )

    def to_int32(x: jax.Array, w: jax.Array) -> jax.Array:
        return plain(x, w, preferred_element_type=jnp.int32)

    byte, word = matrix(jnp.int8), matrix(jnp.int16, 200)
    floats, half = matrix(jnp.float32), matrix(jnp.bfloat16)
    cases: dict[str, tuple[str, Callable[..., Any], tuple[jax.Array, ...]]] = {
        "bfloat16": ("bfloat16", plain, (half, half)),
        "float32": ("float32", plain, (floats, floats)),
        "float32, highest": (
            "float32",
            lambda x, w: plain(x, w, precision="highest"),
            (floats, floats),
        ),
        "int8 to int32": ("int8", to_int32, (byte, byte)),
        "int8, [out, in]": ("8w8a", lambda x, w: quantized(x, w, 1), (byte, byte)),
        "int8, [in, out]": ("8w8a", lambda x, w: quantized(x, w, 0), (byte, byte)),
        "limbs, [out, in]": ("16w8a", lambda x, w: quantized(x, w, 1), (byte, word)),
        "limbs, [in, out]": ("16w8a", lambda x, w: quantized(x, w, 0), (byte, word)),
    }
    entries = {}
    kernels: dict[str, Program] = {}
    for what, (arithmetic, fn, arguments) in cases.items():

        def make(what: str = what, fn: Any = fn, arguments: Any = arguments) -> Program:
            kernels[what] = Program(fn, *arguments)
            return kernels[what]

        row = Row(f"product of {size} x {size}", arithmetic, size, what)
        entries[what] = Entry(make, row, "bfloat16")
    for row in compared(entries, _effort(smoke)):
        rate = 2 * size**3 / row.milliseconds / 1e9 if row.milliseconds else None
        found = row.remark or (
            f"{rate:.0f} TOP/s; {product_kernels(kernels[row.what].text())}"
        )
        yield row._replace(remark=found)


def product_kernels(text: str) -> str:
    """How a compiled program multiplies matrices.

    Args:
      text: the optimized HLO.

    Returns:
      Library calls and kernels, and the types of what they multiply, such as
      ``cublasLt s8 x s8 -> s32``; plain products inside fusions that are no matrix
      kernels, which run on no tensor core, are "loop".
    """
    found: dict[str, int] = {}
    shapes = dict(re.findall(r"%?([\w.\-]+) = \(?(\w+)\[", text))
    triton = set(re.findall(r"calls=%?([\w.\-]+)[^\n]*__triton[\w]*gemm", text))
    computation = ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = header[1]
        call = re.search(
            r'= \(?(\w+)\[.*custom-call\(([^)]*)\).*target="([^"]+)"', line
        )
        dot = re.search(r"= (\w+)\[[^=]*? dot\(([^)]*)\)", line)
        if call and ("cublas" in call[3] or "gemm" in call[3] or "cudnn" in call[3]):
            kind, (out, operands) = call[3], call.group(1, 2)
        elif dot:
            kind = "Triton" if computation in triton else "loop"
            out, operands = dot.group(1, 2)
        else:
            continue
        names = [o.split()[-1].lstrip("%") for o in operands.split(",")[:2]]
        types = " x ".join(shapes.get(name, "?") for name in names)
        description = f"{kind.strip('_')} {types} to {out}"
        found[description] = found.get(description, 0) + 1
    return ", ".join(f"{n} {what}" for what, n in found.items()) or "no product"


def kernel(smoke: bool) -> Iterator[Row]:
    """A product with perturbed weights: the plain way, and in one kernel."""
    size = 128 if smoke else 4096
    blocks = [perturbed_dot.DEFAULT]
    if not smoke:
        blocks += [Blocks(16, 256), Blocks(64, 64), Blocks(32, 64, 2), Blocks(64, 128)]
    key, cpu = jax.random.key(0), jax.default_backend() == "cpu"
    for dtype, rows in itertools.product(("bfloat16", "float32"), (1, 8)):
        shapes = ((rows, size), (size, size))
        x, w = (
            transformer.random_array(key, shape, jnp.dtype(dtype), size**-0.5)
            for shape in shapes
        )
        row = Row(f"product with {size} x {size}, perturbed", dtype, rows)
        makers: dict[str, Callable[..., Any]] = {
            "unperturbed": lambda x, w, key, epsilon: x @ w,
            "W + εz, then the product": perturbed_dot.plain,
        }
        for some in blocks:
            name = "one kernel, " + "/".join(map(str, some))
            makers[name] = functools.partial(
                perturbed_dot.fused, blocks=some, interpret=cpu
            )
        entries = {}
        for what, fn in makers.items():
            make = functools.partial(Program, fn, x, w, key, jnp.float32(1e-3))
            reference = "W + εz, then the product"
            entries[what] = Entry(make, row._replace(what=what), reference)
        yield from compared(entries, _effort(smoke))
        if smoke:
            return


# ------------------------------------------------------------------------ headline


def _step(problem: Problem) -> tuple[Callable[[Any, Any], Any], Any]:
    """A step that maps (params, state) to the same, and the transformation."""
    tx = fgrad.qzo_ff(
        programs.LEARNING_RATE,
        jax.random.key(2),
        epsilon=programs.EPSILON,
        num_perturbations=1,
    )

    def step(carry: Any, data: Any) -> Any:
        params, state = carry
        updates, state = tx.update(
            params, state, params, value_fn=problem.loss_fn, **data
        )
        return optax.apply_updates(params, updates), state

    return step, tx


class Planned(NamedTuple):
    """A model, compiled without arrays.

    Attributes:
      network: sizes.
      problem: with shapes in the place of arrays.
      inference: compiled.
      step: compiled, with donated weights and state.
      tx: the transformation of the step.
    """

    network: Transformer
    problem: Problem
    inference: Any
    step: Any
    tx: Any

    @property
    def memory(self) -> tuple[Memory, Memory]:
        """Of an inference and of a step."""
        return Memory.planned(self.inference), Memory.planned(self.step)


def planned(
    network: Transformer, arithmetic: str, *, for_h100: bool = False
) -> Planned:
    """Compiles an inference and a step of a model that need not fit anywhere.

    Args:
      network: sizes.
      arithmetic: of the weights.
      for_h100: compiles for a device that is not there, see `h100`, rather than for
        the one that is.
    """
    problem = transformer.problem(network, 1, arithmetic, abstract=True)
    step, tx = _step(problem)
    carry = (problem.params, jax.eval_shape(tx.init, problem.params))
    data = problem.data
    options = measure.quick_options()
    if for_h100:
        options = h100.OPTIONS
        carry, data = h100.placed((carry, data))
    inference = jax.jit(lambda params, data: problem.loss_fn(params, **data))
    lowered = (
        inference.lower(carry[0], data),
        jax.jit(step, donate_argnums=0).lower(carry, data),
    )
    with futures.ThreadPoolExecutor(2) as pool:
        inferred, stepped = pool.map(lambda p: p.compile(options), lowered)
    return Planned(network, problem, inferred, stepped, tx)


# Width, heads and vocabulary of OPT-30B and OPT-66B; the depth is what fits.
LARGEST = {
    "bfloat16": Transformer(7168, 48, 56, 512, 50_272),
    "8w8a": Transformer(9216, 58, 72, 512, 50_272, outputs_first=True),
}
_TINY_LARGEST = {
    "bfloat16": Transformer(16, 2, 2, 8, 11),
    "8w8a": Transformer(16, 2, 2, 8, 11, outputs_first=True),
}


def plan(smoke: bool) -> Iterator[Row]:
    """The compiler's plan for 30 and 60 billion weights; nothing is allocated."""
    networks = {"8w8a": _TINY_LARGEST["8w8a"]} if smoke else LARGEST
    for arithmetic, network in networks.items():
        yield from _planned_rows(planned(network.staged(), arithmetic), arithmetic)
    if smoke or not h100.available():
        return
    for arithmetic, network in networks.items():
        result = planned(network.staged(), arithmetic, for_h100=True)
        for row in _planned_rows(result, arithmetic):
            yield row._replace(what=f"{row.what} for an H100")


def _planned_rows(result: Planned, arithmetic: str) -> Iterator[Row]:
    inference, step = result.memory
    row = Row(_large_name(result), arithmetic, 1, where=where())
    weights = mib(inference.arguments)
    yield row._replace(
        what="inference, planned",
        live=inference.live,
        live_ratio=1.0,
        remark=f"arguments {weights} MiB",
    )
    yield row._replace(
        what="step, m = 1, planned",
        live=step.live,
        live_ratio=step.live / inference.live,
        remark=f"temporaries {mib(step.temporaries)} MiB",
    )


def _large_name(result: Planned) -> str:
    billions = result.problem.num_parameters / 1e9
    return f"decoder of {billions:.3g} B"


def headline(smoke: bool) -> Iterator[Row]:
    """The largest decoder that the device can train: planned, made, and stepped."""
    yield from _headline("bfloat16", smoke)


def headline_8w8a(smoke: bool) -> Iterator[Row]:
    """The same with weights of 8 bits."""
    yield from _headline("8w8a", smoke)


def _headline(arithmetic: str, smoke: bool) -> Iterator[Row]:
    network = (_TINY_LARGEST if smoke else LARGEST)[arithmetic]
    yield from _largest(network, arithmetic, smoke)


def _largest(network: Transformer, arithmetic: str, smoke: bool) -> Iterator[Row]:
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit and not smoke:
        network = fitting(network, arithmetic, _FILLED * limit)
    result = planned(network.staged(), arithmetic)
    over = max(m.live for m in result.memory) - _FILLED * (limit or float("inf"))
    if over > 0:
        less = -(-over // _block_bytes(network, arithmetic))
        network = network._replace(depth=network.depth - int(less))
        result = planned(network.staged(), arithmetic)
    yield from _planned_rows(result, arithmetic)
    yield from _largest_steps(result, arithmetic)


def _largest_steps(result: Planned, arithmetic: str) -> Iterator[Row]:
    """Runs inferences and steps on weights that only exist once."""
    dtype = transformer.ARITHMETIC[arithmetic][1]
    data = {"batch": transformer.random_batch(result.network, 1, dtype)}
    params = transformer.random_params(result.network, arithmetic)
    carry = (params, result.tx.init(params))
    del params  # or its buffers would be looked for where the first step puts others
    row = Row(_large_name(result), arithmetic, 1, where=where())

    def seconds(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    def advance() -> Any:
        nonlocal carry
        carry = result.step(carry, data)
        return carry

    inferences = [
        seconds(lambda: result.inference(carry[0], data)) for _ in range(_CALLS)
    ]
    steps = [seconds(advance) for _ in range(_CALLS)]
    # The first warms up.
    inference, step = (statistics.median(t[1:]) for t in (inferences, steps))
    yield row._replace(what="inference", milliseconds=1e3 * inference)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    loss = float(optax.tree.get(carry[1], "loss"))
    yield row._replace(
        what="step, m = 1",
        milliseconds=1e3 * step,
        time=step / (2 * inference),
        remark=f"loss {loss:.3f}" + (f"; peak in use {mib(peak)} MiB" if peak else ""),
    )


def fitting(network: Transformer, arithmetic: str, size: float) -> Transformer:
    """The network with as many blocks as a step of so many bytes has room for."""
    # Beside the blocks: embeddings, logits, what one block needs, the update of a leaf.
    others = 5 * network.outputs * network.width + 4 * _block_bytes(network, arithmetic)
    depth = int((size - others) // _block_bytes(network, arithmetic))
    return network._replace(depth=max(1, depth))


def _block_bytes(network: Transformer, arithmetic: str) -> int:
    one = transformer.abstract_params(network._replace(depth=1, stages=1), arithmetic)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one["stages"]))


# ---------------------------------------------------------------------------- MeZO


def mezo(smoke: bool) -> Iterator[Row]:
    """MeZO in PyTorch on ViT-B/16, beside inference in PyTorch."""
    import torch

    from experiments.benchmarks import mezo as pytorch
    from experiments.models.vit import ViT

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    torch.set_float32_matmul_precision("high")  # TF32, as JAX has it
    network, side, batch = ViT(1000, 16, 768, 12, 12, 3072), 224, 8
    if smoke:
        network, side, batch = ViT(3, 4, 8, 1, 2, 16), 8, 2
    place = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "PyTorch": torch.__version__,
    }

    def waited(call: Callable[[], Any]) -> None:
        call()
        if on_gpu:
            torch.cuda.synchronize()

    for name in ("float32",) if smoke else ("bfloat16", "float32"):
        run = pytorch.Mezo(
            network,
            (side, side, 3),
            batch,
            device=device,
            dtype=getattr(torch, name),
        )
        calls = {"inference": run.inference, "MeZO step": run.step}
        times = measure.interleave(
            {what: functools.partial(waited, call) for what, call in calls.items()},
            _effort(smoke),
        )
        peaks: dict[str, int] = {}
        for what, call in calls.items() if on_gpu else ():
            torch.cuda.reset_peak_memory_stats()
            waited(call)
            peaks[what] = torch.cuda.max_memory_allocated()
        for what in calls:
            peak = peaks.get(what)
            yield Row(
                "ViT-B/16 in PyTorch",
                name,
                batch,
                what,
                1e3 * times[what].median,
                times[what].ratio(times["inference"], 2)["median"]
                if what != "inference"
                else None,
                peak,
                peak / peaks["inference"] if peak else None,
                "live: PyTorch's peak of allocated memory" if peak else "",
                place,
            )
