"""A run on this machine by its own command: server and workers under torch's elastic agent.

The launching process starts the same command again for every rank and waits for their end. They
meet by files of a private folder, so that no store listens to the network, and find each other
there: ``launcher.pid``, ``rank0.pid`` ..., ``rank2.error`` where a worker failed by itself, and
``server.gone`` where one has no sign of life from the server.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpsl_dist.errors import LaunchError
from mpsl_dist.runtime.environment import LAUNCH_FOLDER, Environment
from mpsl_dist.runtime.process import StopRequest

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

#: Bytes that a process of a run takes at the very least, whatever it computes.
_PROCESS_BYTES = 100 * 2**20
_SERVER_GONE = "server.gone"
#: Seconds between two looks at whether the launching process was asked to stop, or lives.
_LOOK = 0.1


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
        over = threading.Event()
        watch = (stop, folder, grace, over)
        keeper = threading.Thread(target=_see_to_stop, args=watch, daemon=True)
        keeper.start()
        try:
            return _told(_start(ranks, command, folder), folder, stop, grace, replicas)
        except Exception as error:
            print(f"error: the launch failed: {error}", file=sys.stderr, flush=True)
            return 1
        finally:
            over.set()
            keeper.join()
            _kill(folder)


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


def _start(ranks: int, command: Sequence[str], folder: Path) -> Mapping[int, ProcessFailure]:
    """Run the ranks to their end; return those that failed."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ |= {LAUNCH_FOLDER: str(folder), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the run sets its own
    # The agent's account of a failure is many lines long; the run tells its own.
    logging.disable(logging.ERROR)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="mpsl_dist",
        rdzv_backend="c10d",
        rdzv_endpoint=str(folder / "rendezvous"),
        # The file grows with every sign of life, which nobody else waits for.
        rdzv_configs={"store_type": "file", "keep_alive_interval": 3600},
        max_restarts=0,
        local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "torch")),
        # Its own handlers would leave processes behind after a third signal.
        signals_to_handle="SIGQUIT",
    )
    words = [word.replace("$", "$$") for word in command]  # the agent fills in templates
    try:
        elastic_launch(config, sys.executable)(*words)
    except ChildFailedError as error:
        return error.failures
    return {}


def _told(
    failures: Mapping[int, ProcessFailure],
    folder: Path,
    stop: StopRequest,
    grace: float,
    replicas: int,
) -> int:
    """Return the command's exit status; say what went wrong unless the server has."""
    if not failures:
        return 0
    if 0 in failures and failures[0].exitcode > 0:
        return failures[0].exitcode if failures[0].exitcode == 2 else 1
    if (folder / _SERVER_GONE).exists():
        _error(
            f"the server gave no sign of life within faults.exit_timeout={grace:g} s, so killed; "
            "--resume continues from the last complete checkpoint"
        )
        return 1
    # The agent ends the others with SIGTERM once one has failed.
    first = min(failures, key=lambda rank: failures[rank].exitcode == -signal.SIGTERM)
    code = failures[first].exitcode
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
    print(f"error: {message}", file=sys.stderr, flush=True)


def _see_to_stop(stop: StopRequest, folder: Path, grace: float, over: threading.Event) -> None:
    """Hand a stop request on to the server; kill what lives when the time is up, or it is gone."""
    told, deadline = False, float("inf")
    while not over.wait(_LOOK):
        if stop and deadline == float("inf"):
            deadline = time.monotonic() + grace
        if stop and not told:
            told = _signal(folder / "rank0.pid", signal.SIGTERM)
        if time.monotonic() >= deadline or (folder / _SERVER_GONE).exists():
            _kill(folder)


def _kill(folder: Path) -> None:
    for path in folder.glob("rank*.pid"):
        _signal(path, signal.SIGKILL)


def _signal(path: Path, number: signal.Signals) -> bool:
    """Signal the group of the rank that wrote this file; return whether there is one."""
    try:
        os.killpg(int(path.read_text()), number)
    except (OSError, ValueError):
        return False
    return True


def follow(launched: Environment, grace: float) -> None:
    """Tell the launching process of this rank, and end with it, within ``grace`` seconds.

    When the launching process is gone, the server stops as on a signal. The alarm is the kernel's:
    it ends this process whatever that is doing.
    """
    folder = Path(launched.folder or "")
    try:
        launcher = int((folder / "launcher.pid").read_text())
        (folder / f"rank{launched.rank}.pid").write_text(str(os.getpid()))
    except OSError as error:
        raise LaunchError(f"the launching process is gone: {error}") from error

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_LOOK)
        signal.setitimer(signal.ITIMER_REAL, max(grace - 1.0, _LOOK))
        shutil.rmtree(folder, ignore_errors=True)
        if launched.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch-launcher", daemon=True).start()


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
