"""The server's way to its clients over RPC: calls, and distributed autograd.

A worker hosts one or more clients behind one object (:class:`mpsl_dist.actors.host.Host`); one call
per worker and phase serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed import autograd as dist_autograd
from torch.distributed import rpc

from mpsl_dist.errors import Failure, RemoteError
from mpsl_dist.runtime.answers import Answers, ClientsLost, Lost, name_clients
from mpsl_dist.runtime.network import host_name
from mpsl_dist.runtime.watchdog import Watchdog
from mpsl_dist.runtime.world import SERVER, brief, pong


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
        RemoteError
            If all are there and it failed all the same.
        """
        try:
            dist_autograd.backward(self.number, [loss])
        except RuntimeError as error:
            silent = self.fleet.silent(self.clients)
            if not silent:
                raise RemoteError(f"backward failed: {error}, {where}") from error
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
    """The server's references to the hosts of all clients, and the one way to call them.

    Parameters
    ----------
    hosts : mapping of str to RRef
        Worker -> reference to its :class:`~mpsl_dist.actors.host.Host`.
    hosted : mapping of str to sequence of int
        Worker -> numbers of the clients that it hosts.
    timeout : float
        Seconds until a call counts as failed.
    """

    def __init__(
        self, hosts: Mapping[str, rpc.RRef], hosted: Mapping[str, Sequence[int]], timeout: float
    ) -> None:
        self.hosts = dict(hosts)
        self.hosted = {worker: sorted(clients) for worker, clients in hosted.items()}
        #: Numbers of all clients, ascending.
        self.clients = sorted(client for clients in hosted.values() for client in clients)
        self.timeout = timeout
        self.watchdog = Watchdog(timeout)
        self.watchdog.start()
        asked = {w: rpc.rpc_async(w, _about, args=(host,)) for w, host in self.hosts.items()}
        about = {worker: future.wait() for worker, future in asked.items()}
        #: Worker -> node, for the errors that name it; worker -> device.
        self.nodes = {worker: node for worker, (node, _) in about.items()}
        self.devices = {worker: device for worker, (_, device) in about.items()}

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
                words = (self.hosts[worker], message, own, number)
                # Not rref.rpc_async(): its first use loses the autograd context.
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

    def _who(self, worker: str, clients: Sequence[int]) -> str:
        return f"{self._at(worker)} ({name_clients(clients)})"

    def _at(self, worker: str) -> str:
        several = len({host_name(), *self.nodes.values()}) > 1
        return f"{worker} on {self.nodes[worker]}" if several else worker


def _about(host: rpc.RRef) -> tuple[str, str]:
    return host_name(), host.local_value().device


def _serve(
    host: rpc.RRef, message: str, arguments: dict[int, tuple[Any, ...]], number: int | None
) -> dict[int, Any]:
    gradients = None if number is None else _gradients(number)
    return host.local_value().serve(message, arguments, gradients)


def _gradients(number: int) -> dict[Tensor, Tensor]:
    try:
        return dist_autograd.get_gradients(number)
    except RuntimeError as error:
        # A worker none of whose clients took part in this step has never met the context.
        if "autograd context" not in str(error):
            raise
        return {}
