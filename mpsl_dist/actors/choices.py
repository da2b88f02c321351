"""What the names in an experiment stand for: device, type, sizes, task and head."""

from __future__ import annotations

from typing import Any

import torch

from mpsl_dist import plugins
from mpsl_dist.config import Experiment
from mpsl_dist.config.methods import facts_of
from mpsl_dist.data import Splits
from mpsl_dist.data.decode.samples import PIXELS
from mpsl_dist.errors import ConfigError
from mpsl_dist.models.codecs import CODECS, Codec, Wire
from mpsl_dist.models.heads import HEADS, HeadFacts
from mpsl_dist.models.language import SMOLLM2
from mpsl_dist.models.server_model import SIZES
from mpsl_dist.models.tasks import TASKS, Task
from mpsl_dist.models.weight_sources import colours_of


def device_of(experiment: Experiment) -> str:
    """Return the torch device; ``auto`` is CUDA where there is one."""
    if experiment.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return experiment.device


def describe(device: str) -> str:
    """Return a device as a user reads it: ``cpu``, or ``cuda:1 (NVIDIA H100)``."""
    if not device.startswith("cuda"):
        return device
    return f"{device} ({torch.cuda.get_device_name(device)})"


def dtype_of(experiment: Experiment) -> torch.dtype:
    """Return the floating-point type of parameters and activations."""
    return getattr(torch, experiment.training.precision)


def dimensions_of(experiment: Experiment) -> tuple[int, int, int]:
    """Return the encoder's width d, blocks and heads."""
    encoder = experiment.model.encoder
    if encoder.size == "custom":
        return encoder.width, encoder.depth, encoder.heads
    if encoder.size == "smollm2":
        return SMOLLM2.width, encoder.depth or SMOLLM2.blocks, SMOLLM2.heads
    return SIZES[encoder.size]


def width_of(experiment: Experiment) -> int:
    """Return the encoder's width d."""
    return dimensions_of(experiment)[0]


def token_width_of(experiment: Experiment) -> int:
    """Return the width of a client's tokens: d, unless a connector makes others of them."""
    connector = experiment.model.connector
    return connector.features if connector.tokens else width_of(experiment)


def task_of(splits: Splits) -> Task:
    """Return the data's task."""
    return TASKS["retrieval" if splits.retrieval else "classification"]


def fusion_of(experiment: Experiment, splits: Splits) -> str:
    """Return how modalities meet: the task's way, or else ``model.fusion``."""
    return task_of(splits).fusion or experiment.model.fusion


def pixels_of(experiment: Experiment) -> str:
    """Return what is taken out of pixels: ``data.pixels``, or what ``weights.image`` expects.

    Raises
    ------
    ConfigError
        If these weights expect values without a name here.
    """
    if experiment.data.pixels is not None:
        return experiment.data.pixels
    source = experiment.weights.image
    mean = colours_of(source, experiment.model.encoder.size)
    if mean is None:
        return "paper"
    for name, (known, _) in PIXELS.items():
        if max(abs(a - b) for a, b in zip(mean, known, strict=True)) < 1e-3:
            return name
    raise ConfigError(
        f"weights.image: {source} was trained on pixels with the mean {mean}; take another, or "
        f"set data.pixels to one of paper, {', '.join(PIXELS)}"
    )


def forms_of(experiment: Experiment) -> dict[str, str | None]:
    """Return how texts and sounds become numbers, for the model's parts; None is as usual."""
    model = experiment.model
    return {
        "tokens": "wordpiece" if model.text == "minilm" else None,
        "sounds": "whisper" if model.audio == "whisper-tiny" else None,
    }


def writes_captions(experiment: Experiment) -> bool:
    """Return whether captions are what is to be written of a sample, and no input."""
    return "mlecs" in facts_of(experiment).reads and experiment.mlecs.answer == "caption"


def wire_of(experiment: Experiment) -> Wire:
    """Return how what crosses the cut is coded; plain where the method has none.

    Raises
    ------
    ConfigError
        If there is no such codec.
    """
    wire = experiment.wire
    activations = _codec("activations", wire.activations)
    gradients = _codec("gradients", wire.gradients)
    if not facts_of(experiment).split or facts_of(experiment).unimodal:
        return Wire()
    return Wire(activations, gradients, wire.rounding == "stochastic")


def _codec(key: str, name: str) -> Codec:
    if name not in CODECS:
        raise ConfigError(f"wire.{key}: unknown codec '{name}'; {plugins.hint(name, CODECS)}")
    return CODECS[name]


def head_of(experiment: Experiment, splits: Splits) -> tuple[str, HeadFacts]:
    """Return the head's name and facts: the task's own unless ``model.head.kind`` names one.

    Raises
    ------
    ConfigError
        If there is no such head.
    """
    kind = experiment.model.head.kind or task_of(splits).head
    return kind, head_named(experiment, kind)


def clients_own_head(experiment: Experiment) -> bool:
    """Return whether every client has a head of its own (``model.head_at: client``)."""
    facts = facts_of(experiment)
    return facts.unimodal or (experiment.model.head_at == "client" and facts.split)


def head_named(experiment: Experiment, kind: str) -> HeadFacts:
    """Return the facts of a head, ours or a plugin's, by name."""
    return plugins.find("heads", kind, HEADS, experiment.plugins, "model.head.kind")


def head_options(experiment: Experiment, facts: HeadFacts) -> Any:
    """Return a head's own options, checked, by a ConfigError."""
    model = experiment.model
    values = {name: getattr(model, name) for name in facts.reads} | model.head.options
    return plugins.options(facts.options, values, "model.head.options")


def unread_by_head(experiment: Experiment, splits: Splits) -> list[str]:
    """Return the keys for heads that are set to other than their defaults, and that none reads."""
    _, facts = head_of(experiment, splits)
    every = {name for own in HEADS.values() for name in own.reads}
    model, default = experiment.model, type(experiment.model)()
    return [
        f"model.{name}"
        for name in sorted(every - set(facts.reads))
        if getattr(model, name) != getattr(default, name)
    ]
