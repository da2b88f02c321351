"""Reading text files that the project wrote, or that a user wrote for it.

Every reader raises an error that names the file, what is wrong with it and what to do, whether the
file is missing, not UTF-8, not the format that its name says, or of another structure.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mpsl_dist.errors import RunError, UserError


def read_text(path: str | Path, error: type[UserError] = RunError, advice: str = "") -> str:
    """Return the content of a UTF-8 file.

    Parameters
    ----------
    path : str or Path
    error : type
        The error to raise.
    advice : str
        What the user can do about a file that cannot be read; ends the error's message.

    Raises
    ------
    UserError
        The given ``error``, if the file cannot be read.
    """
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as problem:
        raise _refuse(path, problem.strerror or str(problem), error, advice) from problem
    except UnicodeDecodeError as problem:
        raise _refuse(path, f"not UTF-8 at byte {problem.start}", error, advice) from problem


def read_json(
    path: str | Path, error: type[UserError] = RunError, advice: str = ""
) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    The parameters are those of :func:`read_text`.

    Raises
    ------
    UserError
        The given ``error``, if the file cannot be read or holds anything else.
    """
    text = read_text(path, error, advice)
    try:
        return _json_object(text)
    except ValueError as problem:
        raise _refuse(path, str(problem), error, advice) from problem


def read_yaml(
    path: str | Path, error: type[UserError] = RunError, advice: str = ""
) -> dict[str, Any]:
    """Return the keys and values that a YAML file holds; none for an empty file.

    The parameters are those of :func:`read_text`.

    Raises
    ------
    UserError
        The given ``error``, if the file cannot be read or holds anything else.
    """
    text = read_text(path, error, advice)
    try:
        values = parse_yaml(text)
    except ValueError as problem:
        raise _refuse(path, f"not valid YAML: {problem}", error, advice) from problem
    if values is None:
        return {}
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise _refuse(path, f"expected keys and values, found {kind}", error, advice)
    return values


def read_json_lines(
    path: str | Path, error: type[UserError] = RunError, advice: str = ""
) -> tuple[list[dict[str, Any]], bool]:
    """Return the JSON objects of a file that has one on each line.

    A process that dies while it adds a line leaves a part of it. Such a last line is left out.

    The parameters are those of :func:`read_text`.

    Returns
    -------
    lines : list of dict
    torn : bool
        Whether the last line was left out.

    Raises
    ------
    UserError
        The given ``error``, naming the line, if any line but the last is damaged.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as problem:
        raise _refuse(path, problem.strerror or str(problem), error, advice) from problem
    raw = content.rstrip(b"\n").split(b"\n") if content.strip() else []
    lines = []
    for number, line in enumerate(raw, start=1):
        try:
            lines.append(_json_object(line.decode("utf-8")))
        except ValueError as problem:
            if number == len(raw):
                return lines, True
            raise _refuse(path, f"line {number}: {problem}", error, advice) from problem
    return lines, False


def parse_yaml(text: str) -> Any:
    """Return the value that a YAML text stands for.

    Raises
    ------
    ValueError
        With one line that says where and why it stands for none.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        reason = getattr(problem, "problem", None) or str(problem).splitlines()[0]
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{reason}{where}") from problem
    except RecursionError as problem:
        raise ValueError("nested too deeply") from problem


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as problem:
        column = f"column {problem.colno}"
        where = f"line {problem.lineno}, {column}" if "\n" in text else column
        raise ValueError(f"not valid JSON: {problem.msg} ({where})") from problem
    except RecursionError as problem:
        raise ValueError("not valid JSON: nested too deeply") from problem
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _refuse(path: str | Path, reason: str, error: type[UserError], advice: str) -> UserError:
    return error(f"{path}: {reason}; {advice}" if advice else f"{path}: {reason}")
