"""A rank that outlives the process which hosts its clients.

torchrun and srun end the whole job when one rank exits with an error. So a worker's rank is this
small process, which starts its child: the same command again, or where the rank is a fork itself
(:mod:`mpsl_dist.runtime.starting`) a fork of it. The child hosts the clients, and if it is lost the
rank itself ends well, when the server has gone on without it. The child beats into a pipe: one that
is stopped, or hangs, is killed. The rank has no thread, so that it can be forked.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

from mpsl_dist.runtime.process import SERVER_GONE, end_with_parent, leave_stopping_to_server
from mpsl_dist.runtime.starting import Started, start

#: In the child's environment: where it beats, and its parent's process id.
_MARK = "MPSL_DIST_SUPERVISED"
_BEAT_SECONDS = 1.0
#: Seconds between two looks at whether the launching process lives.
_LOOK = 0.1


def is_child() -> bool:
    """Return whether this process was started by :func:`supervise`."""
    return _MARK in os.environ


def supervise(
    command: Sequence[str],
    patience: float,
    restarts: int,
    look: Callable[[], object] | None = None,
    go_on: Callable[[], int] | None = None,
) -> int:
    """Run the command in a child process that hosts the clients, again whenever it is lost.

    Parameters
    ----------
    command : sequence of str
        What is given to Python: ``("-m", "mpsl_dist", "train", ...)``.
    patience : float
        Seconds without a beat after which a child that has joined the run is killed.
    restarts : int
        How often a child that is lost in the middle of the run is started again.
    look : callable, optional
        Sees to what becomes of the rank when its launching process is gone; called many times a
        second. Under our own command alone, where a stop signal ends the rank: the launching
        process sends one when the run is over.
    go_on : callable, optional
        What a fork of this process does as the child.

    Returns
    -------
    int
        The exit status of this rank: 0 too where the child was lost in the middle of the run.
    """
    if not look:
        leave_stopping_to_server()
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "?"))
    for count in range(restarts + 1):
        status, joined = _run(command, patience, count, look, go_on)
        if status == SERVER_GONE:
            return 1
        if status == 0 or (not joined and not count):
            return status if status >= 0 else 128 - status
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        # Who fails by itself before it has come back would fail again.
        ends = count == restarts or (not joined and status > 0)
        again = f"started again, {count + 1} of {restarts} times (faults.restarts)"
        what = "not started again" if ends else again
        print(f"worker{rank} ended {how}; {what}", file=sys.stderr, flush=True)
        if ends:
            break
    return 0


def _run(
    command: Sequence[str],
    patience: float,
    count: int,
    look: Callable[[], object] | None,
    go_on: Callable[[], int] | None,
) -> tuple[int, bool]:
    """Run a child to its end; return its status, and whether it had joined the run."""
    reading, writing = os.pipe()
    mark = {_MARK: f"{writing} {os.getpid()} {count}"}
    name = f"rank{os.environ.get('RANK')} hosts"
    child = start(command, go_on, mark, name=name, keep=[writing])
    os.close(writing)
    try:
        joined = _follow(reading, child, patience, look)
    finally:
        os.close(reading)
    return child.wait(), joined


def _follow(
    reading: int, child: Started, patience: float, look: Callable[[], object] | None
) -> bool:
    """Read beats until the child is gone; return whether there were any."""
    joined, last = False, time.monotonic()
    while True:
        deadline = last + patience if joined else float("inf")
        while not select.select([reading], [], [], _until(deadline, look))[0]:
            if look:
                look()
            if time.monotonic() >= deadline:
                print(f"no sign of life for {patience:g} s: killed", file=sys.stderr, flush=True)
                child.kill()
                return joined
        if not os.read(reading, 1024):
            return joined
        joined, last = True, time.monotonic()


def _until(deadline: float, look: Callable[[], object] | None) -> float | None:
    """Return the seconds to wait for a beat; None without an end."""
    seconds = max(0.0, min(deadline - time.monotonic(), _LOOK if look else deadline))
    return None if seconds == float("inf") else seconds


def beat() -> None:
    """Beat for the supervisor from now on, on a thread of its own."""
    writing = int(os.environ[_MARK].split()[0])

    def tell() -> None:
        while True:
            os.write(writing, b".")
            time.sleep(_BEAT_SECONDS)

    threading.Thread(target=tell, name="beat", daemon=True).start()


def follow_parent() -> None:
    """Have the kernel kill this process when its supervisor ends, where it can (Linux)."""
    end_with_parent(int(os.environ[_MARK].split()[1]))


def returns() -> int:
    """Return how often this worker's process has been started again."""
    return int(os.environ[_MARK].split()[2]) if is_child() else 0
