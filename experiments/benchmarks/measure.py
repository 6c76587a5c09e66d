"""The cost of a program: memory as the compiler plans it, time side by side.

The compiler's plan for a call is exact and free of noise, so memory needs no run. Times
do: they are compared within one process only, between programs called in turn, so that
a slow moment of the machine hits all of them alike.
"""

import contextlib
import contextvars
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from fgrad.analysis import Memory

# A sample shorter than this is made of several calls, for the clock's sake.
_MIN_SECONDS = 0.02
_of_processor = contextvars.ContextVar("seconds of the processor", default=False)


@contextlib.contextmanager
def seconds_of_the_processor() -> Iterator[None]:
    """Times what the processor did for this process, which others do not disturb.

    It says what a step takes only if the process has one thread:
    ``XLA_FLAGS=--xla_cpu_multi_thread_eigen=false``.
    """
    token = _of_processor.set(True)
    try:
        yield
    finally:
        _of_processor.reset(token)


class Program:
    """A function and the arguments that it is called with.

    Attributes:
      seconds: what its trace, its lowering and, once done, its compilation took, in
        seconds of the processor: those that other processes take do not count.
    """

    def __init__(
        self, fn: Callable[..., Any], *arguments: Any, carries: bool = False
    ) -> None:
        """Lowers the function; compiles and runs nothing.

        Args:
          fn: the function.
          *arguments: pytrees of arrays.
          carries: whether ``fn`` maps its first argument to the one of the next call,
            as a training step does. That argument is then donated, from a copy.
        """
        if carries:
            arguments = (jax.tree.map(jnp.copy, arguments[0]), *arguments[1:])
        jitted = jax.jit(fn, donate_argnums=(0,) if carries else ())
        start = time.process_time()
        traced = jitted.trace(*arguments)
        self.seconds = {"trace": time.process_time() - start}
        start = time.process_time()
        self._lowered = traced.lower()
        self.seconds["lowering"] = time.process_time() - start
        self._arguments, self._carries = arguments, carries
        self._compiled: Any = None

    def compile(self, optimize: bool = True) -> None:
        """Makes the program ready to be called, if it is not yet."""
        if self._compiled is None:
            options = {} if optimize else quick_options()
            start = time.process_time()
            self._compiled = self._lowered.compile(options)
            self.seconds["compilation"] = time.process_time() - start

    def text(self) -> str:
        """The compiled program as the compiler writes it, optimized."""
        return self._compiled.as_text()

    def plan(self) -> Memory:
        """What the compiler plans for a call."""
        compiled = self._compiled or self._lowered.compile(quick_options())
        return Memory.planned(compiled)

    def __call__(self) -> Any:
        """Calls the compiled function once and waits for the result."""
        result = jax.block_until_ready(self._compiled(*self._arguments))
        if self._carries:
            self._arguments = (result, *self._arguments[1:])
        return result


def quick_options() -> dict[str, Any]:
    """Options for a compilation whose speed, not that of its code, matters.

    On a CPU the code of the loops is left unoptimized. Which buffers there are is
    settled before.
    """
    if jax.default_backend() != "cpu":
        return {}
    return {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }


class Times(NamedTuple):
    """Seconds per call, one entry for each round of `interleave`."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def min(self) -> float:
        """The least disturbed one."""
        return min(self.seconds)

    def ratio(self, other: "Times", scale: float = 1.0) -> dict[str, float]:
        """This time over ``scale`` times another, of medians and of minima."""
        return {
            "median": self.median / (scale * other.median),
            "min": self.min / (scale * other.min),
        }

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return {"median": self.median, "min": self.min, "seconds": self.seconds}


def plan(programs: Mapping[str, Program]) -> dict[str, Memory]:
    """Memory of programs by name. Nothing runs."""
    logging.info("planning %s", "; ".join(programs))
    plans = _side_by_side(Program.plan, programs.values())
    return dict(zip(programs, plans, strict=True))


class Effort(NamedTuple):
    """What a measurement of time may cost.

    Attributes:
      rounds: samples of each program.
      optimize: whether the compiler shall make good code.
    """

    rounds: int
    optimize: bool = True


SMOKE = Effort(rounds=1, optimize=False)


def interleave(
    programs: Mapping[str, Callable[[], Any]], effort: Effort
) -> dict[str, Times]:
    """Times programs in turn: every round calls each of them.

    Args:
      programs: functions without arguments that return when their work is done.
      effort: how carefully. Every program is called once before, to warm it up.

    Returns:
      `Times` by the names of the programs.
    """
    logging.info("timing %s", "; ".join(programs))
    compiled = [p for p in programs.values() if isinstance(p, Program)]
    _side_by_side(lambda program: program.compile(effort.optimize), compiled)
    calls, times = {}, {name: Times([]) for name in programs}
    for name, program in programs.items():
        program()
        once = max(_seconds(program, 1), 1e-9)
        calls[name] = max(1, math.ceil(_MIN_SECONDS / once))
    for _ in range(effort.rounds):
        for name, program in programs.items():
            times[name].seconds.append(_seconds(program, calls[name]))
    return times


def _side_by_side(
    fn: Callable[[Program], Any], programs: Iterable[Program]
) -> list[Any]:
    # The compiler is mostly of one thread, and leaves Python's lock alone.
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(fn, programs))


def _seconds(program: Callable[[], Any], calls: int) -> float:
    clock = time.process_time if _of_processor.get() else time.perf_counter
    start = clock()
    for _ in range(calls):
        program()
    return (clock() - start) / calls
