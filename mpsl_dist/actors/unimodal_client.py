"""A user's client for one modality (M²FedSA): of every sample it sees that modality and the label.

The boundary
------------
It sends what :mod:`mpsl_dist.actors.client` lists, and nothing else. "Tokenizers" there are the
lower half of its modality's encoder and an adapter, and its head is its classifier: its logits stay
with it. Two rows say more here:

========================  =====================================================================
``tokenize``              what crosses the cut: tokens, or a map of features, of its modality
                          alone; tells the inputs as far as that half, known to the server where
                          it is frozen, can be inverted
``loss``                  two numbers: the mean loss that it learns from, and that of the fused
                          logits, by which the server trains the fusion and decides when knowledge
                          is transferred; tell how well its data are known, and by the gradients
                          of its features and, until the transfer begins, of the fused logits
                          (softmax minus one-hot) every label
========================  =====================================================================

Shape legend: ``b`` batch, ``d`` width, ``k`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mpsl_dist.actors.choices import device_of, task_of
from mpsl_dist.actors.client import Client
from mpsl_dist.actors.halves import build_lower
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.actors.references import Local
from mpsl_dist.config import Experiment
from mpsl_dist.models.tokenizers import copy_of
from mpsl_dist.models.transfer import Transfer


class UnimodalClient(Client):
    """As :class:`~mpsl_dist.actors.client.Client`, taught by its labels and by a fusion."""

    #: Its loss once knowledge is transferred.
    transfer: Transfer

    def loss(
        self, step: int, feature: Tensor, fused: Tensor, fused_feature: Tensor | None = None
    ) -> Tensor:
        """Compare the prediction that it makes of its feature with its own labels.

        Parameters
        ----------
        step : int
            The step of the epoch that these are of.
        feature : Tensor
            (b, d), of its modality.
        fused : Tensor
            (b, k) logits of the fusion.
        fused_feature : Tensor, optional
            (b, d), of the fusion: where it is there, knowledge is transferred.

        Returns
        -------
        Tensor
            (2,), on CPU: the mean loss that it learns from, and that of ``fused``.
        """
        feature_bd, fused_bk = feature.to(self.device), fused.to(self.device)
        labels_b = self.data.batch(step).labels
        logits_bk = self.tokenizers.local_value().head(feature_bd)
        own, of_fused = (self.task.loss(x, labels_b) for x in (logits_bk, fused_bk))
        if fused_feature is not None:
            features = feature_bd, fused_feature.to(self.device)
            own = self.transfer.loss(own, of_fused, (logits_bk, fused_bk), features)
        return torch.stack([own, of_fused]).cpu()


def build_clients(
    experiment: Experiment,
    numbers: Sequence[int],
    holdings: Holdings,
    reference: Callable[[Any], Any] = Local,
) -> list[UnimodalClient]:
    """Build these clients in this process; those of a modality begin alike.

    The parameters are those of :data:`mpsl_dist.methods.hosting.BuildClients`.
    """
    splits, device = holdings.splits, device_of(experiment)
    held = {n: holdings.modalities(n) or tuple(splits.shapes) for n in numbers}
    first = {own: build_lower(experiment, splits, own).to(device) for own in set(held.values())}
    task, home = task_of(splits), experiment.run_directory.absolute()
    clients = []
    for number in numbers:
        half = copy_of(first[held[number]])
        stepper = Stepper(half.parameters(), experiment.training.client)
        owned = (reference(half), stepper, "late", task, device, home)
        client = UnimodalClient(number, *holdings.of(number), *owned)
        client.modalities, client.transfer = holdings.modalities(number), transfer_of(experiment)
        clients.append(client)
    return clients


def transfer_of(experiment: Experiment) -> Transfer:
    """Return the experiment's transfer."""
    chosen = experiment.m2fedsa
    words = (chosen.divergence, chosen.divergence_over, chosen.least_losses)
    return Transfer(tuple(chosen.lambdas), *words, chosen.paper_denominator)
