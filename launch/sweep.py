"""What a file given to ``submit.py`` asks for: one run, or a grid of them.

A sweep is a YAML file with a ``grid``::

    config: ../quickstart.yaml        # the experiment that all runs share, relative to this file;
                                      # or a shipped one's name: quickstart
    name: alpha                       # the runs are called alpha-alpha0.1-seed1, ...; default: stem
    set: {clients: 8}                 # keys that all runs share, as nested mappings or key.path
    grid:                             # every combination of these values is a run
      data.partition.alpha: [0.1, 1000]
      seed: [1, 2]
    rows:                             # settings that go together; each row crosses the grid
      central: {method: centralized}  # (optional; runs are then called alpha-central-seed1, ...)
      synced: {tokenizer_sync: {mode: gradients, every: 5}}
    at_once: 2                        # at most so many jobs at a time; default: no limit
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpsl_dist import config
from mpsl_dist.config import Experiment, shipped
from mpsl_dist.config.methods import processes_of
from mpsl_dist.errors import ConfigError
from mpsl_dist.reading import read_yaml
from mpsl_dist.records.run_directory import RunDirectory, differing_keys
from mpsl_dist.typed import flatten

SWEEP_KEYS = ("config", "name", "set", "grid", "rows", "at_once")


@dataclass(frozen=True)
class PlannedRun:
    """One experiment to train.

    Attributes
    ----------
    config : Path
        The YAML file.
    overrides : tuple of str
        ``key.path=value``.
    experiment : Experiment
        What the two resolve to.
    """

    config: Path
    overrides: tuple[str, ...]
    experiment: Experiment

    @property
    def settings(self) -> tuple[str, ...]:
        """All of the experiment as overrides: the file may change before a queued run starts."""
        values = config.to_dict(self.experiment)
        return _overrides({key: values[key] for key in (*sorted(values.keys() - {"name"}), "name")})

    @property
    def processes(self) -> int:
        """RPC ranks: the server and the workers."""
        return processes_of(self.experiment)

    @property
    def exists(self) -> bool:
        """Whether there is a run directory of this name."""
        return (self.experiment.run_directory / "config.yaml").is_file()

    def summary(self) -> dict[str, Any]:
        """Return what the run's ``summary.json`` holds; empty where it left none yet.

        Raises
        ------
        RunError
            If it is damaged.
        """
        return RunDirectory(self.experiment.run_directory).summary()

    @property
    def completed(self) -> bool:
        """Whether the run has come to its end."""
        return self.summary().get("status") == "completed"

    def difference(self) -> str | None:
        """Return how an existing run of this name differs from this one; None if it does not.

        Raises
        ------
        RunError
            If the run's ``config.yaml`` is damaged.
        """
        defaults = config.to_dict(config.Experiment())
        before = RunDirectory(self.experiment.run_directory, defaults).settings()
        now = flatten(config.to_dict(self.experiment))
        for key in differing_keys(before, now):
            return f"{key} was {before.get(key)!r} there and is {now.get(key)!r} now"
        return None


def read(path: Path, overrides: Sequence[str]) -> tuple[list[PlannedRun], int | None]:
    """Read an experiment or a sweep.

    Parameters
    ----------
    path : Path
        A YAML file, or the name of a shipped one.
    overrides : sequence of str
        ``key.path=value``; they win over what the runs share, the grid and the rows over them.

    Returns
    -------
    list of PlannedRun
        One for an experiment; the grid's combinations for a sweep.
    int or None
        Of a sweep, the limit on jobs at a time.

    Raises
    ------
    ConfigError
        With every problem of every run at once.
    """
    path = shipped.path_of(path)
    values = read_yaml(path, ConfigError)
    if "grid" not in values:
        return [PlannedRun(path, tuple(overrides), config.load(path, overrides))], None
    errors = _problems(values)
    if errors:
        raise ConfigError("\n".join(f"{path}: {error}" for error in errors))
    return _expand(path, values, overrides), values.get("at_once")


def _problems(values: Mapping[str, Any]) -> list[str]:
    valid = ", ".join(SWEEP_KEYS)
    found = [f"{key}: unknown key; a sweep has {valid}" for key in values if key not in SWEEP_KEYS]
    if not isinstance(values.get("config"), str):
        found.append("config: a sweep names the experiment that its runs share")
    grid, shared, limit = values["grid"], values.get("set", {}), values.get("at_once")
    if not isinstance(grid, dict) or not grid:
        found.append("grid: expected key.path: [value, ...]")
    else:
        found += [
            f"grid.{key}: expected a list of values, found {options!r}"
            for key, options in grid.items()
            if not isinstance(options, list) or not options
        ]
        found += [
            f"grid: expected key.path: [value, ...], found the key {key!r}"
            for key in grid
            if not isinstance(key, str)
        ]
        if "name" in grid:
            found.append("grid.name: runs are named after their values")
    rows = values.get("rows", {})
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        found.append(f"rows: expected name: {{key.path: value, ...}}, found {rows!r}")
    if not isinstance(shared, dict):
        found.append(f"set: expected keys and values, found {shared!r}")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        found.append(f"at_once: expected a whole number from 1, found {limit!r}")
    return found


def _expand(path: Path, values: Mapping[str, Any], overrides: Sequence[str]) -> list[PlannedRun]:
    base = path.parent / values["config"]
    if not base.suffix and not base.exists():
        base = shipped.find(values["config"])
    shared = _overrides(values.get("set", {}))
    grid: Mapping[str, list[Any]] = values["grid"]
    prefix, runs, errors = str(values.get("name", path.stem)), [], []
    rows: Mapping[str, Mapping[str, Any]] = values.get("rows") or {"": {}}
    for (row, settings), *combination in itertools.product(rows.items(), *grid.values()):
        point = dict(zip(grid, combination, strict=True))
        labels = [str(row)] if row != "" else []
        labels += [_label(key, value, grid) for key, value in point.items()]
        name = "-".join([prefix, *labels])
        chosen = _overrides({**settings, **point})
        everything = (*shared, *overrides, *chosen, f"name={json.dumps(name)}")
        try:
            runs.append(PlannedRun(base, everything, config.load(base, everything)))
        except ConfigError as error:
            errors += [f"{name}: {line}" for line in str(error).splitlines()]
    names = [run.experiment.name for run in runs]
    errors += [f"{path}: two runs are called {n}" for n in sorted(set(names)) if names.count(n) > 1]
    if errors:
        raise ConfigError("\n".join(errors))
    return runs


def _overrides(values: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"{key}={json.dumps(value, default=str)}" for key, value in flatten(values).items()
    )


def _label(key: str, value: Any, grid: Mapping[str, Any]) -> str:
    """Return a key's last word and its value; the whole path where last words collide."""
    last = key.rpartition(".")[2]
    alone = sum(other.rpartition(".")[2] == last for other in grid) == 1
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"[^A-Za-z0-9.+_-]+", "_", f"{last if alone else key}{text}")
