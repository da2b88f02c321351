"""Local training alone: every client trains a whole model on its own data, and nothing is averaged.

The lower bound that a distributed method is measured against. It is FedAvg without the server's
mean: the same rounds, mini-batches and learning rates, so that what FedAvg gains is what clients
learn from each other. N clients are N centralized runs of one client's data each. Only numbers
cross: sizes, losses, metrics.

A client builds the parts of those modalities alone that it trains on, and sees nothing else of a
test sample. Every client tests its own model where it is: on the whole test set where that is the
server's, which in a simulation every worker finds, and on its own part where clients hold it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mpsl_dist.actors import deployable
from mpsl_dist.actors.assembly import build_on_meta
from mpsl_dist.actors.choices import task_of
from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.actors.local_data import Damage, TestData
from mpsl_dist.actors.standalone_client import StandaloneClient
from mpsl_dist.config import Experiment
from mpsl_dist.data import Dataset, Splits, presence
from mpsl_dist.data.loading import Unread
from mpsl_dist.methods.fedavg import FedAvg, mean_loss
from mpsl_dist.methods.hosting import Setup, open_fleet
from mpsl_dist.methods.round_link import RoundLink
from mpsl_dist.records import state
from mpsl_dist.records.traffic import Traffic

#: A client's metrics, and on how many samples.
Result = tuple[Mapping[str, float], int]


class Standalone(FedAvg):
    """Clients by themselves, as the server sees them; its model has no numbers, and counts."""

    def step(self, epoch_step: int, step: int) -> float | None:
        """Have every client train one round; returns the mean loss over all samples.

        Clients that are lost on the way are left out; None if there is none at all.
        """
        updates = self.clients.train_round(step, {}, self.clients.present)
        return mean_loss(updates) if updates else None

    def evaluate(self) -> dict[str, float]:
        """Have every client test its own model, and return what :func:`over_clients` does."""
        size = self.experiment.training.test_batch_size
        return over_clients(self.clients.test({}, size, self._holders()), self.sizes)

    def damage_met(self) -> Damage:
        """Return how much of the data could not be read so far; a public test set counts once."""
        met = self.clients.damage_met()
        if self.experiment.data.test_at == "clients":
            return met
        public = Damage.of(Unread(), self.tests.unread)
        return replace(met, test_files=public.test_files, left_out=public.left_out)

    def deployable(self) -> OwnModels:
        """Return the clients' models, one each."""
        return OwnModels(self.clients)

    def save(self, folder: str) -> dict[str, str]:
        """Have every client write its model and optimizers where it is; part -> SHA-256."""
        return self.clients.save(folder, lambda: state.save(Path(folder) / state.SERVER, {}))

    def restore(self, folder: str, files: Mapping[str, str]) -> None:
        """Continue from :meth:`save`."""
        self.clients.restore(folder, files, lambda: None)


@dataclass(frozen=True)
class OwnModels:
    """Models of which every client has one, and nobody else."""

    clients: RoundLink

    def save(self, folder: Path, experiment: Experiment, splits: Splits) -> None:
        """Have every client write its own to ``model/`` of its run directory, where it is."""
        self.clients.start("write_model", self.clients.everyone(), "model/")()


def over_clients(results: Mapping[int, Result], sizes: Mapping[int, int]) -> dict[str, float]:
    """Return every metric over the clients' own results.

    Returns
    -------
    dict of str to float
        The metric over all predictions made, which is the clients' plain mean where all test on
        the same samples; and ``_own_mean``, ``_own_weighted`` by training samples, ``_own_std``
        (0 for one client), ``_own_min`` and ``_own_max``.
    """
    told = {n: found for n, (found, samples) in results.items() if samples}
    names = [*next(iter(told.values()))] if told else []
    summary: dict[str, float] = {}
    for name in names:
        each = [found[name] for found in told.values()]
        summary[name] = statistics.fmean(each, [results[n][1] for n in told])
        summary[f"{name}_own_mean"] = statistics.fmean(each)
        summary[f"{name}_own_weighted"] = statistics.fmean(each, [sizes[n] for n in told])
        summary[f"{name}_own_std"] = statistics.stdev(each) if len(each) > 1 else 0.0
        summary[f"{name}_own_min"], summary[f"{name}_own_max"] = min(each), max(each)
    return summary


def build_clients(
    experiment: Experiment,
    numbers: Sequence[int],
    holdings: Holdings,
    reference: Callable[[Any], Any] | None = None,
) -> list[StandaloneClient]:
    """Build these clients in this process, around one model that they take turns on.

    The parameters are those of :data:`mpsl_dist.methods.hosting.BuildClients`; ``reference`` goes
    unused.
    """
    splits, rules = holdings.splits, experiment.federated
    held = {n: holdings.modalities(n, tests=False) for n in numbers}
    wanted = {name for own in held.values() for name in own or splits.shapes}
    model = deployable.build(experiment, splits, wanted)
    clients = []
    for number in numbers:
        own = held[number] or tuple(splits.shapes)
        client = StandaloneClient(
            number,
            holdings.of(number)[0],
            _tests_of(number, holdings, held[number]),
            model.only(own) if held[number] else model,
            experiment.training,
            True,
            rules.local_epochs,
            experiment.run_directory.absolute(),
            export=partial(_export, experiment, splits, own),
        )
        clients.append(client)
    return clients


def _tests_of(number: int, holdings: Holdings, modalities: Collection[str]) -> TestData:
    """Return what a client tests its model on; no ``modalities`` are all of them.

    Of a sample it sees these alone, and none of a sample that has none of them.
    """
    split: Dataset = holdings.splits.test
    public = holdings.experiment.data.test_at == "server"
    rows = range(len(split.labels)) if public else holdings.of(number)[1].indices
    if not modalities:
        return TestData(split, rows, holdings.loaders)
    everything = torch.ones(len(split.labels), dtype=torch.bool)
    present = presence(split) or dict.fromkeys(holdings.splits.shapes, everything)
    own = {name: there & (name in modalities) for name, there in present.items()}
    some_b = torch.stack([*own.values()]).any(0)
    return TestData(split.without(own), [row for row in rows if some_b[row]])


def _export(
    experiment: Experiment,
    splits: Splits,
    modalities: Collection[str],
    model: Deployable,
    folder: Path,
) -> None:
    shapes = {name: shape for name, shape in splits.shapes.items() if name in modalities}
    model.save(folder, experiment, replace(splits, shapes=shapes))


def build(setup: Setup) -> Standalone:
    """Build the clients on the workers of a joined world, and here what knows of them."""
    experiment, splits = setup.experiment, setup.splits
    rounds = max(experiment.runtime.rpc_timeout, experiment.federated.round_timeout)
    fleet = open_fleet(setup, build_clients, experiment.faults.client_timeout or rounds)
    link = RoundLink(fleet, Traffic(experiment.clients), experiment.faults)
    whole = Deployable(*build_on_meta(experiment, splits), task_of(splits))
    return Standalone(experiment, splits, whole, link)
