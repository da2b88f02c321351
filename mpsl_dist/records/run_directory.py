"""A run directory: what a run leaves behind, and what it never overwrites."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from mpsl_dist.errors import DiskError, RunError
from mpsl_dist.reading import read_json, read_json_lines, read_yaml
from mpsl_dist.records import lock
from mpsl_dist.records.tracking import Trackers
from mpsl_dist.typed import flatten

#: Keys that may differ when a run is resumed: none of them changes what is computed.
FREE_KEYS = (
    "checkpoint",
    "clients_per_worker",
    "data.cache",
    "data.loaders",
    "data.root",
    "device",
    "faults",
    "federated.round_timeout",
    "output",
    "runtime",
    "tracking",
    "training.test_batch_size",
    "weights.root",
)

#: What can be done about a file of a run that cannot be read.
_DAMAGED = "restore it from a copy, or begin the run again with --overwrite"

_log = logging.getLogger("mpsl_dist")


class RunDirectory:
    """Files of one run under ``runs/<name>/``.

    Parameters
    ----------
    path : Path
        The folder, which need not exist yet.
    defaults : mapping, optional
        An experiment's values: of keys that are newer than the run, which went as they say.
    """

    def __init__(self, path: Path, defaults: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self._defaults = flatten(defaults or {})
        self._lock: IO[str] | None = None
        #: Who is told of every line of metrics, and of the end.
        self.trackers: Trackers | None = None

    def check(self, config: Mapping[str, Any], resume: bool, overwrite: bool) -> bool:
        """Return whether there is a run here already, and refuse what would harm it.

        Parameters
        ----------
        config : mapping
            The resolved experiment that is to be run.
        resume : bool
            Whether the run that is here is to be continued.
        overwrite : bool
            Whether the run that is here is to be replaced.

        Raises
        ------
        RunError
            If it exists and neither ``resume`` nor ``overwrite`` was asked for; if it is to be
            resumed with another configuration or is damaged; if another process has it; or if it
            is no run at all.
        """
        try:
            exists = self.path.exists() and any(p.name != lock.LOCK for p in self.path.iterdir())
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"{self.path}: {reason}; choose another output= or name=") from error
        if exists and not (self.path / "config.yaml").is_file():
            raise RunError(f"{self.path} exists and is no run directory; choose another name=")
        if self._lock is None:
            lock.refuse_if_taken(self.path)
        if resume and not exists:
            raise RunError(f"{self.path} holds no run to resume")
        if exists and resume:
            self._check_same(config)
            self._lines()
        elif exists and not overwrite:
            raise RunError(
                f"{self.path} exists; continue it with --resume, replace it with --overwrite, "
                "or choose another name="
            )
        return exists

    def open(self, config: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
        """Create the directory, or enter it to resume, after :meth:`check`.

        It is this process's own until the process ends, or this object does. A directory that is
        resumed keeps its ``config.yaml`` until :meth:`record`.

        Raises
        ------
        RunError
            As :meth:`check` does, or if the directory cannot be written.
        """
        self.check(config, resume, overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                self._lock = lock.take(self.path)
            # Another run may have come and gone before this one took the directory.
            exists = self.check(config, resume, overwrite)
            if exists and not resume:
                self._clear()
            if not resume:
                self.record(config)
        except OSError as error:
            reason = error.strerror or error
            raise RunError(
                f"{self.path} cannot be written: {reason}; choose another output="
            ) from error

    def _clear(self) -> None:
        """Remove all but the lock, whose name must stay this file's."""
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != lock.LOCK:
                path.unlink()

    def record(self, config: Mapping[str, Any]) -> None:
        """Write ``config.yaml``: the resolved experiment that the run goes on with.

        Raises
        ------
        DiskError
            If it cannot be written.
        """
        text = yaml.safe_dump(dict(config), sort_keys=False)
        with _disk(self.path / "config.yaml") as path:
            write_atomic(path, text)

    def _check_same(self, config: Mapping[str, Any]) -> None:
        before, now = self.settings(), flatten(config)
        differing = [
            f"{key}: the run has {before.get(key)!r}, now {now.get(key)!r}{why}"
            for key in differing_keys(before, now)
            if (why := _why_not(key, now)) is not None
        ]
        if differing:
            raise RunError(f"{self.path} cannot be resumed as asked:\n" + "\n".join(differing))

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def config(self) -> dict[str, Any]:
        """Return the resolved experiment that the run was started with.

        Raises
        ------
        RunError
            If ``config.yaml`` is missing, damaged or empty.
        """
        path = self.path / "config.yaml"
        values = read_yaml(path, advice=_DAMAGED)
        if not values:
            raise RunError(f"{path}: empty; {_DAMAGED}")
        return values

    def settings(self) -> dict[str, Any]:
        """Return :meth:`config` as :func:`flatten` does, with the defaults of newer keys."""
        return self._defaults | flatten(self.config())

    def summary(self) -> dict[str, Any]:
        """Return what ``summary.json`` holds; empty where the run left none yet.

        Raises
        ------
        RunError
            If it is damaged.
        """
        path = self.path / "summary.json"
        if not path.exists():
            return {}
        return read_json(path, advice="remove it and continue the run with --resume")

    def append_metrics(self, **values: Any) -> None:
        """Add one line to ``metrics.jsonl``."""
        with (
            _disk(self.path / "metrics.jsonl") as path,
            path.open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(values) + "\n")
        if self.trackers:
            self.trackers.tell(values)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``; none where there is no such file.

        A last line that is torn, because its writer died, is left out with a warning in the log.

        Raises
        ------
        RunError
            If any other line is damaged; the error names it.
        """
        lines, torn = self._lines()
        if torn:
            _log.warning("%s: the last line is torn and is left out", self.path / "metrics.jsonl")
        return lines

    def _lines(self) -> tuple[list[dict[str, Any]], bool]:
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return [], False
        lines, torn = read_json_lines(path, advice=f"remove the line, or {_DAMAGED}")
        for number, line in enumerate(lines, start=1):
            own = ("metric",) if line.get("split") == "test" else ("loss",)
            absent = [key for key in ("step", "epoch", "split", *own) if key not in line]
            if absent:
                raise RunError(f"{path}: line {number}: no {', '.join(absent)}; {_DAMAGED}")
        return lines, torn

    def forget_after(self, step: int) -> None:
        """Drop the metrics of later steps, which a resumed run will write again.

        Parameters
        ----------
        step : int
            The last step to keep; -1 keeps none.
        """
        kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step]
        with _disk(self.path / "metrics.jsonl") as path:
            write_atomic(path, "".join(kept))

    def end(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json`` and tell the trackers: the run has ended, in whichever way."""
        self.write_json("summary", summary)
        if self.trackers:
            self.trackers.tell({"split": "end", **summary})

    def write_json(self, name: str, value: Any) -> None:
        """Write ``<name>.json``."""
        with _disk(self.path / f"{name}.json") as path:
            write_atomic(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[Path]:
    """Raise a DiskError that names the file for what its disk raises."""
    try:
        yield path
    except OSError as error:
        raise DiskError.of(path, error) from error


def _why_not(key: str, config: Mapping[str, Any]) -> str | None:
    """Return why a key cannot change on resume, empty where it needs no word; None if it can.

    A run of another length trains the same steps as far as both go, unless one of them depends on
    which step is the last.
    """
    if key != "training.epochs":
        return ""
    for owner in ("server", "client"):
        if config.get(f"training.{owner}.schedule") == "cosine":
            return f"; the cosine schedule of training.{owner} spans the whole run"
    every = config.get("tokenizer_sync.every", 1)
    if config.get("tokenizer_sync.mode", "none") != "none" and every > 1:
        return f"; tokenizers that meet every {every} steps also met after the run's last step"
    return None


def differing_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the keys that make one experiment another, sorted; :data:`FREE_KEYS` never do.

    Parameters
    ----------
    before, now : mapping
        Two experiments as :func:`flatten` returns them. A key that one lacks is null there.
    """
    return [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    ]


def write_atomic(path: Path, text: str) -> None:
    """Write a text file such that it is never seen half-written.

    Raises
    ------
    OSError
        If it cannot be written; a file of this name then stays as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def environment_of(
    world: int, devices: Mapping[str, str], placement: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a run's figures depend on besides its configuration.

    Parameters
    ----------
    world : int
        Processes of the run.
    devices : mapping of str to str
        Process (``server``, ``worker1``) -> the device that it trained on.
    placement : mapping
        Which clients lived on which worker.
    """
    packages = ("torch", "torchvision", "torchaudio", "timm", "open_clip_torch", "numpy")
    return {
        "mpsl_dist": importlib.metadata.version("mpsl_dist"),
        "git_commit": _git_commit(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "cores": os.cpu_count(),
        "world": world,
        "devices": dict(devices),
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


class _LogFile(logging.FileHandler):
    """A log on a disk that may fill: a line is lost then, without a word on standard error."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def log_to(path: Path) -> logging.Logger:
    """Send the package's log to a file, and nowhere else, and return its logger.

    Parameters
    ----------
    path : Path
        Lines are added; folders on the way are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("mpsl_dist")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers = [handler]
    return logger
