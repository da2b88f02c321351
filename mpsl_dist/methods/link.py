"""The server's typed view of its clients: every message, with its bytes counted as it is sent.

What a client does on a message stands in :mod:`mpsl_dist.actors.client` and
:mod:`mpsl_dist.actors.federated_client`. A client that fails, or does not answer in time,
is lost. Messages of a step that has not moved anything yet raise
:class:`~mpsl_dist.runtime.answers.ClientsLost`, so that the method can repeat it without the lost;
every other message goes on without them, or ends the run, as ``faults`` has it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mpsl_dist.actors.local_data import Damage, Description
from mpsl_dist.config import Faults
from mpsl_dist.errors import DataError, DiskError, DivergedError, RemoteError
from mpsl_dist.methods.progress import warn
from mpsl_dist.records import state
from mpsl_dist.records.traffic import Traffic, nbytes
from mpsl_dist.runtime.answers import Answers, ClientsLost, name_clients

#: Seconds until a client that was too slow is asked again whether it is there.
_ASK_AGAIN = 10.0
#: Waits for the answers to a message and returns them by client.
Wait = Callable[[], dict[int, Any]]


class Autograd(Protocol):
    """One backward through all processes, and what it leaves in this one."""

    def backward(self, loss: Tensor, where: str) -> None:
        """Run the backward of a scalar."""
        ...

    def gradients(self) -> dict[Tensor, Tensor]:
        """Return this process's gradients, by parameter."""
        ...


class Transport(Protocol):
    """What carries messages: a Fleet over RPC, or a LocalFleet in one process."""

    #: Numbers of all clients, ascending.
    clients: list[int]

    def start(
        self,
        message: str,
        arguments: Mapping[int, Sequence[Any]],
        where: str = "",
        autograd: Any = None,
    ) -> Callable[[], Answers]:
        """Begin to call a method of these clients; the function returned waits for the answers."""
        ...

    def autograd(self, clients: Sequence[int]) -> AbstractContextManager[Autograd]:
        """Open what the gradients of one backward through these clients live in."""
        ...

    def returned(self) -> list[int]:
        """Take back workers that had been lost; return their clients, as new."""
        ...

    def where(self, client: int) -> str:
        """Return a client as a user reads it: its number, and where it is."""
        ...

    def idle(self, clients: Collection[int]) -> list[int]:
        """Return those of these clients whose worker answers, and has nothing else to do."""
        ...


@dataclass(frozen=True)
class Back:
    """Clients that came back.

    Attributes
    ----------
    fresh : list of int
        Their process was started again: they are as they were at the start of the run.
    awake : list of int
        They had been too slow: they have the state that they had.
    """

    fresh: list[int]
    awake: list[int]

    @property
    def clients(self) -> list[int]:
        """Both, ascending."""
        return sorted(self.fresh + self.awake)


class Link:
    """Messages that every kind of client understands.

    Parameters
    ----------
    fleet : Transport
    traffic : Traffic
        Counts every tensor that a message carries.
    faults : Faults, optional
        What a lost client means; by default the end of the run.
    """

    def __init__(self, fleet: Transport, traffic: Traffic, faults: Faults | None = None) -> None:
        self.fleet = fleet
        self.traffic = traffic
        self.faults = faults or Faults(on_loss="stop")
        #: Clients that are not there at this moment.
        self.lost: set[int] = set()
        self._silent: set[int] = set()
        self._asked = -_ASK_AGAIN
        #: How many clients have come back so far.
        self.returned = 0
        #: Steps of the run that are done: what the user reads of a loss between two steps.
        self.done = 0
        #: Client -> folder and digest of what it last kept for its return.
        self._kept: dict[int, tuple[str, str]] = {}
        #: The server's run directory, where clients have their own in its place
        #: (``data.place: own``); None where they write to the server's.
        self.run: Path | None = None

    def __len__(self) -> int:
        return len(self.fleet.clients)

    @property
    def present(self) -> list[int]:
        """Numbers of the clients that are there, ascending."""
        return [client for client in self.fleet.clients if client not in self.lost]

    def lose(self, error: ClientsLost) -> None:
        """Go on without these clients, or end the run by another error than this.

        Raises
        ------
        DiskError
            If a client's disk is full: that costs checkpoints, not a client, and is the user's to
            mend.
        DataError
            If a client cannot read its data and ``data.on_error`` is ``raise``.
        DivergedError
            If a client's own training has diverged and ``faults.on_nonfinite`` is ``stop``;
            otherwise only this answer of it is left out.
        RemoteError
            If ``faults.on_loss`` is ``stop``, or too few clients would be left.
        """
        first, kinds = str(error), {why.kind for why in error.by_client.values()}
        if DiskError.__name__ in kinds:
            raise DiskError(first) from error
        if DataError.__name__ in kinds:
            raise DataError(first) from error
        if DivergedError.__name__ in kinds and self.faults.on_nonfinite == "stop":
            raise DivergedError(first) from error
        gone = [n for n, why in error.by_client.items() if why.kind != DivergedError.__name__]
        for client, why in error.by_client.items():
            warn(f"client {client} is {'lost' if client in gone else 'left out'}: {why.message}")
        self.lost |= set(gone)
        self._silent |= {n for n in gone if not error.by_client[n].kind}
        few = len(self.present) < self.faults.min_clients
        if few or (gone and self.faults.on_loss == "stop"):
            left = f"{len(self.present)} clients are left, faults.min_clients is "
            words = f"{first} ({left}{self.faults.min_clients})" if few else first
            raise RemoteError(words, error.details, error.user_error, error.lost) from error

    def start(
        self,
        message: str,
        arguments: Mapping[int, Sequence[Any]],
        where: str = "",
        autograd: Autograd | None = None,
        down: str | None = None,
        up: str | None = None,
        needed: bool = False,
    ) -> Wait:
        """Send a message; the function returned waits for the answers.

        Parameters
        ----------
        message, arguments, where, autograd
            As :meth:`mpsl_dist.runtime.fleet.Fleet.start` takes them.
        down, up : str, optional
            Kinds of traffic that the arguments' and the answers' tensors count as
            (:data:`mpsl_dist.records.traffic.KINDS`); None where the message carries no tensor.
        needed : bool
            Whether every answer is needed; otherwise those of lost clients are left out.

        Raises
        ------
        ClientsLost
            When waited for, if a client was lost whose answer is needed; if its answer is not, what
            :meth:`lose` raises.
        """
        self._count(message, down, arguments)
        wait = self.fleet.start(message, arguments, where, autograd)

        def answers() -> dict[int, Any]:
            outcome = wait()
            self._count(message, up, outcome.by_client)
            if outcome.lost and not needed:
                self.lose(ClientsLost(outcome.lost))
                return dict(outcome.by_client)
            return outcome.all()

        return answers

    @property
    def in_test(self) -> str:
        """What the user reads of a loss in a test."""
        return f"evaluation, step {self.done}"

    def everyone(self, *arguments: Any) -> dict[int, tuple[Any, ...]]:
        """Return the same arguments for every client that is there."""
        return dict.fromkeys(self.present, arguments)

    def readmit(self, where: str) -> Back:
        """Take back lost clients whose worker has come back, or was only slow.

        Parameters
        ----------
        where : str
            What the user should read of it, as "step 17".
        """
        if not self.lost or self.faults.rejoin == "never":
            return Back([], [])
        fresh = [client for client in self.fleet.returned() if client in self.lost]
        back = Back(fresh, self._awake(self._silent & self.lost - set(fresh)))
        self.lost -= set(back.clients)
        self._silent &= self.lost
        self.returned += len(back.clients)
        if back.clients:
            warn(f"{name_clients(back.clients)} came back, {where}")
        return back

    def _awake(self, silent: set[int]) -> list[int]:
        now = time.monotonic()
        if not silent or now - self._asked < _ASK_AGAIN:
            return []
        self._asked = now
        return self.fleet.idle(silent)

    def _there(self, folder: str) -> str:
        """Return a folder of the run as clients are told it: below their own, if they have one."""
        return folder if self.run is None else str(Path(folder).relative_to(self.run))

    def keep(self, folder: str, where: str) -> None:
        """Have every client write its state where it is, for its own return."""
        folder = self._there(folder)
        digests = self.start("save", self.everyone(folder), where)()
        self._kept |= {client: (folder, digest) for client, digest in digests.items()}

    def restore_kept(self, clients: Sequence[int]) -> list[int]:
        """Have clients that came back continue from :meth:`keep`; return those that do."""
        asked = {n: self._kept[n] for n in clients if n in self._kept}
        damaged = self.start("damage", asked, "return")()
        for client, found in damaged.items():
            if found:
                warn(f"client {client} comes back without its own state: {found}")
        whole = {n: (asked[n][0],) for n in damaged if damaged[n] is None}
        return list(self.start("restore", whole, "return")())

    def describe(self) -> dict[int, Description]:
        """Ask how many samples every client holds."""
        return self.start("describe", self.everyone(), needed=True)()

    def damage_met(self) -> Damage:
        """Ask how much of the clients' data could not be read so far; of the lost, nobody knows."""
        return Damage.all(self.start("damage_met", self.everyone())().values())

    def save(self, folder: str, own: Callable[[], str]) -> dict[str, str]:
        """Have every client write its part of a checkpoint, where it is.

        Parameters
        ----------
        own : callable
            Writes the server's part meanwhile, and returns its digest.

        Returns
        -------
        dict of str to str
            Name of every part -> its SHA-256.
        """
        there = self._there(folder)
        wait = self.start("save", self.everyone(there), f"checkpoint, step {self.done}")
        try:
            digests = {state.SERVER: own()}
        finally:
            told = wait()
        return digests | {state.client_file(n): told[n] for n in told}

    def damage(self, folder: str, files: Mapping[str, str]) -> str | None:
        """Ask every owner what is wrong with its part of a checkpoint; None if all are whole.

        Parameters
        ----------
        files : mapping of str to str
            What :meth:`save` returned; empty where nobody kept it.
        """
        asked = {
            n: (self._there(folder), files.get(state.client_file(n)))
            for n in self.fleet.clients
            if not absent_from(files, n)
        }
        wait = self.start("damage", asked, "resume", needed=True)
        own = state.damage(Path(folder) / state.SERVER, files.get(state.SERVER))
        told = wait()
        found = (f"{self.fleet.where(n)}: {why}" for n, why in told.items() if why)
        return own or next(found, None)

    def prune(self, folders: Sequence[str]) -> None:
        """Have clients remove from their own disks what they wrote of other checkpoints."""
        if self.run is not None:
            kept = [self._there(folder) for folder in folders]
            self.start("prune", self.everyone(kept), "checkpoint")()

    def restore(self, folder: str, files: Mapping[str, str], own: Callable[[], None]) -> None:
        """Have every client that has a part continue from :meth:`save`.

        Parameters
        ----------
        files : mapping of str to str
            What :meth:`save` returned.
        own : callable
            Does so for the server.
        """
        there = self._there(folder)
        asked = {n: (there,) for n in self.fleet.clients if not absent_from(files, n)}
        wait = self.start("restore", asked, "resume", needed=True)
        try:
            own()
        finally:
            wait()

    def _count(self, message: str, kind: str | None, values: Mapping[int, Any]) -> None:
        if kind is not None:
            self.traffic.add_all(kind, values)
        else:
            assert not any(map(nbytes, values.values())), f"{message} carries uncounted tensors"


def absent_from(files: Mapping[str, str], client: int) -> bool:
    """Return whether a client was lost when a checkpoint was made; never where nobody kept that."""
    return bool(files) and state.client_file(client) not in files
