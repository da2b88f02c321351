"""The options of ``method: mlecs``; ``docs/mlecs.md`` has what they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Mlecs:
    """What mlecs does in a round, which is an epoch of ``training.epochs``; ``docs/mlecs.md``."""

    #: Of devices and server: ``tiny``, a random Llama; ``smollm2``, SmolLM2-135M; or ``none``, and
    #: a linear head on the soft tokens in its place.
    language: Literal["tiny", "smollm2", "none"] = "tiny"
    #: Width of ``tiny``, and of the soft tokens of ``none``.
    width: int = 64
    #: Blocks of the devices' model; SmolLM2 has 30.
    edge_blocks: int = 2
    #: Blocks of the server's large one.
    server_blocks: int = 4
    #: ``label``: the language model writes the class; ``head``: a trained linear head reads it off;
    #: ``caption``: it writes what pictures with captions (``data.unit: picture``) are said to show.
    answer: Literal["label", "head", "caption"] = "label"
    #: Tokens of a ``caption`` at most, its end included: in training it is cut, at test it ends.
    caption_length: int = 32
    #: What the language model reads between the soft tokens and its answer.
    instruction: str = "Classify the sample. Label:"
    #: LoRA's r, on what attention projects.
    rank: int = 8
    #: LoRA's alpha: the factors' product is scaled by alpha / rank.
    alpha: float = 16.0
    #: The dropout of what goes into LoRA's A.
    lora_dropout: float = 0.05
    #: Every device's own r, at most ``rank``, which is the server's then (FediLoRA).
    ranks: list[int] | None = None
    #: Width of a modality's features.
    features: int = 64
    #: Width of what modalities are projected to.
    shared: int = 64
    #: Width of the fused representation.
    fused: int = 256
    #: Soft tokens of a sample.
    tokens: int = 16
    #: The dropout of their generator.
    dropout: float = 0.1
    #: A device's mini-batches of public samples in a round, ``training.batch_size / clients`` each.
    public_steps: int = 10
    #: Those of its own samples.
    private_steps: int = 10
    #: The server's, of public samples.
    server_steps: int = 10
    #: The volume contrast at devices (against the server's fused table) and at the server.
    contrast: bool = True
    #: The contrast's temperature.
    temperature: float = 0.07
    #: Distil between the server's small and large model; false sends the average back as it is.
    transfer: bool = True
    #: The teacher's likeliest tokens that stand by themselves; all others are one.
    pool: int = 32
    #: What weighs a device in the average: its number of ``modalities``, or of ``samples``, or
    #: nothing.
    aggregate: Literal["modalities", "samples", "uniform"] = "modalities"
    #: What devices send: the language model's trained parameters, all trained ones, those of a
    #: proxy beside it and of the encoders (Co-PLMs), or nothing.
    exchange: Literal["lora", "all", "proxy", "none"] = "lora"
    #: Blocks of that proxy, the language model's first ones; at most ``edge_blocks``.
    proxy_blocks: int = 1
    #: Layers whose A devices set back before they send it (FediLoRA).
    edit: int = 0
    #: Weight of the squared distance from what the server sent (FedMLLM).
    proximal: float = 0.0
