"""Decoded inputs on disk, so that a file is decoded once and not once an epoch and process."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

#: Part of every key: raise it when the result of decoding changes.
_VERSION = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cache:
    """A folder of decoded tensors; many processes may share it, and it may be removed any time.

    An entry is bound to its file's path, size and time of change. It holds raw data in the clear,
    as the files do: keep it where the files may lie.
    """

    folder: Path

    def get(self, path: str | Path, view: str, make: Callable[[], Tensor]) -> Tensor:
        """Return ``make()`` of a file, read from the cache where it has the whole entry.

        Parameters
        ----------
        view : str
            What ``make`` does, with all its parameters: a part of the entry's key.
        make : callable
            Decodes the file; its result is kept.
        """
        try:
            status = os.stat(path)
        except OSError:
            return make()  # raises what is wrong with the file
        key = f"{_VERSION} {os.path.abspath(path)} {status.st_size} {status.st_mtime_ns} {view}"
        name = hashlib.sha256(key.encode()).hexdigest()
        entry = self.folder / name[:2] / f"{name[2:]}.npy"
        try:
            return torch.from_numpy(np.load(entry, allow_pickle=False))
        except (OSError, ValueError, EOFError):
            pass  # not there yet, or damaged
        value = make()
        try:
            self._write(entry, value)
        except OSError as error:
            # A full disk makes input slower, it must not end a training run.
            _log.warning("data.cache: %s", error)
        return value

    def _write(self, entry: Path, value: Tensor) -> None:
        """Write aside and rename: another process sees the whole entry or none."""
        entry.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=entry.parent, suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.save(file, value.numpy(), allow_pickle=False)
            os.replace(aside, entry)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
