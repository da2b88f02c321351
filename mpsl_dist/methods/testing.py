"""Tests of split learning between its epochs; the clients' own tokenizers stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.actors.server import Server
from mpsl_dist.config import Experiment
from mpsl_dist.data import Splits
from mpsl_dist.methods.link import SplitLink
from mpsl_dist.methods.sync import Sync
from mpsl_dist.models.average import average, load_trainable
from mpsl_dist.models.tasks import Task
from mpsl_dist.models.tokenizers import Tokenizers


class SplitMethod(Protocol):
    """What is tested: clients with tokenizers, a server with the rest.

    ``tokenizers`` is the server's own copy; ``sizes`` and ``test_sizes`` are samples by client.
    """

    experiment: Experiment
    splits: Splits
    server: Server
    clients: SplitLink
    tokenizers: Tokenizers
    task: Task
    sync: Sync
    sizes: dict[int, int]
    test_sizes: dict[int, int]


def evaluate(method: SplitMethod) -> dict[str, float]:
    """Test with the averaged tokenizers and, if asked for, every client's own.

    Returns
    -------
    dict of str to float
        As of :meth:`mpsl_dist.methods.mpsl.Mpsl.evaluate`.
    """
    own = method.experiment.training.evaluate_own
    weights = _fetch(method, everyone=own)
    mean = _mean(method, weights)
    if method.experiment.data.test_at == "server":
        results = _at_server(method, mean)
        alone = [_at_server(method, weights[n]) for n in weights] if own else []
    else:
        results = {"accuracy": _overall(_at_clients(method, mean))}
        each = _at_clients(method, None).values() if own else ()
        alone = [{"accuracy": right / samples} for right, samples in each]
    return results | _spread(alone)


def _spread(alone: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return mean, minimum and maximum over the clients' own results."""
    found = {}
    for name in alone[0] if alone else ():
        values = [one[name] for one in alone]
        found[f"{name}_own_mean"] = sum(values) / len(values)
        found[f"{name}_own_min"], found[f"{name}_own_max"] = min(values), max(values)
    return found


def fetch_average(method: SplitMethod) -> None:
    """Load the average of the clients' tokenizers into the server's copy."""
    load_trainable(method.tokenizers, _mean(method, _fetch(method)))


def _fetch(method: SplitMethod, everyone: bool = False) -> dict[int, dict[str, Tensor]]:
    """Fetch the tokenizers; one client speaks for all where they are kept identical."""
    same = method.sync.identical and not everyone
    found: dict[int, dict[str, Tensor]] = {}
    while not found:  # again where the one that was asked was lost; too few left end the run
        asked = method.clients.present[: 1 if same else None]
        found = method.clients.tokenizer_weights(asked, "evaluation", "test_weights_up")
    return found


def _mean(method: SplitMethod, weights: Mapping[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    return average(list(weights.values()), [method.sizes[n] for n in weights])


def _at_server(method: SplitMethod, weights: Mapping[str, Tensor]) -> dict[str, float]:
    load_trainable(method.tokenizers, weights)
    model = Deployable(method.tokenizers, method.server.model, method.task)
    return model.test(method.splits.test, method.experiment.training.test_batch_size)


def _at_clients(
    method: SplitMethod, weights: Mapping[str, Tensor] | None
) -> dict[int, tuple[int, int]]:
    """Return (right predictions, samples) of every client that holds test samples."""
    each = max(1, method.experiment.training.test_batch_size // len(method.sizes))
    counts = {
        n: [min(each, size - start) for start in range(0, size, each)]
        for n, size in method.test_sizes.items()
        if size and n in method.clients.present
    }
    method.clients.begin_test(weights, counts)
    right = dict.fromkeys(counts, 0)
    for batch in range(max(len(c) for c in counts.values())):
        asked = [n for n in method.clients.present if batch < len(counts.get(n, ()))]
        smashed = method.clients.tokenize_test(batch, asked)
        with torch.no_grad():
            predictions = method.server.forward(smashed)
        for n, count in method.clients.score(batch, predictions).items():
            right[n] += count
    tested = [n for n in counts if n in method.clients.present]
    return {n: (right[n], method.test_sizes[n]) for n in tested}


def _overall(scores: Mapping[int, tuple[int, int]]) -> float:
    return sum(right for right, _ in scores.values()) / sum(n for _, n in scores.values())
