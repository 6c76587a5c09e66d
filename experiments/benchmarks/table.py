"""A table: what is printed, and the records behind it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

NOTHING = "–"  # a cell that was not measured


class Table(NamedTuple):
    """Some measurements.

    Attributes:
      title: what they are.
      columns: headings.
      rows: text of the cells.
      note: what a reader must know.
      raw: all numbers behind it, as JSON takes them.
    """

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    note: str
    raw: Any

    def markdown(self) -> str:
        """The table as a Markdown section."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"### {self.title}\n\n{table}\n\n{self.note}\n"


def mib(size: int) -> str:
    """Bytes in MiB, to about three digits."""
    value = size / 2**20
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
