"""Errors of use: what a command or a configuration asks for and cannot have."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A command or a configuration that cannot be followed.

    The message says what came and what to do, so the launcher prints it without a
    traceback.
    """


def check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Makes sure that every name is a known one.

    Args:
      kind: what the names are of, in the singular, such as "network".
      names: those that a configuration gives.
      known: those that there are.

    Raises:
      UsageError: for the first unknown name; the message lists the known ones and
        points at the nearest.

    Example:
      >>> check_names("network", ["cnn"], ["cnn", "resnet12"])
      >>> check_names("network", ["cmn"], ["cnn", "resnet12"])
      Traceback (most recent call last):
      ...
      experiments.usage.UsageError: there is no network 'cmn', did you mean 'cnn'? ...
    """
    choices = list(known)
    for name in names:
        if name in choices:
            continue
        near = difflib.get_close_matches(str(name), choices, n=1)
        guess = f", did you mean {near[0]!r}?" if near else "."
        raise UsageError(
            f"there is no {kind} {name!r}{guess} Choose from: "
            f"{', '.join(map(str, choices))}."
        )
