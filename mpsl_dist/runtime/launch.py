"""A run on this machine by its own command: server and workers as children of one process.

The launching process has imported what every rank needs, forks each of them
(:mod:`mpsl_dist.runtime.starting`), or starts the same command again where it may not be forked,
and waits for their end. It has one thread, always. They meet by files of a private folder, so that
no store listens to the network, and find each other there: ``launcher.pid``, ``rank0.pid`` ...,
``rank2.error`` where a worker failed by itself, and ``server.gone`` where one has no sign of life
from the server.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from mpsl_dist.errors import LaunchError, RunError
from mpsl_dist.runtime import caller
from mpsl_dist.runtime.environment import LAUNCH_FOLDER, Environment
from mpsl_dist.runtime.process import StopRequest
from mpsl_dist.runtime.starting import Started, start

#: Bytes that a process of a run takes at the very least, whatever it computes.
_PROCESS_BYTES = 100 * 2**20
_SERVER_GONE = "server.gone"
#: Seconds between two looks at whether ranks or the launching process live, or it is to stop.
_LOOK = 0.1
#: Seconds for the others to end by a signal once one rank has failed.
_GRACE = 30.0


def check_room(ranks: int) -> None:
    """Refuse processes that this machine's memory can't hold, before any is started.

    Raises
    ------
    LaunchError
        If there are too many.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # a system that does not tell
        return
    if ranks * _PROCESS_BYTES > memory:
        raise LaunchError(
            f"{ranks} processes do not fit the {memory / 2**30:.0f} GiB of this machine: put "
            "several clients on a worker with clients_per_worker, or use several hosts "
            "(docs/clusters.md)"
        )


def run(
    ranks: int,
    command: Sequence[str],
    grace: float,
    interface: str | None = None,
    replicas: int = 1,
    go_on: Callable[[], int] | None = None,
) -> int:
    """Start every rank of a run on this machine, wait for their end and return the exit status.

    A stop signal is handed to the server alone, once, which writes a checkpoint and ends the
    others; a second one means nothing more.

    Parameters
    ----------
    ranks : int
        The server and its workers.
    command : sequence of str
        What every rank gives to Python: ``("-m", "mpsl_dist", "train", ...)``.
    grace : float
        Seconds from a stop signal until whatever still lives is killed.
    interface : str, optional
        Network interface that the user chose for RPC; else it is loopback.
    replicas : int
        How many of the ranks, from 0, are the server's.
    go_on : callable, optional
        What a rank does that is a fork of this process, which has imported what that needs; else
        every rank begins anew.

    Returns
    -------
    int
        The server's own status where it ended by itself; 1 if anything else failed.
    """
    stop = StopRequest()
    stop.listen()
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, stop.note)
    doors = f"RPC listens on {interface} alone" if interface else "nothing listens outside loopback"
    print(f"{ranks} processes on this machine; {doors}", flush=True)
    with _private_folder() as folder:
        living: dict[int, Started] = {}
        try:
            for rank, variables in enumerate(_variables(ranks, folder)):
                living[rank] = start(command, go_on, variables, apart=True, name=f"rank{rank}")
            failed = _wait(living, folder, stop, grace)
            return _told(failed, folder, stop, grace, replicas)
        except Exception as error:
            _error(f"the launch failed: {error}")
            return 1
        finally:
            _signal_all(living.values(), signal.SIGKILL)


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """Make a folder that is this user's alone, and remove it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="mpsl_dist-"))
    try:
        if set("#?") & set(str(folder)):
            raise LaunchError(f"{folder.parent} can't be named in a URL: set TMPDIR to another")
        (folder / "launcher.pid").write_text(str(os.getpid()))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _variables(ranks: int, folder: Path) -> Iterator[dict[str, str]]:
    """Give every rank's environment variables, as torchrun would set them."""
    shape = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}
    # They meet by files: nothing is ever opened at this address.
    shape |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, LAUNCH_FOLDER: folder}
    shape |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", 1)}
    for rank in range(ranks):
        yield {k: str(v) for k, v in (shape | {"RANK": rank, "LOCAL_RANK": rank}).items()}


def _wait(
    living: dict[int, Started], folder: Path, stop: StopRequest, grace: float
) -> Mapping[int, int]:
    """Wait for the end of all ranks; return the exit status of those that failed, in order.

    Who has ended is taken out of ``living``.
    A stop request is handed on to the server; what lives when its time is up, or when the server
    is gone, is killed. Once one rank has failed the others are ended.
    """
    failed: dict[int, int] = {}
    told, deadline, patience = False, float("inf"), float("inf")
    caller_gone = caller.watch()
    while living:
        if caller_gone() and not stop:
            stop.note(signal.SIGTERM, None)
        for rank, status in [(rank, _ended(process)) for rank, process in living.items()]:
            if status is not None:
                del living[rank]
            if status:
                failed[rank] = status
        now = time.monotonic()
        if stop and deadline == float("inf"):
            deadline = now + grace
        if stop and not told and 0 in living:
            # Before it has told of itself, a server is still on its way and knows no stop.
            told = (folder / "rank0.pid").exists() and _signal(living[0].pid, signal.SIGTERM)
        if failed and patience == float("inf"):
            patience = now + _GRACE
            _signal_all(living.values(), signal.SIGTERM)
        if now >= min(deadline, patience) or (folder / _SERVER_GONE).exists():
            _signal_all(living.values(), signal.SIGKILL)
        time.sleep(_LOOK)
    return failed


def _ended(rank: Started) -> int | None:
    """Return the exit status of a rank that has ended, whose group is then killed; else None.

    That comes before the system forgets the rank: from then on its number may be another's.
    """
    waitid = getattr(os, "waitid", None)  # absent on macOS
    if waitid and waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        _signal(rank.pid, signal.SIGKILL)
    return rank.poll()


def _told(
    failures: Mapping[int, int],
    folder: Path,
    stop: StopRequest,
    grace: float,
    replicas: int,
) -> int:
    """Return the command's exit status; say what went wrong unless the server has."""
    if not failures:
        return 0
    if failures.get(0, 0) > 0:
        return failures[0] if failures[0] == 2 else 1
    if (folder / _SERVER_GONE).exists():
        _error(
            f"the server gave no sign of life within faults.exit_timeout={grace:g} s, so killed; "
            "--resume continues from the last complete checkpoint"
        )
        return 1
    # The others are ended with SIGTERM once one has failed.
    first = min(failures, key=lambda rank: failures[rank] == -signal.SIGTERM)
    code = failures[first]
    if stop and code == -signal.SIGTERM:
        print("stopped on request, before the first step")
    elif stop and code == -signal.SIGKILL:
        _error(
            f"not stopped within faults.exit_timeout={grace:g} s, so killed; --resume continues "
            "from the last complete checkpoint"
        )
    else:
        how = f"status {code}" if code > 0 else signal.Signals(-code).name
        with contextlib.suppress(OSError):
            how = (folder / f"rank{first}.error").read_text()
        who = f"{'replica' if first < replicas else 'worker'}{first}" if first else "the server"
        _error(f"{who} ended: {how}")
    return 1


def _error(message: str) -> None:
    caller.tell(RunError(message))
    print(f"error: {message}", file=sys.stderr, flush=True)


def _signal_all(ranks: Iterable[Started], number: signal.Signals) -> None:
    for rank in ranks:
        _signal(rank.pid, number)


def _signal(group: int, number: signal.Signals) -> bool:
    """Signal a rank's group; return whether there is one."""
    try:
        os.killpg(group, number)
    except OSError:
        return False
    return True


def follow(launched: Environment, grace: float) -> None:
    """Tell the launching process of this rank, and end with it, within ``grace`` seconds.

    On a thread of its own, for a process that is not forked any more.

    Raises
    ------
    LaunchError
        If the launching process is gone already.
    """
    look = follower(launched, grace)

    def watch() -> None:
        while not look():
            time.sleep(_LOOK)

    threading.Thread(target=watch, name="watch-launcher", daemon=True).start()


def follower(launched: Environment, grace: float) -> Callable[[], bool]:
    """Return what is to be called many times a second to follow the launching process.

    It returns whether that is gone. Then the server stops as on a signal, and an alarm is set that
    ends this process after ``grace`` seconds: the kernel's, whatever this process is doing.

    Raises
    ------
    LaunchError
        If the launching process is gone already.
    """
    folder, gone = Path(launched.folder or ""), False
    try:
        launcher = int((folder / "launcher.pid").read_text())
        (folder / f"rank{launched.rank}.pid").write_text(str(os.getpid()))
    except OSError as error:
        raise LaunchError(f"the launching process is gone: {error}") from error

    def look() -> bool:
        nonlocal gone
        if not gone and os.getppid() != launcher:
            gone = True
            signal.setitimer(signal.ITIMER_REAL, max(grace - 1.0, _LOOK))
            shutil.rmtree(folder, ignore_errors=True)
            if launched.rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        return gone

    return look


def miss_server(launched: Environment) -> None:
    """Tell the launching process, where there is one, that the server gives no sign of life.

    It may be stopped, and would then outlive the workers by the agent's patience.
    """
    if launched.folder:
        with contextlib.suppress(OSError):
            (Path(launched.folder) / _SERVER_GONE).touch()


def leave_word(launched: Environment, error: Exception) -> None:
    """Leave a worker's own failure for the launching process to tell if the server does not."""
    path = Path(launched.folder or "") / f"rank{launched.rank}.error"
    with contextlib.suppress(OSError):
        path.write_text(str(error) or type(error).__name__)
