"""Centralized training: one process, pooled data, MPSL's own global batches.

The upper bound that a distributed method is measured against: the global batch of every step is
made of exactly the mini-batches that the clients would have contributed, in client order. With
``client_share: equal`` it is the released code's: one pool of samples, cut into batches of B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mpsl_dist.actors import deployable
from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.actors.learner import Learner
from mpsl_dist.actors.local_data import Damage, LocalData, TestData
from mpsl_dist.config import Experiment
from mpsl_dist.data import Batch
from mpsl_dist.data.loading import Unread
from mpsl_dist.data.partition import shares
from mpsl_dist.methods.hosting import Setup
from mpsl_dist.models.average import load_trainable, trainable_state
from mpsl_dist.records import state
from mpsl_dist.records.traffic import Traffic


def pool(batches: Sequence[Batch]) -> Batch:
    """Join mini-batches of the same modalities into one global batch, in their order."""
    names = batches[0].inputs
    inputs = {name: torch.cat([batch.inputs[name] for batch in batches]) for name in names}
    labels = torch.cat([batch.labels for batch in batches])
    if all(batch.present is None for batch in batches):
        return Batch(inputs, labels)
    everything = [dict.fromkeys(names, torch.ones(len(b), dtype=torch.bool)) for b in batches]
    held = [b.present or whole for b, whole in zip(batches, everything, strict=True)]
    order = next(b.present for b in batches if b.present is not None)
    return Batch(inputs, labels, present={m: torch.cat([own[m] for own in held]) for m in order})


class Centralized:
    """Centralized training, one process that has everything.

    Parameters
    ----------
    experiment : Experiment
        Its ``clients`` and partition say only which samples meet in which global batch; with
        ``client_share: equal`` not even that.
    holdings : Holdings
    learner : Learner
        The whole model with its optimizers.
    """

    def __init__(self, experiment: Experiment, holdings: Holdings, learner: Learner) -> None:
        self.experiment = experiment
        self.splits = holdings.splits
        self.tests = TestData(holdings.splits.test, loaders=holdings.loaders)
        self.learner = learner
        self.traffic = Traffic(experiment.clients)  # nothing ever crosses
        self.clients = None
        self.repeated = 0
        self.held = held_by(experiment, holdings)
        sizes = [len(data) for data in self.held]
        self.plan = shares(sizes, experiment.training.batch_size, experiment.client_share)
        learner.plan(len(self.plan), experiment.training.epochs)

    def begin_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Lay out the epoch's mini-batches."""
        for client, data in enumerate(self.held):
            data.begin_epoch(epoch, self.plan[:, client].tolist(), first_step)

    def step(self, epoch_step: int, step: int) -> float:
        """Train one step on the global batch, and return its mean loss, which is Eq. 4's L_S.

        Raises
        ------
        DivergedError
            If the loss is no finite number; no parameter has moved then.
        """
        took_part = np.flatnonzero(self.plan[epoch_step])
        return self.learner.train(pool([self.held[n].batch(epoch_step) for n in took_part]), step)

    def evaluate(self) -> dict[str, float]:
        """Test on the whole test set, whoever would hold it."""
        size = self.experiment.training.test_batch_size
        return self.learner.model.test(self.tests, size)

    def read_tests(self) -> Iterator[int]:
        """Read every test sample once, and yield how many can be read, batch by batch."""
        return map(len, self.tests.batches(self.experiment.training.test_batch_size))

    def damage_met(self) -> Damage:
        """Return how much of the data could not be read so far."""
        trained = [Damage.of(data.unread, Unread()) for data in self.held]
        return Damage.all([*trained, Damage.of(Unread(), self.tests.unread)])

    def deployable(self) -> Deployable:
        """Return the model."""
        return self.learner.model

    def trainable_parameters(self) -> dict[str, int]:
        """Return how many numbers are trained; no client trains any."""
        return {"client": 0, "server": sum(p.numel() for p in self.learner.parameters)}

    def save(self, folder: str) -> dict[str, str]:
        """Write model and optimizers; return the file's name -> its SHA-256."""
        parts = {
            "model": trainable_state(self.learner.model),
            "optimizers": self.learner.optimizer_state(),
            "unread": [data.unread.state() for data in self.held],
        }
        return {state.SERVER: state.save(Path(folder) / state.SERVER, parts)}

    def damage(self, folder: str, files: Mapping[str, str]) -> str | None:
        """Say what is wrong with a checkpoint; nothing if it is whole."""
        return state.damage(Path(folder) / state.SERVER, files.get(state.SERVER))

    def restore(self, folder: str, files: Mapping[str, str]) -> None:
        """Continue from :meth:`save`."""
        with state.continuing(Path(folder) / state.SERVER) as parts:
            load_trainable(self.learner.model, parts["model"])
            self.learner.load_optimizer_state(parts["optimizers"])
            for data, unread in zip(self.held, parts.get("unread", ()), strict=False):
                data.unread.load(unread)


def held_by(experiment: Experiment, holdings: Holdings) -> list[LocalData]:
    """Return whose mini-batches make a global batch: every client's, or those of one pool.

    Clients that hold unequally much and give equally much run dry one after the other, in batches
    that grow smaller: in one hand nothing runs dry.
    """
    if experiment.client_share == "proportional":
        return [holdings.of(client)[0] for client in range(experiment.clients)]
    everything = np.sort(np.concatenate(holdings.dealt.parts))
    train, loaders = holdings.splits.train, holdings.loaders
    return [LocalData(train, everything, experiment.seed, client=0, loaders=loaders)]


def build(setup: Setup) -> Centralized:
    """Build the whole model here."""
    experiment = setup.experiment
    learner = Learner(deployable.build(experiment, setup.splits), experiment.training)
    return Centralized(experiment, setup.holdings, learner)
