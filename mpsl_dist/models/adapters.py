"""Adapters of frozen encoders: FedCLIP's attention adapters (Lu et al. 2023) on their features, and
bottlenecks on their rows (Houlsby et al. 2019).

Shape legend: ``b`` batch, ``c`` captions of a picture, ``l`` length in rows, ``d`` width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


class AttentionAdapter(nn.Module):
    """Weight a pooled feature by a(x) = Softmax(Linear(Tanh(Linear(x)))).

    Parameters
    ----------
    width : int
        d.
    form : "scaled", "released" or "residual"
        ``scaled`` is x * a(x): the d weights sum to one, so a feature comes out about d times
        smaller. ``released`` is the same with the released code's softmax, over the second axis:
        over the features of what is (b, d), as here, and over the captions of a text that is
        (b, c, d), where one caption alone is left as it is, a(x) = 1. ``residual`` is x + x * a(x),
        which keeps the feature's size.
    """

    def __init__(self, width: int, form: str) -> None:
        super().__init__()
        over = 1 if form == "released" else -1
        self.attention = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Softmax(dim=over)
        )
        self.form = form

    def forward(self, feature: Tensor) -> Tensor:
        """Return the weighted feature, of the same shape, of a feature (b, d) or (b, c, d)."""
        weighted = feature * self.attention(feature)
        return feature + weighted if self.form == "residual" else weighted


class Adapters(nn.Module):
    """One adapter per included modality, or one for all.

    Parameters
    ----------
    modalities : sequence of str
        Of the dataset, in fusion order.
    include : sequence of str or "unified"
        Which of them are adapted; ``unified`` passes all through the same adapter.
    width, form : int, str
        As of :class:`AttentionAdapter`.
    late : bool
        Whether modalities are encoded apart: the released code then has a text as (b, c, d).
    """

    def __init__(
        self,
        modalities: Sequence[str],
        include: Sequence[str] | str,
        width: int,
        form: str,
        late: bool = False,
    ) -> None:
        super().__init__()
        unified = include == "unified"
        names = ["unified"] if unified else [name for name in modalities if name in include]
        self.by_name = nn.ModuleDict({name: AttentionAdapter(width, form) for name in names})
        self.applied = ["unified" if unified else name for name in modalities]
        self.deep = [late and form == "released" and name == "text" for name in modalities]

    def forward(self, features: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return every modality's pooled feature, (b, d) or (b, c, d), adapted if included, in
        fusion order; None of a modality that no sample has.
        """
        return [
            self._adapted(name, deep, feature) if feature is not None else None
            for name, deep, feature in zip(self.applied, self.deep, features, strict=True)
        ]

    def _adapted(self, name: str, deep: bool, feature: Tensor) -> Tensor:
        if name not in self.by_name:
            return feature
        if deep and feature.dim() == 2:
            return self.by_name[name](feature.unsqueeze(1)).squeeze(1)
        return self.by_name[name](feature)


class BottleneckAdapter(nn.Module):
    """Two narrow layers between a layer down and a layer up, (b, l, d) -> (b, l, d).

    Parameters
    ----------
    width, rank : int
        d, and the width of the narrow layers.
    added : bool
        Whether what comes out is added to something: it then begins as zeros, so that the adapter
        begins as if it were not there.
    """

    def __init__(self, width: int, rank: int, added: bool) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.update = nn.Linear(rank, rank)
        self.up = nn.Linear(rank, width)
        if added:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, rows_bld: Tensor) -> Tensor:
        """Return (b, l, d)."""
        narrow = functional.gelu(self.down(rows_bld))
        return self.up(functional.gelu(self.update(narrow)))
