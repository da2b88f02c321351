"""The server's link to clients that train the whole model in rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mpsl_dist.actors.federated_client import Update
from mpsl_dist.methods.by_key import Keys
from mpsl_dist.methods.link import Link


class RoundLink(Link):
    """Messages to clients that train the whole model in rounds
    (:class:`mpsl_dist.actors.federated_client.FederatedClient`).
    """

    #: Which client has which parameters.
    keys: Keys = Keys()

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
        """Have clients train what they have of the server's model on their own data."""
        sent = {n: (round_, self.keys.own(n, weights)) for n in clients}
        where = f"round {round_}"
        return self.start("train_round", sent, where, down="model_down", up="model_up")()

    def read_tests(self, batch_size: int, clients: Sequence[int]) -> dict[int, int]:
        """Have clients read their test samples; returns how many of them they can read."""
        asked = dict.fromkeys(clients, (batch_size,))
        return self.start("read_tests", asked, "the look at the test data")()

    def test(
        self, weights: Mapping[str, Tensor], batch_size: int, clients: Sequence[int]
    ) -> dict[int, tuple[int, int]]:
        """Have clients count right predictions of the server's model on their test samples.

        Returns
        -------
        dict of int to tuple of int
            Client -> right predictions, and samples that could be read.
        """
        sent = {n: (self.keys.own(n, weights), batch_size) for n in clients}
        return self.start("test", sent, self.in_test, down="test_weights_down")()
