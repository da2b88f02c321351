"""Annotation files as lines and rows, with errors that name the file and its official place."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mpsl_dist.errors import DataError


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


def text(path: Path, source: str, encoding: str = "utf-8-sig") -> str:
    """Read a whole text file; one that is not in ``encoding`` is read as Windows-1252.

    Here and below, ``source`` is where the file comes from, for the message of the DataError that
    is raised where it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; {source}") from error
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def lines(path: Path, source: str) -> list[str]:
    """Read lines, however they end, without surrounding blanks; empty lines stay."""
    return [line.strip() for line in io.StringIO(text(path, source), newline=None)]


def rows(path: Path, columns: Sequence[str], source: str) -> Iterator[dict[str, str]]:
    """Read these columns of a csv file whose header names them, in any case and any order."""
    csv.field_size_limit(10_000_000)
    reader = csv.DictReader(io.StringIO(text(path, source), newline=""))
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
