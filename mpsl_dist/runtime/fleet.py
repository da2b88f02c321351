"""The server's way to its clients over RPC: calls, and distributed autograd.

A worker hosts one or more clients behind one object (:class:`mpsl_dist.actors.host.Host`); one call
per worker and phase serves them all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed import autograd as dist_autograd
from torch.distributed import rpc

from mpsl_dist.errors import BackwardError, Failure, RemoteError
from mpsl_dist.runtime.answers import Answers, ClientsLost, Lost, name_clients
from mpsl_dist.runtime.generations import Generations
from mpsl_dist.runtime.network import host_name
from mpsl_dist.runtime.watchdog import Watchdog
from mpsl_dist.runtime.world import SERVER, brief, pong, rank_name, resident

#: Builds hosts of these clients by rank, as :func:`mpsl_dist.runtime.world.create` does.
BuildHosts = Callable[
    [Mapping[int, Sequence[int]], int | None], tuple[int, Mapping[int, RemoteError]]
]
#: Seconds after a loss in which the world stays as it is: who was lost together comes back
#: together, and torch has mostly done with telling the lost that a step is over, which takes 13 s.
_SETTLE = 20.0
#: Seconds for a worker that was too slow to say that it is there again.
_PATIENCE = 2.0
_log = logging.getLogger("mpsl_dist")


@dataclass(frozen=True)
class Autograd:
    """One distributed backward: the gradients live in it, not in ``.grad``."""

    number: int
    fleet: Fleet
    clients: tuple[int, ...]

    def backward(self, loss: Tensor, where: str) -> None:
        """Run the backward through every process that took part.

        Parameters
        ----------
        loss : Tensor
            A scalar.
        where : str
            What the user should read if this fails, as "step 17".

        Raises
        ------
        ClientsLost
            If a worker is gone.
        BackwardError
            If all are there and it failed all the same.
        """
        try:
            dist_autograd.backward(self.number, [loss])
        except RuntimeError as error:
            self.fleet.last_loss = time.monotonic()
            silent = self.fleet.silent(self.clients)
            if not silent:
                raise BackwardError(f"backward failed: {error}, {where}") from error
            lost = {
                client: Lost(f"{who}: lost in backward, {where}")
                for who, clients in silent.items()
                for client in clients
            }
            raise ClientsLost(lost) from error

    def gradients(self) -> dict[Tensor, Tensor]:
        """Return this process's gradients, by parameter."""
        return dist_autograd.get_gradients(self.number)


class Fleet:
    """The server's way to the hosts of all clients, and the one way to call them.

    Parameters
    ----------
    hosted : mapping of int to sequence of int
        Rank of a worker -> numbers of the clients that it hosts.
    host : callable
        ``host(hosted, number)`` builds :class:`~mpsl_dist.actors.host.Host` objects on workers, as
        :func:`mpsl_dist.runtime.world.create` has it.
    timeout : float
        Seconds until a call counts as failed.
    generations : Generations, optional
        Of the world, which is made anew for workers that come back; None where none does.

    Raises
    ------
    RemoteError
        If a worker fails or is lost.
    """

    def __init__(
        self,
        hosted: Mapping[int, Sequence[int]],
        host: BuildHosts,
        timeout: float,
        generations: Generations | None = None,
    ) -> None:
        self._ranks = {rank_name(rank): rank for rank in hosted}
        self.hosted = {rank_name(rank): sorted(hosted[rank]) for rank in hosted}
        #: Numbers of all clients, ascending.
        self.clients = sorted(client for clients in hosted.values() for client in clients)
        self.timeout = timeout
        #: When a worker last did not answer, by the monotonic clock.
        self.last_loss = -_SETTLE
        self.watchdog = Watchdog(timeout)
        self.watchdog.start()
        self._host, self._generations = host, generations
        self._number, failed = host(hosted, None)
        for error in failed.values():
            raise error
        #: Worker -> node, for the errors that name it; worker -> device.
        self.nodes: dict[str, str] = {}
        self.devices: dict[str, str] = {}
        self._ask_where(self.hosted)

    def _ask_where(self, workers: Iterable[str]) -> None:
        asked = {w: rpc.rpc_async(w, _about, args=(self._number,)) for w in workers}
        for worker, future in asked.items():
            self.nodes[worker], self.devices[worker] = future.wait()

    def returned(self) -> list[int]:
        """Make the world anew if lost workers have come back; return the clients that they host.

        They are as they were at the start of the run. Who dies meanwhile is lost at its next call.

        Raises
        ------
        RemoteError
            If the world can't be made anew.
        """
        if self._generations is None or time.monotonic() - self.last_loss < _SETTLE:
            return []
        back = self._generations.waiting()
        if not back:
            return []
        back &= self._generations.renew(back)
        hosted = {r: self.hosted[name] for name, r in self._ranks.items() if r in back}
        _, failed = self._host(hosted, self._number)
        for error in failed.values():
            _log.warning("%s", error)
        return sorted(n for rank in hosted if rank not in failed for n in hosted[rank])

    def idle(self, clients: Collection[int]) -> list[int]:
        """Return those of these clients whose worker answers, and has nothing else to do."""
        asked = {
            worker: rpc.rpc_async(worker, _is_idle, args=(self._number,), timeout=_PATIENCE)
            for worker, hosted in self.hosted.items()
            if not set(hosted).isdisjoint(clients)
        }
        found: set[int] = set()
        for worker, future in asked.items():
            try:
                found |= set(self.hosted[worker]) if future.wait() else set()
            except RuntimeError:
                continue
        return sorted(found & set(clients))

    def start(
        self,
        message: str,
        arguments: Mapping[int, Sequence[Any]],
        where: str = "",
        autograd: Autograd | None = None,
    ) -> Callable[[], Answers]:
        """Begin to call a method of these clients; the function returned waits for the answers.

        Parameters
        ----------
        message : str
            A method of the clients' class.
        arguments : mapping of int to sequence
            Client number -> positional arguments; clients not named are not called.
        where : str
            What the user should read if this fails, as "step 17".
        autograd : Autograd, optional
            Appends the client's own gradients of this backward to its arguments.
        """
        number = autograd.number if autograd else None
        phase = f"{message}, {where}" if where else message
        pending = []
        for worker, clients in self.hosted.items():
            own = {client: tuple(arguments[client]) for client in clients if client in arguments}
            if own:
                words = (self._number, message, own, number)
                future = rpc.rpc_async(worker, _serve, args=words, timeout=self.timeout)
                call = self.watchdog.expect(self._who(worker, list(own)), phase)
                future.add_done_callback(lambda _, call=call: self.watchdog.done(call))
                pending.append((worker, list(own), future))

        def wait() -> Answers:
            found: dict[int, Any] = {}
            lost: dict[int, Lost] = {}
            for worker, asked, future in pending:
                try:
                    answers = future.wait()
                except RuntimeError as error:
                    self.last_loss = time.monotonic()
                    gone = f"{self._who(worker, asked)}: lost in {phase}: {brief(error)}"
                    lost |= dict.fromkeys(asked, Lost(gone))
                    continue
                for client, answer in answers.items():
                    if isinstance(answer, Failure):
                        said = f"{self._at(worker)}, {phase}: client {client}: {answer.message}"
                        lost[client] = Lost(said, answer.details, answer.user_error, answer.kind)
                    else:
                        found[client] = answer
            return Answers(dict(sorted(found.items())), dict(sorted(lost.items())))

        return wait

    @contextmanager
    def autograd(self, clients: Sequence[int]) -> Iterator[Autograd]:
        """Open a distributed autograd context; leaving it frees its gradients everywhere.

        Parameters
        ----------
        clients : sequence of int
            Who takes part in its backward.
        """
        with dist_autograd.context() as number:
            yield Autograd(number, self, tuple(clients))

    def silent(self, clients: Sequence[int], timeout: float = 5.0) -> dict[str, list[int]]:
        """Return the workers of these clients that do not answer, in the user's words.

        Returns
        -------
        dict of str to list of int
            Worker -> those of the clients that it hosts.
        """
        asked = {
            worker: own
            for worker, hosted in self.hosted.items()
            if (own := [client for client in hosted if client in clients])
        }
        futures = {worker: rpc.rpc_async(worker, pong, timeout=timeout) for worker in asked}
        silent = {}
        for worker, future in futures.items():
            try:
                future.wait()
            except RuntimeError:
                silent[self._who(worker, asked[worker])] = asked[worker]
        return silent

    def placement(self, device: str) -> list[str]:
        """Return a line a process: which clients on which node and device.

        Parameters
        ----------
        device : str
            The server's.
        """
        lines = [f"{SERVER} on {host_name()}, {device}"]
        for worker, hosted in self.hosted.items():
            where = f"{worker} on {self.nodes[worker]}, {self.devices[worker]}"
            lines.append(f"{where}: {name_clients(hosted)}")
        return lines

    def where(self, client: int) -> str:
        """Return a client as a user reads it: its number, and its worker and node."""
        worker = next(name for name, hosted in self.hosted.items() if client in hosted)
        return self._who(worker, [client])

    def _who(self, worker: str, clients: Sequence[int]) -> str:
        return f"{self._at(worker)} ({name_clients(clients)})"

    def _at(self, worker: str) -> str:
        several = len({host_name(), *self.nodes.values()}) > 1
        return f"{worker} on {self.nodes[worker]}" if several else worker


def _about(host: int) -> tuple[str, str]:
    return host_name(), resident(host).device


def _is_idle(host: int) -> bool:
    return resident(host).idle


def _serve(
    host: int, message: str, arguments: dict[int, tuple[Any, ...]], number: int | None
) -> dict[int, Any]:
    gradients = None if number is None else gradients_here(number)
    return resident(host).serve(message, arguments, gradients)


def gradients_here(number: int) -> dict[Tensor, Tensor]:
    """Return this process's gradients of a backward, by parameter."""
    try:
        return dist_autograd.get_gradients(number)
    except RuntimeError as error:
        # A worker none of whose clients took part in this step has never met the context.
        if "autograd context" not in str(error):
            raise
        return {}
