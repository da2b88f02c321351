"""The Python API: what the package itself offers, for scripts and notebooks.

A run is the command ``train`` in a process of its own, which starts server and workers: nothing of
the caller's process is changed, its signals, its threads and its terminal least of all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from mpsl_dist import config, errors
from mpsl_dist.config import Experiment
from mpsl_dist.errors import ConfigError, LaunchError, RunError, UserError
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.runtime import caller, environment

if TYPE_CHECKING:
    from mpsl_dist.actors.predictor import Predictor

#: Seconds between two looks at a run.
_LOOK = 0.1
#: How the command says that a signal has stopped it.
_STOPPED = "stopped on request"
#: Lines of the output that are shown of a run that ended without a word.
_LAST = 10


def load(path: str | Path, *overrides: str, client: int | None = None) -> Predictor:
    """Load a trained model with its preprocessing: :func:`mpsl_dist.actors.predictor.load`."""
    from mpsl_dist.actors import predictor

    _check_words(overrides)
    return predictor.load(path, *overrides, client=client)


def train(
    experiment: str | Path | Mapping[str, Any] | Experiment,
    *overrides: str,
    local: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    wait: bool = True,
) -> Run:
    """Train an experiment: start its server and workers on this machine.

    The run ends with this process, as on a stop signal; the command ``train`` outlives it.

    Parameters
    ----------
    experiment : str, Path, mapping or Experiment
        A YAML file, or its keys and values.
    overrides : str
        ``key.path=value``, as on the command line.
    local : bool
        On this machine, the only way from within Python.
    resume, overwrite : bool
        Continue the run that is there from its last checkpoint, or replace it.
    wait : bool
        Return when it is over, having printed what the command prints. A run that is interrupted
        meanwhile (``KeyboardInterrupt``) is stopped. If False, return at once.

    Raises
    ------
    UserError
        The same that the command prints: a ``ConfigError`` of the experiment at once, others of
        this run (data that are missing, a run that is there) when ``wait``, or from the run.
    RunError
        If the run failed; the message is the reason of the process that failed.
    """
    if not local:
        raise LaunchError(
            "local=False: several hosts start their ranks by torchrun or Slurm (docs/clusters.md)"
        )
    _check_words(overrides)
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other")
    variables = _variables()
    folder = tempfile.TemporaryDirectory(prefix="mpsl_dist-")
    try:
        run = _start(experiment, overrides, resume, overwrite, folder, variables)
    except BaseException:
        folder.cleanup()
        raise
    if wait:
        try:
            run.wait()
        except KeyboardInterrupt:
            run.stop()
            raise
    return run


def _check_words(overrides: tuple[str, ...]) -> None:
    for word in overrides:
        if not isinstance(word, str):
            raise ConfigError(
                "overrides: expected key.path=value, each a text of its own as on the command "
                f"line, like 'training.epochs=3'; found {word!r}"
            )


def _start(
    experiment: str | Path | Mapping[str, Any] | Experiment,
    overrides: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    folder: tempfile.TemporaryDirectory[str],
    variables: dict[str, str],
) -> Run:
    home = Path(folder.name)
    path, read = _described(experiment, overrides, home)
    words = [str(path), *overrides, *["--resume"] * resume, *["--overwrite"] * overwrite]
    run = Run(read.run_directory, home, overwrite)
    with (home / "output.txt").open("wb") as output:
        run.process = subprocess.Popen(
            [sys.executable, "-m", "mpsl_dist", "train", *words],
            env=variables | caller.variables(home),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is the caller's to hand on
        )
    # Workers read the experiment there: it must live as long as the process, which Python keeps
    # until its end though the run be forgotten.
    run.process.folder = folder  # type: ignore[attr-defined]
    return run


def _described(
    experiment: str | Path | Mapping[str, Any] | Experiment, overrides: tuple[str, ...], home: Path
) -> tuple[Path, Experiment]:
    """Return the experiment's file, and what it says."""
    if isinstance(experiment, str | Path):
        return Path(experiment), config.load(experiment, overrides)
    values = config.to_dict(experiment) if isinstance(experiment, Experiment) else experiment
    path = home / "experiment.yaml"
    try:
        path.write_text(yaml.safe_dump(dict(values), sort_keys=False), "utf-8")
        return path, config.load(path, overrides)
    except yaml.YAMLError as error:
        raise ConfigError(f"the experiment holds what YAML can't: {error}") from error
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{path}: ", "")) from error


def _variables() -> dict[str, str]:
    """Return this process's environment as of a program that no launcher has started."""
    found = environment.resolve(os.environ)
    if found and found.world > 1:
        raise LaunchError(
            f"this process is rank {found.rank} of {found.world}, by {found.launcher}: start the "
            "command on every rank in place of Python's train (docs/clusters.md)"
        )
    ours = {*environment.TORCHRUN, *environment.TORCHRUN_MARKS, environment.LAUNCH_FOLDER}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ours and not name.startswith("SLURM_")
    }


class Run:
    """A run that this process has started.

    Attributes
    ----------
    path : Path
        Its run directory.
    process : subprocess.Popen
        The command.
    """

    process: subprocess.Popen[bytes]

    def __init__(self, path: Path, home: Path, overwrite: bool) -> None:
        self.path = path
        self._home = home
        self._before = self._mark() if overwrite else None
        self._shown = 0
        self._asked = False

    def __repr__(self) -> str:
        return f"<Run {self.path}: {self.status}>"

    @property
    def status(self) -> Literal["running", "completed", "stopped", "failed"]:
        """Where it stands."""
        ended = self.process.poll()
        if ended is None:
            return "running"
        if ended == 0:
            return "completed"
        if caller.told(self._home) or self._errors():
            return "failed"
        return "stopped" if self._asked or _STOPPED in self.output else "failed"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What ``metrics.jsonl`` holds so far, a dict for each step and each test."""
        return [] if self._is_old() else RunDirectory(self.path).metrics()

    @property
    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds; empty while it runs, and where it left none."""
        if self.process.poll() is None or self._is_old():
            return {}
        return RunDirectory(self.path).summary()

    @property
    def output(self) -> str:
        """All that the command has printed so far."""
        return (self._home / "output.txt").read_text("utf-8", errors="replace")

    def follow(self) -> Iterator[dict[str, Any]]:
        """Yield what :attr:`metrics` holds as it comes, until the end.

        Raises
        ------
        UserError
            As :func:`train`, at the end.
        """
        seen = set()
        while True:
            over = self.process.poll() is not None
            for line in self.metrics:
                if (line["step"], line["split"]) not in seen:
                    seen.add((line["step"], line["split"]))
                    yield line
            if over:
                return self._raise_failure()
            time.sleep(_LOOK)

    def wait(self) -> Run:
        """Wait for the end, print what the command prints meanwhile, and return the run.

        Raises
        ------
        UserError
            As :func:`train`.
        """
        while True:
            over = self.process.poll() is not None
            self._show()
            if over:
                self._raise_failure()
                return self
            time.sleep(_LOOK)

    def stop(self) -> None:
        """Have it finish its step, write a checkpoint and end; return when it has.

        ``resume=True`` continues it.
        """
        if self.process.poll() is None:
            self._asked = True
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()

    def model(self, *overrides: str, client: int | None = None) -> Predictor:
        """Wait for the end, and return the trained model: :func:`load`."""
        self.process.wait()
        self._raise_failure()
        return load(self.path, *overrides, client=client)

    def _show(self) -> None:
        with (self._home / "output.txt").open("rb") as file:
            file.seek(self._shown)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self._shown += len(new)
        if new:
            print(new.decode("utf-8", errors="replace"), end="", flush=True)

    def _errors(self) -> list[str]:
        return [
            line.removeprefix("error: ")
            for line in self.output.splitlines()
            if line.startswith("error: ")
        ]

    def _raise_failure(self) -> None:
        if self.status != "failed":
            return
        told = caller.told(self._home)
        kind = getattr(errors, told.kind, None) if told else None
        if isinstance(kind, type) and issubclass(kind, UserError):
            raise kind(told.message)
        said = [told.message] if told else self._errors() or self.output.splitlines()[-_LAST:]
        reason = "\n".join(said) or f"ended with status {self.process.returncode}"
        traceback = self.path / "error.txt"
        more = f"\n(traceback in {traceback})" if traceback.exists() and not self._is_old() else ""
        raise RunError(f"{reason}{more}")

    def _mark(self) -> tuple[int, int] | None:
        """Return what tells one ``config.yaml`` from the next that replaces it."""
        try:
            status = (self.path / "config.yaml").stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _is_old(self) -> bool:
        """Return whether the directory still holds the run that this one replaces."""
        return self._before is not None and self._mark() == self._before
