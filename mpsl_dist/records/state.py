"""The one way to write and read an owner's state: whole, or not at all."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mpsl_dist.errors import RunError


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers and texts such that a file of this name is never half-written.

    Parameters
    ----------
    path : Path
        Folders on the way are created; a file of this name is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(dict(state), partial)
    partial.replace(path)


def load(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Read what :func:`save` wrote; runs no code that the file may hold.

    Raises
    ------
    RunError
        If the file is missing or damaged.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"{path}: no readable checkpoint: {reason}") from error
