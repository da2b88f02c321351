"""From predictions to the one loss that the backward starts from.

Shape legend: ``b`` global batch, ``b_n`` a client's mini-batch, ``d`` width, ``k`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mpsl_dist.config import Experiment
from mpsl_dist.errors import NonFiniteError
from mpsl_dist.methods.split_link import Step
from mpsl_dist.models.tasks import Task
from mpsl_dist.runtime.answers import name_clients


class Objective(Protocol):
    """How a global batch's predictions become the global loss.

    Attributes
    ----------
    predictions_travel : bool
        Whether clients receive their predictions and return a loss.
    """

    predictions_travel: bool

    def __call__(self, step: Step, predictions: Mapping[int, Tensor]) -> Tensor:
        """Return the global loss, a scalar.

        Parameters
        ----------
        step : Step
            Asks the clients.
        predictions : mapping of int to Tensor
            Every client's slice: (b_n, k) logits, or (b_n, 2, d) embeddings in retrieval; features,
            where clients own the head.

        Raises
        ------
        DivergedError
            If a loss is no finite number.
        """
        ...


@dataclass(frozen=True)
class ClientLosses:
    """Every client compares its predictions with its own labels; the server aggregates."""

    predictions_travel: bool = True

    def __call__(self, step: Step, predictions: Mapping[int, Tensor]) -> Tensor:
        """Return L_S, the clients' losses weighted by their mini-batches (Eq. 2 and 4)."""
        losses = step.loss(predictions)
        require_finite(losses, step.number)
        return aggregate(losses, {n: len(slice_b) for n, slice_b in predictions.items()})


@dataclass(frozen=True)
class GlobalContrast:
    """Retrieval's negatives from the global batch: the server contrasts every pair with all others.

    Embeddings never go back to the clients; which pairs share a picture comes from them.
    """

    task: Task
    predictions_travel: bool = False

    def __call__(self, step: Step, predictions: Mapping[int, Tensor]) -> Tensor:
        """Return the contrastive loss over the global batch."""
        pictures_b = number_apart(step.pairs().values())
        loss = self.task.loss(torch.cat(list(predictions.values())), pictures_b)
        if not math.isfinite(loss.item()):
            whose = f"step {step.number}: the loss of the global batch"
            raise NonFiniteError((), whose, loss.item())
        return loss


def objective_of(experiment: Experiment, task: Task) -> Objective:
    """Return the experiment's objective."""
    if task.contrasts and experiment.contrastive == "global":
        return GlobalContrast(task)
    return ClientLosses()


def aggregate(losses: Mapping[int, Tensor], batch_sizes: Mapping[int, int]) -> Tensor:
    """Return the global loss L_S, the sum over clients of |B_n|/|B| L_n (Eq. 4)."""
    total = sum(batch_sizes[client] for client in losses)
    return sum(loss * (batch_sizes[client] / total) for client, loss in losses.items())


def number_apart(pairs: Iterable[Tensor]) -> Tensor:
    """Return the clients' picture numbers, joined and shifted so that no two clients share one.

    Parameters
    ----------
    pairs : iterable of Tensor
        (b_n,) int64 of every client, from 0.
    """
    joined, first = [], 0
    for pairs_b in pairs:
        joined.append(pairs_b + first)
        first += int(pairs_b.max()) + 1
    return torch.cat(joined)


def require_finite(losses: Mapping[int, Tensor], step: int) -> None:
    """Stop before a loss that is no number reaches anybody's parameters.

    Parameters
    ----------
    losses : mapping
        By client.

    Raises
    ------
    NonFiniteError
        Naming every such client.
    """
    wrong = {client: x.item() for client, x in losses.items() if not math.isfinite(x.item())}
    if wrong:
        clients, value = sorted(wrong), next(iter(wrong.values()))
        raise NonFiniteError(clients, f"step {step}: the loss of {name_clients(clients)}", value)
