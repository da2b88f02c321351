"""The start of a run whose data stay with their owners: every host offers, the server agrees.

A worker takes the server's experiment with the keys that are its own host's matter
(:data:`mpsl_dist.config.loading.HOST_KEYS`) as its own command line has them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from mpsl_dist.actors.agreement import Agreement, Disagreement, Offer, agree
from mpsl_dist.actors.checks import check_cache, check_defences, check_missing
from mpsl_dist.actors.holdings import Holdings, load_data
from mpsl_dist.actors.part_checks import refusals_with_data
from mpsl_dist.config import Experiment
from mpsl_dist.config.loading import at_home
from mpsl_dist.data import Splits
from mpsl_dist.data.remarks import remarks
from mpsl_dist.errors import ConfigError, DataError, UserError
from mpsl_dist.records.run_directory import log_to
from mpsl_dist.runtime import world
from mpsl_dist.runtime.environment import Environment
from mpsl_dist.runtime.network import host_name
from mpsl_dist.runtime.placement import place_in_order

#: Stands for a process's rank in ``data.root``, where several are started by one command.
RANK = "{rank}"
_log = logging.getLogger("mpsl_dist")


def is_own(experiment: Experiment) -> bool:
    """Return whether data stay with their owners."""
    return experiment.data.place == "own"


def refuse_shared_file(experiment: Experiment, launched: Environment | None) -> None:
    """Refuse that processes of one host, started by one command, read the same data.

    Parameters
    ----------
    launched : Environment or None
        None where the command starts all processes on this machine.

    Raises
    ------
    ConfigError
        Saying what would work.
    """
    replicas = experiment.server.replicas
    local = launched.local_world if launched else experiment.workers + replicas
    beside_server = launched is None or launched.node == 0
    tests = beside_server and experiment.data.test_at == "server"
    readers = local - (min(replicas, local) if beside_server else 0) + tests
    if is_own(experiment) and readers > 1 and RANK not in (experiment.data.root or ""):
        raise ConfigError(
            f"data.place: own, but {readers} processes of this host would read the same "
            f"data.root={experiment.data.root}; name a file for each, as data.root=data-{RANK}.csv "
            "(the server is rank 0, workers follow), or start each on its own host: "
            "docs/federation.md"
        )


def here(experiment: Experiment, rank: int) -> Experiment:
    """Return the experiment with ``{rank}`` in ``data.root`` filled in."""
    root = experiment.data.root
    filled = root if root is None else root.replace(RANK, str(rank))
    return replace(experiment, data=replace(experiment.data, root=filled))


def servers_data(experiment: Experiment) -> Splits | None:
    """Return the server's test set; None where the clients test, and it has no data at all."""
    if experiment.data.test_at == "clients":
        return None
    return load_data(here(experiment, 0), needs=("test",))


def seen_by_worker(experiment: Experiment) -> tuple[Sequence[str], Sequence[int] | None]:
    """Return the splits that a worker reads, and its clients: all, as None, in a simulation.

    Where data stay with their owners, the clients are as many as a worker has, from 0.
    """
    if not is_own(experiment):
        return ("train", "test"), None
    needs = ("train", "test") if experiment.data.test_at == "clients" else ("train",)
    return needs, range(min(experiment.clients_per_worker, experiment.clients))


# -- on a worker -------------------------------------------------------------------------------


def own_holdings(shared: Experiment, numbers: Sequence[int], rank: int) -> Holdings:
    """Load this host's own data, and deal them among its clients.

    Parameters
    ----------
    shared : Experiment
        The server's; the holdings have this host's own.
    numbers : sequence of int
        Its clients.

    Raises
    ------
    UserError
        As :func:`mpsl_dist.actors.holdings.load_data` and :meth:`Holdings.deal`.
    """
    experiment = here(at_home(shared, world.home()), rank)
    needs, _ = seen_by_worker(experiment)
    splits = load_data(experiment, needs)
    check_cache(experiment, splits)
    check_defences(experiment, splits)
    check_missing(experiment, splits)
    return Holdings.deal(experiment, splits, numbers)


def offer(shared: Experiment, numbers: Sequence[int], rank: int) -> Offer:
    """Return what a worker's host has, or why it has nothing to offer; runs on the worker."""
    try:
        log_to(at_home(shared, world.home()).run_directory / f"rank{rank}.log")
        return own_holdings(shared, numbers, rank).offer(host_name())
    except (UserError, OSError) as error:
        _log.error("%s", error)
        return Offer(host_name(), refusal=str(error) or type(error).__name__)


def as_agreed(
    shared: Experiment, numbers: Sequence[int], rank: int, agreement: Agreement
) -> Holdings:
    """Return a worker's own holdings, labels numbered as all have agreed.

    Raises
    ------
    DataError
        If its data are no longer those that it offered.
    """
    own = own_holdings(shared, numbers, rank)
    before, now = agreement.offers[rank], own.offer(host_name())
    if before != now:
        raise DataError(f"data.root: the data of {now.host} have changed since the run began")
    for line in remarks(own.splits):
        _log.info("%s", line)
    return own.numbered(agreement.classes)


# -- on the server -----------------------------------------------------------------------------


def open_federation(experiment: Experiment, own: Splits | None, joined: world.World) -> Holdings:
    """Ask every worker what its host has; tell all how it ended.

    Parameters
    ----------
    own : Splits, optional
        The server's own data, of :func:`servers_data`.

    Raises
    ------
    UserError
        If the hosts cannot train together, or the parts not with their data.
    RemoteError
        If a worker is lost.
    """
    try:
        holdings = Holdings.elsewhere(experiment, agree(_offers(experiment, own)), own)
        if refusals := refusals_with_data(experiment, holdings.splits):
            raise ConfigError("\n".join(dict.fromkeys(refusals)))
    except UserError as error:
        told = error.by_rank if isinstance(error, Disagreement) else {}
        other = ["the run is refused; the server says why"]
        for rank in joined.workers:
            world.tell([rank], ("refused", "\n".join(told.get(rank, other))))
        raise
    world.tell(joined.workers, ("agreed", 0))
    return holdings


def _offers(experiment: Experiment, own: Splits | None) -> dict[int, Offer]:
    placed = place_in_order(experiment.clients, experiment.clients_per_worker)
    first = experiment.server.replicas
    asked = {rank: (experiment, numbers, rank) for rank, numbers in enumerate(placed, first)}
    offers = world.ask(offer, asked, experiment.runtime.start_timeout)
    if own is None:
        return offers
    missing = (0, len(getattr(own.test, "missing", ())))
    held = (dict(own.shapes), tuple(own.classes), (), (len(own.test.labels),), missing)
    return {0: Offer(host_name(), *held)} | offers
