"""Reading text files that the project wrote, or that a user wrote for it.

Every reader raises an error that names the file, what is wrong with it and what to do, whether the
file is missing, not UTF-8, not the format that its name says, or of another structure.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

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
    """Return the value that a YAML text stands for: no part of it is another's alias.

    Raises
    ------
    ValueError
        With one line that says where and why it stands for none: no YAML, a key twice, a value of
        no plain type, or more than the limits of :data:`_LONGEST` and :data:`_MOST_VALUES`.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"longer than {_LONGEST} characters")
    try:
        return _plain(_checked(text))
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        reason = getattr(problem, "problem", None) or str(problem).splitlines()[0]
        raise ValueError(f"{reason}{_where(mark)}") from problem
    except RecursionError as problem:
        raise ValueError("nested too deeply") from problem
    except (ArithmeticError, AttributeError, LookupError, TypeError) as problem:
        # PyYAML's own, on a tag whose text is none of its type: !!bool maybe
        raise ValueError(f"a value that does not fit its tag: {problem}") from problem


#: Characters of a text, and values in it when every alias is written out: a few lines of aliases
#: of aliases can stand for more than any memory holds.
_LONGEST = 1_000_000
_MOST_VALUES = 100_000
#: Bits of a whole number; Python refuses to print much longer ones.
_MOST_BITS = 1024


def _checked(text: str) -> Any:
    """Build a text's value once its nodes have been found to be harmless."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, ())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node, counted: dict[int, int], above: tuple[int, ...]) -> int:
    """Return how many values a node stands for; refuse keys given twice, and too much.

    Parameters
    ----------
    counted : dict of int to int
        Nodes met before, by identity: an alias is the node that it names.
    above : tuple of int
        The nodes that this one is part of.
    """
    if id(node) in above:
        raise ComposerError(None, None, "an alias of what it is part of", node.start_mark)
    if id(node) in counted:
        return counted[id(node)]
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _refuse_twice(node)
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    total = 1 + sum(_count(child, counted, (*above, id(node))) for child in children)
    if total > _MOST_VALUES:
        raise ComposerError(None, None, f"more than {_MOST_VALUES} values", node.start_mark)
    counted[id(node)] = total
    return total


def _refuse_twice(node: yaml.MappingNode) -> None:
    """Refuse a key that a mapping gives twice, of which YAML would forget the first."""
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise ComposerError(None, None, f"'{key.value:.60}' stands twice", key.start_mark)
            seen.add(key.value)


def _plain(value: Any, path: str = "") -> Any:
    """Return a copy made of mappings, lists, texts, numbers, truth values and null alone."""
    at = f"{path}: " if path else ""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str | int | float | bool):
                raise ValueError(f"{at}a key must be a text, found {type(key).__name__}")
            _plain(key, f"{at}a key")
        inner = f"{path}." if path else ""
        return {key: _plain(entry, f"{inner}{key}") for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry, f"{path}[{place}]") for place, entry in enumerate(value)]
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ValueError(f"{at}a whole number of more than {_MOST_BITS} bits")
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{at}no file can hold a null character or half a character")
    elif value is not None and not isinstance(value, int | float):
        kind = type(value).__name__
        raise ValueError(f"{at}a {kind} is no value here; quote it if a text is meant")
    return value


def _where(mark: Any) -> str:
    return f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""


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
