"""What every rank of a multi-process test runs: ``torchrun ranks.py TASK ARGUMENT``.

Rank 0 runs the task named on the command line; the others host clients as in a real run.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys
from local_fleet import in_one_process

from mpsl_dist.actors import assembly
from mpsl_dist.actors.client import Client
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.actors.masking import Masked
from mpsl_dist.actors.modality_server import ModalityServer
from mpsl_dist.actors.server import Server
from mpsl_dist.config import Experiment, from_dict
from mpsl_dist.config.schema import Server as ServerKeys
from mpsl_dist.methods import processes
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.replica import Replica
from mpsl_dist.methods.server_group import ServerGroup
from mpsl_dist.models.gapped import tensors_of
from mpsl_dist.records import state
from mpsl_dist.runtime import environment, process, sharding, world
from mpsl_dist.runtime.answers import Answers
from mpsl_dist.runtime.fleet import Fleet

#: Modalities of the tokenizers that were built here.
BUILT: list[str] = []


def train_and_tell(experiment: Experiment, launched: environment.Environment, steps: int) -> dict:
    """Train some steps by the real method; give every number that came of it."""
    BUILT.clear()
    method = processes.connect(experiment, launched, Holdings.load(experiment))
    told: dict[str, Any] = {"losses": [], "cut_gradients": [], "forwards": 0, "backwards": 0}
    ranks = range(experiment.server.replicas, experiment.server.replicas + experiment.workers)
    told["built"] = list(world.ask(tell_built, dict.fromkeys(ranks, ()), 60).values())
    if isinstance(method.server, ServerGroup):
        give_steps_up(method)
    elif not isinstance(method.server, ModalityServer):
        _count_passes(method.server.model.encoder, told)
    _keep_cut_gradients(method, told["cut_gradients"])
    for step in range(steps):
        epoch, epoch_step = divmod(step, len(method.plan))
        if epoch_step == 0:
            method.begin_epoch(epoch)
        told["losses"].append(method.step(epoch_step, step))
    told["clients"] = method.clients.tokenizer_weights(
        list(method.sizes), "test", "test_weights_up"
    )
    told["replicas"], told["bytes"] = [], method.traffic.by_kind()
    if experiment.server.shard:
        told |= tell_shards(method, Path(experiment.output) / experiment.name)
    else:
        told |= {"server": state_of(method.server), "moments": moments_of(method.server)}
    if isinstance(method.server, ServerGroup) and not experiment.server.shard:
        number, others = method.server.others._number, range(1, experiment.server.replicas)
        told["replicas"] = list(
            world.ask(tell_replica, dict.fromkeys(others, (number,)), 60).values()
        )
    return told


def count_tokenizers() -> None:
    """Note the modality of every tokenizer that is built in this process."""
    build = assembly._build_tokenizer

    def noting(experiment: Experiment, modality: str, *words: Any) -> torch.nn.Module:
        BUILT.append(modality)
        return build(experiment, modality, *words)

    assembly._build_tokenizer = noting


def tell_built() -> list[str]:
    """What has been built since the last time; runs on a worker."""
    built = BUILT.copy()
    BUILT.clear()
    return built


def _count_passes(encoder: torch.nn.Module, told: dict[str, Any]) -> None:
    told["block_forwards"] = 0
    for block in encoder:
        block.norm1.register_forward_hook(
            lambda *_: told.update(block_forwards=told["block_forwards"] + 1)
        )
    encoder.register_forward_hook(lambda *_: told.update(forwards=told["forwards"] + 1))
    encoder.register_full_backward_hook(lambda *_: told.update(backwards=told["backwards"] + 1))


def give_steps_up(method: Mpsl) -> None:
    """Begin the first step and give it up: before its backward, and between that and its end."""
    method.begin_epoch(0)
    clients = np.flatnonzero(method.plan[0]).tolist()
    for goes_back in (False, True):
        with method.clients.step(0, 0, clients) as step:
            predictions = method.server.forward(step.tokenize())
            if goes_back:
                step.backward(method.objective(step, predictions))


def tell_shards(method: Mpsl, folder: Path) -> dict[str, Any]:
    """What has become of shards, what replicas hold of them, and what a run goes on from."""
    server, others = method.server, range(1, method.server.count)
    plain, there = folder / "plain", dict.fromkeys(others, (server.others._number,))
    files = method.save(str(folder))
    told = {"held": [held_here(server.own), *world.ask(held_at, there, 60).values()]}
    told |= {"server": server.whole_model().state_dict(), "evaluated": method.evaluate()}
    told["saved"] = state.load(folder / state.SERVER)
    number, steps = len(method.plan), range(2)
    method.begin_epoch(1)
    told["on"] = [method.step(at, number + at) for at in steps], server.whole_model().state_dict()
    method.restore(str(folder), files)
    method.begin_epoch(1)
    again = [method.step(at, number + at) for at in steps], server.whole_model().state_dict()
    told["again"] = again
    in_one_process(replace(method.experiment, server=ServerKeys())).server.save(str(plain))
    server.restore(str(plain))
    server.save(str(folder / "sharded"))
    told["plain"] = [state.load(f / state.SERVER) for f in (plain, folder / "sharded")]
    return told


def held_at(number: int) -> tuple[int, int]:
    return held_here(world.resident(number))


def held_here(replica: Replica) -> tuple[int, int]:
    """How many numbers of parameters and moments a replica has, but for single ones."""
    moments = replica.server.stepper.state()["state"].values()
    return (
        sharding.numbers_here(p for p in replica.server.model.parameters() if p.ndim),
        sharding.numbers_here(x for found in moments for x in found.values() if x.ndim),
    )


def state_of(server: Server | ServerGroup) -> dict[str, torch.Tensor]:
    return {k: v.cpu().clone() for k, v in server.model.state_dict().items()}


def moments_of(server: Server | ServerGroup) -> dict[tuple, torch.Tensor]:
    """The optimizer's tensors, by parameter and name."""
    state = server.stepper.copied_state()["state"]
    return {(at, name): x for at, values in state.items() for name, x in values.items()}


def tell_replica(number: int) -> dict[str, Any]:
    """What a replica has become; runs on it."""
    server = world.resident(number).server
    return {"model": state_of(server), "moments": moments_of(server)}


def _keep_cut_gradients(method: Mpsl, kept: list) -> None:
    forward = method.server.forward

    def watching(smashed):
        gradients: dict = {}
        kept.append(gradients)
        for client, tensors in smashed.items():
            for index, tensor in enumerate(tensors_of(tensors)):
                if tensor.requires_grad:
                    tensor.register_hook(
                        lambda g, key=(client, index): gradients.update({key: g.clone()})
                    )
        return forward(smashed)

    method.server.forward = watching


def gold(path: Path, launched: environment.Environment) -> None:
    """Train every experiment of a list for some steps, one after the other, in one world."""
    task = json.loads(path.read_text())
    told = [train_and_tell(from_dict(e), launched, task["steps"]) for e in task["experiments"]]
    torch.save(told, path.with_suffix(".pt"))


def record(path: Path, launched: environment.Environment) -> None:
    """Train an experiment for two epochs by the real loop's calls, with tests at the clients."""
    experiment = from_dict(json.loads(path.read_text())["experiment"])
    method = processes.connect(experiment, launched, Holdings.load(experiment))
    for epoch in range(2):
        method.begin_epoch(epoch)
        for epoch_step in range(len(method.plan)):
            method.step(epoch_step, epoch * len(method.plan) + epoch_step)
        method.evaluate()
    method.deployable()


def keep_what_is_sent() -> list[Any]:
    """Keep the leaves of every object that this process hands to RPC's pickler."""
    from torch.distributed.rpc import internal

    kept: list[Any] = []
    serialize = internal.serialize

    def keeping(value: Any) -> Any:
        kept.extend(_leaves(value))
        return serialize(value)

    internal.serialize = keeping
    return kept


def _leaves(value: Any) -> list[Any]:
    """Tensors, numbers and texts inside a value; the project's own messages are opened too."""
    if isinstance(value, torch.Tensor):
        return [value.detach().clone()]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, tuple | list | set):
        return [leaf for item in value for leaf in _leaves(item)]
    # A call, a reference, an answer without content, and the two sample counts of a description.
    if isinstance(value, Masked):
        return _leaves(vars(value))
    known = ("RRef", "PyRRef", "Description", "function")
    if value is None or value is True or type(value).__name__ in known:
        return []
    if value in (socket.gethostname(), f"worker{os.environ['RANK']}", "cpu"):
        return []
    return [f"{type(value).__name__} {value!r}"]


def leaking(task: str) -> None:
    """Make clients send what they must not: the test of the test."""
    loss = Client.loss

    def leaky(self: Client, step: int, predictions: torch.Tensor) -> Any:
        batch = self.data.batch(step)
        return loss(self, step, predictions), (
            batch.labels if task == "leak_labels" else batch.inputs["image"] * 1.0
        )

    Client.loss = leaky
    start = Fleet.start

    def unpacking(self: Fleet, message: str, *words: Any, **more: Any) -> Any:
        wait = start(self, message, *words, **more)

        def unpacked() -> Answers:
            answers = wait()
            if message != "loss":
                return answers
            return Answers({n: a[0] for n, a in answers.by_client.items()}, answers.lost)

        return unpacked

    Fleet.start = unpacking


def main() -> None:
    task, argument = sys.argv[1], Path(sys.argv[2])
    launched = environment.resolve(os.environ)
    assert launched is not None
    if task.startswith("leak"):
        leaking(task)
    if task == "end":
        process.watch_server = partial(process.watch_server, interval=0.0)
    count_tokenizers()
    if launched.rank > 0:
        sent = keep_what_is_sent() if task != "gold" else []
        processes.serve_as_worker(toys.experiment(), launched)
        if task != "gold":
            torch.save(sent, argument.with_name(f"sent-by-{launched.rank}.pt"))
        return
    joined = processes.join(toys.experiment(), launched)
    tasks = {"gold": gold, "end": lambda *_: None}
    tasks.get(task, record)(argument, launched)
    joined.dismiss()


if __name__ == "__main__":
    main()
