"""Clients of this process behind the server's links, with every call remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpsl_dist.actors.host import Host
from mpsl_dist.methods.link import RoundLink, SplitLink
from mpsl_dist.records.traffic import Traffic
from mpsl_dist.runtime.answers import Answers
from mpsl_dist.runtime.local import LocalFleet


class WatchedFleet(LocalFleet):
    """Remembers (message, clients) of every call."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.calls: list[tuple[str, list[int]]] = []

    def start(
        self,
        message: str,
        arguments: Mapping[int, Sequence[Any]],
        where: str = "",
        autograd: Any = None,
    ) -> Callable[[], Answers]:
        self.calls.append((message, list(arguments)))
        return super().start(message, arguments, where, autograd)


class LocalRounds(RoundLink):
    """A link to federated clients of this process."""

    def __init__(self, clients: Sequence[Any]) -> None:
        super().__init__(WatchedFleet(Host(clients)), Traffic(len(clients)))
        self.references, self.calls = self.fleet.host.clients, self.fleet.calls


class LocalSplit(SplitLink):
    """A link to split learning's clients of this process."""

    def __init__(self, clients: Sequence[Any]) -> None:
        super().__init__(WatchedFleet(Host(clients)), Traffic(len(clients)))
        self.references, self.calls = self.fleet.host.clients, self.fleet.calls
