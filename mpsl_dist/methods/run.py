"""From an experiment to a finished run: what every process of it does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from mpsl_dist.actors import assembly
from mpsl_dist.config import ConfigError, Experiment, to_dict
from mpsl_dist.data import Splits
from mpsl_dist.methods import loop
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.setup import load_data, open_fleet
from mpsl_dist.records.run import RunDirectory, environment_of, log_to
from mpsl_dist.runtime import environment, process, rpc
from mpsl_dist.runtime.environment import Environment


def launch_line(experiment: Experiment, config: str) -> str:
    """Give the command that starts all processes of an experiment on one host."""
    return (
        f"torchrun --standalone --nproc-per-node {experiment.workers + 1} "
        f"-m mpsl_dist train {config}"
    )


def place_in_world(experiment: Experiment, config: str) -> Environment:
    """Read the launcher's variables and check that the world fits the experiment.

    Raises
    ------
    ConfigError
        If there is no launcher, or it started another number of processes.
    """
    found = environment.resolve(os.environ)
    needed = experiment.workers + 1
    line = launch_line(experiment, config)
    if found is None:
        raise ConfigError(
            f"method={experiment.method} needs {needed} processes, one server and "
            f"{experiment.workers} workers, started together:\n  {line}"
        )
    if found.world != needed:
        raise ConfigError(
            f"{experiment.clients} clients at clients_per_worker={experiment.clients_per_worker} "
            f"need {needed} processes, {found.launcher} started {found.world}:\n  {line}"
        )
    return found


def serve_as_worker(experiment: Experiment, world: Environment) -> None:
    """Host clients until the server ends the world."""
    _join(experiment, world)
    process.watch_server(lambda seconds: rpc.ping(0, seconds))
    rpc.stop()


def train_as_server(
    experiment: Experiment, world: Environment, run: RunDirectory, stop: process.StopRequest
) -> dict[str, Any]:
    """Train with the clients of all workers; gives the run's summary."""
    server_threads, worker_threads = _threads(experiment, world)
    splits = load_data(experiment)
    _join(experiment, world)
    rpc.set_threads(server_threads)
    clients = open_fleet(experiment, worker_threads)
    tokenizers = assembly.build_tokenizers(experiment, splits)
    device = assembly.device_of(experiment)
    server = assembly.build_server(experiment, splits, tokenizers.lengths)
    method = Mpsl(experiment, splits, server, clients, tokenizers.to(device))
    _record_environment(run, world, device, clients)
    summary = loop.train(experiment, splits, method, run, stop)
    rpc.stop()
    return summary


def _record_environment(
    run: RunDirectory, world: Environment, device: str, clients: rpc.Fleet
) -> None:
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    run.write_json("environment", environment_of(world.world, [name], clients.workers))


def open_run(experiment: Experiment, resume: bool, overwrite: bool) -> RunDirectory:
    """Create or enter the run directory; the server's task alone."""
    run = RunDirectory.open(experiment.run_directory, to_dict(experiment), resume, overwrite)
    log_to(run.path / "rank0.log").info("server, rank 0")
    return run


def open_worker_log(experiment: Experiment, world: Environment) -> None:
    """Start a worker's log once the server has made the run directory."""
    path = Path(experiment.run_directory) / f"rank{world.rank}.log"
    log_to(path).info("worker, rank %d of %d", world.rank, world.world)


def _join(experiment: Experiment, world: Environment) -> None:
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


def check_samples(experiment: Experiment, splits: Splits) -> None:
    """Refuse more clients than samples before any process waits for another."""
    assembly.build_local_data(experiment, splits)
