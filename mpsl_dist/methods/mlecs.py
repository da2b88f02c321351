"""ML-ECS (Liu et al.): devices of unlike modalities tune small language models, a server a large
one, and factors of LoRA are all that devices send.

A round of Algorithm 1 is one step, and one epoch, of the training loop. What is open in the paper,
and what was chosen, stands in ``docs/mlecs.md``; so do the baselines, which are rows of switches of
``mlecs`` (:class:`mpsl_dist.config.mlecs.Mlecs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mpsl_dist.actors import captions
from mpsl_dist.actors.choices import writes_captions
from mpsl_dist.actors.cloud import Cloud
from mpsl_dist.actors.deployable import Deployable, UnifiedDeployable
from mpsl_dist.actors.edge_device import DeviceUpdate, EdgeDevice
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.actors.local_data import Damage, TestData
from mpsl_dist.actors.unified import build_device, build_large
from mpsl_dist.config import Experiment
from mpsl_dist.data.loading import Unread
from mpsl_dist.errors import ConfigError
from mpsl_dist.methods.device_link import DeviceLink
from mpsl_dist.methods.hosting import Setup, open_fleet
from mpsl_dist.methods.link import Back
from mpsl_dist.models.average import average
from mpsl_dist.models.lora import average_by_rank, product_gap, to_rank
from mpsl_dist.models.tasks import TASKS
from mpsl_dist.records import state
from mpsl_dist.records.traffic import Traffic


class Mlecs:
    """ML-ECS as the server sees it.

    Parameters
    ----------
    experiment : Experiment
    cloud : Cloud
        The server's own data and models.
    clients : DeviceLink
    """

    def __init__(self, experiment: Experiment, cloud: Cloud, clients: DeviceLink) -> None:
        self.experiment = experiment
        self.rules = experiment.mlecs
        self.cloud = cloud
        self.clients = clients
        self.repeated = 0
        self.held = clients.describe()
        batch, steps = batch_of(experiment), self.rules.public_steps + self.rules.private_steps
        self.plan = np.full((1, len(self.held)), batch * steps)

    @property
    def traffic(self) -> Traffic:
        """Every byte that crossed."""
        return self.clients.traffic

    def begin_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Nothing to lay out: devices do, when their round begins."""

    def step(self, epoch_step: int, step: int) -> float | None:
        """Run one round of Algorithm 1; returns the devices' mean loss.

        Devices that are lost on the way are left out; None if there is none at all.
        """
        asked = self.rules.contrast and self.rules.public_steps
        anchors_vs = self.cloud.fused_table() if asked else None
        updates = self.clients.train_round(step, anchors_vs, self._sent(self.clients.present))
        if not updates:
            return None
        self.cloud.enhance(step, self._aggregate(updates))
        return sum(update.loss for update in updates.values()) / len(updates)

    def _aggregate(self, updates: Mapping[int, DeviceUpdate]) -> dict[str, Tensor]:
        """Return the devices' mean (Eq. 13), factor by factor, and key by key of what all have."""
        states = [update.weights for update in updates.values()]
        weights = [weight_of(update, self.rules.aggregate) for update in updates.values()]
        if self.rules.ranks:
            return average_by_rank(states, weights)
        if self.rules.exchange in _FACTORS:
            self.cloud.gap = product_gap(states, weights)
        return average(states, weights)

    def _sent(self, clients: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """Return what of φ every device takes: its own rank of it, where they differ."""
        shared, ranks = self.cloud.shared, self.rules.ranks
        return {n: to_rank(shared, ranks[n]) if ranks else shared for n in clients}

    def welcome(self, back: Back) -> None:
        """Let devices go on that have come back, from what they kept, or else as they began."""
        self.clients.restore_kept(back.fresh)

    def evaluate(self) -> dict[str, float]:
        """Return the devices' mean accuracy, each with its own modalities, and the server's.

        ``f1`` is the mean of the devices' own macro F1, each over its own test samples. Of captions
        it is ``rouge_l``, and what the server wrote is in its run directory.
        """
        found: dict[str, float] = {}
        told = self.clients.test(self._sent(self._holders()), self._test_size())
        by_device = {n: scores for n, (scores, samples) in told.items() if samples}
        for name in next(iter(by_device.values()), {}):
            found[name] = sum(scores[name] for scores in by_device.values()) / len(by_device)
            found |= {f"{name}_{n}": scores[name] for n, scores in by_device.items()}
        # What nobody has trained has nothing to say.
        at_server = self.cloud.test()[0] if self.rules.server_steps else {}
        found |= {f"server_{name}": score for name, score in at_server.items()}
        if self.cloud.captions:
            path = self.experiment.run_directory / captions.FILE
            captions.save(self.cloud.captions, path)
        if self.rules.exchange in _FACTORS and not self.rules.ranks:
            found["product_gap"] = self.cloud.gap
        return at_server | found  # the server's own where no device has test samples

    def read_tests(self) -> Iterator[int]:
        """Read every test sample once, and yield how many can be read, batch by batch."""
        size = self._test_size()
        yield from map(len, self.cloud.tests.batches(size))
        yield from self.clients.read_tests(size, self._holders()).values()

    def damage_met(self) -> Damage:
        """Return how much of the data could not be read so far, by all that hold some."""
        return Damage.all([self.clients.damage_met(), Damage.of(Unread(), self.cloud.tests.unread)])

    def _holders(self) -> list[int]:
        return [n for n in self.clients.present if self.held[n].test_samples]

    def _test_size(self) -> int:
        return self.experiment.training.test_batch_size

    def deployable(self) -> Deployable | None:
        """Return the server's large model; every device keeps its own to itself.

        There is none where nobody has trained it, or where it writes captions, which are no class.
        """
        if self.rules.answer == "caption" or not self.rules.server_steps:
            return None
        large = self.cloud.large
        return UnifiedDeployable(large.tokenizers, large.answers, TASKS["classification"])

    def trainable_parameters(self) -> dict[str, int]:
        """Return how many numbers a device of all modalities trains, and the server."""
        device = sum(p.numel() for p in self.cloud.small.parameters() if p.requires_grad)
        return {"client": device, "server": self.cloud.trained()}

    def save(self, folder: str) -> dict[str, str]:
        """Write the server's state here, and every device's where it is; part -> SHA-256."""
        return self.clients.save(folder, lambda: self.cloud.save(Path(folder) / state.SERVER))

    def damage(self, folder: str, files: Mapping[str, str]) -> str | None:
        """Say what is wrong with a checkpoint, having asked every owner; nothing if it is whole."""
        return self.clients.damage(folder, files)

    def restore(self, folder: str, files: Mapping[str, str]) -> None:
        """Continue from :meth:`save`."""
        path = Path(folder) / state.SERVER
        self.clients.restore(folder, files, lambda: self.cloud.restore(path))


#: What is exchanged where factors are all that is averaged of language models.
_FACTORS = ("lora", "proxy")


def weight_of(update: DeviceUpdate, rule: str) -> float:
    """Return a device's weight in the average, up to a common factor (Eq. 13: ``modalities``)."""
    return {"modalities": update.modalities, "samples": update.samples, "uniform": 1}[rule]


def batch_of(experiment: Experiment) -> int:
    """Return the samples of a mini-batch, of every device and of the server."""
    return experiment.training.batch_size // experiment.clients


def build_devices(
    experiment: Experiment,
    numbers: Sequence[int],
    holdings: Holdings,
    reference: Callable[[Any], Any] | None = None,
) -> list[EdgeDevice]:
    """Build these devices in this process; what is frozen of their language models they share.

    The parameters are those of :data:`mpsl_dist.methods.hosting.BuildClients`; ``reference`` goes
    unused.
    """
    splits, names = holdings.splits, list(holdings.splits.shapes)
    if writes_captions(experiment):
        captions.rouge_l()  # refuses, before anything is trained, where it is not installed
    devices, shared = [], None
    for number in numbers:
        own = holdings.modalities(number) or names
        alike = None if experiment.mlecs.ranks else shared
        model = build_device(experiment, splits, own, number, alike)
        # Devices move their factors: they begin with those of the first before it has moved.
        shared = model.answers
        data, tests = holdings.of(number)
        devices.append(
            EdgeDevice(
                number,
                data,
                holdings.of_public(number)[0],
                tests,
                model,
                experiment.mlecs,
                experiment.training.client,
                batch_of(experiment),
                experiment.training.epochs,
                experiment.seed,
                1 - len(own) / len(names),
                experiment.run_directory.absolute(),
            )
        )
    return devices


def build_cloud(experiment: Experiment, holdings: Holdings) -> Cloud:
    """Build the server's part in this process.

    Raises
    ------
    ConfigError
        If there are classes or modalities too few for what is asked for.
    """
    splits = holdings.splits
    if writes_captions(experiment):
        captions.rouge_l()
    elif splits.retrieval:
        raise ConfigError(f"method: mlecs answers by classes, which {experiment.data.name} lacks")
    if len(splits.shapes) < 2 and experiment.mlecs.contrast:
        raise ConfigError("mlecs.contrast: the data have one modality; take false")
    public, tests = holdings.of_public(experiment.clients)
    return Cloud(
        public,
        TestData(splits.train, holdings.public.train, holdings.loaders),
        tests,
        build_large(experiment, splits),
        build_device(experiment, splits, list(splits.shapes)),
        experiment.mlecs,
        experiment.training.server,
        batch_of(experiment),
        experiment.training.epochs,
        experiment.seed,
        experiment.training.test_batch_size,
        experiment.clients,
    )


def build(setup: Setup) -> Mlecs:
    """Build the server's models here and the devices on the workers of a joined world."""
    experiment = setup.experiment
    cloud = build_cloud(experiment, setup.holdings)
    rounds = max(experiment.runtime.rpc_timeout, experiment.federated.round_timeout)
    fleet = open_fleet(setup, build_devices, experiment.faults.client_timeout or rounds)
    return Mlecs(
        experiment, cloud, DeviceLink(fleet, Traffic(experiment.clients), experiment.faults)
    )
