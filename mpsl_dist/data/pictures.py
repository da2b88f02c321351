"""Retrieval by the picture: a sample is a picture with all its captions (``data.unit: picture``).

The released code's unit. Its five captions attend to each other in the encoder, at test too, which
tells the model which belong together; here each is encoded by itself.

Shape legend: ``n`` pictures, ``c`` captions of each, ``b`` batch, ``l`` text length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsl_dist.data.dataset import Batch, Dataset, Splits
from mpsl_dist.errors import DataError


@dataclass(frozen=True)
class Pictures:
    """A split of pairs, by the picture; a batch's ``text`` is (b, c, l), the rest as of pairs.

    Attributes
    ----------
    pairs : Dataset
    pairs_nc : array
        (n, c) int64: the positions of every picture's pairs.
    labels : Tensor
        (n,) int64: the pictures.
    """

    pairs: Dataset
    pairs_nc: NDArray[np.int64]
    labels: Tensor

    @classmethod
    def of(cls, pairs: Dataset, name: str) -> Pictures:
        """Put together the pairs that share a picture.

        Parameters
        ----------
        name : str
            The dataset and split, for messages.

        Raises
        ------
        DataError
            If some pictures have fewer captions than others.
        """
        pictures, counts = np.unique(pairs.labels.numpy(), return_counts=True)
        fewest, most = (int(counts.min()), int(counts.max())) if len(counts) else (1, 1)
        if fewest < most:
            raise DataError(
                f"data.unit: picture needs pictures of equally many captions; those of {name} have "
                f"{fewest} to {most}; take data.unit=pair"
            )
        order = np.argsort(pairs.labels.numpy(), kind="stable")
        return cls(pairs, order.reshape(-1, most), torch.from_numpy(pictures))

    @property
    def captions(self) -> int:
        """Captions of every picture, c."""
        return self.pairs_nc.shape[1]

    @property
    def clients(self) -> tuple[str, ...] | None:
        """The owner of every picture, where the data names one."""
        owners = getattr(self.pairs, "clients", None)
        return None if owners is None else tuple(owners[pair] for pair in self.pairs_nc[:, 0])

    @property
    def missing(self) -> Sequence[str]:
        """The files that are listed and not there."""
        return getattr(self.pairs, "missing", ())

    @property
    def on_error(self) -> str:
        """``raise`` or ``skip``."""
        return getattr(self.pairs, "on_error", "raise")

    @property
    def unchanging(self) -> bool:
        """Whether a sample is the same whatever the seed."""
        return getattr(self.pairs, "unchanging", False)

    def fetch(self, indices: Sequence[int], seed: int | None = None) -> Batch:
        """Return these pictures with all their captions; see :class:`mpsl_dist.data.Dataset`."""
        asked_bc = self.pairs_nc[np.asarray(indices, dtype=np.int64)]
        batch = self.pairs.fetch(asked_bc.flatten().tolist(), seed)
        inputs = {name: x[:: self.captions] for name, x in batch.inputs.items() if name != "text"}
        inputs["text"] = batch.inputs["text"].unflatten(0, (-1, self.captions))
        place = {pair: n for n, own in zip(indices, asked_bc.tolist(), strict=True) for pair in own}
        unreadable = {int(place[pair]): why for pair, why in batch.unreadable.items()}
        ordered = {name: inputs[name] for name in batch.inputs}
        return Batch(ordered, batch.labels[:: self.captions], unreadable)


def by_picture(splits: Splits, name: str) -> Splits:
    """Return retrieval's splits by the picture.

    Raises
    ------
    DataError
        If they are none of retrieval, or as :meth:`Pictures.of`.
    """
    if not splits.retrieval or "text" not in splits.shapes:
        raise DataError(
            f"data.unit: picture is for pictures with captions, which {name} has not; take pair"
        )
    train, test = (
        Pictures.of(split, f"{name} ({part})")
        for split, part in ((splits.train, "train"), (splits.test, "test"))
    )
    return replace(splits, train=train, test=test)
