"""Two runs cannot share a directory, and a dead one holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mpsl_dist.errors import RunError
from mpsl_dist.records.run_directory import RunDirectory

HOLD = """
import os, sys, time
from pathlib import Path
from mpsl_dist.records.run_directory import RunDirectory
run = RunDirectory(Path(sys.argv[1]))
run.open({"seed": 1}, False, False)
child = os.fork() if sys.argv[2] == "fork" else 1  # as loader processes are
if child == 0:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


@contextmanager
def held(path: Path, how: str = "alone") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that has a run directory, and its child."""
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    line = [sys.executable, "-c", HOLD, str(path), how]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=variables) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            process.kill()
            if child > 1:
                os.kill(child, signal.SIGKILL)


def test_a_second_run_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    path, values = tmp_path / "run", {"seed": 1}
    with held(path) as (process, _):
        (path / "metrics.jsonl").write_text("")
        for resume, overwrite in ((False, False), (True, False), (False, True)):
            for attempt in (RunDirectory(path).check, RunDirectory(path).open):
                with pytest.raises(RunError, match=rf"in use by process {process.pid} on \S+; "):
                    attempt(values, resume, overwrite)
        assert (path / "metrics.jsonl").exists()
        process.kill()
        process.wait()
        RunDirectory(path).open(values, resume=True, overwrite=False)


def test_a_loader_process_that_outlives_its_run_holds_nothing(tmp_path: Path) -> None:
    with held(tmp_path / "run", "fork") as (process, child):
        process.kill()
        process.wait()
        os.kill(child, 0)
        RunDirectory(tmp_path / "run").open({"seed": 1}, resume=True, overwrite=False)


def test_overwriting_keeps_the_lock_and_nothing_else(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.open({"seed": 1}, resume=False, overwrite=False)
    (run.path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run.path / "metrics.jsonl").write_text("")
    before = (run.path / ".lock").stat().st_ino
    run.open({"seed": 2}, resume=False, overwrite=True)
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "config.yaml"]
    assert (run.path / ".lock").stat().st_ino == before
    assert f"process {os.getpid()} on " in (run.path / ".lock").read_text()


def test_a_directory_with_nothing_but_a_lock_holds_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("process 1 on elsewhere")
    run = RunDirectory(tmp_path / "run")
    assert not run.check({"seed": 1}, resume=False, overwrite=False)
    run.open({"seed": 1}, resume=False, overwrite=False)


def test_a_refused_run_makes_no_directory(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run to resume"):
        RunDirectory(tmp_path / "run").open({"seed": 1}, resume=True, overwrite=False)
    assert not (tmp_path / "run").exists()
