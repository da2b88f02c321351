"""Annotation files as lines and rows, with errors that name the file and its official place."""

from __future__ import annotations

import codecs
import csv
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mpsl_dist.errors import DataError

#: Bytes of a file that are looked at together.
_PIECE = 1 << 16
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def folder(root: str | Path | None, name: str, below: str, source: str) -> Path:
    """Return the folder ``below`` under ``data.root``, as an absolute path.

    Parameters
    ----------
    root : str, Path or None
        ``data.root`` of the configuration.
    name : str
        The dataset, for the message.
    source : str
        Where its files come from, for the message.

    Raises
    ------
    DataError
        If ``root`` is None, or there is no such folder.
    """
    if root is None:
        raise DataError(f"data.root: {name} needs the folder that holds {below}/")
    path = Path(root).absolute() / below
    if not path.is_dir():
        raise DataError(f"{path}: no such folder, {name} is read from it; {source}")
    return path


def below(folder: str, path: str) -> str:
    """Return ``str(Path(folder) / path)``; pathlib would keep every name that it meets."""
    if "./" in path or "//" in path or path.endswith(("/", ".")):
        return str(Path(folder) / path)
    return os.path.join(folder, path)


def encoding(path: Path, source: str) -> str:
    """Return the encoding of a text file: UTF-8, UTF-16 with its mark, or else Windows-1252.

    Here and below, ``source`` is where the file comes from, for the message of the DataError that
    is raised where it cannot be read.

    Raises
    ------
    DataError
        If it is UTF-16 without its mark, or no text at all.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            if file.read(2) in _UTF16:
                return "utf-16"
            file.seek(0)
            while piece := file.read(_PIECE):
                if b"\0" in piece:
                    raise DataError(
                        f"{path}: holds zero bytes: no text, or UTF-16 without its mark; "
                        "save it as UTF-8"
                    )
                decoder.decode(piece)
            decoder.decode(b"", final=True)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; {source}") from error
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8-sig"


@contextmanager
def opened(path: Path, source: str, newline: str | None = "") -> Iterator[TextIO]:
    """Open a text file to be read piece by piece.

    Line ends stay as they are, or are all made the same where ``newline`` is None.
    """
    errors = "replace" if (kind := encoding(path, source)) == "cp1252" else "strict"
    try:
        with path.open(encoding=kind, errors=errors, newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid {kind}: {error.reason}; save it as UTF-8") from error


def text(path: Path, source: str) -> str:
    """Read a whole text file."""
    with opened(path, source) as file:
        return file.read()


def lines(path: Path, source: str) -> list[str]:
    """Read lines, however they end, without surrounding blanks; empty lines stay."""
    with opened(path, source, newline=None) as file:
        return [line.strip() for line in file]


def rows(
    path: Path, columns: Sequence[str], source: str, delimiter: str = ","
) -> Iterator[dict[str, str]]:
    """Read these columns of a csv file whose header names them, in any case and any order."""
    csv.field_size_limit(10_000_000)
    with opened(path, source) as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        header = [(name or "").strip() for name in reader.fieldnames or ()]
        known = {name.lower(): name for name in header}
        missing = [column for column in columns if column.lower() not in known]
        if missing:
            raise DataError(f"{path}: no column {', '.join(missing)}; there: {', '.join(header)}")
        reader.fieldnames = header
        try:
            for row in reader:
                yield {column: row[known[column.lower()]] or "" for column in columns}
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.line_num}: {error}") from error


def parsed_json(path: Path, source: str) -> Any:
    """Read a json file."""
    try:
        return json.loads(text(path, source))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid json: {error}") from error
