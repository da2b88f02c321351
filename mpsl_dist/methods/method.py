"""What every method is to the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mpsl_dist.actors.local_data import Damage
from mpsl_dist.config import Experiment
from mpsl_dist.data import Splits
from mpsl_dist.methods.link import Back, Link
from mpsl_dist.records.traffic import Traffic


class Savable(Protocol):
    """What a run leaves as its model: a :class:`~mpsl_dist.actors.deployable.Deployable`, or what
    stands for clients' own.
    """

    def save(self, folder: Path, experiment: Experiment, splits: Splits) -> None:
        """Write it below this folder."""
        ...


class Method(Protocol):
    """What the loop asks of a method."""

    #: (steps, clients): samples of every client in every step of an epoch.
    plan: NDArray[np.int64]
    traffic: Traffic
    #: None where there are no workers.
    clients: Link | None
    #: Steps that were begun again without a client.
    repeated: int

    def welcome(self, back: Back) -> None:
        """Let clients go on that have come back.

        Asked only of a method that goes on without the lost (``tolerant``).
        """
        ...

    def begin_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Lay out the epoch's mini-batches, from ``first_step`` on."""
        ...

    def step(self, epoch_step: int, step: int) -> float | None:
        """Train one step; returns the global loss, None where no client was left to take part."""
        ...

    def read_tests(self) -> Iterator[int]:
        """Read every test sample once, and yield how many can be read, batch by batch."""
        ...

    def damage_met(self) -> Damage:
        """Return how much of the data could not be read so far."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Test, and return metric name -> fraction."""
        ...

    def save(self, folder: str) -> dict[str, str]:
        """Write all state; returns the name of every file written -> its SHA-256.

        Raises
        ------
        DiskError
            If a file cannot be written, here or where a client is.
        """
        ...

    def damage(self, folder: str, files: Mapping[str, str]) -> str | None:
        """Say what is wrong with the files that :meth:`save` wrote; None if they are whole.

        No state is touched. ``files`` is what :meth:`save` returned, or empty where nobody kept it.
        """
        ...

    def restore(self, folder: str, files: Mapping[str, str]) -> None:
        """Continue from :meth:`save`."""
        ...

    def deployable(self) -> Savable | None:
        """Return the model to deploy; None where clients keep parts of it to themselves."""
        ...

    def trainable_parameters(self) -> dict[str, int]:
        """Return how many parameters one ``client`` and the ``server`` train."""
        ...
