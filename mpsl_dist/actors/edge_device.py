"""An edge device of ML-ECS: it owns its raw data, its encoders, its connector and a language model.

The boundary
------------
Everything that a device ever sends is what a method of :class:`EdgeDevice` returns, and what it
reveals to the server stands after "tells":

===============  ==============================================================================
``describe``     how many training and test samples it holds, and how many modalities; tells no
                 more, and not which modalities they are
``train_round``  its language model's trained factors, its sample count, how many modalities it
                 has, its mean loss; tells of its inputs and labels what factors trained on them
                 do. With ``mlecs.exchange: all`` every trained parameter, whose names tell which
                 modalities it has; with ``proxy`` its encoders and its proxy's trained factors,
                 whose names tell the same, and none of its language model; with ``none`` no
                 parameter
``test``         the accuracy and the macro F1 of its test predictions, or the mean score of its
                 captions, and of how many; tells little of its labels, and no text
``read_tests``   how many of its test samples can be read; tells no more
``damage_met``   how many of its files and samples could not be read; tells no more
``save``         the SHA-256 of the file that it wrote of its state, as a text; tells no more
``damage``       what is wrong with that file, a text with the file's name, or nothing; tells no
                 more
===============  ==============================================================================

Raw inputs, its own labels, encoders and connector never leave, but for what ``mlecs.exchange``
sends by ``all`` and ``proxy``, as told above. The public samples are no secret:
server and every device read them, labels and all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mpsl_dist.actors.captions import captions_of, mean_score, wanted
from mpsl_dist.actors.local_data import Damage, LocalData, TestData
from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.actors.stream import Stream
from mpsl_dist.config.mlecs import Mlecs
from mpsl_dist.config.schema import Optimizer
from mpsl_dist.data import Batch
from mpsl_dist.errors import DivergedError
from mpsl_dist.models.answers import CaptionAnswers, answer_loss
from mpsl_dist.models.average import load_trainable, trainable_state
from mpsl_dist.models.lora import edited, middle_distance
from mpsl_dist.models.transfer import pooled_kl
from mpsl_dist.models.unified import Read, Unified, load_shared, shared_state
from mpsl_dist.records import state


@dataclass(frozen=True)
class DeviceDescription:
    """What a device says of itself at the start.

    Attributes
    ----------
    samples, test_samples : int
        Its own.
    modalities : int
        How many it has, |M_j|.
    """

    samples: int
    test_samples: int
    modalities: int


@dataclass(frozen=True)
class DeviceUpdate:
    """What a device sends after a round.

    Attributes
    ----------
    weights : mapping of str to Tensor
        φ_j: what ``mlecs.exchange`` says, on CPU.
    samples : int
        Its training samples.
    modalities : int
        |M_j|: its weight in the average (Eq. 13).
    loss : float
        Mean over the mini-batches of the round.
    """

    weights: Mapping[str, Tensor]
    samples: int
    modalities: int
    loss: float


class EdgeDevice:
    """One device.

    Parameters
    ----------
    number : int
        From 0.
    data, public : LocalData
        Its own training samples, and the public ones, of which it reads its own modalities alone.
    tests : TestData
        Its own; may be empty.
    model : Unified
        Its own; what is frozen may be shared with others of this process.
    rules : Mlecs
    settings : Optimizer
        Of all that it trains.
    batch_size : int
    rounds : int
        Of the whole run: what the schedule spans.
    seed : int
        Of its dropout.
    lacking : float
        The share of all modalities that it does not have.
    home : Path
        The folder that the folders of its states lie below, unless they are absolute.
    """

    def __init__(
        self,
        number: int,
        data: LocalData,
        public: LocalData,
        tests: TestData,
        model: Unified,
        rules: Mlecs,
        settings: Optimizer,
        batch_size: int,
        rounds: int,
        seed: int,
        lacking: float = 0.0,
        home: Path = Path(),
    ) -> None:
        self.number = number
        self.data = data
        self.tests = tests
        self.model = model
        self.rules = rules
        self.lacking = lacking
        self.home = home
        self.seed = seed
        self.own = Stream(data, batch_size)
        self.public = Stream(public, batch_size) if rules.public_steps else None
        self.stepper = Stepper(model.parameters(), settings)
        self.per_round = rules.public_steps + rules.private_steps
        self.stepper.plan(self.per_round, rounds)
        #: What the server sent, and training went on from.
        self._received: Mapping[str, Tensor] = {}

    # -- what a device sends ---------------------------------------------------------------

    def describe(self) -> DeviceDescription:
        """Return how many samples and modalities it has."""
        return DeviceDescription(len(self.data), len(self.tests), len(self.model.modalities))

    def train_round(
        self, round_: int, anchors_vs: Tensor | None, weights: Mapping[str, Tensor]
    ) -> DeviceUpdate:
        """Train on the public samples, then on its own, and return what travels.

        Parameters
        ----------
        round_ : int
            From 0.
        anchors_vs : Tensor or None
            The server's fused representation of every public sample; None without contrast.
        weights : mapping of str to Tensor
            φ, as the server has it.

        Raises
        ------
        DivergedError
            If a loss is no finite number.
        """
        self._receive(weights)
        losses = []
        with dropout_of(self.model, self.seed, self.number, round_):
            for at, (rows, batch) in enumerate(self._public_batches(round_)):
                anchors_bs = None if anchors_vs is None else anchors_vs[rows]
                losses.append(self._step(round_, at, self._connect(batch, anchors_bs)))
            own = self.own.part(round_, self.rules.private_steps)
            for at, (_, _, batch) in enumerate(own, self.rules.public_steps):
                losses.append(self._step(round_, at, self._tune(batch)))
        mean = sum(losses) / len(losses)
        return DeviceUpdate(self._to_send(), len(self.data), len(self.model.modalities), mean)

    def test(self, weights: Mapping[str, Tensor], batch_size: int) -> tuple[dict[str, float], int]:
        """Return its model's scores on its test samples, and of how many, as :func:`tested`."""
        self._receive(weights)
        if isinstance(self.model.answers, CaptionAnswers):
            return mean_score([*captions_of(self.model, self.tests, batch_size)])
        return tested(self.model, self.tests, batch_size)

    def read_tests(self, batch_size: int) -> int:
        """Return how many of its test samples can be read.

        Raises
        ------
        DataError
            If a file cannot be read and ``data.on_error`` is ``raise``.
        """
        return sum(map(len, self.tests.batches(batch_size)))

    def damage_met(self) -> Damage:
        """Return how much of its data could not be read so far."""
        return Damage.of(self.data.unread, self.tests.unread)

    # -- checkpoints, written where the device is ------------------------------------------

    def save(self, folder: str) -> str:
        """Write all that it trains, and the optimizer; return the file's SHA-256."""
        kept = {
            "model": trainable_state(self.model),
            "optimizer": self.stepper.state(),
            "unread": self.data.unread.state(),
        }
        return state.save(self._file(folder), kept)

    def damage(self, folder: str, digest: str | None) -> str | None:
        """Say what is wrong with the file that :meth:`save` wrote; nothing if it is whole."""
        return state.damage(self._file(folder), digest)

    def prune(self, folders: Sequence[str]) -> None:
        """Remove its files beside these folders, of checkpoints that the run no longer has."""
        state.prune([self._file(folder) for folder in folders])

    def restore(self, folder: str) -> None:
        """Continue from what :meth:`save` wrote."""
        with state.continuing(self._file(folder)) as kept:
            load_trainable(self.model, kept["model"])
            self.stepper.load(kept["optimizer"])
            self.data.unread.load(kept["unread"])

    # -- its own business ------------------------------------------------------------------

    def parameters(self) -> list[Tensor]:
        """Return the parameters that it steps."""
        return self.stepper.parameters

    def _connect(self, batch: Batch, anchors_bs: Tensor | None) -> Tensor:
        """Return the loss of cross-modal contrastive learning (Eq. 11); the encoders rest."""
        with torch.no_grad():
            features = self.model.encode(batch.inputs)
        read = self.model.read(features)
        loss = self._answered(read, batch, mutual=self.model.proxy is not None)
        if anchors_bs is None:
            return loss
        anchors_bs = anchors_bs.to(read.fused_bs)
        return loss + self.model.contrast(anchors_bs, read.modalities_bmh)

    def _tune(self, batch: Batch) -> Tensor:
        """Return the loss of adaptive multimodal tuning (Eq. 12)."""
        return self._answered(self.model.read(self.model.encode(batch.inputs)), batch)

    def _answered(self, read: Read, batch: Batch, mutual: bool = False) -> Tensor:
        labels_b = wanted(self.model.answers, batch).to(read.fused_bs.device)
        logits_bpv = self.model.answers(self.model.prompt(read.fused_bs), labels_b)
        loss = answer_loss(self.model.answers, logits_bpv, labels_b) + self._held_back()
        return loss + self._mutual(logits_bpv, read.fused_bs, labels_b) if mutual else loss

    def _mutual(self, own_bpv: Tensor, fused_bs: Tensor, labels_b: Tensor) -> Tensor:
        """Return the loss of the proxy, and of what it and the language model learn of each other.

        No teacher gets a gradient, and the fused representation none from the proxy: the sum steps
        each of the two by its own loss.
        """
        proxy, pool = self.model.proxy, self.rules.pool
        assert proxy is not None
        proxy_bpv = proxy.answers(proxy.prompt(fused_bs.detach()), labels_b)
        taught = pooled_kl(proxy_bpv, own_bpv, pool) + pooled_kl(own_bpv, proxy_bpv, pool)
        return answer_loss(proxy.answers, proxy_bpv, labels_b) + taught

    def _held_back(self) -> float | Tensor:
        """Return FedMLLM's pull towards what the server sent, the stronger the more it lacks."""
        weight = self.rules.proximal * self.lacking
        if not weight:
            return 0.0
        return weight / 2 * middle_distance(self.model.answers, self._received, "answers.")

    def _step(self, round_: int, at: int, loss: Tensor) -> float:
        step_on(loss, self.stepper, round_ * self.per_round + at)
        return loss.item()

    def _public_batches(self, round_: int) -> Iterator[tuple[list[int], Batch]]:
        if self.public is not None:
            for _, rows, batch in self.public.part(round_, self.rules.public_steps):
                yield rows, batch

    def _receive(self, weights: Mapping[str, Tensor]) -> None:
        load_shared(self.model, self.rules.exchange, weights)
        self._received = weights

    def _to_send(self) -> dict[str, Tensor]:
        found = shared_state(self.model, self.rules.exchange)
        return edited(found, self._received, self.rules.edit) if self.rules.edit else found

    def _file(self, folder: str) -> Path:
        return self.home / folder / state.client_file(self.number)


# -- what device and server do alike ---------------------------------------------------------------


def step_on(loss: Tensor, stepper: Stepper, step: int) -> None:
    """Step once on a loss, at the rate of the run's step ``step``.

    Raises
    ------
    DivergedError
        If the loss is no finite number; no parameter has moved then.
    """
    if not math.isfinite(loss.item()):
        raise DivergedError(
            f"the loss is {loss.item()}; no parameter was changed by this step. "
            "Lower training.server.lr and training.client.lr"
        )
    found = torch.autograd.grad(loss, stepper.parameters, allow_unused=True)
    pairs = zip(stepper.parameters, found, strict=True)
    stepper.step({p: gradient for p, gradient in pairs if gradient is not None}, step)


@contextmanager
def dropout_of(model: Unified, seed: int, owner: int, round_: int) -> Iterator[None]:
    """Train within, with dropout drawn from these numbers alone: so a resumed run meets the same.

    Torch's own generators are as before at the end, and the model is set to test.
    """
    device = next(model.parameters()).device
    draws = torch.Generator().manual_seed(seed)
    base = int(torch.randint(2**31, (1,), generator=draws))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(base + 2**32 * (owner + 1) + round_)
        model.train()
        try:
            yield
        finally:
            model.eval()


@torch.no_grad()
def tested(model: Unified, tests: TestData, batch_size: int) -> tuple[dict[str, float], int]:
    """Return a model's ``accuracy`` and macro ``f1`` on test samples, and of how many.

    F1 is averaged over the classes that are met or predicted. Without samples there is no score.
    """
    from sklearn.metrics import f1_score

    told: list[int] = []
    labels: list[int] = []
    for batch in filter(len, tests.batches(batch_size)):
        told += model.scores(batch.inputs).argmax(1).tolist()
        labels += batch.labels.tolist()
    if not labels:
        return {}, 0
    hits = sum(one == label for one, label in zip(told, labels, strict=True))
    f1 = float(f1_score(labels, told, average="macro", zero_division=0.0))
    return {"accuracy": hits / len(labels), "f1": f1}, len(labels)
