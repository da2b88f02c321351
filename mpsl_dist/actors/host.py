"""The host: it serves the clients of one worker, one by one, with an outcome each.

Nothing of one client reaches another: an error is the answer of its client alone, and every client
receives the gradients of its own parameters alone, though all of a worker's come from one backward.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from mpsl_dist.errors import Failure

_log = logging.getLogger("mpsl_dist")


class Hosted(Protocol):
    """What a host asks of a client."""

    number: int

    def parameters(self) -> Sequence[Tensor]:
        """Return the parameters that this client steps."""
        ...


class Host:
    """The clients of one process.

    Parameters
    ----------
    clients : iterable of Hosted
    device : str
        Where they compute.
    """

    def __init__(self, clients: Iterable[Hosted], device: str = "cpu") -> None:
        self.clients = {client.number: client for client in clients}
        self.device = device
        self._serving: set[int] = set()

    @property
    def idle(self) -> bool:
        """Whether no message is being served."""
        return not self._serving

    def serve(
        self,
        message: str,
        arguments: Mapping[int, Sequence[Any]],
        gradients: Mapping[Tensor, Tensor] | None = None,
    ) -> dict[int, Any]:
        """Call a method of some clients.

        Parameters
        ----------
        message : str
            A public method of the clients.
        arguments : mapping of int to sequence
            Client number -> positional arguments.
        gradients : mapping of Tensor to Tensor, optional
            This process's gradients of a backward. Every client receives those of its own
            parameters, as a last argument.

        Returns
        -------
        dict of int to Any
            What each client returned, or a :class:`~mpsl_dist.errors.Failure`.
        """
        outcomes: dict[int, Any] = {}
        thread = threading.get_ident()
        self._serving.add(thread)
        try:
            for number, words in arguments.items():
                outcomes[number] = self._ask(number, message, words, gradients)
        finally:
            self._serving.discard(thread)
        return outcomes

    def _ask(
        self,
        number: int,
        message: str,
        words: Sequence[Any],
        gradients: Mapping[Tensor, Tensor] | None,
    ) -> Any:
        try:
            client = self.clients[number]
            own = () if gradients is None else (_own(client, gradients),)
            return getattr(client, message)(*words, *own)
        except Exception as error:
            _log.exception("client %d failed in %s", number, message)
            return Failure.of(error)


def _own(client: Hosted, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    return {p: gradients[p] for p in client.parameters() if p in gradients}
