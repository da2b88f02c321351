"""What is to be learned: the loss, the score and the metrics of a task.

Shape legend: ``b`` batch, ``k`` classes, ``d`` width, ``n`` pictures, ``m`` captions, ``c``
captions of a sample: one of a pair.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

#: Predictions and labels of some test samples.
Tested = tuple[Tensor, Tensor]


class Task(Protocol):
    """A task.

    Attributes
    ----------
    name : str
        Its key in :data:`TASKS`, which a head's facts name.
    head : str
        The head that it has unless ``model.head.kind`` names another.
    fusion : str or None
        How modalities must meet, where the task leaves no choice.
    scored_apart : bool
        Whether a test set may be scored in parts, and so lie with the clients.
    contrasts : bool
        Whether its loss compares samples with each other, so that ``contrastive`` has a meaning.
    """

    name: str
    head: str
    fusion: str | None
    scored_apart: bool
    contrasts: bool

    def loss(self, predictions: Tensor, labels_b: Tensor) -> Tensor:
        """Return the mean loss over the samples at hand, a scalar."""
        ...

    def score(self, predictions: Tensor, labels_b: Tensor) -> int:
        """Return how many predictions are right."""
        ...

    def metrics(self, tested: Iterable[Tested]) -> dict[str, float]:
        """Return metric name -> fraction over a whole test set, given batch by batch."""
        ...


@dataclass(frozen=True)
class Classification:
    """One class a sample: cross-entropy over logits (b, k)."""

    name: str = "classification"
    head: str = "linear"
    fusion: str | None = None
    scored_apart: bool = True
    contrasts: bool = False

    def loss(self, predictions: Tensor, labels_b: Tensor) -> Tensor:
        """Return the mean cross-entropy, a scalar.

        Parameters
        ----------
        predictions : Tensor
            (b, k) logits.
        labels_b : Tensor
            (b,) int64, the classes.
        """
        return functional.cross_entropy(predictions, labels_b.to(predictions.device))

    def score(self, predictions: Tensor, labels_b: Tensor) -> int:
        """Return how many samples have their largest logit at their class."""
        return int((predictions.argmax(1) == labels_b.to(predictions.device)).sum())

    def metrics(self, tested: Iterable[Tested]) -> dict[str, float]:
        """Return ``accuracy``."""
        right = samples = 0
        for predictions, labels_b in tested:
            right += self.score(predictions, labels_b)
            samples += len(labels_b)
        return {"accuracy": right / samples}


@dataclass(frozen=True)
class Retrieval:
    """Pictures and captions that belong together: a contrast of embeddings (b, 1 + c, d)."""

    name: str = "retrieval"
    head: str = "embeddings"
    fusion: str | None = "late"
    scored_apart: bool = False
    contrasts: bool = True

    def loss(self, predictions: Tensor, labels_b: Tensor) -> Tensor:
        """Return the contrastive loss over the samples at hand, a scalar.

        Parameters
        ----------
        predictions : Tensor
            (b, 1 + c, d) embeddings of pictures and captions.
        labels_b : Tensor
            (b,) int64, which picture a caption belongs to.
        """
        return contrastive_loss(predictions, labels_b.to(predictions.device))

    def score(self, predictions: Tensor, labels_b: Tensor) -> int:
        """Fail: recall ranks over the whole test set and has no parts."""
        raise AssertionError("retrieval is scored over the whole test set")

    def metrics(self, tested: Iterable[Tested]) -> dict[str, float]:
        """Return R@1, R@5 and R@10 both ways, see :func:`recalls`."""
        embedded, belongs = zip(*tested, strict=True)
        embeddings, pictures = torch.cat(embedded), torch.cat(belongs).tolist()
        first = {picture: row for row, picture in reversed(list(enumerate(pictures)))}
        rows = {picture: row for row, picture in enumerate(first)}
        picture_m = torch.tensor([rows[picture] for picture in pictures])
        picture_m = picture_m.repeat_interleave(embeddings.shape[1] - 1)
        return recalls(
            embeddings[list(first.values()), 0], embeddings[:, 1:].flatten(0, 1), picture_m
        )


TASKS: dict[str, Task] = {task.name: task for task in (Classification(), Retrieval())}


def contrastive_loss(embeddings_bmd: Tensor, pictures_b: Tensor) -> Tensor:
    """Return CLIP's bidirectional InfoNCE (Radford et al. 2021) over the samples at hand, a scalar.

    Half of it ranks captions for every picture, half pictures for every caption. Another caption
    of the same picture is no negative: such entries are left out of the sums. Of pictures with c
    captions it is the sum over the first of every picture, the second and so on, as in the released
    code.

    Parameters
    ----------
    embeddings_bmd : Tensor
        (b, 1 + c, d), picture and captions.
    pictures_b : Tensor
        (b,) int64, equal where two samples share a picture.
    """
    image_bd, *texts = embeddings_bmd.unbind(1)
    return sum(_info_nce(image_bd, text_bd, pictures_b) for text_bd in texts)


def _info_nce(image_bd: Tensor, text_bd: Tensor, pictures_b: Tensor) -> Tensor:
    logits_bb = image_bd @ text_bd.T
    own = torch.eye(len(logits_bb), dtype=torch.bool, device=logits_bb.device)
    same = pictures_b[:, None] == pictures_b[None, :]
    logits_bb = logits_bb.masked_fill(same & ~own, -torch.inf)
    target_b = torch.arange(len(logits_bb), device=logits_bb.device)
    forth = functional.cross_entropy(logits_bb, target_b)
    back = functional.cross_entropy(logits_bb.T, target_b)
    return (forth + back) / 2


def recalls(image_nd: Tensor, text_md: Tensor, picture_m: Tensor) -> dict[str, float]:
    """Return R@1, R@5 and R@10 both ways over a whole test set.

    Text to image counts captions whose picture is among the k nearest; image to text counts
    pictures with any of their captions among the k nearest.

    Parameters
    ----------
    image_nd, text_md : Tensor
        (n, d) and (m, d) embeddings: one row per picture, one per caption.
    picture_m : Tensor
        (m,) int64: the row in ``image_nd`` that a caption belongs to.

    Returns
    -------
    dict of str to float
        ``image_to_text_r1`` to ``text_to_image_r10``, fractions.
    """
    logits_mn = text_md @ image_nd.T
    right_mn = torch.arange(len(image_nd))[None, :] == picture_m[:, None]
    found = {}
    for way, logits, right in (
        ("image_to_text", logits_mn.T, right_mn.T),
        ("text_to_image", logits_mn, right_mn),
    ):
        order = logits.argsort(dim=1, descending=True, stable=True)
        hits = right.gather(1, order)
        for k in (1, 5, 10):
            found[f"{way}_r{k}"] = hits[:, :k].any(1).float().mean().item()
    return found
