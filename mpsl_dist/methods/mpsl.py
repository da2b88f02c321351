"""Multimodal Parallel Split Learning, as the paper's section 3 has it.

One step: every client tokenizes its mini-batch; the server encodes the global batch once; every
client compares its slice of the predictions with its own labels; the server aggregates the losses
(Eq. 4) and runs one backward, which distributed autograd carries through all processes; every owner
steps its own optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.actors.server import Server
from mpsl_dist.config import Experiment
from mpsl_dist.data import Splits
from mpsl_dist.data.partition import shares
from mpsl_dist.methods import testing
from mpsl_dist.models.average import average
from mpsl_dist.models.losses import loss_of
from mpsl_dist.models.tokenizers import Tokenizers
from mpsl_dist.records.traffic import Traffic
from mpsl_dist.runtime import rpc


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and what to do."""


def aggregate(losses: Mapping[int, Tensor], batch_sizes: Mapping[int, int]) -> Tensor:
    """Give the global loss L_S, the sum over clients of |B_n|/|B| L_n (Eq. 4)."""
    total = sum(batch_sizes[client] for client in losses)
    return sum(loss * (batch_sizes[client] / total) for client, loss in losses.items())


def number_apart(pairs: Iterable[Tensor]) -> Tensor:
    """Join the clients' numbers of their pictures so that no two clients share one."""
    joined, first = [], 0
    for pairs_b in pairs:
        joined.append(pairs_b + first)
        first += int(pairs_b.max()) + 1
    return torch.cat(joined)


def require_finite(losses: Mapping[Any, Tensor], step: int) -> None:
    """Stop before a loss that is no number reaches anybody's parameters.

    ``losses`` are by client number, or by words that say whose it is.
    """
    for whose, loss in losses.items():
        if not math.isfinite(loss.item()):
            who = f"of client {whose}" if isinstance(whose, int) else whose
            raise TrainingError(
                f"step {step}: the loss {who} is {loss.item()}; no parameter was "
                "changed by this step. Lower training.server.lr and training.client.lr"
            )


class Mpsl:
    """The method over RPC clients.

    Parameters
    ----------
    experiment : Experiment
    splits : Splits
        ``test`` is read where the server holds it; ``train`` never is.
    server : Server
    clients : rpc.Fleet
    tokenizers : Tokenizers
        The server's own copy, which receives averages for evaluation.
    """

    def __init__(
        self,
        experiment: Experiment,
        splits: Splits,
        server: Server,
        clients: rpc.Fleet,
        tokenizers: Tokenizers,
    ) -> None:
        self.experiment = experiment
        self.splits = splits
        self.server = server
        self.clients = clients
        self.tokenizers = tokenizers
        self.traffic = Traffic(len(clients))
        held = clients.call("describe", self._everyone())
        self.sizes = {client: held[client].samples for client in held}
        self.test_sizes = {client: held[client].test_samples for client in held}
        batch_size = experiment.training.batch_size
        self.plan = shares(list(self.sizes.values()), batch_size, experiment.client_share)
        self.total_steps = len(self.plan) * experiment.training.epochs
        clients.call("begin_training", self._everyone(len(self.plan), experiment.training.epochs))
        server.stepper.plan(len(self.plan), experiment.training.epochs)

    def begin_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Tell every client its part of each step of the epoch."""
        parts = {n: (epoch, self.plan[:, n].tolist(), first_step) for n in self.sizes}
        self.clients.call("begin_epoch", parts, f"epoch {epoch}")

    def step(self, epoch_step: int, step: int) -> float:
        """Train one step; gives the global loss.

        Parameters
        ----------
        epoch_step, step : int
            This step within the epoch and within the run, from 0.
        """
        batch_sizes = {n: int(size) for n, size in enumerate(self.plan[epoch_step]) if size}
        where = f"step {step}"
        with rpc.autograd_context() as context:
            batches = {n: (epoch_step,) for n in batch_sizes}
            smashed = self.clients.call("tokenize", batches, where)
            predictions = self.server.forward(smashed)
            if self.experiment.contrastive == "global":
                loss = self._global_loss(predictions, epoch_step, step)
            else:
                loss = self._clients_loss(predictions, epoch_step, step)
            self._count(smashed)
            self._backward(context, loss, where)
            self._step_owners(context, batch_sizes, step, where)
        return loss.item()

    def _clients_loss(
        self, predictions: Mapping[int, Tensor], epoch_step: int, step: int
    ) -> Tensor:
        """Have every client compare its slice of the predictions with its own labels."""
        asked = {n: (epoch_step, predictions[n]) for n in predictions}
        losses = self.clients.call("loss", asked, f"step {step}")
        require_finite(losses, step)
        self.traffic.add_all("predictions", predictions)
        self.traffic.add_all("losses", losses)
        self.traffic.watch_gradients(
            "prediction_gradients", {n: [slice_b] for n, slice_b in predictions.items()}
        )
        self.traffic.watch_gradients("loss_gradients", {n: [x] for n, x in losses.items()})
        return aggregate(losses, {n: len(slice_b) for n, slice_b in predictions.items()})

    def _global_loss(self, predictions: Mapping[int, Tensor], epoch_step: int, step: int) -> Tensor:
        """Contrast every pair with all others of the global batch, at the server.

        Embeddings never go back to the clients; which pairs share a picture comes from them.
        """
        asked = {n: (epoch_step,) for n in predictions}
        pairs = self.clients.call("pairs", asked, f"step {step}")
        self.traffic.add_all("pairs", pairs)
        loss = loss_of(torch.cat(list(predictions.values())), number_apart(pairs.values()))
        require_finite({"of the global batch": loss}, step)
        return loss

    def _backward(self, context: rpc.AutogradContext, loss: Tensor, where: str) -> None:
        try:
            context.backward(loss)
        except RuntimeError as error:
            lost = ", ".join(self.clients.lost())
            cause = f"{lost}: lost in backward" if lost else f"backward failed: {error}"
            raise rpc.RemoteError(f"{cause}, {where}") from error

    def _step_owners(
        self, context: rpc.AutogradContext, took_part: Mapping[int, int], step: int, where: str
    ) -> None:
        """Step the server's optimizer while the clients step theirs, each as synced."""
        sync = self.experiment.tokenizer_sync
        due = (step + 1) % sync.every == 0 or step + 1 == self.total_steps
        finish = None
        if not self.experiment.model.train_tokenizers:
            pass
        elif sync.mode == "gradients" and due:
            finish = self.clients.start("take_gradients", self._everyone(), where, context)
        elif sync.mode == "gradients":
            finish = self.clients.start("accumulate", {n: () for n in took_part}, where, context)
        else:
            finish = self.clients.start("step", {n: (step,) for n in took_part}, where, context)
        self.server.step(step, context.gradients())
        answers = finish() if finish else {}
        if sync.mode == "gradients" and due and answers:
            self._step_on_sum(answers, step, where)
        elif sync.mode == "weights" and due and finish:
            self._average_weights(where)

    def _step_on_sum(self, gradients: Mapping[int, Tensor | None], step: int, where: str) -> None:
        sent = {n: vector for n, vector in gradients.items() if vector is not None}
        self.traffic.add_all("sync_up", sent)
        total = sum(sent.values())
        self.traffic.add_all("sync_down", dict.fromkeys(self.sizes, total))
        self.clients.call("step_on_sum", self._everyone(step, total), where)

    def _average_weights(self, where: str) -> None:
        weights = self.clients.call("tokenizer_weights", self._everyone(), where)
        mean = average(list(weights.values()), list(self.sizes.values()))
        self.traffic.add_all("sync_up", weights)
        self.traffic.add_all("sync_down", dict.fromkeys(self.sizes, mean))
        self.clients.call("set_tokenizer_weights", self._everyone(mean), where)

    def evaluate(self) -> dict[str, float]:
        """Test the server's model on the averaged tokenizers (section 3.3), and on each client's.

        Returns
        -------
        dict of str to float
            ``accuracy``; where ``training.evaluate_own`` asks for them, also ``accuracy_own_mean``,
            ``accuracy_own_min`` and ``accuracy_own_max`` over the clients.
        """
        return testing.evaluate(self)

    def deployable(self) -> Deployable:
        """Join the averaged tokenizers with the server's part."""
        testing.fetch_average(self)
        return Deployable(self.tokenizers, self.server.model)

    def trainable_parameters(self) -> dict[str, int]:
        """Count trained numbers at one client and at the server."""
        parts = {"client": self.tokenizers, "server": self.server.model}
        return {
            owner: sum(p.numel() for p in part.parameters() if p.requires_grad)
            for owner, part in parts.items()
        }

    def save(self, folder: str) -> None:
        """Have every owner write its part of a checkpoint."""
        finish = self.clients.start("save", self._everyone(folder), "checkpoint")
        self.server.save(folder)
        finish()

    def restore(self, folder: str) -> None:
        """Have every owner continue from :meth:`save`."""
        finish = self.clients.start("restore", self._everyone(folder), "resume")
        self.server.restore(folder)
        finish()

    def _everyone(self, *arguments: Any) -> dict[int, tuple[Any, ...]]:
        return dict.fromkeys(self.clients.references, arguments)

    def _count(self, smashed: Mapping[int, list[Tensor]]) -> None:
        self.traffic.add_all("activations", smashed)
        self.traffic.watch_gradients("cut_layer_gradients", smashed)
