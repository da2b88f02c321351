"""What ML-ECS will send, from shapes alone: what the runtime then counts.

Plain numbers (samples, modalities, losses) are not counted, here as there: tensors alone are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from mpsl_dist.actors.choices import dtype_of
from mpsl_dist.actors.unified import build_device, build_large, language_shape
from mpsl_dist.analysis.cost_inputs import Inputs
from mpsl_dist.config import Experiment
from mpsl_dist.models.unified import shared_parameters


def factor_numbers(experiment: Experiment, rank: int, blocks: int | None = None) -> int:
    """Return the numbers of LoRA's factors: r (inputs + outputs) of what attention projects.

    Parameters
    ----------
    blocks : int, optional
        By default the devices'.
    """
    shape = language_shape(experiment, blocks or experiment.mlecs.edge_blocks)
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
    down = up = shared_numbers(experiment, inputs, number, modalities) * each
    if rules.exchange in ("all", "proxy"):
        # The server tells everybody all: it does not know who has what.
        down = shared_numbers(experiment, inputs, number, list(inputs.shapes)) * each
    found = {"fused_down": table_bytes(experiment, inputs), "lora_down": down, "lora_up": up}
    return {kind: size for kind, size in found.items() if size}


def table_bytes(experiment: Experiment, inputs: Inputs) -> int:
    """Return the bytes of the server's fused table; 0 where no device uses one."""
    rules = experiment.mlecs
    if not (rules.contrast and rules.public_steps):
        return 0
    public = round(experiment.data.public_fraction * inputs.train)
    return public * rules.fused * dtype_of(experiment).itemsize


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
    return factor_numbers(experiment, rank) + _head(experiment, inputs)


def _head(experiment: Experiment, inputs: Inputs) -> int:
    if experiment.mlecs.answer != "head":
        return 0
    return (_width(experiment) + 1) * inputs.classes


def _width(experiment: Experiment) -> int:
    shape = language_shape(experiment, 1)
    return experiment.mlecs.width if shape is None else shape.width


def trained_numbers(experiment: Experiment, inputs: Inputs) -> dict[tuple[str, str], int]:
    """Return (owner, part) -> the numbers trained, of a device of all modalities and full rank.

    Language models are counted by their shapes, the rest is built without its numbers.
    """
    rules = experiment.mlecs
    plain = replace(
        rules, language="none", answer="head", width=_width(experiment), exchange="lora"
    )
    chosen, splits = replace(experiment, device="meta", mlecs=plain), inputs.splits()
    with torch.device("meta"):
        built = {
            "client": build_device(chosen, splits, list(inputs.shapes)),
            "server": build_large(chosen, splits),
        }

    def language(blocks: int) -> int:
        return factor_numbers(experiment, rules.rank, blocks) + _head(experiment, inputs)

    found = {}
    for owner, blocks in (("client", rules.edge_blocks), ("server", rules.server_blocks)):
        tokenizers, contrast = built[owner].tokenizers, built[owner].contrast
        connector = _trained(tokenizers.connector)
        found[owner, "encoders"] = _trained(tokenizers) - connector
        found[owner, "connector"] = connector + _trained(contrast)
        found[owner, "language model"] = language(blocks)
    # What learns from the server's large model reads through a generator of its own.
    generator, proxy = _trained(built["server"].generator), rules.exchange == "proxy"
    small = generator + language(rules.proxy_blocks if proxy else rules.edge_blocks)
    if rules.transfer:
        found["server", "proxy" if proxy else "small language model"] = small
    return found | ({("client", "proxy"): small} if proxy else {})


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
