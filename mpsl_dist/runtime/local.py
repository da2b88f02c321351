"""Clients of this very process behind the face of :class:`~mpsl_dist.runtime.fleet.Fleet`.

The same messages reach the same actors, without RPC: for tests, and for whoever wants to look at
every message of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from mpsl_dist.errors import Failure
from mpsl_dist.runtime.answers import Answers, Lost


class Serves(Protocol):
    """What hosts clients: :class:`mpsl_dist.actors.host.Host`."""

    clients: Mapping[int, Any]

    def serve(
        self,
        message: str,
        arguments: Mapping[int, Sequence[Any]],
        gradients: Mapping[Tensor, Tensor] | None = None,
    ) -> dict[int, Any]:
        """Call a method of these clients; an answer or a Failure each."""
        ...


class LocalAutograd:
    """One backward in this process, as :class:`~mpsl_dist.runtime.fleet.Autograd` is over RPC."""

    def __init__(self) -> None:
        self._gradients: dict[Tensor, Tensor] = {}

    def backward(self, loss: Tensor, where: str) -> None:
        """Run the backward; ``.grad`` of the parameters stays as it is."""
        leaves = _leaves(loss)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        pairs = zip(leaves, found, strict=True)
        self._gradients = {leaf: gradient for leaf, gradient in pairs if gradient is not None}

    def gradients(self) -> dict[Tensor, Tensor]:
        """Return the gradients of all owners' parameters: here they share a process."""
        return self._gradients


def _leaves(loss: Tensor) -> list[Tensor]:
    """Return the parameters that a loss was computed from."""
    found: dict[Tensor, None] = {}
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[node.variable] = None
        waiting.extend(following for following, _ in node.next_functions)
    return list(found)


class LocalFleet:
    """The face of a :class:`~mpsl_dist.runtime.fleet.Fleet` over one host in this process.

    Parameters
    ----------
    host : Serves
    """

    def __init__(self, host: Serves) -> None:
        self.host = host
        #: Numbers of all clients, ascending.
        self.clients = sorted(host.clients)

    def start(
        self,
        message: str,
        arguments: Mapping[int, Sequence[Any]],
        where: str = "",
        autograd: LocalAutograd | None = None,
    ) -> Callable[[], Answers]:
        """Call a method of these clients at once; the function returned gives the answers."""
        gradients = autograd.gradients() if autograd else None
        outcomes = self.host.serve(message, arguments, gradients)
        found = {n: x for n, x in outcomes.items() if not isinstance(x, Failure)}
        lost = {
            n: Lost(f"{message}, {where}: client {n}: {x.message}", x.details, x.user_error, x.kind)
            for n, x in outcomes.items()
            if isinstance(x, Failure)
        }
        return lambda: Answers(found, lost)

    @contextmanager
    def autograd(self, clients: Sequence[int]) -> Iterator[LocalAutograd]:
        """Open what the gradients of one backward through these clients live in."""
        yield LocalAutograd()

    def where(self, client: int) -> str:
        """Return a client as a user reads it."""
        return f"client {client}"

    def returned(self) -> list[int]:
        """Return nobody: there are no workers to come back."""
        return []

    def idle(self, clients: Collection[int]) -> list[int]:
        """Return nobody: who is in this process is never too slow."""
        return []
