"""How a command ends: what it says to its user, and with which status."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from mpsl_dist.errors import UserError
from mpsl_dist.runtime import caller


def user_error(error: UserError, told: bool) -> int:
    """Print a mistake and return the exit status; ``told`` if rank 0 has told its own user."""
    if not told and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        # Rank 0 meets the same error. Ending first would make a launcher end rank 0 before it can
        # say so; then the launcher ends this process. Where rank 0 meets no error (this host lacks
        # a plugin or a file), it waits for this process.
        time.sleep(60)
    caller.tell(error)
    say(str(error))
    return 2


def say(message: str) -> None:
    """Print an error, a line of its own for each."""
    print("\n".join(f"error: {line}" for line in message.splitlines()), file=sys.stderr, flush=True)


def status_of(error: Exception) -> int:
    """Return the exit status: 2 where it is the user's mistake, here or on a worker."""
    return 2 if getattr(error, "user_error", isinstance(error, UserError)) else 1


def attempt(what: str, write: Callable[[], object]) -> bool:
    """Write something that the run's outcome does not hang on; return whether it was written."""
    try:
        write()
    except Exception as error:
        print(f"{what} could not be written: {error}", file=sys.stderr)
        return False
    return True


def leave(status: int) -> NoReturn:
    """End the process without Python's own end, which takes seconds."""
    from mpsl_dist.runtime import process

    try:
        process.leave(status)
    except OSError:  # standard output may lie on the disk that is full
        os._exit(status)
