"""Whether FSDP2 goes together with a distributed backward: an encoder sharded over two replicas.

    python tests/measure_sharding.py

Once as it is, and once with the graph cut at the replica, whose backward is then a plain one.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed import autograd, rpc
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

REPLICAS = 2
_here: dict[str, nn.Module] = {}


class Cut(torch.autograd.Function):
    """The encoder as one node of the distributed graph; its own backward leaves ``.grad``."""

    @staticmethod
    def forward(ctx: Any, tokens_bld: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.tokens_bld = tokens_bld.detach().requires_grad_()
            ctx.encoded_bld = _here["encoder"](ctx.tokens_bld)
        return ctx.encoded_bld.detach()

    @staticmethod
    def backward(ctx: Any, gradient_bld: Tensor) -> Tensor:
        torch.autograd.backward(ctx.encoded_bld, gradient_bld)
        return ctx.tokens_bld.grad


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    layer = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True}
    return nn.Sequential(*(nn.TransformerEncoderLayer(**layer) for _ in range(2))).double()


def shard() -> None:
    _here["encoder"] = encoder()
    for block in _here["encoder"]:
        fully_shard(block)
    fully_shard(_here["encoder"])


def encode(tokens_bld: Tensor, cut: bool) -> Tensor:
    return Cut.apply(tokens_bld) if cut else _here["encoder"](tokens_bld)


def gradients() -> list[Tensor | None]:
    """The encoder's gradients as FSDP left them: averages over the replicas."""
    found = [p.grad for p in _here["encoder"].parameters()]
    return [x.full_tensor() if isinstance(x, DTensor) else x for x in found]


def look(cut: bool) -> None:
    everyone = range(1, REPLICAS + 1)
    for future in [rpc.rpc_async(rank, shard) for rank in everyone]:
        future.wait()
    torch.manual_seed(1)
    tokens_bld = torch.randn(6, 5, 16, dtype=torch.float64, requires_grad=True)
    alone = encoder()
    alone(tokens_bld).square().sum().backward()
    with autograd.context() as number:
        parts = [part.clone() for part in tokens_bld.split([4, 2])]
        asked = zip(everyone, parts, strict=True)
        answers = [rpc.rpc_async(rank, encode, args=(part, cut)) for rank, part in asked]
        loss = torch.cat([answer.wait() for answer in answers]).square().sum()
        autograd.backward(number, [loss])
        seen = [rpc.rpc_async(rank, gradients) for rank in everyone]
        found = seen[0].wait()
        seen[1].wait()
    where = "cut at the replica" if cut else "one graph"
    if any(x is None for x in found):
        missing = sum(x is None for x in found)
        print(f"{where}: FSDP2 has no gradient of {missing} of {len(found)} parameters, no error")
        return
    pairs = zip(found, alone.parameters(), strict=True)
    off = max(float((x * REPLICAS - p.grad).abs().max()) for x, p in pairs)
    print(f"{where}: equal to one process, {'within' if off < 1e-12 else 'not within'} 1e-12")


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
        look(cut=False)
        look(cut=True)
    rpc.shutdown()
    if rank:
        distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as private:
        multiprocessing.spawn(take_part, (private,), nprocs=1 + REPLICAS)
