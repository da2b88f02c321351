"""Models from an experiment; equal seeds lead to equal initial weights in every process."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mpsl_dist import plugins
from mpsl_dist.actors.checks import check_connector, check_patches
from mpsl_dist.actors.choices import (
    clients_own_head,
    device_of,
    dimensions_of,
    dtype_of,
    fusion_of,
    head_of,
    head_options,
    token_width_of,
    width_of,
)
from mpsl_dist.config import Experiment, Weights
from mpsl_dist.config.methods import facts_of
from mpsl_dist.data import Splits
from mpsl_dist.data.decode.text import VOCABULARY
from mpsl_dist.errors import ConfigError
from mpsl_dist.models import language, weight_sources, weights
from mpsl_dist.models.adapters import Adapters
from mpsl_dist.models.clip_text import ClipText, build_text_tower, default_tower
from mpsl_dist.models.connector import Connected, Connector
from mpsl_dist.models.draws import draws_alone
from mpsl_dist.models.lora import add_lora
from mpsl_dist.models.pretrained import PARTS, PartTokenizer
from mpsl_dist.models.pretrained_weights import load_part
from mpsl_dist.models.server_model import Encoder, ServerModel, build_encoder
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
    experiment: Experiment,
    splits: Splits,
    shared_text: Text | None = None,
    modalities: Collection[str] | None = None,
) -> Tokenizers:
    """Build one client's tokenizers, with its head if it owns one; all clients begin alike.

    Parameters
    ----------
    shared_text : nn.Embedding or ClipText, optional
        A frozen text table or tower that exists already.
    modalities : collection of str, optional
        Those that tokenizers are wanted of, by default all of the data's.

    Raises
    ------
    UserError
        If the patches do not fit the data, there is no such head, an option is wrong, or weights
        cannot be loaded.
    """
    model, width = experiment.model, token_width_of(experiment)
    check_patches(experiment, splits)
    check_connector(experiment, splits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        parts = _build_parts(experiment, splits, shared_text, modalities)
        connector = _build_connector(experiment, list(parts))
        kind = partial(Connected, connector) if connector else Tokenizers
        tokenizers = kind(parts, width, model.pre_norm)
    _load_stems(experiment, tokenizers)
    if not model.train_tokenizers:
        tokenizers.requires_grad_(False)
    if clients_own_head(experiment):
        tokenizers.head = _build_clients_head(experiment, splits)
    return tokenizers.to(dtype=dtype_of(experiment))


def _build_parts(
    experiment: Experiment,
    splits: Splits,
    shared_text: Text | None,
    modalities: Collection[str] | None,
) -> dict[str, nn.Module]:
    """Build the tokenizers of these modalities.

    Of another one, the numbers are drawn alone that those after it are not to get.
    """
    wanted = splits.shapes.keys() if modalities is None else modalities
    unseen = replace(experiment, weights=Weights())
    left, parts = list(wanted), {}
    for modality, shape in splits.shapes.items():
        if modality in left:
            parts[modality] = _build_tokenizer(experiment, modality, shape, shared_text)
            left.remove(modality)
        elif left:
            with draws_alone():
                _build_tokenizer(unseen, modality, shape, shared_text)
    return parts


def _build_connector(experiment: Experiment, modalities: list[str]) -> Connector | None:
    chosen = experiment.model.connector
    if not chosen.tokens:
        return None
    # A dropout would have to be the same where a step is repeated; there is none.
    widths = chosen.features, chosen.features, chosen.fused
    return Connector(modalities, *widths, chosen.tokens, width_of(experiment))


@dataclass(frozen=True)
class _Own:
    """Our own tokenizers' view of the experiment, in place of a plugin's options."""

    experiment: Experiment
    shared_text: Text | None


def _image(shape: tuple[int, ...], width: int, own: _Own) -> nn.Module:
    model, placed = own.experiment.model, not own.experiment.defences.shuffle_patches
    if model.image in PARTS:
        return _pretrained(own.experiment, "image", shape, width)
    patch, merge = model.image_patch, model.merge_patches
    return PatchTokenizer(*shape, patch, patch, width, merge, placed)


def _audio(shape: tuple[int, ...], width: int, own: _Own) -> nn.Module:
    model, placed = own.experiment.model, not own.experiment.defences.shuffle_patches
    if model.audio in PARTS:
        return _pretrained(own.experiment, "audio", shape, width)
    patch, stride, merge = model.audio_patch, model.audio_stride, model.merge_patches
    return PatchTokenizer(1, *shape, patch, stride, width, merge, placed)


def _text(shape: tuple[int, ...], width: int, own: _Own) -> nn.Module:
    if own.experiment.model.text in PARTS:
        return _pretrained(own.experiment, "text", shape, width)
    text = build_text(own.experiment) if own.shared_text is None else own.shared_text
    return text if isinstance(text, ClipText) else TextTokenizer(text, shape[0])


def _pretrained(
    experiment: Experiment, modality: str, shape: tuple[int, ...], width: int
) -> PartTokenizer:
    name, source = getattr(experiment.model, modality), getattr(experiment.weights, modality)
    part = PARTS[name].build()
    if source != "random":
        _log.info("%s", load_part(part, name, modality))
    part.train_last(experiment.model.trainable_part_blocks)
    return PartTokenizer(part, PARTS[name].length(shape), width)


#: Modality -> its tokenizer.
TOKENIZERS: dict[str, TokenizerFacts] = {
    "image": TokenizerFacts(_image),
    "audio": TokenizerFacts(_audio),
    # A second sensor of the same kind.
    "audio2": TokenizerFacts(_audio),
    "text": TokenizerFacts(_text, integers=True),
}


def _build_tokenizer(
    experiment: Experiment, modality: str, shape: tuple[int, ...], shared_text: Text | None
) -> nn.Module:
    facts, options = tokenizer_facts(experiment, modality), tokenizer_options(experiment, modality)
    if modality in TOKENIZERS:
        options = _Own(experiment, shared_text)
    built = plugins.resolve(facts.build)(shape, token_width_of(experiment), options)
    if not isinstance(getattr(built, "length", None), int):
        raise ConfigError(
            f"model.tokenizers.{modality}: {type(built).__name__} needs a whole number 'length', "
            "how many tokens it makes of an input"
        )
    return built


def tokenizer_facts(experiment: Experiment, modality: str) -> TokenizerFacts:
    """Return the facts of a modality's tokenizer, ours or a plugin's."""
    key = f"model.tokenizers.{modality}"
    return plugins.find("tokenizers", modality, TOKENIZERS, experiment.plugins, key)


def tokenizer_options(experiment: Experiment, modality: str) -> Any:
    """Return a tokenizer's own options, checked, by a ConfigError."""
    values = experiment.model.tokenizers.get(modality, {})
    facts = tokenizer_facts(experiment, modality)
    return plugins.options(facts.options, values, f"model.tokenizers.{modality}")


def build_shared_text(experiment: Experiment, splits: Splits) -> Text | None:
    """Build the frozen text table or tower that all clients of a process share.

    None without text, and where the table is trained: then every client builds its own. What is
    frozen of a pretrained part they share as they do of any tokenizer.
    """
    model = experiment.model
    if "text" not in splits.shapes or model.train_token_table or model.text in PARTS:
        return None
    return build_text(experiment)


def build_text(experiment: Experiment) -> Text:
    """Build the table (trained where ``model.train_token_table``) or CLIP's frozen tower."""
    return _tower(experiment) if experiment.model.text == "clip" else _seeded_table(experiment)


def _tower(experiment: Experiment) -> ClipText:
    name = experiment.model.text_tower or default_tower(width_of(experiment))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed + 2)
        tower = ClipText(build_text_tower(name), token_width_of(experiment))
    source, size = experiment.weights.text, experiment.model.encoder.size
    if source != "random":
        label, state = weight_sources.fetch("text", source, size, experiment.weights.root, name)
        _log.info("%s", weights.load_text(tower, state, label))
    return tower.to(dtype=dtype_of(experiment))


def _seeded_table(experiment: Experiment) -> nn.Embedding:
    trainable = experiment.model.train_token_table
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed + 2)
        table = token_table(VOCABULARY, token_width_of(experiment), trainable=trainable)
    return table.to(dtype=dtype_of(experiment))


def _load_stems(experiment: Experiment, tokenizers: Tokenizers) -> None:
    size, root = experiment.model.encoder.size, experiment.weights.root
    for part in ("image", "audio"):
        source = getattr(experiment.weights, part)
        if source not in ("random", *PARTS) and part in tokenizers.by_modality:
            name, state = weight_sources.fetch_stem(part, source, size, root)
            tokenizer = tokenizers.by_modality[part]
            account = weights.load_stem(tokenizer, tokenizers.pre_norm, state, name, part)
            _log.info("%s", account)


# -- the server's part -------------------------------------------------------------------------


def build_server_model(experiment: Experiment, splits: Splits, lengths: list[int]) -> ServerModel:
    """Build encoder, pooling and, unless clients own it, head, on the experiment's device.

    Parameters
    ----------
    lengths : list of int
        Tokens per modality, in fusion order.

    Raises
    ------
    UserError
        If there is no such head, an option is wrong, or weights cannot be loaded.
    """
    model, dimensions = experiment.model, dimensions_of(experiment)
    adapted, language = facts_of(experiment).adapted, model.encoder.kind == "lm"
    _, head = head_of(experiment, splits)
    encoder, norm = _language_encoder(experiment) if language else (None, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed + 1)
        trained = 0 if adapted else model.encoder.trainable_blocks
        built = ServerModel(
            build_encoder(*dimensions, trained) if encoder is None else encoder,
            dimensions[0],
            lengths,
            nn.Identity() if clients_own_head(experiment) else _build_head(experiment, splits),
            fusion_of(experiment, splits),
            model.pooling,
            model.post_norm,
            head.apart,
        )
        if adapted:
            rules, modalities = experiment.adapters, list(splits.shapes)
            late = built.fusion == "late"
            built.adapters = Adapters(modalities, rules.include, dimensions[0], rules.form, late)
    built.encoder.autocast = experiment.training.autocast
    built.encoder.checkpoint_blocks = experiment.training.checkpoint_blocks
    if norm is None:
        _load_encoder(experiment, built.encoder)
    else:
        built.post_norm = norm
    return built.to(device_of(experiment), dtype_of(experiment))


def _language_encoder(experiment: Experiment) -> tuple[Encoder, nn.Module]:
    """Build a language model's blocks and last norm, frozen as asked, with factors if asked."""
    chosen, dimensions = experiment.model.encoder, dimensions_of(experiment)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed + 3)
        if experiment.weights.encoder == "smollm2":
            model = language.read_smollm2(dimensions[1])
            _log.info("weights.encoder from smollm2: its first %d blocks", dimensions[1])
        else:
            known = language.SMOLLM2 if chosen.size == "smollm2" else None
            model = language.build_language(language.shape_of(*dimensions, known))
        encoder, norm = language.as_encoder(model)
        if chosen.lora.rank:
            add_lora(encoder, chosen.lora.rank, chosen.lora.alpha, chosen.lora.targets)
    if chosen.trainable_blocks != "all":
        for block in encoder[: max(0, len(encoder) - int(chosen.trainable_blocks))]:
            block.requires_grad_(False)
    norm.requires_grad_(not chosen.lora.rank and chosen.trainable_blocks != 0)
    return encoder, norm


def _build_head(experiment: Experiment, splits: Splits) -> nn.Module:
    _, facts = head_of(experiment, splits)
    options = head_options(experiment, facts)
    return plugins.resolve(facts.build)(width_of(experiment), len(splits.classes), options)


def _build_clients_head(experiment: Experiment, splits: Splits) -> nn.Module:
    """Build a head with the initial numbers that it would have at the server.

    They are drawn after the encoder's, which are drawn here too, and dropped block by block.
    """
    width, depth, heads = dimensions_of(experiment)
    before = 0 if experiment.model.encoder.kind == "lm" else depth  # a language model's own seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed + 1)
        for _ in range(before):
            build_encoder(width, 1, heads)
        return _build_head(experiment, splits)


def _load_encoder(experiment: Experiment, encoder: nn.Sequential) -> None:
    source, root = experiment.weights.encoder, experiment.weights.root
    if source != "random":
        size = experiment.model.encoder.size
        name, state = weight_sources.fetch("encoder", source, size, root, "")
        _log.info("%s", weights.load_encoder(encoder, state, name))


# -- both, without weights ---------------------------------------------------------------------


def build_on_meta(experiment: Experiment, splits: Splits) -> tuple[Tokenizers, ServerModel]:
    """Build every part on the meta device; takes no memory, whatever their size."""
    on_meta = replace(experiment, device="meta", weights=Weights())
    with torch.device("meta"):
        tokenizers = build_tokenizers(on_meta, splits)
        return tokenizers, build_server_model(on_meta, splits, tokenizers.lengths)
