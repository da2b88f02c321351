"""A client that learns alone: it owns its raw data, its labels and a whole model of its own.

The boundary
------------
Everything that a client ever sends is what a method of :class:`StandaloneClient` returns, and what
it reveals to the server stands after "tells":

===============  ==============================================================================
``describe``     how many training samples it holds, and how many it tests on; tells no more
``train_round``  its sample count and its mean loss, and no parameter; tells how well its data are
                 known
``test``         how well its own model does on how many test samples; tells little of its labels
``read_tests``   how many of its test samples can be read; tells no more
``damage_met``   how many of its files and samples could not be read; tells no more
``save``         the SHA-256 of the file that it wrote of its state, as a text; tells no more
``damage``       what is wrong with that file, a text with the file's name, or nothing; tells no
                 more
===============  ==============================================================================

Where data stay with their owners its host says before all that what it has, as
:mod:`mpsl_dist.actors.client` tells. No tensor ever leaves, and none arrives: the model is written
where the client is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.actors.federated_client import FederatedClient, Update
from mpsl_dist.models.average import load_trainable, trainable_state

#: Writes a model into a folder.
Export = Callable[[Deployable, Path], None]


class StandaloneClient(FederatedClient):
    """One client by itself: a federated client to which no model ever comes.

    Parameters
    ----------
    *client
        As of :class:`~mpsl_dist.actors.federated_client.FederatedClient`. The model has the
        tokenizers of its own modalities alone, and the test data nothing of any other.
    export : callable
    """

    def __init__(self, *client: Any, export: Export) -> None:
        super().__init__(*client)
        self.export = export
        #: Its own parameters: those that all began with, until it is trained.
        self.weights: Mapping[str, Tensor] = trainable_state(self.model)

    # -- what a client sends ---------------------------------------------------------------

    def train_round(self, round_: int, weights: Mapping[str, Tensor]) -> Update:
        """Train its own model on its own data; ``weights`` are none, and none are returned.

        Raises
        ------
        DivergedError
            If a loss is no finite number; its model is then as it was before the round.
        """
        assert not weights
        update = super().train_round(round_, self.weights)
        self.weights = update.weights
        return replace(update, weights={})

    def test(self, weights: Mapping[str, Tensor], batch_size: int) -> tuple[dict[str, float], int]:
        """Return its own model's metrics on test samples, and on how many; ``weights`` are none.

        Samples that have none of its modalities, or cannot be read, are left out; there is no
        metric where none is left.
        """
        assert not weights
        load_trainable(self.model, self.weights)
        if not self.model.task.scored_apart:
            return self.model.test(self.test_data, batch_size), len(self.test_data)
        right, samples = self.model.right(self.test_data, batch_size)
        return ({"accuracy": right / samples} if samples else {}), samples

    # -- what a client is told -------------------------------------------------------------

    def write_model(self) -> None:
        """Write its own model below its run directory, into a folder of its number."""
        load_trainable(self.model, self.weights)
        self.export(self.model, self.home / "model" / f"client-{self.number:04d}")

    # -- its own business ------------------------------------------------------------------

    def _kept(self) -> dict[str, Any]:
        return super()._kept() | {"weights": self.weights}

    def _take_up(self, kept: dict[str, Any]) -> None:
        self.weights = kept.pop("weights")
        super()._take_up(kept)
