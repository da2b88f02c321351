"""Clients of one process behind the face of ``rpc.Fleet``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class LocalFleet:
    """Calls the clients directly, and remembers every call."""

    def __init__(self, clients: Sequence[Any]) -> None:
        self.references = dict(enumerate(clients))
        self.workers = {"here": list(self.references)}
        self.calls: list[tuple[str, list[int]]] = []

    def __len__(self) -> int:
        return len(self.references)

    def call(
        self, method: str, arguments: Mapping[int, Sequence[Any]], where: str = ""
    ) -> dict[int, Any]:
        """Call a method of these clients."""
        self.calls.append((method, list(arguments)))
        return {n: getattr(self.references[n], method)(*a) for n, a in arguments.items()}

    def start(
        self, method: str, arguments: Mapping[int, Sequence[Any]], where: str = ""
    ) -> Callable[[], dict[int, Any]]:
        """The same; already done when it is waited for."""
        answers = self.call(method, arguments, where)
        return lambda: answers
