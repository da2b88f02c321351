"""One owner's own samples: a client's to train on, epoch by epoch, and those to test with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from mpsl_dist.data import Batch, Dataset
from mpsl_dist.data.loading import Loaders, Unread
from mpsl_dist.data.partition import mini_batches


@dataclass(frozen=True)
class Damage:
    """How much of some owners' data could not be read, so far.

    Attributes
    ----------
    train_files : int
        Damaged files, each once for every owner that met it.
    replaced : int
        How often another sample of the mini-batch stood in for one that could not be read.
    test_files : int
    left_out : int
        Test samples that count in no result.
    """

    train_files: int = 0
    replaced: int = 0
    test_files: int = 0
    left_out: int = 0

    @classmethod
    def of(cls, train: Unread, test: Unread) -> Damage:
        """Return what one owner has met."""
        return cls(len(train.files), train.times, len(test.files), len(test.positions))

    @classmethod
    def all(cls, owners: Iterable[Damage]) -> Damage:
        """Return the sum over owners."""
        return cls(*map(sum, zip(*map(astuple, owners), strict=True)))


@dataclass(frozen=True)
class Description:
    """What a client tells of its data.

    Attributes
    ----------
    samples, test_samples : int
        How many it has, to train on and to test with.
    modalities : tuple of str
        Those that any of them has; empty where they are all that the data have.
    trained : tuple of str
        Those of them that it trains on; empty likewise.
    """

    samples: int
    test_samples: int
    modalities: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()


class LocalData:
    """The training samples of one client and their order in every epoch.

    The order is a function of (seed, client, epoch) alone, so that a resumed run meets the same
    mini-batches without any saved generator.

    Parameters
    ----------
    dataset : Dataset
        The split; only ``indices`` of it are ever read.
    indices : array
        (samples,) positions in ``dataset``.
    seed, client : int
        The experiment's seed and the client's number.
    loaders : Loaders, optional
        Reads samples ahead; by default they are read when they are asked for.
    modalities : sequence of str
        All that the client sees of a sample; by default everything.
    """

    def __init__(
        self,
        dataset: Dataset,
        indices: NDArray[np.int64],
        seed: int,
        client: int,
        loaders: Loaders | None = None,
        modalities: Sequence[str] = (),
    ) -> None:
        self.indices = indices
        self.modalities = modalities
        self.seed = seed
        self.client = client
        self.epoch = 0
        self._parts: dict[int, list[int]] = {}
        self._reader = (loaders or Loaders([dataset])).reader(dataset)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def unread(self) -> Unread:
        """What could not be read so far."""
        return self._reader.unread

    def begin_epoch(self, epoch: int, counts: Sequence[int], first_step: int = 0) -> None:
        """Lay out an epoch.

        Parameters
        ----------
        epoch : int
            From 0.
        counts : sequence of int
            Samples that this client contributes to each step of the epoch.
        first_step : int
            The step of the epoch to begin at, when resuming.
        """
        self.epoch = epoch
        self._parts = parts = mini_batches(len(self), counts, self.seed, self.client, epoch)
        batches = {s: self.indices[parts[s]].tolist() for s in parts if s >= first_step}
        seed = int(np.random.default_rng([self.seed, self.client, epoch, 1]).integers(2**62))
        self._reader.plan(batches, seed)

    def key(self, step: int) -> tuple[int, ...]:
        """Return what tells this step of the epoch from any other of any client."""
        return self.seed, self.client, self.epoch, step

    def positions(self, step: int) -> list[int]:
        """Return which of its own samples, from 0, are in the mini-batch of this step."""
        return self._parts[step]

    def batch(self, step: int) -> Batch:
        """Return the mini-batch of this step of the epoch; the same one if asked again.

        Raises
        ------
        DataError
            If a file cannot be read and ``data.on_error`` is ``raise``.
        """
        batch = self._reader.batch(step)
        return batch.only(self.modalities) if self.modalities else batch


class TestData:
    """The test samples of one owner, in their order; what cannot be read is left out and counted.

    Parameters
    ----------
    dataset : Dataset
        The split.
    indices : sequence of int, optional
        Positions in it; by default all.
    loaders : Loaders, optional
        Reads samples ahead; by default they are read when they are asked for.
    modalities : sequence of str
        All that the owner sees of a sample; by default everything.
    """

    __test__ = False  # pytest: no test

    def __init__(
        self,
        dataset: Dataset,
        indices: Sequence[int] | None = None,
        loaders: Loaders | None = None,
        modalities: Sequence[str] = (),
    ) -> None:
        self.modalities = modalities
        self.indices = range(len(dataset.labels)) if indices is None else [*map(int, indices)]
        self._reader = (loaders or Loaders([dataset])).reader(dataset)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def unread(self) -> Unread:
        """What could not be read so far."""
        return self._reader.unread

    def lay_out(self, counts: Sequence[int]) -> None:
        """Begin a test with batches of these sizes."""
        ends = np.cumsum(counts).tolist()
        starts = [end - count for end, count in zip(ends, counts, strict=True)]
        pairs = enumerate(zip(starts, ends, strict=True))
        batches = {step: list(self.indices[start:end]) for step, (start, end) in pairs}
        self._reader.plan(batches, seed=None)

    def batch(self, step: int) -> Batch:
        """Return what can be read of this batch, maybe nothing; the same if asked again.

        Raises
        ------
        DataError
            If a file cannot be read and ``data.on_error`` is ``raise``.
        """
        batch = self._reader.batch(step)
        return batch.only(self.modalities) if self.modalities else batch

    def batches(self, size: int) -> Iterator[Batch]:
        """Read all samples, ``size`` at once; raises as :meth:`batch`."""
        counts = batch_sizes(len(self), size)
        self.lay_out(counts)
        return map(self.batch, range(len(counts)))


def batch_sizes(samples: int, size: int) -> list[int]:
    """Return the sizes of the batches that samples are cut into, ``size`` and a rest."""
    return [min(size, samples - start) for start in range(0, samples, size)]
