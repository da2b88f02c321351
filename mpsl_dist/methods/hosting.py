"""Where the actors live: the clients on the workers, references to them here on the server."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mpsl_dist.actors import masking
from mpsl_dist.actors.agreement import Agreement
from mpsl_dist.actors.assembly import build_shared_text, build_tokenizers
from mpsl_dist.actors.choices import describe, device_of, fusion_of, task_of, wire_of
from mpsl_dist.actors.client import Client
from mpsl_dist.actors.defences import guard_of
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.actors.host import Host
from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.actors.references import Local
from mpsl_dist.config import Experiment
from mpsl_dist.config.methods import facts_of
from mpsl_dist.data import Splits
from mpsl_dist.errors import RemoteError
from mpsl_dist.methods import federation
from mpsl_dist.methods.link import Transport
from mpsl_dist.records.run_directory import log_to
from mpsl_dist.runtime import environment, world
from mpsl_dist.runtime.answers import name_clients
from mpsl_dist.runtime.fleet import Fleet
from mpsl_dist.runtime.generations import Generations
from mpsl_dist.runtime.placement import gpu_of, place, place_in_order, replicas_here

#: ``build(experiment, numbers, holdings, reference)`` returns clients that live in the process that
#: it runs in. ``reference(tokenizers)`` returns a client's handle on its tokenizers: an RRef.
BuildClients = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Setup:
    """What a method is built from, on rank 0 of a joined world.

    Attributes
    ----------
    holdings : Holdings
        Who has which samples; no training sample is read here but by centralized training.
    worker_threads : int
        Compute threads of every worker.
    generations : Generations, optional
        Of the joined world, where lost workers may come back.
    options : object
        The method's own options: ``method_options`` as the dataclass of its
        :class:`~mpsl_dist.config.methods.MethodFacts`, checked; None where it has none.
    transport : callable, optional
        Returns what carries messages to the clients that a :data:`BuildClients` builds, in place
        of RPC: for a method that runs in one process.
    """

    experiment: Experiment
    holdings: Holdings
    worker_threads: int
    generations: Generations | None = None
    options: Any = None
    transport: Callable[[BuildClients], Transport] | None = None

    @property
    def splits(self) -> Splits:
        """The experiment's data, as far as this process sees it."""
        return self.holdings.splits


def on_own_gpu(experiment: Experiment) -> Experiment:
    """Return the experiment with this rank's own GPU as its device, where there are any.

    By number, because torch's current device is a thread's own and calls come on many threads.
    """
    launched = environment.resolve(os.environ)
    if device_of(experiment) != "cuda" or launched is None:
        return experiment
    first = launched.rank - launched.local_rank
    replicas = replicas_here(experiment.server.replicas, first, launched.local_world)
    gpu = gpu_of(launched.local_rank, torch.cuda.device_count(), replicas)
    return replace(experiment, device=f"cuda:{gpu}")


def build_clients(
    experiment: Experiment,
    numbers: Sequence[int],
    holdings: Holdings,
    reference: Callable[[Any], Any] = Local,
) -> list[Client]:
    """Build split learning's clients in this process; all begin with the same tokenizers,
    unless each draws its own (``defences.secret_tokenizers``).

    Parameters
    ----------
    numbers : sequence of int
        Which of the experiment's clients.
    reference : callable
        Returns a client's handle on its tokenizers.
    """
    if experiment.tokenizer_sync.masked:
        masking.require()
    splits, device = holdings.splits, device_of(experiment)
    held = {n: holdings.modalities(n) for n in numbers}
    wanted = {name for own in held.values() for name in own or splits.shapes}
    shared_text = build_shared_text(experiment, splits) if "text" in wanted else None
    first = build_tokenizers(experiment, splits, shared_text, wanted).to(device)
    fusion, task = fusion_of(experiment, splits), task_of(splits)
    home = experiment.run_directory.absolute()
    clients = []
    for number in numbers:
        guard = guard_of(experiment, number)
        tokenizers = guard.own_tokenizers(first.only(held[number]) if held[number] else first)
        stepper = Stepper(tokenizers.parameters(), experiment.training.client)
        own = holdings.of(number)
        owned = (reference(tokenizers), stepper, fusion, task, device, home, wire_of(experiment))
        seen = held[number], holdings.modalities(number, tests=False)
        clients.append(Client(number, *own, *owned, guard, *seen))
    return clients


def host_clients(
    experiment: Experiment,
    numbers: Sequence[int],
    rank: int,
    threads: int,
    build: BuildClients,
    agreement: Agreement | None = None,
) -> Host:
    """Build clients on a worker, where this runs.

    Parameters
    ----------
    numbers : sequence of int
        Which of the experiment's clients.
    rank, threads : int
        The worker's rank and its compute threads.
    build : callable
        As of :data:`BuildClients`.
    agreement : Agreement, optional
        Where the data are the worker's own: what all hosts agreed on, as it was told.
    """
    holdings = None
    if agreement is not None:
        holdings = federation.as_agreed(experiment, numbers, rank, agreement)
        experiment = holdings.experiment
        threads = experiment.runtime.worker_threads or threads
    log = log_to(experiment.run_directory / f"rank{rank}.log")
    world.set_threads(threads)
    experiment = on_own_gpu(experiment)
    holdings = holdings or Holdings.load(experiment).only(numbers)
    device = describe(device_of(experiment))
    host = Host(build(experiment, numbers, holdings, world.reference), device)
    for client in host.clients.values():
        log.info("client %d: %s on %s", client.number, client.describe(), device)
    return host


def timeout_of(experiment: Experiment) -> float:
    """Return the seconds until a call to a client counts as failed."""
    patience = experiment.faults.client_timeout if facts_of(experiment).tolerant else None
    return patience or experiment.runtime.rpc_timeout


def open_fleet(setup: Setup, build: BuildClients, timeout: float | None = None) -> Transport:
    """Have every worker build its clients; all workers get about equally many samples.

    Where the data are the workers' own, or a user has several clients, these live on the workers in
    the order of their numbers.

    Parameters
    ----------
    build : callable
        A module's function; it runs on the workers.
    timeout : float, optional
        Seconds until a call counts as failed, if not :func:`timeout_of`.

    Raises
    ------
    RemoteError
        If a worker fails or is lost.
    """
    if setup.transport is not None:
        return setup.transport(build)
    experiment, agreement = setup.experiment, setup.holdings.agreement
    spread = place(setup.holdings.sizes, experiment.workers)
    if agreement is not None or facts_of(experiment).unimodal:
        spread = place_in_order(experiment.clients, experiment.clients_per_worker)
    placed = dict(enumerate(spread, experiment.server.replicas))

    def who(rank: int) -> str:
        return f"{world.rank_name(rank)} ({name_clients(placed[rank])})"

    def host(
        hosted: Mapping[int, Sequence[int]], number: int | None
    ) -> tuple[int, dict[int, RemoteError]]:
        arguments = {
            rank: (
                *(experiment, hosted[rank], rank, setup.worker_threads, build),
                agreement.told(rank) if agreement else None,
            )
            for rank in hosted
        }
        return world.create(host_clients, arguments, experiment.runtime.start_timeout, number, who)

    return Fleet(placed, host, timeout or timeout_of(experiment), setup.generations)
