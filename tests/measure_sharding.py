"""What FSDP2 makes of a distributed backward: an encoder sharded over two replicas.

    python tests/measure_sharding.py

The gradients live in the backward's context, where its own hooks do not look.
"""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed import autograd, rpc
from torch.distributed.fsdp import fully_shard

REPLICAS = 2
_here: dict[str, nn.Module] = {}


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    layer = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True}
    return nn.Sequential(*(nn.TransformerEncoderLayer(**layer) for _ in range(2))).double()


def shard() -> None:
    _here["encoder"] = encoder()
    for block in _here["encoder"]:
        fully_shard(block)
    fully_shard(_here["encoder"])


def encode(tokens_bld: Tensor) -> Tensor:
    return _here["encoder"](tokens_bld)


def without_gradient() -> int:
    """How many of the encoder's parameters FSDP has left without."""
    return sum(p.grad is None for p in _here["encoder"].parameters())


def look() -> None:
    everyone = range(1, REPLICAS + 1)
    for future in [rpc.rpc_async(rank, shard) for rank in everyone]:
        future.wait()
    tokens_bld = torch.randn(6, 5, 16, dtype=torch.float64, requires_grad=True)
    with autograd.context() as number:
        parts = [part.clone() for part in tokens_bld.split([4, 2])]
        asked = zip(everyone, parts, strict=True)
        answers = [rpc.rpc_async(rank, encode, args=(part,)) for rank, part in asked]
        loss = torch.cat([answer.wait() for answer in answers]).square().sum()
        autograd.backward(number, [loss])
        missing = {rpc.rpc_sync(rank, without_gradient) for rank in everyone}
    of = len(list(encoder().parameters()))
    print(f"FSDP2 has no gradient of {missing.pop()} of {of} parameters, no error")


def take_part(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"TP_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    if rank:
        place = f"file://{folder}/replicas"
        distributed.init_process_group("gloo", place, rank=rank - 1, world_size=REPLICAS)
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{folder}/store", rpc_timeout=60, _transports=["uv"]
    )
    rpc.init_rpc(f"{rank}", rank=rank, world_size=1 + REPLICAS, rpc_backend_options=options)
    if rank == 0:
        look()
    rpc.shutdown()
    if rank:
        distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as private:
        multiprocessing.spawn(take_part, (private,), nprocs=1 + REPLICAS)
