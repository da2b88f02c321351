"""Which client on which worker."""

from __future__ import annotations


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
