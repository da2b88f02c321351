"""Gram volume and its contrast: how far apart several representations of one sample are.

After GRAM (Cicchetti et al., ICLR 2025) as ML-ECS has it (Liu et al., section 3.1, Eq. 5-8). Three
things differ from what ML-ECS prints. Eq. 7 and 8 lack the minus: minimised as printed they drive
what belongs together apart. Eq. 7's denominator holds other samples' own tuples, and no mismatched
one; GRAM's is taken, which sets every tuple against every anchor. And a volume grows with the norms
of its vectors, so that without unit length shrinking them is the way to a small one.

What GRAM does not say: a sample whose other vectors lie on one line has no volume with any anchor,
so that two or more modalities that agree wholly are told from nothing.

Shape legend: ``b`` samples, ``k`` vectors of a sample, ``d`` their width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Keeps the root's gradient finite where vectors lie in one plane, or are equal.
EPSILON = 1e-6


def gram_volume(vectors_bkd: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Return the volume that a sample's vectors span, sqrt(det(A Aᵀ) + epsilon) (Eq. 5, 6).

    Parameters
    ----------
    vectors_bkd : Tensor
        (b, k, d), floating; of more vectors than numbers, k > d, the volume is nil.
    epsilon : float
        0 gives the volume itself, whose gradient is infinite where it is 0.

    Returns
    -------
    Tensor
        (b,), in the type of the vectors; computed in float64, as det of nearly parallel vectors is
        a small difference of large numbers.
    """
    wide_bkd = vectors_bkd.double()
    return _volume(wide_bkd @ wide_bkd.transpose(1, 2), epsilon).to(vectors_bkd.dtype)


def cross_volumes(anchors_bd: Tensor, others_bkd: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Return the volume of every anchor with every sample's other vectors.

    Parameters
    ----------
    anchors_bd : Tensor
        (b, d), one a sample.
    others_bkd : Tensor
        (b, k, d), the sample's other vectors; k is at least 1.

    Returns
    -------
    Tensor
        (b, b): row u, column v holds V(anchor u, others of v); what belongs together lies on the
        diagonal.
    """
    samples, k = others_bkd.shape[:2]
    anchors, others = anchors_bd.double(), others_bkd.double()
    gram = anchors.new_empty(samples, samples, k + 1, k + 1)
    gram[..., 0, 0] = anchors.square().sum(1)[:, None]
    across = torch.einsum("ud,vkd->uvk", anchors, others)
    gram[..., 0, 1:], gram[..., 1:, 0] = across, across
    gram[..., 1:, 1:] = others @ others.transpose(1, 2)
    return _volume(gram, epsilon).to(others_bkd.dtype)


def contrast(volumes_bb: Tensor, temperature: float | Tensor) -> Tensor:
    """Return the mean of both directions' cross-entropies of -volume / temperature (Eq. 7, 8, 11).

    Parameters
    ----------
    volumes_bb : Tensor
        As of :func:`cross_volumes`. One sample alone gives 0: there is nothing to tell it from.
    temperature : float or Tensor
        GRAM trains one that begins at 0.07; ML-ECS names none, which is 1.
    """
    own = torch.arange(len(volumes_bb), device=volumes_bb.device)
    scores_bb = -volumes_bb / temperature
    which_anchor = functional.cross_entropy(scores_bb.T, own)
    which_others = functional.cross_entropy(scores_bb, own)
    return (which_anchor + which_others) / 2


class VolumeContrast(nn.Module):
    """Contrast of a sample's modalities with an anchor of another width.

    The server's fused representations are the anchors of ML-ECS' devices, and wider than a
    modality's: a trained linear layer brings them to one width. All vectors have unit length.

    Parameters
    ----------
    anchor_width, width : int
        Of the anchors, and d of the modalities; equal widths need no layer, and have none.
    temperature : float
        Fixed, see :func:`contrast`.
    """

    def __init__(self, anchor_width: int, width: int, temperature: float = 0.07) -> None:
        super().__init__()
        same = anchor_width == width
        self.project: nn.Module = nn.Identity() if same else nn.Linear(anchor_width, width)
        self.temperature = temperature

    def forward(self, anchors_bd: Tensor, others_bkd: Tensor) -> Tensor:
        """Return the loss, a scalar, of anchors and of each sample's other vectors."""
        anchors_bd = functional.normalize(self.project(anchors_bd), dim=-1)
        others_bkd = functional.normalize(others_bkd, dim=-1)
        return contrast(cross_volumes(anchors_bd, others_bkd), self.temperature)


def _volume(gram: Tensor, epsilon: float) -> Tensor:
    # Rounding can make the determinant of equal vectors a little less than nothing.
    return (torch.linalg.det(gram).clamp_min(0) + epsilon).sqrt()
