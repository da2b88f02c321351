"""Checkpoints: every owner writes its own part, a manifest marks the complete ones.

``checkpoints/step-00000120/`` holds ``server.pt`` and one ``client-0007.pt`` per client, each
written where its owner runs; the server writes ``manifest.json`` last, with the SHA-256 of every
part as its owner told it. A folder without a manifest is no checkpoint, and one whose parts are not
what the manifest says is passed over for the one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpsl_dist import typed
from mpsl_dist.errors import DiskError, ResumeError, RunError
from mpsl_dist.reading import read_json
from mpsl_dist.records.run_directory import write_atomic
from mpsl_dist.records.traffic import KINDS


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
    files : dict
        Name of every part -> its SHA-256; empty in checkpoints of older versions.
    """

    step: int
    epoch: int
    epoch_step: int
    clients: int
    seconds: float
    traffic: dict[str, list[int]]
    files: dict[str, str] = field(default_factory=dict)


#: Says what is wrong with a checkpoint, naming the file; None for a good one.
Check = Callable[[Path, Manifest], str | None]


def folder_of(checkpoints: Path, step: int) -> Path:
    """Return the folder that holds the checkpoint of a step."""
    return checkpoints / f"step-{step:08d}"


def begin(checkpoints: Path, step: int) -> Path:
    """Return the empty folder that the owners write the checkpoint of a step to.

    What was there of an earlier attempt at this step is removed, its manifest first.

    Raises
    ------
    DiskError
        If the folder cannot be made.
    """
    folder = folder_of(checkpoints, step)
    _remove(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError.of(folder, error) from error
    return folder


def complete_ones(checkpoints: Path) -> list[Path]:
    """Return the folders of all complete checkpoints, the earliest first."""
    return [path for path in _folders(checkpoints) if (path / "manifest.json").is_file()]


def abandon(checkpoints: Path, step: int) -> None:
    """Remove what was written of a checkpoint that could not be completed."""
    _remove(folder_of(checkpoints, step))


def complete(checkpoints: Path, manifest: Manifest, keep: int) -> None:
    """Mark a checkpoint complete, then remove all but the last ``keep`` complete ones.

    A later one than this is one that was passed over: it counts for nothing, and stays until the
    run comes to its step again.

    Parameters
    ----------
    checkpoints : Path
        The folder of all checkpoints of a run.
    manifest : Manifest
        What the checkpoint of its step holds; every owner has written its part.
    keep : int
        At least 1.

    Raises
    ------
    DiskError
        If the manifest cannot be written.
    """
    folder = folder_of(checkpoints, manifest.step)
    values = asdict(manifest)
    text = json.dumps(values | {"sha256": _digest(values)}) + "\n"
    try:
        write_atomic(folder / "manifest.json", text)
    except OSError as error:
        raise DiskError.of(folder / "manifest.json", error) from error
    folders = _folders(checkpoints)
    earlier = folders[: folders.index(folder) + 1]
    kept = [old for old in earlier if (old / "manifest.json").is_file()][-keep:]
    for old in earlier:
        if old not in kept:
            _remove(old)


def latest(
    checkpoints: Path,
    check: Check = lambda folder, manifest: None,
    warn: Callable[[str], object] = lambda text: None,
) -> tuple[Path, Manifest] | None:
    """Return the last complete checkpoint that is not damaged; None if none was ever completed.

    Parameters
    ----------
    checkpoints : Path
        The folder of all checkpoints of a run.
    check : callable
        Looks further than the manifest.
    warn : callable
        Receives one text, if a later one is passed over: which, and why.

    Raises
    ------
    ResumeError
        If every one is damaged.
    """
    passed_over: list[str] = []
    found, damaged = None, False
    for folder in reversed(_folders(checkpoints)):
        if (folder / "manifest.json").exists():
            try:
                manifest = _read(folder)
                problem = check(folder, manifest)
            except RunError as error:
                problem = str(error)
            if problem is None:
                found = folder, manifest
                break
            damaged = True
        else:
            problem = f"{folder}: incomplete, it has no manifest.json"
        passed_over.append(problem)
    if damaged and found is None:
        none_left = f"{checkpoints}: no checkpoint is left to continue from; {_ADVICE}"
        raise ResumeError("\n".join([*passed_over, none_left]))
    if passed_over:
        then = f"continuing from {found[0]}" if found else "beginning at the first step"
        warn(f"{'; '.join(passed_over)}; {then}")
    return found


_ADVICE = "restore one from a copy, or begin the run again with --overwrite"


def _read(folder: Path) -> Manifest:
    """Return a checkpoint's manifest.

    Raises
    ------
    RunError
        If it is damaged.
    """
    path = folder / "manifest.json"
    advice = f"restore it from a copy, or remove {folder}"
    values = read_json(path, advice=advice)
    told = values.pop("sha256", None)
    errors: list[str] = []
    manifest = typed.build(Manifest, values, "", errors)
    if manifest is None:  # a field is absent, or left out for its wrong type
        wanted = ", ".join(Manifest.__dataclass_fields__)
        raise RunError(f"{path}: is no manifest, which has {wanted}; {advice}")
    if told is not None and told != _digest(values):
        errors.append("damaged: its SHA-256 is not the one that it names")
    errors += _impossible(manifest, folder)
    if errors:
        raise RunError(f"{path}: {'; '.join(errors)}; {advice}")
    return manifest


def _impossible(manifest: Manifest, folder: Path) -> list[str]:
    """Return what no checkpoint of this folder can say."""
    found = [
        f"{name}: no possible number: {getattr(manifest, name)}"
        for name in ("step", "epoch", "epoch_step", "clients", "seconds")
        if not 0 <= getattr(manifest, name) < _LIMIT
    ]
    if folder.name != folder_of(folder, manifest.step).name:
        found.append(f"step: {manifest.step} is not this folder's")
    for kind, counts in manifest.traffic.items():
        numbers = isinstance(counts, list) and all(
            type(count) is int and 0 <= count < _LIMIT for count in counts
        )
        if kind not in KINDS or not numbers or len(counts) != manifest.clients:
            found.append(f"traffic.{kind}: is no count of bytes for {manifest.clients} clients")
    return found


#: Counts of steps, seconds and bytes lie below.
_LIMIT = 2**63


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _folders(checkpoints: Path) -> list[Path]:
    folders = (path for path in checkpoints.glob("step-*") if path.is_dir())
    return sorted(folders, key=lambda path: (len(path.name), path.name))


def _remove(folder: Path) -> None:
    """Remove a checkpoint, so that at no moment a part of it passes for a whole."""
    with contextlib.suppress(OSError):
        (folder / "manifest.json").unlink()
    shutil.rmtree(folder, ignore_errors=True)
