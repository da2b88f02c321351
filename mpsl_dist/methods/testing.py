"""Tests of split learning between its epochs; the clients' own tokenizers stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mpsl_dist.actors.choices import wire_of
from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.actors.local_data import TestData, batch_sizes
from mpsl_dist.actors.server import Server
from mpsl_dist.config import Experiment
from mpsl_dist.methods.split_link import SplitLink
from mpsl_dist.methods.sync import Sync
from mpsl_dist.models.average import average, load_trainable
from mpsl_dist.models.tasks import Task
from mpsl_dist.models.tokenizers import Tokenizers

#: Right predictions, and samples.
Score = tuple[int, int]


class SplitMethod(Protocol):
    """What is tested: clients with tokenizers, a server with the rest.

    ``tokenizers`` is the server's own copy; ``sizes`` and ``test_sizes`` are samples by client;
    ``tests`` are read where the server holds them.
    """

    experiment: Experiment
    tests: TestData
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
    one_by_one = own and method.clients.masks is None
    weights = _everyones(method) if one_by_one else {}
    sizes = [method.sizes[n] for n in weights]
    taught = [method.clients.keys.taught(n, own) for n, own in weights.items()]
    mean = average(taught, sizes) if one_by_one else _mean(method)
    if method.experiment.data.test_at == "clients":
        scores, *alone = at_clients(method, mean, own)
        each = [_accuracy(score) for scores_own in alone for score in scores_own.values()]
        return {"accuracy": overall(scores.values())} | _spread(each)
    results, *alone = _at_server(method, [mean, *(weights.values() if own else ())])
    return results | _spread(alone)


def _spread(each: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return mean, minimum and maximum over the clients' own results."""
    alone, found = [*each], {}
    for name in alone[0] if alone else ():
        values = [one[name] for one in alone]
        found[f"{name}_own_mean"] = sum(values) / len(values)
        found[f"{name}_own_min"], found[f"{name}_own_max"] = min(values), max(values)
    return found


def fetch_average(method: SplitMethod) -> None:
    """Load the average of the clients' tokenizers into the server's copy."""
    load_trainable(method.tokenizers, _mean(method), some=True)


def _everyones(method: SplitMethod) -> dict[int, dict[str, Tensor]]:
    link = method.clients
    return link.tokenizer_weights(link.present, link.in_test, "test_weights_up")


def _mean(method: SplitMethod) -> dict[str, Tensor]:
    """Fetch the average; few clients speak for all where they are kept identical."""
    link, mean = method.clients, None
    while mean is None:  # again where one that was asked was lost; too few left end the run
        if method.sync.identical:
            asked = link.keys.speakers(link.present)
            told = link.tokenizer_weights(asked, link.in_test, "test_weights_up")
            merged = {name: x for n in reversed(asked) for name, x in told.get(n, {}).items()}
            mean = merged if len(told) == len(asked) else None
        else:
            asked = link.present
            mean = link.mean_tokenizers(asked, method.sizes, link.in_test, "test_weights_up")
    return mean


def _at_server(
    method: SplitMethod, candidates: Sequence[Mapping[str, Tensor]]
) -> list[dict[str, float]]:
    """Return the metrics with each of these tokenizers; a batch is read once for all of them."""
    wire = wire_of(method.experiment)
    model = Deployable(method.tokenizers, method.server.model, method.task, wire)
    size = method.experiment.training.test_batch_size
    if not method.task.scored_apart:
        results = []
        for weights in candidates:
            load_trainable(method.tokenizers, weights, some=True)
            results.append(model.test(method.tests, size))
        return results
    scores = [(0, 0)] * len(candidates)
    for batch in filter(len, method.tests.batches(size)):
        for place, weights in enumerate(candidates):
            load_trainable(method.tokenizers, weights, some=True)
            scores[place] = _add(scores[place], model.score(batch), len(batch))
    return [_accuracy(score) for score in scores]


def read_at_clients(method: SplitMethod) -> Iterator[int]:
    """Have the clients read their test samples, and yield how many can be read, batch by batch."""
    counts = _counts(method)
    method.clients.begin_test(None, counts)
    for batch, asked in _asked(method, counts):
        yield sum(method.clients.read_test(batch, asked).values())


def at_clients(
    method: SplitMethod, mean: Mapping[str, Tensor] | None, own: bool
) -> list[dict[int, Score]]:
    """Return the scores by client with the average and, if asked for, then with everyone's own.

    Without an average (None) the first are those with everyone's own.
    A batch is read once for both. Only clients of which a sample could be read are in it.
    """
    counts = _counts(method)
    method.clients.begin_test(mean, counts)
    scores = [dict.fromkeys(counts, (0, 0)) for _ in range(1 + own)]
    for batch, asked in _asked(method, counts):
        for alone, found in enumerate(scores):
            smashed = method.clients.tokenize_test(batch, asked, own=bool(alone))
            with torch.no_grad():
                predictions = method.server.forward(smashed, from_cut=True)
            for n, right in method.clients.score(batch, predictions, own=bool(alone)).items():
                found[n] = _add(found[n], right, len(predictions[n]))
    there = [n for n in counts if n in method.clients.present]
    return [{n: found[n] for n in there if found[n][1]} for found in scores]


def _counts(method: SplitMethod) -> dict[int, list[int]]:
    """Return client -> the sizes of its test batches, of all clients that hold test samples."""
    each = max(1, method.experiment.training.test_batch_size // len(method.sizes))
    held = {n: size for n, size in method.test_sizes.items() if n in method.clients.present}
    return {n: batch_sizes(size, each) for n, size in held.items() if size}


def _asked(
    method: SplitMethod, counts: Mapping[int, Sequence[int]]
) -> Iterator[tuple[int, list[int]]]:
    """Yield every batch's number with the clients that are there and have one."""
    for batch in range(max(map(len, counts.values()), default=0)):
        yield batch, [n for n in method.clients.present if batch < len(counts.get(n, ()))]


def _add(score: Score, right: int, samples: int) -> Score:
    return score[0] + right, score[1] + samples


def overall(scores: Iterable[Score]) -> float:
    """Return the accuracy over all samples of some scores."""
    rights, samples = zip(*scores, strict=True)
    return sum(rights) / sum(samples)


def _accuracy(score: Score) -> dict[str, float]:
    return {"accuracy": score[0] / score[1]}
