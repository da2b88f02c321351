"""Who may join a run over several hosts: whoever knows its token and agrees on what it is.

Before RPC begins every worker meets the server once, over a socket of its own. It proves the
token (:mod:`mpsl_dist.runtime.token`) with its card, and waits for the server's word, which comes
when all workers are there: nothing, or why it is refused.
"""

from __future__ import annotations

import asyncio
import json
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mpsl_dist.errors import LaunchError, RefusedError, RemoteError
from mpsl_dist.runtime.token import PATIENCE, Stranger, answer, challenge, sealed, unsealed

#: Refusals of strangers that are told: a port scan should not fill the log.
_TOLD = 20
#: Seconds between two looks for the server.
_AGAIN = 0.2


@dataclass(frozen=True)
class Card:
    """Who comes, and what must be the same in every process of the run.

    Attributes
    ----------
    rank : int
    host : str
        Its name, for messages.
    facts : mapping of str to Any
        Versions and settings, of types that JSON keeps.
    """

    rank: int
    host: str
    facts: Mapping[str, Any]

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def text(self) -> bytes:
        """Return the card as it travels."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def read(cls, text: bytes) -> Card:
        """Read a card as it travels.

        Raises
        ------
        Stranger
            If the text is none.
        """
        try:
            card = cls(**json.loads(text))
            if isinstance(card.rank, int) and isinstance(card.facts, dict):
                return card
            raise ValueError("other types")
        except (ValueError, TypeError, RecursionError) as error:
            raise Stranger("its card cannot be read") from error

    def disagreement(self, guest: Card) -> str | None:
        """Return where another card differs from this one, the server's."""
        mine, theirs = self.facts, guest.facts
        found = [
            f"{name} is {theirs.get(name)} there and {mine.get(name)} at the server"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]
        return f"{guest} disagrees: {'; '.join(found)}" if found else None


def admit(
    place: tuple[str, int],
    workers: Collection[int],
    card: Card,
    token: bytes,
    timeout: float,
    tell: Callable[[str], None],
) -> None:
    """Let workers in, as the server; returns when all are there and agree.

    A stranger is refused, and keeps nobody from entering.

    Parameters
    ----------
    place : (str, int)
        Address and port to listen on, until then.
    workers : collection of int
        Ranks of those who are to come.
    card : Card
        The server's own.
    timeout : float
        Seconds for all to come.
    tell : callable
        Takes a line for everybody who is refused.

    Raises
    ------
    LaunchError
        If a worker disagrees, or something else listens there.
    RemoteError
        If not all come in time.
    """
    card = Card.read(card.text())  # what JSON makes of it, as it makes of the others'
    asyncio.run(_Door(frozenset(workers), card, token, tell).open(place, timeout))


class _Door:
    """The server's side of the exchange, for all workers at once."""

    def __init__(
        self, workers: frozenset[int], card: Card, token: bytes, tell: Callable[[str], None]
    ) -> None:
        self.workers, self.card, self.token, self.tell = workers, card, token, tell
        self.inside: dict[int, Card] = {}
        self.tasks: set[asyncio.Task[None] | None] = set()
        self.strangers: set[str] = set()  # what was told of them

    async def open(self, place: tuple[str, int], timeout: float) -> None:
        """Listen until all are there, or one disagrees; tell all of them how it ended."""
        self.outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            server = await asyncio.start_server(self.meet, *place)
        except OSError as error:
            raise LaunchError(
                f"cannot listen on {place[0]}:{place[1]}, where workers prove the token "
                f"({error.strerror or error}): set MASTER_PORT to one that has a free one above it"
            ) from error
        async with server:
            await asyncio.wait([self.outcome], timeout=timeout)
            if not self.outcome.done():
                absent = ", ".join(map(str, sorted(self.workers - self.inside.keys())))
                late = f"rank {absent} did not come to {place[0]}:{place[1]} within {timeout:g} s"
                self.outcome.set_exception(RemoteError(f"{late} (runtime.start_timeout)"))
            if self.tasks:
                await asyncio.wait(self.tasks, timeout=PATIENCE)
        self.outcome.result()

    async def meet(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Hear one peer out; a worker's word waits for all the others."""
        address = writer.get_extra_info("peername")[0]
        try:
            nonces, text = await challenge(reader, writer, self.token)
            self.tasks.add(asyncio.current_task())
            word = await self.word_for(Card.read(text), reader)
            writer.write(sealed(self.token, b"word", nonces, word.encode()))
        except Stranger as error:
            line = f"refused {address}, which did not prove the run's token: {error}"
            if line not in self.strangers and len(self.strangers) < _TOLD:
                self.strangers.add(line)
                self.tell(line)
        except asyncio.CancelledError:
            return  # the door has closed; asyncio would log the connection as an error
        finally:
            writer.close()

    async def word_for(self, guest: Card, reader: StreamReader) -> str:
        """Count a worker in while it stays; return why it is refused, or nothing."""
        if guest.rank not in self.workers or guest.rank in self.inside:
            before = self.inside.get(guest.rank)
            why = f"{guest}: {before} came before" if before else f"{guest}: not awaited"
            self.tell(f"refused {why}")
            return why
        self.inside[guest.rank] = guest
        if not self.outcome.done():
            if wrong := self.card.disagreement(guest):
                self.outcome.set_exception(LaunchError(wrong))
            elif self.inside.keys() == self.workers:
                self.outcome.set_result(None)
        leaving = asyncio.ensure_future(reader.read(1))
        await asyncio.wait([self.outcome, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not self.outcome.done():
            del self.inside[guest.rank]
            raise Stranger(f"{guest} left before all were there")
        leaving.cancel()
        return str(self.outcome.exception() or "")


def enter(place: tuple[str, int], card: Card, token: bytes, timeout: float) -> None:
    """Prove the token to the server, as a worker; returns when all workers are there.

    Parameters
    ----------
    place : (str, int)
        Where the server listens; until it does, this waits.
    timeout : float
        Seconds for all of it.

    Raises
    ------
    RefusedError
        If no server comes in time, it does not know the token, or it does not let this worker in.
    """
    try:
        word = asyncio.run(asyncio.wait_for(_enter(place, card, token), timeout))
    except asyncio.TimeoutError as error:
        raise RefusedError(
            f"{card}: no server let it in at {place[0]}:{place[1]} within {timeout:g} s "
            "(runtime.start_timeout): is it running, and no firewall between?"
        ) from error
    except Stranger as error:
        raise RefusedError(f"{card}: no run for it at {place[0]}:{place[1]}: {error}") from error
    if word:
        raise RefusedError(word)


async def _enter(place: tuple[str, int], card: Card, token: bytes) -> str:
    while True:
        try:
            reader, writer = await asyncio.open_connection(*place)
            break
        except OSError:  # it does not listen yet
            await asyncio.sleep(_AGAIN)
    try:
        nonces = await answer(reader, writer, token, card.text())
        return (await unsealed(reader, token, b"word", nonces)).decode()
    except (OSError, EOFError) as error:
        raise Stranger("it closed before all workers were there, and tells why") from error
    finally:
        writer.close()
