"""The server's part of the model: the unified ViT encoder W_b and the task head W_t.

Shape legend: ``b`` batch, ``l`` length in tokens, ``d`` width, ``k`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

#: Width, blocks and heads of the paper's encoders (Dosovitskiy et al. 2020).
SIZES: dict[str, tuple[int, int, int]] = {
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}


def build_encoder(
    width: int, depth: int, heads: int, trainable_blocks: int | str = "all"
) -> nn.Sequential:
    """Stack timm's pre-norm transformer blocks (MLP x4, qkv bias, LayerNorm eps 1e-5).

    Parameters
    ----------
    trainable_blocks : int or "all"
        The last k blocks are trained, the others frozen.

    Returns
    -------
    nn.Sequential
        (b, l, d) -> (b, l, d); the state keys ``0.norm1.weight`` ... are Meta-Transformer's.
    """
    from timm.models.vision_transformer import Block

    # torch's own initial weights: ViT's fixed std of 0.02 is made for width 768, and a narrow
    # encoder trained from scratch learns several times slower with it.
    norm = partial(nn.LayerNorm, eps=1e-5)
    encoder = nn.Sequential(
        *(Block(width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm) for _ in range(depth))
    )
    if trainable_blocks != "all":
        for block in encoder[: max(0, depth - int(trainable_blocks))]:
            block.requires_grad_(False)
    return encoder


class ServerModel(nn.Module):
    """Encoder, pooling and classification head (Eq. 3).

    Parameters
    ----------
    encoder : nn.Module
        (b, l, d) -> (b, l, d).
    width : int
        d.
    lengths : sequence of int
        Tokens per modality, in fusion order.
    classes : int
    fusion : "early" or "late"
    pooling : "cls" or "mean"
        Mean over every modality's first token, or over all tokens.
    post_norm : bool
        A trained LayerNorm after the encoder.
    """

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        lengths: Sequence[int],
        classes: int,
        fusion: str,
        pooling: str,
        post_norm: bool,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.post_norm = nn.LayerNorm(width) if post_norm else nn.Identity()
        #: FedCLIP's, over the modalities' pooled features; other methods have none.
        self.adapters: nn.Module = nn.Identity()
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.lengths = list(lengths)
        self.fusion = fusion
        self.pooling = pooling

    def forward(self, smashed: Sequence[Tensor]) -> Tensor:
        """Give logits (b, k) for the smashed activations of a whole global batch.

        Parameters
        ----------
        smashed : sequence of Tensor
            Early fusion: one joint (b, l, d); late fusion: one (b, l_m, d) per modality, each
            encoded by a pass of its own.
        """
        encoded = [self.post_norm(self.encoder(tokens_bld)) for tokens_bld in smashed]
        if self.fusion == "early":
            encoded = list(encoded[0].split(self.lengths, dim=1))
        if self.pooling == "cls":
            features = self.adapters([tokens_bld[:, 0] for tokens_bld in encoded])
            pooled_bd = torch.stack(features).mean(0)
        else:
            pooled_bd = torch.cat(encoded, dim=1).mean(1)
        return self.head(pooled_bd)
