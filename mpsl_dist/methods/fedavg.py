"""FedAvg (McMahan et al. 2017) over the same workers: clients train the whole model themselves.

One round: the server sends the trainable parameters to the clients that it drew; each trains them
for some local epochs on its own data; the server replaces them by the clients' mean, weighted by
their samples. A round is one step, and one epoch, of the training loop: with one local epoch every
sample is met as often as in an epoch of MPSL.

A client that lacks a modality is sent no tokenizer or adapter of it, and sends none. These are
averaged over the clients that train on the modality, weighted by all of their samples, with it or
without: then their mean after one local step of SGD is one step on the samples that they have
together. What nobody of a round has stays as it was.

A client's mini-batches are those that it has in MPSL's global batches (``client_share``), unless
``federated.batch_size`` sets their size; its learning rate follows MPSL's steps in either case.

FedCLIP (Lu et al. 2023), as the paper compares with it, is this around a frozen encoder: clients
run the whole encoder but train only tokenizers, classifier and the attention adapters on the pooled
features (:mod:`mpsl_dist.models.adapters`); only those travel. What it changes is the model that
is built, by its row in :mod:`mpsl_dist.config.methods`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpsl_dist.actors import deployable
from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.actors.federated_client import FederatedClient, Update
from mpsl_dist.actors.holdings import Holdings, loaders_of
from mpsl_dist.actors.local_data import Damage, TestData
from mpsl_dist.config import Experiment
from mpsl_dist.data import Splits
from mpsl_dist.data.loading import Unread
from mpsl_dist.data.partition import shares
from mpsl_dist.methods.by_key import Keys
from mpsl_dist.methods.hosting import Setup, open_fleet
from mpsl_dist.methods.link import Back
from mpsl_dist.methods.round_link import RoundLink
from mpsl_dist.models.average import average, load_trainable, trainable_state
from mpsl_dist.records import state
from mpsl_dist.records.traffic import Traffic


class FedAvg:
    """FedAvg or FedCLIP, as the server sees it.

    Parameters
    ----------
    experiment : Experiment
    splits : Splits
        ``test`` is read where the server holds it; ``train`` never is.
    model : Deployable
        The server's copy: the model that every round begins with.
    clients : RoundLink
    """

    def __init__(
        self, experiment: Experiment, splits: Splits, model: Deployable, clients: RoundLink
    ) -> None:
        self.experiment = experiment
        self.splits = splits
        self.model = model
        self.clients = clients
        self.tests = TestData(splits.test, loaders=loaders_of(experiment, splits))
        self.repeated = 0
        held = clients.describe()
        clients.keys = Keys(
            modalities={n: told.modalities for n, told in held.items() if told.modalities}
        )
        self.sizes = {n: held[n].samples for n in held}
        self.test_sizes = {n: held[n].test_samples for n in held if held[n].test_samples}
        local_epochs = experiment.federated.local_epochs
        self.plan = np.array([list(self.sizes.values())]) * local_epochs
        self._plan_local_batches(list(self.sizes))

    def _plan_local_batches(self, clients: Sequence[int]) -> None:
        sizes, training = list(self.sizes.values()), self.experiment.training
        plan = shares(sizes, training.batch_size, self.experiment.client_share)
        own = self.experiment.federated.batch_size
        counts = {n: plan[:, n].tolist() for n in clients}
        if own is not None:
            counts = {n: list(shares([self.sizes[n]], own, "equal")[:, 0]) for n in clients}
        self.clients.begin_training(counts, len(plan), training.epochs)

    @property
    def traffic(self) -> Traffic:
        """Every byte that crossed."""
        return self.clients.traffic

    def welcome(self, back: Back) -> None:
        """Let clients go on that have come back."""
        self._plan_local_batches(back.fresh)
        self.clients.restore_kept(back.fresh)

    def begin_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Nothing to lay out: clients do, when their round begins."""

    def step(self, epoch_step: int, step: int) -> float | None:
        """Train one round; returns the mean loss over all samples that were trained on.

        Updates of clients that are lost on the way are left out; None if there is none at all.
        """
        fraction, seed = self.experiment.federated.fraction, self.experiment.seed
        lost = self.clients.lost
        drawn = [n for n in draw(len(self.sizes), fraction, seed, step) if n not in lost]
        updates = self.clients.train_round(step, trainable_state(self.model), drawn)
        if not updates:
            return None
        load_trainable(self.model, aggregate(updates), some=True)
        return mean_loss(updates)

    def evaluate(self) -> dict[str, float]:
        """Test the server's model, where the test samples are."""
        size = self.experiment.training.test_batch_size
        if self.experiment.data.test_at == "server":
            return self.model.test(self.tests, size)
        scores = self.clients.test(trainable_state(self.model), size, self._holders()).values()
        return {"accuracy": sum(right for right, _ in scores) / sum(n for _, n in scores)}

    def read_tests(self) -> Iterator[int]:
        """Read every test sample once, and yield how many can be read, batch by batch."""
        size = self.experiment.training.test_batch_size
        if self.experiment.data.test_at == "server":
            return map(len, self.tests.batches(size))
        return iter(self.clients.read_tests(size, self._holders()).values())

    def damage_met(self) -> Damage:
        """Return how much of the data could not be read so far, by all that hold some."""
        return Damage.all([self.clients.damage_met(), Damage.of(Unread(), self.tests.unread)])

    def _holders(self) -> list[int]:
        return [n for n in self.test_sizes if n not in self.clients.lost]

    def deployable(self) -> Deployable:
        """Return the server's model."""
        return self.model

    def trainable_parameters(self) -> dict[str, int]:
        """Return how many numbers are trained at one client; the server trains none."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return {"client": trained, "server": 0}

    def save(self, folder: str) -> dict[str, str]:
        """Write the model here, and every client's optimizers where it is; part -> SHA-256."""
        path = Path(folder) / state.SERVER
        return self.clients.save(folder, lambda: state.save(path, trainable_state(self.model)))

    def damage(self, folder: str, files: Mapping[str, str]) -> str | None:
        """Say what is wrong with a checkpoint, having asked every owner; nothing if it is whole."""
        return self.clients.damage(folder, files)

    def restore(self, folder: str, files: Mapping[str, str]) -> None:
        """Continue from :meth:`save`."""

        def own() -> None:
            with state.continuing(Path(folder) / state.SERVER) as weights:
                load_trainable(self.model, weights)

        self.clients.restore(folder, files, own)


def draw(clients: int, fraction: float, seed: int, round_: int) -> list[int]:
    """Draw the clients of a round: max(1, round(fraction N)) of them, in order of their numbers.

    A function of its arguments alone, so that a resumed run draws the same.
    """
    count = max(1, round(fraction * clients))
    rng = np.random.default_rng([seed, round_, 2])
    return sorted(rng.choice(clients, count, replace=False).tolist())


def mean_loss(updates: Mapping[int, Update]) -> float:
    """Return the mean of the clients' losses, weighted by their samples."""
    samples = sum(update.samples for update in updates.values())
    return sum(update.loss * update.samples / samples for update in updates.values())


def aggregate(updates: Mapping[int, Update]) -> dict[str, torch.Tensor]:
    """Return the mean of the clients' trainable parameters, weighted by their samples.

    Each is the mean of those who sent it; what nobody did is not there.
    """
    return average(
        [update.weights for update in updates.values()],
        [update.samples for update in updates.values()],
    )


def build_clients(
    experiment: Experiment,
    numbers: Sequence[int],
    holdings: Holdings,
    reference: Callable[[Any], Any] | None = None,
) -> list[FederatedClient]:
    """Build these clients in this process, around one model that they take turns on.

    The parameters are those of :data:`mpsl_dist.methods.hosting.BuildClients`; ``reference`` goes
    unused.
    """
    held = {n: holdings.modalities(n) for n in numbers}
    wanted = {name for own in held.values() for name in own or holdings.splits.shapes}
    model = deployable.build(experiment, holdings.splits, wanted)
    rules = experiment.federated
    return [
        FederatedClient(
            number,
            *holdings.of(number),
            model.only(held[number]) if held[number] else model,
            experiment.training,
            rules.optimizer == "keep",
            rules.local_epochs,
            experiment.run_directory.absolute(),
            held[number],
            holdings.modalities(number, tests=False),
        )
        for number in numbers
    ]


def build(setup: Setup) -> FedAvg:
    """Build the server's model here and the clients on the workers of a joined world."""
    experiment, splits = setup.experiment, setup.splits
    rounds = max(experiment.runtime.rpc_timeout, experiment.federated.round_timeout)
    fleet = open_fleet(setup, build_clients, experiment.faults.client_timeout or rounds)
    link = RoundLink(fleet, Traffic(experiment.clients), experiment.faults)
    return FedAvg(experiment, splits, deployable.build(experiment, splits), link)
