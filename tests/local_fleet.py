"""Clients of this process behind the server's links, with every call remembered."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from mpsl_dist.actors import deployable
from mpsl_dist.actors.assembly import build_server_model, build_tokenizers
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.actors.host import Host
from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.actors.server import Server
from mpsl_dist.config import Experiment, Faults
from mpsl_dist.methods import fedavg, m2fedsa
from mpsl_dist.methods.fedavg import FedAvg
from mpsl_dist.methods.hosting import BuildClients, Setup, build_clients
from mpsl_dist.methods.m2fedsa import M2FedSA
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.round_link import RoundLink
from mpsl_dist.methods.split_link import SplitLink
from mpsl_dist.records.traffic import Traffic
from mpsl_dist.runtime.answers import Answers
from mpsl_dist.runtime.local import LocalFleet


class WatchedFleet(LocalFleet):
    """Remembers (message, clients) of every call; clients come back as ``rebuild`` makes them."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.calls: list[tuple[str, list[int]]] = []
        self.rebuild: Callable[[list[int]], Sequence[Any]] | None = None
        self.back: list[int] = []
        self.awake: set[int] = set()

    def returned(self) -> list[int]:
        back, self.back = self.back, []
        if back:
            self.host.clients |= {c.number: c for c in self.rebuild(back)}
        return back

    def idle(self, clients: Collection[int]) -> list[int]:
        return sorted(self.awake & set(clients))

    def start(
        self,
        message: str,
        arguments: Mapping[int, Sequence[Any]],
        where: str = "",
        autograd: Any = None,
    ) -> Callable[[], Answers]:
        self.calls.append((message, list(arguments)))
        return super().start(message, arguments, where, autograd)


class LocalRounds(RoundLink):
    """A link to federated clients of this process."""

    def __init__(self, clients: Sequence[Any], faults: Faults | None = None) -> None:
        super().__init__(WatchedFleet(Host(clients)), Traffic(len(clients)), faults)
        self.references, self.calls = self.fleet.host.clients, self.fleet.calls


class LocalSplit(SplitLink):
    """A link to split learning's clients of this process."""

    def __init__(self, clients: Sequence[Any], faults: Faults | None = None) -> None:
        super().__init__(WatchedFleet(Host(clients)), Traffic(len(clients)), faults)
        self.references, self.calls = self.fleet.host.clients, self.fleet.calls


def in_one_process(chosen: Experiment, kind: type[Mpsl] = Mpsl) -> Mpsl:
    """The method with all its clients in this process, on one thread."""
    torch.set_num_threads(1)
    holdings = Holdings.load(chosen)
    tokenizers = build_tokenizers(chosen, holdings.splits)
    model = build_server_model(chosen, holdings.splits, tokenizers.lengths)
    server = Server(model, Stepper(model.parameters(), chosen.training.server))
    clients = LocalSplit(build_clients(chosen, range(chosen.clients), holdings), chosen.faults)
    clients.fleet.rebuild = lambda numbers: build_clients(chosen, numbers, holdings)
    return kind(chosen, holdings.splits, server, clients, tokenizers)


def rounds_in_one_process(chosen: Experiment) -> FedAvg:
    """FedAvg or FedCLIP with all its clients in this process, on one thread."""
    torch.set_num_threads(1)
    holdings = Holdings.load(chosen)
    clients = fedavg.build_clients(chosen, range(chosen.clients), holdings)
    model = deployable.build(chosen, holdings.splits)
    return FedAvg(chosen, holdings.splits, model, LocalRounds(clients, chosen.faults))


def users_in_one_process(chosen: Experiment) -> M2FedSA:
    """M²FedSA with all clients of all users in this process, on one thread."""
    torch.set_num_threads(1)
    holdings = Holdings.load(chosen)

    def transport(build: BuildClients) -> WatchedFleet:
        return WatchedFleet(Host(build(chosen, range(chosen.clients), holdings)))

    return m2fedsa.build(Setup(chosen, holdings, 1, transport=transport))


def steps_of(method: Any, steps: int) -> list[float | None]:
    """Train so many steps; gives the losses."""
    losses = []
    for step in range(steps):
        epoch, epoch_step = divmod(step, len(method.plan))
        if epoch_step == 0:
            method.begin_epoch(epoch)
        losses.append(method.step(epoch_step, step))
    return losses
