"""Who has which samples: the data of an experiment, dealt once a process."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsl_dist import data
from mpsl_dist.actors.local_data import LocalData
from mpsl_dist.config import Experiment
from mpsl_dist.data import Splits
from mpsl_dist.data.partition import Dealt, deal, partition
from mpsl_dist.errors import ConfigError

_log = logging.getLogger("mpsl_dist")


def load_data(experiment: Experiment) -> Splits:
    """Load the experiment's dataset.

    Raises
    ------
    UserError
        If it is unknown, missing or damaged, or has no use for an option.
    """
    chosen = experiment.data
    return data.load(chosen.name, chosen.root, chosen.text_length, **data_options(experiment))


def data_options(experiment: Experiment) -> dict[str, Any]:
    """Return what the experiment asks of its dataset, as :func:`mpsl_dist.data.load` takes it."""
    names = ("image_size", "audio_frames", "modalities", "on_error", "max_missing", "cache")
    common = {name: getattr(experiment.data, name) for name in names}
    return common | {"plugins": experiment.plugins, "own_options": experiment.data.options}


@dataclass(frozen=True)
class Holdings:
    """The samples of every client.

    Attributes
    ----------
    dealt : Dealt
        Training samples, and the rule that they were dealt by.
    tests : tuple of array
        (samples,) positions in the test split by client; all empty where the server has them.
    """

    experiment: Experiment
    splits: Splits
    dealt: Dealt
    tests: tuple[NDArray[np.int64], ...]

    @classmethod
    def deal(cls, experiment: Experiment, splits: Splits) -> Holdings:
        """Deal the samples by the experiment's rule and seed.

        Raises
        ------
        UserError
            If there are too few samples, or the data names another number of clients.
        """
        rule, clients, seed = experiment.data.partition, experiment.clients, experiment.seed
        dealt = deal(splits, clients, rule.kind, rule.alpha, rule.minimum, seed)
        if len(dealt.parts) != clients:
            raise ConfigError(
                f"clients: {clients}, but the data names {len(dealt.parts)} and "
                f"data.partition.kind=natural takes each; set clients={len(dealt.parts)}"
            )
        tests = [np.empty(0, dtype=np.int64)] * clients
        if experiment.data.test_at == "clients":
            tests = partition(splits.test.labels, clients, "iid", 1.0, 1, seed)
        return cls(experiment, splits, dealt, tuple(tests))

    @classmethod
    def load(cls, experiment: Experiment) -> Holdings:
        """Load the experiment's data and deal it; raises as :func:`load_data` and :meth:`deal`."""
        return cls.deal(experiment, load_data(experiment))

    @property
    def sizes(self) -> list[int]:
        """Training samples of every client."""
        return [len(part) for part in self.dealt.parts]

    def of(self, number: int) -> tuple[LocalData, LocalData]:
        """Return a client's own training and test samples."""
        seed, loaders = self.experiment.seed, self.experiment.data.loaders
        train = LocalData(self.splits.train, self.dealt.parts[number], seed, number, loaders)
        return train, LocalData(self.splits.test, self.tests[number], seed, number)

    def log(self) -> None:
        """Log who holds how much, by which rule."""
        sizes = self.sizes
        _log.info(
            "partition: %s; %d clients with %d to %d training samples, median %g",
            self.dealt.rule,
            len(sizes),
            min(sizes),
            max(sizes),
            float(np.median(sizes)),
        )
        for number, name in enumerate(self.dealt.names):
            _log.info("client %d is '%s': %d samples", number, name, sizes[number])
