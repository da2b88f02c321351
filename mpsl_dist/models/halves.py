"""The two halves of every modality's own encoder (M²FedSA), and what stands around them.

A client has the lower half of one encoder, an adapter at its end, and a classifier; the server has
all upper halves, an adapter in each, and the fusion. An encoder is pretrained, or our own ViT: a
:class:`~mpsl_dist.models.pretrained.Part` in either case.

Shape legend: ``b`` batch, ``l`` length in rows, ``w`` width of a row, ``d`` width of a feature,
``m`` modalities, ``k`` classes, ``h`` heads, ``q`` width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpsl_dist.models.adapters import BottleneckAdapter


class Adapted(nn.Module):
    """Blocks one after the other, and an adapter at their end.

    Rows of zeros are empty places and stay so; of a map (b, w, rows, columns) every place is a row.

    Parameters
    ----------
    blocks : nn.Sequential
    adapter : BottleneckAdapter
    form : "residual", "parallel" or "plain"
        y + a(y), y + a(x) where the last block makes y of x, or a(y).
    """

    def __init__(self, blocks: nn.Sequential, adapter: BottleneckAdapter, form: str) -> None:
        super().__init__()
        self.blocks, self.adapter, self.form = blocks, adapter, form

    def forward(self, x: Tensor) -> Tensor:
        """Return what the last block does, adapted."""
        before = x
        for block in self.blocks:
            before, x = x, block(x)
        if self.form == "plain":
            return self._adapt(x)
        return x + self._adapt(before if self.form == "parallel" else x)

    def _adapt(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return self.adapter(x.movedim(1, -1)).movedim(-1, 1)
        empty_bl1 = (x == 0).all(-1, keepdim=True)
        return self.adapter(x).masked_fill(empty_bl1, 0)


class UpperHalf(nn.Module):
    """The server's half of a modality's encoder, from the cut layer to one feature a sample.

    Parameters
    ----------
    body : Adapted
        The blocks after the cut.
    end : nn.Module
        What it returns -> rows (b, l, w).
    pooling : "cls" or "mean"
        The first row, or the mean of those that are no empty places.
    project : nn.Module
        (b, w) -> (b, d).
    """

    def __init__(self, body: Adapted, end: nn.Module, pooling: str, project: nn.Module) -> None:
        super().__init__()
        self.body, self.end, self.pooling, self.project = body, end, pooling, project

    def forward(self, cut: Tensor) -> Tensor:
        """Return (b, d)."""
        rows_blw = self.end(self.body(cut))
        if self.pooling == "cls":
            return self.project(rows_blw[:, 0])
        there_b1 = (rows_blw != 0).any(-1).sum(1).clamp_min(1)[:, None]
        return self.project(rows_blw.sum(1) / there_b1)


class Heads(nn.Module):
    """The classifiers of some modalities; a client has that of its own alone.

    Parameters
    ----------
    by_modality : mapping of str to nn.Module
        (b, d) -> (b, k).
    """

    def __init__(self, by_modality: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.by_modality = nn.ModuleDict(by_modality)

    def forward(self, feature_bd: Tensor) -> Tensor:
        """Return the only one's logits (b, k)."""
        (own,) = self.by_modality.values()
        return own(feature_bd)


class Fusion(nn.Module):
    """One feature and its logits, of the features of all modalities.

    Parameters
    ----------
    modalities, width, heads, classes : int
        m, d, h and k.
    attention : "modalities" or "batch"
        Whether a sample's modalities attend to each other, or the samples of a mini-batch, all
        modalities of each side by side: then a prediction depends on the other samples.
    """

    def __init__(
        self, modalities: int, width: int, heads: int, classes: int, attention: str
    ) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        together = 1 if attention == "modalities" else modalities
        self.attend = nn.Linear(together * width, 3 * width)
        self.reduce = nn.Linear(width * modalities // together, width)
        self.head = nn.Linear(width, classes)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits (b, k) and the feature (b, d), of features (b, d)."""
        if self.attention == "batch":
            rows = torch.cat(list(features), dim=1)[None]  # one sequence, of b rows
        else:
            rows = torch.stack(list(features), dim=1)  # b sequences, of m rows
        projected = self.attend(rows).unflatten(-1, (3, self.heads, -1))
        query, key, value = (x.transpose(1, 2) for x in projected.unbind(2))
        attended = functional.scaled_dot_product_attention(query, key, value)
        joined_bw = attended.transpose(1, 2).flatten(2)
        joined_bw = joined_bw[0] if self.attention == "batch" else joined_bw.flatten(1)
        feature_bd = functional.gelu(self.reduce(joined_bw))
        return self.head(feature_bd), feature_bd


class UpperModel(nn.Module):
    """All that the server has: every modality's upper half, and the fusion.

    Parameters
    ----------
    encoders : mapping of str to UpperHalf
        By modality, in the order of fusion.
    fusion : Fusion
    """

    def __init__(self, encoders: Mapping[str, UpperHalf], fusion: Fusion) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.fusion = fusion

    def adapters(self) -> list[BottleneckAdapter]:
        """Return the modalities' task adapters."""
        return [half.body.adapter for half in self.encoders.values()]
