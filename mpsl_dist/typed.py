"""Frozen dataclasses from nested mappings, with every problem named at once."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal


def build(cls: type, values: Mapping[str, Any], prefix: str, errors: list[str]) -> Any:
    """Build a dataclass from a mapping; fields that it does not name keep their defaults.

    Parameters
    ----------
    cls : type
        A dataclass whose fields are dataclasses, numbers, texts, truth values, lists, mappings,
        Literals, or unions of these.
    prefix : str
        Stands before every key in a message, as ``"training."``.
    errors : list of str
        Receives a line for every unknown key (naming the nearest valid one), every value of a
        wrong type, every missing field without a default, and a ValueError of the dataclass.

    Returns
    -------
    object or None
        The dataclass, fields of wrong types at their defaults; None if it cannot be made.

    Raises
    ------
    TypeError
        If a field has a type that is none of these.
    """
    hints = typing.get_type_hints(cls)
    names = [entry.name for entry in dataclasses.fields(cls)]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{_spoken(key)}"
        if key not in names:
            near = difflib.get_close_matches(str(key)[:80], names, n=1, cutoff=0.5)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"valid: {', '.join(names)}"
            errors.append(f"{path}: unknown key; {hint}")
            continue
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if isinstance(value, Mapping):
                section = build(hint, value, f"{path}.", errors)
                arguments |= {} if section is None else {key: section}
            else:
                errors.append(f"{path}: expected keys and values, found {_short(value)}")
        else:
            try:
                arguments[key] = _convert(hint, value)
            except ValueError:
                errors.append(f"{path}: expected {describe(hint)}, found {_short(value)}")
    missing = [name for name in _required(cls) if name not in arguments]
    errors += [f"{prefix}{name}: missing" for name in missing if name not in values]
    if missing:
        return None
    try:
        return cls(**arguments)
    except ValueError as error:
        errors.append(f"{prefix.rstrip('.')}: {error}")
        return None


def _required(cls: type) -> list[str]:
    nothing = dataclasses.MISSING
    return [
        entry.name
        for entry in dataclasses.fields(cls)
        if entry.default is nothing and entry.default_factory is nothing
    ]


def _spoken(key: Any) -> str:
    """Return a key as a message can show it: one line, without a terminal's control codes."""
    text = str(key)
    return text if text.isprintable() and len(text) <= 80 else _short(key)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _convert(hint: Any, value: Any) -> Any:
    """Return ``value`` as ``hint`` asks, or raise ValueError."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            try:
                return _convert(option, value)
            except ValueError:
                continue
        raise ValueError
    if origin is list:
        if not isinstance(value, list):
            raise ValueError
        return [_convert(typing.get_args(hint)[0], entry) for entry in value]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError
        return dict(value)
    if origin is Literal:
        if value in typing.get_args(hint) and not isinstance(value, bool):
            return value
        raise ValueError
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except OverflowError as error:  # a whole number of more than 308 digits
            raise ValueError from error
    if hint is type(None):
        hint = types.NoneType
    if hint not in (int, float, str, bool, types.NoneType):
        raise TypeError(f"a value cannot be of the type {hint}")
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ValueError


def describe(hint: Any) -> str:
    """Return what a field's type asks for, in words: ``a whole number or null``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"a list of {describe(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        return "keys and values"
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(option) for option in typing.get_args(hint))
    if hint is types.NoneType:
        return "null"
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[hint]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings, or a dataclass of such, as ``key.path`` -> value."""
    values = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    flat: dict[str, Any] = {}
    for key, entry in values.items():
        if isinstance(entry, Mapping):
            flat |= flatten(entry, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = entry
    return flat


def values_of(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every single value under ``path`` with its key, those in lists and mappings too."""
    inner: Iterator[tuple[Any, Any]]
    if dataclasses.is_dataclass(node):
        inner = ((entry.name, getattr(node, entry.name)) for entry in dataclasses.fields(node))
    elif isinstance(node, Mapping):
        inner = iter(node.items())
    elif isinstance(node, list | tuple):
        inner = iter(enumerate(node))
    else:
        yield path, node
        return
    for name, value in inner:
        yield from values_of(value, f"{path}.{name}" if path else str(name))


def not_finite(node: Any, path: str = "") -> list[str]:
    """Return a line for every NaN and infinity under ``path``."""
    return [
        f"{key}: must be a finite number, found {value}"
        for key, value in values_of(node, path)
        if isinstance(value, float) and not math.isfinite(value)
    ]
