"""The runs of a report: read as far as they are whole, and named where they are not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from mpsl_dist.analysis import compare
from mpsl_dist.analysis.finished_run import FinishedRun
from mpsl_dist.config import from_dict
from mpsl_dist.config.methods import METHODS, MethodFacts, facts_of
from mpsl_dist.errors import ConfigError, UserError
from mpsl_dist.reading import read_json
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.typed import flatten


@dataclass(frozen=True)
class Gathered:
    """What a report is of.

    Attributes
    ----------
    runs : tuple of FinishedRun
        In the order that they were named in.
    costs : tuple of dict
        What ``cost.json`` files hold, of runs that were counted and not trained.
    left_out : tuple of (str, str)
        Folders that are not reported, and why.
    """

    runs: tuple[FinishedRun, ...]
    costs: tuple[dict[str, Any], ...]
    left_out: tuple[tuple[str, str], ...]

    @cached_property
    def groups(self) -> list[compare.Group]:
        """Runs that differ in seed alone, as ``compare`` has them."""
        return compare.group(self.runs)


def gather(folders: Sequence[str | Path]) -> Gathered:
    """Read run directories; one that is named twice is read once.

    Raises
    ------
    ConfigError
        If none of them can be reported; the message says why of each.
    """
    runs: list[FinishedRun] = []
    costs: list[dict[str, Any]] = []
    left_out: list[tuple[str, str]] = []
    for folder in dict.fromkeys(Path(folder) for folder in folders):
        try:
            if (folder / "cost.json").is_file() and not (folder / "summary.json").is_file():
                costs.append(_cost(folder / "cost.json"))
            else:
                (run,) = compare.read([folder])
                RunDirectory(folder).metrics()
                environment(run)
                runs.append(run)
        except UserError as error:
            left_out.append((str(folder), _why(folder, str(error))))
    if not runs and not costs:
        reasons = [f"{folder}: {why}" for folder, why in left_out]
        raise ConfigError("\n".join(["no run here can be reported:", *reasons]))
    return Gathered(tuple(runs), tuple(costs), tuple(left_out))


def _why(folder: Path, error: str) -> str:
    """Return why a folder is left out, with what a failed run said of itself."""
    told = error.removeprefix(f"{folder}: ")
    try:
        reason = RunDirectory(folder).summary().get("reason")
    except UserError:
        return told
    return f"{told}: {reason}" if isinstance(reason, str) else told


def _cost(path: Path) -> dict[str, Any]:
    found = read_json(path, advice="count it again with mpsl_dist cost")
    about, rows = found.get("about"), found.get("rows")
    if not isinstance(about, dict) or not isinstance(rows, list):
        raise ConfigError(f"{path}: no figures of a cost; count them again with mpsl_dist cost")
    wanted = ("section", "method", "owner", "part", "quantity", "value")
    if not all(isinstance(row, dict) and row.keys() >= set(wanted) for row in rows):
        raise ConfigError(f"{path}: a row without {', '.join(wanted)}; count again")
    return found


def environment(run: FinishedRun) -> dict[str, Any]:
    """Return what the run recorded of versions, devices and its command; empty where it has not.

    Raises
    ------
    RunError
        If the file is damaged.
    """
    path = run.path / "environment.json"
    return read_json(path, advice="remove it") if path.exists() else {}


def config_text(run: FinishedRun) -> str:
    """Return the resolved experiment as YAML."""
    return yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)


def environment_text(run: FinishedRun) -> str:
    """Return the environment as JSON, without the command."""
    told = {key: value for key, value in environment(run).items() if key != "command"}
    return json.dumps(told, indent=2, ensure_ascii=False)


def setting(run: FinishedRun, key: str) -> Any:
    """Return a value of the run's configuration by ``key.path``; None where it has none."""
    return flatten(run.config).get(key)


def facts(run: FinishedRun) -> MethodFacts | None:
    """Return the facts of a run's method; None where it is a plugin's that is not here."""
    try:
        return facts_of(from_dict(run.config))
    except UserError:
        return METHODS.get(run.summary["method"])


def by_task(groups: Sequence[compare.Group]) -> Mapping[tuple[str, int], list[compare.Group]]:
    """Return groups by dataset and number of clients."""
    found: dict[tuple[str, int], list[compare.Group]] = {}
    for one in groups:
        found.setdefault((one.dataset, one.clients), []).append(one)
    return found


def one_of(group: compare.Group) -> str:
    """Return a group's method and task in words."""
    return f"{group.label} on {group.dataset}, N={group.clients}"
