"""A step or a program as StableHLO on flat arrays, for a process without fgrad."""

from __future__ import annotations

from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from fgrad import _checks
from fgrad.integer.convert import Program, integers
from fgrad.integer.to_c import examples_of
from fgrad.integer.training import TrainStep, check_model


def export(
    model: TrainStep | Program, *, batch_size: int = 1, labels: Any = None
) -> jax.export.Exported:
    """Exports a function of flat integer arrays.

    A step takes the leaves of the weights, those of the state (key, count, loss,
    differences), of the encoded arguments, and the labels; it returns the leaves of the
    weights and of the state. A program takes weights and encoded arguments, and returns
    the leaves of its result. The module holds no float, no 64-bit type and no custom
    call, so that other compilers, such as IREE, take ``mlir_module()``.

    Args:
      model: a step from `fgrad.integer.train_step`, or a program.
      batch_size: examples in a batch; the first axis of every argument.
      labels: shape and type of the labels of a batch, int32 [batch_size] by default.

    Returns:
      What ``jax.export`` makes: ``exported.serialize()``, ``exported.mlir_module()``.

    Example:
      >>> from fgrad.integer import convert
      >>> program = convert(lambda w, x: x @ w, jnp.eye(2), jnp.ones((1, 2)))
      >>> [str(aval) for aval in export(program).in_avals]
      ['int16[2,2]', 'int8[1,2]']
    """
    check_model("export", model)
    batch_size = _checks.integer("batch_size", batch_size, 1, 2**20)
    program = model.program if isinstance(model, TrainStep) else model
    inputs = examples_of(program, batch_size)
    arguments: tuple[Any, ...] = (integers(program.params), *inputs)
    function: Any = program
    if isinstance(model, TrainStep):
        if labels is None:
            labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        weights, state = model.init()
        arguments = weights, state, (tuple(inputs), labels)
        function = model
    leaves, structure = jax.tree.flatten(arguments)

    def flat(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.tree.leaves(function(*jax.tree.unflatten(structure, arrays))))

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    return jax.export.export(jax.jit(flat, keep_unused=True))(*shapes)
