"""The RPC world: start, stop, and objects that live on the workers.

Server and workers are named ``server`` and ``worker1`` ... ``workerW`` after their ranks.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed import rpc

from mpsl_dist.errors import Failure, RemoteError
from mpsl_dist.runtime.environment import Environment
from mpsl_dist.runtime.meeting import know_loopback

SERVER = "server"
#: The server's word that the run is over, and whether all workers are there to leave together; a
#: call from afar finds only what a module names.
_ended = threading.Event()
_together = threading.Event()
#: Seconds for a worker to take note of the end.
_FAREWELL = 10.0


def rank_name(rank: int) -> str:
    """Return the RPC name of a rank."""
    return SERVER if rank == 0 else f"worker{rank}"


def start(
    environment: Environment, timeout: float, start_timeout: float, interface: str, tcp_only: bool
) -> None:
    """Join the RPC world; returns when every rank has joined.

    Parameters
    ----------
    timeout, start_timeout : float
        Seconds for a call, and for all ranks to meet.
    interface : str
        Network interface that TensorPipe listens on.
    tcp_only : bool
        Keep same-host payloads on the socket instead of process-memory reads.

    Raises
    ------
    RemoteError
        If not all ranks meet in time.
    """
    os.environ["TP_SOCKET_IFNAME"] = interface
    # RPC's start meets in a gloo group, which would else go by what the host's name resolves to.
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    # RPC's own barrier uses a process group in a way that warns its user, who cannot mend it.
    warnings.filterwarnings("ignore", message="You are using a Backend", category=UserWarning)
    know_loopback()
    # Shared memory can fail with more than 18 workers on one host: sockets always.
    options = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=16,
        rpc_timeout=start_timeout,
        init_method=environment.init_method,
        _transports=["uv"],
        _channels=["basic"] if tcp_only else None,
    )
    try:
        rpc.init_rpc(
            rank_name(environment.rank),
            rank=environment.rank,
            world_size=environment.world,
            rpc_backend_options=options,
        )
    except RuntimeError as error:
        raise RemoteError(
            f"the {environment.world} processes did not all meet at {environment.address} within "
            f"{start_timeout:.0f} s (runtime.start_timeout), seen from rank {environment.rank}: "
            f"{brief(error)}"
        ) from error
    rpc._set_rpc_timeout(timeout)


def dismiss(ranks: int, together: bool = True) -> None:
    """Tell the workers of a world of so many ranks that the run is over, and leave with them.

    Parameters
    ----------
    together : bool
        Whether all are there. Otherwise nobody waits for the others, and who does not answer is
        left behind. RPC is then still on: torch aborts a process that takes it down while a call
        to the lost is under way, so the caller ends by :func:`mpsl_dist.runtime.process.leave`.

    Raises
    ------
    RemoteError
        If ``together`` and a worker does not answer.
    """
    told = {
        rank: rpc.rpc_async(rank_name(rank), _end, args=(together,), timeout=_FAREWELL)
        for rank in range(1, ranks)
    }
    for rank, answer in told.items():
        try:
            answer.wait()
        except RuntimeError as error:
            if together:
                raise RemoteError(
                    f"{rank_name(rank)}: lost at the end of the run: {brief(error)}"
                ) from error
    if together:
        stop()


def await_end() -> bool:
    """Wait until rank 0 says that the run is over; return whether all leave together."""
    _ended.wait()
    return _together.is_set()


def _end(together: bool) -> None:
    if together:
        _together.set()
    _ended.set()


def stop() -> None:
    """Leave the RPC world once every rank does; a worker's, after :func:`await_end`."""
    rpc.shutdown(graceful=True)


def reference(value: Any) -> rpc.RRef:
    """Return an RRef to an object that lives in this process."""
    return rpc.RRef(value)


def ping(rank: int, timeout: float) -> bool:
    """Return whether a rank answers within ``timeout`` seconds, however busy its Python is.

    An operator of torch answers without Python's lock, which a long call may hold for minutes.
    """
    try:
        rpc.rpc_sync(rank_name(rank), torch.add, args=(torch.zeros(1), 1), timeout=timeout)
    except RuntimeError:
        return False
    return True


def pong() -> bool:
    """Answer a ping."""
    return True


def create(
    function: Callable[..., Any],
    arguments: Mapping[int, Sequence[Any]],
    timeout: float,
    who: Callable[[int], str] = rank_name,
) -> dict[str, rpc.RRef]:
    """Call ``function`` on workers, all at once; the objects that it returns stay there.

    Parameters
    ----------
    function : callable
        Builds the object.
    arguments : mapping of int to sequence
        Rank -> positional arguments.
    timeout : float
        Seconds until it counts as failed; building clients takes longer than a step.
    who : callable
        Returns a rank in the user's words.

    Returns
    -------
    dict of str to RRef
        Worker -> reference to its object.

    Raises
    ------
    RemoteError
        If it fails on any.
    """
    futures = {
        rank: rpc.rpc_async(rank_name(rank), _own, args=(function, tuple(values)), timeout=timeout)
        for rank, values in arguments.items()
    }
    owned = {}
    for rank, future in futures.items():
        try:
            answer = future.wait()
        except RuntimeError as error:
            raise RemoteError(f"{who(rank)}: lost in set-up: {brief(error)}") from error
        if isinstance(answer, Failure):
            message = f"{who(rank)}: set-up: {answer.message}"
            raise RemoteError(message, answer.details, answer.user_error)
        owned[rank_name(rank)] = answer
    return owned


def _own(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return rpc.RRef(function(*arguments))
    except Exception as error:
        return Failure.of(error)


def brief(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def set_threads(count: int) -> None:
    """Set torch's compute threads of this process."""
    torch.set_num_threads(max(1, count))
