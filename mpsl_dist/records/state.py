"""The one way to write, verify and read an owner's state: whole, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mpsl_dist.errors import DiskError, RunError

#: The server's file in the folder of a checkpoint.
SERVER = "server.pt"


def client_file(number: int) -> str:
    """Return the name of a client's file in the folder of a checkpoint."""
    return f"client-{number:04d}.pt"


def save(path: Path, state: Mapping[str, Any]) -> str:
    """Write tensors, numbers and texts such that a file of this name is never half-written.

    Parameters
    ----------
    path : Path
        Folders on the way are created; a file of this name is replaced.

    Returns
    -------
    str
        The file's SHA-256, in hexadecimal digits.

    Raises
    ------
    DiskError
        If it cannot be written; a file of this name then stays as it was, and no part is left.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            stream = _Digesting(file)
            torch.save(dict(state), stream)
            if stream.error is not None:
                raise stream.error
            file.flush()
            os.fsync(file.fileno())  # some disks refuse what they took only now
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise DiskError.of(path, error) from error
    return stream.digest.hexdigest()


def prune(kept: Sequence[Path]) -> None:
    """Remove files of the same name in the folders beside those of these; keep these.

    What cannot be removed stays: it costs room alone.
    """
    for path in kept[:1]:
        for old in path.parent.parent.glob(f"*/{path.name}"):
            if old not in kept:
                with contextlib.suppress(OSError):
                    old.unlink()
                    old.parent.rmdir()  # unless another client has a file there


class _Digesting:
    """A file that is only written to, digested on the way.

    An error of the disk is kept, not raised: torch's writer goes on while it is torn down, and ends
    with an error of its own that hides the cause.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, block: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(block)
                self.digest.update(block)
            except OSError as error:
                self.error = error
        return len(block)

    def flush(self) -> None:
        pass


def damage(path: Path, digest: str | None) -> str | None:
    """Return what is wrong with a file of a checkpoint, naming it; None for a good one.

    Parameters
    ----------
    digest : str or None
        What :func:`save` returned. A checkpoint of an older version has none: its file is good if
        it can be read.
    """
    try:
        if digest is not None and _digest(path) != digest:
            return f"{path}: damaged: its SHA-256 is not the one in manifest.json"
        load(path, lazily=digest is not None)
    except RunError as error:
        return str(error)
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return None


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def load(path: Path, device: str = "cpu", lazily: bool = False) -> dict[str, Any]:
    """Read what :func:`save` wrote; runs no code that the file may hold.

    Parameters
    ----------
    lazily : bool
        Leave the tensors' values on the disk until they are used.

    Raises
    ------
    RunError
        If the file is missing or damaged.
    """
    try:
        found = torch.load(path, map_location=device, weights_only=True, mmap=lazily)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:  # whatever bytes that are no checkpoint make the reader stumble over
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"{path}: no readable checkpoint: {reason}") from error
    if not isinstance(found, dict):
        raise RunError(f"{path}: no readable checkpoint: holds {type(found).__name__}")
    return found


@contextlib.contextmanager
def continuing(path: Path, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """Open a state for its owner to take over; refuse what does not fit this owner.

    Raises
    ------
    RunError
        If the file cannot be read, or the owner stumbles over what it holds.
    """
    found = load(path, device)
    try:
        yield found
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"{path}: is not the state of this run's owner: {reason}") from error
