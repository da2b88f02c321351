"""A run directory belongs to one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import struct
from pathlib import Path
from typing import IO

from mpsl_dist.errors import RunError

#: The file in the run directory that is locked; it is never removed, since a lock is on the file
#: and not on its name.
LOCK = ".lock"
#: Linux's ``struct flock``: kind, whence, start, length, process.
_FLOCK = "hhqqi"


def take(folder: Path) -> IO[str]:
    """Take a run directory for this process, for as long as the file returned is open.

    The system releases it when the process ends, however it ends. The lock is a process's own
    (``fcntl.lockf``): loader processes, which are forks of it, do not keep it alive. For the same
    reason no other place of the process may open and close the file, which would release it.

    Parameters
    ----------
    folder : Path
        Exists.

    Raises
    ------
    RunError
        If another process has it.
    OSError
        If the file cannot be written.
    """
    path = folder / LOCK
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _lock(file, fcntl.LOCK_EX, folder)
            still_there = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except FileNotFoundError:
            still_there = False
        except BaseException:
            file.close()
            raise
        if still_there:
            break
        file.close()  # somebody removed the directory meanwhile
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # the lock holds without the words
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
    return file


def refuse_if_taken(folder: Path) -> None:
    """Refuse a run directory that another process has taken; take nothing.

    Raises
    ------
    RunError
        If another process has it.
    """
    try:
        file = (folder / LOCK).open(encoding="utf-8")
    except OSError:
        return  # there is none; or taking it will tell
    with file:
        _lock(file, fcntl.LOCK_SH, folder)


def holder(folder: Path) -> tuple[bool | None, str]:
    """Return whether another process has a run directory, and who had it last; take nothing.

    Unlike :func:`refuse_if_taken` it gets in nobody's way, however often it is asked.

    Returns
    -------
    taken : bool or None
        None where nothing tells: no lock was ever taken, or not on this host, whose file system
        may not tell of other hosts' locks.
    who : str
        "process 17 on node3", or empty.
    """
    try:
        with (folder / LOCK).open("rb") as file:
            who = file.read(200).decode(errors="replace").strip()
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0]
    except OSError:
        return None, ""
    if kind != fcntl.F_UNLCK:
        return True, who
    return (False if who.endswith(f" on {platform.node()}") else None), who


def _lock(file: IO[str], kind: int, folder: Path) -> None:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks: nobody can have it
        file.seek(0)
        holder = file.read(200).strip() or "another process"
        raise RunError(
            f"{folder} is in use by {holder}; wait until it ends, end it, or choose another name="
        ) from error
