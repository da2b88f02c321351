"""Tokens of a mini-batch that lacks parts: of what is absent there are none.

Shape legend: ``b`` batch, ``m`` modalities, ``l`` length in tokens, ``d`` width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Gapped:
    """Smashed activations of a mini-batch of which a part is absent.

    Attributes
    ----------
    tokens : tuple
        Of every modality that any sample has, in the order of fusion, the tokens (b_m, l_m, d) of
        those samples that have it; packed, while they travel.
    present_bm : Tensor
        (b, m) bool, m all modalities of the data.
    """

    tokens: tuple[Any, ...]
    present_bm: Tensor


#: What crosses the cut: whole samples as ever, or those that lack parts.
Crossing = list[Any] | Gapped


def mask_of(present: Mapping[str, Tensor]) -> Tensor:
    """Return a batch's ``present`` as (b, m) bool."""
    return torch.stack(list(present.values()), dim=1)


def tensors_of(smashed: Crossing) -> Sequence[Any]:
    """Return the tensors, or packed tokens, of what crosses."""
    return smashed.tokens if isinstance(smashed, Gapped) else smashed


def converted(smashed: Crossing, by: Callable[[Sequence[Any]], Sequence[Any]]) -> Crossing:
    """Return the same with its tensors converted, as by a codec."""
    if isinstance(smashed, Gapped):
        return replace(smashed, tokens=tuple(by(smashed.tokens)))
    return list(by(smashed))


def samples_of(smashed: Crossing) -> int:
    """Return how many samples there are."""
    return len(smashed.present_bm if isinstance(smashed, Gapped) else smashed[0])


def together(
    smashed: Sequence[Crossing], lengths: Sequence[int], fusion: str
) -> tuple[list[Tensor], Tensor]:
    """Return the clients' tokens as those of one batch.

    Parameters
    ----------
    smashed : sequence
        By client; those that are whole are (b, l, d) each, joint in early fusion.
    lengths : sequence of int
        Tokens per modality, in the order of fusion.

    Returns
    -------
    tokens, present_bm
        As of :class:`Gapped`.
    """
    rows: list[list[Tensor]] = [[] for _ in lengths]
    masks = []
    for one in smashed:
        if isinstance(one, Gapped):
            there = one.present_bm.any(0).nonzero().flatten().tolist()
            apart, mask_bm = dict(zip(there, one.tokens, strict=True)), one.present_bm
        else:
            split = one[0].split(list(lengths), dim=1) if fusion == "early" else one
            apart = dict(enumerate(split))
            mask_bm = torch.ones(len(one[0]), len(lengths), dtype=torch.bool)
        for m, tokens_bld in apart.items():
            rows[m].append(tokens_bld)
        masks.append(mask_bm.cpu())
    present_bm = torch.cat(masks)
    # Of a modality that nobody has there are no tokens, not even none of them.
    kept = [torch.cat(own) for m, own in enumerate(rows) if present_bm[:, m].any()]
    return kept, present_bm


def placed(rows: Tensor, there_b: Tensor) -> Tensor:
    """Return rows (b_m, ...) in their places of a batch, (b, ...); zeros are in the others."""
    found = rows.new_zeros(len(there_b), *rows.shape[1:])
    found[there_b] = rows
    return found
