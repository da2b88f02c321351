"""Pretrained encoders in a client's tokenizers: MiniLM, Whisper's encoder, EfficientNet-Lite0.

Each is a :class:`Part`: an embedding, blocks one after the other, and an end, so that it can be cut
after any block into a client's share and a server's.

Shape legend: ``b`` batch, ``l`` length in rows, ``f`` features of a row, ``t`` frames, ``m`` mel
bins, ``c`` channels, ``h`` height, ``w`` width, ``d`` the encoder's width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Rows of MiniLM's vocabulary, and the number of an empty place in a text.
WORDS, PAD = 30_522, 0
#: Longest text in WordPiece tokens, and longest spectrogram in frames: what has positions.
LONGEST_TEXT, LONGEST_SOUND = 512, 3_000
#: Side of the smallest picture that EfficientNet makes something of, in pixels.
SMALLEST_PICTURE = 64
#: Halvings of a picture's side in EfficientNet.
_HALVINGS = 5


class Part(nn.Module):
    """A pretrained encoder that can be cut between its blocks.

    Parameters
    ----------
    embed : nn.Module
        Inputs -> what the first block takes.
    blocks : nn.Sequential
        Each takes one tensor, and returns one: all that crosses a cut.
    end : nn.Module
        What the last block returns -> features (b, l, f). A row of zeros is an empty place.
    width : int
        f.
    """

    def __init__(self, embed: nn.Module, blocks: nn.Sequential, end: nn.Module, width: int) -> None:
        super().__init__()
        self.embed, self.blocks, self.end = embed, blocks, end
        self.width = width

    def low(self, cut: int) -> nn.Sequential:
        """Return the embedding and the first ``cut`` blocks; weights are shared, not copied."""
        return nn.Sequential(self.embed, *self._cut(cut, low=True))

    def high(self, cut: int) -> nn.Sequential:
        """Return the blocks after the first ``cut`` and the end: ``high(c)`` follows ``low(c)``."""
        return nn.Sequential(*self._cut(cut, low=False), self.end)

    def _cut(self, cut: int, low: bool) -> nn.Sequential:
        if not 0 <= cut <= len(self.blocks):
            raise ValueError(f"cut after block {cut} of {len(self.blocks)}")
        return self.blocks[:cut] if low else self.blocks[cut:]

    def train_last(self, blocks: int | str) -> None:
        """Freeze all but the last so many blocks and the end; ``all`` trains everything."""
        self.requires_grad_(blocks == "all")
        if blocks != "all" and int(blocks) > 0:
            self.high(max(0, len(self.blocks) - int(blocks))).requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (b, l, f)."""
        return self.end(self.blocks(self.embed(x)))


class PartTokenizer(nn.Module):
    """Tokens of width d of a part's features: first their mean, then each of them.

    Parameters
    ----------
    part : Part
    length : int
        Features of one input, l.
    dimension : int
        Width d of a token.
    """

    def __init__(self, part: Part, length: int, dimension: int) -> None:
        super().__init__()
        self.part = part
        self.length = length + 1
        self.project = nn.Linear(part.width, dimension)
        self.positions = nn.Parameter(torch.empty(1, self.length, dimension))
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (b, l + 1, d)."""
        features_blf = self.part(x)
        rows_b11 = (features_blf != 0).any(-1).sum(1).clamp_min(1)[:, None, None]
        mean_b1f = features_blf.sum(1, keepdim=True) / rows_b11
        return self.project(torch.cat([mean_b1f, features_blf], dim=1)) + self.positions


# -- MiniLM: BERT, six post-norm layers (Wang et al. 2020; Reimers and Gurevych 2019) ----------


class WordEmbedding(nn.Module):
    """Embed WordPiece tokens (b, l), int64; an empty place becomes a row of zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.positions = nn.Parameter(torch.randn(LONGEST_TEXT, width))
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, tokens_bl: Tensor) -> Tensor:
        """Return (b, l, f)."""
        embedded_blf = self.norm(self.words(tokens_bl) + self.positions[: tokens_bl.shape[1]])
        empty_bl = tokens_bl == PAD
        empty_bl[:, 0] = False  # no text is without its start
        return embedded_blf.masked_fill(empty_bl[..., None], 0)


class PaddedLayer(nn.TransformerEncoderLayer):
    """A layer that no row of zeros, an empty place, takes part in; it stays one."""

    def forward(self, rows_blf: Tensor) -> Tensor:
        """Return (b, l, f)."""
        empty_bl = (rows_blf == 0).all(-1)
        out_blf = super().forward(rows_blf, src_key_padding_mask=empty_bl)
        return out_blf.masked_fill(empty_bl[..., None], 0)


def minilm() -> Part:
    """Build all-MiniLM-L6-v2 with random weights: (b, l) WordPiece tokens -> (b, l, 384)."""
    width = 384
    layers = [_layer(PaddedLayer, width, heads=12, pre_norm=False) for _ in range(6)]
    return Part(WordEmbedding(width), nn.Sequential(*layers), nn.Identity(), width)


def _layer(
    kind: type[nn.TransformerEncoderLayer], width: int, heads: int, pre_norm: bool
) -> nn.TransformerEncoderLayer:
    return kind(
        width,
        heads,
        4 * width,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=1e-5 if pre_norm else 1e-12,
        batch_first=True,
        norm_first=pre_norm,
    )


# -- Whisper tiny.en's encoder, four pre-norm layers (Radford et al. 2022) ---------------------


class SoundEmbedding(nn.Module):
    """Embed log-mel frames (b, t, m), every two of them in one row."""

    def __init__(self, bins: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(bins, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.positions = nn.Parameter(torch.randn(LONGEST_SOUND // 2, width))

    def forward(self, mels_btm: Tensor) -> Tensor:
        """Return (b, l, f)."""
        wide_bft = functional.gelu(self.conv1(mels_btm.transpose(1, 2)))
        rows_blf = functional.gelu(self.conv2(wide_bft)).transpose(1, 2)
        return rows_blf + self.positions[: rows_blf.shape[1]]


def whisper_tiny() -> Part:
    """Build the encoder with random weights: (b, t, 80) log-mel -> (b, ceil(t / 2), 384)."""
    width = 384
    layers = [_layer(nn.TransformerEncoderLayer, width, 6, pre_norm=True) for _ in range(4)]
    return Part(SoundEmbedding(80, width), nn.Sequential(*layers), nn.LayerNorm(width), width)


# -- EfficientNet-Lite0 (Tan and Le 2019), seven stages ----------------------------------------


class PictureEmbedding(nn.Module):
    """Run the first convolution on pictures (b, c, h, w) of three colours or one grey.

    Smaller pictures than :data:`SMALLEST_PICTURE` are enlarged by a whole number, bilinearly.
    """

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem = stem

    def forward(self, pixels_bchw: Tensor) -> Tensor:
        """Return (b, 32, ceil(h / 2), ceil(w / 2))."""
        coloured_bchw = pixels_bchw.expand(-1, 3, -1, -1)
        times = _enlarged(*pixels_bchw.shape[2:])
        if times > 1:
            coloured_bchw = functional.interpolate(coloured_bchw, None, times, mode="bilinear")
        return self.stem(coloured_bchw)


class _AsRows(nn.Module):
    def forward(self, map_bfhw: Tensor) -> Tensor:
        return map_bfhw.flatten(2).transpose(1, 2)


def lite0_net() -> nn.Module:
    """Build timm's EfficientNet-Lite0, as TensorFlow pads it, with its batch norms and its head."""
    import timm

    return timm.create_model("tf_efficientnet_lite0")


def lite0_part(net: nn.Module) -> Part:
    """Return a part of :func:`lite0_net`: (b, 3, h, w) -> (b, ceil(h / 32) ceil(w / 32), 320).

    Batch norms are folded into the convolutions before them, for good: what a picture becomes
    depends on no other picture, and no running mean differs between clients. The head is left.
    """
    _fold_norms(net)
    stem = nn.Sequential(net.conv_stem, net.bn1)
    return Part(PictureEmbedding(stem), net.blocks, _AsRows(), 320)


@torch.no_grad()
def _fold_norms(net: nn.Module) -> None:
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    for parent in list(net.modules()):
        conv: nn.Conv2d | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                conv = child
            elif isinstance(child, nn.BatchNorm2d):
                assert conv is not None
                mean, variance = child.running_mean, child.running_var
                norm = (mean, variance, child.eps, child.weight, child.bias)
                conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *norm)
                setattr(parent, name, child.act)


def efficientnet_lite0() -> Part:
    """Build EfficientNet-Lite0's features with random weights, see :func:`lite0_part`."""
    return lite0_part(lite0_net())


def _enlarged(height: int, width: int) -> int:
    return -(-SMALLEST_PICTURE // min(height, width))


# -- all of them -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartFacts:
    """A pretrained part of a configuration.

    Attributes
    ----------
    build : callable
        Returns it with random weights.
    length : callable
        One input's shape -> the number of its features.
    """

    build: Callable[[], Part]
    length: Callable[[tuple[int, ...]], int]


def _rows_of_a_picture(shape: tuple[int, ...]) -> int:
    times, scale = _enlarged(*shape[1:]), 2**_HALVINGS
    rows, columns = (-(-side * times // scale) for side in shape[1:])
    return rows * columns


#: Name -> part; the names are those of :data:`mpsl_dist.wheels.WHEELS`.
PARTS: dict[str, PartFacts] = {
    "minilm": PartFacts(minilm, lambda shape: shape[0]),
    "whisper-tiny": PartFacts(whisper_tiny, lambda shape: -(-shape[0] // 2)),
    "efficientnet-lite0": PartFacts(efficientnet_lite0, _rows_of_a_picture),
}
