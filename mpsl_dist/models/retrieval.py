"""Image-text retrieval: the unified encoder used as two towers, its loss and its recall.

Shape legend: ``b`` pairs, ``l`` length in tokens, ``d`` width, ``n`` pictures, ``m`` captions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class TwoTowers(nn.Module):
    """The encoder over pictures and captions apart; no head, as in the released code.

    Parameters
    ----------
    encoder : nn.Module
        (b, l, d) -> (b, l, d), the same for both.
    width : int
        d.
    pooling : "cls" or "mean"
        The first token, or the mean over all.
    post_norm : bool
        A trained LayerNorm after the encoder.
    normalize : bool
        Give embeddings of unit length (before the temperature).
    temperature : float or None
        First value of a trained temperature; None has none. Pictures are scaled by 1/temperature,
        so that a plain dot product with a caption is the logit, wherever it is formed.
    """

    fusion = "late"

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        pooling: str,
        post_norm: bool,
        normalize: bool,
        temperature: float | None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.post_norm = nn.LayerNorm(width) if post_norm else nn.Identity()
        #: FedCLIP's, over the two pooled features; other methods have none.
        self.adapters: nn.Module = nn.Identity()
        self.pooling = pooling
        self.normalize = normalize
        self.log_scale = None
        if temperature is not None:
            self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self, smashed: Sequence[Tensor]) -> Tensor:
        """Give embeddings (b, 2, d), picture and caption, of tokens (b, l_m, d) each."""
        pooled = []
        for tokens_bld in smashed:
            encoded_bld = self.post_norm(self.encoder(tokens_bld))
            pooled.append(encoded_bld[:, 0] if self.pooling == "cls" else encoded_bld.mean(1))
        image_bd, text_bd = self.adapters(pooled)
        if self.normalize:
            image_bd, text_bd = functional.normalize(image_bd), functional.normalize(text_bd)
        if self.log_scale is not None:
            # As CLIP: a scale of at most 100 keeps the loss from running away.
            image_bd = image_bd * self.log_scale.clamp(max=math.log(100)).exp()
        return torch.stack([image_bd, text_bd], dim=1)


def contrastive_loss(embeddings_b2d: Tensor, pictures_b: Tensor) -> Tensor:
    """Bidirectional InfoNCE over the pairs at hand, half image-to-text, half text-to-image.

    Another caption of the same picture is no negative: such entries are left out of the sums.

    Parameters
    ----------
    embeddings_b2d : Tensor
        (b, 2, d), picture and caption.
    pictures_b : Tensor
        (b,) int64, equal where two pairs share a picture.
    """
    logits_bb = embeddings_b2d[:, 0] @ embeddings_b2d[:, 1].T
    own = torch.eye(len(logits_bb), dtype=torch.bool, device=logits_bb.device)
    same = pictures_b[:, None] == pictures_b[None, :]
    logits_bb = logits_bb.masked_fill(same & ~own, -torch.inf)
    target_b = torch.arange(len(logits_bb), device=logits_bb.device)
    forth = functional.cross_entropy(logits_bb, target_b)
    back = functional.cross_entropy(logits_bb.T, target_b)
    return (forth + back) / 2


def recalls(image_nd: Tensor, text_md: Tensor, picture_m: Tensor) -> dict[str, float]:
    """Give R@1, R@5 and R@10 both ways over a whole test set.

    Text to image counts captions whose picture is among the k nearest; image to text counts
    pictures with any of their captions among the k nearest.

    Parameters
    ----------
    image_nd, text_md : Tensor
        One row per picture, one per caption.
    picture_m : Tensor
        (m,) int64: the row in ``image_nd`` that a caption belongs to.
    """
    logits_mn = text_md @ image_nd.T
    right_mn = torch.arange(len(image_nd))[None, :] == picture_m[:, None]
    found = {}
    for way, logits, right in (
        ("image_to_text", logits_mn.T, right_mn.T),
        ("text_to_image", logits_mn, right_mn),
    ):
        order = logits.argsort(dim=1, descending=True, stable=True)
        hits = right.gather(1, order)
        for k in (1, 5, 10):
            found[f"{way}_r{k}"] = hits[:, :k].any(1).float().mean().item()
    return found
