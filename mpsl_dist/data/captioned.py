"""Captions as what is to be written of a sample, not as an input (``mlecs.answer: caption``).

A sample is a picture, with whatever else its pairs have but the text; its captions are the answer.
In training one of them is drawn, at test all of them are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsl_dist.data.dataset import Batch, Dataset, Splits
from mpsl_dist.errors import DataError

_TEXT = "text"


@dataclass(frozen=True)
class Captioned:
    """A split of pictures whose batches have ``captions``, and no text among their inputs.

    Attributes
    ----------
    pairs : Dataset
        Of which the first pair of every picture is read.
    first_n : array
        (samples,) int64: where that is.
    labels : Tensor
        (samples,) int64: the pictures, as the pairs number them.
    written : mapping of int to tuple of str
        A picture's captions.
    """

    pairs: Dataset
    first_n: NDArray[np.int64]
    labels: Tensor
    written: Mapping[int, tuple[str, ...]]

    @classmethod
    def of(cls, pairs: Dataset) -> Captioned | None:
        """Put together the pairs that share a picture; None where texts are numbers alone."""
        texts = getattr(pairs, "texts", None)
        if texts is None:
            return None
        written: dict[int, tuple[str, ...]] = {}
        for picture, text in zip(pairs.labels.tolist(), texts, strict=True):
            written[picture] = (*written.get(picture, ()), text)
        pictures, first_n = np.unique(pairs.labels.numpy(), return_index=True)
        return cls(pairs, first_n, torch.from_numpy(pictures), written)

    @property
    def captions(self) -> int:
        """Captions of a picture, at most."""
        return max(map(len, self.written.values()), default=1)

    @property
    def clients(self) -> tuple[str, ...] | None:
        """The owner of every picture, where the data names one."""
        owners = getattr(self.pairs, "clients", None)
        return None if owners is None else tuple(owners[pair] for pair in self.first_n)

    @property
    def missing(self) -> Sequence[str]:
        """The files that are listed and not there."""
        return getattr(self.pairs, "missing", ())

    @property
    def zeros(self) -> bool:
        """Whether what is absent is zeros, as if it were data."""
        return getattr(self.pairs, "zeros", False)

    @property
    def present(self) -> dict[str, Tensor] | None:
        """Which samples have a modality, (samples,) bool for each; None where all have all."""
        present = getattr(self.pairs, "present", None)
        if present is None:
            return None
        return {name: there[self.first_n] for name, there in present.items() if name != _TEXT}

    def without(self, present: Mapping[str, Tensor]) -> Captioned:
        """Return the split without the parts that are not ``present``."""
        place = torch.searchsorted(self.labels, self.pairs.labels)
        of_pairs = {name: there[place] for name, there in present.items()}
        of_pairs[_TEXT] = torch.ones(len(place), dtype=torch.bool)
        return replace(self, pairs=self.pairs.without(of_pairs))

    def fetch(self, indices: Sequence[int], seed: int | None = None) -> Batch:
        """Return these samples with their captions; see :class:`mpsl_dist.data.Dataset`.

        With a seed one caption is drawn for every picture, the same for the same seed.
        """
        places = {int(self.first_n[index]): int(index) for index in indices}
        batch = self.pairs.fetch([int(self.first_n[index]) for index in indices], seed)
        # Another picture may stand in for one that cannot be read: its own captions count.
        captions = tuple(self._said(picture, seed) for picture in batch.labels.tolist())
        present = batch.present
        if present is not None:
            present = {name: there for name, there in present.items() if name != _TEXT}
        return Batch(
            {name: x for name, x in batch.inputs.items() if name != _TEXT},
            batch.labels,
            {places[pair]: why for pair, why in batch.unreadable.items()},
            present,
            captions,
        )

    def _said(self, picture: int, seed: int | None) -> tuple[str, ...]:
        own = self.written[picture]
        if seed is None:
            return own
        return (own[int(np.random.default_rng([seed, picture]).integers(len(own)))],)


def with_captions(splits: Splits, name: str) -> Splits:
    """Return the splits of pairs by the picture, its captions as the answer.

    Raises
    ------
    DataError
        If they have no captions, or captions alone, or only the numbers that stand for them.
    """
    asked = "mlecs.answer: caption needs pictures with captions"
    if not splits.retrieval or _TEXT not in splits.shapes or len(splits.shapes) < 2:
        raise DataError(f"{asked}, which {name} has not; take label or head")
    parts = [Captioned.of(split) for split in (splits.train, splits.test)]
    if None in parts:
        raise DataError(f"{asked} as they were written; {name} has no 'texts', only their tokens")
    shapes = {modality: shape for modality, shape in splits.shapes.items() if modality != _TEXT}
    return replace(splits, train=parts[0], test=parts[1], shapes=shapes)
