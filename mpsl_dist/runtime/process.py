"""How a process of the world ends: on a signal, or because the server is gone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

#: Ctrl-C, a launcher's or scheduler's end, and Slurm's notice before it (``--signal=USR2``).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

#: Exit status of a worker that ended because the server is gone.
SERVER_GONE = 3


class StopRequest:
    """Whether somebody asked this run to stop, by one of :data:`STOP_SIGNALS`.

    The server finishes its step, writes a checkpoint and ends the world. Launchers send SIGINT
    twice (terminal and agent), so a second signal means nothing more; they end the processes
    themselves when their grace is over.

    Parameters
    ----------
    patience : float, optional
        Seconds after which the process is ended in any case.
    """

    def __init__(self, patience: float | None = None) -> None:
        self.signal: str | None = None
        self.patience = patience

    def __bool__(self) -> bool:
        return self.signal is not None

    def listen(self) -> None:
        """Take the signals from now on."""
        for number in STOP_SIGNALS:
            signal.signal(number, self.note)
        if self.patience is not None:
            # A handler waits for the main thread, which may itself wait for a client that hangs.
            reading, writing = os.pipe()
            os.set_blocking(writing, False)
            heard = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
            arguments = (reading, heard, self.patience)
            threading.Thread(target=_end_in_time, args=arguments, daemon=True).start()

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal, as its handler."""
        self.signal = signal.Signals(number).name


def _end_in_time(reading: int, heard: int, patience: float) -> None:
    """End this process ``patience`` seconds after the first signal, if it has not ended itself.

    Parameters
    ----------
    reading : int
        Receives the number of every signal.
    heard : int
        Whom the numbers were for before; -1 for nobody.
    """
    told = False
    while True:
        number = os.read(reading, 1)
        if heard != -1:
            with contextlib.suppress(OSError):
                os.write(heard, number)
        if not told and number[0] in STOP_SIGNALS:
            told = True
            name = signal.Signals(number[0]).name
            deadline = threading.Timer(patience, _give_up, (name, patience))
            deadline.daemon = True
            deadline.start()


def _give_up(name: str, patience: float) -> None:
    print(
        f"error: not at an end {patience:g} s after {name} (faults.exit_timeout); "
        "--resume continues from the last checkpoint",
        file=sys.stderr,
    )
    leave(1)


def leave_stopping_to_server() -> None:
    """Ignore the stop signals: the server decides when the world ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def follow_server(ping: Callable[[], bool]) -> None:
    """End on SIGTERM once the server has, without a word.

    A launcher sends it to all when one rank has failed: whoever ended first would be the one that
    the server misses.

    Parameters
    ----------
    ping : callable
        As in :func:`watch_server`.
    """

    def end() -> None:
        while ping():
            time.sleep(0.2)
        os._exit(SERVER_GONE)

    leave_stopping_to_server()
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=end, daemon=True).start())


def watch_server(
    ping: Callable[[], bool], gone: Callable[[], None], interval: float = 5.0
) -> Callable[[], None]:
    """End this worker when the server is gone, whatever else it is doing.

    Runs on a thread of its own. Three missed answers in a row count as gone, so that a run that was
    suspended and goes on is not taken for a dead one; a closed connection answers at once.

    Parameters
    ----------
    ping : callable
        Asks the server and waits for a while; returns whether it answered.
    gone : callable
        What is to be done before this worker ends.

    Returns
    -------
    callable
        Ends the watch; when it returns, no ping is under way.
    """
    over = threading.Event()

    def watch() -> None:
        missed = 0
        while not over.wait(interval if missed == 0 else 1.0):
            missed = 0 if ping() else missed + 1
            if missed == 3:
                print("the server is gone; this worker ends", file=sys.stderr, flush=True)
                gone()
                os._exit(SERVER_GONE)

    thread = threading.Thread(target=watch, name="watch-server", daemon=True)
    thread.start()

    def end() -> None:
        over.set()
        thread.join()

    return end


def leave(status: int, *streams: Any) -> NoReturn:
    """End this process at once with an exit status, after flushing its streams.

    After a failure, RPC's own shutdown would wait for the lost.
    """
    for stream in (sys.stdout, sys.stderr, *streams):
        stream.flush()
    os._exit(status)


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the one that started it ends, where it can (Linux).

    Parameters
    ----------
    parent : int
        Its process id: if it has ended already, so does this one.
    """
    if sys.platform.startswith("linux"):
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
