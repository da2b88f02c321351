"""What comes back when a server asks its clients: an answer each, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpsl_dist.errors import RemoteError

#: Clients that a message names one by one.
_NAMED = 25


@dataclass(frozen=True)
class Lost:
    """Why a client gave no answer.

    Attributes
    ----------
    message : str
        Names worker, client, phase and step.
    details : str
        The traceback there, where there is one.
    user_error : bool
        Whether the cause is the user's to mend.
    kind : str
        Name of the exception's class there; empty where nothing came back.
    """

    message: str
    details: str = ""
    user_error: bool = False
    kind: str = ""


class ClientsLost(RemoteError):
    """Clients gave no answer, or took no part in a backward.

    Parameters
    ----------
    by_client : mapping of int to Lost
        The clients; the first one's words are the message.
    """

    def __init__(self, by_client: Mapping[int, Lost]) -> None:
        first = next(iter(by_client.values()))
        super().__init__(first.message, first.details, first.user_error, tuple(by_client))
        self.by_client = dict(by_client)


@dataclass(frozen=True)
class Answers:
    """What the clients answered. What a loss means is for the method to decide.

    Attributes
    ----------
    by_client : mapping of int to Any
        In the order of the client numbers.
    lost : mapping of int to Lost
        The clients that were asked and gave no answer.
    """

    by_client: Mapping[int, Any]
    lost: Mapping[int, Lost] = field(default_factory=dict)

    def all(self) -> dict[int, Any]:
        """Return every answer.

        Raises
        ------
        ClientsLost
            If any client was lost.
        """
        if self.lost:
            raise ClientsLost(self.lost)
        return dict(self.by_client)


def name_clients(numbers: Sequence[int]) -> str:
    """Return ``client 3``, ``clients 2-5`` or ``clients 1, 4``; of very many the first few."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) == 1:
        return f"client {first}"
    if list(numbers) == list(range(first, last + 1)):
        return f"clients {first}-{last}"
    if len(numbers) > _NAMED:
        some = ", ".join(map(str, numbers[:_NAMED]))
        return f"clients {some} and {len(numbers) - _NAMED} more"
    return "clients " + ", ".join(map(str, numbers))
