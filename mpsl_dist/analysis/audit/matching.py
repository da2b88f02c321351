"""Which picture is it, and was it there at all: candidates compared with what arrived.

The attacker tokenizes candidates with the weights that it takes for the client's, and measures how
far each is from the tokens that arrived; no loss and no gradient is needed.

Shape legend: ``n`` samples that arrived, ``m`` candidates, ``l`` tokens, ``d`` width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def distances(arrived: Sequence[Tensor], candidates: Sequence[Tensor]) -> list[Tensor]:
    """Return distances (n, m): of the tokens in their places, and of their mean whatever places.

    Parameters
    ----------
    arrived, candidates : sequence of Tensor
        (n, l, d) and (m, l, d) by modality, or one for all.
    """
    found = []
    for ordered in (True, False):
        pairs = [
            tuple(x.flatten(1) if ordered else x.mean(1) for x in pair)
            for pair in zip(arrived, candidates, strict=True)
        ]
        one, other = (torch.cat(side, dim=1).double() for side in zip(*pairs, strict=True))
        found.append(torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist"))
    return found
