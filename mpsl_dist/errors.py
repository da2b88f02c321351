"""Whose mistake it is, decided once.

A :class:`UserError` is the user's to mend: the command line prints its message without a traceback
and exits with status 2. Everything else is a failure of the run, and exits with status 1.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class UserError(ValueError):
    """Something that the user can mend; the message names the file or key and what to do."""


class ConfigError(UserError):
    """A configuration or command line that cannot be run; every problem at once, one a line."""


class DataError(UserError):
    """Data that is missing, damaged or too small."""

    #: The file whose fault it is, where it is that of one.
    file: str | None = None


class WeightsError(UserError):
    """Initial weights that cannot be had, or do not fit the model."""


class RunError(UserError):
    """A run directory that stands in the way, is damaged, or cannot be resumed."""


class ResumeError(RunError):
    """A run that cannot go on from what it left; nothing of it has been changed."""


class LaunchError(UserError):
    """Processes that cannot find themselves or each other; the message says what to set."""


class RefusedError(LaunchError):
    """A worker that no server lets into its run; the server's user reads of it there."""


class DiskError(OSError):
    """A file that the disk did not take; the message names it and says what to do."""

    @classmethod
    def of(cls, path: Path, error: OSError) -> DiskError:
        """Describe what writing a file has met."""
        if isinstance(error, DiskError):
            return error
        number = "" if error.errno is None else f"[Errno {error.errno}] "
        reason = error.strerror or str(error)
        return cls(
            f"{number}{reason}: {path} cannot be written; make room there or make it writable, "
            "then continue with --resume"
        )


class DivergedError(ArithmeticError):
    """A loss or gradient that is no finite number, or a parameter that it has spoiled."""


class NonFiniteError(DivergedError):
    """A loss or gradient of some clients that is no finite number; nothing has moved.

    Parameters
    ----------
    clients : sequence of int
        Whose it is; empty if it is of the global batch.
    whose : str
        The same in words, as "step 17: the loss of client 3".
    """

    def __init__(self, clients: Sequence[int], whose: str, value: float = math.nan) -> None:
        super().__init__(
            f"{whose} is {value}; no parameter was changed by this step. "
            "Lower training.server.lr and training.client.lr"
        )
        self.clients = tuple(clients)


class RemoteError(RuntimeError):
    """A client or worker failed; the message names it, the phase and the step.

    Parameters
    ----------
    message : str
    details : str
        The traceback there, where there is one.
    user_error : bool
        Whether the cause is the user's to mend (a :class:`UserError` there).
    lost : tuple of int
        The clients that did not answer.
    """

    def __init__(
        self,
        message: str,
        details: str = "",
        user_error: bool = False,
        lost: tuple[int, ...] = (),
    ) -> None:
        super().__init__(message)
        self.details = details
        self.user_error = user_error
        self.lost = lost


class BackwardError(RemoteError):
    """A backward through all processes failed though all are there; nothing tells whose it was."""


@dataclass(frozen=True)
class Failure:
    """An exception as it travels between processes, which would else keep only its text.

    Attributes
    ----------
    message : str
        The exception's type and text.
    details : str
        The traceback where it was raised.
    user_error : bool
        Whether it was a :class:`UserError`.
    kind : str
        Name of the exception's class.
    """

    message: str
    details: str
    user_error: bool
    kind: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe an exception that is being handled."""
        message = f"{type(error).__name__}: {error}"
        kind = type(error).__name__
        return cls(message, traceback.format_exc(), isinstance(error, UserError), kind)
