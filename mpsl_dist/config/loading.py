"""An experiment from its file: defaults <- YAML <- ``key.path=value``."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpsl_dist.config import shipped
from mpsl_dist.config.checks import problems
from mpsl_dist.config.schema import Experiment
from mpsl_dist.errors import ConfigError
from mpsl_dist.reading import parse_yaml, read_yaml
from mpsl_dist.typed import build

#: Keys that may differ when a trained model is used: they say where data lies, and how to compute.
KEYS_OF_USE = (
    "data.cache",
    "data.on_error",
    "data.loaders",
    "data.root",
    "device",
    "training.test_batch_size",
)
#: Keys that are each host's own matter where data stay with their owners (``data.place=own``).
HOST_KEYS = (
    "data.cache",
    "data.loaders",
    "data.root",
    "defences.secret",
    "device",
    "output",
    "runtime.interface",
    "runtime.server_threads",
    "runtime.worker_threads",
    "weights.root",
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment: defaults < YAML < ``key.path=value``.

    Parameters
    ----------
    path : str or Path
        A YAML file whose keys are the fields of :class:`Experiment`, or the name of a shipped one.
    overrides : sequence of str
        ``key.path=value`` with the value in YAML.

    Raises
    ------
    ConfigError
        With every problem at once: unknown keys (the nearest valid one named), wrong types and
        values out of range.
    """
    path = shipped.path_of(path)
    values = read_yaml(path, ConfigError)
    if not values:
        raise ConfigError(f"{path}: empty; an experiment says at least what is not a default")
    errors: list[str] = []
    for word in overrides:
        _set(values, word, errors)
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
    """Return the resolved experiment as nested plain mappings."""
    return dataclasses.asdict(experiment)


def override(
    values: Mapping[str, Any], words: Sequence[str], allowed: Collection[str] = KEYS_OF_USE
) -> dict[str, Any]:
    """Return a trained model's experiment with some keys changed for its use.

    Parameters
    ----------
    values : mapping
        What :func:`to_dict` returned when the model was trained; stays as it is.
    words : sequence of str
        ``key.path=value`` with the value in YAML.
    allowed : collection of str
        The keys that may change.

    Raises
    ------
    ConfigError
        Naming every word whose key is none of these, with what the model was trained with.
    """
    changed, errors = copy.deepcopy(dict(values)), []
    for word in words:
        key, equals, _ = word.partition("=")
        if equals and key and key not in allowed:
            trained = _trained_with(values, key)
            errors.append(f"{key}: {trained}; only {', '.join(allowed)} may change now")
        else:
            _set(changed, word, errors)
    if errors:
        raise ConfigError("\n".join(errors))
    return changed


def at_home(shared: Experiment, own: Experiment) -> Experiment:
    """Return the experiment that all hosts share, with :data:`HOST_KEYS` as this host has them."""
    values, mine = to_dict(shared), to_dict(own)
    for key in HOST_KEYS:
        *parents, last = key.split(".")
        into, source = values, mine
        for parent in parents:
            into, source = into[parent], source[parent]
        into[last] = source[last]
    return from_dict(values)


def _trained_with(values: Mapping[str, Any], key: str) -> str:
    node: Any = values
    for name in key.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return "unknown key"
        node = node[name]
    if isinstance(node, Mapping):
        return "not a key but a section of keys"
    return f"the model was trained with {'null' if node is None else node}"


def _set(values: dict[str, Any], word: str, errors: list[str]) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        errors.append(f"'{word}': an override is key.path=value")
        return
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if not isinstance(child, dict):
            child = node[parent] = {}
        node = child
    try:
        node[last] = parse_yaml(text)
    except ValueError as problem:
        errors.append(f"{key}: '{text}' is not a YAML value: {problem}")
