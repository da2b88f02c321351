"""Whether and how the clients' tokenizers are brought together in training (``tokenizer_sync``),
and their heads with them, where they own one (``model.head_at: client``).

A rule is one small class: how the clients step, what is done when the tokenizers meet, and how many
bytes that costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpsl_dist.actors.choices import clients_own_head
from mpsl_dist.config import Experiment
from mpsl_dist.methods.link import Wait
from mpsl_dist.methods.split_link import SplitLink, Step

#: Bytes by kind and client.
Bytes = dict[str, NDArray[np.int64]]


class Sync(Protocol):
    """A rule, one for every ``tokenizer_sync.mode``.

    Attributes
    ----------
    every : int
        The tokenizers meet after every so many steps, and after the last one.
    identical : bool
        Whether all clients' tokenizers are the same at every moment, so that one speaks for all.
    """

    every: int
    identical: bool

    def begin(self, step: Step, due: bool) -> Wait:
        """Have the clients that took part in a step use their gradients.

        Parameters
        ----------
        step : Step
        due : bool
            Whether the tokenizers meet after this step; the answers are then for :meth:`meet`.
        """
        ...

    def collect(self, link: SplitLink, where: str) -> dict[int, Any]:
        """Fetch what :meth:`meet` needs, where every :meth:`begin` was told that nothing is due."""
        ...

    def meet(
        self, link: SplitLink, answers: Mapping[int, Any], step: int, sizes: Mapping[int, int]
    ) -> None:
        """Bring the tokenizers together.

        Parameters
        ----------
        answers : mapping
            What :meth:`begin` was answered when due, or :meth:`collect` returned.
        step : int
            Within the run.
        sizes : mapping of int to int
            Training samples by client.
        """
        ...

    def cost(self, takes_part: NDArray[np.bool_], weights: int) -> Bytes:
        """Return the bytes of a run, by kind and client.

        Parameters
        ----------
        takes_part : array
            (steps, clients) bool: who contributes to which step of the run.
        weights : int
            Bytes of one client's trained tokenizers.
        """
        ...


@dataclass(frozen=True)
class Separate:
    """Every client steps its own tokenizers, and they drift apart: the paper."""

    every: int = 1
    identical: bool = False

    def begin(self, step: Step, due: bool) -> Wait:
        """Have the clients step."""
        return step.step_clients()

    def collect(self, link: SplitLink, where: str) -> dict[int, Any]:
        """Return nothing."""
        return {}

    def meet(
        self, link: SplitLink, answers: Mapping[int, Any], step: int, sizes: Mapping[int, int]
    ) -> None:
        """Do nothing."""

    def cost(self, takes_part: NDArray[np.bool_], weights: int) -> Bytes:
        """Return no bytes."""
        return {}


@dataclass(frozen=True)
class Frozen(Separate):
    """No client trains anything (``model.train_tokenizers: false``, the head at the server)."""

    identical: bool = False

    def begin(self, step: Step, due: bool) -> Wait:
        """Do nothing."""
        return dict


@dataclass(frozen=True)
class SumGradients:
    """All clients step on the sum of all gradients since they last met; nobody steps alone."""

    every: int
    identical: bool = True

    def begin(self, step: Step, due: bool) -> Wait:
        """Have the clients keep their gradients, and send what they kept when due."""
        return step.take_gradients() if due else step.accumulate()

    def collect(self, link: SplitLink, where: str) -> dict[int, Any]:
        """Fetch what every client has kept."""
        return link.take_gradients(where)

    def meet(
        self, link: SplitLink, answers: Mapping[int, Any], step: int, sizes: Mapping[int, int]
    ) -> None:
        """Have every client step on the sum."""
        vectors = [vector for vector in answers.values() if vector is not None]
        if vectors:  # none where everybody who took part is lost
            link.step_on_sum(step, sum(vectors), f"step {step}")

    def cost(self, takes_part: NDArray[np.bool_], weights: int) -> Bytes:
        """Return a vector up from whoever took part since the last time, one down to everybody."""
        steps, clients = takes_part.shape
        meetings = _meetings(steps, self.every)
        parts = np.split(takes_part, [m + 1 for m in meetings[:-1]])
        up = np.sum([part.any(0) for part in parts], axis=0, dtype=np.int64)
        return {"sync_up": up * weights, "sync_down": np.full(clients, len(meetings) * weights)}


@dataclass(frozen=True)
class AverageWeights(Separate):
    """Every client steps its own tokenizers; now and then all take the average of all."""

    def meet(
        self, link: SplitLink, answers: Mapping[int, Any], step: int, sizes: Mapping[int, int]
    ) -> None:
        """Replace every client's weights by the average, weighted by samples."""
        where = f"step {step}"
        mean = link.mean_tokenizers(link.present, sizes, where, "sync_up")
        if mean:  # none where everybody is lost
            link.set_tokenizer_weights(mean, where)

    def cost(self, takes_part: NDArray[np.bool_], weights: int) -> Bytes:
        """Return the weights up from and down to everybody."""
        steps, clients = takes_part.shape
        each = np.full(clients, len(_meetings(steps, self.every)) * weights)
        return {"sync_up": each, "sync_down": each}


def sync_of(experiment: Experiment) -> Sync:
    """Return the experiment's rule."""
    rule = experiment.tokenizer_sync
    # Frozen tokenizers are never synced, but stay identical where a sync was asked for.
    if not (experiment.model.train_tokenizers or clients_own_head(experiment)):
        return Frozen(identical=rule.mode == "gradients")
    rules = {"none": Separate, "gradients": SumGradients, "weights": AverageWeights}
    return rules[rule.mode](rule.every)


def is_due(sync: Sync, step: int, steps: int) -> bool:
    """Return whether the tokenizers meet after step ``step`` (from 0) of a run of ``steps``."""
    return (step + 1) % sync.every == 0 or step + 1 == steps


def _meetings(steps: int, every: int) -> list[int]:
    return sorted({*range(every - 1, steps, every), steps - 1})
