"""What M²FedSA sends and computes, from shapes and the epoch's plan.

Shape legend: ``m`` modalities, ``d`` width of a feature, ``k`` classes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsl_dist.actors.holdings import plan_of
from mpsl_dist.analysis import flops
from mpsl_dist.analysis.flops import Flops, ModelParts
from mpsl_dist.config import Experiment
from mpsl_dist.models.tokenizers import modality_of

#: Bytes by kind and client.
Bytes = dict[str, NDArray[np.int64]]


def rounds_before_switch(experiment: Experiment, rounds: int) -> int:
    """Return how many of a run's rounds transfer no knowledge: with ``plateau`` as few as can be,
    as it depends on the training.
    """
    rule = experiment.m2fedsa.switch
    first = {"never": rounds, "round": rule.round, "plateau": rule.window + 1}[rule.rule]
    return min(first, rounds)


def equal_plan(parts: ModelParts) -> NDArray[np.int64]:
    """Return an epoch's plan, (steps, clients), as if all users held equally many samples."""
    experiment, modalities = parts.experiment, len(parts.inputs.shapes)
    users = experiment.clients // modalities
    sizes = [part.size for part in np.array_split(np.empty(parts.inputs.train), users)]
    return plan_of(experiment, parts.inputs.splits(), np.repeat(sizes, modalities).tolist())


def per_sample(parts: ModelParts) -> dict[str, float]:
    """Return the bytes that one sample causes at a client, the mean over the modalities, by kind;
    features and their gradients before and after the switch.
    """
    number, (d, k) = parts.bytes_per_number, _sizes(parts)
    cut = float(_cut_numbers(parts).mean()) * number
    return {
        "activations": cut,
        "cut_layer_gradients": cut,
        "predictions": (d + k) * number,
        "prediction_gradients": (d + k) * number,
        "predictions, after the switch": (2 * d + k) * number,
        "prediction_gradients, after the switch": d * number,
    }


def training(parts: ModelParts, plan: NDArray[np.int64], epochs: int) -> Bytes:
    """Return the bytes of ``epochs`` rounds, as :func:`mpsl_dist.analysis.traffic_model.training`;
    until the switch fused logits and their gradients, then these logits and the fused feature.
    """
    number, (d, k) = parts.bytes_per_number, _sizes(parts)
    before = rounds_before_switch(parts.experiment, epochs)
    after = epochs - before
    samples, steps = plan.sum(0), (plan > 0).sum(0) * epochs
    cut = samples * epochs * _by_client(_cut_numbers(parts), plan.shape[1]) * number
    two_losses = 2 * steps * number
    found = {
        "activations": cut,
        "cut_layer_gradients": cut,
        "predictions": samples * (epochs * (d + k) + after * d) * number,
        "prediction_gradients": samples * (epochs * d + before * k) * number,
        "losses": two_losses,
        "loss_gradients": two_losses,
    }
    if parts.experiment.m2fedsa.within == "never":
        return found
    averaged = epochs * _weights(parts, plan.shape[1])
    return found | {"sync_up": averaged, "sync_down": averaged}


def testing(parts: ModelParts, held: NDArray[np.int64]) -> Bytes:
    """Return the bytes of one test, as :func:`mpsl_dist.analysis.traffic_model.testing`."""
    if not held.any():
        return averaging(parts, len(held))
    number, (d, _) = parts.bytes_per_number, _sizes(parts)
    sent = held * _by_client(_cut_numbers(parts), len(held)) * number
    return {"test_activations": sent, "test_predictions": held * d * number}


def averaging(parts: ModelParts, clients: int) -> Bytes:
    """Return the bytes that fetch the average of every modality's clients."""
    return {"test_weights_up": _weights(parts, clients)}


def count_client(parts: ModelParts) -> dict[str, Flops]:
    """Return the operations per sample of the clients of each modality, classifier included."""
    width, found = _sizes(parts)[0], {}
    for name, half in parts.tokenizers.by_modality.items():
        x, own = flops.meta_inputs(parts, 1)[name], parts.tokenizers.head.by_modality[name]
        feature_1d = _asked(parts, 1, width)
        found[name] = flops.count(half, lambda half=half, x=x: half(x))
        found[name] += flops.count(own, lambda own=own, x=feature_1d: own(x))
    return found


def count_server(parts: ModelParts) -> dict[str, Flops]:
    """Return the server's operations per sample, by modality, and of the fusion."""
    model, width, found = parts.server_model, _sizes(parts)[0], {}
    for name, half in model.encoders.items():
        cut = flops.embed(parts, name, 1).detach().requires_grad_()
        found[name] = flops.count(half, lambda half=half, x=cut: half(x))
    features = [torch.empty(1, width, device="meta", dtype=parts.dtype) for _ in model.encoders]
    found["fusion"] = flops.count(model.fusion, lambda: model.fusion(features)[0])
    return found


def _asked(parts: ModelParts, *shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=parts.dtype, requires_grad=True)


def _sizes(parts: ModelParts) -> tuple[int, int]:
    return parts.width, parts.inputs.classes


def _cut_numbers(parts: ModelParts) -> NDArray[np.int64]:
    """Return the numbers of what crosses the cut of one sample, (m,)."""
    return np.array([flops.embed(parts, name, 1).numel() for name in parts.inputs.shapes])


def _weights(parts: ModelParts, clients: int) -> NDArray[np.int64]:
    """Return the bytes of every client's trained parameters, (clients,)."""
    sums = dict.fromkeys(parts.inputs.shapes, 0)
    for name, p in parts.tokenizers.named_parameters():
        sums[modality_of(name)] += p.numel() if p.requires_grad else 0
    return _by_client(np.array([*sums.values()]), clients) * parts.bytes_per_number


def _by_client(of_modality_m: NDArray[np.int64], clients: int) -> NDArray[np.int64]:
    return np.resize(of_modality_m, clients)
