"""Words from text tokens: the nearest row of a known table, through position and LayerNorm.

Shape legend: ``n`` samples, ``l`` length in tokens, ``d`` width, ``v`` rows of the table.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Rows of the table that are compared at once.
_AT_ONCE = 8192


def nearest_words(tokens_nld: Tensor, tokenizer: nn.Module, norm: nn.Module) -> Tensor | None:
    """Return the byte-pair tokens (n, l) whose embedding is nearest to what arrived.

    Parameters
    ----------
    tokens_nld : Tensor
        As they arrived.
    tokenizer, norm : nn.Module
        With the weights that the attacker takes for the client's.

    Returns
    -------
    Tensor or None
        None where the tokenizer has no table.
    """
    table, positions = getattr(tokenizer, "table", None), getattr(tokenizer, "positions", None)
    if not isinstance(table, nn.Embedding) or positions is None:
        return None
    rows_vd = table.weight.detach().float()
    found = [
        _nearest(tokens_nld[:, place].float(), rows_vd + positions[0, place].detach().float(), norm)
        for place in range(tokens_nld.shape[1])
    ]
    return torch.stack(found, dim=1)


def _nearest(tokens_nd: Tensor, rows_vd: Tensor, norm: nn.Module) -> Tensor:
    normed = isinstance(norm, nn.LayerNorm)
    if normed:  # the same for all rows: taken out of what arrived, so that rows are only scaled
        weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
        tokens_nd = (tokens_nd - bias) / weight
    best_n = torch.full((len(tokens_nd),), torch.inf)
    word_n = torch.zeros(len(tokens_nd), dtype=torch.long)
    for start in range(0, len(rows_vd), _AT_ONCE):
        some_vd = rows_vd[start : start + _AT_ONCE]
        if normed:
            some_vd = functional.layer_norm(some_vd, some_vd.shape[1:], eps=norm.eps)
        distance_nv = some_vd.square().sum(1) - 2 * tokens_nd @ some_vd.T
        value_n, row_n = distance_nv.min(1)
        word_n = torch.where(value_n < best_n, row_n + start, word_n)
        best_n = torch.minimum(best_n, value_n)
    return word_n
