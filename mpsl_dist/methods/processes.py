"""From an experiment to a finished run: what every process of it does."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence
from typing import Any

import torch

from mpsl_dist.actors import assembly
from mpsl_dist.config import ConfigError, Experiment, to_dict
from mpsl_dist.data import DataError, Splits
from mpsl_dist.methods import centralized, fedavg, fedclip, loop
from mpsl_dist.methods.hosting import load_data, open_fleet
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.psl import Psl
from mpsl_dist.records.run_directory import RunDirectory, environment_of, log_to
from mpsl_dist.runtime import environment, process, rpc
from mpsl_dist.runtime.environment import Environment

_log = logging.getLogger("mpsl_dist")


def processes(experiment: Experiment) -> int:
    """Count a run's processes: the server and its workers, or one that has all the data."""
    return 1 if experiment.method == "centralized" else experiment.workers + 1


def is_worker() -> bool:
    """Say whether a launcher started this process as a rank above 0."""
    found = environment.resolve(os.environ)
    return found is not None and found.rank > 0


def place_in_world(experiment: Experiment, words: Sequence[str]) -> Environment:
    """Read the launcher's variables and check that the world fits the experiment.

    Parameters
    ----------
    experiment : Experiment
    words : sequence of str
        The user's command line, repeated in the line that would have worked.

    Raises
    ------
    ConfigError
        If there is no launcher, or it started another number of processes.
    """
    needed = processes(experiment)
    found = environment.resolve(os.environ) or (environment.alone() if needed == 1 else None)
    start = "python" if needed == 1 else f"torchrun --standalone --nproc-per-node {needed}"
    line = f"{start} -m mpsl_dist {shlex.join(words)}"
    if found is None:
        raise ConfigError(
            f"method={experiment.method} needs {needed} processes, one server and "
            f"{experiment.workers} workers, started together:\n  {line}"
        )
    if needed == 1 and found.world > 1:
        raise ConfigError(
            f"method={experiment.method} is one process, {found.launcher} started "
            f"{found.world}:\n  {line}"
        )
    if found.world != needed:
        raise ConfigError(
            f"{experiment.clients} clients at clients_per_worker={experiment.clients_per_worker} "
            f"need {needed} processes, {found.launcher} started {found.world}:\n  {line}"
        )
    return found


def serve_as_worker(experiment: Experiment, world: Environment) -> None:
    """Host clients until the server ends the world."""
    join(experiment, world)
    patience = min(60.0, experiment.runtime.rpc_timeout)
    end_watch = process.watch_server(lambda: rpc.ping(0, patience))
    rpc.await_end()
    # A ping that outlived RPC would take the server's orderly end for its death, or abort Python's.
    end_watch()
    rpc.stop()


def train_as_server(
    experiment: Experiment,
    world: Environment,
    splits: Splits,
    run: RunDirectory,
    stop: process.StopRequest,
) -> dict[str, Any]:
    """Train with the clients of all workers; gives the run's summary."""
    if world.world > 1:
        join(experiment, world)
    method = connect(experiment, world, splits)
    device = assembly.device_of(experiment)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    placement = method.clients.workers if world.world > 1 else {}
    for line in method.clients.placement(device) if world.world > 1 else ():
        print(line)
        _log.info(line)
    run.write_json("environment", environment_of(world.world, [name], placement))
    summary = loop.train(experiment, splits, method, run, stop)
    if world.world > 1:
        rpc.dismiss(world.world)
    return summary


def connect(experiment: Experiment, world: Environment, splits: Splits) -> loop.Method:
    """Build the server here and the clients on the workers of a joined world."""
    server_threads, worker_threads = _threads(experiment, world)
    rpc.set_threads(server_threads)
    assembly.log_partition(experiment, splits)
    if experiment.method == "centralized":
        return centralized.build(experiment, splits)
    if experiment.method in ("fedavg", "fedclip"):
        federated = {"fedavg": fedavg, "fedclip": fedclip}[experiment.method]
        return federated.build(experiment, splits, worker_threads)
    clients = open_fleet(experiment, splits, worker_threads)
    tokenizers = assembly.build_tokenizers(experiment, splits)
    server = assembly.build_server(experiment, splits, tokenizers.lengths)
    method = {"mpsl": Mpsl, "psl": Psl}[experiment.method]
    return method(experiment, splits, server, clients, tokenizers.to(server.device))


def checked_data(experiment: Experiment) -> Splits:
    """Load the data and refuse what cannot work, before any process waits for another."""
    splits = load_data(experiment)
    refusals = []
    for check in (assembly.build_local_data, assembly.check_patches, assembly.check_task):
        try:
            check(experiment, splits)
        except (ConfigError, DataError) as error:
            refusals.append(str(error))
    if refusals:
        raise ConfigError("\n".join(refusals))
    return splits


def open_run(experiment: Experiment, resume: bool, overwrite: bool) -> RunDirectory:
    """Create or enter the run directory; the server's task alone."""
    run = RunDirectory(experiment.run_directory)
    run.open(to_dict(experiment), resume, overwrite)
    log_to(run.path / "rank0.log").info("server, rank 0, seed %d", experiment.seed)
    return run


def join(experiment: Experiment, world: Environment) -> None:
    """Enter the RPC world; returns when every rank is there."""
    settings = experiment.runtime
    rpc.start(
        world,
        settings.rpc_timeout,
        settings.start_timeout,
        world.interface(settings.interface),
        settings.channels == "tcp",
    )


def _threads(experiment: Experiment, world: Environment) -> tuple[int, int]:
    """Divide the cores: the phases alternate, so the server may take all, workers their share."""
    mine = getattr(os, "sched_getaffinity", None)  # absent on macOS
    cores = len(mine(0)) if mine else os.cpu_count() or 1
    settings = experiment.runtime
    workers_here = max(1, world.local_world - 1)
    return (
        settings.server_threads or cores,
        settings.worker_threads or max(1, cores // workers_here),
    )
