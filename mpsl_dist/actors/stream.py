"""One owner's mini-batches without end: the n-th is a function of n alone."""

from __future__ import annotations

from collections.abc import Iterator

from mpsl_dist.actors.local_data import LocalData
from mpsl_dist.data import Batch
from mpsl_dist.data.partition import shares


class Stream:
    """Mini-batches of an owner's samples, epoch after epoch.

    Parameters
    ----------
    data : LocalData
        At least one sample.
    batch_size : int
    """

    def __init__(self, data: LocalData, batch_size: int) -> None:
        self.data = data
        self.counts = shares([len(data)], batch_size, "proportional")[:, 0].tolist()

    def part(self, number: int, batches: int) -> Iterator[tuple[int, list[int], Batch]]:
        """Yield the mini-batches of a part of the stream.

        Parameters
        ----------
        number : int
            Which part, from 0.
        batches : int
            Mini-batches of every part.

        Yields
        ------
        place, positions, batch
            The mini-batch's number in the stream, and which of the owner's samples, from 0, it has.
        """
        for place in range(number * batches, (number + 1) * batches):
            epoch, step = divmod(place, len(self.counts))
            if step == 0 or place == number * batches:
                self.data.begin_epoch(epoch, self.counts, step)
            yield place, self.data.positions(step), self.data.batch(step)
