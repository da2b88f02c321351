"""The samples of a split in little memory: every process of a run keeps the whole index.

A sample as Python objects takes about half a kilobyte; here it takes the bytes of its texts and of
its paths below the dataset's folder, and eight or nine more for each column.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from operator import index
from pathlib import Path
from typing import overload

from mpsl_dist.data.decode.samples import Sample

#: Bytes that no UTF-8 text begins with: a row without a text, and one below the folder.
_NOTHING, _BELOW = 0xFF, 0xFE


class Texts(Sequence["str | None"]):
    """Texts, or None, by row: all in one buffer of UTF-8.

    Parameters
    ----------
    prefix : str
        What most of the texts begin with; it is kept once.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._bytes = bytearray()
        self._ends = array("Q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> str | None:
        start, end = self._ends[row], self._ends[row + 1]
        if start == end:
            return ""
        first = self._bytes[start]
        if first == _NOTHING:
            return None
        if first == _BELOW:
            return self._prefix + self._text(start + 1, end)
        return self._text(start, end)

    def _text(self, start: int, end: int) -> str:
        # Names of files may hold bytes that are no text, which Python keeps as surrogates.
        return self._bytes[start:end].decode("utf-8", "surrogatepass")

    def append(self, text: str | None) -> None:
        """Add a row."""
        if text is None:
            self._bytes.append(_NOTHING)
        else:
            if self._prefix and text.startswith(self._prefix):
                self._bytes.append(_BELOW)
                text = text[len(self._prefix) :]
            self._bytes += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))

    def take(self, rows: Iterable[int]) -> Texts:
        """Return some of the rows, in this order."""
        taken = Texts(self._prefix)
        for row in rows:
            taken._bytes += self._bytes[self._ends[row] : self._ends[row + 1]]
            taken._ends.append(len(taken._bytes))
        return taken


class Samples(Sequence[Sample]):
    """Samples by row, a column for each of their parts that any of them has.

    Parameters
    ----------
    folder : str or Path
        Where most of the files lie; their paths are kept below it.
    """

    def __init__(self, folder: str | Path) -> None:
        self._prefix = f"{str(folder).rstrip('/')}/"
        self._columns: dict[str, Texts] = {}
        self._silent = bytearray()

    @classmethod
    def of(cls, samples: Iterable[Sample], folder: str | Path) -> Samples:
        """Keep samples as they come."""
        kept = cls(folder)
        for sample in samples:
            kept.append(sample)
        return kept

    def __len__(self) -> int:
        return len(self._silent)

    @overload
    def __getitem__(self, row: int) -> Sample: ...
    @overload
    def __getitem__(self, row: slice) -> list[Sample]: ...
    def __getitem__(self, row: int | slice) -> Sample | list[Sample]:
        if isinstance(row, slice):
            return [self[position] for position in range(*row.indices(len(self)))]
        row = index(row)
        row += len(self) if row < 0 else 0
        if not 0 <= row < len(self):
            raise IndexError(row)
        parts = {name: column[row] for name, column in self._columns.items()}
        return Sample(**parts, silent=bool(self._silent[row]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Samples) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def append(self, sample: Sample) -> None:
        """Add a row."""
        for name in ("image", "audio", "video", "text"):
            part = getattr(sample, name)
            if part is not None and name not in self._columns:
                self._columns[name] = Texts("" if name == "text" else self._prefix)
                for _ in range(len(self)):
                    self._columns[name].append(None)
            if name in self._columns:
                self._columns[name].append(part)
        self._silent.append(sample.silent)

    def take(self, rows: Sequence[int]) -> Samples:
        """Return some of the rows, in this order."""
        taken = Samples(self._prefix)
        taken._columns = {name: column.take(rows) for name, column in self._columns.items()}
        taken._silent = bytearray(self._silent[row] for row in rows)
        return taken

    def column(self, name: str) -> Iterator[str | None]:
        """Yield one part of every sample: its ``image``, ``audio``, ``video`` or ``text``."""
        yield from self._columns.get(name, (None for _ in range(len(self))))
