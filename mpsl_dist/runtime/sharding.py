"""A model in shards, one a replica, by torch's FSDP2 (``torch.distributed.fsdp.fully_shard``).

A block's parameters are whole on a replica only while it computes that block; between, a replica
has its own part of every parameter, of its gradient and of the optimizer's state. Gradients are
summed, not averaged, so that every number is what it is without shards.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mpsl_dist.runtime.meeting import part_of_store
from mpsl_dist.runtime.network import same_interface_for_nccl


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    device: str,
    name: str,
    rank: int,
    count: int,
    timeout: float,
) -> None:
    """Leave of every parameter a part on each replica; all call it at the same time.

    The model moves to ``device`` block by block, so that it need never fit there as a whole. Single
    numbers, which have no parts, stay whole.

    Parameters
    ----------
    model : nn.Module
        Equal on all replicas.
    blocks : iterable of nn.Module
        Its largest parts, each gathered by itself; what is outside of them is gathered together.
    name : str
        Of the group, different for every group of the run.
    rank, count : int
        This replica, and how many there are.
    timeout : float
        Seconds until what they do together counts as failed.
    """
    if distributed.is_initialized():  # an earlier group of this process
        distributed.destroy_process_group()
    kind = torch.device(device).type
    if kind == "cuda":
        same_interface_for_nccl()
    distributed.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=part_of_store(name),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=timeout),
    )
    mesh = DeviceMesh.from_group(distributed.group.WORLD, kind)
    single = {p for p in model.parameters() if p.ndim == 0}
    for number in single:
        number.data = number.data.to(device)
    for part in (*blocks, model):
        # Also after a forward of the outermost: it may be one that no backward follows.
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=single)
    for part in model.modules():
        if hasattr(part, "set_gradient_divide_factor"):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def whole(values: Any, keep: bool) -> Any:
    """Return tensors in nested mappings and lists, those in shards gathered, on CPU.

    All replicas call it at the same time, for one tensor is gathered after the other.

    Parameters
    ----------
    keep : bool
        Whether this replica wants them; without, it helps the others and returns nothing of use.
    """
    if isinstance(values, DTensor):
        gathered = values.detach().full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(values, Tensor):
        return values.detach().cpu()
    if isinstance(values, dict):
        return {key: whole(value, keep) for key, value in values.items()}
    if isinstance(values, list):
        return [whole(value, keep) for value in values]
    return values


def part_of(value: Tensor, parameter: Tensor) -> Tensor:
    """Return this replica's shard of a whole tensor that belongs to a parameter.

    What is not of the parameter's shape, as an optimizer's count of steps, is returned as it is.
    """
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    there = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, *there, src_data_rank=None)  # every replica has the whole


def is_shard(parameter: Tensor) -> bool:
    """Return whether this replica has but a part of it."""
    return isinstance(parameter, DTensor)


def numbers_here(tensors: Iterable[Tensor]) -> int:
    """Return how many numbers of these tensors this replica holds."""
    return sum((x.to_local() if isinstance(x, DTensor) else x).numel() for x in tensors)
