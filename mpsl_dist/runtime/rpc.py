"""The RPC world: start, stop, distributed autograd, references and calls to the clients.

Server and workers are named ``server`` and ``worker1`` ... ``workerW`` after their ranks.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import autograd as dist_autograd
from torch.distributed import rpc

from mpsl_dist.errors import UserError
from mpsl_dist.runtime.environment import Environment
from mpsl_dist.runtime.network import host_name

SERVER = "server"
#: Set by the server's word that the run is over; a call from afar finds only what a module names.
_ended = threading.Event()
_log = logging.getLogger("mpsl_dist")


class RemoteError(RuntimeError):
    """A client or worker failed; the message names it, the phase and the step."""

    def __init__(self, message: str, details: str = "", user_error: bool = False) -> None:
        super().__init__(message)
        #: The remote traceback.
        self.details = details
        #: Whether the cause is the user's to mend (a UserError there).
        self.user_error = user_error


def rank_name(rank: int) -> str:
    """Give the RPC name of a rank."""
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
    """
    os.environ["TP_SOCKET_IFNAME"] = interface
    # RPC's start meets in a gloo group, which would else go by what the host's name resolves to.
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    # RPC's own barrier uses a process group in a way that warns its user, who cannot mend it.
    warnings.filterwarnings("ignore", message="You are using a Backend", category=UserWarning)
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
            f"{_brief(error)}"
        ) from error
    rpc._set_rpc_timeout(timeout)


def dismiss(world: int) -> None:
    """Tell the workers of a world of so many ranks that the run is over, and leave with them."""
    told = {rank: rpc.rpc_async(rank_name(rank), _end) for rank in range(1, world)}
    for rank, answer in told.items():
        try:
            answer.wait()
        except RuntimeError as error:
            raise RemoteError(
                f"{rank_name(rank)}: lost at the end of the run: {_brief(error)}"
            ) from error
    stop()


def await_end() -> None:
    """Wait until rank 0 says that the run is over."""
    _ended.wait()


def _end() -> None:
    _ended.set()


def stop() -> None:
    """Leave the RPC world once every rank does; a worker's, after :func:`await_end`."""
    rpc.shutdown(graceful=True)


def reference(value: Any) -> rpc.RRef:
    """Give an RRef on an object that lives in this process."""
    return rpc.RRef(value)


def ping(rank: int, timeout: float) -> bool:
    """Say whether a rank answers within ``timeout`` seconds."""
    try:
        return rpc.rpc_sync(rank_name(rank), _pong, timeout=timeout)
    except RuntimeError:
        return False


def _pong() -> bool:
    return True


@dataclass(frozen=True)
class AutogradContext:
    """One distributed backward: the gradients live in it, not in ``.grad``."""

    number: int

    def backward(self, loss: Tensor) -> None:
        """Run the backward through every process that took part."""
        dist_autograd.backward(self.number, [loss])

    def gradients(self) -> dict[Tensor, Tensor]:
        """Give this process's gradients, by parameter."""
        return dist_autograd.get_gradients(self.number)


@contextmanager
def autograd_context() -> Iterator[AutogradContext]:
    """Open a distributed autograd context; leaving it frees its gradients everywhere."""
    with dist_autograd.context() as number:
        yield AutogradContext(number)


def create(
    function: Callable[..., list[Any]], arguments: Mapping[int, Sequence[Any]], timeout: float
) -> dict[int, list[rpc.RRef]]:
    """Run ``function`` on workers, at once, and give RRefs on the objects that it returns there.

    Parameters
    ----------
    function : callable
        Gives a list of objects.
    arguments : mapping of int to sequence
        Rank -> positional arguments.
    timeout : float
        Seconds until it counts as failed; building clients takes longer than a step.

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
            raise RemoteError(f"{rank_name(rank)}: lost in set-up: {_brief(error)}") from error
        owned[rank] = _unwrap(answer, rank_name(rank))
    return owned


def _own(function: Callable[..., list[Any]], arguments: tuple[Any, ...]) -> Any:
    try:
        return [rpc.RRef(value) for value in function(*arguments)]
    except Exception as error:
        return _Failure.of(error, "set-up")


@dataclass(frozen=True)
class _Failure:
    """An exception as it travels: RPC itself would keep only its text."""

    message: str
    details: str
    user_error: bool

    @classmethod
    def of(cls, error: Exception, where: str) -> _Failure:
        text = f"{where}: {type(error).__name__}: {error}"
        return cls(text, traceback.format_exc(), isinstance(error, UserError))


def _unwrap(answer: Any, who: str) -> Any:
    if isinstance(answer, _Failure):
        raise RemoteError(f"{who}: {answer.message}", answer.details, answer.user_error)
    return answer


def _brief(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class Fleet:
    """The server's RRefs to all clients, and the one way to call them.

    One call per worker and phase serves all clients that the worker hosts.

    Parameters
    ----------
    owners : mapping of int to RRef
        Client number -> reference.
    timeout : float
        Seconds until a call counts as failed.
    """

    def __init__(self, owners: Mapping[int, rpc.RRef], timeout: float) -> None:
        self.references = dict(owners)
        self.timeout = timeout
        self.workers: dict[str, list[int]] = {}
        for client in sorted(owners):
            self.workers.setdefault(owners[client].owner_name(), []).append(client)
        asked = {worker: rpc.rpc_async(worker, host_name) for worker in self.workers}
        #: Worker -> node, for the errors that name it.
        self.hosts = {worker: future.wait() for worker, future in asked.items()}

    def __len__(self) -> int:
        return len(self.references)

    def call(
        self,
        method: str,
        arguments: Mapping[int, Sequence[Any]],
        where: str = "",
        context: AutogradContext | None = None,
    ) -> dict[int, Any]:
        """Call a method of these clients and wait for all answers.

        Parameters
        ----------
        method : str
            A method of :class:`mpsl_dist.actors.client.Client`.
        arguments : mapping of int to sequence
            Client number -> positional arguments; clients not named are not called.
        where : str
            What the user should read if this fails, as "step 17".
        context : AutogradContext, optional
            Appends the client's own gradients of this context to its arguments.

        Returns
        -------
        dict of int to Any
            The answers, in the order of the client numbers.

        Raises
        ------
        RemoteError
            Naming worker, client, phase and step.
        """
        return self.start(method, arguments, where, context)()

    def start(
        self,
        method: str,
        arguments: Mapping[int, Sequence[Any]],
        where: str = "",
        context: AutogradContext | None = None,
    ) -> Callable[[], dict[int, Any]]:
        """Begin :meth:`call`; the function that it gives waits for the answers."""
        pending = []
        for worker, hosted in self.workers.items():
            asked = [client for client in hosted if client in arguments]
            if asked:
                call = _Call(
                    method,
                    [self.references[client] for client in asked],
                    [tuple(arguments[client]) for client in asked],
                    asked,
                    context.number if context else None,
                )
                # Not rref.rpc_async(): its first use loses the autograd context.
                future = rpc.rpc_async(worker, _serve, args=(call,), timeout=self.timeout)
                pending.append((worker, asked, future))

        def wait() -> dict[int, Any]:
            answers: dict[int, Any] = {}
            for worker, asked, future in pending:
                who = self._who(worker, asked)
                phase = f"{method}, {where}" if where else method
                try:
                    answer = future.wait()
                except RuntimeError as error:
                    raise RemoteError(f"{who}: lost in {phase}: {_brief(error)}") from error
                where_from = f"{self._at(worker)}, {phase}"
                answers.update(zip(asked, _unwrap(answer, where_from), strict=True))
            return dict(sorted(answers.items()))

        return wait

    def lost(self, timeout: float = 5.0) -> list[str]:
        """Name the workers that do not answer."""
        deadline = time.monotonic() + timeout
        futures = {name: rpc.rpc_async(name, _pong, timeout=timeout) for name in self.workers}
        silent = []
        for name, future in futures.items():
            try:
                future.wait()
            except RuntimeError:
                silent.append(self._who(name, self.workers[name]))
            assert time.monotonic() < deadline + 60
        return silent

    def placement(self, device: str) -> list[str]:
        """Say which client is on which worker, node and device, a line a worker."""
        lines = [f"{SERVER} on {host_name()}, {device}"]
        for worker, hosted in self.workers.items():
            lines.append(f"{worker} on {self.hosts[worker]}, {device}: {_clients(hosted)}")
        return lines

    def _who(self, worker: str, clients: Sequence[int]) -> str:
        return f"{self._at(worker)} ({_clients(clients)})"

    def _at(self, worker: str) -> str:
        several = len({host_name(), *self.hosts.values()}) > 1
        return f"{worker} on {self.hosts[worker]}" if several else worker


def _clients(numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    if len(numbers) == 1:
        return f"client {first}"
    if list(numbers) == list(range(first, last + 1)):
        return f"clients {first}-{last}"
    return "clients " + ", ".join(map(str, numbers))


@dataclass(frozen=True)
class _Call:
    method: str
    references: list[rpc.RRef]
    arguments: list[tuple[Any, ...]]
    clients: list[int]
    context: int | None


def _serve(call: _Call) -> list[Any] | _Failure:
    gradients = () if call.context is None else (_gradients(call.context),)
    answers = []
    for rref, arguments, client in zip(call.references, call.arguments, call.clients, strict=True):
        try:
            answers.append(getattr(rref.local_value(), call.method)(*arguments, *gradients))
        except Exception as error:
            _log.exception("client %d failed in %s", client, call.method)
            return _Failure.of(error, f"client {client}")
    return answers


def _gradients(context: int) -> dict[Tensor, Tensor]:
    try:
        return dist_autograd.get_gradients(context)
    except RuntimeError as error:
        # A worker none of whose clients took part in this step has never met the context.
        if "autograd context" not in str(error):
            raise
        return {}


def set_threads(count: int) -> None:
    """Set torch's compute threads of this process."""
    torch.set_num_threads(max(1, count))
