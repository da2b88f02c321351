"""A process that goes on from this one: a fork of it where that is safe, else a start anew.

A fork has imported what this process has, and shares its memory until it writes there. It is safe
while this process has one thread: no RPC, no pool of OpenMP, no CUDA before it. Locks of other
threads would stay locked for ever, and CUDA works in no fork of a process that has used it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from mpsl_dist.runtime import process


class Forked:
    """A fork of this process, with what is used of :class:`subprocess.Popen`.

    Parameters
    ----------
    run : callable
        What the fork does; never returns.
    """

    def __init__(self, run: Callable[[], NoReturn]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._status: int | None = None
        self.pid = os.fork()
        if not self.pid:
            run()

    def poll(self) -> int | None:
        """Return the exit status, a signal's number below zero; None of one that lives."""
        return self._waited(os.WNOHANG)

    def wait(self) -> int:
        """Return the exit status when there is one."""
        status = self._waited(0)
        assert status is not None
        return status

    def kill(self) -> None:
        """Kill it, if it lives."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _waited(self, options: int) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, options)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status


Started = Forked | subprocess.Popen


def may_fork() -> bool:
    """Return whether this process has one thread alone, where that can be told (Linux)."""
    threads = Path("/proc/self/task")
    return sys.platform == "linux" and len(list(threads.iterdir())) == 1


def start(
    command: Sequence[str],
    go_on: Callable[[], int] | None,
    variables: Mapping[str, str],
    *,
    apart: bool = False,
    name: str = "",
    keep: Sequence[int] = (),
) -> Started:
    """Start a process that runs as this one would under more environment variables.

    Parameters
    ----------
    command : sequence of str
        What is given to Python where the process begins anew.
    go_on : callable, optional
        What a fork does in its place; returns its exit status. None where it must begin anew.
    variables : mapping
        Environment variables beside those of this process.
    apart : bool
        Whether it leads a session, and a process group, of its own.
    name : str
        Of a fork, in ``ps -o comm``: it has its parent's command line and initial environment.
    keep : sequence of int
        Open files that a process begun anew keeps; a fork keeps all.
    """
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # then the kernel keeps no exit status
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if go_on is None or not may_fork():
        return subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | variables,
            start_new_session=apart,
            pass_fds=keep,
        )
    gc.freeze()  # the collector's notes would copy every shared page

    def run() -> NoReturn:
        status = 1
        try:
            _become(variables, apart, name)
            _begin_anew_without_cuda(command, keep)
            status = go_on()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            _end(status)

    return Forked(run)


def _become(variables: Mapping[str, str], apart: bool, name: str) -> None:
    """Be a process as if begun anew: its session, signals, variables, name and randomness."""
    if apart:
        os.setsid()
    for number in (*process.STOP_SIGNALS, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            usual = number is signal.SIGINT
            signal.signal(number, signal.default_int_handler if usual else signal.SIG_DFL)
    os.environ.update(variables)
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)
    # Else all forks would draw the same where nobody gives a seed; Python's own sees to itself.
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed()


def _begin_anew_without_cuda(command: Sequence[str], keep: Sequence[int]) -> None:
    """Start this process anew if CUDA, which the parent has used, would refuse to work here."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda._is_in_bad_fork():
        for file in keep:
            os.set_inheritable(file, True)
        os.execv(sys.executable, [sys.executable, *command])


def _end(status: int) -> NoReturn:
    try:
        process.leave(status)
    finally:
        os._exit(status or 1)  # standard output may be gone
