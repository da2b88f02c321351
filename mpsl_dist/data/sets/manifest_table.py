"""A manifest's rows, read one by one; every mistake of them is told at once, with its line.

Columns are separated by commas, semicolons, tabs or bars, whichever makes the header name columns
that are known; the text is UTF-8 or UTF-16 with its mark, and Windows-1252 where it is neither.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from mpsl_dist.data.decode.samples import Sample
from mpsl_dist.data.sets import listing
from mpsl_dist.data.sets.index import Samples
from mpsl_dist.errors import DataError

FILES = ("image", "audio", "video")
COLUMNS = (*FILES, "text", "label", "split", "client")
#: Splits that are read and not used.
UNUSED = frozenset({"val", "valid", "validation", "dev"})
#: The cell of ``audio`` that says that a clip has no sound.
SILENT = "none"
#: Mistakes listed in one message.
_LISTED = 10
_SOURCE = "name the manifest with data.root"
#: What else people call a column, so that none is passed over without a word.
_OTHER_NAMES = {
    "image": "img picture photo frame image_path image_file",
    "audio": "sound speech voice wav recording audio_path",
    "video": "clip movie mp4 video_path",
    "text": "caption sentence utterance question transcript description tweet content",
    "label": "class category target answer y class_name",
    "split": "subset partition set fold",
    "client": "user owner site speaker hospital device client_id",
}
#: What json has besides texts and numbers.
_WORDS = {True: "true", False: "false", None: ""}
#: Columns of files whose name does not say of which kind.
_ANY_FILE = frozenset({"path", "file", "filename", "file_name", "filepath", "file_path"})


@dataclass
class Rows:
    """What a manifest lists, by row.

    Attributes
    ----------
    columns : frozenset of str
        Which of :data:`COLUMNS` it has.
    samples : Samples
    label, split, client : list of str or None
        Equal texts are one object. ``split`` is in lower case.
    notes : list of str
        What is worth a word and no mistake.
    """

    samples: Samples
    columns: frozenset[str] = frozenset()
    label: list[str | None] = field(default_factory=list)
    split: list[str | None] = field(default_factory=list)
    client: list[str | None] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(path: Path) -> Rows:
    """Read a csv or jsonl file.

    Raises
    ------
    DataError
        If it cannot be parsed, has no use as a manifest, or rows are wrong: all of them at once
        (the first ten in full), before any file is looked for.
    """
    folder = str(path.parent)
    rows, lines = Rows(Samples(folder)), array("Q")
    header: dict[str, None] = {}
    wrong: list[tuple[int, str]] = []
    same: dict[str, str] = {}
    if listing.encoding(path, _SOURCE) == "cp1252":
        rows.notes.append("not UTF-8; read as Windows-1252")
    for line, row in (_jsonl if path.suffix == ".jsonl" else _csv)(path, header):
        cells = _given(row)
        lines.append(line)
        rows.samples.append(_sample(folder, cells))
        for name in ("label", "split", "client"):
            cell = cells.get(name)
            if name == "split" and cell is not None:
                cell = cell.lower()
            getattr(rows, name).append(None if cell is None else same.setdefault(cell, cell))
        wrong += [(line, what) for what in _faults_of(cells)]
    rows.columns = frozenset(header) & frozenset(COLUMNS)
    _refuse_useless(path, rows, [name for name in header if name and name not in COLUMNS])
    wrong += _lacking(rows, lines)
    if wrong:
        _refuse(path, [f"line {line}: {what}" for line, what in sorted(wrong, key=lambda w: w[0])])
    return rows


class Row(NamedTuple):
    """A row that is to be predicted.

    Attributes
    ----------
    line : int
        Where it ends in its file.
    cells : dict of str to str
        As they are written, by column, whatever the column is called.
    sample : Sample
    fault : str
        Why it is none; empty for a good row.
    """

    line: int
    cells: dict[str, str]
    sample: Sample
    fault: str


def read_unlabelled(path: Path) -> tuple[list[str], Iterator[Row]]:
    """Read a csv or jsonl file that needs no labels; a row that is wrong says so itself.

    Returns
    -------
    header : list of str
        All columns; of a jsonl file those of its first row.
    rows : iterator of Row

    Raises
    ------
    DataError
        If it cannot be parsed, has no rows, or no column names a file or a text. The iterator
        raises it where no further row can be told apart.
    """
    header: dict[str, None] = {}
    wrong: dict[int, str] = {}
    found = (_jsonl if path.suffix == ".jsonl" else _csv)(path, header, wrong)
    first = next(found, None)
    if first is None:
        raise DataError(f"{path}: no rows")
    if not header.keys() & {*FILES, "text"}:
        named, there = ", ".join((*FILES, "text")), ", ".join(map(repr, header))
        raise DataError(f"{path}: none of the columns {named}; there: {there}")

    def rows() -> Iterator[Row]:
        folder = str(path.parent)
        for line, written in itertools.chain([first], found):
            cells = _given(written)
            faults = [wrong.pop(line)] if line in wrong else list(_faults_of(cells))
            yield Row(line, dict(written), _sample(folder, cells), "; ".join(faults))

    return list(header), rows()


def _refuse(path: Path, wrong: Sequence[str]) -> NoReturn:
    more = [f"… and {len(wrong) - _LISTED} more"] if len(wrong) > _LISTED else []
    raise DataError("\n".join(f"{path}: {what}" for what in [*wrong[:_LISTED], *more]))


def _sample(folder: str, cells: Mapping[str, str]) -> Sample:
    silent = cells.get("audio", "").lower() == SILENT
    named = [name for name in FILES if name in cells and not (name == "audio" and silent)]
    paths = {name: listing.below(folder, cells[name]) for name in named}
    return Sample(**paths, text=cells.get("text"), silent=silent)


def _faults_of(cells: Mapping[str, str]) -> Iterator[str]:
    silent = cells.get("audio", "").lower() == SILENT
    if not cells.keys() & {*FILES, "text"} - ({"audio"} if silent else set()):
        yield f"neither {', '.join(FILES)} nor text"
    split = cells.get("split")
    if split is not None and split.lower() not in {"train", "test", *UNUSED}:
        yield f"split '{split.lower()}' is neither train nor test (nor val)"
    for name in FILES:
        if "://" in cells.get(name, ""):
            yield f"{name}: '{cells[name]}' is no file but an address"


def _lacking(rows: Rows, lines: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Yield the cells that must not be empty, as other rows have them."""
    owners = zip(lines, rows.label, rows.split, rows.client, strict=True)
    for line, label, split, client in owners:
        if "label" in rows.columns and label is None:
            yield line, "no label"
        if "split" in rows.columns and split is None:
            yield line, "split '' is neither train nor test (nor val)"
        if "client" in rows.columns and client is None and split != "test":
            yield line, "no client"


def _refuse_useless(path: Path, rows: Rows, unknown: Sequence[str]) -> None:
    """Refuse a table that cannot be a manifest; note columns that are not used."""
    wrong, parts = [], {*FILES, "text"}
    for name in unknown:
        meant = _meant(name, rows.columns)
        hint = f"; did you mean {' or '.join(map(repr, meant))}?" if meant else ""
        # Data often names its speakers and folds; what the model sees or learns is seldom spare.
        if meant and not any(name in _OTHER_NAMES[ours].split() for ours in ("split", "client")):
            wrong.append(f"unknown column '{name}'{hint} Call it so, or leave it out")
        else:
            rows.notes.append(f"the column '{name}' is not used{hint}")
    if not len(rows.samples):
        wrong.append("no rows")
    if not rows.columns & parts:
        wrong.append(f"none of the columns {', '.join((*FILES, 'text'))}")
    elif "label" not in rows.columns and not ("text" in rows.columns and rows.columns & set(FILES)):
        wrong.append("without a label column (retrieval) it needs text and image, audio or video")
    if wrong:
        _refuse(path, wrong)


def _meant(name: str, known: frozenset[str]) -> list[str]:
    """Return the columns of ours, of those that are not there, that a name may stand for."""
    if name in _ANY_FILE:
        return [] if known & set(FILES) else [*FILES]
    absent = [ours for ours in COLUMNS if ours not in known]
    called = [ours for ours in absent if name in _OTHER_NAMES[ours].split()]
    return called or difflib.get_close_matches(name, absent, n=1, cutoff=0.75)


def _header(path: Path, names: Sequence[str], header: dict[str, None]) -> list[str]:
    """Return the columns' names as they are compared, and add them to ``header``."""
    plain = [name.strip().lower() for name in names]
    twice = sorted({name for name in plain if name and plain.count(name) > 1})
    if twice:
        raise DataError(f"{path}: two columns are called '{twice[0]}'; keep one")
    header.update(dict.fromkeys(plain))
    return plain


def _csv(
    path: Path, header: dict[str, None], wrong: dict[int, str] | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield every row and its line; what is wrong with a single one is kept if it may be."""
    csv.field_size_limit(10_000_000)
    with listing.opened(path, _SOURCE) as file:
        # A title's line ends where a quote may not: csv itself tells where the header ends.
        first = list(itertools.islice(file, 1))
        delimiter = _delimiter(first)
        reader = csv.reader(itertools.chain(first, file), delimiter=delimiter)
        try:
            names = _header(path, next(reader, []), header)
            for row in reader:
                if len(row) > len(names):
                    what = (
                        "more cells than the header has; put quotes around texts that hold "
                        f"{delimiter!r}"
                    )
                    if wrong is None:
                        raise DataError(f"{path}: line {reader.line_num}: {what}")
                    wrong[reader.line_num] = what
                if row:
                    yield reader.line_num, dict(zip(names, row, strict=False))
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.line_num}: {error}") from error


def _delimiter(first: Sequence[str]) -> str:
    """Return what separates the header's names: with it, most of them are known."""

    def known(delimiter: str) -> int:
        names = next(csv.reader(first, delimiter=delimiter), [])
        return sum(name.strip().lower() in COLUMNS for name in names)

    return max(",;\t|", key=known)


def _jsonl(
    path: Path, header: dict[str, None], wrong: dict[int, str] | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    with listing.opened(path, _SOURCE, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, _object(path, line, header)
            except DataError:
                raise
            except ValueError as error:
                if wrong is None:
                    raise DataError(f"{path}: line {number}: {error}") from error
                wrong[number] = str(error)
                yield number, {}


def _object(path: Path, line: str, header: dict[str, None]) -> dict[str, str]:
    """Return the columns of a line, all but those that are not ours and hold no single text."""

    def cells_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = _header(path, [name for name, _ in pairs], {})
        return dict(zip(names, (value for _, value in pairs), strict=True))

    # Numbers stay as they are written: 1.0 is not 1.
    written = {"parse_int": str, "parse_float": str, "parse_constant": str}
    try:
        cells = json.loads(line, object_pairs_hook=cells_of, **written)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid json: {error}") from error
    if not isinstance(cells, dict):
        raise ValueError("expected an object of columns")
    header.update(dict.fromkeys(cells))
    nested = [name for name, value in cells.items() if isinstance(value, list | dict)]
    for name in nested:
        if name in COLUMNS:
            raise ValueError(f"{name}: expected a single text")
        del cells[name]
    return {name: _WORDS.get(value, value) for name, value in cells.items()}


def _given(cells: Mapping[str, str]) -> dict[str, str]:
    """Return the cells that are ours and not empty; a label is taken as it is written."""
    return {
        name: value if name == "label" else value.strip()
        for name, value in cells.items()
        if name in COLUMNS and value.strip()
    }
