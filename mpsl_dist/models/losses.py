"""What a client, or whoever holds the labels, compares predictions with."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from mpsl_dist.models.retrieval import contrastive_loss


def loss_of(predictions: Tensor, labels_b: Tensor) -> Tensor:
    """Give the mean loss over the samples at hand, a scalar.

    Parameters
    ----------
    predictions : Tensor
        Logits (b, classes), compared by cross-entropy; or embeddings (b, 2, d) of pictures and
        captions, compared by the contrastive loss over the pairs at hand.
    labels_b : Tensor
        (b,) int64: the class, or which picture a caption belongs to.
    """
    labels_b = labels_b.to(predictions.device)
    if predictions.dim() == 3:
        return contrastive_loss(predictions, labels_b)
    return functional.cross_entropy(predictions, labels_b)
