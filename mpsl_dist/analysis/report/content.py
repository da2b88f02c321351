"""What a report is made of, before it is HTML or markdown: sections of tables, pictures and words.

Everything here is plain text; whoever renders it escapes it.
"""

from __future__ import annotations

import base64
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Cell:
    """A cell of a table, or a figure in a sentence.

    Attributes
    ----------
    text : str
        As people read it.
    value : float or None
        The figure itself, unrounded, where the text is one: a fraction, bytes, seconds.
    below : str
        A second line, smaller: the paper's figure under ours.
    best : bool
        Whether it is set off from the others.
    """

    text: str
    value: float | None = None
    below: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes
    ----------
    caption : str
    head : sequence of str
    rows : sequence of sequence of Cell
    remark : str
        Shown beneath.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    remark: str = ""

    def of_numbers(self, column: int) -> bool:
        """Return whether a column is made of figures."""
        return any(row[column].value is not None for row in self.rows)


@dataclass(frozen=True)
class Picture:
    """A drawing.

    Attributes
    ----------
    name : str
        Of the file beside the markdown page, without ending.
    caption : str
    alt : str
        What it shows, in words, with the figures that matter.
    svg : str
    """

    name: str
    caption: str
    alt: str
    svg: str

    @property
    def data(self) -> str:
        """The drawing as an address that needs no file."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode()).decode()}"


@dataclass(frozen=True)
class Words:
    """A paragraph; ``marked`` ones are warnings."""

    text: str
    marked: bool = False


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Fold:
    """Files' text that opens when asked for.

    Attributes
    ----------
    title : str
    parts : sequence of (str, str)
        What it is, and the text as it stands.
    """

    title: str
    parts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """A heading and what stands beneath it."""

    key: str
    title: str
    parts: list[Table | Picture | Words | Points | Fold] = field(default_factory=list)


def percent(value: float, spread: float | None = None, sign: str = " %") -> str:
    """Return a fraction in per cent, with its standard deviation where there is one."""
    return f"{100 * value:.1f}{'' if spread is None else f' ± {100 * spread:.1f}'}{sign}"


def share(value: float) -> Cell:
    """Return a cell of a fraction."""
    return Cell(percent(value), value)


def count(value: float) -> Cell:
    """Return a cell of a whole number."""
    return Cell(f"{value:,.0f}", value)


def mib(value: float) -> Cell:
    """Return a cell of bytes, in MiB."""
    return Cell(f"{value / 2**20:,.3f}", value)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and the standard deviation where there are several."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def number(how_many: int, of: str) -> str:
    """Return "1 run" or "3 runs"."""
    return f"{how_many:,} {of}{'' if how_many == 1 else 's'}"


def key_of(text: str) -> str:
    """Return a name for a file or an anchor: letters, digits and lines between."""
    return "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in text).split())


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Yield the items, at most so many at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
