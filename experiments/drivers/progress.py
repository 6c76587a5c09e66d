"""Progress of an experiment: a bar on a terminal, plain lines elsewhere."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import rich
import rich.progress

_SECONDS = 15.0  # between two lines


# Whether the user interrupted the program: then every thread ends at its next steps,
# also where the exception of the interrupt was lost, as it is in a finalizer.
INTERRUPTED = threading.Event()


class StoppedError(RuntimeError):
    """The experiment was told to stop while this part of it ran."""


class Progress:
    """Counts the steps of an experiment; yielded by `show_progress`.

    Several threads may report at once.
    """

    def __init__(
        self,
        show: Callable[[int, int], None],
        tell: Callable[[str], None],
        note: Callable[[str], None] | None = None,
    ) -> None:
        """Begins at zero of zero steps.

        Args:
          show: ``show(done, total)`` is called after every change.
          tell: is called with every line of `say`.
          note: is called with every line of `note`; ``tell`` by default.
        """
        self._show = show
        self._tell = tell
        self._note = note or tell
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._done = self._total = 0

    def expect(self, steps: int) -> None:
        """Announces further steps."""
        with self._lock:
            self._total += steps
            self._show(self._done, self._total)

    def advance(self, steps: int) -> None:
        """Counts steps as taken.

        Raises:
          StoppedError: if the experiment was told to stop.
        """
        with self._lock:
            self._done += steps
            self._show(self._done, self._total)
        if self._stopped.is_set() or INTERRUPTED.is_set():
            raise StoppedError("the experiment was told to stop")

    def say(self, text: str) -> None:
        """Tells what was finished, where no bar shows it."""
        with self._lock:
            self._tell(text)

    def note(self, text: str) -> None:
        """Tells what no bar shows, such as how long a run will take."""
        with self._lock:
            self._note(text)

    def stop(self) -> None:
        """Makes every further `advance` raise, so that threads come to an end."""
        self._stopped.set()


@contextlib.contextmanager
def show_progress(every_seconds: float = _SECONDS) -> Iterator[Progress]:
    """Shows a progress bar on a terminal, and prints lines elsewhere.

    Args:
      every_seconds: between two lines that tell nothing but how many steps are done.
    """
    if rich.get_console().is_terminal:
        with _bar() as shown:
            yield shown
    else:
        with _lines(every_seconds) as shown:
            yield shown


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns) as bar:
        task = bar.add_task("training steps", total=0)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield Progress(show, lambda text: None, bar.console.print)


@contextlib.contextmanager
def _lines(every_seconds: float) -> Iterator[Progress]:
    """Prints how far the experiment is, also while it compiles and takes no step."""
    counts, began, ended = [0, 0], time.monotonic(), threading.Event()

    def show(done: int, total: int) -> None:
        counts[:] = done, total

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)

    def heartbeat() -> None:
        while not ended.wait(every_seconds):
            tell(f"training steps: {counts[0]:,} of {counts[1]:,}")

    tell("begins; the first steps wait for data and compilation")
    thread = threading.Thread(target=heartbeat, daemon=True)
    thread.start()
    try:
        yield Progress(show, tell)
    finally:
        ended.set()
        thread.join()
