"""What submitit runs in every task: one rank of a run, resumed and requeued as Slurm asks.

``SIGUSR2`` is Slurm's notice (``--signal``) that the time limit or a preemption is near: the run
writes a checkpoint and ends as ``stopped``, and rank 0 has submitit put the job back into the
queue. ``SIGTERM``, which a user's ``scancel`` sends too, stops it in the same way but requeues
nothing.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

NOTICE = "SIGUSR2"


@dataclass(frozen=True)
class TrainJob:
    """A picklable ``train CONFIG key=value ...``.

    Attributes
    ----------
    config : str
        The YAML file.
    arguments : tuple of str
        What follows it: overrides, ``--resume``, ``--overwrite``.
    run_directory : str
        Where the run leaves its summary.
    port : int or None
        Where the ranks meet under submitit's local executor, which says nothing about it.
    requeued : bool
        Whether this is a later start of the same job.
    """

    config: str
    arguments: tuple[str, ...]
    run_directory: str
    port: int | None = None
    requeued: bool = False

    def __call__(self) -> None:
        """Train as the rank that this task is; a failure ends the process with its status."""
        if self.port is not None:
            os.environ.update(local_variables(os.environ, self.port))
        requeue = signal.getsignal(signal.Signals[NOTICE])
        # The run puts handlers of its own in submitit's place; this socket hears signals too.
        heard, hears = socket.socketpair()
        hears.setblocking(False)
        signal.set_wakeup_fd(hears.fileno(), warn_on_full_buffer=False)
        from mpsl_dist.__main__ import main

        status = main(["train", self.config, *self._arguments()])
        signal.set_wakeup_fd(-1)
        rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
        if rank == 0 and self._is_stopped() and signal.Signals[NOTICE] in _pending(heard):
            requeue(signal.Signals[NOTICE], None)
        if status:
            sys.exit(status)

    def checkpoint(self, *_: Any) -> Any:
        """Return what submitit runs when the job starts again; every rank's state is on disk."""
        import submitit

        return submitit.helpers.DelayedSubmission(replace(self, requeued=True))

    def _arguments(self) -> list[str]:
        # Slurm requeues by itself too, after the failure of a node.
        again = self.requeued or int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
        if not (again and (Path(self.run_directory) / "config.yaml").is_file()):
            return list(self.arguments)
        kept = [one for one in self.arguments if one not in ("--overwrite", "--resume")]
        return [*kept, "--resume"]

    def _is_stopped(self) -> bool:
        from mpsl_dist.errors import UserError
        from mpsl_dist.records.run_directory import RunDirectory

        try:
            return RunDirectory(Path(self.run_directory)).summary().get("status") == "stopped"
        except UserError:
            return False


def _pending(heard: socket.socket) -> bytes:
    """Return the numbers of the signals that came in, a byte each."""
    heard.setblocking(False)
    try:
        return heard.recv(1 << 16)
    except BlockingIOError:
        return b""


def local_variables(environment: Any, port: int) -> dict[str, str]:
    """Return torch's ``env://`` variables for a task of submitit's local executor.

    Parameters
    ----------
    environment : mapping
        The task's environment variables, which submitit set.
    port : int
        Where the ranks meet.
    """
    world, rank = environment["SUBMITIT_LOCAL_NTASKS"], environment["SUBMITIT_LOCAL_GLOBALID"]
    return {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": environment["SUBMITIT_LOCAL_LOCALID"],
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
