"""Testing in the middle of training: outside any autograd context, the clients' weights kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.actors.server import Server
from mpsl_dist.config import Experiment
from mpsl_dist.data import Splits
from mpsl_dist.models.average import average, load_trainable
from mpsl_dist.models.tokenizers import Tokenizers
from mpsl_dist.records.traffic import Traffic
from mpsl_dist.runtime import rpc


class Split(Protocol):
    """What split learning has when it is tested: clients with tokenizers, a server with the rest.

    ``tokenizers`` is the server's own copy; ``sizes`` and ``test_sizes`` are samples by client.
    """

    experiment: Experiment
    splits: Splits
    server: Server
    clients: rpc.Fleet
    tokenizers: Tokenizers
    traffic: Traffic
    sizes: dict[int, int]
    test_sizes: dict[int, int]


def evaluate(method: Split) -> dict[str, float]:
    """Test the averaged tokenizers and, if asked for, every client's own."""
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
    """Give mean, minimum and maximum over the clients' own results."""
    found = {}
    for name in alone[0] if alone else ():
        values = [one[name] for one in alone]
        found[f"{name}_own_mean"] = sum(values) / len(values)
        found[f"{name}_own_min"], found[f"{name}_own_max"] = min(values), max(values)
    return found


def fetch_average(method: Split) -> None:
    """Load the average of the clients' tokenizers into the server's copy."""
    load_trainable(method.tokenizers, _mean(method, _fetch(method)))


def _fetch(method: Split, everyone: bool = False) -> dict[int, dict[str, Tensor]]:
    """Fetch the tokenizers; one client speaks for all where they are kept identical."""
    same = method.experiment.tokenizer_sync.mode == "gradients" and not everyone
    asked = list(method.sizes)[: 1 if same else None]
    weights = method.clients.call("tokenizer_weights", {n: () for n in asked}, "evaluation")
    method.traffic.add_all("test_weights_up", weights)
    return weights


def _mean(method: Split, weights: Mapping[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    return average(list(weights.values()), [method.sizes[n] for n in weights])


def _at_server(method: Split, weights: Mapping[str, Tensor]) -> dict[str, float]:
    load_trainable(method.tokenizers, weights)
    model = Deployable(method.tokenizers, method.server.model)
    return model.test(method.splits.test, method.experiment.training.test_batch_size)


def _at_clients(method: Split, weights: Mapping[str, Tensor] | None) -> dict[int, tuple[int, int]]:
    """Give (right, samples) of every client that holds test samples."""
    each = max(1, method.experiment.training.test_batch_size // len(method.sizes))
    counts = {
        n: [min(each, size - start) for start in range(0, size, each)]
        for n, size in method.test_sizes.items()
        if size
    }
    method.clients.call("begin_test", {n: (weights, counts[n]) for n in counts}, "evaluation")
    if weights is not None:
        method.traffic.add_all("test_weights_down", dict.fromkeys(counts, weights))
    right = dict.fromkeys(counts, 0)
    for step in range(max(len(c) for c in counts.values())):
        asked = {n: (step,) for n in counts if step < len(counts[n])}
        smashed = method.clients.call("tokenize_test", asked, "evaluation")
        with torch.no_grad():
            predictions = method.server.forward(smashed)
        scored = method.clients.call(
            "score", {n: (step, predictions[n]) for n in asked}, "evaluation"
        )
        method.traffic.add_all("test_activations", smashed)
        method.traffic.add_all("test_predictions", predictions)
        for n, count in scored.items():
            right[n] += count
    return {n: (right[n], method.test_sizes[n]) for n in counts}


def _overall(scores: Mapping[int, tuple[int, int]]) -> float:
    return sum(right for right, _ in scores.values()) / sum(n for _, n in scores.values())
