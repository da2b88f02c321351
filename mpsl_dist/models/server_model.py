"""The server's part of the model: the unified encoder W_b with what pools its tokens,
and the task head W_t, where no client owns one.

Shape legend: ``b`` batch, ``m`` modalities, ``c`` captions of a picture, ``l`` length in tokens,
``d`` width, ``k`` classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpsl_dist.models.gapped import placed

#: Width, blocks and heads of the paper's encoders (Dosovitskiy et al. 2020).
SIZES: dict[str, tuple[int, int, int]] = {
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}


def computing_in(autocast: str | None, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which matrix products are of bfloat16 for ``bf16``, and as ever for None.

    On the meta device it is the latter: torch has no autocast of shapes alone.
    """
    if autocast != "bf16" or device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


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

    def forward(
        self,
        tokens_bld: Tensor,
        begin: int = 0,
        end: int | None = None,
        present_bl: Tensor | None = None,
    ) -> Tensor:
        """Return what the blocks from ``begin`` to before ``end``, by default all, make of them.

        ``present_bl``, bool, says which tokens are there to be attended to; None is all.
        """
        # Broadcast over heads and over whatever asks.
        mask = {} if present_bl is None else {"attn_mask": present_bl[:, None, None, :]}
        with computing_in(self.autocast, tokens_bld.device):
            for block in list(self)[begin:end]:
                tokens_bld = self._pass(block, tokens_bld, mask)
        return tokens_bld

    def _pass(self, block: nn.Module, tokens_bld: Tensor, mask: Mapping[str, Tensor]) -> Tensor:
        asked = tokens_bld.requires_grad or any(p.requires_grad for p in block.parameters())
        if not (self.checkpoint_blocks and asked and torch.is_grad_enabled()):
            return block(tokens_bld, **mask)  # of a frozen prefix nothing is kept anyway
        # Not the reentrant form: it runs a backward within the backward, and reads ``.grad``, where
        # a distributed backward leaves nothing.
        return checkpoint(block, tokens_bld, use_reentrant=False, preserve_rng_state=False, **mask)


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
        self.width = width
        self.post_norm = nn.LayerNorm(width) if post_norm else nn.Identity()
        #: FedCLIP's, over the modalities' pooled features; other methods have none.
        self.adapters: nn.Module = nn.Identity()
        self.head = head
        self.lengths = list(lengths)
        self.fusion = fusion
        self.pooling = pooling
        self.apart = apart

    def forward(
        self, smashed: Sequence[Tensor], begin: int = 0, present_bm: Tensor | None = None
    ) -> Tensor:
        """Return predictions for the smashed activations of a whole global batch.

        Parameters
        ----------
        smashed : sequence of Tensor
            Early fusion: one joint (b, l, d); late fusion: one (b, l_m, d) per modality, each
            encoded by a pass of its own; of c captions (b, c * l_m, d), each by itself.
        begin : int
            The encoder's first block that they have not been through.
        present_bm : Tensor, optional
            (b, m) bool: which sample has which modality. ``smashed`` is then as of
            :class:`~mpsl_dist.models.gapped.Gapped`, whatever the fusion.

        Returns
        -------
        Tensor
            What the head makes of them: (b, k) logits, or (b, 1 + c, d) embeddings in retrieval; or
            what :meth:`features` returns, where clients own the head.
        """
        return self.head(self.features(smashed, begin, present_bm))

    def features(
        self, smashed: Sequence[Tensor], begin: int = 0, present_bm: Tensor | None = None
    ) -> Tensor:
        """Return the head's input, (b, d), or (b, m, d) where modalities stay apart; captions of
        a picture stay apart as modalities do, (b, 1 + c, d).
        """
        if present_bm is not None:
            return self._of_present(smashed, begin, present_bm)
        encoded = [self.post_norm(x_bld) for x_bld in self.encode(smashed, begin)]
        if self.pooling == "last" and not self.apart:
            return torch.stack([x_bld[:, -1] for x_bld in encoded]).mean(0)
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
        pooled = _pooled(x_bld, self.pooling)
        return pooled.unflatten(0, (-1, captions)) if captions > 1 else pooled

    def _of_present(self, smashed: Sequence[Tensor], begin: int, present_bm: Tensor) -> Tensor:
        """Return features (b, d) of samples that lack parts: means over what is there."""
        assert not self.apart
        like = smashed[0] if smashed else next(self.parameters())  # a test batch may be empty
        present_bm = present_bm.to(like.device)
        rows = dict(zip(present_bm.any(0).nonzero().flatten().tolist(), smashed, strict=True))
        encode = self._encode_joint if self.fusion == "early" else self._encode_apart
        encoded = encode(rows, begin, present_bm)
        there = (encoded.get(m) for m in range(present_bm.shape[1]))
        pooled = [None if x_bld is None else _pooled(x_bld, self.pooling) for x_bld in there]
        pooled_bmd = like.new_zeros(*present_bm.shape, self.width)
        for m, x_bd in enumerate(self.adapters(pooled)):
            if x_bd is not None:
                pooled_bmd[present_bm[:, m], m] = x_bd
        sizes = [1] * len(self.lengths) if self.pooling == "cls" else self.lengths
        # A mean over all tokens weighs a modality by its tokens.
        weights_bm = present_bm * pooled_bmd.new_tensor(sizes)
        shares_bm = weights_bm / weights_bm.sum(1, keepdim=True)
        return (pooled_bmd * shares_bm.unsqueeze(-1)).sum(1)

    def _encode_joint(
        self, rows: Mapping[int, Tensor], begin: int, present_bm: Tensor
    ) -> dict[int, Tensor]:
        """Return every modality's encoded tokens (b_m, l_m, d), by one pass over all of them."""
        if not rows:
            return {}
        lengths = [self.lengths[m] for m in rows]
        joint_bld = torch.cat([placed(x, present_bm[:, m]) for m, x in rows.items()], dim=1)
        mask_bl = torch.cat([present_bm[:, [m]].expand(-1, self.lengths[m]) for m in rows], dim=1)
        encoded_bld = self.post_norm(self.encoder(joint_bld, begin, present_bl=mask_bl))
        apart = zip(rows, encoded_bld.split(lengths, dim=1), strict=True)
        return {m: x_bld[present_bm[:, m]] for m, x_bld in apart}

    def _encode_apart(
        self, rows: Mapping[int, Tensor], begin: int, present_bm: Tensor
    ) -> dict[int, Tensor]:
        """Return the same by a pass for each modality, over those samples alone that have it."""
        rest = (begin,) if begin else ()
        return {m: self.post_norm(self.encoder(x_bld, *rest)) for m, x_bld in rows.items()}


def _pooled(x_bld: Tensor, pooling: str) -> Tensor:
    return x_bld.mean(1) if pooling == "mean" else x_bld[:, 0 if pooling == "cls" else -1]
