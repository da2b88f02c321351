"""Task heads W_t: what turns pooled features into predictions.

Shape legend: ``b`` batch, ``m`` modalities, ``c`` captions of a picture, ``d`` width, ``k``
classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class HeadFacts:
    """A head that ``model.head.kind`` may name.

    Attributes
    ----------
    build : callable, or its name as "package.module:attribute"
        ``build(width, classes, options)`` returns a module from features to predictions. Features
        are (b, d), the mean over the modalities; or, where ``apart``, (b, m, d).
    task : str
        The task whose predictions it makes, a key of :data:`mpsl_dist.models.tasks.TASKS`.
    apart : bool
        Whether it receives every modality's features by themselves.
    options : type, optional
        A frozen dataclass: what ``model.head.options`` may say.
    reads : tuple of str
        Keys of ``model`` that set options of the same name, where ``model.head.options`` does not.
    """

    build: str | Callable[..., nn.Module]
    task: str
    apart: bool = False
    options: type | None = None
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class EmbeddingOptions:
    """Options of :class:`PairEmbedding`; ``model.normalize`` and ``model.temperature`` set them."""

    normalize: bool = False
    temperature: float | None = None


class PairEmbedding(nn.Module):
    """Embeddings of pictures and captions whose plain dot product is the logit.

    There is no projection, as in the released code.

    Parameters
    ----------
    normalize : bool
        Scale embeddings to unit length (before the temperature).
    temperature : float or None
        First value of a trained temperature; None has none. Pictures are scaled by 1/temperature,
        so that a plain dot product with a caption is the logit, wherever it is formed.
    """

    def __init__(self, normalize: bool, temperature: float | None) -> None:
        super().__init__()
        self.normalize = normalize
        self.log_scale = None
        if temperature is not None:
            self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self, features_bmd: Tensor) -> Tensor:
        """Return embeddings (b, 1 + c, d) of a picture and its captions."""
        if self.normalize:
            features_bmd = functional.normalize(features_bmd, dim=2)
        image_b1d, text_bcd = features_bmd[:, :1], features_bmd[:, 1:]
        if self.log_scale is not None:
            # As CLIP: a scale of at most 100 keeps the loss from running away.
            image_b1d = image_b1d * self.log_scale.clamp(max=math.log(100)).exp()
        return torch.cat([image_b1d, text_bcd], dim=1)


def linear(width: int, classes: int, options: None = None) -> nn.Linear:
    """Return a linear classifier, (b, d) -> (b, k)."""
    head = nn.Linear(width, classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def embeddings(width: int, classes: int, options: EmbeddingOptions) -> PairEmbedding:
    """Return retrieval's head, (b, 1 + c, d) -> (b, 1 + c, d)."""
    return PairEmbedding(options.normalize, options.temperature)


HEADS: dict[str, HeadFacts] = {
    "linear": HeadFacts(linear, "classification"),
    "embeddings": HeadFacts(
        embeddings,
        "retrieval",
        apart=True,
        options=EmbeddingOptions,
        reads=("normalize", "temperature"),
    ),
}
