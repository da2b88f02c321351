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

from mpsl_dist import typed
from mpsl_dist.errors import RunError
from mpsl_dist.reading import read_json
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
        Clients of the run, whose states the checkpoint holds.
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
    """Return the folder that holds the checkpoint of a step."""
    return checkpoints / f"step-{step:08d}"


def complete(checkpoints: Path, manifest: Manifest, keep: int) -> None:
    """Mark a checkpoint complete, then remove all but the last ``keep`` complete ones.

    Parameters
    ----------
    checkpoints : Path
        The folder of all checkpoints of a run.
    manifest : Manifest
        What the checkpoint of its step holds; every owner has written its part.
    keep : int
        At least 1.
    """
    folder = folder_of(checkpoints, manifest.step)
    write_atomic(folder / "manifest.json", json.dumps(asdict(manifest)) + "\n")
    for old in _complete_folders(checkpoints)[:-keep]:
        (old / "manifest.json").unlink()
        shutil.rmtree(old, ignore_errors=True)


def latest(checkpoints: Path) -> tuple[Path, Manifest] | None:
    """Return the folder and the manifest of the last complete checkpoint; None without any.

    Raises
    ------
    RunError
        If the manifest is damaged.
    """
    folders = _complete_folders(checkpoints)
    if not folders:
        return None
    path = folders[-1] / "manifest.json"
    advice = f"remove {folders[-1]} to continue from the checkpoint before it"
    values = read_json(path, advice=advice)
    errors: list[str] = []
    try:
        manifest = typed.build(Manifest, values, "", errors)
    except TypeError:  # a field is absent, or left out for its wrong type
        wanted = ", ".join(Manifest.__dataclass_fields__)
        raise RunError(f"{path}: is no manifest, which has {wanted}; {advice}") from None
    if errors:
        raise RunError(f"{path}: {'; '.join(errors)}; {advice}")
    return folders[-1], manifest


def _complete_folders(checkpoints: Path) -> list[Path]:
    return sorted(path.parent for path in checkpoints.glob("step-*/manifest.json"))
