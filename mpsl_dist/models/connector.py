"""ML-ECS' connector (Liu et al., section 3.1): from modalities' features to soft tokens of a
language model.

Shape legend: ``b`` batch, ``l`` length in tokens, ``f`` width of a modality's features, ``h`` the
width that modalities share, ``s`` the fused width, ``d`` the language model's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mpsl_dist.models.server_model import build_encoder
from mpsl_dist.models.tokenizers import Tokenizers


class Connector(nn.Module):
    """Projectors (Eq. 4), fusion (Eq. 9) and the soft-prompt generator (Eq. 10).

    Parameters
    ----------
    modalities : sequence of str
        Those that its owner has, in fusion order: what it lacks has no projector, and the fusion is
        as much narrower.
    features, shared, fused : int
        f, h and s; the released code has 64, 64 and 256.
    tokens, width : int
        Soft tokens of a sample, 16 in the released code, and d.
    dropout : float
        Before the generator's last layer; 0.1 in the released code.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        features: int,
        shared: int,
        fused: int,
        tokens: int,
        width: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.projectors = nn.ModuleDict({name: nn.Linear(features, shared) for name in modalities})
        together = shared * len(modalities)
        self.fusion = nn.Sequential(nn.LayerNorm(together), nn.Linear(together, fused))
        self.generator = nn.Sequential(
            nn.GELU(), nn.Dropout(dropout), nn.Linear(fused, tokens * width)
        )
        self.tokens, self.width = tokens, width

    def project(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the modalities' representations (b, h) of features (b, f), in fusion order."""
        return {
            name: projector(features[name])
            for name, projector in self.projectors.items()
            if name in features
        }

    def fuse(self, projected: Mapping[str, Tensor]) -> Tensor:
        """Return the fused representation (b, s); a modality that is not there counts as zeros."""
        like_bh = next(iter(projected.values()))
        nothing_bh = torch.zeros_like(like_bh)
        parts = [projected.get(name, nothing_bh) for name in self.projectors]
        return self.fusion(torch.cat(parts, dim=1))

    def prompt(self, fused_bs: Tensor) -> Tensor:
        """Return the soft tokens (b, l, d) of a fused representation."""
        return self.generator(fused_bs).unflatten(1, (self.tokens, self.width))

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return the soft tokens (b, l, d) of modalities' features (b, f)."""
        return self.prompt(self.fuse(self.project(features)))


class SmallEncoder(nn.Module):
    """One transformer block over a modality's tokens, and their mean: a feature of a sample.

    Without the block the mean of patches would know nothing of where they were.

    Parameters
    ----------
    width : int
        f, of the tokens and of the feature; a multiple of ``heads``.
    """

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.block = build_encoder(width, 1, heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens_blf: Tensor) -> Tensor:
        """Return features (b, f)."""
        return self.norm(self.block(tokens_blf)).mean(1)


class Connected(Tokenizers):
    """Tokenizers whose tokens never leave: small encoders and a connector make soft tokens of them.

    Parameters
    ----------
    connector : Connector
    by_modality : mapping of str to nn.Module
        Tokenizers of width f, in fusion order.
    width : int
        f.
    pre_norm : bool
        Whether a LayerNorm stands between tokenizers and encoders.
    """

    def __init__(
        self,
        connector: Connector,
        by_modality: Mapping[str, nn.Module],
        width: int,
        pre_norm: bool,
    ) -> None:
        super().__init__(by_modality, width, pre_norm)
        self.encoders = nn.ModuleDict({name: SmallEncoder(width) for name in by_modality})
        self.connector = connector

    @property
    def lengths(self) -> list[int]:
        """Tokens that leave: the soft tokens, of all modalities together."""
        return [self.connector.tokens]

    def features(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the modalities' features (b, f) of inputs."""
        return self._encoded(dict(zip(self.by_modality, super().forward(inputs), strict=True)))

    def connect(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Return the soft tokens (b, l, d) of modalities' own tokens (b, l_m, f)."""
        return self.connector(self._encoded(tokens))

    def forward(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the soft tokens (b, l, d) of inputs, alone in a list."""
        return [self.connector(self.features(inputs))]

    def _encoded(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.encoders[name](x_blf) for name, x_blf in tokens.items()}
