"""Follow submitted jobs until their end: rank 0's output of one, a line a change of several."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from sweep import PlannedRun

#: Seconds between two looks at Slurm, whose controller serves everybody.
INTERVAL = 5.0


class State(Protocol):
    """What following asks of a submitted job."""

    job: Any

    def __call__(self) -> str | None:
        """Return the job's state, None at its end."""
        ...


class SlurmState:
    """A job's state as ``squeue`` has it; sacct needs a database that not every cluster has."""

    def __init__(self, job: Any) -> None:
        self.job = job

    def __call__(self) -> str | None:
        command = ["squeue", "--noheader", "--format=%T", "--jobs", str(self.job.job_id)]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            return "UNKNOWN"
        if answer.returncode and "Invalid job id" not in answer.stderr:
            return "UNKNOWN"  # the controller is busy or restarting; the job goes on without it
        states = answer.stdout.split()
        return states[0] if states else None


class LocalState:
    """The state of a job of submitit's local executor."""

    def __init__(self, job: Any) -> None:
        self.job = job

    def __call__(self) -> str | None:
        return None if self.job.done() else "RUNNING"


def until_done(followed: Sequence[tuple[PlannedRun, State]]) -> int:
    """Show the jobs' progress until all have ended.

    Ctrl-C stops following, not the jobs of a cluster.

    Parameters
    ----------
    followed : sequence of (PlannedRun, State)
        At least one; the output of a single job's rank 0 is shown as it grows.

    Returns
    -------
    int
        0 if every run was completed, else 1.

    Raises
    ------
    RunError
        If a run's ``summary.json`` is damaged.
    """
    tail = _Tail(followed[0][1].job.paths.stdout) if len(followed) == 1 else None
    before, interval = "", 0.5
    while True:
        states = [state() for _, state in followed]
        if tail:
            tail.show()
        counts = Counter(state or "ENDED" for state in states)
        line = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        if line != before and not (tail and "RUNNING" in states):
            print(f"[{line}]", flush=True)
        before = line
        if all(state is None for state in states):
            break
        time.sleep(interval)
        interval = min(INTERVAL, interval * 1.5)
    return _report(followed)


def _report(followed: Sequence[tuple[PlannedRun, State]]) -> int:
    failed = 0
    for run, state in followed:
        summary = run.summary()
        status = summary.get("status", "did not start")
        failed |= status != "completed"
        reason = f": {summary['reason']}" if summary.get("reason") else ""
        print(f"{run.experiment.run_directory}: {status}{reason}", flush=True)
        if status != "completed":
            print(f"  its errors: {state.job.paths.stderr}", flush=True)
    return int(failed)


class _Tail:
    """Prints what a file has grown by, once it is there."""

    def __init__(self, path: Any) -> None:
        self.path, self.position = path, 0

    def show(self) -> None:
        try:
            with open(self.path, encoding="utf-8", errors="replace") as file:
                file.seek(self.position)
                print(file.read(), end="", flush=True)
                self.position = file.tell()
        except OSError:
            return
