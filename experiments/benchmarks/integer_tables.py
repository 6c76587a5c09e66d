"""The command line of the benchmarks of integer programs, which print tables."""

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from absl import app, flags, logging

# lines(name, directory, smoke) gives the lines of one part of a table.
Lines = Callable[[str, pathlib.Path, bool], Iterable[str]]


def start(main: Callable[[Sequence[str]], None]) -> None:
    """Defines the flags ``--out`` and ``--smoke``, and runs a program with them.

    A program calls it where it is run, so that another one may import both beside a
    third with such flags.
    """
    flags.DEFINE_string("out", None, "Directory for data and runs.", required=True)
    flags.DEFINE_bool("smoke", False, "Tiny settings, which show no result.")
    app.run(main)


def check(argv: Sequence[str]) -> None:
    """Raises if arguments are left over; quietens what tells of every snapshot."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # orbax


def print_parts(
    parts: Mapping[str, object], columns: Sequence[str], lines: Lines
) -> None:
    """Runs a program that prints a table, part by part; ``--only`` takes some of them.

    Args:
      parts: by their names; each has a folder of its own.
      columns: of the table.
      lines: gives the lines of a part.
    """

    def main(argv: Sequence[str]) -> None:
        check(argv)
        given = flags.FLAGS
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
        for name in given.only:
            for line in lines(name, pathlib.Path(given.out) / name, given.smoke):
                print(line, flush=True)

    flags.DEFINE_list("only", list(parts), "Which parts of the table.")
    start(main)
