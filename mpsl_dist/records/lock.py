"""A run directory belongs to one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
from pathlib import Path
from typing import IO

from mpsl_dist.errors import RunError

#: The file in the run directory that is locked; it is never removed, since a lock is on the file
#: and not on its name.
LOCK = ".lock"


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
