"""Messages to clients that hold tokenizers, and those of one training step.

What a client does on a message stands in :mod:`mpsl_dist.actors.client`.

Shape legend: ``b`` a client's mini-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpsl_dist.actors.cut_cache import CutCache
from mpsl_dist.errors import DivergedError, NonFiniteError, RemoteError
from mpsl_dist.methods.by_key import Keys
from mpsl_dist.methods.link import Autograd, Link, Wait
from mpsl_dist.methods.masked import Masks, masked_sum
from mpsl_dist.methods.progress import warn
from mpsl_dist.models import codecs
from mpsl_dist.models.average import Mean
from mpsl_dist.models.gapped import Crossing, converted, tensors_of
from mpsl_dist.runtime.answers import name_clients

#: Smashed activations by client: early fusion one tensor each, late fusion one per modality; or of
#: samples that lack parts.
Smashed = dict[int, Crossing]
#: Clients whose tokenizers the server holds at once when it averages.
_AT_ONCE = 64


class SplitLink(Link):
    """Messages to clients that hold tokenizers (:class:`mpsl_dist.actors.client.Client`)."""

    #: What the server keeps of the clients' activations; None where it keeps nothing.
    cache: CutCache | None = None
    #: Of sums that hide what is summed; None where clients send their own tokenizers plainly.
    masks: Masks | None = None
    #: Which client has which parameters.
    keys: Keys = Keys()

    def begin_training(
        self, steps_per_epoch: int, epochs: int, clients: Sequence[int] | None = None
    ) -> None:
        """Tell these clients, by default all, what their schedules span."""
        told = self.present if clients is None else clients
        if self.cache is not None:
            self.cache.forget(told)
        self.start("begin_training", dict.fromkeys(told, (steps_per_epoch, epochs)))()

    def hand_over(self, clients: Sequence[int], to: Sequence[int]) -> None:
        """Have the first of these that answers give others its tokenizers and optimizer's state.

        What it lacks the next gives that has it; what none of them has, the first of the others
        themselves that does.
        """
        told: dict[int, Any] = {}
        while set(asked := self._speakers([*clients, *to])) != told.keys():
            told = self.start("hand_over", dict.fromkeys(asked, ()), "return", up="sync_up")()
        parts = {
            part: {name: x for n in reversed(asked) for name, x in told[n][part].items()}
            for part in ("tokenizers", "moments")
        }
        words = {
            n: ({part: self.keys.own(n, found) for part, found in parts.items()},)
            for n in to
            if n not in self.lost
        }
        self.start("take_over", words, "return", down="sync_down")()
        if own := [n for n in asked if n in to]:
            warn(
                f"nobody is left who has all that {name_clients(own)} had: it goes on with its own"
            )

    def _speakers(self, clients: Sequence[int]) -> list[int]:
        return self.keys.speakers([n for n in clients if n not in self.lost])

    def begin_epoch(self, epoch: int, counts: Mapping[int, list[int]], first_step: int) -> None:
        """Tell every client how many samples it gives to each step of the epoch."""
        if self.cache is not None:
            self.cache.begin_epoch(epoch, counts)
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
        with self.fleet.autograd(clients) as autograd:
            yield Step(self, autograd, epoch_step, number, clients)

    def take_gradients(self, where: str) -> dict[int, Tensor | None]:
        """Fetch every client's accumulated gradient vector; None of one that was in no step."""
        taken = self.start("take_gradients", self.everyone(), where, up="sync_up")()
        return self.only_finite(taken, f"{where}: the gradients")

    def sum_gradients(self, where: str) -> Tensor | None:
        """Return the masked sum of what all clients have kept; they keep it until they step on it.

        None where fewer than three have kept anything.
        """
        assert self.masks is not None
        everyone = dict.fromkeys(self.present, 1.0)
        found = masked_sum(self, self.masks, "gradients", everyone, where, "sync_up")
        return self.masks.of_sum(found[0]) if found else None

    def step_on_sum(self, step: int, vector: Tensor, where: str) -> None:
        """Have every client step its optimizer on a sum of gradients at the run's ``step``."""
        told = {n: (step, self.keys.part(n, vector)) for n in self.present}
        self.start("step_on_sum", told, where, down="sync_down")()

    def tokenizer_weights(
        self, clients: Sequence[int], where: str, kind: str, needed: bool = True
    ) -> dict[int, dict[str, Tensor]]:
        """Fetch these clients' trained tokenizer parameters, counted as traffic of this kind.

        ``needed`` as of :meth:`only_finite`.
        """
        asked: dict[int, tuple[Any, ...]] = dict.fromkeys(clients, ())
        fetched = self.start("tokenizer_weights", asked, where, up=kind)()
        return self.only_finite(fetched, f"{where}: the tokenizers", needed)

    def mean_tokenizers(
        self, clients: Sequence[int], samples: Mapping[int, int], where: str, kind: str
    ) -> dict[str, Tensor] | None:
        """Return the mean of these clients' trained tokenizer parameters, weighted by samples.

        Few clients' are fetched at once and none are kept, so that the server's memory does not
        grow with their number. None where nobody has answered.

        Raises
        ------
        RemoteError
            If it is masked, and fewer than three have answered.
        """
        if self.masks is not None:
            return self._masked_mean(self.masks, clients, samples, where, kind)
        mean = Mean(float(sum(samples[n] for n in clients)))
        for start in range(0, len(clients), _AT_ONCE):
            asked = [n for n in clients[start : start + _AT_ONCE] if n not in self.lost]
            needed = not mean.weight and start + _AT_ONCE >= len(clients)
            for n, weights in self.tokenizer_weights(asked, where, kind, needed).items():
                mean.add(self.keys.taught(n, weights), samples[n])
        return mean.result() if mean.weight else None

    def _masked_mean(
        self,
        masks: Masks,
        clients: Sequence[int],
        samples: Mapping[int, int],
        where: str,
        kind: str,
    ) -> dict[str, Tensor]:
        """Return the mean of which each client has sent its part, masked."""
        whole = sum(samples[n] for n in clients)
        shares = {n: samples[n] / whole for n in clients}
        found = masked_sum(self, masks, "weights", shares, where, kind)
        if found is None:
            raise RemoteError(f"{where}: fewer than three clients are left for a masked average")
        vector_n, members = found
        return masks.named(vector_n / sum(shares[n] for n in members))

    def set_tokenizer_weights(
        self, weights: Mapping[str, Tensor], where: str, clients: Sequence[int] | None = None
    ) -> None:
        """Replace the trained tokenizer parameters of these clients, by default of everybody."""
        asked = self.present if clients is None else clients
        told = {n: (self.keys.own(n, weights),) for n in asked}
        self.start("set_tokenizer_weights", told, where, down="sync_down")()

    def only_finite(
        self, answers: dict[int, Any], whose: str, needed: bool = True
    ) -> dict[int, Any]:
        """Return what is to be summed or averaged without what would spoil it for everybody.

        Parameters
        ----------
        answers : dict of int to Any
            Client -> a tensor, tensors by name, or None.
        whose : str
            What the user should read, as "step 17: the gradients".
        needed : bool
            Whether one of these must be left, there being no others.

        Raises
        ------
        DivergedError
            If one holds a number that is not finite and ``faults.on_nonfinite`` is ``stop``, or
            if nothing is left that is needed.
        """
        wrong = [client for client in answers if not _finite(answers[client])]
        if not wrong:
            return answers
        said = f"{whose} of {name_clients(wrong)} hold numbers that are not finite"
        if self.faults.on_nonfinite == "stop" or (needed and len(wrong) == len(answers)):
            raise DivergedError(f"{said}. Lower training.server.lr and training.client.lr")
        warn(f"{said}: left out")
        return {client: answer for client, answer in answers.items() if client not in wrong}

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
        told = {n: (weights and self.keys.own(n, weights), counts[n]) for n in counts}
        self.start("begin_test", told, self.in_test, down="test_weights_down")()

    def read_test(self, batch: int, clients: Sequence[int]) -> dict[int, int]:
        """Have clients read a batch of their test samples; returns how many of it they can read."""
        return self.start(
            "read_test", dict.fromkeys(clients, (batch,)), "the look at the test data"
        )()

    def tokenize_test(self, batch: int, clients: Sequence[int], own: bool = False) -> Smashed:
        """Have clients tokenize a batch of their test samples, maybe with their own tokenizers."""
        asked = dict.fromkeys(clients, (batch, own))
        sent = self.start("tokenize_test", asked, self.in_test, up="test_activations")()
        return {n: converted(sent[n], codecs.decode) for n in sent}

    def score(
        self, batch: int, predictions: Mapping[int, Tensor], own: bool = False
    ) -> dict[int, int]:
        """Have clients count the right predictions of a batch, maybe with their own heads."""
        asked = {n: (batch, predictions[n], own) for n in predictions}
        return self.start("score", asked, self.in_test, down="test_predictions")()


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
        """Have every client tokenize its mini-batch (Eq. 1), or what is lacking of it."""
        if self.link.cache is None:
            return self._tokenize(self._each(self.epoch_step))
        return self.link.cache.complete(self.epoch_step, self.clients, self._tokenize)

    def loss(
        self,
        predictions: Mapping[int, Tensor],
        beside: Mapping[int, Sequence[Tensor]] | None = None,
    ) -> dict[int, Tensor]:
        """Have every client compare its slice of the predictions with its labels (Eq. 2).

        Parameters
        ----------
        predictions : mapping of int to Tensor
        beside : mapping of int to sequence of Tensor, optional
            What else a client's loss takes.

        Returns
        -------
        dict of int to Tensor
            Each client's mean loss, a scalar; or what its loss is made of.
        """
        received = {n: [x, *(beside or {}).get(n, ())] for n, x in predictions.items()}
        asked = {n: (self.epoch_step, *tensors) for n, tensors in received.items()}
        losses = self._start("loss", asked, down="predictions", up="losses", needed=True)()
        for client, tensors in received.items():
            for slice_b in tensors:
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
        wait = self._start("take_gradients", everyone, autograd=self.autograd, up="sync_up")
        return lambda: self.link.only_finite(wait(), f"{self.where}: the gradients")

    def _tokenize(self, asked: Mapping[int, tuple[Any, ...]]) -> Smashed:
        sent = self._start("tokenize", asked, up="activations", needed=True)()
        watched = {n: codecs.carriers(tensors_of(sent[n])) for n in sent}
        self.link.traffic.watch_gradients("cut_layer_gradients", watched)
        return {n: converted(sent[n], codecs.decode) for n in sent}

    def _look_at_gradient(self, client: int, gradient: Tensor) -> None:
        if not bool(torch.isfinite(gradient).all()):
            self._tainted.add(client)

    def _each(self, *arguments: Any) -> dict[int, tuple[Any, ...]]:
        return dict.fromkeys(self.clients, arguments)

    def _start(self, message: str, arguments: Mapping[int, Sequence[Any]], **options: Any) -> Wait:
        return self.link.start(message, arguments, self.where, **options)


def _finite(answer: Tensor | Mapping[str, Tensor] | None) -> bool:
    tensors = answer.values() if isinstance(answer, Mapping) else [answer]
    return all(x is None or bool(torch.isfinite(x).all()) for x in tensors)
