"""Mini-batches, read ahead of their use by processes that live as long as the run."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from mpsl_dist.data.dataset import Batch, Dataset
from mpsl_dist.errors import DataError

_log = logging.getLogger("mpsl_dist")


@dataclass
class Unread:
    """What a reader has met that could not be read.

    Attributes
    ----------
    files : dict of str to str
        File -> why.
    positions : set of int
        The samples, by their positions in the split.
    times : int
        How often such a sample was asked for.
    """

    files: dict[str, str] = field(default_factory=dict)
    positions: set[int] = field(default_factory=set)
    times: int = 0

    def add(self, batch: Batch) -> None:
        """Count what a mini-batch could not read; every file is logged once."""
        for position, (file, why) in batch.unreadable.items():
            self.positions.add(position)
            self.times += 1
            if file not in self.files:
                self.files[file] = why
                _log.warning("cannot be read (%d so far): %s", len(self.files), why)

    def state(self) -> dict[str, Any]:
        """Return everything, as a checkpoint keeps it."""
        return {"files": self.files, "positions": sorted(self.positions), "times": self.times}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Continue from :meth:`state`; None, of an older checkpoint, is nothing."""
        if state is not None:
            self.files, self.times = dict(state["files"]), state["times"]
            self.positions = set(state["positions"])


class _Request(NamedTuple):
    """A mini-batch to read: the reader's number and its step, and what is asked for."""

    key: tuple[int, int]
    dataset: int
    positions: Sequence[int]
    seed: int | None


@dataclass(frozen=True)
class _Fetcher:
    """What a loader process runs: one item is one whole mini-batch."""

    datasets: Sequence[Dataset]

    def __getitem__(self, request: _Request) -> tuple[tuple[int, int], Batch | DataError]:
        try:
            dataset = self.datasets[request.dataset]
            return request.key, dataset.fetch(request.positions, request.seed)
        except DataError as error:  # DataLoader would put a traceback into its message
            return request.key, error


class Loaders:
    """Loader processes, shared by all readers of this process.

    They are forked at the first use, after one mini-batch was read here: what reading needs (a
    tokenizer, mel filters) is then built in each of them, once for all epochs.

    Parameters
    ----------
    datasets : sequence of Dataset
        All that may be read.
    each : int
        Processes for each reader, together at most one a core; 0 reads on demand, in this process.
    """

    def __init__(self, datasets: Sequence[Dataset], each: int = 0) -> None:
        self._fetcher = _Fetcher(datasets)
        self._each = each
        self._readers = 0
        #: Reader -> step -> what it will ask for; what of it was read already; what is to be read.
        self._planned: dict[int, dict[int, _Request]] = {}
        self._ready: dict[tuple[int, int], Batch | DataError] = {}
        self._order: list[_Request] = []
        self._loader: DataLoader | None = None
        self._stream: Iterator | None = None
        # Clients may be served by threads of their own.
        self._lock = threading.Lock()

    def reader(self, dataset: Dataset) -> Reader:
        """Return a reader of one of the datasets."""
        number = next(n for n, one in enumerate(self._fetcher.datasets) if one is dataset)
        self._readers += 1
        return Reader(self, self._readers - 1, number)

    def plan(self, reader: int, requests: Sequence[_Request]) -> None:
        """Replace what a reader will ask for."""
        with self._lock:
            self._forget(reader)
            self._planned[reader] = {request.key[1]: request for request in requests}
            self._stream = None

    def take(self, key: tuple[int, int]) -> Batch:
        """Return what was planned for (reader, step); the reader's earlier steps are dropped.

        Raises
        ------
        DataError
            If a file cannot be read and that is not allowed.
        """
        reader, step = key
        assert step in self._planned.get(reader, ()), f"step {step} is past or empty"
        if not self._each:
            outcome = self._fetcher[self._planned[reader].pop(step)][1]
        else:
            with self._lock:
                outcome = self._read_ahead(key)
        if isinstance(outcome, DataError):
            raise outcome
        return outcome

    def _read_ahead(self, key: tuple[int, int]) -> Batch | DataError:
        reader, step = key
        self._forget(reader, before=step)
        if self._stream is None:
            self._stream = self._start(key)
        while key not in self._ready:
            (other, later), outcome = next(self._stream)
            if later in self._planned[other]:
                self._ready[other, later] = outcome
        del self._planned[reader][step]
        return self._ready.pop(key)

    def _start(self, key: tuple[int, int]) -> Iterator:
        """Have everything read that is planned: step by step, as it will be asked for."""
        if self._loader is None:
            self._ready[key] = self._fetcher[self._planned[key[0]][key[1]]][1]
        planned = [request for steps in self._planned.values() for request in steps.values()]
        waiting = [request for request in planned if request.key not in self._ready]
        self._order[:] = sorted(waiting, key=lambda request: request.key[::-1])
        if self._loader is None:
            self._loader = self._fork(sum(map(bool, self._planned.values())))
        return iter(self._loader)

    def _fork(self, readers: int) -> DataLoader:
        mine = getattr(os, "sched_getaffinity", None)  # absent on macOS
        cores = len(mine(0)) if mine else os.cpu_count() or 1
        processes = min(self._each * readers, max(cores, self._each))
        return DataLoader(
            self._fetcher,
            batch_size=None,
            sampler=self._order,
            num_workers=processes,
            # The next two steps of every reader.
            prefetch_factor=max(2, -(-2 * readers // processes)),
            persistent_workers=True,
            generator=torch.Generator(),  # no draw from the one that training may use
        )

    def _forget(self, reader: int, before: int | None = None) -> None:
        steps = self._planned.get(reader, {})
        for step in [step for step in steps if before is None or step < before]:
            del steps[step]
            self._ready.pop((reader, step), None)


class Reader:
    """One owner's mini-batches of a split, step by step; see :meth:`Loaders.reader`.

    Attributes
    ----------
    unread : Unread
        What could not be read so far.
    """

    def __init__(self, loaders: Loaders, number: int, dataset: int) -> None:
        self._loaders = loaders
        self._number = number
        self._dataset = dataset
        self._current: tuple[int, Batch] | None = None
        self.unread = Unread()

    def plan(self, batches: Mapping[int, Sequence[int]], seed: int | None) -> None:
        """Lay out mini-batches.

        Parameters
        ----------
        batches : mapping of int to sequence of int
            Step -> positions of its samples.
        seed : int or None
            Passed to :meth:`mpsl_dist.data.Dataset.fetch`.
        """
        self._current = None
        requests = [
            _Request((self._number, step), self._dataset, positions, seed)
            for step, positions in batches.items()
        ]
        self._loaders.plan(self._number, requests)

    def batch(self, step: int) -> Batch:
        """Return the mini-batch of a step; the same one if asked again, no earlier one after that.

        Raises
        ------
        DataError
            If a file cannot be read and that is not allowed.
        """
        if self._current is None or self._current[0] != step:
            batch = self._loaders.take((self._number, step))
            self.unread.add(batch)
            self._current = (step, batch)
        return self._current[1]
