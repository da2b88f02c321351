"""Builds the actors' parts from an experiment. The same seed gives the same initial weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from mpsl_dist.actors.local_data import LocalData
from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.actors.server import Server
from mpsl_dist.config import ConfigError, Experiment
from mpsl_dist.data import Splits
from mpsl_dist.data.partition import partition
from mpsl_dist.data.text import VOCABULARY
from mpsl_dist.models.server_model import SIZES, ServerModel, build_encoder
from mpsl_dist.models.tokenizers import PatchTokenizer, TextTokenizer, Tokenizers, token_table


def device_of(experiment: Experiment) -> str:
    """Give the torch device; ``auto`` is CUDA where there is one."""
    if experiment.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return experiment.device


def width_of(experiment: Experiment) -> int:
    """Give the encoder's width d."""
    encoder = experiment.model.encoder
    return encoder.width if encoder.size == "custom" else SIZES[encoder.size][0]


def dtype_of(experiment: Experiment) -> torch.dtype:
    """Give the floating-point type of parameters and activations."""
    return getattr(torch, experiment.training.precision)


def build_token_table(experiment: Experiment, splits: Splits) -> nn.Embedding | None:
    """Build the frozen text table that all clients of a process may share; None without text.

    A trained table is no one's to share: every client builds its own.
    """
    if "text" not in splits.shapes or experiment.model.train_token_table:
        return None
    return _seeded_table(experiment)


def _seeded_table(experiment: Experiment) -> nn.Embedding:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed + 2)
        table = token_table(
            VOCABULARY, width_of(experiment), trainable=experiment.model.train_token_table
        )
    return table.to(dtype=dtype_of(experiment))


def build_tokenizers(
    experiment: Experiment, splits: Splits, table: nn.Embedding | None = None
) -> Tokenizers:
    """Build one client's tokenizers; every client's first copy is the same.

    Parameters
    ----------
    table : nn.Embedding, optional
        A text table to share.
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
                shared = _seeded_table(experiment) if table is None else table
                parts[modality] = TextTokenizer(shared, shape[0])
        tokenizers = Tokenizers(parts, width, model.pre_norm)
    if not model.train_tokenizers:
        tokenizers.requires_grad_(False)
    return tokenizers.to(dtype=dtype_of(experiment))


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed + 1)
        server_model = ServerModel(
            build_encoder(*dimensions, encoder.trainable_blocks),
            dimensions[0],
            lengths,
            len(splits.classes),
            model.fusion,
            model.pooling,
            model.post_norm,
        )
    server_model = server_model.to(device_of(experiment), dtype_of(experiment))
    stepper = Stepper(server_model.parameters(), experiment.training.server)
    return Server(server_model, stepper, device_of(experiment))


def build_local_data(experiment: Experiment, splits: Splits) -> list[tuple[LocalData, LocalData]]:
    """Give every client's training and test samples, the latter empty where the server has them."""
    seed, data = experiment.seed, experiment.data
    rule = data.partition
    parts = partition(
        splits.train.labels, experiment.clients, rule.kind, rule.alpha, rule.minimum, seed
    )
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
