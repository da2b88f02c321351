"""M²FedSA (Zhang, Qi and Xu 2024): unimodal clients that learn from a fusion of all modalities.

A user has a client for each modality. One step: every client sends what the lower half of its
modality's encoder makes of its mini-batch; the server runs the upper halves, and fuses each user's
features; every client compares what its own classifier makes of its feature, and what the fusion
says, with its labels; one backward runs through all of them. After a round (an epoch) the clients
of a modality are averaged. Once the fusion's loss has settled, it teaches the clients and is
trained no more.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from torch import Tensor

from mpsl_dist.actors.choices import device_of
from mpsl_dist.actors.deployable import Deployable, UnimodalDeployable
from mpsl_dist.actors.halves import build_lower, build_upper
from mpsl_dist.actors.modality_server import ModalityServer
from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.actors.unimodal_client import build_clients
from mpsl_dist.config import Experiment
from mpsl_dist.data import Splits
from mpsl_dist.errors import BackwardError
from mpsl_dist.methods import hosting, testing
from mpsl_dist.methods.hosting import Setup
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.objective import require_finite
from mpsl_dist.methods.split_link import SplitLink
from mpsl_dist.records.traffic import Traffic

_log = logging.getLogger("mpsl_dist")


class M2FedSA(Mpsl):
    """M²FedSA, as the server sees it; see :class:`~mpsl_dist.methods.mpsl.Mpsl`."""

    server: ModalityServer

    @property
    def weights(self) -> Mapping[int, int]:
        """Clients' weights in the average of their modality."""
        even = self.experiment.m2fedsa.within == "uniform"
        return dict.fromkeys(self.sizes, 1) if even else self.sizes

    def step(self, epoch_step: int, number: int) -> float | None:
        """Train one step, and after the last one of an epoch end the round; see :meth:`Mpsl.step`.

        Returns
        -------
        float or None
            The mean loss over the samples; None if no user was left to take part.
        """
        groups = [[*self.sizes]]
        if self.experiment.m2fedsa.order == "sequential":
            groups = self._users(self.sizes)
        losses, samples = [], []
        for group in groups:
            taking = [n for n in group if self.plan[epoch_step, n]]
            loss = self._step_with(taking, epoch_step, number)
            if loss is not None:
                losses.append(loss)
                samples.append(int(self.plan[epoch_step, taking].sum()))
        if epoch_step + 1 == len(self.plan):
            self._end_round(f"step {number}")
        weighted = zip(losses, samples, strict=True)
        return sum(loss * n for loss, n in weighted) / sum(samples) if losses else None

    def _attempt(self, epoch_step: int, number: int, taking_part: list[int]) -> float:
        """Train one step with these users; until its owners step nothing has moved."""
        with self.clients.step(epoch_step, number, taking_part) as step:
            smashed = step.tokenize()
            features = self.server.forward(smashed)
            fused = self.server.fuse(features)
            losses = step.loss(features, fused)
            require_finite({n: pair.sum() for n, pair in losses.items()}, number)
            loss, of_fusion, samples = self._aggregate(losses, features)
            step.backward(loss)
            self.step_owners(step)
        self.server.switch.add(of_fusion.item(), samples)
        return loss.item()

    def _aggregate(
        self, losses: Mapping[int, Tensor], features: Mapping[int, Tensor]
    ) -> tuple[Tensor, Tensor, int]:
        """Return the loss of all, the fusion's part of it, and the samples (Eq. 4 of MPSL).

        A user's clients add up, each in full; the fusion's loss is the mean of what they say.
        """
        users = self._users(losses)
        samples = sum(len(features[clients[0]]) for clients in users)
        own, of_fusion = 0.0, 0.0
        for clients in users:
            weight = len(features[clients[0]]) / samples
            own = own + weight * sum(losses[n][0] for n in clients)
            of_fusion = of_fusion + weight * sum(losses[n][1] for n in clients) / len(clients)
        return (own if self.server.switch.on else own + of_fusion), of_fusion.detach(), samples

    def _users(self, clients: Collection[int]) -> list[list[int]]:
        """Return these clients by user."""
        users: dict[int, list[int]] = {}
        for n in clients:
            users.setdefault(self.server.user_of(n), []).append(n)
        return list(users.values())

    def _there(self, wanted: Collection[int]) -> list[int]:
        """Return those that can take part: all clients of a user, or none."""
        there, whole = super()._there(wanted), len(self.server.modalities)
        return [n for user in self._users(there) if len(user) == whole for n in user]

    def _lose_who_fails_alone(
        self, epoch_step: int, number: int, taking_part: list[int], error: BackwardError
    ) -> bool:
        """End the run: a client's backward is none without those of its user."""
        raise error

    def _end_round(self, where: str) -> None:
        began = self.server.switch.on
        self.server.end_round()
        switch = self.server.switch
        losses = ", ".join(f"{loss:.4f}" for loss in switch.history[-1:])
        _log.info("%s: the fusion's loss %s, transfer %s", where, losses, switch.on)
        if switch.on and not began:
            print(f"{where}: from now on the fusion teaches the clients, and is trained no more")
        if self.experiment.m2fedsa.within == "never":
            return
        mean = self.clients.mean_tokenizers(self.clients.present, self.weights, where, "sync_up")
        if mean:  # none where everybody is lost
            self.clients.set_tokenizer_weights(mean, where)

    def evaluate(self) -> dict[str, float]:
        """Test every modality by itself.

        Returns
        -------
        dict of str to float
            ``accuracy``, the mean of the modalities', and of each ``accuracy_image`` and so on;
            where the server tests, ``accuracy_fused`` too, the fusion's of all of them.
        """
        if self.experiment.data.test_at == "server":
            held, size = self.tests, self.experiment.training.test_batch_size
            return self.deployable().test(held, size)
        scores = testing.at_clients(self, None, own=False)[0]
        found = {}
        for place, name in enumerate(self.server.modalities):
            own = [score for n, score in scores.items() if n % len(self.server.modalities) == place]
            if own:  # none where all of them are lost
                found[f"accuracy_{name}"] = testing.overall(own)
        return {"accuracy": sum(found.values()) / len(found)} | found

    def deployable(self) -> Deployable:
        """Return the averaged clients' parts joined with the server's, by modality."""
        testing.fetch_average(self)
        return UnimodalDeployable(self.tokenizers, self.server.model, self.task)


def build(setup: Setup) -> M2FedSA:
    """Build the server here and the clients on the workers of a joined world."""
    experiment, splits = setup.experiment, setup.splits
    fleet = hosting.open_fleet(setup, build_clients)
    link = SplitLink(fleet, Traffic(experiment.clients), experiment.faults)
    server = build_server(experiment, splits)
    tokenizers = build_lower(experiment, splits).to(server.device)
    return M2FedSA(experiment, splits, server, link, tokenizers)


def build_server(experiment: Experiment, splits: Splits) -> ModalityServer:
    """Build the server's part of the model, with its optimizer."""
    model, settings = build_upper(experiment, splits), experiment.training.server
    stepper = Stepper(model.parameters(), settings)
    return ModalityServer(model, stepper, experiment.m2fedsa, device_of(experiment))
