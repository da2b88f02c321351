"""Which client on which worker."""

from __future__ import annotations

from collections.abc import Sequence


def place(clients: int, workers: int) -> list[list[int]]:
    """Spread clients over workers in order, as evenly as can be.

    Returns
    -------
    list of list of int
        Client numbers of worker rank 1, 2, ...
    """
    each, more = divmod(clients, workers)
    placed, first = [], 0
    for worker in range(workers):
        count = each + (worker < more)
        placed.append(list(range(first, first + count)))
        first += count
    return placed


def place_by_size(sizes: Sequence[int], workers: int) -> list[list[int]]:
    """Spread clients over workers so that each worker has about as much data.

    The largest client goes first, to the worker with the least data so far; none gets more clients
    than an even split would give it, because every client costs memory too.

    Parameters
    ----------
    sizes : sequence of int
        Training samples of client 0, 1, ...
    workers : int

    Returns
    -------
    list of list of int
        Client numbers of worker rank 1, 2, ..., each list in ascending order.
    """
    most = -(-len(sizes) // workers)
    placed: list[list[int]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for client in sorted(range(len(sizes)), key=lambda client: (-sizes[client], client)):
        free = [worker for worker in range(workers) if len(placed[worker]) < most]
        worker = min(free, key=lambda worker: (loads[worker], len(placed[worker]), worker))
        placed[worker].append(client)
        loads[worker] += sizes[client]
    return [sorted(clients) for clients in placed]
