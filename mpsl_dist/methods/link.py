"""The server's typed view of its clients: every message, with its bytes counted as it is sent.

What a client does on a message stands in :mod:`mpsl_dist.actors.client` and
:mod:`mpsl_dist.actors.federated_client`. A client that gives no answer raises a
:class:`~mpsl_dist.errors.RemoteError` that names the lost; what that means is for the method to
decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mpsl_dist.actors.client import Description
from mpsl_dist.actors.federated_client import Update
from mpsl_dist.records import state
from mpsl_dist.records.traffic import Traffic, nbytes
from mpsl_dist.runtime.answers import Answers

#: Smashed activations by client: early fusion one tensor each, late fusion one per modality.
Smashed = dict[int, list[Tensor]]
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
    """

    def __init__(self, fleet: Transport, traffic: Traffic) -> None:
        self.fleet = fleet
        self.traffic = traffic
        #: Clients that ever gave no answer.
        self.lost: set[int] = set()

    def __len__(self) -> int:
        return len(self.fleet.clients)

    def start(
        self,
        message: str,
        arguments: Mapping[int, Sequence[Any]],
        where: str = "",
        autograd: Autograd | None = None,
        down: str | None = None,
        up: str | None = None,
    ) -> Wait:
        """Send a message; the function returned waits for the answers.

        Parameters
        ----------
        message, arguments, where, autograd
            As :meth:`mpsl_dist.runtime.fleet.Fleet.start` takes them.
        down, up : str, optional
            Kinds of traffic that the arguments' and the answers' tensors count as
            (:data:`mpsl_dist.records.traffic.KINDS`); None where the message carries no tensor.

        Raises
        ------
        RemoteError
            When waited for, if a client was lost.
        """
        self._count(message, down, arguments)
        wait = self.fleet.start(message, arguments, where, autograd)

        def answers() -> dict[int, Any]:
            outcome = wait()
            self.lost |= outcome.lost.keys()
            found = outcome.all()
            self._count(message, up, found)
            return found

        return answers

    def everyone(self, *arguments: Any) -> dict[int, tuple[Any, ...]]:
        """Return the same arguments for every client."""
        return dict.fromkeys(self.fleet.clients, arguments)

    def describe(self) -> dict[int, Description]:
        """Ask how many samples every client holds."""
        return self.start("describe", self.everyone())()

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
        wait = self.start("save", self.everyone(folder), "checkpoint")
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
        asked = {n: (folder, digest_of(files, state.client_file(n))) for n in self.fleet.clients}
        wait = self.start("damage", asked, "resume")
        own = state.damage(Path(folder) / state.SERVER, digest_of(files, state.SERVER))
        return next((found for found in (own, *wait().values()) if found), None)

    def restore(self, folder: str, own: Callable[[], None]) -> None:
        """Have every client continue from :meth:`save`; ``own`` does so for the server."""
        wait = self.start("restore", self.everyone(folder), "resume")
        try:
            own()
        finally:
            wait()

    def _count(self, message: str, kind: str | None, values: Mapping[int, Any]) -> None:
        if kind is not None:
            self.traffic.add_all(kind, values)
        else:
            assert not any(map(nbytes, values.values())), f"{message} carries uncounted tensors"


def digest_of(files: Mapping[str, str], name: str) -> str | None:
    """Return a part's digest; None where the manifest is of a version that kept none at all."""
    return files.get(name, "") if files else None


class SplitLink(Link):
    """Messages to clients that hold tokenizers (:class:`mpsl_dist.actors.client.Client`)."""

    def begin_training(self, steps_per_epoch: int, epochs: int) -> None:
        """Say what the clients' schedules span."""
        self.start("begin_training", self.everyone(steps_per_epoch, epochs))()

    def begin_epoch(self, epoch: int, counts: Mapping[int, list[int]], first_step: int) -> None:
        """Tell every client how many samples it gives to each step of the epoch."""
        parts = {n: (epoch, counts[n], first_step) for n in counts}
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
        """Take what every client has accumulated; None of one that took part in no step."""
        return self.start("take_gradients", self.everyone(), where, up="sync_up")()

    def step_on_sum(self, step: int, vector: Tensor, where: str) -> None:
        """Have every client step its optimizer on a sum of gradients."""
        self.start("step_on_sum", self.everyone(step, vector), where, down="sync_down")()

    def tokenizer_weights(
        self, clients: Sequence[int], where: str, kind: str
    ) -> dict[int, dict[str, Tensor]]:
        """Fetch trained tokenizer parameters; ``kind`` is the traffic's."""
        asked: dict[int, tuple[Any, ...]] = dict.fromkeys(clients, ())
        return self.start("tokenizer_weights", asked, where, up=kind)()

    def set_tokenizer_weights(self, weights: Mapping[str, Tensor], where: str) -> None:
        """Replace every client's trained tokenizer parameters."""
        told = self.everyone(weights)
        self.start("set_tokenizer_weights", told, where, down="sync_down")()

    def begin_test(
        self, weights: Mapping[str, Tensor] | None, counts: Mapping[int, list[int]]
    ) -> None:
        """Have clients lay out their test batches, with these tokenizers or (None) their own."""
        told = {n: (weights, counts[n]) for n in counts}
        self.start("begin_test", told, "evaluation", down="test_weights_down")()

    def tokenize_test(self, batch: int, clients: Sequence[int]) -> Smashed:
        """Have clients tokenize a batch of their test samples."""
        asked = dict.fromkeys(clients, (batch,))
        return self.start("tokenize_test", asked, "evaluation", up="test_activations")()

    def score(self, batch: int, predictions: Mapping[int, Tensor]) -> dict[int, int]:
        """Have clients count right predictions of that batch."""
        asked = {n: (batch, predictions[n]) for n in predictions}
        return self.start("score", asked, "evaluation", down="test_predictions")()


class Step:
    """One training step's messages, around one backward."""

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

    def tokenize(self) -> Smashed:
        """Have every client tokenize its mini-batch (Eq. 1)."""
        smashed = self._start("tokenize", self._each(self.epoch_step), up="activations")()
        self.link.traffic.watch_gradients("cut_layer_gradients", smashed)
        return smashed

    def loss(self, predictions: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Have every client compare its slice of the predictions with its labels (Eq. 2)."""
        asked = {n: (self.epoch_step, predictions[n]) for n in predictions}
        losses = self._start("loss", asked, down="predictions", up="losses")()
        received = {n: [slice_b] for n, slice_b in predictions.items()}
        self.link.traffic.watch_gradients("prediction_gradients", received)
        self.link.traffic.watch_gradients("loss_gradients", {n: [x] for n, x in losses.items()})
        return losses

    def pairs(self) -> dict[int, Tensor]:
        """Ask which pairs of every client's mini-batch share a picture."""
        return self._start("pairs", self._each(self.epoch_step), up="pairs")()

    def backward(self, loss: Tensor) -> None:
        """Run the one backward through every process that took part."""
        self.autograd.backward(loss, self.where)

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
        """Take what every client of the run has accumulated, this step's gradients with it."""
        everyone = self.link.everyone()
        return self._start("take_gradients", everyone, autograd=self.autograd, up="sync_up")

    def _each(self, *arguments: Any) -> dict[int, tuple[Any, ...]]:
        return dict.fromkeys(self.clients, arguments)

    def _start(self, message: str, arguments: Mapping[int, Sequence[Any]], **options: Any) -> Wait:
        return self.link.start(message, arguments, self.where, **options)


class RoundLink(Link):
    """Messages to clients that train the whole model in rounds
    (:class:`mpsl_dist.actors.federated_client.FederatedClient`).
    """

    def begin_training(self, counts: Mapping[int, list[int]], steps: int, rounds: int) -> None:
        """Tell clients their mini-batches, and what their schedules span."""
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
