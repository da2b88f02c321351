"""How many bytes a run will send, from shapes and the epoch's plan: what the runtime then counts.

Kinds are those of :mod:`mpsl_dist.records.traffic`; tensors' payload only, as there.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mpsl_dist.analysis import flops
from mpsl_dist.analysis.flops import Parts
from mpsl_dist.config import Experiment
from mpsl_dist.data.partition import shares
from mpsl_dist.methods.fedavg import draw
from mpsl_dist.records.traffic import KINDS

#: Bytes by kind and client.
Bytes = dict[str, NDArray[np.int64]]


def direction(kind: str) -> str:
    """Give "up" (client to server) or "down"."""
    return KINDS[kind][0]


def equal_plan(experiment: Experiment, samples: int) -> NDArray[np.int64]:
    """Plan an epoch, (steps, clients), as if all clients held equally many of the samples.

    What a client sends on average does not depend on who holds what, but for the losses' 4 bytes
    a step.
    """
    each, more = divmod(samples, experiment.clients)
    sizes = [each + (client < more) for client in range(experiment.clients)]
    return shares(sizes, experiment.training.batch_size, experiment.client_share)


def per_sample(parts: Parts, captions: int = 1) -> dict[str, int]:
    """Give the bytes that one sample causes in a step of split learning, by kind.

    Parameters
    ----------
    captions : int
        Texts of a sample: 1 as this runtime has it, 5 for a picture of the paper's retrieval.
    """
    number, classes = parts.bytes_per_number, parts.inputs.classes
    lengths = dict(zip(parts.inputs.shapes, parts.tokenizers.lengths, strict=True))
    counts = {
        name: length * (captions if name == "text" else 1) * parts.width * number
        for name, length in lengths.items()
    }
    trained = trained_tokens(parts)
    # In retrieval the embeddings of picture and caption are what is predicted.
    predicted = (2 * parts.width if parts.retrieval else classes) * number
    found = {
        "activations": sum(counts.values()),
        "cut_layer_gradients": sum(counts[name] for name in counts if trained[name]),
    }
    if parts.experiment.contrastive == "global":
        return found | {"pairs": torch.long.itemsize}
    return found | {"predictions": predicted, "prediction_gradients": predicted}


def trained_tokens(parts: Parts) -> dict[str, bool]:
    """Say of every modality whether a gradient comes back for its tokens."""
    own = {name: flops.embed(parts, name, 1).requires_grad for name in parts.inputs.shapes}
    if parts.experiment.model.fusion == "early" and not parts.retrieval:
        return dict.fromkeys(own, any(own.values()))
    return own


def training(parts: Parts, plan: NDArray[np.int64], epochs: int) -> Bytes:
    """Give the bytes of ``epochs`` epochs of training.

    Parameters
    ----------
    plan : array
        (steps, clients) samples of every client in every step of an epoch.
    """
    experiment = parts.experiment
    if experiment.method == "centralized":
        return {}
    if experiment.method in ("fedavg", "fedclip"):
        return _rounds(parts, plan.shape[1], epochs)
    samples, steps = plan.sum(0) * epochs, (plan > 0).sum(0) * epochs
    found = {kind: samples * each for kind, each in per_sample(parts).items()}
    number = parts.bytes_per_number
    if experiment.contrastive == "client":
        found |= {"losses": steps * number, "loss_gradients": steps * number}
    return found | _sync(parts, np.tile(plan > 0, (epochs, 1)))


def _sync(parts: Parts, takes_part: NDArray[np.bool_]) -> Bytes:
    """Give what bringing the tokenizers together costs; ``takes_part`` is (steps, clients)."""
    rule, weights = parts.experiment.tokenizer_sync, trained_bytes(parts, "client")
    steps, clients = takes_part.shape
    if rule.mode == "none" or not weights:
        return {}
    due = sorted({*range(rule.every - 1, steps, rule.every), steps - 1})
    up = np.full(clients, len(due), dtype=np.int64)
    if rule.mode == "gradients":
        # A client that took part in no step since the last time has nothing to send.
        up = sum(part.any(0) for part in np.split(takes_part, [d + 1 for d in due[:-1]])) * 1
    return {"sync_up": up * weights, "sync_down": np.full(clients, len(due) * weights)}


def _rounds(parts: Parts, clients: int, rounds: int) -> Bytes:
    experiment = parts.experiment
    times = np.zeros(clients, dtype=np.int64)
    for round_ in range(rounds):
        times[draw(clients, experiment.federated.fraction, experiment.seed, round_)] += 1
    weights = trained_bytes(parts, "client") + trained_bytes(parts, "server")
    return {"model_down": times * weights, "model_up": times * weights}


def trained_bytes(parts: Parts, owner: str) -> int:
    """Give the bytes of an owner's trained parameters."""
    module = parts.tokenizers if owner == "client" else parts.server_model
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trained * parts.bytes_per_number


def testing(parts: Parts, held: NDArray[np.int64]) -> Bytes:
    """Give the bytes of one test.

    Parameters
    ----------
    held : array
        (clients,) test samples that each client holds; all zero where the server holds them.
    """
    experiment, clients = parts.experiment, len(held)
    if experiment.method == "centralized":
        return {}
    if experiment.method in ("fedavg", "fedclip"):
        weights = trained_bytes(parts, "client") + trained_bytes(parts, "server")
        return {"test_weights_down": (held > 0) * weights} if held.any() else {}
    weights = trained_bytes(parts, "client")
    everyone = experiment.training.evaluate_own or experiment.tokenizer_sync.mode != "gradients"
    asked = np.ones(clients, dtype=np.int64) if everyone else np.eye(clients, dtype=np.int64)[0]
    found = {"test_weights_up": asked * weights}
    if held.any():
        each, passes = per_sample(parts), 1 + experiment.training.evaluate_own
        found["test_weights_down"] = (held > 0) * weights
        found["test_activations"] = held * each["activations"] * passes
        found["test_predictions"] = held * each["predictions"] * passes
    return found


def exporting(parts: Parts, clients: int) -> Bytes:
    """Give the bytes that bring the last tokenizers together for the model to deploy."""
    if parts.experiment.method not in ("mpsl", "psl"):
        return {}
    one_for_all = parts.experiment.tokenizer_sync.mode == "gradients"
    asked = np.eye(clients, dtype=np.int64)[0] if one_for_all else np.ones(clients, dtype=np.int64)
    return {"test_weights_up": asked * trained_bytes(parts, "client")}
