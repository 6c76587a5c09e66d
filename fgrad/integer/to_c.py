"""A step or a program as one C99 file and its header."""

from __future__ import annotations

import dataclasses
import importlib.resources
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fgrad import _checks, fixed_point
from fgrad.fixed_point import is_qtensor
from fgrad.integer import arena, arithmetic, c_code, lowering
from fgrad.integer.convert import Program, integers
from fgrad.integer.lowering import Block
from fgrad.integer.training import State, TrainStep, check_model

Field = tuple[str, Any]  # a name in C, and an array or its shape and type


@dataclasses.dataclass(frozen=True)
class CProgram:
    """What `to_c` has written.

    Attributes:
      source: the C file.
      header: its header.
      arena_bytes: temporary memory.
      weight_bytes: of the weights that train; of all in a program for inference.
      table_bytes: constants of the program, weights that do not train among them, but
        not the initial weights.
      fields: the fields of each struct, by its name: their names and arrays.
      places: which leaves of the weights ``fgrad_weights`` holds, in its order.
    """

    source: pathlib.Path
    header: pathlib.Path
    arena_bytes: int
    weight_bytes: int
    table_bytes: int
    fields: dict[str, list[Field]]
    places: tuple[int, ...]

    def held(self, weights: Any) -> list[jax.Array]:
        """The leaves of integer weights that ``fgrad_weights`` holds, in its order."""
        leaves = jax.tree.leaves(weights)
        return [leaves[i] for i in self.places]


def to_c(
    model: TrainStep | Program,
    directory: str | pathlib.Path,
    *,
    batch_size: int = 1,
    labels: Any = None,
) -> CProgram:
    """Writes ``fgrad_model.c`` and ``fgrad_model.h``.

    They need ``<stdint.h>`` and nothing else. The header declares the structs and
    ``fgrad_predict``; for a step also ``fgrad_step``, which changes weights and state
    in place, and ``fgrad_commit`` and ``fgrad_load``, which keep both in two slots of
    memory that outlives a power cut. Perturbed weights are never stored: a product
    makes them one output channel at a time. Weights that do not train, such as those of
    a frozen backbone, are constants: they stay in flash.

    Args:
      model: a step from `fgrad.integer.train_step`, or a program, for inference only.
      directory: where to write; it is made.
      batch_size: examples in a batch; the first axis of every argument.
      labels: shape and type of the labels of a batch, int32 [batch_size] by default.

    Returns:
      A `CProgram`.

    Raises:
      ConversionError: for an operation that C is not written for.
    """
    check_model("to_c", model)
    batch_size = _checks.integer("batch_size", batch_size, 1, 2**20)
    step = model if isinstance(model, TrainStep) else None
    program = model.program if isinstance(model, TrainStep) else model
    places = _places(model)
    weights, whole = _held(program, places)
    inputs = examples_of(program, batch_size)
    writer = c_code.Writer()
    named = _named_weights(program)
    fields = {
        "weights": [named[i] for i in places],
        "inputs": _numbered("x", inputs),
    }

    def predict(held: Any, *encoded: Any) -> Any:
        return program(whole(held), *encoded)

    outputs = jax.eval_shape(predict, weights, *inputs)
    fields["outputs"] = _numbered("y", jax.tree.leaves(outputs))
    block = lowering.lower(predict, weights, *inputs)
    bodies = {
        "predict": _body(writer, block, fields, ("weights", "inputs"), ("outputs",))
    }
    if step is not None:
        labels = (
            jax.ShapeDtypeStruct((batch_size,), jnp.int32) if labels is None else labels
        )
        state = step.init()[1]
        fields["state"] = [(n, v) for n, v in zip(State._fields, state, strict=True)]
        fields["batch"] = [*fields["inputs"], *_numbered("labels", [labels])]
        advance = _advance(step, whole, places)
        block = lowering.lower(advance, weights, state, (tuple(inputs), labels))
        arguments = "weights", "state", "batch"
        bodies["step"] = _body(writer, block, fields, arguments, arguments[:2])
    for helper, (name, table) in _TABLES.items():
        if helper in writer.helpers:
            writer.constants[name] = table
    if "log2" in writer.helpers:
        writer.helpers.add("clz")
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    header, source = directory / "fgrad_model.h", directory / "fgrad_model.c"
    offsets, arena_bytes = arena.place(x for _, x in writer.lifetimes.values())
    header.write_text(_header(program, fields, bodies))
    source.write_text(_source(writer, fields, bodies, offsets, arena_bytes))
    return CProgram(
        source,
        header,
        arena_bytes,
        sum(_bytes(x) for _, x in fields["weights"]),
        sum(x.nbytes for x in writer.constants.values()),
        fields,
        places,
    )


def _places(model: TrainStep | Program) -> tuple[int, ...]:
    """Which leaves are in the struct of weights: those that may change."""
    if isinstance(model, Program):
        return tuple(range(len(jax.tree.leaves(integers(model.params)))))
    exact = [] if model.head is None else [leaf.index for leaf in model.head.leaves]
    return tuple(sorted([*model.rules, *exact]))


def _held(
    program: Program, places: Sequence[int]
) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The leaves in the struct, and what makes whole weights of such leaves."""
    leaves, structure = jax.tree.flatten(integers(program.params))

    def whole(held: Sequence[Any]) -> Any:
        every = [np.asarray(x) for x in leaves]
        for place, x in zip(places, held, strict=True):
            every[place] = x
        return jax.tree.unflatten(structure, every)

    return [leaves[i] for i in places], whole


def _advance(
    step: TrainStep, whole: Callable[[Sequence[Any]], Any], places: Sequence[int]
) -> Callable[..., tuple[list[Any], State]]:
    """The step on the leaves in the struct."""

    def advance(held: Any, state: State, batch: Any) -> tuple[list[Any], State]:
        weights, state = step(whole(held), state, batch)
        leaves = jax.tree.leaves(weights)
        return [leaves[i] for i in places], state

    return advance


def _body(
    writer: c_code.Writer,
    block: Block,
    fields: dict[str, list[Field]],
    arguments: Sequence[str],
    results: Sequence[str],
) -> list[str]:
    def pointers(structs: Sequence[str]) -> list[str]:
        return [
            f"{struct}->{name}" if np.shape(x) else f"(&{struct}->{name})"
            for struct in structs
            for name, x in fields[struct]
        ]

    return writer.function(block, pointers(arguments), pointers(results))


def examples_of(program: Program, batch_size: int) -> list[Any]:
    """Shapes and types of encoded arguments whose first axis has a size."""
    leaves, structure = jax.tree.flatten(program.examples)
    shapes = [
        jax.ShapeDtypeStruct(
            (batch_size, *x.shape[1:]), x.dtype if scale is None else jnp.int8
        )
        for x, scale in zip(leaves, program.input_scales, strict=True)
    ]
    return list(jax.tree.unflatten(structure, shapes))


def _named_weights(program: Program) -> list[Field]:
    paths = jax.tree_util.tree_flatten_with_path(program.params, is_leaf=is_qtensor)[0]
    names = [_identifier(fixed_point.path_str(path)) for path, _ in paths]
    arrays = jax.tree.leaves(integers(program.params))
    if len(set(names)) < len(names):  # paths that differ in what C does not allow
        names = [f"{name}_{i}" for i, name in enumerate(names)]
    return list(zip(names, arrays, strict=True))


def _identifier(path: str) -> str:
    name = re.sub(r"\W", "_", path) or "weight"
    return name if not name[0].isdigit() else f"w_{name}"


def _numbered(name: str, leaves: Any) -> list[Field]:
    leaves = jax.tree.leaves(leaves)
    if len(leaves) == 1:
        return [(name, leaves[0])]
    return [(f"{name}{i}", x) for i, x in enumerate(leaves)]


def _bytes(x: Any) -> int:
    size: int = int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize
    return size


# ------------------------------------------------------------------------- the text


def _header(
    program: Program, fields: dict[str, list[Field]], bodies: dict[str, Any]
) -> str:
    lines = [
        "/* Written by fgrad.integer.to_c. Integers only; needs <stdint.h>. */",
        "#ifndef FGRAD_MODEL_H",
        "#define FGRAD_MODEL_H",
        "#include <stdint.h>",
        "",
        f"/* An input is scale * x; scales: {_scales(program.input_scales)}. */",
    ]
    weight_scales = {
        name: leaf.scale
        for (name, _), leaf in zip(
            _named_weights(program),
            jax.tree.leaves(program.params, is_leaf=is_qtensor),
            strict=True,
        )
        if is_qtensor(leaf)
    }
    for struct, members in fields.items():
        lines.append("typedef struct {")
        for name, x in members:
            size = int(np.prod(x.shape))
            extent = f"[{size}]" if x.shape else ""
            note = f"{list(x.shape)}" if x.shape else "a number"
            if struct == "weights" and name in weight_scales:
                note += f", {_scale_note(np.asarray(weight_scales[name]))}"
            kind = c_code.c_type(np.dtype(x.dtype))
            lines.append(f"  {kind} {name}{extent}; /* {note} */")
        lines += [f"}} fgrad_{struct};", ""]
    lines += [
        "extern const fgrad_weights fgrad_initial_weights;",
        "",
        "void fgrad_predict(const fgrad_weights *weights, const fgrad_inputs *inputs,",
        "                   fgrad_outputs *outputs);",
    ]
    if "step" in bodies:
        lines += ["", _text("step.h")]
    return "\n".join([*lines, "#endif", ""])


def _scale_note(scale: np.ndarray) -> str:
    """What the header says of the grid of a weight."""
    low, high = float(scale.min()), float(scale.max())
    if scale.size == 1:
        return f"scale {low:.6g}"
    return f"scale per channel {list(scale.shape)}, {low:.6g} to {high:.6g}"


def _source(
    writer: c_code.Writer,
    fields: dict[str, list[Field]],
    bodies: dict[str, list[str]],
    offsets: dict[arena.Lifetime, int],
    size: int,
) -> str:
    lines = [
        "/* Written by fgrad.integer.to_c. Every value is an integer that stands for",
        "   scale * q; a comment says what a loop computes and where in the model. */",
        '#include "fgrad_model.h"',
        "",
    ]
    for name, values in writer.constants.items():
        lines.append(c_code.array(name, values))
    lines += [_helper(name) for name in _HELPER_ORDER if name in writer.helpers]
    lines += [
        "",
        "/* Temporary memory, shared by buffers that live at different times. */",
        f"static union {{ uint32_t align; uint8_t bytes[{max(size, 4)}]; }} arena;",
    ]
    for name, (kind, lifetime) in writer.lifetimes.items():
        place = f"(({kind} *)(void *)(arena.bytes + {offsets[lifetime]}))"
        lines.append(f"#define {name} {place}")
    lines.append(_initial("weights", fields["weights"]))
    lines += [
        "",
        "void fgrad_predict(const fgrad_weights *weights, const fgrad_inputs *inputs,",
        "                   fgrad_outputs *outputs) {",
        *bodies["predict"],
        "}",
    ]
    if "step" in bodies:
        lines += [
            _initial("state", fields["state"]),
            "",
            "void fgrad_step(fgrad_weights *weights, fgrad_state *state,",
            "                const fgrad_batch *batch) {",
            *bodies["step"],
            "}",
            "",
            _text("step.c"),
        ]
    return "\n".join(lines) + "\n"


def _initial(struct: str, members: list[Field]) -> str:
    parts = []
    for name, x in members:
        values = np.asarray(x)
        text = c_code.array(name, values.reshape(-1), "")
        parts.append(
            f"  /* {name} */ {text[text.index('{') : -1]}"
            if values.shape
            else f"  /* {name} */ {c_code.literal(int(values), values.dtype)}"
        )
    body = ",\n".join(parts)
    return f"\nconst fgrad_{struct} fgrad_initial_{struct} = {{\n{body}\n}};"


def _scales(scales: Sequence[float | None]) -> str:
    return ", ".join("1" if s is None else f"{s:.6g}" for s in scales)


def _text(name: str) -> str:
    folder = importlib.resources.files("fgrad.integer") / "c"
    return (folder / name).read_text().rstrip()


# Tables of the helper functions.
_TABLES = {
    "exp2_negative": ("fgrad_powers", arithmetic.POWERS),
    "log2": ("fgrad_logs", arithmetic.LOGS),
}
_HELPER_ORDER = (
    "multiply_shift",
    "multiply_shift_wide",
    "exp2_negative",
    "exp2_short",
    "clz",
    "log2",
    "population_count",
    "threefry2x32",
)


def _helper(name: str) -> str:
    return "\n" + _text(f"{name}.h")
