"""The server as a group of replicas: copies of encoder and head, or shards of them, that share a
global batch.

The group is a star. Clients talk to replica 0 alone, which hands every other replica the smashed
activations of its share of the clients, and collects the predictions. In the graph of the step all
replicas together are one node of replica 0's: it goes backward once every client's gradient is
there, and then on all replicas. So whatever they do together, none waits for another in it because
a client was lost: it is begun by all of them or by none.

Nested calls, by which a replica would itself call the workers of its clients, would spare the hop
through replica 0. They would also spread over the replicas what replica 0 does for all clients:
count every message, find who is lost and repeat the step without it, meet workers that come back.
The hop is inside the server's machine; ``docs/replicas.md`` has what it costs.

Shape legend: ``b`` batch, ``l`` length in tokens, ``d`` width, ``k`` classes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpsl_dist.actors.agreement import Elsewhere
from mpsl_dist.actors.assembly import build_server_model
from mpsl_dist.actors.choices import device_of
from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.actors.server import Server, Smashed
from mpsl_dist.config import Experiment
from mpsl_dist.data import Splits
from mpsl_dist.errors import ConfigError
from mpsl_dist.methods.hosting import Setup, on_own_gpu
from mpsl_dist.methods.progress import say
from mpsl_dist.methods.replica import Replica
from mpsl_dist.models.gapped import Crossing, converted, samples_of, tensors_of
from mpsl_dist.models.server_model import ServerModel
from mpsl_dist.records.run_directory import log_to
from mpsl_dist.runtime import world
from mpsl_dist.runtime.placement import place
from mpsl_dist.runtime.replicas import Replicas

#: Whose activations a replica in shards makes up where it has no client: what shards do, all do.
_NOBODY = -1


class _Everyone(torch.autograd.Function):
    """All replicas as one node of the graph of replica 0."""

    @staticmethod
    def forward(
        ctx: Any,
        back: Callable[[Sequence[Tensor]], list[Tensor | None]],
        predictions: Sequence[Tensor],
        _: Tensor,
        *smashed: Tensor,
    ) -> tuple[Tensor, ...]:
        """Put what the replicas predict into the graph, behind what they were given."""
        ctx.back = back
        return tuple(predictions)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *ctx.back(gradients)


class ServerGroup:
    """All replicas, behind the face of one :class:`~mpsl_dist.actors.server.Server`.

    Parameters
    ----------
    own : Replica
        Replica 0, in this process.
    others : Replicas
        The way to the others.
    count : int
        How many there are in all.
    build : callable
        Returns a whole model on the CPU, for shards to be gathered in.
    """

    def __init__(
        self, own: Replica, others: Replicas, count: int, build: Callable[[], ServerModel]
    ) -> None:
        self.own = own
        self.others = others
        self.count = count
        self._build = build
        # What is under way of a step that was given up ends before anything else begins.
        self._turn = threading.Lock()
        self._pass = object()
        self._broken: Exception | None = None

    @property
    def model(self) -> nn.Module:
        """Replica 0's, equal to every other's; in shards, one that all compute together."""
        return _Together(self) if self.own.shard else self.own.server.model

    @property
    def stepper(self) -> Stepper:
        """Replica 0's."""
        return self.own.server.stepper

    @property
    def device(self) -> str:
        """Where replica 0 computes."""
        return self.own.device

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
            return self.predict(smashed)
        asked = {n: [x.requires_grad for x in tensors_of(smashed[n])] for n in smashed}
        dealt, first = self._deal(smashed), next(iter(asked.values()))
        told = [(share, {n: asked.get(n, first) for n in share}) for share in dealt]
        found = self._all("forward", told)
        predictions = {n: slice_bk for share in found for n, slice_bk in share.items()}
        # A parameter's gradient is wanted even where none of the activations' is.
        anchor = torch.zeros((), requires_grad=bool(self.stepper.parameters))
        tensors = {n: len(asked[n]) for n in smashed}
        back = partial(self._backward, self._pass, tensors, [list(share) for share in dealt])
        flat = [x for sent in smashed.values() for x in tensors_of(sent)]
        outcome = _Everyone.apply(back, [predictions[n] for n in smashed], anchor, *flat)
        return dict(zip(smashed, outcome, strict=True))

    def predict(self, smashed: Smashed) -> dict[int, Tensor]:
        """Return predictions as in a test: replica 0's alone, or in shards those of all."""
        if not self.own.shard:
            return self.own.server.forward(smashed, from_cut=True)
        found = self._all("predict", [(share,) for share in self._deal(smashed)])
        together = {n: slice_bk for share in found for n, slice_bk in share.items()}
        return {n: together[n] for n in smashed}

    def _deal(self, smashed: Smashed) -> list[dict[int, Crossing]]:
        """Return every replica's share, out of any graph; in shards it is never empty."""
        dealt = shares({n: converted(smashed[n], _detached) for n in smashed}, self.count)
        if self.own.shard:
            example = next(iter(smashed.values()))
            one = [x_bld[:1].detach().clone() for x_bld in tensors_of(example)]
            dealt = [share or {_NOBODY: one} for share in dealt]
        return dealt

    def _backward(
        self,
        of: object,
        tensors: Mapping[int, int],
        dealt: Sequence[Sequence[int]],
        gradients: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """Have every replica go backward; return the gradients of all that came in, in order.

        ``tensors`` says how many came of each client. Of a step that was given up, while the
        replicas have begun something else, there are no gradients. An error would be heard by
        nobody, and its callers would wait for it at the run's end.
        """
        by_client = {n: g.clone() for n, g in zip(tensors, gradients, strict=True)}
        told = [({n: by_client[n] for n in share if n in by_client},) for share in dealt]
        with self._turn:
            found = self._ask("backward", told) if of is self._pass else []
        back = {n: own for share in found for n, own in share.items()}
        return [x for n in tensors for x in back.get(n, [None] * tensors[n])]

    def _all(self, message: str, told: Sequence[Sequence[Any]]) -> list[Any]:
        """Have all replicas do the same at the same time, and return their answers.

        Raises
        ------
        RemoteError
            If a replica is lost or fails; the group does nothing more then.
        """
        with self._turn:
            self._pass = object()
            return self._ask(message, told)

    def _ask(self, message: str, told: Sequence[Sequence[Any]]) -> list[Any]:
        if self._broken is not None:
            raise self._broken
        mine, *theirs = told
        try:
            wait = self.others.start(message, theirs)
            try:
                own = getattr(self.own, message)(*mine)
            finally:
                answers = wait()  # where something in common fails, this tells whose fault it was
        except Exception as error:
            self._broken = error
            raise
        return [own, *answers]

    def step(self, step: int, gradients: Mapping[Tensor, Tensor]) -> None:
        """Step every replica's optimizer on the sum of all gradients.

        Parameters
        ----------
        step : int
            Of the run.
        gradients : mapping of Tensor to Tensor
            Of the clients' graph, in which the replicas have none: those are where they are.

        Raises
        ------
        RemoteError
            If a replica is lost or fails.
        """
        self._all("step", [(step, self.stepper.span)] * self.count)

    def save(self, folder: str) -> str:
        """Write encoder, head and optimizer, replica 0 for all; return the file's SHA-256."""
        if not self.own.shard:
            return self.own.server.save(folder)
        digest, *_ = self._all("save", [(folder,), *[(None,)] * (self.count - 1)])
        return digest

    def restore(self, folder: str) -> None:
        """Have every replica continue from what :meth:`save` wrote, in shards or not."""
        self._all("restore", [(folder,)] * self.count)

    def whole_model(self) -> ServerModel:
        """Return encoder and head as one; gathered on the CPU, where they are in shards."""
        if not self.own.shard:
            return self.own.server.model
        gathered, *_ = self._all("gather", [(True,), *[(False,)] * (self.count - 1)])
        model = self._build()
        model.load_state_dict(gathered)
        return model


class _Together(nn.Module):
    """The model in shards, as a test sees it: every replica computes its part of a batch."""

    def __init__(self, group: ServerGroup) -> None:
        super().__init__()
        self.shards = group.own.server.model
        self.fusion, self.lengths = self.shards.fusion, self.shards.lengths
        self._group = group

    def forward(self, smashed: Sequence[Tensor]) -> Tensor:
        """Return predictions; nothing is kept for a backward."""
        parts = zip(*(x_bld.cpu().chunk(self._group.count) for x_bld in smashed), strict=True)
        found = self._group.predict({n: list(part) for n, part in enumerate(parts)})
        return torch.cat(list(found.values()))


def _detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach() for x in tensors]


def shares(smashed: Smashed, count: int) -> list[dict[int, Crossing]]:
    """Deal whole clients to replicas 0, 1, ..., so that all have about equally many samples."""
    clients = list(smashed)
    dealt = place([samples_of(smashed[client]) for client in clients], count)
    return [{clients[at]: smashed[clients[at]] for at in share} for share in dealt]


def build_server(experiment: Experiment, splits: Splits, lengths: Sequence[int]) -> Server:
    """Build one server in this process; on the CPU, if it is to be in shards.

    Parameters
    ----------
    lengths : sequence of int
        Tokens per modality, in fusion order.
    """
    if experiment.server.shard:
        experiment = replace(experiment, device="cpu")
    model = build_server_model(experiment, splits, list(lengths))
    stepper = Stepper(model.parameters(), experiment.training.server)
    server = Server(model, stepper, device_of(experiment))
    if experiment.training.compile:
        server.compile()
    return server


def build_replica(experiment: Experiment, splits: Splits, lengths: Sequence[int]) -> Replica:
    """Build a replica in this process; equal seeds make it equal to the others."""
    server, shard = build_server(experiment, splits, lengths), experiment.server.shard
    return Replica(server, device_of(experiment), shard)


def host_replica(
    experiment: Experiment, splits: Splits, lengths: Sequence[int], rank: int, threads: int
) -> Replica:
    """Build a replica on its rank, where this runs."""
    log_to(experiment.run_directory / f"rank{rank}.log")
    world.set_threads(threads)
    return build_replica(on_own_gpu(experiment), splits, lengths)


def open_server(setup: Setup, lengths: Sequence[int]) -> Server | ServerGroup:
    """Build the server here, and its other replicas on their ranks.

    Parameters
    ----------
    lengths : sequence of int
        Tokens per modality, in fusion order.

    Raises
    ------
    ConfigError
        If the server is to be in shards, and there are GPUs but too few of them.
    RemoteError
        If a replica fails or is lost.
    """
    experiment, splits = setup.experiment, setup.splits
    count, cuda = experiment.server.replicas, device_of(experiment).startswith("cuda")
    if count == 1:
        return build_server(experiment, splits, lengths)
    nccl = cuda and torch.cuda.device_count() >= count
    if experiment.server.shard and cuda and not nccl:
        raise ConfigError(
            f"server.shard: {count} replicas need a GPU each on the server's host, which has "
            f"{torch.cuda.device_count()}; lower server.replicas, or set server.shard=false"
        )
    own = build_replica(experiment, splits, lengths)
    others = _start_others(setup, lengths)
    on_cpu = replace(experiment, device="cpu")
    build = partial(build_server_model, on_cpu, splits, list(lengths))
    _join(own, others, nccl, experiment.runtime.rpc_timeout)
    return ServerGroup(own, others, count, build)


def _start_others(setup: Setup, lengths: Sequence[int]) -> Replicas:
    """Build all replicas but the one that is here, on their ranks."""
    experiment, splits = setup.experiment, setup.splits
    count = experiment.server.replicas
    known = Splits(Elsewhere.of(0), Elsewhere.of(0), splits.shapes, splits.classes)
    words = {
        rank: (experiment, known, list(lengths), rank, torch.get_num_threads())
        for rank in range(1, count)
    }
    timeout = experiment.runtime.start_timeout
    who = partial(world.rank_name, replicas=count)
    number, failed = world.create(host_replica, words, timeout, who=who)
    for error in failed.values():
        raise error
    return Replicas(number, count, experiment.runtime.rpc_timeout)


def _join(own: Replica, others: Replicas, nccl: bool, timeout: float) -> None:
    """Have all replicas meet, and tell where they are."""
    told = [(others.name, rank, others.count, nccl, timeout) for rank in range(others.count)]
    wait = others.start("join", told[1:])
    try:
        own.join(*told[0])
    finally:
        places = wait()  # where they do not meet, this tells whose fault it was
    for rank, where in enumerate(places, 1):
        say(f"{world.rank_name(rank, others.count)} on {where}")
