"""A run directory: what a run leaves behind, and what it never overwrites."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mpsl_dist.errors import RunError

#: Keys that may differ when a run is resumed: none of them changes what is computed.
FREE_KEYS = (
    "checkpoint",
    "clients_per_worker",
    "data.loaders",
    "data.root",
    "device",
    "output",
    "runtime",
    "training.test_batch_size",
)


class RunDirectory:
    """Files of one run under ``runs/<name>/``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, config: Mapping[str, Any], resume: bool, overwrite: bool) -> bool:
        """Say whether there is a run here already, and refuse what would harm it.

        Raises
        ------
        RunError
            If it exists and neither ``resume`` nor ``overwrite`` was asked for; if it is to be
            resumed with another configuration, or is no run at all.
        """
        exists = self.path.exists() and any(self.path.iterdir())
        if exists and not (self.path / "config.yaml").is_file():
            raise RunError(f"{self.path} exists and is no run directory; choose another name=")
        if resume and not exists:
            raise RunError(f"{self.path} holds no run to resume")
        if exists and resume:
            self._check_same(config)
        elif exists and not overwrite:
            raise RunError(
                f"{self.path} exists; continue it with --resume, replace it with --overwrite, "
                "or choose another name="
            )
        return exists

    def open(self, config: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
        """Create the directory, or enter it to resume, after :meth:`check`."""
        exists = self.check(config, resume, overwrite)
        if exists and not resume:
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))

    def _check_same(self, config: Mapping[str, Any]) -> None:
        before = flatten(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8")))
        now = flatten(config)
        differing = [
            f"{key}: the run has {before.get(key)!r}, now {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
            and not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
        ]
        if differing:
            raise RunError(f"{self.path} cannot be resumed as asked:\n" + "\n".join(differing))

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def append_metrics(self, **values: Any) -> None:
        """Add one line to ``metrics.jsonl``."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Read ``metrics.jsonl``."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def forget_after(self, step: int) -> None:
        """Drop metrics of later steps, which a resumed run will write again."""
        kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step]
        write_atomic(self.path / "metrics.jsonl", "".join(kept))

    def write_json(self, name: str, value: Any) -> None:
        """Write ``<name>.json``."""
        write_atomic(self.path / f"{name}.json", json.dumps(value, indent=2) + "\n")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give nested mappings as ``key.path`` -> value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def write_atomic(path: Path, text: str) -> None:
    """Write a text file such that it is never seen half-written."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def environment_of(world: int, devices: list[str], placement: Mapping[str, Any]) -> dict[str, Any]:
    """Give what a run's figures depend on besides its configuration."""
    packages = ("torch", "torchvision", "torchaudio", "timm", "open_clip_torch", "numpy")
    return {
        "mpsl_dist": importlib.metadata.version("mpsl_dist"),
        "git_commit": _git_commit(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "cores": os.cpu_count(),
        "world": world,
        "devices": devices,
        "placement": dict(placement),
        "command": sys.argv,
    }


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def log_to(path: Path) -> logging.Logger:
    """Send the house's log to a file; errors go to the terminal by the command line alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("mpsl_dist")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers = [handler]
    return logger
