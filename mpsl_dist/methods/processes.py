"""From an experiment to a finished run: what every process of it does."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NoReturn

from mpsl_dist import plugins
from mpsl_dist.actors import defences
from mpsl_dist.actors.choices import describe, device_of, head_of, unread_by_head
from mpsl_dist.actors.holdings import Holdings, load_data
from mpsl_dist.actors.part_checks import refusals_with_data, refusals_without_data
from mpsl_dist.config import Experiment, to_dict
from mpsl_dist.config.loading import HOST_KEYS
from mpsl_dist.config.methods import (
    comes_back,
    facts_of,
    options_of,
    processes_of,
    unread,
)
from mpsl_dist.data import Splits
from mpsl_dist.data.remarks import remarks
from mpsl_dist.errors import ConfigError, LaunchError, UserError
from mpsl_dist.methods import federation, loop
from mpsl_dist.methods.hosting import Setup, timeout_of
from mpsl_dist.methods.method import Method
from mpsl_dist.methods.progress import say, warn
from mpsl_dist.records import tracking
from mpsl_dist.records.run_directory import RunDirectory, environment_of, log_to
from mpsl_dist.records.tracking import Tracker, Trackers
from mpsl_dist.runtime import (
    admission,
    environment,
    generations,
    launch,
    network,
    process,
    supervisor,
    world,
)
from mpsl_dist.runtime.environment import Environment
from mpsl_dist.runtime.placement import replicas_here
from mpsl_dist.runtime.token import TOKEN_FILE, read_token
from mpsl_dist.typed import flatten


def place_in_world(experiment: Experiment, words: Sequence[str]) -> Environment:
    """Return the launcher's environment, checked to fit the experiment.

    Parameters
    ----------
    experiment : Experiment
    words : sequence of str
        The user's command line, repeated in the line that would have worked.

    Raises
    ------
    ConfigError
        If the launcher started another number of processes, or several of one host would read the
        same data as their own.
    LaunchError
        If its variables contradict each other, or there is none and so many processes do not fit
        this machine.
    """
    needed = processes_of(experiment)
    found = environment.resolve(os.environ)
    federation.refuse_shared_file(experiment, found)
    if found is None:
        launch.check_room(needed)
        return environment.alone()
    start = "python" if needed == 1 else f"torchrun --standalone --nproc-per-node {needed}"
    line = f"{start} -m mpsl_dist {shlex.join(words)}"
    if needed == 1 and found.world > 1:
        raise ConfigError(
            f"method={experiment.method} is one process, {found.launcher} started "
            f"{found.world}:\n  {line}"
        )
    if found.world != needed:
        replicas = experiment.server.replicas
        group = f" and server.replicas={replicas}" if replicas > 1 else ""
        raise ConfigError(
            f"{experiment.clients} clients at clients_per_worker={experiment.clients_per_worker}"
            f"{group} need {needed} processes, {found.launcher} started {found.world}:\n  {line}"
        )
    return found


def serve_as_worker(experiment: Experiment, launched: Environment) -> None:
    """Host clients until the server ends the world, through all of its generations."""
    returns = supervisor.returns()
    world.settle(experiment)
    # Three pings without an answer, and the waits between them, are faults.exit_timeout.
    patience = max(5.0, experiment.faults.exit_timeout / 4)

    def ping() -> bool:
        return world.ping(0, patience)

    if returns:
        supervisor.beat()
        joined, enter = reach(experiment, launched), partial(prove, experiment, launched)
        if not generations.come_back(joined, returns, enter):
            process.leave(0)
    else:
        joined = join(experiment, launched)
        if supervisor.is_child() and not federation.is_own(experiment):
            supervisor.beat()
    if launched.folder:
        process.follow_server(ping)
    else:
        process.leave_stopping_to_server()
    while True:
        end_watch = process.watch_server(ping, lambda: launch.miss_server(launched))
        word, number = world.await_word()
        # A ping that outlived RPC would take the server's orderly end for its death, or abort
        # Python's.
        end_watch()
        if word == "end":
            break
        if word == "refused":
            _leave_refused(number, ping)
        elif word == "meet":
            generations.follow(joined, number)
        elif supervisor.is_child():  # agreed: from now on it is a loss if this process ends
            supervisor.beat()
    if not number:  # not together
        process.leave(0)
    world.stop()


def _leave_refused(why: str, ping: Callable[[], bool]) -> NoReturn:
    """Say why this host cannot take part, and end after the server, which tells its own user."""
    print("\n".join(f"error: {line}" for line in why.splitlines()), file=sys.stderr, flush=True)
    while ping():
        time.sleep(0.2)
    process.leave(2)


def train_as_server(
    experiment: Experiment,
    launched: Environment,
    data: Holdings | Splits | None,
    run: RunDirectory,
    stop: process.StopRequest,
) -> dict[str, Any]:
    """Train with the clients of all workers, and return what ``summary.json`` holds.

    Parameters
    ----------
    data : Holdings, Splits or None
        Of :func:`checked_at_server`.
    """
    joined = join(experiment, launched) if launched.world > 1 else None
    holdings = data
    if federation.is_own(experiment):
        holdings = federation.open_federation(experiment, data, joined)
    method = connect(experiment, launched, holdings, joined)
    if launched.folder:
        stop.listen()
    device = describe(device_of(experiment))
    devices, placement = {world.SERVER: device}, {}
    if launched.world > 1:
        fleet = method.clients.fleet
        devices |= fleet.devices
        placement = fleet.hosted
        for line in fleet.placement(device):
            say(line)
    ignored = unread(experiment)
    if ignored:
        say(f"method={experiment.method} does not read {', '.join(ignored)}")
    ignored = unread_by_head(experiment, holdings.splits)
    if ignored:
        kind, _ = head_of(experiment, holdings.splits)
        say(f"model.head.kind={kind} does not read {', '.join(ignored)}")
    for remark in (*remarks(holdings.splits), *defences.sentences(experiment, holdings.splits)):
        say(remark)
    told = environment_of(launched.world, devices, placement)
    run.write_json("environment", told | {"steps_per_epoch": len(method.plan)})
    summary = loop.train(experiment, holdings.splits, method, run, stop)
    if joined:
        joined.dismiss(together=not method.clients.lost)
    return summary


def connect(
    experiment: Experiment,
    launched: Environment,
    holdings: Holdings,
    joined: world.World | None = None,
    build: Callable[[Setup], Method] | None = None,
) -> Method:
    """Build the server here and the clients on the workers of a joined world.

    Parameters
    ----------
    joined : World, optional
        What :func:`join` returned, where lost workers may come back.
    build : callable, optional
        Builds the method, if not as its facts say.
    """
    server_threads, worker_threads = _threads(experiment, launched)
    world.set_threads(server_threads)
    holdings.log()
    build = build or plugins.resolve(facts_of(experiment).build)
    back = joined is not None and comes_back(experiment)
    admit = partial(prove, experiment, launched)
    renewed = generations.Generations(joined, admit) if back else None
    return build(Setup(experiment, holdings, worker_threads, renewed, options_of(experiment)))


def checked_data(experiment: Experiment) -> Holdings:
    """Load and deal the data; refuse what cannot work before any process waits for another.

    Where data stay with their owners: this host's, as one of its workers would have them.

    Raises
    ------
    UserError
        If the data cannot be loaded.
    ConfigError
        With every refusal after that, one a line.
    """
    refusals = refusals_without_data(experiment)
    splits = holdings = None
    needs, clients = federation.seen_by_worker(experiment)
    try:
        splits = load_data(experiment, needs)
        holdings = Holdings.deal(experiment, splits, clients)
    except UserError as error:
        refusals += str(error).splitlines()
    if splits is not None:
        refusals += refusals_with_data(experiment, splits)
    if refusals or holdings is None:
        raise ConfigError("\n".join(dict.fromkeys(refusals)))
    return holdings


def checked_at_server(experiment: Experiment) -> Holdings | Splits | None:
    """Return what the server can look at before it meets the workers; raises as above.

    Returns
    -------
    Holdings, Splits or None
        All data, dealt; where data stay with their owners the server's own test set, None where it
        has none.
    """
    if not federation.is_own(experiment):
        return checked_data(experiment)
    if refusals := refusals_without_data(experiment):
        raise ConfigError("\n".join(refusals))
    return federation.servers_data(experiment)


def open_run(experiment: Experiment, resume: bool, overwrite: bool) -> RunDirectory:
    """Create or enter the run directory, which is the server's task alone.

    Raises
    ------
    RunError
        If it stands in the way, or cannot be continued.
    ConfigError
        As :func:`trackers_of`.
    """
    run = RunDirectory(experiment.run_directory, to_dict(Experiment()))
    trackers = trackers_of(experiment)
    run.open(to_dict(experiment), resume, overwrite)
    run.trackers = Trackers(trackers, warn)
    log_to(run.path / "rank0.log").info("server, rank 0, seed %d", experiment.seed)
    return run


def trackers_of(experiment: Experiment) -> dict[str, Tracker]:
    """Return who is told of the run's metrics, by :func:`mpsl_dist.records.tracking.find`."""
    asked = experiment.tracking
    return tracking.find(experiment.run_directory, asked.tensorboard, asked.hook)


def join(experiment: Experiment, launched: Environment) -> world.World:
    """Enter the RPC world, and return when every rank is there.

    On several hosts, server and workers first prove to each other that they belong together.

    Raises
    ------
    RemoteError
        If not all ranks meet in time.
    LaunchError
        If no network interface leads to the others, or a worker is refused.
    """
    if launched.rank == 0 and launched.init_method == "env://":
        say("torchrun's own store listens on every interface: docs/clusters.md#security")
    prove(experiment, launched, range(1, launched.world))
    joined = reach(experiment, launched)
    joined.start()
    return joined


def reach(experiment: Experiment, launched: Environment) -> world.World:
    """Reach the place where the ranks meet, as :func:`join`, without entering."""
    settings = experiment.runtime
    place = world.Place(
        launched,
        timeout_of(experiment),
        settings.start_timeout,
        launched.interface(settings.interface),
        settings.channels == "tcp",
        experiment.server.replicas,
    )
    return world.World(place)


def prove(
    experiment: Experiment,
    launched: Environment,
    workers: Collection[int],
    patience: float | None = None,
) -> None:
    """Let these workers in, or enter as one of them, by the run's token; on several hosts alone.

    Parameters
    ----------
    patience : float, optional
        Seconds for all to come, if not ``runtime.start_timeout``.

    Raises
    ------
    LaunchError, RemoteError
        As :func:`mpsl_dist.runtime.admission.admit` and ``enter`` have it.
    """
    if launched.one_host:
        return
    interface = launched.interface(experiment.runtime.interface)
    versions = {name: importlib.metadata.version(name) for name in ("mpsl_dist", "torch")}
    facts = {name: version.partition("+")[0] for name, version in versions.items()}
    facts |= flatten(to_dict(experiment))
    for key in HOST_KEYS if federation.is_own(experiment) else ("runtime.interface",):
        del facts[key]
    card = admission.Card(launched.rank, network.host_name(), facts)
    token, patience = read_token(os.environ), patience or experiment.runtime.start_timeout
    port = launched.port + 1
    if port > 65535:
        raise LaunchError(f"MASTER_PORT={launched.port}: the token needs the port after it too")
    if launched.rank:
        admission.enter((launched.address, port), card, token, patience)
        return
    address = network.listening_address(launched.address)
    say(
        f"the processes meet at {address}, ports {launched.port} and {port}, RPC listens on "
        f"{interface}; "
        + (
            "who joins must prove the token"
            if token
            else f"no {TOKEN_FILE}: who reaches them joins"
        )
    )
    admission.admit((address, port), workers, card, token, patience, say)


def _threads(experiment: Experiment, launched: Environment) -> tuple[int, int]:
    """Return the server's and a worker's threads; phases alternate, so the server has all cores."""
    mine = getattr(os, "sched_getaffinity", None)  # absent on macOS
    cores = len(mine(0)) if mine else os.cpu_count() or 1
    settings = experiment.runtime
    replicas = replicas_here(experiment.server.replicas, 0, launched.local_world)
    workers_here = max(1, launched.local_world - replicas)
    return (
        settings.server_threads or max(1, cores // replicas),
        settings.worker_threads or max(1, cores // workers_here),
    )
