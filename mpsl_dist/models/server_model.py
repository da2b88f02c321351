"""The server's part of the model: the unified encoder W_b with what pools its tokens,
and the task head W_t, where no client owns one.

Shape legend: ``b`` batch, ``m`` modalities, ``l`` length in tokens, ``d`` width, ``k`` classes.
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
    pooling : "cls", "mean" or "last"
        Mean over every modality's first token, or over all tokens; or the last token alone, of
        each pass of the encoder.
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
            encoded by a pass of its own.
        begin : int
            The encoder's first block that they have not been through.

        Returns
        -------
        Tensor
            What the head makes of them: (b, k) logits, or (b, 2, d) embeddings in retrieval; or
            what :meth:`features` returns, where clients own the head.
        """
        return self.head(self.features(smashed, begin))

    def features(self, smashed: Sequence[Tensor], begin: int = 0) -> Tensor:
        """Return the head's input, (b, d), or (b, m, d) where modalities stay apart."""
        rest = (begin,) if begin else ()  # any module may stand in for the whole encoder
        encoded = [self.post_norm(self.encoder(tokens_bld, *rest)) for tokens_bld in smashed]
        if self.pooling == "last" and not self.apart:
            return torch.stack([x_bld[:, -1] for x_bld in encoded]).mean(0)
        if self.fusion == "early":
            encoded = list(encoded[0].split(self.lengths, dim=1))
        if self.pooling == "mean" and not self.apart:
            return torch.cat(encoded, dim=1).mean(1)
        pooled = [_pooled(x_bld, self.pooling) for x_bld in encoded]
        features_bmd = torch.stack(list(self.adapters(pooled)), dim=1)
        return features_bmd if self.apart else features_bmd.mean(1)


def _pooled(x_bld: Tensor, pooling: str) -> Tensor:
    return x_bld.mean(1) if pooling == "mean" else x_bld[:, 0 if pooling == "cls" else -1]
