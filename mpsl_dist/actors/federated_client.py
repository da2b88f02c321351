"""A client of FedAvg and FedCLIP: it owns its raw data and labels, and trains the whole model.

The boundary
------------
Everything that a client ever sends is what a method of :class:`FederatedClient` returns, and what
it reveals to the server stands after "tells":

===============  ==============================================================================
``describe``     how many training and test samples it holds, and which modalities, if it lacks
                 any; tells no more
``train_round``  the trained parameters after its local epochs, without those of modalities that it
                 does not train on, its sample count, its mean loss; tells of its inputs and labels
                 what a model trained on them does
``test``         how many of its test predictions were right, and of how many; tells little of
                 its labels
``read_tests``   how many of its test samples can be read; tells no more
``damage_met``   how many of its files and samples could not be read; tells no more
``save``         the SHA-256 of the file that it wrote of its state, as a text; tells no more
``damage``       what is wrong with that file, a text with the file's name, or nothing; tells no
                 more
===============  ==============================================================================

Where data stay with their owners its host says before all that what it has, as
:mod:`mpsl_dist.actors.client` tells. Raw inputs, labels and single gradients never leave; frozen
parameters neither leave nor arrive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.actors.learner import Learner
from mpsl_dist.actors.local_data import Damage, Description, LocalData, TestData
from mpsl_dist.config import Training
from mpsl_dist.models.average import load_trainable, trainable_state
from mpsl_dist.models.tokenizers import of_modalities
from mpsl_dist.records import state


@dataclass(frozen=True)
class Update:
    """What a client sends after a round.

    Attributes
    ----------
    weights : mapping of str to Tensor
        Its trainable parameters, on CPU, but for those of modalities that it does not train on.
    samples : int
        Its training samples: its weight in the average.
    loss : float
        Mean over the samples of its local epochs.
    """

    weights: Mapping[str, Tensor]
    samples: int
    loss: float


class FederatedClient:
    """One client of federated learning.

    Parameters
    ----------
    number : int
        From 0.
    data : LocalData
    test_data : TestData
        Its own samples; ``test_data`` may be empty.
    model : Deployable
        Where it computes, with the tokenizers of its own modalities alone. Clients of one worker
        take turns on one model: every turn begins by loading what the server sent, so that of what
        a client uses nothing stays in it for the next.
    training : Training
    keep_optimizer : bool
        Carry the optimizers' state from round to round.
    local_epochs : int
        Per round.
    home : Path
        The folder that the folders of its states lie below, unless they are absolute.
    modalities, trained : tuple of str
        Those that any of its samples has, and any that it trains on; empty where these are all.
    """

    def __init__(
        self,
        number: int,
        data: LocalData,
        test_data: TestData,
        model: Deployable,
        training: Training,
        keep_optimizer: bool,
        local_epochs: int,
        home: Path = Path(),
        modalities: tuple[str, ...] = (),
        trained: tuple[str, ...] = (),
    ) -> None:
        self.number = number
        self.data = data
        self.test_data = test_data
        self.model = model
        self.training = training
        self.keep_optimizer = keep_optimizer
        self.local_epochs = local_epochs
        self.home = home
        self.modalities = modalities
        self.trained = trained
        self.learner = Learner(model, training)
        self.counts: list[int] = []
        self.span = (1, 1)

    # -- what a client sends ---------------------------------------------------------------

    def describe(self) -> Description:
        """Return how many samples it holds, and which modalities."""
        return Description(len(self.data), len(self.test_data), self.modalities)

    def train_round(self, round_: int, weights: Mapping[str, Tensor]) -> Update:
        """Train the server's model on its own data, and return what came out.

        Parameters
        ----------
        round_ : int
            From 0.
        weights : mapping of str to Tensor
            Every trainable parameter, but for those of modalities that it lacks.

        Raises
        ------
        DivergedError
            If a loss is no finite number.
        """
        self._load(weights)
        if not self.keep_optimizer:
            self.learner = Learner(self.model, self.training)
            self.learner.plan(*self.span)
        total = 0.0
        for local_epoch in range(self.local_epochs):
            self.data.begin_epoch(round_ * self.local_epochs + local_epoch, self.counts)
            for epoch_step, count in enumerate(self.counts):
                if count:
                    step = self._step_of_the_run(round_, local_epoch, epoch_step)
                    total += count * self.learner.train(self.data.batch(epoch_step), step)
        samples = len(self.data)
        own = of_modalities(trainable_state(self.model), self.trained)
        return Update(own, samples, total / (samples * self.local_epochs))

    def test(self, weights: Mapping[str, Tensor], batch_size: int) -> tuple[int, int]:
        """Return how many test samples the server's model predicts right, and of how many."""
        self._load(weights)
        return self.model.right(self.test_data, batch_size)

    def read_tests(self, batch_size: int) -> int:
        """Return how many of its test samples can be read.

        Raises
        ------
        DataError
            If a file cannot be read and ``data.on_error`` is ``raise``.
        """
        return sum(map(len, self.test_data.batches(batch_size)))

    def damage_met(self) -> Damage:
        """Return how much of its data could not be read so far."""
        return Damage.of(self.data.unread, self.test_data.unread)

    # -- what a client is told -------------------------------------------------------------

    def begin_training(self, counts: Sequence[int], steps_per_round: int, rounds: int) -> None:
        """Learn its mini-batches and what its schedules span.

        Parameters
        ----------
        counts : sequence of int
            Samples of every mini-batch of a local epoch; zeros are left out.
        steps_per_round : int
            A round moves the learning rate by as much as so many steps of MPSL.
        rounds : int
            Of the whole run.
        """
        self.counts = list(counts)
        self.span = (steps_per_round, rounds)
        self.learner.plan(*self.span)

    # -- checkpoints, written where the client is ------------------------------------------

    def save(self, folder: str) -> str:
        """Write its own state, the model is the server's; return the file's SHA-256."""
        return state.save(self._file(folder), self._kept() | {"unread": self.data.unread.state()})

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
        with state.continuing(self._file(folder)) as kept:
            self.data.unread.load(kept.pop("unread", None))
            self._take_up(kept)

    # -- its own business ------------------------------------------------------------------

    def parameters(self) -> list[Tensor]:
        """Return the parameters that it steps."""
        return self.learner.parameters

    def _kept(self) -> dict[str, Any]:
        """Return what it carries from round to round: its optimizers' state."""
        return self.learner.optimizer_state() if self.keep_optimizer else {}

    def _take_up(self, kept: dict[str, Any]) -> None:
        if kept:
            self.learner.load_optimizer_state(kept)

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        load_trainable(self.model, weights, some=bool(self.modalities))

    def _file(self, folder: str) -> Path:
        return self.home / folder / state.client_file(self.number)

    def _step_of_the_run(self, round_: int, local_epoch: int, epoch_step: int) -> int:
        steps, batches = self.span[0], len(self.counts) * self.local_epochs
        return round_ * steps + (local_epoch * len(self.counts) + epoch_step) * steps // batches
