"""What files given to ``submit.py`` ask for: one run, or a grid of them.

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
    tasks:                            # as rows, crossing them, each with an experiment of its own
      coco: {config: ../paper/coco-qa.yaml, training.batch_size: 500}
    at_once: 2                        # at most so many jobs at a time; default: no limit
    command: cost                     # count what the runs would cost, and train nothing
    profiles:                         # --profile small: these keys stand in place of those above,
      small: {grid: {seed: [1]}}      # and the runs are called alpha-small-...

Under a profile, runs on data in files are left out where no ``data.root`` is given.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpsl_dist import config
from mpsl_dist.config import Experiment, shipped
from mpsl_dist.config.methods import processes_of
from mpsl_dist.errors import ConfigError
from mpsl_dist.reading import read_yaml
from mpsl_dist.records.run_directory import RunDirectory, differing_keys
from mpsl_dist.typed import flatten

SWEEP_KEYS = ("config", "name", "set", "grid", "rows", "tasks", "at_once", "command")


@dataclass(frozen=True)
class PlannedRun:
    """One experiment to train, or whose cost to count.

    Attributes
    ----------
    config : Path
        The YAML file.
    overrides : tuple of str
        ``key.path=value``.
    experiment : Experiment
        What the two resolve to.
    command : "train" or "cost"
    """

    config: Path
    overrides: tuple[str, ...]
    experiment: Experiment
    command: str = "train"

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
        if self.command == "cost":
            return self.cost_file.is_file()
        return self.summary().get("status") == "completed"

    @property
    def cost_file(self) -> Path:
        """Where ``command: cost`` leaves its figures."""
        return self.experiment.run_directory / "cost.json"

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


def read(
    path: Path, overrides: Sequence[str], profile: str | None = None
) -> tuple[list[PlannedRun], int | None]:
    """Read an experiment or a sweep.

    Parameters
    ----------
    path : Path
        A YAML file, or the name of a shipped one.
    overrides : sequence of str
        ``key.path=value``; they win over what the runs share; tasks, rows and grid win over them.
    profile : str, optional
        One of the sweep's profiles.

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
        if profile is not None:
            raise ConfigError(f"{path}: no sweep, and so without --profile {profile}")
        return [PlannedRun(path, tuple(overrides), config.load(path, overrides))], None
    profiles = values.pop("profiles", {})
    if profile is not None:
        if not isinstance(profiles, dict) or not isinstance(profiles.get(profile), dict):
            known = ", ".join(map(str, profiles or ())) or "none"
            raise ConfigError(f"{path}: --profile {profile}: no such profile; there: {known}")
        name = f"{values.get('name', path.stem)}-{profile}"
        values = {**values, **profiles[profile], "name": name}
    errors = _problems(values)
    if errors:
        raise ConfigError("\n".join(f"{path}: {error}" for error in errors))
    runs = _expand(path, values, overrides)
    return runs if profile is None else _at_hand(path, runs), values.get("at_once")


def _at_hand(path: Path, runs: list[PlannedRun]) -> list[PlannedRun]:
    """Leave out runs whose data are files of which nothing was said."""
    from mpsl_dist.data import catalog

    def lacks(run: PlannedRun) -> bool:
        data, modules = run.experiment.data, run.experiment.plugins
        return (
            run.command == "train" and data.root is None and catalog.find(data.name, modules).files
        )

    lacking = sorted({run.experiment.data.name for run in runs if lacks(run)})
    if lacking:
        print(f"{path}: without data.root=FOLDER nothing on {', '.join(lacking)}")
    return [run for run in runs if not lacks(run)]


def _problems(values: Mapping[str, Any]) -> list[str]:
    valid = ", ".join((*SWEEP_KEYS, "profiles"))
    found = [f"{key}: unknown key; a sweep has {valid}" for key in values if key not in SWEEP_KEYS]
    tasks = values.get("tasks", {})
    if not isinstance(tasks, dict) or not all(isinstance(task, dict) for task in tasks.values()):
        found.append(
            f"tasks: expected name: {{config: file, key.path: value, ...}}, found {tasks!r}"
        )
    elif not all(isinstance(task.get("config"), str) for task in tasks.values() or [values]):
        found.append(
            "config: a sweep names the experiment that its runs share, or each task its own"
        )
    if values.get("command", "train") not in ("train", "cost"):
        found.append(f"command: expected train or cost, found {values['command']!r}")
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
    shared = _overrides(values.get("set", {}))
    grid: Mapping[str, list[Any]] = values["grid"]
    prefix, runs, errors = str(values.get("name", path.stem)), [], []
    tasks: Mapping[str, Mapping[str, Any]] = values.get("tasks") or {"": values}
    rows: Mapping[str, Mapping[str, Any]] = values.get("rows") or {"": {}}
    for task, row, *combination in itertools.product(tasks, rows, *grid.values()):
        point = dict(zip(grid, combination, strict=True))
        labels = [str(label) for label in (task, row) if label != ""]
        labels += [_label(key, value, grid) for key, value in point.items()]
        name = "-".join([prefix, *labels])
        base = path.parent / tasks[task]["config"]
        if not base.suffix and not base.exists():
            base = shipped.find(tasks[task]["config"])
        own = {key: value for key, value in tasks[task].items() if task != "" and key != "config"}
        chosen = (*_overrides(own), *_overrides(rows[row]), *_overrides(point))
        everything = (*shared, *overrides, *chosen, f"name={json.dumps(name)}")
        try:
            run = PlannedRun(base, everything, config.load(base, everything))
            runs.append(replace(run, command=values.get("command", "train")))
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
