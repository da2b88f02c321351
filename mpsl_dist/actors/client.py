"""The client: it owns its raw data, its labels and its tokenizers, and its head where it has one.

The boundary
------------
Everything that a client ever sends is what a method of :class:`Client` returns. What an answer
reveals to the server stands after "tells"; ``docs/privacy.md`` has it measured:

========================  =====================================================================
``describe``              how many training and test samples it holds, and which modalities, if it
                          lacks any; tells no more
``tokenize``              smashed activations of the cut layer (training), coded as ``wire`` says,
                          with ``wire.cache`` those of the rows alone that the server asks for; of a
                          mini-batch that lacks parts those of what is there, and a mask; tells the
                          inputs, exactly where a token is wider than its patch, and which sample
                          has which modality
``loss``                  one number, its mean loss over its mini-batch; tells how well its data
                          are known, and by its gradient, below, every label
``pairs``                 which pairs of its mini-batch share a picture (retrieval with
                          ``contrastive: global``, in place of a loss); tells the same
``tokenize_test``         smashed activations (evaluation, where clients hold the test set), coded
                          in the same way; tells the test inputs, as ``tokenize`` does
``score``                 how many of its test predictions were right; tells little of its labels
``read_test``             how many samples of a test batch can be read; tells no more
``damage_met``            how many of its files and samples could not be read; tells no more
``tokenizer_weights``     its trained tokenizer parameters, for an average; with ``masked`` never,
                          but where they are everybody's (``tokenizer_sync: gradients``); tells
                          what its activations are to be solved with
``take_gradients``        its accumulated tokenizer gradients (``tokenizer_sync: gradients``), with
                          ``masked`` never; tells of its inputs what gradients do
``offer_key``             with ``masked``: a public key for one sum; tells whether it has something
                          to add
``mask``                  with ``masked``: its part of that sum, gradients or weights; tells
                          nothing, uniformly random numbers but in the sum of all
``unlock``                with ``masked``: a seed that opens the sum once everybody's part is
                          there; tells the sum
``hand_over``             its trained tokenizer parameters and its optimizer's state, for a client
                          that comes back (``tokenizer_sync: gradients`` alone); tells nothing
                          new: all have the same, and the server knows the sums that made them so
``save``                  the SHA-256 of the file that it wrote of its state, as a text; tells no
                          more
``damage``                what is wrong with that file, a text with the file's name, or nothing;
                          tells no more
========================  =====================================================================

A client of M²FedSA sends no other messages; :mod:`mpsl_dist.actors.unimodal_client` says what more
its ``tokenize`` and ``loss`` tell.

Where data stay with their owners (``data.place: own``) its host says before all that, once, as an
:class:`~mpsl_dist.actors.agreement.Offer`: its host's name, the shapes of its modalities, its class
names (unless ``data.classes`` declares them), each client's number of training and test samples and
how many of its files are missing; or why it has none to offer, which may name files and labels.

With ``defences`` all this is made of labels that may be false, and tokens and gradients have noise,
tokens no order or are those of tokenizers that nobody else knows: :mod:`mpsl_dist.actors.defences`.
Without any, which is the default, what follows holds.

Which samples a mini-batch has is a function of the experiment's seed, which the server has too: it
can tell that two mini-batches of different epochs have a sample in common, though never what it is.
With ``wire.cache`` it makes use of that: it keeps every sample's activations, with the client's
number and the sample's place among the client's own, and so links the sample over epochs, with its
predictions and their gradients.

A mask tells which samples of a mini-batch lack which part: that somebody has no scan can be a fact
about them. What is absent itself is nowhere, and no gradient comes back for it. Which parameters a
client sends tells the modalities that ``describe`` has told already.

With ``tokenizer_sync.masked`` (:mod:`mpsl_dist.actors.masking`) nobody but the client learns its
own gradients or, where clients' weights differ, its own weights; the server learns their sum.
Without, it learns both exactly. The activations are what they are either way.

And, by distributed autograd in the backward, the gradient of its loss with respect to its
predictions. In classification that gradient reads every label (softmax minus one-hot: the one
negative entry is the label), in this protocol as in the paper's. Raw inputs and labels themselves
are never returned.

With ``model.head_at: client`` the head W_t is part of the client: "tokenizer parameters" and
"tokenizer gradients" above are its head's too, it receives features in place of predictions, and
their gradients go back. That hides logits, not labels: a gradient of features is W_tᵀ(p - e_y), all
of a mini-batch lie in k directions, and clustering them reads the labels (which class a cluster is,
a head's parameters tell, where they are sent).

Shape legend: ``b`` batch, ``l`` length in tokens, ``d`` width, ``k`` classes. A gradient vector has
one number per trained tokenizer parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsl_dist.actors import masking
from mpsl_dist.actors.defences import Guard, Mark
from mpsl_dist.actors.local_data import Damage, Description, LocalData, TestData
from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.actors.references import Reference
from mpsl_dist.actors.smashing import inputs_of, smash
from mpsl_dist.data import Batch
from mpsl_dist.errors import DivergedError
from mpsl_dist.models import fixed_point
from mpsl_dist.models.average import load_trainable, trainable_state
from mpsl_dist.models.codecs import Sent, Wire
from mpsl_dist.models.gapped import Gapped, converted
from mpsl_dist.models.tasks import Task
from mpsl_dist.models.tokenizers import Tokenizers, copy_of
from mpsl_dist.records import state


@dataclass(eq=False)
class Client:
    """One client of split learning.

    Attributes
    ----------
    number : int
        From 0.
    data : LocalData
    test_data : TestData
        Its own samples; ``test_data`` may be empty.
    tokenizers : Reference
        Its reference to its :class:`Tokenizers`.
    stepper : Stepper
        Steps its tokenizers.
    fusion : "early" or "late"
    task : Task
        Compares predictions with its labels.
    device : str
    home : Path
        The folder that the folders of its states lie below, unless they are absolute.
    wire : Wire
        Codes what crosses the cut.
    guard : Guard
        Its defences, which change what leaves it.
    modalities, trained : tuple of str
        Those that it has tokenizers of, and any that it trains on; empty where these are all.
    """

    number: int
    data: LocalData
    test_data: TestData
    tokenizers: Reference
    stepper: Stepper
    fusion: str
    task: Task
    device: str = "cpu"
    home: Path = Path()
    wire: Wire = field(default_factory=Wire)
    guard: Guard = field(default_factory=Guard)
    modalities: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    _accumulated: Tensor | None = field(default=None, init=False)
    _masked: masking.MaskedSum | None = field(default=None, init=False)
    _visiting: Tokenizers | None = field(default=None, init=False)

    # -- what a client sends ---------------------------------------------------------------

    def describe(self) -> Description:
        """Return how many samples it holds, and which modalities."""
        return Description(len(self.data), len(self.test_data), self.modalities, self.trained)

    def tokenize(self, step: int, rows: Sequence[int] | None = None) -> list[Sent] | Gapped:
        """Tokenize the mini-batch of this step of the epoch, from 0 (Eq. 1).

        Parameters
        ----------
        step : int
        rows : sequence of int, optional
            The only ones of it that the server has not kept (``wire.cache``); by default all.

        Returns
        -------
        list of Tensor or Packed, or Gapped
            The smashed activations, on CPU: early fusion one (b, l, d), late fusion one
            (b, l_m, d) per modality; where a sample lacks a part, of what is there alone.
        """
        batch, positions = self.data.batch(step), self.data.positions(step)
        if rows is not None:
            batch, positions = batch.rows(rows), [positions[row] for row in rows]
        marks = self.guard.training_marks(positions, self.data.epoch)
        smashed = self._smash(self.tokenizers.local_value(), batch, marks)
        return converted(smashed, lambda tokens: self.wire.encode(tokens, self.data.key(step)))

    def loss(self, step: int, predictions: Tensor) -> Tensor:
        """Compare predictions with its own labels (Eq. 2).

        Parameters
        ----------
        step : int
            The step of the epoch that the predictions are of.
        predictions : Tensor
            (b, k) logits, or (b, 2, d) embeddings in retrieval; features, if the head is its own.

        Returns
        -------
        Tensor
            The mean loss over its mini-batch, a scalar, on CPU.
        """
        batch, positions = self.data.batch(step), self.data.positions(step)
        tokenizers = self.tokenizers.local_value()
        received = self.guard.received(predictions.to(self.device), self.data.key(step))
        loss = self.guard.loss(self.task, tokenizers.head(received), batch.labels, positions)
        if self.guard.chosen.nopeek:
            inputs = inputs_of(batch, tokenizers, self.device)
            loss = loss + self.guard.penalty(tokenizers, inputs, tokenizers(inputs))
        return loss.cpu()

    def pairs(self, step: int) -> Tensor:
        """Return which pairs of the mini-batch share a picture (``contrastive: global`` alone).

        Returns
        -------
        Tensor
            (b,) int64, numbered within the mini-batch: equal where the picture is the same, and
            nothing about which picture.
        """
        return self.data.batch(step).labels.unique(return_inverse=True)[1]

    def tokenize_test(self, step: int, own: bool = False) -> list[Sent] | Gapped:
        """Tokenize what can be read of its test batch ``step``.

        Parameters
        ----------
        own : bool
            Whether with its own tokenizers, or those of :meth:`begin_test`.
        """
        batch = self.test_data.batch(step)
        marks = [("test", self.data.epoch, own, step, row) for row in range(len(batch))]
        with torch.no_grad():
            return converted(self._smash(self._tested(own), batch, marks), self.wire.encode)

    def score(self, step: int, predictions_bk: Tensor, own: bool = False) -> int:
        """Return how many predictions (b, k) of its test batch ``step`` are right.

        They are features where heads are the clients'; ``own`` as of :meth:`tokenize_test`.
        """
        with torch.no_grad():
            predictions_bk = self._tested(own).head(predictions_bk.to(self.device))
        return self.task.score(predictions_bk, self.test_data.batch(step).labels)

    def read_test(self, step: int) -> int:
        """Return how many samples of its test batch ``step`` can be read.

        Raises
        ------
        DataError
            If a file cannot be read and ``data.on_error`` is ``raise``.
        """
        return len(self.test_data.batch(step))

    def damage_met(self) -> Damage:
        """Return how much of its data could not be read so far."""
        return Damage.of(self.data.unread, self.test_data.unread)

    def tokenizer_weights(self) -> dict[str, Tensor]:
        """Return its trained tokenizer parameters by name, on CPU, for an average."""
        return trainable_state(self.tokenizers.local_value())

    def take_gradients(self, gradients: Mapping[Tensor, Tensor] | None = None) -> Tensor | None:
        """Return its accumulated gradients as one vector, and start again from zero.

        Parameters
        ----------
        gradients : mapping of Tensor to Tensor, optional
            Of a last step, by parameter: added before.

        Returns
        -------
        Tensor or None
            On CPU; None if it took part in no step since the last time.
        """
        self.accumulate(gradients or {})
        vector, self._accumulated = self._accumulated, None
        return vector

    def offer_key(self, number: int, what: str, share: float, among: int) -> Tensor | None:
        """Begin its part in masked sum ``number``: of what it adds, only a key leaves.

        It adds its accumulated gradients, which it keeps until it steps on the sum, or its weights
        (``what``), times ``share``; ``among`` clients may take part.

        Returns
        -------
        Tensor or None
            (32,) uint8; None if it has no gradients.

        Raises
        ------
        DivergedError
            If it has numbers that are not finite or too large; such gradients are given up.
        """
        own, self._masked = self._accumulated, None
        if what == "weights":
            state = trainable_state(self.tokenizers.local_value())
            own = torch.cat([x.flatten() for x in state.values()])
        if own is None:
            return None
        try:
            whole = fixed_point.encode(own.double() * share, among, f"its tokenizers' {what}")
        except DivergedError:
            self._accumulated = None
            raise
        self._masked = masking.MaskedSum(self.number, number, whole)
        return self._masked.key

    def mask(self, number: int, members: Sequence[int], keys: Tensor) -> masking.Masked:
        """Return its part, see :meth:`mpsl_dist.actors.masking.MaskedSum.mask`."""
        return masking.begun(self._masked, number).mask(members, keys)

    def unlock(self, number: int, sealed: Tensor | None) -> Tensor:
        """Open the sum, see :meth:`mpsl_dist.actors.masking.MaskedSum.unlock`."""
        return masking.begun(self._masked, number).unlock(sealed)

    def hand_over(self) -> dict[str, Any]:
        """Return what a client that comes back continues from, where all clients are the same."""
        weights = trainable_state(self.tokenizers.local_value())
        moments = self.stepper.copied_state().get("state", {})
        named = {name: moments.get(at, {}) for at, name in enumerate(weights)}
        return {"tokenizers": weights, "moments": named}

    # -- what a client is told -------------------------------------------------------------

    def begin_training(self, steps_per_epoch: int, epochs: int) -> None:
        """Learn how many steps and epochs its learning rate's schedule spans."""
        self.stepper.plan(steps_per_epoch, epochs)

    def begin_epoch(self, epoch: int, counts: Sequence[int], first_step: int) -> None:
        """Lay out its part of every step of the epoch, see :meth:`LocalData.begin_epoch`."""
        self.data.begin_epoch(epoch, counts, first_step)

    def step(self, step: int, gradients: Mapping[Tensor, Tensor]) -> None:
        """Step its own optimizer at the run's step ``step``, on gradients by parameter.

        Raises
        ------
        DivergedError
            If one is no finite number; its parameters then stay as they are.
        """
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values()):
            raise DivergedError(
                "a gradient of its tokenizers is no finite number. Lower training.client.lr"
            )
        self.stepper.step(gradients, step)

    def accumulate(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """Add the gradients of a step, by parameter, to those kept until they are taken."""
        own = [p for p in self.stepper.parameters if p in gradients]
        if not own:
            return
        vector = torch.cat(
            [gradients.get(p, torch.zeros_like(p)).flatten().cpu() for p in self.stepper.parameters]
        )
        self._accumulated = vector if self._accumulated is None else self._accumulated + vector

    def step_on_sum(self, step: int, vector: Tensor) -> None:
        """Step its optimizer at the run's step ``step``, on the sum of all clients' gradients.

        What it has kept until now is in the sum.
        """
        self._accumulated = None
        parts = vector.to(self.device).split([p.numel() for p in self.stepper.parameters])
        self.stepper.step(
            {p: part.view_as(p) for p, part in zip(self.stepper.parameters, parts, strict=True)},
            step,
        )

    def set_tokenizer_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace its tokenizers' trained parameters, as by an average of those who have them."""
        load_trainable(self.tokenizers.local_value(), weights, some=True)

    def take_over(self, parts: Mapping[str, Any]) -> None:
        """Continue from what other clients have handed over."""
        self.set_tokenizer_weights(parts["tokenizers"])
        names = trainable_state(self.tokenizers.local_value())
        moments = {at: parts["moments"][name] for at, name in enumerate(names)}
        self.stepper.take_over({at: own for at, own in moments.items() if own})
        self._accumulated = None

    def begin_test(self, weights: Mapping[str, Tensor] | None, counts: Sequence[int]) -> None:
        """Lay out its test batches.

        Parameters
        ----------
        weights : mapping of str to Tensor, optional
            The trained tokenizer parameters to test with, instead of its own.
        counts : sequence of int
            Samples of every batch.
        """
        self._visiting = self.tokenizers.local_value()
        if weights is not None:
            self._visiting = copy_of(self._visiting)
            load_trainable(self._visiting, weights, some=True)
        self.test_data.lay_out(counts)

    # -- checkpoints, written where the client is ------------------------------------------

    def save(self, folder: str) -> str:
        """Write its state to ``folder``, which stays on its machine; return the file's SHA-256."""
        parts = {
            "tokenizers": trainable_state(self.tokenizers.local_value()),
            "optimizer": self.stepper.state(),
            "accumulated": self._accumulated,
            "unread": self.data.unread.state(),
        }
        return state.save(self._file(folder), parts)

    def damage(self, folder: str, digest: str | None) -> str | None:
        """Say what is wrong with the file that :meth:`save` wrote; nothing if it is whole.

        Parameters
        ----------
        digest : str or None
            What :meth:`save` returned, where the checkpoint has kept it.
        """
        return state.damage(self._file(folder), digest)

    def prune(self, folders: Sequence[str]) -> None:
        """Remove its files beside these folders, of checkpoints that the run no longer has."""
        state.prune([self._file(folder) for folder in folders])

    def restore(self, folder: str) -> None:
        """Continue from what :meth:`save` wrote."""
        with state.continuing(self._file(folder), self.device) as parts:
            load_trainable(self.tokenizers.local_value(), parts["tokenizers"])
            self.stepper.load(parts["optimizer"])
            self._accumulated = parts["accumulated"]
            self.data.unread.load(parts.get("unread"))

    # -- its own business ------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that it steps."""
        return self.stepper.parameters

    def _tested(self, own: bool) -> Tokenizers:
        tested = self.tokenizers.local_value() if own else self._visiting
        assert tested is not None
        return tested

    def _file(self, folder: str) -> Path:
        return self.home / folder / state.client_file(self.number)

    def _smash(
        self, tokenizers: Tokenizers, batch: Batch, marks: Sequence[Mark]
    ) -> list[Tensor] | Gapped:
        return smash(tokenizers, batch, self.device, self.fusion, self.guard, marks)
