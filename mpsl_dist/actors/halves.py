"""Clients' and server's halves of M²FedSA from an experiment; equal seeds, equal first weights."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from mpsl_dist.actors import assembly
from mpsl_dist.actors.choices import device_of, dimensions_of, dtype_of, width_of
from mpsl_dist.config import Experiment, Weights
from mpsl_dist.data import Splits
from mpsl_dist.errors import ConfigError
from mpsl_dist.models.adapters import BottleneckAdapter
from mpsl_dist.models.halves import Adapted, Fusion, Heads, UpperHalf, UpperModel
from mpsl_dist.models.pretrained import Part, PartTokenizer
from mpsl_dist.models.tokenizers import Tokenizers

#: Streams of the seed: the clients' adapters, the server's, the fusion.
_LOWER, _UPPER, _FUSION = range(3)


def build_lower(
    experiment: Experiment, splits: Splits, modalities: Collection[str] | None = None
) -> Tokenizers:
    """Build what clients of these modalities, by default all, have; a client has one.

    Raises
    ------
    UserError
        As :func:`mpsl_dist.actors.assembly.build_tokenizers`, or if the cut does not fit.
    """
    chosen, halves, heads = experiment.m2fedsa, {}, {}
    raw = assembly.build_tokenizers(experiment, splits, modalities=modalities)
    for modality, part in _encoders(experiment, splits, raw).items():
        low = part.low(chosen.cut_block).to(device_of(experiment))
        width = _row_width(low, _inputs(experiment, splits, modality))
        with _drawing(experiment, splits, modality, _LOWER):
            halves[modality] = _adapted(experiment, low, width)
        heads[modality] = copy.deepcopy(raw.head)
    built = Tokenizers(halves, 0, pre_norm=False)
    built.head = Heads(heads)
    return built.to(device_of(experiment), dtype_of(experiment))


def build_upper(experiment: Experiment, splits: Splits) -> UpperModel:
    """Build what the server has, on the experiment's device; raises as :func:`build_lower`."""
    chosen, width, halves = experiment.m2fedsa, width_of(experiment), {}
    raw = assembly.build_tokenizers(experiment, splits)
    for modality, part in _encoders(experiment, splits, raw).items():
        *blocks, end = part.high(chosen.cut_block)
        own = not isinstance(raw.by_modality[modality], PartTokenizer)
        with _drawing(experiment, splits, modality, _UPPER):
            body = _adapted(experiment, nn.Sequential(*blocks), part.width)
            project = nn.Identity() if part.width == width else nn.Linear(part.width, width)
        pooling = experiment.model.pooling if own else "mean"
        halves[modality] = UpperHalf(body, end, pooling, project)
    heads, classes = dimensions_of(experiment)[2], len(splits.classes)
    with _drawing(experiment, splits, next(iter(halves)), _FUSION):
        fusion = Fusion(len(halves), width, heads, classes, chosen.fusion_attention)
    return UpperModel(halves, fusion).to(device_of(experiment), dtype_of(experiment))


def build_on_meta(experiment: Experiment, splits: Splits) -> tuple[Tokenizers, UpperModel]:
    """Build both on the meta device; takes no memory, whatever their size."""
    on_meta = replace(experiment, device="meta", weights=Weights())
    with torch.device("meta"):
        return build_lower(on_meta, splits), build_upper(on_meta, splits)


@contextmanager
def _drawing(experiment: Experiment, splits: Splits, modality: str, stream: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        place = list(splits.shapes).index(modality)
        torch.manual_seed(experiment.seed + 3 + 3 * place + stream)
        yield


def _encoders(experiment: Experiment, splits: Splits, raw: Tokenizers) -> dict[str, Part]:
    """Return the whole encoder of every modality that there is a tokenizer of.

    Our own is the tokenizer followed by a ViT; all modalities' begin with the same numbers.

    Raises
    ------
    ConfigError
        If one has too few blocks for the cut.
    """
    model = assembly.build_server_model(experiment, splits, raw.lengths)
    cut, found = experiment.m2fedsa.cut_block, {}
    for modality, tokenizer in raw.by_modality.items():
        if isinstance(tokenizer, PartTokenizer):
            part = tokenizer.part
        else:
            embed = nn.Sequential(tokenizer, copy.deepcopy(raw.pre_norm))
            blocks = nn.Sequential(*copy.deepcopy(model.encoder))
            part = Part(embed, blocks, copy.deepcopy(model.post_norm), width_of(experiment))
        if experiment.m2fedsa.frozen:
            part.requires_grad_(False)
        _refuse_cut(experiment, modality, part, cut)
        found[modality] = part
    return found


def _refuse_cut(experiment: Experiment, modality: str, part: Part, cut: int) -> None:
    blocks = len(part.blocks)
    if cut > blocks:
        raise ConfigError(
            f"m2fedsa.cut_block: {cut}, but the encoder of {modality} has {blocks} blocks"
        )
    if experiment.m2fedsa.adapter_form != "parallel":
        return
    maps = isinstance(part.blocks[0], nn.Sequential)  # EfficientNet's stages, of many shapes
    if cut in (0, blocks) or maps:
        why = "whose stages change shapes" if maps else f"of {blocks} blocks, cut after {cut}"
        raise ConfigError(
            "m2fedsa.adapter_form: parallel needs a block of one shape beside it at the client and "
            f"at the server; the encoder of {modality}, {why}, has none; take residual"
        )


def _adapted(experiment: Experiment, blocks: nn.Sequential, width: int) -> Adapted:
    chosen = experiment.m2fedsa
    added = chosen.adapter_form != "plain"
    adapter = BottleneckAdapter(width, chosen.adapter_rank, added)
    return Adapted(blocks, adapter, chosen.adapter_form)


def _inputs(experiment: Experiment, splits: Splits, modality: str) -> Tensor:
    integers = assembly.tokenizer_facts(experiment, modality).integers
    dtype = torch.long if integers else dtype_of(experiment)
    shape = (1, *splits.shapes[modality])
    return torch.zeros(shape, dtype=dtype, device=device_of(experiment))


@torch.no_grad()
def _row_width(low: nn.Module, x: Tensor) -> int:
    """Return the width of a row of what crosses the cut: maps have channels in its place."""
    out = low(x)
    return int(out.shape[1] if out.dim() == 4 else out.shape[-1])
