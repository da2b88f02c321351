"""Measure the hop through replica 0: smashed activations there, predictions and gradients back.

    python tests/measure_replicas.py 2 128 274 768

for a group of two, a global batch of 128 samples, 274 tokens of width 768 (ViT-B with a picture and
a text). The encoder is left out, so all of the time is the hop's.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, multiprocessing
from torch.distributed import rpc

_held: list[Tensor] = []


def pass_on(tokens_bld: Tensor) -> Tensor:
    """Stand for an encoder: predictions of ten classes that depend on every token."""
    _held[:] = [tokens_bld.requires_grad_(), tokens_bld.mean(1)[:, :10]]
    return _held[1].detach().clone()


def pass_back(gradient_bk: Tensor) -> Tensor:
    """Stand for its backward: the gradient of every token."""
    tokens_bld, predictions_bk = _held
    return torch.autograd.grad(predictions_bk, tokens_bld, gradient_bk)[0]


def everywhere(function: Callable[[Tensor], Tensor], parts: Iterable[Tensor]) -> list[Tensor]:
    asked = [rpc.rpc_async(rank, function, args=(part,)) for rank, part in enumerate(parts, 1)]
    return [future.wait() for future in asked]


def measure(replicas: int, batch: int, length: int, width: int) -> None:
    share = batch // replicas
    smashed = [torch.randn(share, length, width) for _ in range(replicas - 1)]
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        predictions = everywhere(pass_on, smashed)
        everywhere(pass_back, map(torch.ones_like, predictions))
        seconds.append(time.perf_counter() - began)
    held = sum(tokens_bld.nbytes for tokens_bld in smashed) / 2**20
    told = f"{held:.0f} MiB there and {held:.0f} MiB back"
    print(f"{told}: median {statistics.median(seconds[2:]) * 1e3:.0f} ms a step")


def take_part(rank: int, folder: str, replicas: int, *shape: int) -> None:
    """Run one rank of the group."""
    torch.set_num_threads(1)
    os.environ |= {"TP_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{folder}/store", _transports=["uv"]
    )
    rpc.init_rpc(f"replica{rank}", rank=rank, world_size=replicas, rpc_backend_options=options)
    if rank == 0:
        measure(replicas, *shape)
    rpc.shutdown()


if __name__ == "__main__":
    chosen = [int(word) for word in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as private:
        multiprocessing.spawn(take_part, (private, *chosen), nprocs=chosen[0])
