"""Builds the actors where they live: clients on the workers, the server here."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from mpsl_dist import data
from mpsl_dist.actors import assembly
from mpsl_dist.actors.client import Client, Local
from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.config import Experiment
from mpsl_dist.data import Splits
from mpsl_dist.records.run_directory import log_to
from mpsl_dist.runtime import environment, rpc
from mpsl_dist.runtime.placement import gpu_of, place


def load_data(experiment: Experiment) -> Splits:
    """Load the experiment's dataset."""
    chosen = experiment.data
    return data.load(chosen.name, chosen.root, chosen.text_length, **data_options(experiment))


def data_options(experiment: Experiment) -> dict[str, Any]:
    """Give what the experiment asks of its dataset; None is the dataset's own."""
    names = ("image_size", "audio_frames", "modalities", "on_error", "cache")
    return {name: getattr(experiment.data, name) for name in names}


def on_own_gpu(experiment: Experiment) -> Experiment:
    """Name this rank's GPU, where there are any.

    By number, because torch's current device is a thread's own and calls come on many threads.
    """
    world = environment.resolve(os.environ)
    if assembly.device_of(experiment) != "cuda" or world is None:
        return experiment
    gpu = gpu_of(world.local_rank, torch.cuda.device_count(), beside_server=world.node == 0)
    return replace(experiment, device=f"cuda:{gpu}")


def build_clients(
    experiment: Experiment, numbers: list[int], splits: Splits, reference=Local
) -> list[Client]:
    """Build these clients in this process.

    Parameters
    ----------
    numbers : list of int
        Which of the experiment's clients.
    reference : callable
        How a client refers to its tokenizers: an RRef on a worker.
    """
    frozen_text = assembly.build_frozen_text(experiment, splits)
    held = assembly.build_local_data(experiment, splits)
    device = assembly.device_of(experiment)
    clients = []
    for number in numbers:
        tokenizers = assembly.build_tokenizers(experiment, splits, frozen_text).to(device)
        stepper = Stepper(tokenizers.parameters(), experiment.training.client)
        fusion = assembly.fusion_of(experiment, splits)
        clients.append(
            Client(number, *held[number], reference(tokenizers), stepper, fusion, device)
        )
    return clients


def host_clients(
    experiment: Experiment, numbers: list[int], rank: int, threads: int
) -> list[Client]:
    """Build these clients on a worker; each holds an RRef to its tokenizers."""
    log = log_to(experiment.run_directory / f"rank{rank}.log")
    rpc.set_threads(threads)
    experiment = on_own_gpu(experiment)
    clients = build_clients(experiment, numbers, load_data(experiment), rpc.reference)
    for client in clients:
        log.info("client %d: %s on %s", client.number, client.describe(), client.device)
    return clients


def open_fleet(
    experiment: Experiment,
    splits: Splits,
    threads: int,
    host: Callable[..., list[Any]] = host_clients,
    timeout: float | None = None,
) -> rpc.Fleet:
    """Have every worker build its clients; gives the server's references to all of them.

    Parameters
    ----------
    splits : Splits
        Say how many samples each client has; workers get about as many each.
    threads : int
        Compute threads of a worker.
    host : callable
        Builds the clients of a worker, as :func:`host_clients` does.
    timeout : float, optional
        Seconds until a call counts as failed, if not ``runtime.rpc_timeout``.
    """
    sizes = [len(train) for train, _ in assembly.build_local_data(experiment, splits)]
    placed = place(sizes, experiment.workers)
    arguments = {
        rank: (experiment, clients, rank, threads) for rank, clients in enumerate(placed, 1)
    }
    owned = rpc.create(host, arguments, experiment.runtime.start_timeout)
    owners = {
        client: reference
        for rank, clients in enumerate(placed, 1)
        for client, reference in zip(clients, owned[rank], strict=True)
    }
    return rpc.Fleet(owners, timeout or experiment.runtime.rpc_timeout)
