"""The log of a run: its losses, of which the run can be made again.

A step is a function of the parameters, the key, the number of the step, and the 2m
losses of its pairs. Whoever has the initial parameters and the losses of all steps has
the run: a checkpoint of kilobytes.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fgrad import serialization
from fgrad._trees import path_str
from fgrad.transform import ForwardGradState

_ENTRY, _VERSION = "fgrad_run_log", 1


class _Step(NamedTuple):
    """What is kept of a step: its number, from 1, and its losses [2, m]."""

    number: jax.Array
    losses: jax.Array


class RunLog:
    """The losses of the steps of a run, to make it again from its initial parameters.

    A step is two floats for each pair: 1,000 steps of 3 pairs are a file of 24 KB,
    whatever the size of the model. The replay evaluates no loss and needs no data. It
    has the same bits as the run, on a machine of the same kind, with the same chain of
    links and the same versions of JAX.

    The run has one ``fgrad.fixed_point_forward_grad`` in its chain, and its losses are
    of float32 or narrower.

    Args:
      params: the initial parameters, of which the log keeps a SHA-256, so that a replay
        from others is an error; without them it is not checked.

    Example:
      >>> from fgrad import qzo_ff
      >>> loss_fn = lambda params: jnp.sum(params["w"] ** 2)
      >>> tx = qzo_ff(0.1, jax.random.key(0))
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(params, state, params, value_fn=loss_fn)
      ...     return optax.apply_updates(params, updates), state
      >>> initial = {"w": jnp.array([1.0, -2.0])}
      >>> log, params, state = RunLog(initial), initial, tx.init(initial)
      >>> for _ in range(5):
      ...     params, state = step(params, state)
      ...     log.append(state)
      >>> again, _ = log.replay(tx, initial)
      >>> bool((again["w"] == params["w"]).all())
      True
    """

    def __init__(self, params: Any = None) -> None:
        self._digest = None if params is None else _digest(params)
        self._key: np.ndarray | None = None
        self._steps: list[_Step] = []

    def __len__(self) -> int:
        return len(self._steps)

    def append(self, state: Any) -> None:
        """Adds the step that led to a state. It does not wait for the step to end.

        Args:
          state: that of the whole chain, after the step.

        Raises:
          ValueError: for a state with no `ForwardGradState`, or with several.
        """
        link = _link_state(state)
        if self._key is None:
            self._key = _words(link.key)
        # Copies: the next step may be given the memory of the state.
        self._steps.append(_Step(jnp.copy(link.count), jnp.copy(link.losses)))

    def until(self, step: int) -> RunLog:
        """The log of the steps up to a number, of a run that goes on from there.

        Args:
          step: how many steps the run had made in all.

        Raises:
          ValueError: for a step beyond the last one, or before the first.
        """
        kept = step - self.start
        if not 0 <= kept <= len(self):
            raise ValueError(
                f"the log has the steps {self.start + 1} to {self.start + len(self)}, "
                f"and the run goes on from step {step}."
            )
        log = RunLog()
        log._digest, log._key = self._digest, self._key
        log._steps = self._steps[:kept]
        return log

    @property
    def losses(self) -> np.ndarray:
        """float32 [steps, 2, m], ``L₊`` and ``L₋`` of each pair of each step.

        Raises:
          ValueError: if a step is missing between two others.
        """
        if not self._steps:
            raise ValueError(
                "the log has no step; append the state of the chain after each."
            )
        counts = [int(step.number) for step in self._steps]
        for before, after in itertools.pairwise(counts):
            if after != before + 1:
                raise ValueError(
                    f"the log has step {after} after step {before}; append the state "
                    "after every step, once."
                )
        return np.stack([np.asarray(step.losses) for step in self._steps])

    @property
    def start(self) -> int:
        """Steps that were taken before the first one of the log."""
        return int(self._steps[0].number) - 1 if self._steps else 0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the log to a safetensors file, by `fgrad.save`.

        Args:
          path: of the file; one that exists is replaced, at once.
        """
        entry = {
            "version": np.int32(_VERSION),
            "losses": self.losses,
            "start": np.int32(self.start),
            "key": self._key,
        }
        if self._digest is not None:
            entry["params_sha256"] = np.frombuffer(self._digest, np.uint8)
        serialization.save(path, {_ENTRY: entry})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunLog:
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if the file is cut off or damaged (by its SHA-256), is of a later
            version, or is no log of a run.
        """
        entry = serialization.load(path).get(_ENTRY)
        if not isinstance(entry, dict) or "version" not in entry:
            raise ValueError(f"{path} is no log of a run; read it with fgrad.load.")
        if int(entry["version"]) != _VERSION:
            raise ValueError(
                f"{path} is a log of version {int(entry['version'])}, and this fgrad "
                f"reads {_VERSION}: use the fgrad that wrote it, or a later one."
            )
        losses = np.asarray(entry.get("losses", ()))
        complete = {"start", "key"} <= entry.keys()
        if losses.ndim != 3 or losses.shape[1] != 2 or not complete:
            raise ValueError(
                f"{path} is no log of a run: its losses have shape {losses.shape}, "
                "and [steps, 2, m] is asked for."
            )
        log = cls()
        log._key = np.asarray(entry["key"])
        if "params_sha256" in entry:
            log._digest = np.asarray(entry["params_sha256"]).tobytes()
        first = int(entry["start"]) + 1
        log._steps = [
            _Step(jnp.int32(first + i), jnp.asarray(one))
            for i, one in enumerate(losses)
        ]
        return log

    def replay(
        self,
        tx: optax.GradientTransformation,
        params: Any,
        state: Any = None,
        *,
        steps: int | None = None,
    ) -> tuple[Any, Any]:
        """Makes the run again: parameters and state after its last step.

        Args:
          tx: the chain of the run, made with the same arguments.
          params: the parameters before the first step of the log.
          state: the state before that step; ``tx.init(params)`` by default.
          steps: how many steps to make; all by default.

        Returns:
          ``(params, state)``, of the same bits as those of the run.

        Raises:
          ValueError: for other initial parameters than those of the run, another key,
            or a state of another step.
        """
        losses = self.losses[:steps]
        if self._digest is not None and _digest(params) != self._digest:
            raise ValueError(
                "these are not the parameters that the run began with: their SHA-256 "
                f"is {_digest(params).hex()[:16]}..., and the log has "
                f"{self._digest.hex()[:16]}..."
            )
        state = tx.init(params) if state is None else state
        link = _link_state(state)
        if not np.array_equal(_words(link.key), np.asarray(self._key)):
            raise ValueError(
                f"the chain has the key {_words(link.key)}, and the run had "
                f"{np.asarray(self._key)}; z would be another."
            )
        if int(link.count) != self.start:
            raise ValueError(
                f"the state is that after step {int(link.count)}, and the log begins "
                f"after step {self.start}."
            )
        update = optax.with_extra_args_support(tx).update

        @jax.jit
        def step(params: Any, state: Any, losses: jax.Array) -> tuple[Any, Any]:
            zeros = jax.tree.map(jnp.zeros_like, params)
            updates, state = update(zeros, state, params, losses=losses)
            return optax.apply_updates(params, updates), state

        for one in losses:
            params, state = step(params, state, one)
        return params, state


def _link_state(state: Any) -> ForwardGradState:
    """The one state of `fixed_point_forward_grad` in that of a chain."""

    def is_link(x: Any) -> bool:
        return isinstance(x, ForwardGradState)

    found = [x for x in jax.tree.leaves(state, is_leaf=is_link) if is_link(x)]
    if len(found) != 1:
        raise ValueError(
            "the state of a logged run has one fixed_point_forward_grad in it, got "
            f"{len(found)}; give the state of the whole chain."
        )
    link: ForwardGradState = found[0]
    return link


def _words(key: jax.Array) -> np.ndarray:
    """The words of a key, uint32."""
    return np.asarray(jax.random.key_data(key))


def _digest(params: Any) -> bytes:
    """The SHA-256 of the names and the numbers of parameters."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        found.update(f"{path_str(path)} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.digest()
