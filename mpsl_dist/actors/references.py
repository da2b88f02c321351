"""A client's handle on its tokenizers: over RPC the server needs one of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn


class Reference(Protocol):
    """A handle on an object that lives here: an RRef on a worker."""

    def local_value(self) -> Any:
        """Return the object."""
        ...


@dataclass(frozen=True)
class Local:
    """A :class:`Reference` where no RPC runs: one process, tests."""

    value: nn.Module

    def local_value(self) -> nn.Module:
        """Return the object."""
        return self.value
