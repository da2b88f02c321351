"""The server's part of the model: the unified ViT encoder W_b with what pools its tokens,
and the task head W_t, where no client owns one.

Shape legend: ``b`` batch, ``m`` modalities, ``c`` captions of a picture, ``l`` length in tokens,
``d`` width, ``k`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

#: Width, blocks and heads of the paper's encoders (Dosovitskiy et al. 2020).
SIZES: dict[str, tuple[int, int, int]] = {
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}


class Encoder(nn.Sequential):
    """Blocks one after the other, (b, l, d) -> (b, l, d)."""

    #: ``bf16``: blocks compute in bfloat16 where torch's autocast has it so; their input, their
    #: output and what is summed along the way keep their own type.
    autocast: str | None = None
    #: Keep the input of every block alone for the backward, which computes the block again.
    checkpoint_blocks: bool = False

    @property
    def frozen_blocks(self) -> int:
        """How many blocks at the beginning nobody trains."""
        trained = (i for i, b in enumerate(self) if any(p.requires_grad for p in b.parameters()))
        return next(trained, len(self))

    def forward(self, tokens_bld: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
        """Return what the blocks from ``begin`` to before ``end``, by default all, make of them."""
        kind = tokens_bld.device.type
        # torch has no autocast of shapes alone.
        cast = torch.autocast(kind, torch.bfloat16) if kind != "meta" else nullcontext()
        with cast if self.autocast == "bf16" else nullcontext():
            for block in list(self)[begin:end]:
                tokens_bld = self._pass(block, tokens_bld)
        return tokens_bld

    def _pass(self, block: nn.Module, tokens_bld: Tensor) -> Tensor:
        asked = tokens_bld.requires_grad or any(p.requires_grad for p in block.parameters())
        if not (self.checkpoint_blocks and asked and torch.is_grad_enabled()):
            return block(tokens_bld)  # of a frozen prefix nothing is kept anyway
        # Not the reentrant form: it runs a backward within the backward, and reads ``.grad``, where
        # a distributed backward leaves nothing.
        return checkpoint(block, tokens_bld, use_reentrant=False, preserve_rng_state=False)


def build_encoder(
    width: int, depth: int, heads: int, trainable_blocks: int | str = "all"
) -> Encoder:
    """Stack timm's pre-norm transformer blocks (MLP x4, qkv bias, LayerNorm eps 1e-5).

    Parameters
    ----------
    width, depth, heads : int
        d, the number of blocks, attention heads per block.
    trainable_blocks : int or "all"
        The last k blocks are trained, the others frozen.

    Returns
    -------
    Encoder
        (b, l, d) -> (b, l, d); the state keys ``0.norm1.weight`` ... are Meta-Transformer's.
    """
    from timm.models.vision_transformer import Block

    # torch's own initial weights: ViT's fixed std of 0.02 is made for width 768, and a narrow
    # encoder trained from scratch learns several times slower with it.
    norm = partial(nn.LayerNorm, eps=1e-5)
    encoder = Encoder(
        *(Block(width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm) for _ in range(depth))
    )
    if trainable_blocks != "all":
        for block in encoder[: max(0, depth - int(trainable_blocks))]:
            block.requires_grad_(False)
    return encoder


class ServerModel(nn.Module):
    """A backbone (encoder, norm, adapters, pooling) and a head (Eq. 3).

    Parameters
    ----------
    encoder : Encoder
        (b, l, d) -> (b, l, d).
    width : int
        d.
    lengths : sequence of int
        Tokens per modality, in fusion order.
    head : nn.Module
        Features to predictions, see :mod:`mpsl_dist.models.heads`; an identity where clients own
        the head, and the features themselves are returned.
    fusion : "early" or "late"
    pooling : "cls" or "mean"
        Mean over every modality's first token, or over all tokens.
    post_norm : bool
        A trained LayerNorm after the encoder.
    apart : bool
        Whether the head takes every modality's features by themselves, (b, m, d), in place of their
        mean (b, d).
    """

    def __init__(
        self,
        encoder: Encoder,
        width: int,
        lengths: Sequence[int],
        head: nn.Module,
        fusion: str,
        pooling: str,
        post_norm: bool,
        apart: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.post_norm = nn.LayerNorm(width) if post_norm else nn.Identity()
        #: FedCLIP's, over the modalities' pooled features; other methods have none.
        self.adapters: nn.Module = nn.Identity()
        self.head = head
        self.lengths = list(lengths)
        self.fusion = fusion
        self.pooling = pooling
        self.apart = apart

    def forward(self, smashed: Sequence[Tensor], begin: int = 0) -> Tensor:
        """Return predictions for the smashed activations of a whole global batch.

        Parameters
        ----------
        smashed : sequence of Tensor
            Early fusion: one joint (b, l, d); late fusion: one (b, l_m, d) per modality, each
            encoded by a pass of its own; of c captions (b, c * l_m, d), each by itself.
        begin : int
            The encoder's first block that they have not been through.

        Returns
        -------
        Tensor
            What the head makes of them: (b, k) logits, or (b, 1 + c, d) embeddings in retrieval; or
            what :meth:`features` returns, where clients own the head.
        """
        return self.head(self.features(smashed, begin))

    def features(self, smashed: Sequence[Tensor], begin: int = 0) -> Tensor:
        """Return the head's input, (b, d), or (b, m, d) where modalities stay apart; captions of
        a picture stay apart as modalities do, (b, 1 + c, d).
        """
        encoded = [self.post_norm(x_bld) for x_bld in self.encode(smashed, begin)]
        if self.fusion == "early":
            encoded = list(encoded[0].split(self.lengths, dim=1))
        if self.pooling == "mean" and not self.apart:
            return torch.cat(encoded, dim=1).mean(1)
        pooled = [self._pool(*one) for one in zip(encoded, self.lengths, strict=True)]
        adapted = [x.unsqueeze(1) if x.dim() == 2 else x for x in self.adapters(pooled)]
        features_bmd = torch.cat(adapted, dim=1)
        return features_bmd if self.apart else features_bmd.mean(1)

    def encode(
        self, smashed: Sequence[Tensor], begin: int = 0, end: int | None = None
    ) -> list[Tensor]:
        """Return what the encoder's blocks from ``begin`` to before ``end`` make of each."""
        rest = {"begin": begin} if begin else {}  # any module may stand in for the whole encoder
        rest |= {} if end is None else {"end": end}
        lengths = self.lengths if self.fusion == "late" else [sum(self.lengths)]
        encoded = []
        for tokens_bld, length in zip(smashed, lengths, strict=True):
            captions = tokens_bld.shape[1] // length
            if captions > 1:  # texts that attend to each other would tell which belong together
                each = tokens_bld.unflatten(1, (captions, length)).flatten(0, 1)
                encoded.append(self.encoder(each, **rest).reshape_as(tokens_bld))
            else:
                encoded.append(self.encoder(tokens_bld, **rest))
        return encoded

    def _pool(self, x_bld: Tensor, length: int) -> Tensor:
        """Return a modality's feature, (b, d); of c captions (b, c, d)."""
        captions = x_bld.shape[1] // length
        if captions > 1:
            x_bld = x_bld.unflatten(1, (captions, length)).flatten(0, 1)
        pooled = x_bld[:, 0] if self.pooling == "cls" else x_bld.mean(1)
        return pooled.unflatten(0, (-1, captions)) if captions > 1 else pooled
