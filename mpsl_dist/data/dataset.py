"""What a sample is: the contract between every dataset and the rest of the house.

Shape legend: ``b`` batch, ``c`` channels, ``h`` height, ``w`` width, ``t`` frames, ``m`` mel bins,
``l`` text length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from mpsl_dist.data.decode.view import View
from mpsl_dist.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Some samples.

    Attributes
    ----------
    inputs : mapping of str to Tensor
        ``image`` (b, c, h, w) float32; ``audio`` (b, t, m) float32, log-mel; ``text`` (b, l)
        int64, CLIP byte-pair tokens.
    labels : Tensor
        (b,) int64: the class; in retrieval, which image a caption belongs to.
    unreadable : mapping of int to tuple of str
        What was asked for and could not be read: position in the split -> the file, and why. In
        training another sample stands in for it, at test it is left out.
    present : mapping of str to Tensor, optional
        Which samples have a modality, (b,) bool for each, in the order of fusion; inputs of those
        that do not mean nothing. None where all of them have everything.
    captions : tuple of tuple of str, optional
        What is to be written of every sample: one caption in training, all that it has at test;
        None where captions are no answer (:mod:`mpsl_dist.data.captioned`).
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    unreadable: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    present: Mapping[str, Tensor] | None = None
    captions: tuple[tuple[str, ...], ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: Sequence[int]) -> Batch:
        """Return these rows of it alone, without an account of what could not be read."""
        index = torch.as_tensor(rows, dtype=torch.long)
        inputs = {name: x[index] for name, x in self.inputs.items()}
        captions = self.captions and tuple(self.captions[row] for row in index)
        present = rows_of(self.present, index)
        return Batch(inputs, self.labels[index], present=present, captions=captions)

    def only(self, modalities: Sequence[str]) -> Batch:
        """Return the same samples with no other modalities than these."""
        return replace(self, inputs={name: self.inputs[name] for name in modalities})


def rows_of(present: Mapping[str, Tensor] | None, rows: Tensor) -> dict[str, Tensor] | None:
    """Return these rows of a mask by modality; None where they have everything."""
    if present is None:
        return None
    own = {name: there[rows] for name, there in present.items()}
    # Of no rows the mask is kept: who makes tokens of them may lack a modality altogether.
    return own if not len(rows) or not all(bool(x.all()) for x in own.values()) else None


class Dataset(Protocol):
    """A split: samples by position, and the labels of all of them.

    It may also have ``clients``, a sequence with the owner's name of every sample; then
    ``data.partition.kind=natural`` makes every owner a client; and ``missing``, the files that are
    listed and not there, whose samples are left out; and ``unchanging``, whether a sample is the
    same whatever seed it is fetched with: without it, samples are taken to change; and ``present``,
    which samples have a modality, (samples,) bool for each, and ``without(present)``, which returns
    the split with no more than that: ``data.missing`` needs it; and ``view``, how files become its
    samples, which whoever uses a trained model needs; and ``texts``, every sample's text as it was
    written, a sequence: ``mlecs.answer=caption`` needs it.
    """

    #: (samples,) int64.
    labels: Tensor

    def fetch(self, indices: Sequence[int], seed: int | None = None) -> Batch:
        """Return these samples.

        Parameters
        ----------
        indices : sequence of int
            Positions of the samples in the split.
        seed : int or None
            Draws the random frames, crops and flips of training, the same for the same seed and
            sample; None takes the deterministic view of testing, in which a sample that cannot be
            read is left out, and nothing stands in for it.
        """
        ...


@dataclass(frozen=True)
class Splits:
    """A dataset as the training methods see it: a split to train on and one to test on.

    Attributes
    ----------
    shapes : mapping of str to tuple of int
        One sample's shape per modality, in the order in which modalities are fused.
    classes : tuple of str
        Class names in label order.
    baselines : mapping of str to float
        Test accuracies that need no model, by name.
    notes : tuple of str
        What was decided in reading the data, and likely mistakes in it, for people.
    """

    train: Dataset
    test: Dataset
    shapes: Mapping[str, tuple[int, ...]]
    classes: tuple[str, ...]
    baselines: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def retrieval(self) -> bool:
        """Whether samples are (picture, caption) pairs without classes."""
        return not self.classes

    @property
    def view(self) -> View | None:
        """How files become samples; None where neither split tells."""
        return getattr(self.test, "view", None) or getattr(self.train, "view", None)


def presence(split: Dataset) -> Mapping[str, Tensor] | None:
    """Return which samples have a modality, (samples,) bool for each, in the order of fusion.

    None where all have everything, or zeros stand in for what they lack.
    """
    present = None if getattr(split, "zeros", False) else getattr(split, "present", None)
    whole = present is None or all(bool(there.all()) for there in present.values())
    return None if whole else present


def chosen(known: Mapping[str, T], modalities: Sequence[str] | None) -> dict[str, T]:
    """Return what a dataset has of these modalities, in their order; all of it for None.

    Raises
    ------
    DataError
        If it has none of a name.
    """
    for name in modalities or ():
        if name not in known:
            raise DataError(f"data.modalities: unknown '{name}'; valid: {', '.join(known)}")
    return {name: known[name] for name in (known if modalities is None else modalities)}


@dataclass(frozen=True)
class TensorDataset:
    """A split that lies in memory; ``inputs`` as in :class:`Batch`.

    Attributes
    ----------
    present : mapping of str to Tensor, optional
        Which samples have a modality, (samples,) bool for each; None where all have everything.
    zeros : bool
        Whether what is absent is zeros, as if it were data.
    view : View, optional
        How files become such inputs.
    texts : sequence of str, optional
        What the numbers of ``text`` stand for.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    present: Mapping[str, Tensor] | None = None
    zeros: bool = False
    view: View | None = None
    texts: Sequence[str] | None = None
    unchanging: ClassVar[bool] = True

    def fetch(self, indices: Sequence[int], seed: int | None = None) -> Batch:
        """Return these samples; nothing here is random."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        inputs = {name: x[rows] for name, x in self.inputs.items()}
        present = rows_of(self.present, rows)
        for name, there in (present or {}).items():
            inputs[name][~there] = 0
        return Batch(inputs, self.labels[rows], present=None if self.zeros else present)

    def without(self, present: Mapping[str, Tensor]) -> TensorDataset:
        """Return the split without the parts that are not ``present``."""
        return replace(self, present=dict(present))
