"""Which client on which worker, and which rank on which GPU."""

from __future__ import annotations

from collections.abc import Sequence


def place(sizes: Sequence[int], workers: int) -> list[list[int]]:
    """Spread clients over workers so that all workers have about equally much data.

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


def place_in_order(clients: int, each: int) -> list[list[int]]:
    """Return the client numbers of worker rank 1, 2, ...: ``each`` in the order of their numbers.

    So a client's number follows from its worker's rank alone.
    """
    return [list(range(first, min(first + each, clients))) for first in range(0, clients, each)]


def gpu_of(local_rank: int, gpus: int, replicas: int) -> int:
    """Return the index of a rank's GPU among those of its node.

    The server's replicas, the first local ranks of their node, have their GPUs to themselves where
    there are more of them.

    Parameters
    ----------
    local_rank, gpus : int
        The rank among those of its node, from 0; the node's GPUs, at least one.
    replicas : int
        Replicas of the server on this node.
    """
    if local_rank < replicas or gpus <= replicas:
        return local_rank % gpus
    return replicas + (local_rank - replicas) % (gpus - replicas)


def replicas_here(replicas: int, first: int, ranks: int) -> int:
    """Return how many of the server's replicas are among these ``ranks`` from ``first`` on."""
    return max(0, min(replicas - first, ranks))
