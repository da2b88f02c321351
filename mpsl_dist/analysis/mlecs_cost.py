"""What ML-ECS will send, from shapes alone: what the runtime then counts.

Plain numbers (samples, modalities, losses) are not counted, here as there: tensors alone are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mpsl_dist.actors.choices import dtype_of
from mpsl_dist.actors.unified import build_device, language_shape
from mpsl_dist.analysis.cost_inputs import Inputs
from mpsl_dist.config import Experiment
from mpsl_dist.models.unified import shared_parameters


def factor_numbers(experiment: Experiment, rank: int) -> int:
    """Return the numbers of LoRA's factors: r (inputs + outputs) of what attention projects."""
    shape = language_shape(experiment, experiment.mlecs.edge_blocks)
    if shape is None:
        return 0
    keys = shape.width * shape.groups // shape.heads
    outputs = (shape.width, keys, keys, shape.width)
    return shape.blocks * sum(rank * (shape.width + out) for out in outputs)


def round_bytes(
    experiment: Experiment, inputs: Inputs, number: int, modalities: Sequence[str]
) -> dict[str, int]:
    """Return the bytes of a device and round, by kind of traffic.

    Parameters
    ----------
    number : int
        Of the device.
    modalities : sequence of str
        Those that it has.
    """
    rules, each = experiment.mlecs, dtype_of(experiment).itemsize
    public = round(experiment.data.public_fraction * inputs.train)
    down = up = shared_numbers(experiment, inputs, number, modalities) * each
    if rules.exchange in ("all", "proxy"):
        # The server tells everybody all: it does not know who has what.
        down = shared_numbers(experiment, inputs, number, list(inputs.shapes)) * each
    table = public * rules.fused * each if rules.contrast else 0
    found = {"fused_down": table, "lora_down": down, "lora_up": up}
    return {kind: size for kind, size in found.items() if size}


def shared_numbers(
    experiment: Experiment, inputs: Inputs, number: int, modalities: Sequence[str]
) -> int:
    """Return how many numbers of a device's model travel."""
    rules = experiment.mlecs
    if rules.exchange == "none":
        return 0
    if rules.exchange in ("all", "proxy"):
        with torch.device("meta"):
            model = build_device(replace(experiment, device="meta"), inputs.splits(), modalities)
        return sum(p.numel() for p in shared_parameters(model, rules.exchange).values())
    rank = rules.ranks[number] if rules.ranks else rules.rank
    shape = language_shape(experiment, rules.edge_blocks)
    head = 0
    if rules.answer == "head":
        head = ((rules.width if shape is None else shape.width) + 1) * inputs.classes
    return factor_numbers(experiment, rank) + head
