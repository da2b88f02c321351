"""Words from text tokens: the nearest row of a known table, through position and LayerNorm.

Shape legend: ``n`` samples, ``l`` length in tokens, ``d`` width, ``v`` rows of the table.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def nearest_words(tokens_nld: Tensor, tokenizer: nn.Module, norm: nn.Module) -> Tensor:
    """Return the byte-pair tokens (n, l) whose embedding is nearest to what arrived.

    Parameters
    ----------
    tokens_nld : Tensor
        As they arrived.
    tokenizer, norm : nn.Module
        A table with positions, and what stands behind it, with the weights that the attacker takes
        for the client's.
    """
    rows_vd, places_ld = tokenizer.table.weight.detach().float(), tokenizer.positions[0].detach()
    normed = isinstance(norm, nn.LayerNorm)
    tokens_nld = tokens_nld.float()
    if normed:  # what is the same for all rows is taken out of what arrived
        tokens_nld = (tokens_nld - norm.bias.detach()) / norm.weight.detach()
        tokens_nld, rows_vd, places_ld = map(_centred, (tokens_nld, rows_vd, places_ld))
    lengths_v = rows_vd.square().sum(1)
    found = []
    for tokens_nd, place_d in zip(tokens_nld.unbind(1), places_ld.float(), strict=True):
        square_v = lengths_v + 2 * (rows_vd @ place_d) + place_d.square().sum()
        product_nv = tokens_nd @ rows_vd.T + (tokens_nd @ place_d)[:, None]
        near_nv = product_nv / square_v.sqrt() if normed else 2 * product_nv - square_v
        found.append(near_nv.argmax(1))
    return torch.stack(found, dim=1)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)
