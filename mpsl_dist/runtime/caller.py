"""The program that started this command by the Python API, if one has.

The command ends with it, as on a stop signal, and leaves word in its folder of why a run failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mpsl_dist.errors import Failure

#: In the command's environment: the program's process id, and a folder of its own.
_MARK = "MPSL_DIST_CALLER"
_FAILURE = "failure.json"
#: Seconds between two looks at whether it lives.
_LOOK = 0.5


def variables(folder: Path) -> dict[str, str]:
    """Return the environment variables of a command that this process starts."""
    # Modules are found where this process finds them, and output is there at once.
    paths = os.pathsep.join(path for path in sys.path if path)
    return {_MARK: f"{os.getpid()} {folder}", "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}


def watch() -> Callable[[], bool]:
    """Return what says whether the program is gone; False always where there is none.

    To be called by the process that it started, while the program lives.
    """
    if _MARK not in os.environ:
        return lambda: False
    caller = int(os.environ[_MARK].split()[0])
    return lambda: os.getppid() != caller


def follow() -> None:
    """Stop this process, which starts no others, as on a signal when the program is gone."""
    if _MARK not in os.environ:
        return
    gone = watch()

    def look() -> None:
        while not gone():
            time.sleep(_LOOK)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, name="watch-caller", daemon=True).start()


def tell(error: BaseException) -> None:
    """Leave word of a failure, unless an earlier one has; nothing where no program asks."""
    if _MARK not in os.environ:
        return
    folder = Path(os.environ[_MARK].split(" ", 1)[1])
    failure = {"kind": type(error).__name__, "message": str(error) or type(error).__name__}
    with contextlib.suppress(OSError), (folder / _FAILURE).open("x", encoding="utf-8") as file:
        json.dump(failure, file)


def told(folder: Path) -> Failure | None:
    """Return what the command left word of in this folder."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        found = json.loads((folder / _FAILURE).read_text("utf-8"))
        return Failure(found["message"], "", False, found["kind"])
    return None
