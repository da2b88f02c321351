"""An experiment from its file: defaults <- YAML <- ``key.path=value``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mpsl_dist.config.checks import problems
from mpsl_dist.config.schema import Experiment
from mpsl_dist.errors import ConfigError
from mpsl_dist.typed import build


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
    experiment = build(Experiment, values, "", errors)
    errors += problems(experiment)
    if errors:
        raise ConfigError("\n".join(f"{path}: {error}" for error in errors))
    return experiment


def from_dict(values: Mapping[str, Any]) -> Experiment:
    """Build an experiment from nested mappings, as :func:`load` does from a file."""
    errors: list[str] = []
    experiment = build(Experiment, values, "", errors)
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
