"""The server as a group of replicas: equal copies of encoder and head that share a global batch.

The group is a star. Clients talk to replica 0 alone, which hands every other replica the smashed
activations of its share of the clients, inside the step's autograd context, and collects the
predictions: one backward goes through all replicas. They sum their gradients among themselves, and
each steps its own optimizer on the same sums, so that all stay equal to the last bit.

Nested calls, by which a replica would itself call the workers of its clients, would spare the hop
through replica 0. They would also spread over the replicas what replica 0 does for all clients:
count every message, find who is lost and repeat the step without it, meet workers that come back.
The hop is inside the server's machine; ``docs/replicas.md`` has what it costs.

Gradients are summed after the backward, not during it: a client that is lost ends a backward in
the middle, when some replicas would wait for others in a sum that these never begin.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mpsl_dist.actors.agreement import Elsewhere
from mpsl_dist.actors.assembly import build_server_model
from mpsl_dist.actors.choices import describe, device_of
from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.actors.server import Server, Smashed
from mpsl_dist.config import Experiment
from mpsl_dist.data import Splits
from mpsl_dist.methods.hosting import Setup, on_own_gpu
from mpsl_dist.models.server_model import ServerModel
from mpsl_dist.records.run_directory import log_to
from mpsl_dist.runtime import world
from mpsl_dist.runtime.network import host_name
from mpsl_dist.runtime.placement import place
from mpsl_dist.runtime.replicas import Reduction, Replicas

_log = logging.getLogger("mpsl_dist")


class Replica:
    """One of the server's copies, in a process of its own.

    Parameters
    ----------
    server : Server
        Built as in every other replica.
    """

    def __init__(self, server: Server) -> None:
        self.server = server

    def join(self, name: str, rank: int, count: int, nccl: bool, timeout: float) -> str:
        """Meet the other replicas; return where this one is, as a user reads it."""
        self.reduction = Reduction(name, rank, count, self.server.device, nccl, timeout)
        return f"{host_name()}, {describe(self.server.device)}"

    def forward(self, smashed: Smashed, from_cut: bool = False) -> dict[int, Tensor]:
        """Return the predictions for these clients; see :meth:`Server.forward`."""
        return self.server.forward(smashed, from_cut) if smashed else {}

    def step(self, step: int, span: tuple[int, int], gradients: Mapping[Tensor, Tensor]) -> None:
        """Step the optimizer at the run's step ``step`` on the sum of all replicas' gradients.

        Parameters
        ----------
        span : tuple of int
            Steps of an epoch, and epochs: what the schedule spans.
        gradients : mapping of Tensor to Tensor
            This replica's own, by parameter.
        """
        stepper = self.server.stepper
        stepper.plan(*span)
        own = [gradients.get(parameter) for parameter in stepper.parameters]
        sums = zip(stepper.parameters, self.reduction.sum(own, stepper.parameters), strict=True)
        self.server.step(step, {p: total for p, total in sums if total is not None})

    def restore(self, folder: str) -> None:
        """Continue from what replica 0 wrote to ``folder``."""
        self.server.restore(folder)


class ServerGroup:
    """All replicas, behind the face of one :class:`~mpsl_dist.actors.server.Server`.

    Tests and checkpoints are replica 0's alone, because all replicas are equal.

    Parameters
    ----------
    own : Replica
        Replica 0, in this process.
    others : Replicas
        The way to the others.
    count : int
        How many there are in all.
    """

    def __init__(self, own: Replica, others: Replicas, count: int) -> None:
        self.own = own
        self.others = others
        self.count = count

    @property
    def model(self) -> ServerModel:
        """Replica 0's, equal to every other's."""
        return self.own.server.model

    @property
    def stepper(self) -> Stepper:
        """Replica 0's."""
        return self.own.server.stepper

    @property
    def device(self) -> str:
        """Where replica 0 computes."""
        return self.own.server.device

    def forward(self, smashed: Smashed, from_cut: bool = False) -> dict[int, Tensor]:
        """Run the encoder once over the global batch, every replica over its share of the clients.

        Returns
        -------
        dict of int to Tensor
            As of :meth:`Server.forward`.

        Raises
        ------
        RemoteError
            If a replica is lost or fails.
        """
        if not torch.is_grad_enabled():
            return self.own.forward(smashed, from_cut)
        mine, *theirs = shares(smashed, self.count)
        wait = self.others.start("forward", [(share,) for share in theirs])
        predictions = self.own.forward(mine)
        for share in wait():
            predictions |= share
        return {client: predictions[client] for client in smashed}

    def step(self, step: int, gradients: Mapping[Tensor, Tensor]) -> None:
        """Step every replica's optimizer on the sum of all gradients.

        Parameters
        ----------
        step : int
            Of the run.
        gradients : mapping of Tensor to Tensor
            Replica 0's own; those of the others are where they are.

        Raises
        ------
        RemoteError
            If a replica is lost or fails.
        """
        span = self.stepper.span
        wait = self.others.start("step", self.others.everyone(step, span), with_gradients=True)
        try:
            self.own.step(step, span, gradients)
        finally:
            wait()  # where a sum has failed, this tells whose fault it was

    def save(self, folder: str) -> str:
        """Write replica 0's encoder, head and optimizer; return the file's SHA-256."""
        return self.own.server.save(folder)

    def restore(self, folder: str) -> None:
        """Have every replica continue from what :meth:`save` wrote."""
        wait = self.others.start("restore", self.others.everyone(folder))
        try:
            self.own.restore(folder)
        finally:
            wait()


def shares(smashed: Smashed, count: int) -> list[dict[int, list[Tensor]]]:
    """Deal whole clients to replicas 0, 1, ..., so that all have about equally many samples."""
    clients = list(smashed)
    dealt = place([len(smashed[client][0]) for client in clients], count)
    return [{clients[at]: list(smashed[clients[at]]) for at in share} for share in dealt]


def build_server(experiment: Experiment, splits: Splits, lengths: Sequence[int]) -> Server:
    """Build one server in this process.

    Parameters
    ----------
    lengths : sequence of int
        Tokens per modality, in fusion order.
    """
    model = build_server_model(experiment, splits, list(lengths))
    stepper = Stepper(model.parameters(), experiment.training.server)
    server = Server(model, stepper, device_of(experiment))
    if experiment.training.compile:
        server.compile()
    return server


def host_replica(
    experiment: Experiment, splits: Splits, lengths: Sequence[int], rank: int, threads: int
) -> Replica:
    """Build a replica on its rank, where this runs; equal seeds make it equal to the others."""
    log_to(experiment.run_directory / f"rank{rank}.log")
    world.set_threads(threads)
    return Replica(build_server(on_own_gpu(experiment), splits, lengths))


def open_server(setup: Setup, lengths: Sequence[int]) -> Server | ServerGroup:
    """Build the server here, and its other replicas on their ranks.

    Parameters
    ----------
    lengths : sequence of int
        Tokens per modality, in fusion order.

    Raises
    ------
    RemoteError
        If a replica fails or is lost.
    """
    experiment, splits = setup.experiment, setup.splits
    server, count = build_server(experiment, splits, lengths), experiment.server.replicas
    if count == 1:
        return server
    known = Splits(Elsewhere.of(0), Elsewhere.of(0), splits.shapes, splits.classes)
    words = {
        rank: (experiment, known, list(lengths), rank, torch.get_num_threads())
        for rank in range(1, count)
    }

    def who(rank: int) -> str:
        return world.rank_name(rank, count)

    timeout = experiment.runtime.start_timeout
    number, failed = world.create(host_replica, words, timeout, who=who)
    for error in failed.values():
        raise error
    group = ServerGroup(Replica(server), Replicas(number, count, _timeout(experiment)), count)
    nccl = server.device == "cuda" and torch.cuda.device_count() >= count
    told = (count, nccl, _timeout(experiment))
    wait = group.others.start("join", [(f"replicas {number}", r, *told) for r in range(1, count)])
    group.own.join(f"replicas {number}", 0, *told)
    for rank, where in enumerate(wait(), 1):
        print(f"{who(rank)} on {where}")
        _log.info("%s on %s", who(rank), where)
    return group


def _timeout(experiment: Experiment) -> float:
    """Return the seconds for a replica, which ``faults.client_timeout`` does not mean."""
    return experiment.runtime.rpc_timeout
