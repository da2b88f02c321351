"""One client's own samples, epoch by epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mpsl_dist.data import Batch, Dataset, load_batches
from mpsl_dist.data.partition import epoch_order


class LocalData:
    """The samples of one client and their order in every epoch.

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
    loaders : int
        Processes that load samples ahead; 0 loads in this one.
    """

    def __init__(
        self, dataset: Dataset, indices: NDArray[np.int64], seed: int, client: int, loaders: int = 0
    ) -> None:
        self.dataset = dataset
        self.indices = indices
        self.seed = seed
        self.client = client
        self.loaders = loaders
        self._batches: Iterator[Batch] = iter(())
        self._steps: list[int] = []
        self._current: tuple[int, Batch] | None = None

    def __len__(self) -> int:
        return len(self.indices)

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
        order = self.indices[epoch_order(len(self.indices), self.seed, self.client, epoch)]
        ends = np.cumsum(counts)
        self._steps = [s for s in range(first_step, len(counts)) if counts[s] > 0]
        batches = [order[ends[s] - counts[s] : ends[s]].tolist() for s in self._steps]
        seed = int(np.random.default_rng([self.seed, self.client, epoch, 1]).integers(2**62))
        self._batches = load_batches(self.dataset, batches, seed, self.loaders)
        self._current = None

    def batch(self, step: int) -> Batch:
        """Return the mini-batch of this step of the epoch; the same one if asked again."""
        while self._current is None or self._current[0] != step:
            assert self._steps and self._steps[0] <= step, f"step {step} is past or empty"
            self._current = (self._steps.pop(0), next(self._batches))
        return self._current[1]
