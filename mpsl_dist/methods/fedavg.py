"""FedAvg (McMahan et al. 2017) over the same workers: clients train the whole model themselves.

One round: the server sends the trainable parameters to the clients that it drew; each trains them
for some local epochs on its own data; the server replaces them by the clients' mean, weighted by
their samples. A round is one step, and one epoch, of the training loop: with one local epoch every
sample is met as often as in an epoch of MPSL.

A client's mini-batches are those that it gives to MPSL's global batches (``client_share``), unless
``federated.batch_size`` sets their size; its learning rate follows MPSL's steps in either case.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpsl_dist.actors import assembly, deployable
from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.actors.federated_client import FederatedClient, Update
from mpsl_dist.config import Experiment
from mpsl_dist.data import Splits
from mpsl_dist.data.partition import shares
from mpsl_dist.methods.hosting import load_data, on_own_gpu, open_fleet
from mpsl_dist.models.average import average, load_trainable, trainable_state
from mpsl_dist.records.run_directory import log_to
from mpsl_dist.records.traffic import Traffic
from mpsl_dist.runtime import rpc


class FedAvg:
    """The method over RPC clients.

    Parameters
    ----------
    experiment : Experiment
    splits : Splits
        ``test`` is read where the server holds it; ``train`` never is.
    model : Deployable
        The server's copy: the model that every round begins with.
    clients : rpc.Fleet
        Of :class:`FederatedClient`.
    """

    def __init__(
        self, experiment: Experiment, splits: Splits, model: Deployable, clients: rpc.Fleet
    ) -> None:
        self.experiment = experiment
        self.splits = splits
        self.model = model
        self.clients = clients
        self.traffic = Traffic(len(clients))
        held = clients.call("describe", self._everyone())
        self.sizes = {n: held[n].samples for n in held}
        self.test_sizes = {n: held[n].test_samples for n in held if held[n].test_samples}
        local_epochs = experiment.federated.local_epochs
        self.plan = np.array([list(self.sizes.values())]) * local_epochs
        self._plan_local_batches()

    def _plan_local_batches(self) -> None:
        sizes, training = list(self.sizes.values()), self.experiment.training
        plan = shares(sizes, training.batch_size, self.experiment.client_share)
        own = self.experiment.federated.batch_size
        counts = {n: plan[:, n].tolist() for n in self.sizes}
        if own is not None:
            counts = {n: shares([size], own, "equal")[:, 0] for n, size in self.sizes.items()}
        told = {n: (list(counts[n]), len(plan), training.epochs) for n in self.sizes}
        self.clients.call("begin_training", told)

    def begin_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Nothing to lay out: clients do, when their round begins."""

    def step(self, epoch_step: int, step: int) -> float:
        """Train one round; gives the mean loss over all samples that were trained on."""
        drawn = draw(
            len(self.sizes), self.experiment.federated.fraction, self.experiment.seed, step
        )
        weights = trainable_state(self.model)
        sent = dict.fromkeys(drawn, (step, weights))
        updates: dict[int, Update] = self.clients.call("train_round", sent, f"round {step}")
        self.traffic.add_all("model_down", dict.fromkeys(drawn, weights))
        self.traffic.add_all("model_up", {n: update.weights for n, update in updates.items()})
        load_trainable(self.model, aggregate(updates))
        samples = sum(update.samples for update in updates.values())
        return sum(update.loss * update.samples / samples for update in updates.values())

    def evaluate(self) -> dict[str, float]:
        """Test the server's model, where the test samples are."""
        size = self.experiment.training.test_batch_size
        if self.experiment.data.test_at == "server":
            return self.model.test(self.splits.test, size)
        weights = trainable_state(self.model)
        self.traffic.add_all("test_weights_down", dict.fromkeys(self.test_sizes, weights))
        asked = dict.fromkeys(self.test_sizes, (weights, size))
        right = self.clients.call("test", asked, "evaluation")
        return {"accuracy": sum(right.values()) / sum(self.test_sizes.values())}

    def deployable(self) -> Deployable:
        """Give the server's model."""
        return self.model

    def trainable_parameters(self) -> dict[str, int]:
        """Count trained numbers; the server trains none."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return {"client": trained, "server": 0}

    def save(self, folder: str) -> None:
        """Write the model here, and every client's optimizers where it is."""
        finish = self.clients.start("save", self._everyone(folder), "checkpoint")
        target = Path(folder) / "server.pt"
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        torch.save(trainable_state(self.model), partial)
        partial.replace(target)
        finish()

    def restore(self, folder: str) -> None:
        """Continue from :meth:`save`."""
        finish = self.clients.start("restore", self._everyone(folder), "resume")
        load_trainable(self.model, torch.load(Path(folder) / "server.pt", weights_only=True))
        finish()

    def _everyone(self, *arguments: Any) -> dict[int, tuple[Any, ...]]:
        return dict.fromkeys(self.clients.references, arguments)


def draw(clients: int, fraction: float, seed: int, round_: int) -> list[int]:
    """Draw the clients of a round: max(1, round(fraction N)) of them, in order of their numbers.

    A function of its arguments alone, so that a resumed run draws the same.
    """
    count = max(1, round(fraction * clients))
    rng = np.random.default_rng([seed, round_, 2])
    return sorted(rng.choice(clients, count, replace=False).tolist())


def aggregate(updates: Mapping[int, Update]) -> dict[str, torch.Tensor]:
    """Average the clients' trainable parameters, weighted by their samples."""
    return average(
        [update.weights for update in updates.values()],
        [update.samples for update in updates.values()],
    )


def build_clients(
    experiment: Experiment, numbers: list[int], splits: Splits
) -> list[FederatedClient]:
    """Build these clients in this process, around one model."""
    model = deployable.build(experiment, splits)
    held = assembly.build_local_data(experiment, splits)
    rules = experiment.federated
    return [
        FederatedClient(
            number,
            *held[number],
            model,
            experiment.training,
            rules.optimizer == "keep",
            rules.local_epochs,
        )
        for number in numbers
    ]


def host_clients(
    experiment: Experiment, numbers: list[int], rank: int, threads: int
) -> list[FederatedClient]:
    """Build these clients on a worker."""
    log = log_to(experiment.run_directory / f"rank{rank}.log")
    rpc.set_threads(threads)
    experiment = on_own_gpu(experiment)
    clients = build_clients(experiment, numbers, load_data(experiment))
    for client in clients:
        log.info("client %d: %s", client.number, client.describe())
    return clients


def build(experiment: Experiment, splits: Splits, threads: int) -> FedAvg:
    """Build the server's model here and the clients on the workers of a joined world."""
    timeout = max(experiment.runtime.rpc_timeout, experiment.federated.round_timeout)
    clients = open_fleet(experiment, splits, threads, host_clients, timeout)
    return FedAvg(experiment, splits, deployable.build(experiment, splits), clients)
