"""A rendezvous store that listens on one address alone; torch's own listens on every interface."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlparse

from torch.distributed import Store, TCPStore, register_rendezvous_handler

from mpsl_dist.runtime.environment import MEETING
from mpsl_dist.runtime.network import listening_address


def know_meeting() -> None:
    """Teach torch ``rank0://ADDRESS:PORT``, where rank 0 hosts the store."""
    try:
        register_rendezvous_handler(MEETING, _meet)
    except RuntimeError:  # it knows already
        return


def _meet(
    url: str, timeout: timedelta = timedelta(minutes=30), **_: Any
) -> Iterator[tuple[Store, int, int]]:
    place = urlparse(url)
    query = parse_qs(place.query)
    rank, world = int(query["rank"][0]), int(query["world_size"][0])
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
