"""When the transfer of knowledge begins (M²FedSA)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from mpsl_dist.config.m2fedsa import Switch


class TransferSwitch:
    """Off until its rule holds at the end of a round, and on for good.

    Parameters
    ----------
    rule : Switch
    """

    def __init__(self, rule: Switch) -> None:
        self.rule = rule
        self.on = rule.rule == "round" and rule.round == 0
        #: Mean losses of the fusion, of the last rounds.
        self.history: list[float] = []
        self.rounds = 0
        self._sum, self._samples = 0.0, 0

    def add(self, loss: float, samples: int) -> None:
        """Take in the fusion's mean loss over these samples of the round."""
        self._sum, self._samples = self._sum + loss * samples, self._samples + samples

    def end_round(self) -> None:
        """Decide; a round in which nobody took part has no loss."""
        self.rounds += 1
        if self._samples:
            self.history.append(self._sum / self._samples)
        self.history = self.history[-self.rule.window - 1 :]
        self._sum, self._samples = 0.0, 0
        if self.rule.rule == "round":
            self.on = self.rounds >= self.rule.round
        elif self.rule.rule == "plateau":
            self.on = self.on or self._is_flat()

    def _is_flat(self) -> bool:
        """Return whether the deviation of the last differences is small beside their mean."""
        if len(self.history) <= self.rule.window:
            return False
        pairs = zip(self.history, self.history[1:], strict=False)
        differences = [abs(later - earlier) for earlier, later in pairs]
        # Nothing has changed at all: the flattest there is.
        mean = statistics.fmean(differences)
        return not mean or statistics.pstdev(differences) / mean < self.rule.cv

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        names = ("on", "history", "rounds", "_sum", "_samples")
        return {name.strip("_"): getattr(self, name) for name in names}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self.on, self.history, self.rounds = state["on"], list(state["history"]), state["rounds"]
        self._sum, self._samples = state["sum"], state["samples"]
