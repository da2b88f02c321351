"""What a completed run left behind, read for a comparison."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mpsl_dist.config import Experiment
from mpsl_dist.config.methods import METHODS, OPTIONAL
from mpsl_dist.errors import RunError
from mpsl_dist.records.run_directory import FREE_KEYS, RunDirectory
from mpsl_dist.typed import flatten

#: Keys that may differ between the runs of a group.
_NOT_THE_METHOD = (*FREE_KEYS, "defences.secret", "name", "seed")
#: What a comparison takes from ``summary.json``.
_NEEDED = {
    "method": str,
    "dataset": str,
    "seed": int,
    "clients": int,
    "epochs_completed": int,
    "test": dict,
    "baselines": dict,
    "trainable_parameters.client": int,
    "communication.up_bytes_per_client_per_epoch": int | float,
    "communication.down_bytes_per_client_per_epoch": int | float,
    "seconds.total": int | float,
    "seconds.step_median": int | float,
}


@dataclass(frozen=True)
class FinishedRun:
    """What a completed run left behind.

    Attributes
    ----------
    path : Path
        The run directory.
    config, summary : dict
        What ``config.yaml`` and ``summary.json`` hold.
    tests : tuple of dict
        Test metrics of every epoch, in order: name -> fraction.
    """

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    tests: tuple[dict[str, float], ...]

    @property
    def metric(self) -> str:
        """What the run is compared by: ``accuracy``, of captions ``rouge_l``, or in retrieval
        ``mean recall``.
        """
        return _single(self.summary["test"]) or "mean recall"

    def result(self, test: dict[str, float]) -> float:
        """Return the accuracy of a test, Rouge-L, or the mean of R@1, R@5 and R@10 both ways."""
        if name := _single(test):
            return test[name]
        return statistics.fmean(_recalls(test))

    @property
    def rounds_to_peak(self) -> int:
        """Rounds until 95 % of the best test result (Fig. 2), from 1."""
        return rounds_to([self.result(test) for test in self.tests])

    @cached_property
    def unread(self) -> tuple[str, ...]:
        """Sections and keys that this run's method does not look at."""
        facts = METHODS.get(self.summary["method"])
        found = [key for key in OPTIONAL if key not in facts.reads] if facts else []
        if flatten(self.config).get("tokenizer_sync.mode") == "none":
            found.append("tokenizer_sync.every")
        return tuple(found)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All keys that tell a method and its task from another."""
        flat = flatten(Experiment()) | flatten(self.config)  # newer keys at their defaults
        left_out = tuple(f"{key}." for key in (*_NOT_THE_METHOD, *self.unread))
        return {
            key: value
            for key, value in flat.items()
            if value is not None and not f"{key}.".startswith(left_out)
        }


def _single(test: Mapping[str, float]) -> str | None:
    """Return the name of the one number that a test is compared by; None in retrieval."""
    return next((name for name in ("accuracy", "rouge_l") if name in test), None)


def _recalls(test: Mapping[str, float]) -> list[float]:
    return [value for name, value in test.items() if re.search(r"_r\d+$", name)]


def rounds_to(results: Sequence[float], part: float = 0.95) -> int:
    """Return the first round, from 1, whose result is at least ``part`` of the best one.

    Parameters
    ----------
    results : sequence of float
        The test result of every round, in order; at least one.
    part : float
        Between 0 and 1.
    """
    goal = part * max(results)
    return 1 + next(i for i, result in enumerate(results) if result >= goal)


def read(folders: Sequence[str | Path]) -> list[FinishedRun]:
    """Read completed runs.

    Parameters
    ----------
    folders : sequence of str or Path
        Run directories.

    Raises
    ------
    RunError
        Naming every folder that is no run, whose run is not completed, or whose files are damaged.
    """
    runs, wrong = [], []
    for folder in map(Path, folders):
        try:
            runs.append(_read_one(folder))
        except RunError as error:
            wrong.append(str(error))
    if wrong:
        raise RunError("\n".join(wrong))
    return runs


def _read_one(folder: Path) -> FinishedRun:
    if not all((folder / name).is_file() for name in ("summary.json", "config.yaml")):
        raise RunError(f"{folder}: no summary.json and config.yaml there; is it a run directory?")
    run = RunDirectory(folder)
    summary = run.summary()
    status = summary.get("status", "of unknown status")
    if status != "completed":
        raise RunError(f"{folder}: the run is {status}, not completed")
    absent = [key for key, kind in _NEEDED.items() if not isinstance(_at(summary, key), kind)]
    if absent:
        raise RunError(
            f"{folder / 'summary.json'}: no {', '.join(absent)}, or no value of its type; "
            "remove the file and continue the run with --resume"
        )
    tests = tuple(line["metric"] for line in run.metrics() if line["split"] == "test")
    for test in (summary["test"], *tests):
        if not isinstance(test, dict) or not (_single(test) or _recalls(test)):
            raise RunError(f"{folder}: a test has neither accuracy, rouge_l nor recall: {test}")
    if not tests:
        raise RunError(f"{folder / 'metrics.jsonl'}: no line of a test; leave this run out")
    return FinishedRun(folder, run.config(), summary, tests)


def _at(values: Mapping[str, Any], path: str) -> Any:
    """Return the value at ``key.path``; None where there is none."""
    node: Any = values
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node
