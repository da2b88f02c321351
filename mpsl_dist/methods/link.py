"""The server's typed view of its clients: every message, with its bytes counted as it is sent.

What a client does on a message stands in :mod:`mpsl_dist.actors.client` and
:mod:`mpsl_dist.actors.federated_client`. A client that fails, or does not answer in time,
is lost. Messages of a step that has not moved anything yet raise
:class:`~mpsl_dist.runtime.answers.ClientsLost`, so that the method can repeat it without the lost;
every other message goes on without them, or ends the run, as ``faults`` has it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from mpsl_dist.actors.client import Description
from mpsl_dist.actors.federated_client import Update
from mpsl_dist.config import Faults
from mpsl_dist.errors import NonFiniteError
from mpsl_dist.records.traffic import Traffic, nbytes
from mpsl_dist.runtime.answers import Answers, ClientsLost, name_clients

_log = logging.getLogger("mpsl_dist")

#: Smashed activations by client: early fusion one tensor each, late fusion one per modality.
Smashed = dict[int, list[Tensor]]
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

    @property
    def clients(self) -> list[int]:
        """Numbers of all clients, ascending."""
        ...

    def start(
        self,
        message: str,
        arguments: Mapping[int, Sequence[Any]],
        where: str = "",
        autograd: Any = None,
    ) -> Callable[[], Answers]:
        """Begin to call a method of these clients; the function returned waits for the answers."""
        ...

    def autograd(self) -> AbstractContextManager[Autograd]:
        """Open what one backward's gradients live in."""
        ...


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
        #: Clients that are no longer there.
        self.lost: set[int] = set()

    def __len__(self) -> int:
        return len(self.fleet.clients)

    @property
    def present(self) -> list[int]:
        """Numbers of the clients that are there, ascending."""
        return [client for client in self.fleet.clients if client not in self.lost]

    def lose(self, error: ClientsLost) -> None:
        """Go on without these clients.

        Raises
        ------
        ClientsLost
            If ``faults.on_loss`` is ``stop``, or too few clients would be left.
        """
        gone = {n: why for n, why in error.by_client.items() if n not in self.lost}
        for client, why in gone.items():
            _log.warning("client %d is lost: %s", client, why.message)
        self.lost |= gone.keys()
        if self.faults.on_loss == "stop":
            raise error
        if len(self.present) < self.faults.min_clients:
            first = next(iter(error.by_client.values()))
            few = f"{len(self.present)} clients are left, faults.min_clients is "
            words = f"{first.message} ({few}{self.faults.min_clients})"
            every = {n: replace(why, message=words) for n, why in error.by_client.items()}
            raise ClientsLost(every) from error

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
            When waited for: if a client was lost whose answer is needed, or its loss ends the run
            (:meth:`lose`).
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

    def everyone(self, *arguments: Any) -> dict[int, tuple[Any, ...]]:
        """Return the same arguments for every client that is there."""
        return dict.fromkeys(self.present, arguments)

    def describe(self) -> dict[int, Description]:
        """Ask how many samples every client holds."""
        return self.start("describe", self.everyone(), needed=True)()

    def save(self, folder: str) -> Wait:
        """Have every client write its part of a checkpoint, where it is."""
        return self.start("save", self.everyone(folder), "checkpoint")

    def restore(self, folder: str) -> Wait:
        """Have every client continue from :meth:`save`."""
        return self.start("restore", self.everyone(folder), "resume", needed=True)

    def _count(self, message: str, kind: str | None, values: Mapping[int, Any]) -> None:
        if kind is not None:
            self.traffic.add_all(kind, values)
        else:
            assert not any(map(nbytes, values.values())), f"{message} carries uncounted tensors"


class SplitLink(Link):
    """Messages to clients that hold tokenizers (:class:`mpsl_dist.actors.client.Client`)."""

    def begin_training(self, steps_per_epoch: int, epochs: int) -> None:
        """Tell the clients what their schedules span."""
        self.start("begin_training", self.everyone(steps_per_epoch, epochs))()

    def begin_epoch(self, epoch: int, counts: Mapping[int, list[int]], first_step: int) -> None:
        """Tell every client how many samples it gives to each step of the epoch."""
        parts = {n: (epoch, counts[n], first_step) for n in self.present}
        self.start("begin_epoch", parts, f"epoch {epoch}")()

    @contextmanager
    def step(self, epoch_step: int, number: int, clients: Sequence[int]) -> Iterator[Step]:
        """Open a training step with these clients; leaving it frees its gradients everywhere.

        Parameters
        ----------
        epoch_step, number : int
            The step within the epoch and within the run, from 0.
        """
        with self.fleet.autograd() as autograd:
            yield Step(self, autograd, epoch_step, number, clients)

    def take_gradients(self, where: str) -> dict[int, Tensor | None]:
        """Fetch every client's accumulated gradient vector; None of one that was in no step."""
        return self.start("take_gradients", self.everyone(), where, up="sync_up")()

    def step_on_sum(self, step: int, vector: Tensor, where: str) -> None:
        """Have every client step its optimizer on a sum of gradients at the run's ``step``."""
        self.start("step_on_sum", self.everyone(step, vector), where, down="sync_down")()

    def tokenizer_weights(
        self, clients: Sequence[int], where: str, kind: str
    ) -> dict[int, dict[str, Tensor]]:
        """Fetch these clients' trained tokenizer parameters, counted as traffic of this kind."""
        asked: dict[int, tuple[Any, ...]] = dict.fromkeys(clients, ())
        return self.start("tokenizer_weights", asked, where, up=kind)()

    def set_tokenizer_weights(self, weights: Mapping[str, Tensor], where: str) -> None:
        """Replace every client's trained tokenizer parameters."""
        told = self.everyone(weights)
        self.start("set_tokenizer_weights", told, where, down="sync_down")()

    def begin_test(
        self, weights: Mapping[str, Tensor] | None, counts: Mapping[int, list[int]]
    ) -> None:
        """Have clients lay out their test batches.

        Parameters
        ----------
        weights : mapping of str to Tensor, optional
            The trained tokenizer parameters to test with, instead of every client's own.
        counts : mapping of int to list of int
            Client -> samples of each of its batches.
        """
        told = {n: (weights, counts[n]) for n in counts}
        self.start("begin_test", told, "evaluation", down="test_weights_down")()

    def tokenize_test(self, batch: int, clients: Sequence[int]) -> Smashed:
        """Have clients tokenize a batch of their test samples."""
        asked = dict.fromkeys(clients, (batch,))
        return self.start("tokenize_test", asked, "evaluation", up="test_activations")()

    def score(self, batch: int, predictions: Mapping[int, Tensor]) -> dict[int, int]:
        """Have clients count the right predictions of a batch of their test samples."""
        asked = {n: (batch, predictions[n]) for n in predictions}
        return self.start("score", asked, "evaluation", down="test_predictions")()


class Step:
    """One training step's messages, around one backward; see :meth:`SplitLink.step`."""

    def __init__(
        self,
        link: SplitLink,
        autograd: Autograd,
        epoch_step: int,
        number: int,
        clients: Sequence[int],
    ) -> None:
        self.link = link
        self.autograd = autograd
        self.epoch_step = epoch_step
        self.number = number
        self.clients = list(clients)
        self.where = f"step {number}"
        self._tainted: set[int] = set()

    def tokenize(self) -> Smashed:
        """Have every client tokenize its mini-batch (Eq. 1)."""
        asked = self._each(self.epoch_step)
        smashed = self._start("tokenize", asked, up="activations", needed=True)()
        self.link.traffic.watch_gradients("cut_layer_gradients", smashed)
        return smashed

    def loss(self, predictions: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Have every client compare its slice of the predictions with its labels (Eq. 2).

        Returns
        -------
        dict of int to Tensor
            Each client's mean loss, a scalar.
        """
        asked = {n: (self.epoch_step, predictions[n]) for n in predictions}
        losses = self._start("loss", asked, down="predictions", up="losses", needed=True)()
        received = {n: [slice_b] for n, slice_b in predictions.items()}
        for client, slice_b in predictions.items():
            if slice_b.requires_grad:
                slice_b.register_hook(partial(self._look_at_gradient, client))
        self.link.traffic.watch_gradients("prediction_gradients", received)
        self.link.traffic.watch_gradients("loss_gradients", {n: [x] for n, x in losses.items()})
        return losses

    def pairs(self) -> dict[int, Tensor]:
        """Ask which pairs of every client's mini-batch share a picture."""
        return self._start("pairs", self._each(self.epoch_step), up="pairs", needed=True)()

    def backward(self, loss: Tensor) -> None:
        """Run the one backward through every process that took part.

        Raises
        ------
        ClientsLost
            If a worker was lost.
        NonFiniteError
            If a client's gradient is no finite number.
        """
        self.autograd.backward(loss, self.where)
        if self._tainted:
            clients = sorted(self._tainted)
            raise NonFiniteError(clients, f"{self.where}: the gradient of {name_clients(clients)}")

    def gradients(self) -> dict[Tensor, Tensor]:
        """Return the server's gradients, by parameter."""
        return self.autograd.gradients()

    def step_clients(self) -> Wait:
        """Have every client step its optimizer on its own gradients."""
        return self._start("step", self._each(self.number), autograd=self.autograd)

    def accumulate(self) -> Wait:
        """Have every client keep its own gradients until they are taken."""
        return self._start("accumulate", self._each(), autograd=self.autograd)

    def take_gradients(self) -> Wait:
        """Fetch every client's accumulated gradient vector, this step's gradients with it."""
        everyone = self.link.everyone()
        return self._start("take_gradients", everyone, autograd=self.autograd, up="sync_up")

    def _look_at_gradient(self, client: int, gradient: Tensor) -> None:
        if not bool(torch.isfinite(gradient).all()):
            self._tainted.add(client)

    def _each(self, *arguments: Any) -> dict[int, tuple[Any, ...]]:
        return dict.fromkeys(self.clients, arguments)

    def _start(self, message: str, arguments: Mapping[int, Sequence[Any]], **options: Any) -> Wait:
        return self.link.start(message, arguments, self.where, **options)


class RoundLink(Link):
    """Messages to clients that train the whole model in rounds
    (:class:`mpsl_dist.actors.federated_client.FederatedClient`).
    """

    def begin_training(self, counts: Mapping[int, list[int]], steps: int, rounds: int) -> None:
        """Tell clients the sizes of their mini-batches, and what their schedules span.

        Parameters
        ----------
        counts : mapping of int to list of int
            Client -> samples of every mini-batch of a local epoch.
        steps, rounds : int
            As of :meth:`mpsl_dist.actors.federated_client.FederatedClient.begin_training`.
        """
        self.start("begin_training", {n: (counts[n], steps, rounds) for n in counts})()

    def train_round(
        self, round_: int, weights: Mapping[str, Tensor], clients: Sequence[int]
    ) -> dict[int, Update]:
        """Have clients train the server's model on their own data."""
        sent = dict.fromkeys(clients, (round_, weights))
        where = f"round {round_}"
        return self.start("train_round", sent, where, down="model_down", up="model_up")()

    def test(
        self, weights: Mapping[str, Tensor], batch_size: int, clients: Sequence[int]
    ) -> dict[int, int]:
        """Have clients count right predictions of the server's model on their test samples."""
        sent = dict.fromkeys(clients, (weights, batch_size))
        return self.start("test", sent, "evaluation", down="test_weights_down")()
