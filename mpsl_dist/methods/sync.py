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

from mpsl_dist.actors.choices import clients_own_head, dtype_of
from mpsl_dist.config import Experiment
from mpsl_dist.methods.link import Wait
from mpsl_dist.methods.masked import sum_bytes
from mpsl_dist.methods.progress import warn
from mpsl_dist.methods.split_link import SplitLink, Step

#: Bytes by kind and client.
Bytes = dict[str, NDArray[np.int64]]
#: Bytes of a client's trained tokenizers; by client where they are not the same.
Weights = int | NDArray[np.int64]


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

    def cost(self, takes_part: NDArray[np.bool_], weights: Weights) -> Bytes:
        """Return the bytes of a run, by kind and client.

        Parameters
        ----------
        takes_part : array
            (steps, clients) bool: who contributes to which step of the run.
        weights : int or array
            Bytes of one client's trained tokenizers, (clients,) where they are not the same.
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

    def cost(self, takes_part: NDArray[np.bool_], weights: Weights) -> Bytes:
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
        vectors = {n: vector for n, vector in answers.items() if vector is not None}
        if vectors:  # none where everybody who took part is lost
            link.step_on_sum(step, link.keys.sum(vectors), f"step {step}")

    def cost(self, takes_part: NDArray[np.bool_], weights: Weights) -> Bytes:
        """Return a vector up from whoever took part since the last time, one down to everybody."""
        steps, clients = takes_part.shape
        meetings = _meetings(steps, self.every)
        parts = np.split(takes_part, [m + 1 for m in meetings[:-1]])
        up = np.sum([part.any(0) for part in parts], axis=0, dtype=np.int64)
        return {"sync_up": up * weights, "sync_down": np.full(clients, len(meetings) * weights)}


@dataclass(frozen=True)
class SumMasked(SumGradients):
    """As :class:`SumGradients`, in sums of which the server learns nothing but the sum.

    Where fewer than three clients have kept a gradient, it is put off until the next time.

    Attributes
    ----------
    number_bytes : int
        Bytes of a parameter.
    """

    number_bytes: int = 4

    def begin(self, step: Step, due: bool) -> Wait:
        """Have the clients keep their gradients."""
        return step.accumulate()

    def collect(self, link: SplitLink, where: str) -> dict[int, Any]:
        """Return nothing: what is kept is fetched by the sum."""
        return {}

    def meet(
        self, link: SplitLink, answers: Mapping[int, Any], step: int, sizes: Mapping[int, int]
    ) -> None:
        """Have every client step on the sum, which stands for what each has kept."""
        total = link.sum_gradients(f"step {step}")
        if total is not None:
            link.step_on_sum(step, total, f"step {step}")
        else:
            warn(f"step {step}: fewer than three clients have gradients; kept for the next sum")

    def cost(self, takes_part: NDArray[np.bool_], weights: Weights) -> Bytes:
        """Return a masked vector and keys for whoever has kept gradients, one down to everybody."""
        steps, clients = takes_part.shape
        found = {"sync_down": np.zeros(clients, dtype=np.int64)}
        kept = np.zeros(clients, dtype=bool)
        meetings = _meetings(steps, self.every)
        for part in np.split(takes_part, [m + 1 for m in meetings[:-1]]):
            kept |= part.any(0)
            sent = sum_bytes(kept, weights // self.number_bytes, "sync_up")
            if sent["sync_up"].any():
                found["sync_down"] = found["sync_down"] + weights
                kept = np.zeros_like(kept)
            found |= {kind: found.get(kind, 0) + each for kind, each in sent.items()}
        return found


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

    def cost(self, takes_part: NDArray[np.bool_], weights: Weights) -> Bytes:
        """Return the weights up from and down to everybody."""
        steps, clients = takes_part.shape
        each = np.full(clients, len(_meetings(steps, self.every)) * weights)
        return {"sync_up": each, "sync_down": each}


@dataclass(frozen=True)
class AverageMasked(AverageWeights):
    """As :class:`AverageWeights`; what the masks cost is all that differs."""

    number_bytes: int = 4

    def cost(self, takes_part: NDArray[np.bool_], weights: Weights) -> Bytes:
        """Return masked weights and keys up and down, the average down to everybody."""
        steps, clients = takes_part.shape
        times = len(_meetings(steps, self.every))
        everyone = np.ones(clients, dtype=bool)
        once = sum_bytes(everyone, weights // self.number_bytes, "sync_up")
        return {k: x * times for k, x in once.items()} | {"sync_down": everyone * times * weights}


def sync_of(experiment: Experiment) -> Sync:
    """Return the experiment's rule."""
    rule = experiment.tokenizer_sync
    # Frozen tokenizers are never synced, but stay identical where a sync was asked for.
    if not (experiment.model.train_tokenizers or clients_own_head(experiment)):
        return Frozen(identical=rule.mode == "gradients")
    if rule.masked and rule.mode != "none":
        masked = {"gradients": SumMasked, "weights": AverageMasked}
        return masked[rule.mode](rule.every, number_bytes=dtype_of(experiment).itemsize)
    rules = {"none": Separate, "gradients": SumGradients, "weights": AverageWeights}
    return rules[rule.mode](rule.every)


def is_due(sync: Sync, step: int, steps: int) -> bool:
    """Return whether the tokenizers meet after step ``step`` (from 0) of a run of ``steps``."""
    return (step + 1) % sync.every == 0 or step + 1 == steps


def _meetings(steps: int, every: int) -> list[int]:
    return sorted({*range(every - 1, steps, every), steps - 1})
