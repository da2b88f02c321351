"""The server's typed view of ML-ECS' edge devices (:mod:`mpsl_dist.actors.edge_device`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mpsl_dist.actors.edge_device import DeviceUpdate
from mpsl_dist.methods.link import Link

#: A device's parameters, by name.
Weights = Mapping[str, Tensor]


class DeviceLink(Link):
    """Messages to edge devices."""

    def train_round(
        self, round_: int, anchors_vs: Tensor | None, weights: Mapping[int, Weights]
    ) -> dict[int, DeviceUpdate]:
        """Have devices train, each from what it is sent; all at once.

        Parameters
        ----------
        round_ : int
            From 0.
        anchors_vs : Tensor or None
            The fused representations of the public samples, the same for all.
        weights : mapping of int to mapping
            Device -> what of φ it takes.
        """
        sent = {n: (round_, anchors_vs, weights[n]) for n in weights}
        where = f"round {round_}"
        return self.start("train_round", sent, where, down="lora_down", up="lora_up")()

    def test(
        self, weights: Mapping[int, Weights], batch_size: int
    ) -> dict[int, tuple[dict[str, float], int]]:
        """Have devices test their models on their own test samples.

        Returns
        -------
        dict of int to tuple
            Device -> its scores by name, and the samples that could be read.
        """
        sent = {n: (weights[n], batch_size) for n in weights}
        return self.start("test", sent, self.in_test, down="test_weights_down")()

    def read_tests(self, batch_size: int, clients: Sequence[int]) -> dict[int, int]:
        """Have devices read their test samples; returns how many of them they can read."""
        asked = dict.fromkeys(clients, (batch_size,))
        return self.start("read_tests", asked, "the look at the test data")()

    def _count(self, message: str, kind: str | None, values: Mapping[int, Any]) -> None:
        """Count the fused table apart from the parameters that it travels with."""
        if kind == "lora_down":
            self.traffic.add_all("fused_down", {n: sent[1] for n, sent in values.items()})
            values = {n: sent[2] for n, sent in values.items()}
        super()._count(message, kind, values)
