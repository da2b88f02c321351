"""The server's replicas, as replica 0 reaches them, and what they sum among themselves.

Replica r is the rank r. Calls go over RPC; gradients are summed by a process group of the replicas
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, rpc

from mpsl_dist.errors import Failure, RemoteError
from mpsl_dist.runtime.meeting import part_of_store
from mpsl_dist.runtime.network import same_interface_for_nccl
from mpsl_dist.runtime.world import brief, rank_name, resident

#: Waits for the answers to a message and returns them in the order of the replicas.
Wait = Callable[[], list[Any]]
#: Bytes that are summed at once: enough to use the line well, and all that a sum needs in addition.
_BUCKET = 25 * 2**20


class Replicas:
    """All replicas but the one that calls them, replica 0.

    Parameters
    ----------
    number : int
        What :func:`mpsl_dist.runtime.world.create` knows their objects by.
    count : int
        How many there are, replica 0 among them.
    timeout : float
        Seconds until a call counts as failed.
    """

    def __init__(self, number: int, count: int, timeout: float) -> None:
        self.count = count
        #: Of the group, different for every group of the run.
        self.name = f"replicas {number}"
        self._number, self._timeout = number, timeout

    def start(self, message: str, arguments: Sequence[Sequence[Any]]) -> Wait:
        """Begin to call a method of each; the function returned waits for the answers.

        Parameters
        ----------
        message : str
            A method of their objects.
        arguments : sequence of sequence
            Positional arguments of replica 1, 2, ...

        Raises
        ------
        RemoteError
            When waited for, if a replica is lost or fails.
        """
        futures = [
            rpc.rpc_async(
                rank, _serve, args=(self._number, message, tuple(words)), timeout=self._timeout
            )
            for rank, words in enumerate(arguments, 1)
        ]

        def wait() -> list[Any]:
            return [self._answer(rank, message, future) for rank, future in enumerate(futures, 1)]

        return wait

    def _answer(self, rank: int, message: str, future: torch.futures.Future) -> Any:
        name = rank_name(rank, self.count)
        try:
            answer = future.wait()
        except RuntimeError as error:
            raise RemoteError(f"{name}: lost in {message}: {brief(error)}") from error
        if isinstance(answer, Failure):
            words = f"{name}, {message}: {answer.message}"
            raise RemoteError(words, answer.details, answer.user_error)
        return answer


def _serve(number: int, message: str, arguments: tuple[Any, ...]) -> Any:
    try:
        return getattr(resident(number), message)(*arguments)
    except Exception as error:
        return Failure.of(error)


class Reduction:
    """Sums gradients over the replicas; each calls it at the same time, and receives the same bits.

    Parameters
    ----------
    name : str
        Of the group, different for every group of the run.
    rank, count : int
        This replica, and how many there are.
    device : str
        Where its gradients are.
    nccl : bool
        Sum on the GPUs, which takes one for each replica; otherwise on the CPU, by gloo.
    timeout : float
        Seconds until a sum counts as failed.
    """

    def __init__(
        self, name: str, rank: int, count: int, device: str, nccl: bool, timeout: float
    ) -> None:
        store, patience = part_of_store(name), timedelta(seconds=timeout)
        self._device = device if nccl else "cpu"
        self._group: Any
        if nccl:
            from torch.distributed import ProcessGroupNCCL

            same_interface_for_nccl()
            options = ProcessGroupNCCL.Options()
            options._timeout = patience
            self._group = ProcessGroupNCCL(store, rank, count, options)
        else:
            self._group = ProcessGroupGloo(store, rank, count, patience)

    def sum(
        self, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return the sums over the replicas, one a parameter; None where no replica has any.

        Parameters
        ----------
        gradients : sequence of Tensor or None
            This replica's, one a parameter. Tensors may be summed in place.

        Raises
        ------
        RuntimeError
            If a replica is gone.
        """
        there = torch.tensor([x is not None for x in gradients], dtype=torch.int32)
        anywhere = self._all_reduce(there).bool().tolist()
        found = [
            (torch.zeros_like(p) if x is None else x.contiguous()) if some else None
            for x, p, some in zip(gradients, parameters, anywhere, strict=True)
        ]
        for bucket in _buckets([x for x in found if x is not None]):
            together = self._all_reduce(torch.cat([x.flatten() for x in bucket]))
            parts = together.split([x.numel() for x in bucket])
            for x, part in zip(bucket, parts, strict=True):
                x.copy_(part.view_as(x))
        return found

    def _all_reduce(self, values: Tensor) -> Tensor:
        values = values.to(self._device)
        self._group.allreduce([values]).wait()
        return values


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors, last layers first, in lists of about so many bytes."""
    bucket, held = [], 0
    for tensor in reversed(tensors):
        bucket.append(tensor)
        held += tensor.nbytes
        if held >= _BUCKET:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket
