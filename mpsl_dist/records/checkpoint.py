"""Checkpoints: every owner writes its own part, a manifest marks the complete ones.

``checkpoints/step-00000120/`` holds ``server.pt`` and one ``client-0007.pt`` per client, each
written where its owner runs; the server writes ``manifest.json`` last. A folder without a manifest
is no checkpoint.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpsl_dist.records.run_directory import write_atomic


@dataclass(frozen=True)
class Manifest:
    """Where a run stands.

    Attributes
    ----------
    step : int
        Steps completed.
    epoch, epoch_step : int
        The epoch to continue, and its first step not yet done.
    clients : int
    seconds : float
        Time spent so far.
    traffic : dict
        Bytes so far, by kind and client.
    """

    step: int
    epoch: int
    epoch_step: int
    clients: int
    seconds: float
    traffic: dict[str, list[int]]


def folder_of(checkpoints: Path, step: int) -> Path:
    """Give the folder of a step's checkpoint."""
    return checkpoints / f"step-{step:08d}"


def complete(checkpoints: Path, manifest: Manifest, keep: int) -> None:
    """Mark a checkpoint complete, then remove all but the last ``keep`` complete ones."""
    folder = folder_of(checkpoints, manifest.step)
    write_atomic(folder / "manifest.json", json.dumps(asdict(manifest)) + "\n")
    for old in _complete_folders(checkpoints)[:-keep]:
        (old / "manifest.json").unlink()
        shutil.rmtree(old, ignore_errors=True)


def latest(checkpoints: Path) -> tuple[Path, Manifest] | None:
    """Find the last complete checkpoint."""
    folders = _complete_folders(checkpoints)
    if not folders:
        return None
    values: dict[str, Any] = json.loads((folders[-1] / "manifest.json").read_text("utf-8"))
    return folders[-1], Manifest(**values)


def _complete_folders(checkpoints: Path) -> list[Path]:
    return sorted(path.parent for path in checkpoints.glob("step-*/manifest.json"))
