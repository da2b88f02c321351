"""Builds models from an experiment. The same seed gives the same initial weights everywhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mpsl_dist import plugins
from mpsl_dist.actors.checks import check_patches
from mpsl_dist.actors.choices import (
    device_of,
    dimensions_of,
    dtype_of,
    fusion_of,
    head_of,
    width_of,
)
from mpsl_dist.config import Experiment
from mpsl_dist.config.methods import facts_of
from mpsl_dist.data import Splits
from mpsl_dist.data.decode.text import VOCABULARY
from mpsl_dist.errors import ConfigError
from mpsl_dist.models import weight_sources, weights
from mpsl_dist.models.adapters import Adapters
from mpsl_dist.models.clip_text import ClipText, build_text_tower, default_tower
from mpsl_dist.models.heads import HeadFacts
from mpsl_dist.models.server_model import ServerModel, build_encoder
from mpsl_dist.models.tokenizers import (
    PatchTokenizer,
    TextTokenizer,
    TokenizerFacts,
    Tokenizers,
    token_table,
)

_log = logging.getLogger("mpsl_dist")

#: A text's token table, or CLIP's tower.
Text = nn.Embedding | ClipText


# -- tokenizers, the clients' part -------------------------------------------------------------


def build_tokenizers(
    experiment: Experiment, splits: Splits, shared_text: Text | None = None
) -> Tokenizers:
    """Build one client's tokenizers; every client begins with the same.

    Parameters
    ----------
    shared_text : nn.Embedding or ClipText, optional
        A frozen text table or tower that exists already.
    """
    model, width = experiment.model, width_of(experiment)
    check_patches(experiment, splits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        parts = {
            modality: _build_tokenizer(experiment, modality, shape, shared_text)
            for modality, shape in splits.shapes.items()
        }
        tokenizers = Tokenizers(parts, width, model.pre_norm)
    _load_stems(experiment, tokenizers)
    if not model.train_tokenizers:
        tokenizers.requires_grad_(False)
    return tokenizers.to(dtype=dtype_of(experiment))


@dataclass(frozen=True)
class _Own:
    """Our own tokenizers' view of the experiment, in place of a plugin's options."""

    experiment: Experiment
    shared_text: Text | None


def _image(shape: tuple[int, ...], width: int, own: _Own) -> nn.Module:
    patch = own.experiment.model.image_patch
    return PatchTokenizer(*shape, patch, patch, width)


def _audio(shape: tuple[int, ...], width: int, own: _Own) -> nn.Module:
    model = own.experiment.model
    return PatchTokenizer(1, *shape, model.audio_patch, model.audio_stride, width)


def _text(shape: tuple[int, ...], width: int, own: _Own) -> nn.Module:
    text = build_text(own.experiment) if own.shared_text is None else own.shared_text
    return text if isinstance(text, ClipText) else TextTokenizer(text, shape[0])


#: Modality -> its tokenizer.
TOKENIZERS: dict[str, TokenizerFacts] = {
    "image": TokenizerFacts(_image),
    "audio": TokenizerFacts(_audio),
    "text": TokenizerFacts(_text),
}


def _build_tokenizer(
    experiment: Experiment, modality: str, shape: tuple[int, ...], shared_text: Text | None
) -> nn.Module:
    facts, options = _tokenizer_choice(experiment, modality)
    if modality in TOKENIZERS:
        options = _Own(experiment, shared_text)
    return plugins.resolve(facts.build)(shape, width_of(experiment), options)


def _tokenizer_choice(experiment: Experiment, modality: str) -> tuple[TokenizerFacts, Any]:
    key = f"model.tokenizers.{modality}"
    facts = plugins.find("tokenizers", modality, TOKENIZERS, experiment.plugins, key)
    values = experiment.model.tokenizers.get(modality, {})
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key}: expected keys and values, found {values!r:.80}")
    return facts, plugins.options(facts.options, values, key)


def check_options(experiment: Experiment, splits: Splits) -> None:
    """Refuse options of tokenizers and head that they do not have, by a ConfigError."""
    errors = [
        f"model.tokenizers.{modality}: {experiment.data.name} has {', '.join(splits.shapes)}"
        for modality in experiment.model.tokenizers
        if modality not in splits.shapes
    ]
    checks: list[Callable[[], Any]] = [lambda: _head_choice(experiment, splits)]
    checks += [partial(_tokenizer_choice, experiment, modality) for modality in splits.shapes]
    for check in checks:
        try:
            check()
        except ConfigError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(errors))


def build_shared_text(experiment: Experiment, splits: Splits) -> Text | None:
    """Build the frozen text table or tower that all clients of a process share; None without text.

    A trained table is no one's to share: every client builds its own.
    """
    if "text" not in splits.shapes or experiment.model.train_token_table:
        return None
    return build_text(experiment)


def build_text(experiment: Experiment) -> Text:
    """Build the table (trained where ``model.train_token_table``) or CLIP's frozen tower."""
    return _tower(experiment) if experiment.model.text == "clip" else _seeded_table(experiment)


def _tower(experiment: Experiment) -> ClipText:
    name = experiment.model.text_tower or default_tower(width_of(experiment))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed + 2)
        tower = ClipText(build_text_tower(name), width_of(experiment))
    source, size = experiment.weights.text, experiment.model.encoder.size
    if source != "random":
        label, state = weight_sources.fetch("text", source, size, experiment.weights.root, name)
        _log.info("%s", weights.load_text(tower, state, label))
    return tower.to(dtype=dtype_of(experiment))


def _seeded_table(experiment: Experiment) -> nn.Embedding:
    trainable = experiment.model.train_token_table
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed + 2)
        table = token_table(VOCABULARY, width_of(experiment), trainable=trainable)
    return table.to(dtype=dtype_of(experiment))


def _load_stems(experiment: Experiment, tokenizers: Tokenizers) -> None:
    size, root = experiment.model.encoder.size, experiment.weights.root
    for part in ("image", "audio"):
        source = getattr(experiment.weights, part)
        if source != "random" and part in tokenizers.by_modality:
            name, state = weight_sources.fetch_stem(part, source, size, root)
            tokenizer = tokenizers.by_modality[part]
            account = weights.load_stem(tokenizer, tokenizers.pre_norm, state, name, part)
            _log.info("%s", account)


# -- the server's part -------------------------------------------------------------------------


def build_server_model(experiment: Experiment, splits: Splits, lengths: list[int]) -> ServerModel:
    """Build encoder, pooling and head, on the experiment's device.

    Parameters
    ----------
    lengths : list of int
        Tokens per modality.
    """
    model, dimensions = experiment.model, dimensions_of(experiment)
    adapted = facts_of(experiment).adapted
    _, head = head_of(experiment, splits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed + 1)
        built = ServerModel(
            build_encoder(*dimensions, 0 if adapted else model.encoder.trainable_blocks),
            dimensions[0],
            lengths,
            _build_head(experiment, splits),
            fusion_of(experiment, splits),
            model.pooling,
            model.post_norm,
            head.apart,
        )
        if adapted:
            rules, modalities = experiment.adapters, list(splits.shapes)
            built.adapters = Adapters(modalities, rules.include, dimensions[0], rules.form)
    _load_encoder(experiment, built.encoder)
    return built.to(device_of(experiment), dtype_of(experiment))


def _build_head(experiment: Experiment, splits: Splits) -> nn.Module:
    facts, options = _head_choice(experiment, splits)
    return plugins.resolve(facts.build)(width_of(experiment), len(splits.classes), options)


def _head_choice(experiment: Experiment, splits: Splits) -> tuple[HeadFacts, Any]:
    model = experiment.model
    kind, facts = head_of(experiment, splits)
    values = model.head.options
    if kind == "embeddings":
        values = {"normalize": model.normalize, "temperature": model.temperature} | values
    return facts, plugins.options(facts.options, values, "model.head.options")


def _load_encoder(experiment: Experiment, encoder: nn.Sequential) -> None:
    source, root = experiment.weights.encoder, experiment.weights.root
    if source != "random":
        size = experiment.model.encoder.size
        name, state = weight_sources.fetch("encoder", source, size, root, "")
        _log.info("%s", weights.load_encoder(encoder, state, name))
