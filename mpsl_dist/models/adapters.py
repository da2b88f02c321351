"""Adapters of frozen encoders: FedCLIP's attention adapters (Lu et al. 2023) on their features, and
bottlenecks on their rows (Houlsby et al. 2019).

Shape legend: ``b`` batch, ``l`` length in rows, ``d`` width.
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
    form : "scaled" or "residual"
        ``scaled`` is the released form, x * a(x): the d weights sum to one, so a feature comes out
        about d times smaller. ``residual`` is x + x * a(x), which keeps the feature's size.
    """

    def __init__(self, width: int, form: str) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Softmax(dim=-1)
        )
        self.form = form

    def forward(self, feature_bd: Tensor) -> Tensor:
        """Return the weighted feature, (b, d), of a feature (b, d)."""
        weighted_bd = feature_bd * self.attention(feature_bd)
        return weighted_bd if self.form == "scaled" else feature_bd + weighted_bd


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
    """

    def __init__(
        self, modalities: Sequence[str], include: Sequence[str] | str, width: int, form: str
    ) -> None:
        super().__init__()
        unified = include == "unified"
        names = ["unified"] if unified else [name for name in modalities if name in include]
        self.by_name = nn.ModuleDict({name: AttentionAdapter(width, form) for name in names})
        self.applied = ["unified" if unified else name for name in modalities]

    def forward(self, features: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return every modality's pooled feature (b, d), adapted if included, in fusion order;
        None of a modality that no sample has.
        """
        return [
            self.by_name[name](x_bd) if x_bd is not None and name in self.by_name else x_bd
            for name, x_bd in zip(self.applied, features, strict=True)
        ]


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
