"""Where the processes of a run meet: one store for the whole run.

RPC's members are fixed once they have met, so when lost workers come back the world is made anew,
by the same store: its next *generation*, with keys of its own
(:mod:`mpsl_dist.runtime.generations`). The store that rank 0 hosts listens on one address alone;
torch's own listens on every interface.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlparse

from torch.distributed import (
    PrefixStore,
    Store,
    TCPStore,
    register_rendezvous_handler,
    rendezvous,
    rpc,
)

from mpsl_dist.errors import RemoteError
from mpsl_dist.runtime.environment import MEETING, Environment
from mpsl_dist.runtime.network import listening_address

#: Scheme of a generation's rendezvous: ``generation://0``.
GENERATION = "generation"
#: What :func:`open_store` opened; torch hands a rendezvous nothing but a URL.
_stores: list[tuple[Iterator[Any], Store]] = []


def open_store(launched: Environment, seconds: float) -> Store:
    """Open the store of a run, which stays open until the process ends.

    Parameters
    ----------
    launched : Environment
    seconds : float
        To reach it, and at a first start for all to reach it.

    Raises
    ------
    RuntimeError
        If it is not reached in time.
    """
    _teach(MEETING, _at_rank0)
    _teach(GENERATION, _generation)
    meeting = rendezvous(
        launched.init_method, launched.rank, launched.world, timeout=timedelta(seconds=seconds)
    )
    store, _, _ = next(meeting)
    _stores.append((meeting, store))
    return store


def number_generation(generation: int, seconds: float) -> None:
    """Have fresh and older processes of a run agree on what torch numbers for itself.

    torch counts a process's starts of RPC and its collectives, by names that are private to it; and
    waits half an hour, whatever it is told, for a process that dies while all meet.

    Parameters
    ----------
    generation : int
        Of the world that is about to start.
    seconds : float
        To wait for the others.
    """
    rpc._init_counter = generation
    rpc.api._all_gather_sequence_id.clear()
    rpc.constants.DEFAULT_PROCESS_GROUP_TIMEOUT = timedelta(seconds=seconds)


def part_of_store(name: str) -> Store:
    """Return a part of the run's store, for processes that meet beside RPC."""
    return PrefixStore(name, _stores[-1][1])


class Notices:
    """What the ranks of a run tell each other while no world stands.

    Parameters
    ----------
    store : Store
        Of the run.
    """

    def __init__(self, store: Store) -> None:
        self._store = PrefixStore("notices", store)

    def say(self, key: str, value: object = "") -> None:
        """Tell all."""
        self._store.set(key, str(value))

    def count(self, key: str) -> None:
        """Add one to what :meth:`told` returns of this key, as a text."""
        self._store.add(key, 1)

    def told(self, key: str) -> str | None:
        """Return what was said, None if nothing was."""
        return self._store.get(key).decode() if self._store.check([key]) else None

    def wait(self, key: str, seconds: float) -> str:
        """Return what was said, as soon as it is.

        Raises
        ------
        RemoteError
            If nobody says it in time.
        """
        try:
            self._store.wait([key], timedelta(seconds=seconds))
        except RuntimeError as error:
            raise RemoteError(f"nobody said {key} within {seconds:g} s") from error
        return self._store.get(key).decode()


def _teach(scheme: str, handler: Any) -> None:
    try:
        register_rendezvous_handler(scheme, handler)
    except RuntimeError:  # torch knows it already
        return


def _at_rank0(
    url: str, timeout: timedelta = timedelta(minutes=30), **_: Any
) -> Iterator[tuple[Store, int, int]]:
    """Meet at ``rank0://ADDRESS:PORT``, where rank 0 hosts the store."""
    place, (rank, world) = urlparse(url), _numbers(url)
    address, port = place.hostname or "", place.port or 0
    hosts, door = rank == 0, None
    if hosts:
        address = listening_address(address)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        door = socket.create_server((address, port), family=family).detach()
    store = TCPStore(
        address, port, world, hosts, timeout, False, master_listen_fd=door, use_libuv=True
    )
    yield store, rank, world
    raise RuntimeError("processes meet once")


def _generation(url: str, **_: Any) -> Iterator[tuple[Store, int, int]]:
    """Meet in a part of the run's store that no other generation has used."""
    _, store = _stores[-1]
    rank, world = _numbers(url)
    yield PrefixStore(f"{GENERATION} {urlparse(url).netloc}", store), rank, world
    raise RuntimeError("a generation meets once")


def _numbers(url: str) -> tuple[int, int]:
    query = parse_qs(urlparse(url).query)
    return int(query["rank"][0]), int(query["world_size"][0])
