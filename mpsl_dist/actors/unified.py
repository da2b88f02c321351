"""ML-ECS' models from an experiment; equal seeds lead to equal initial weights in every process."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mpsl_dist.actors.assembly import build_tokenizers
from mpsl_dist.actors.choices import device_of, dtype_of
from mpsl_dist.config import Encoder, Experiment
from mpsl_dist.data import Splits
from mpsl_dist.errors import ConfigError
from mpsl_dist.models.answers import (
    NAMES,
    Answers,
    CaptionAnswers,
    HeadAnswers,
    LabelAnswers,
)
from mpsl_dist.models.connector import Connected, Connector
from mpsl_dist.models.language import (
    SMOLLM2,
    TINY,
    LanguageShape,
    build_language,
    characters,
    read_smollm2,
    smollm2_pieces,
)
from mpsl_dist.models.lora import ATTENTION, add_lora
from mpsl_dist.models.unified import Proxy, Unified, freeze_absent
from mpsl_dist.models.volume import VolumeContrast

#: Heads of the small encoders' and the tiny model's attention.
_HEADS = 4
#: Of the configuration: what asks for a language model.
_KEY = "mlecs.language"


def language_shape(experiment: Experiment, blocks: int) -> LanguageShape | None:
    """Return the language model's shape; None where there is none."""
    rules = experiment.mlecs
    tiny = replace(TINY, width=rules.width, hidden=2 * rules.width)
    shapes = {"tiny": tiny, "smollm2": SMOLLM2}
    found = shapes.get(rules.language)
    return None if found is None else replace(found, blocks=blocks)


def build_device(
    experiment: Experiment,
    splits: Splits,
    modalities: Sequence[str],
    number: int | None = None,
    answers: Answers | None = None,
) -> Unified:
    """Build a device's model.

    Parameters
    ----------
    modalities : sequence of str
        Those that it has, in fusion order.
    number : int, optional
        Of the device whose rank of LoRA it is, where devices have ranks of their own.
    answers : Answers, optional
        A model of the same kind, whose frozen parts it shares.

    Raises
    ------
    UserError
        If the language model cannot be had, or the patches do not fit the data.
    """
    rules = experiment.mlecs
    rank = rules.ranks[number] if rules.ranks and number is not None else rules.rank
    fused = list(splits.shapes) if rules.exchange == "all" else modalities
    own = _answers(experiment, splits, rules.edge_blocks, rank) if answers is None else answers
    tokenizers = _tokenizers(experiment, splits, modalities, fused, _width(experiment))
    with _drawn(experiment.seed + 5):
        contrast = VolumeContrast(rules.fused, rules.shared, rules.temperature)
    contrast.requires_grad_(rules.contrast)
    own = _copy(own) if answers is not None else own
    proxy = _proxy(own, tokenizers, rules.proxy_blocks) if rules.exchange == "proxy" else None
    model = Unified(tokenizers, own, contrast, proxy)
    freeze_absent(model)
    return model.to(device_of(experiment), dtype_of(experiment))


def build_large(experiment: Experiment, splits: Splits) -> Unified:
    """Build the server's model, of all modalities; raises as :func:`build_device`."""
    rules, names = experiment.mlecs, list(splits.shapes)
    answers = _answers(experiment, splits, rules.server_blocks, rules.rank)
    tokenizers = _tokenizers(experiment, splits, names, names, _width(experiment))
    model = Unified(
        tokenizers, answers, VolumeContrast(rules.shared, rules.shared, rules.temperature)
    )
    return model.to(device_of(experiment), dtype_of(experiment))


def _copy(answers: Answers) -> Answers:
    """Return a copy that shares what is frozen."""
    frozen: dict[int, Any] = {id(p): p for p in answers.parameters() if not p.requires_grad}
    return copy.deepcopy(answers, memo=frozen)


def _proxy(answers: Answers, tokenizers: Connected, blocks: int) -> Proxy:
    """Return the first blocks of a language model, with factors of their own, as its proxy."""
    small, connector = _copy(answers), tokenizers.connector
    small.language.model.layers = small.language.model.layers[:blocks]
    return Proxy(copy.deepcopy(connector.generator), small, connector.tokens)


def _width(experiment: Experiment) -> int:
    rules = experiment.mlecs
    return SMOLLM2.width if rules.language == "smollm2" else rules.width


def narrowed(experiment: Experiment) -> Experiment:
    """Return the experiment whose tokenizers are ML-ECS' own: of width ``mlecs.features``."""
    encoder = Encoder("custom", width=experiment.mlecs.features, depth=1, heads=_HEADS)
    return replace(experiment, model=replace(experiment.model, encoder=encoder))


def _tokenizers(
    experiment: Experiment,
    splits: Splits,
    modalities: Sequence[str],
    fused: Sequence[str],
    width: int,
) -> Connected:
    rules, model = experiment.mlecs, experiment.model
    parts = build_tokenizers(narrowed(experiment), splits, modalities=modalities)
    with _drawn(experiment.seed + 3):
        connector = Connector(
            *(fused, rules.features, rules.shared, rules.fused, rules.tokens, width, rules.dropout)
        )
    # Whoever has a modality begins with the same encoder of it.
    built = Connected(connector, parts.by_modality, rules.features, model.pre_norm)
    built.pre_norm = parts.pre_norm
    for place, name in enumerate(splits.shapes):
        if name in modalities:
            with _drawn(experiment.seed + 6 + place):
                fresh = type(built.encoders[name])(rules.features)
            built.encoders[name] = fresh
    return built


def _answers(experiment: Experiment, splits: Splits, blocks: int, rank: int) -> Answers:
    """Build a language model with LoRA, or what stands for it."""
    answers = _language_answers(experiment, splits, blocks, rank)
    answers.autocast = experiment.training.autocast
    return answers


def _language_answers(experiment: Experiment, splits: Splits, blocks: int, rank: int) -> Answers:
    rules, shape = experiment.mlecs, language_shape(experiment, blocks)
    with _drawn(experiment.seed + 4):
        model = None if shape is None else _language(rules.language, shape)
        if model is not None:
            alpha = rules.alpha * rank / rules.rank  # one scale, whatever the rank
            add_lora(model, rank, alpha, ATTENTION, rules.lora_dropout, _KEY)
        if model is None or rules.answer == "head":
            return HeadAnswers(model, _width(experiment), len(splits.classes))
    words = smollm2_pieces(_KEY) if rules.language == "smollm2" else characters()
    if rules.answer == "caption":
        return CaptionAnswers(model, rules.instruction, words, rules.caption_length)
    if len(splits.classes) > len(NAMES):
        raise ConfigError(
            f"mlecs.answer: label names at most {len(NAMES)} classes, the data have "
            f"{len(splits.classes)}; take head"
        )
    names = [words.encode(name)[0] for name in NAMES[: len(splits.classes)]]
    return LabelAnswers(model, words.encode(rules.instruction), names, words.end)


def _language(kind: str, shape: LanguageShape) -> nn.Module:
    # What is counted on shapes alone needs no file.
    if kind == "smollm2" and torch.get_default_device().type != "meta":
        return read_smollm2(shape.blocks, _KEY)
    model = build_language(shape, _KEY)
    # Frozen, Llama's own small table could hardly prefer one word to another.
    nn.init.normal_(model.get_input_embeddings().weight, std=shape.width**-0.5)
    return model


@contextmanager
def _drawn(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
