"""One replica of the server: what each of a group does on replica 0's word.

Its graph ends where activations come in and predictions go out; between, its backward is a plain
one that leaves gradients in ``.grad``, where torch's own tools for several GPUs look for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mpsl_dist.actors.choices import describe
from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.actors.server import Server, Smashed
from mpsl_dist.models.average import load_trainable
from mpsl_dist.models.gapped import Crossing, converted, tensors_of
from mpsl_dist.records import state
from mpsl_dist.runtime import sharding
from mpsl_dist.runtime.network import host_name
from mpsl_dist.runtime.replicas import Reduction

#: A client's gradients: of each of its smashed activations, None where nobody needs one.
Gradients = dict[int, list[Tensor | None]]
F = TypeVar("F", bound=Callable[..., Any])


def _on_its_gpu(method: F) -> F:
    """Make the replica's GPU the current one, which FSDP and NCCL go by; calls share no thread."""

    @wraps(method)
    def there(self: Replica, *arguments: Any) -> Any:
        with torch.cuda.device(self.device) if self.device != "cpu" else nullcontext():
            return method(self, *arguments)

    return there  # type: ignore[return-value]


class Replica:
    """One of the server's copies, in a process of its own.

    Parameters
    ----------
    server : Server
        Built as in every other replica; on the CPU where it is to be in shards.
    device : str
        Where it computes.
    shard : bool
        Whether it has but a part of every parameter, see :mod:`mpsl_dist.runtime.sharding`.
    """

    def __init__(self, server: Server, device: str = "cpu", shard: bool = False) -> None:
        self.server = server
        self.device = device
        self.shard = shard
        self._received: dict[int, Crossing] = {}
        self._predictions: dict[int, Tensor] = {}

    @_on_its_gpu
    def join(self, name: str, rank: int, count: int, nccl: bool, timeout: float) -> str:
        """Meet the other replicas; return where this one is, as a user reads it."""
        if self.shard:
            model, settings = self.server.model, self.server.stepper.settings
            group = f"{name} in shards", rank, count, timeout
            sharding.shard(model, model.encoder, self.device, *group)
            # Made anew: its parameters are others than before.
            self.server = Server(model, Stepper(model.parameters(), settings), self.device)
        self.reduction = Reduction(name, rank, count, self.device, nccl, timeout)
        return f"{host_name()}, {describe(self.device)}"

    @_on_its_gpu
    def forward(self, smashed: Smashed, asked: Mapping[int, Sequence[bool]]) -> dict[int, Tensor]:
        """Return the predictions for these clients, and keep what a backward needs.

        Parameters
        ----------
        smashed : mapping of int to list of Tensor, or Gapped
            Apart from any graph.
        asked : mapping of int to sequence of bool
            Of which of each client's activations a gradient is wanted.
        """
        for parameter in self.server.stepper.parameters:
            parameter.grad = None  # of a step that was given up
        self._received = {
            n: converted(sent, partial(_leaves, asked=asked[n])) for n, sent in smashed.items()
        }
        self._predictions = self.server.forward(self._received) if smashed else {}
        return {n: slice_bk.detach() for n, slice_bk in self._predictions.items()}

    @_on_its_gpu
    def backward(self, gradients: Mapping[int, Tensor]) -> Gradients:
        """Go from the predictions' gradients back to those of the clients' activations.

        Clients that are not named have a gradient of zero.
        """
        received, self._received = self._received, {}
        predictions, self._predictions = self._predictions, {}
        if predictions:
            wanted = [gradients.get(n, torch.zeros_like(x)) for n, x in predictions.items()]
            torch.autograd.backward(list(predictions.values()), wanted)
        return {n: [x.grad for x in tensors_of(received[n])] for n in gradients}

    @_on_its_gpu
    def predict(self, smashed: Smashed) -> dict[int, Tensor]:
        """Return the predictions for these clients, of which nothing is kept."""
        with torch.no_grad():
            return self.server.forward(smashed, True)

    @_on_its_gpu
    def step(self, step: int, span: tuple[int, int]) -> None:
        """Step the optimizer at the run's step ``step`` on the sum of all replicas' gradients.

        Parameters
        ----------
        span : tuple of int
            Steps of an epoch, and epochs: what the schedule spans.
        """
        stepper = self.server.stepper
        stepper.plan(*span)
        sums = {p: p.grad for p in stepper.parameters}
        # A shard's was summed on the way.
        whole = [p for p in sums if not sharding.is_shard(p)]
        if whole:
            found = self.reduction.sum([sums[p] for p in whole], whole)
            sums |= zip(whole, found, strict=True)
        self.server.step(step, {p: x for p, x in sums.items() if x is not None})

    @_on_its_gpu
    def save(self, folder: str | None) -> str:
        """Help to gather encoder, head and optimizer; write them, where there is a folder.

        The file is the one that a server without shards writes.
        """
        named = self.server.model.named_parameters()
        parts = {
            "model": {name: p for name, p in named if p.requires_grad},
            "optimizer": self.server.stepper.state(),
        }
        parts = sharding.whole(parts, keep=folder is not None)
        return "" if folder is None else state.save(Path(folder) / state.SERVER, parts)

    @_on_its_gpu
    def gather(self, keep: bool) -> dict[str, Tensor]:
        """Help to gather the whole model's state, frozen parts too; return it, if asked to keep."""
        found = sharding.whole(dict(self.server.model.state_dict()), keep)
        return found if keep else {}

    @_on_its_gpu
    def restore(self, folder: str) -> None:
        """Continue from what replica 0 wrote to ``folder``."""
        if not self.shard:
            self.server.restore(folder)
            return
        own, stepper = dict(self.server.model.named_parameters()), self.server.stepper
        with state.continuing(Path(folder) / state.SERVER) as parts:
            model = {n: sharding.part_of(x, own[n]) for n, x in parts["model"].items()}
            load_trainable(self.server.model, model)
            for at, values in parts["optimizer"].get("state", {}).items():
                parameter = stepper.parameters[at]
                values |= {name: sharding.part_of(x, parameter) for name, x in values.items()}
            stepper.load(parts["optimizer"])


def _leaves(tensors: Sequence[Tensor], asked: Sequence[bool]) -> list[Tensor]:
    return [x.detach().requires_grad_(a) for x, a in zip(tensors, asked, strict=True)]
