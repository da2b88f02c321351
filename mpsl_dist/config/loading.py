"""An experiment from its file: defaults <- YAML <- ``key.path=value``."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from mpsl_dist.config.checks import problems
from mpsl_dist.config.schema import Experiment


class ConfigError(ValueError):
    """Every problem of a configuration at once, one a line."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment: defaults < YAML < ``key.path=value``.

    Parameters
    ----------
    path : str or Path
        A YAML file whose keys are the fields of :class:`Experiment`.
    overrides : sequence of str
        ``key.path=value`` with the value in YAML.

    Raises
    ------
    ConfigError
        With every problem at once: unknown keys (the nearest valid one named), wrong types and
        values out of range.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    errors: list[str] = []
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(values).__name__}")
    for override in overrides:
        _override(values, override, errors)
    experiment = _build(Experiment, values, "", errors)
    errors += problems(experiment)
    if errors:
        raise ConfigError("\n".join(f"{path}: {error}" for error in errors))
    return experiment


def from_dict(values: Mapping[str, Any]) -> Experiment:
    """Build an experiment from nested mappings, as :func:`load` does from a file."""
    errors: list[str] = []
    experiment = _build(Experiment, values, "", errors)
    errors += problems(experiment)
    if errors:
        raise ConfigError("\n".join(errors))
    return experiment


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """Give the resolved experiment as nested plain mappings."""
    return dataclasses.asdict(experiment)


def _override(values: dict[str, Any], override: str, errors: list[str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        errors.append(f"'{override}': an override is key.path=value")
        return
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if not isinstance(child, dict):
            child = node[parent] = {}
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        errors.append(f"{key}: '{text}' is not a YAML value")


def _build(cls: type, values: Mapping[str, Any], prefix: str, errors: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    names = [entry.name for entry in dataclasses.fields(cls)]
    arguments = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"valid: {', '.join(names)}"
            errors.append(f"{path}: unknown key; {hint}")
            continue
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if isinstance(value, Mapping):
                arguments[key] = _build(hint, value, f"{path}.", errors)
            else:
                errors.append(f"{path}: expected keys and values, found {value!r}")
        else:
            try:
                arguments[key] = _convert(hint, value)
            except ValueError:
                errors.append(f"{path}: expected {_describe(hint)}, found {value!r}")
    return cls(**arguments)


def _convert(hint: Any, value: Any) -> Any:
    """Give ``value`` as ``hint`` asks, or raise ValueError."""
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
    if origin is Literal:
        if value in typing.get_args(hint) and not isinstance(value, bool):
            return value
        raise ValueError
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)  # YAML reads 1e-4 as a string
    if hint is type(None):
        hint = types.NoneType
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ValueError


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(option) for option in typing.get_args(hint))
    if hint is types.NoneType:
        return "null"
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[hint]
