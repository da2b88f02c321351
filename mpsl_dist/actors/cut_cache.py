"""Smashed activations that the server keeps, so that a client sends those of a sample once.

Where tokenizers are frozen and nothing augments the data, a sample's activations never change. The
server alone decides what it lacks: which samples a mini-batch has is a function of the experiment's
seed (:func:`mpsl_dist.data.partition.mini_batches`), so it asks for single rows, and a client keeps
no account that could be wrong after an abandoned step, a return or a resumed run.

Shape legend: ``b`` a client's mini-batch, ``l`` length in tokens, ``d`` width.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mpsl_dist.actors.server import Server
from mpsl_dist.config import Experiment
from mpsl_dist.data.partition import mini_batches

#: Smashed activations by client: early fusion one (b, l, d), late fusion one per modality.
Smashed = dict[int, list[Tensor]]
#: Has clients tokenize rows of their mini-batches: client -> (step, rows).
Ask = Callable[[Mapping[int, tuple[Any, ...]]], Smashed]
T = TypeVar("T")


def cut_cache_of(experiment: Experiment, server: Server) -> CutCache | None:
    """Return the experiment's cache; None where it has none.

    With ``wire.cache_prefix`` the server is told to begin after its frozen blocks.
    """
    if not experiment.wire.cache:
        return None
    if not experiment.wire.cache_prefix:
        return CutCache(experiment.seed, limit_of(experiment))
    server.begin = server.model.encoder.frozen_blocks
    return CutCache(experiment.seed, limit_of(experiment), server.encode_prefix)


def limit_of(experiment: Experiment) -> int | None:
    """Return the bytes that a cache may hold; None where nothing limits it."""
    mebibytes = experiment.wire.cache_limit
    return None if mebibytes is None else mebibytes * 2**20


class Aging(Generic[T]):
    """Values of samples, by client and position; beyond a limit the oldest are dropped.

    Parameters
    ----------
    limit : int, optional
        In bytes.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        #: Bytes of all values together.
        self.size = 0
        self._kept: OrderedDict[tuple[int, int], tuple[T, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, client: int, position: int) -> T | None:
        """Return a sample's value, None if it is not there."""
        found = self._kept.get((client, position))
        return None if found is None else found[0]

    def put(self, client: int, position: int, value: T, size: int) -> None:
        """Keep a sample's value of so many bytes, as the youngest."""
        self._drop((client, position))
        self._kept[client, position] = (value, size)
        self.size += size
        while self.limit is not None and self.size > self.limit:
            self._drop(next(iter(self._kept)))

    def forget(self, clients: Collection[int]) -> None:
        """Drop all that is of these clients."""
        for key in [key for key in self._kept if key[0] in clients]:
            self._drop(key)

    def _drop(self, key: tuple[int, int]) -> None:
        if key in self._kept:
            self.size -= self._kept.pop(key)[1]


class CutCache:
    """The activations that have arrived, every sample's as a copy of its own.

    Parameters
    ----------
    seed : int
        The experiment's, of which the order of every client's samples is drawn.
    limit : int, optional
        Bytes that it may hold; beyond them the oldest are dropped, and asked for again when needed.
    through : callable, optional
        What arrives is sent through it, and its results are kept in their place.
    """

    def __init__(
        self,
        seed: int,
        limit: int | None = None,
        through: Callable[[Smashed], Smashed] | None = None,
    ) -> None:
        self.seed = seed
        self.through = through
        self.kept: Aging[list[Tensor]] = Aging(limit)
        self._parts: dict[int, dict[int, list[int]]] = {}
        # Naive PSL asks for every client on a thread of its own.
        self._lock = threading.Lock()

    def begin_epoch(self, epoch: int, counts: Mapping[int, Sequence[int]]) -> None:
        """Lay out an epoch, as the clients do by themselves.

        Parameters
        ----------
        counts : mapping of int to sequence of int
            Client -> samples that it contributes to each step of the epoch, all of it has.
        """
        self._parts = {
            n: mini_batches(sum(own), own, self.seed, n, epoch) for n, own in counts.items()
        }

    def forget(self, clients: Collection[int]) -> None:
        """Drop what came from these clients, whose processes are new."""
        with self._lock:
            self.kept.forget(clients)

    def complete(self, step: int, clients: Sequence[int], ask: Ask) -> Smashed:
        """Return the activations of whole mini-batches, having asked for what is lacking.

        Parameters
        ----------
        step : int
            Of the epoch, from 0.
        ask : callable
            Is given client -> (step, rows lacking), of those clients of which any are.
        """
        parts = {n: self._parts[n][step] for n in clients}
        with self._lock:
            # Held from here on: what arrives may push them out.
            rows = {n: [self.kept.get(n, p) for p in parts[n]] for n in clients}
        lacking = {n: [i for i, row in enumerate(rows[n]) if row is None] for n in clients}
        asked = {n: (step, wanted) for n, wanted in lacking.items() if wanted}
        sent = ask(asked) if asked else {}
        if sent and self.through is not None:
            sent = self.through(sent)
        with self._lock:
            for n, tensors in sent.items():
                arrived = zip(*(x_bld.unbind() for x_bld in tensors), strict=True)
                for i, row in zip(lacking[n], arrived, strict=True):
                    rows[n][i] = own = [x_ld.clone() for x_ld in row]
                    self.kept.put(n, parts[n][i], own, sum(x_ld.nbytes for x_ld in own))
        return {n: [torch.stack(own) for own in zip(*rows[n], strict=True)] for n in clients}
