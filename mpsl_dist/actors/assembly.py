"""Builds the actors' parts from an experiment. The same seed gives the same initial weights."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import nn

from mpsl_dist.actors.local_data import LocalData
from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.actors.server import Server
from mpsl_dist.config import ConfigError, Experiment
from mpsl_dist.data import Splits
from mpsl_dist.data.decode.text import VOCABULARY
from mpsl_dist.data.partition import Dealt, deal, partition
from mpsl_dist.models import weight_sources, weights
from mpsl_dist.models.adapters import Adapters
from mpsl_dist.models.clip_text import ClipText, build_text_tower, default_tower
from mpsl_dist.models.retrieval import TwoTowers
from mpsl_dist.models.server_model import SIZES, ServerModel, build_encoder
from mpsl_dist.models.tokenizers import PatchTokenizer, TextTokenizer, Tokenizers, token_table

_log = logging.getLogger("mpsl_dist")
_told: set[str] = set()


def device_of(experiment: Experiment) -> str:
    """Give the torch device; ``auto`` is CUDA where there is one."""
    if experiment.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return experiment.device


def width_of(experiment: Experiment) -> int:
    """Give the encoder's width d."""
    encoder = experiment.model.encoder
    return encoder.width if encoder.size == "custom" else SIZES[encoder.size][0]


def fusion_of(experiment: Experiment, splits: Splits) -> str:
    """Give how modalities meet; in retrieval they never do, each is encoded by itself."""
    return "late" if splits.retrieval else experiment.model.fusion


def dtype_of(experiment: Experiment) -> torch.dtype:
    """Give the floating-point type of parameters and activations."""
    return getattr(torch, experiment.training.precision)


def build_frozen_text(experiment: Experiment, splits: Splits) -> nn.Embedding | ClipText | None:
    """Build the frozen text table or tower that all clients of a process share; None without text.

    A trained table is no one's to share: every client builds its own.
    """
    if "text" not in splits.shapes or experiment.model.train_token_table:
        return None
    return _frozen_text(experiment)


def _frozen_text(experiment: Experiment) -> nn.Embedding | ClipText:
    return _tower(experiment) if experiment.model.text == "clip" else _seeded_table(experiment)


def _tower(experiment: Experiment) -> ClipText:
    name = experiment.model.text_tower or default_tower(width_of(experiment))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed + 2)
        tower = ClipText(build_text_tower(name), width_of(experiment))
    source, size = experiment.weights.text, experiment.model.encoder.size
    if source != "random":
        label, state = weight_sources.fetch("text", source, size, experiment.weights.root, name)
        _tell(weights.load_text(tower, state, label))
    return tower.to(dtype=dtype_of(experiment))


def _tell(account: weights.Account) -> None:
    """Log what was loaded, once a process and part."""
    if str(account) not in _told:
        _told.add(str(account))
        _log.info("%s", account)


def _seeded_table(experiment: Experiment) -> nn.Embedding:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed + 2)
        table = token_table(
            VOCABULARY, width_of(experiment), trainable=experiment.model.train_token_table
        )
    return table.to(dtype=dtype_of(experiment))


def build_tokenizers(
    experiment: Experiment, splits: Splits, frozen_text: nn.Embedding | ClipText | None = None
) -> Tokenizers:
    """Build one client's tokenizers; every client's first copy is the same.

    Parameters
    ----------
    frozen_text : nn.Embedding or ClipText, optional
        A text table or tower to share.
    """
    model, width = experiment.model, width_of(experiment)
    check_patches(experiment, splits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        parts: dict[str, nn.Module] = {}
        for modality, shape in splits.shapes.items():
            if modality == "image":
                patch = model.image_patch
                parts[modality] = PatchTokenizer(*shape, patch, patch, width)
            elif modality == "audio":
                patch, stride = model.audio_patch, model.audio_stride
                parts[modality] = PatchTokenizer(1, *shape, patch, stride, width)
            else:
                text = _frozen_text(experiment) if frozen_text is None else frozen_text
                is_tower = isinstance(text, ClipText)
                parts[modality] = text if is_tower else TextTokenizer(text, shape[0])
        tokenizers = Tokenizers(parts, width, model.pre_norm)
    _load_stems(experiment, tokenizers)
    if not model.train_tokenizers:
        tokenizers.requires_grad_(False)
    return tokenizers.to(dtype=dtype_of(experiment))


def _load_stems(experiment: Experiment, tokenizers: Tokenizers) -> None:
    size, root = experiment.model.encoder.size, experiment.weights.root
    for part in ("image", "audio"):
        source = getattr(experiment.weights, part)
        if source != "random" and part in tokenizers.by_modality:
            name, state = weight_sources.fetch_stem(part, source, size, root)
            tokenizer = tokenizers.by_modality[part]
            _tell(weights.load_stem(tokenizer, tokenizers.pre_norm, state, name, part))


def _load_encoder(experiment: Experiment, encoder: nn.Sequential) -> None:
    source, root = experiment.weights.encoder, experiment.weights.root
    if source != "random":
        size = experiment.model.encoder.size
        name, state = weight_sources.fetch("encoder", source, size, root, "")
        _tell(weights.load_encoder(encoder, state, name))


def check_task(experiment: Experiment, splits: Splits) -> None:
    """Refuse options that do not fit the task, by a ConfigError."""
    errors = []
    if splits.retrieval:
        if experiment.data.test_at == "clients":
            errors.append("data.test_at: retrieval ranks the whole test set, at the server")
        if experiment.method == "psl" and experiment.contrastive == "global":
            errors.append("contrastive: psl serves every client by itself; take contrastive=client")
    elif experiment.contrastive == "global":
        errors.append(f"contrastive: {experiment.data.name} is no retrieval dataset")
    if errors:
        raise ConfigError("\n".join(errors))


def check_patches(experiment: Experiment, splits: Splits) -> None:
    """Refuse patches that do not fit the data, by a ConfigError."""
    name, model = experiment.data.name, experiment.model
    errors = []
    if "image" in splits.shapes:
        _, height, width = splits.shapes["image"]
        if height % model.image_patch or width % model.image_patch:
            errors.append(
                f"model.image_patch: {model.image_patch} does not divide the {height}x{width} "
                f"pictures of {name}"
            )
    if "audio" in splits.shapes and min(splits.shapes["audio"]) < model.audio_patch:
        frames, bins = splits.shapes["audio"]
        errors.append(
            f"model.audio_patch: {model.audio_patch} does not fit the {frames}x{bins} "
            f"spectrograms of {name}"
        )
    if errors:
        raise ConfigError("\n".join(errors))


def build_server(experiment: Experiment, splits: Splits, lengths: list[int]) -> Server:
    """Build the server with its optimizer.

    Parameters
    ----------
    lengths : list of int
        Tokens per modality.
    """
    model, encoder = experiment.model, experiment.model.encoder
    if encoder.size == "custom":
        dimensions = (encoder.width, encoder.depth, encoder.heads)
    else:
        dimensions = SIZES[encoder.size]
    adapted = experiment.method == "fedclip"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed + 1)
        blocks = build_encoder(*dimensions, 0 if adapted else encoder.trainable_blocks)
        server_model: ServerModel | TwoTowers
        if splits.retrieval:
            server_model = TwoTowers(
                blocks,
                dimensions[0],
                model.pooling,
                model.post_norm,
                model.normalize,
                model.temperature,
            )
        else:
            server_model = ServerModel(
                blocks,
                dimensions[0],
                lengths,
                len(splits.classes),
                model.fusion,
                model.pooling,
                model.post_norm,
            )
        if adapted:
            rules, modalities = experiment.adapters, list(splits.shapes)
            server_model.adapters = Adapters(modalities, rules.include, dimensions[0], rules.form)
    _load_encoder(experiment, server_model.encoder)
    server_model = server_model.to(device_of(experiment), dtype_of(experiment))
    stepper = Stepper(server_model.parameters(), experiment.training.server)
    return Server(server_model, stepper, device_of(experiment))


def deal_train(experiment: Experiment, splits: Splits) -> Dealt:
    """Give the training samples of every client, by the experiment's rule."""
    rule, clients = experiment.data.partition, experiment.clients
    dealt = deal(splits, clients, rule.kind, rule.alpha, rule.minimum, experiment.seed)
    if len(dealt.parts) != clients:
        raise ConfigError(
            f"clients: {clients}, but the data names {len(dealt.parts)} and "
            f"data.partition.kind=natural takes each; set clients={len(dealt.parts)}"
        )
    return dealt


def log_partition(experiment: Experiment, splits: Splits) -> None:
    """Log who holds how much, by which rule."""
    dealt = deal_train(experiment, splits)
    sizes = [len(part) for part in dealt.parts]
    _log.info(
        "partition: %s; %d clients with %d to %d training samples, median %g",
        dealt.rule,
        len(sizes),
        min(sizes),
        max(sizes),
        float(np.median(sizes)),
    )
    for number, name in enumerate(dealt.names):
        _log.info("client %d is '%s': %d samples", number, name, sizes[number])


def build_local_data(experiment: Experiment, splits: Splits) -> list[tuple[LocalData, LocalData]]:
    """Give every client's training and test samples, the latter empty where the server has them."""
    seed, data = experiment.seed, experiment.data
    parts = deal_train(experiment, splits).parts
    tests = [np.empty(0, dtype=np.int64)] * experiment.clients
    if data.test_at == "clients":
        tests = partition(splits.test.labels, experiment.clients, "iid", 1.0, 1, seed)
    return [
        (
            LocalData(splits.train, part, seed, number, data.loaders),
            LocalData(splits.test, test, seed, number),
        )
        for number, (part, test) in enumerate(zip(parts, tests, strict=True))
    ]
