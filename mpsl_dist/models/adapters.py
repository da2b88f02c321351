"""FedCLIP's attention adapters (Lu et al. 2023) on the features of a frozen encoder.

Shape legend: ``b`` batch, ``c`` captions of a picture, ``d`` width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


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

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return every modality's pooled feature, (b, d) or (b, c, d), adapted if included, in
        fusion order.
        """
        adapted = []
        for name, deep, feature in zip(self.applied, self.deep, features, strict=True):
            if name not in self.by_name:
                adapted.append(feature)
            elif deep and feature.dim() == 2:
                adapted.append(self.by_name[name](feature.unsqueeze(1)).squeeze(1))
            else:
                adapted.append(self.by_name[name](feature))
        return adapted
