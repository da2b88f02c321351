"""How many bytes a run will send, from shapes and the epoch's plan: what the runtime then counts.

Kinds are those of :mod:`mpsl_dist.records.traffic`; tensors' payload only, as there.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mpsl_dist.actors.choices import wire_of
from mpsl_dist.actors.cut_cache import Aging, limit_of
from mpsl_dist.analysis import flops, gapped_traffic, unimodal
from mpsl_dist.analysis.flops import ModelParts
from mpsl_dist.analysis.gapped_traffic import Gaps
from mpsl_dist.config import Experiment
from mpsl_dist.config.methods import facts_of
from mpsl_dist.data.partition import mini_batches, shares
from mpsl_dist.methods.fedavg import draw
from mpsl_dist.methods.masked import sum_bytes
from mpsl_dist.methods.objective import objective_of
from mpsl_dist.methods.sync import sync_of
from mpsl_dist.records.traffic import KINDS

#: Bytes by kind and client.
Bytes = dict[str, NDArray[np.int64]]


def direction(kind: str) -> str:
    """Return the direction of a kind of traffic: ``up`` (client to server) or ``down``; what a
    comma separates from the kind says when.
    """
    return KINDS[kind.partition(",")[0]][0]


def equal_plan(experiment: Experiment, samples: int) -> NDArray[np.int64]:
    """Return an epoch's plan, (steps, clients), as if all clients held equally many samples.

    What a client sends on average does not depend on who holds what, but for the losses' 4 bytes
    a step.
    """
    each, more = divmod(samples, experiment.clients)
    sizes = [each + (client < more) for client in range(experiment.clients)]
    return shares(sizes, experiment.training.batch_size, experiment.client_share)


def per_sample(parts: ModelParts) -> dict[str, int]:
    """Return the bytes that one sample causes in a step of split learning, by kind."""
    number, wire, tokens = parts.bytes_per_number, wire_of(parts.experiment), tokens_of(parts)
    back = sum(tokens[name] for name, trained in trained_tokens(parts).items() if trained)
    returned = parts.server_model.head(flops.features(parts))  # features, where clients own heads
    predicted = returned.numel() * number
    found = {
        "activations": sum(tokens.values()) * wire.activations.token_bytes(parts.width, number),
        "cut_layer_gradients": back * wire.gradients.token_bytes(parts.width, number),
    }
    if not objective_of(parts.experiment, parts.task).predictions_travel:
        return found | {"pairs": torch.long.itemsize}
    answered = predicted if returned.requires_grad else 0
    return found | {"predictions": predicted, "prediction_gradients": answered}


def tokens_of(parts: ModelParts) -> dict[str, int]:
    """Return how many tokens of every modality a sample has, those of all its captions."""
    lengths = zip(parts.inputs.shapes, parts.tokenizers.lengths, strict=True)
    return {name: length * parts.inputs.times(name) for name, length in lengths}


def trained_tokens(parts: ModelParts) -> dict[str, bool]:
    """Return of every modality whether a gradient comes back for its tokens."""
    own = {name: flops.embed(parts, name, 1).requires_grad for name in parts.inputs.shapes}
    if parts.server_model.fusion == "early":
        return dict.fromkeys(own, any(own.values()))
    return own


def carriers(parts: ModelParts) -> int:
    """Return the bytes of a client's step that its gradients need to find their way back."""
    if wire_of(parts.experiment).plain:
        return 0
    trained = list(trained_tokens(parts).values())
    return int(any(trained)) if parts.server_model.fusion == "early" else sum(trained)


def training(
    parts: ModelParts, plan: NDArray[np.int64], epochs: int, gaps: Gaps | None = None
) -> Bytes:
    """Return the bytes of ``epochs`` epochs of training.

    Parameters
    ----------
    plan : array
        (steps, clients) samples of every client in every step of an epoch.
    gaps : Gaps, optional
        Which samples have which modality; by default all have all.
    """
    experiment, facts = parts.experiment, facts_of(parts.experiment)
    if facts.one_process or facts.alone:
        return {}
    if not facts.split:
        return _rounds(parts, plan.shape[1], epochs, gaps)
    if facts.unimodal:
        return unimodal.training(parts, plan, epochs)
    samples, steps = plan.sum(0) * epochs, (plan > 0).sum(0) * epochs
    found = {kind: samples * each for kind, each in per_sample(parts).items()}
    if experiment.wire.cache:
        # Kept as decoded, whatever they travelled as; there is no gradient to carry.
        kept = sum(tokens_of(parts).values()) * parts.width * parts.bytes_per_number
        sent = sent_samples(experiment, plan, epochs, kept)
        found["activations"] = sent * per_sample(parts)["activations"]
    elif gaps is not None:
        found |= gapped_traffic.of_training(parts, plan, epochs, gaps)
    else:
        found["activations"] = found["activations"] + steps * carriers(parts)
    number = parts.bytes_per_number
    if objective_of(experiment, parts.task).predictions_travel:
        found |= {"losses": steps * number, "loss_gradients": steps * number}
    weights = trained_bytes(parts, "client") if gaps is None else gaps.weights(parts)
    return found | sync_of(experiment).cost(np.tile(plan > 0, (epochs, 1)), weights)


def per_epoch(parts: ModelParts) -> dict[str, float]:
    """Return the bytes of a client and epoch by kind: the mean over all clients, with
    ``wire.cache`` over all epochs too, as the first sends most, and under m2fedsa.
    """
    changes = parts.experiment.wire.cache or facts_of(parts.experiment).unimodal
    epochs = parts.experiment.training.epochs if changes else 1
    plan = equal_plan(parts.experiment, parts.inputs.train)
    if facts_of(parts.experiment).unimodal:
        plan = unimodal.equal_plan(parts)
    shapes = list(parts.inputs.shapes)
    gaps = gapped_traffic.expected(parts.experiment, shapes, parts.inputs.train)
    sent = training(parts, plan, epochs, gaps)
    return {kind: float(by_client.mean()) / epochs for kind, by_client in sent.items()}


def sent_samples(
    experiment: Experiment, plan: NDArray[np.int64], epochs: int, each: int
) -> NDArray[np.int64]:
    """Return how many samples every client sends where the server keeps them, ``each`` of so many
    bytes; in the order that the run will have, so that what a limit drops is dropped here too.
    """
    sizes, limit = plan.sum(0), limit_of(experiment)
    if limit is None or limit >= sizes.sum() * each:
        return sizes
    kept, sent = Aging[bool](limit), np.zeros_like(sizes)
    for epoch in range(epochs):
        parts = [
            mini_batches(int(size), plan[:, n], experiment.seed, n, epoch)
            for n, size in enumerate(sizes)
        ]
        for step in range(len(plan)):
            wanted = {n: own.get(step, []) for n, own in enumerate(parts)}
            # All are looked for before any arrives.
            lacking = {n: [p for p in own if not kept.get(n, p)] for n, own in wanted.items()}
            for n, positions in lacking.items():
                sent[n] += len(positions)
                for position in positions:
                    kept.put(n, position, True, each)
    return sent


def _rounds(parts: ModelParts, clients: int, rounds: int, gaps: Gaps | None) -> Bytes:
    experiment = parts.experiment
    times = np.zeros(clients, dtype=np.int64)
    for round_ in range(rounds):
        times[draw(clients, experiment.federated.fraction, experiment.seed, round_)] += 1
    trains = _model_bytes(parts, gaps) if gaps is None else gaps.weights(parts, True, tests=False)
    return {"model_down": times * _model_bytes(parts, gaps), "model_up": times * trains}


def _model_bytes(parts: ModelParts, gaps: Gaps | None) -> int | NDArray[np.int64]:
    """Return the bytes of the trained model, by client where they have not all the same."""
    if gaps is not None:
        return gaps.weights(parts, whole=True)
    return trained_bytes(parts, "client") + trained_bytes(parts, "server")


def trained_bytes(parts: ModelParts, owner: str) -> int:
    """Return the bytes of the trained parameters of an owner, ``client`` or ``server``."""
    module = parts.tokenizers if owner == "client" else parts.server_model
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trained * parts.bytes_per_number


def testing(parts: ModelParts, held: NDArray[np.int64], gaps: Gaps | None = None) -> Bytes:
    """Return the bytes of one test.

    Parameters
    ----------
    held : array
        (clients,) test samples that each client holds; all zero where the server holds them.
    gaps : Gaps, optional
        As of :func:`training`.
    """
    experiment, clients, facts = parts.experiment, len(held), facts_of(parts.experiment)
    if facts.one_process or facts.alone:
        return {}
    if not facts.split:
        sent = (held > 0) * _model_bytes(parts, gaps)
        return {"test_weights_down": sent} if held.any() else {}
    if facts.unimodal:
        return unimodal.testing(parts, held)
    weights = trained_bytes(parts, "client") if gaps is None else gaps.weights(parts)
    found = _averaging(parts, clients, experiment.training.evaluate_own, gaps)
    if held.any():
        each, passes = per_sample(parts), 1 + experiment.training.evaluate_own
        found["test_weights_down"] = (held > 0) * weights
        sent = held * each["activations"] if gaps is None else gapped_traffic.of_test(parts, gaps)
        found["test_activations"] = sent * passes
        found["test_predictions"] = held * each["predictions"] * passes
    return found


def exporting(parts: ModelParts, clients: int, gaps: Gaps | None = None) -> Bytes:
    """Return the bytes that bring the last tokenizers together for the model to deploy."""
    facts = facts_of(parts.experiment)
    if facts.one_process or not facts.split:
        return {}
    if facts.unimodal:
        return unimodal.averaging(parts, clients)
    return _averaging(parts, clients, gaps=gaps)


def _averaging(
    parts: ModelParts, clients: int, one_by_one: bool = False, gaps: Gaps | None = None
) -> Bytes:
    """Return the bytes that fetch the tokenizers' average, or with it those of every client."""
    weights, masked = trained_bytes(parts, "client"), parts.experiment.tokenizer_sync.masked
    if gaps is not None:
        few = sync_of(parts.experiment).identical and not one_by_one
        return {"test_weights_up": gaps.weights(parts) * (gaps.speakers(parts) if few else 1)}
    if sync_of(parts.experiment).identical and (masked or not one_by_one):
        return {"test_weights_up": np.eye(clients, dtype=np.int64)[0] * weights}
    everyone = np.ones(clients, dtype=np.int64)
    if not masked:
        return {"test_weights_up": everyone * weights}
    return sum_bytes(everyone > 0, weights // parts.bytes_per_number, "test_weights_up")
