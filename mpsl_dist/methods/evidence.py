"""What the results of a run rest on: samples, and files that are missing or damaged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from mpsl_dist.actors.local_data import Damage
from mpsl_dist.data import Dataset, Splits
from mpsl_dist.errors import DataError
from mpsl_dist.methods.progress import say
from mpsl_dist.runtime.process import StopRequest


class Reads(Protocol):
    """What is asked of a method."""

    def read_tests(self) -> Iterator[int]:
        """Read every test sample once, and yield how many can be read, batch by batch."""
        ...

    def damage_met(self) -> Damage:
        """Return how much of the data could not be read so far."""
        ...


def look_at_tests(splits: Splits, method: Reads, stop: StopRequest) -> None:
    """Read every test sample, so that what cannot be read is said before anything is trained.

    This takes as long as the reading of one test.

    Raises
    ------
    DataError
        If a file cannot be read and ``data.on_error`` is ``raise``, or no sample can be read.
    """
    readable = 0
    for count in method.read_tests():
        if stop:
            return
        readable += count
    if not readable:
        raise DataError("data: no test sample can be read; what is wrong stands in the rank*.log")
    for line in sentences(evidence(splits, method.damage_met())):
        say(line)


def evidence(splits: Splits, damage: Damage) -> dict[str, Any]:
    """Return ``data`` of ``summary.json``: samples, classes and faults, train and test apart."""
    return {
        "classes": len(splits.classes),
        "train": {
            **_listed(splits.train),
            "files_damaged": damage.train_files,
            "samples_replaced": damage.replaced,
        },
        "test": {
            **_listed(splits.test),
            "files_damaged": damage.test_files,
            "samples_left_out": damage.left_out,
        },
    }


def _listed(split: Dataset) -> dict[str, int]:
    missing = getattr(split, "missing", ())
    return {"samples": len(split.labels), "files_missing": len(missing)}


def sentences(found: dict[str, Any]) -> list[str]:
    """Return :func:`evidence` as a person reads it: the sizes, then a line a split with faults."""
    train, test = found["train"], found["test"]
    classes = f", {found['classes']} classes" if found["classes"] else ""
    lines = [f"data: {train['samples']} training samples, {test['samples']} for testing{classes}"]
    done = {
        "train": f"times that another sample stood in: {train['samples_replaced']}",
        "test": f"samples left out of every result: {test['samples_left_out']}",
    }
    for split, what in done.items():
        missing, damaged = found[split]["files_missing"], found[split]["files_damaged"]
        if missing or damaged:
            said = f"missing files: {missing}, damaged: {damaged}"
            lines.append(f"{split} data: {said}{f'; {what}' if damaged else ''}")
    return lines
