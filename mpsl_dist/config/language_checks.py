"""What cannot be asked for of a language model as the encoder, or of a ViT in its place."""

from __future__ import annotations

import math

from mpsl_dist.config.methods import facts_of
from mpsl_dist.config.parts import Connector, Lora
from mpsl_dist.config.schema import Experiment

#: SmolLM2's blocks, and the heads of a connector's small encoders.
_BLOCKS, _HEADS = 30, 4


def language_problems(experiment: Experiment) -> list[str]:
    """Return a line for every option of the encoder's kind, of LoRA and of the connector that
    cannot be had.
    """
    if experiment.model.encoder.kind == "vit":
        return _vit_problems(experiment)
    found = _size_problems(experiment) + _lora_problems(experiment)
    found += _connector_problems(experiment)
    model, encoder = experiment.model, experiment.model.encoder
    if model.pooling == "cls":
        found.append(
            "model.pooling: a language model's first token has seen no other; with "
            "model.encoder.kind=lm take last or mean"
        )
    if model.post_norm:
        found.append("model.post_norm: a language model ends in a norm of its own; take false")
    if facts_of(experiment).adapted:
        found.append(
            f"method: {experiment.method}'s adapters are for a ViT; take another method, or "
            "model.encoder.kind=vit"
        )
    if experiment.server.shard:
        found.append("server.shard: not for a language model; set server.shard=false")
    source = experiment.weights.encoder
    if source not in (("random", "smollm2") if encoder.size == "smollm2" else ("random",)):
        found.append(
            f"weights.encoder: '{source}' is not for model.encoder.kind=lm; take random, or "
            "smollm2 with model.encoder.size=smollm2"
        )
    return found


def _vit_problems(experiment: Experiment) -> list[str]:
    model, encoder = experiment.model, experiment.model.encoder
    only = {
        "model.encoder.size: smollm2": encoder.size == "smollm2",
        "model.encoder.lora": _given(encoder.lora),
        "model.connector": model.connector != Connector(),
        "model.pooling: last": model.pooling == "last",
        "weights.encoder: smollm2": experiment.weights.encoder.partition(":")[0] == "smollm2",
    }
    return [f"{key} only with model.encoder.kind=lm" for key, given in only.items() if given]


def _size_problems(experiment: Experiment) -> list[str]:
    encoder = experiment.model.encoder
    if encoder.size == "smollm2":
        if encoder.depth is not None and not 1 <= encoder.depth <= _BLOCKS:
            return [f"model.encoder.depth: smollm2 has 1 to {_BLOCKS} blocks, not {encoder.depth}"]
    elif encoder.size != "custom":
        return [
            f"model.encoder.size: {encoder.size} is a ViT's; with model.encoder.kind=lm take "
            "smollm2 or custom"
        ]
    elif encoder.width and (encoder.heads or 0) > 0 and encoder.width // encoder.heads % 2:
        return [
            f"model.encoder.width: {encoder.width // encoder.heads} a head, and a language model "
            "turns pairs of them by their place; take an even multiple of the heads"
        ]
    return []


def _lora_problems(experiment: Experiment) -> list[str]:
    encoder = experiment.model.encoder
    if not encoder.lora.rank:
        lone = "model.encoder.lora: only with model.encoder.lora.rank above 0"
        return [lone] if _given(encoder.lora) else []
    found = []
    if encoder.trainable_blocks != "all":
        found.append(
            "model.encoder.trainable_blocks: LoRA freezes every block; leave it out, or set "
            "model.encoder.lora.rank=0"
        )
    if not encoder.lora.targets:
        found.append("model.encoder.lora.targets: empty; name a layer, or set lora.rank=0")
    return found


def _given(lora: Lora) -> bool:
    """Return whether anything is asked for; a number that is none is told of elsewhere."""
    return lora != Lora() and math.isfinite(lora.alpha)


def _connector_problems(experiment: Experiment) -> list[str]:
    model, found = experiment.model, []
    if not model.connector.tokens:
        given = model.connector != Connector()
        return ["model.connector: only with model.connector.tokens above 0"] if given else []
    if model.fusion == "late":
        found.append("model.fusion: a connector fuses at the client; take early")
    if model.connector.features % _HEADS:
        found.append(
            f"model.connector.features: {model.connector.features} is no multiple of {_HEADS}"
        )
    for key in ("shuffle_patches", "nopeek"):
        if getattr(experiment.defences, key):
            found.append(
                f"defences.{key}: acts on tokens of each modality, and with model.connector.tokens "
                "none leaves; take one of them"
            )
    return found
