"""What hosts agree on whose data never meet (``data.place: own``).

Before any model is built every host says once what it has, an :class:`Offer`; nothing else of its
data is known elsewhere. The server makes one :class:`Agreement` of all offers, or refuses the run.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mpsl_dist.data import Batch, DataError, Dataset, Splits
from mpsl_dist.data.decode.samples import FileDataset

#: What a difference in a modality's shape is mended by.
_SIZES = {"image": "image_size", "audio": "audio_frames", "text": "text_length"}


@dataclass(frozen=True)
class Offer:
    """What a host says of its data, once, before training.

    Attributes
    ----------
    host : str
        Its name.
    shapes : mapping of str to tuple of int
        One sample's shape per modality, in the order of fusion.
    classes : tuple of str
        Its class names. Where the experiment declares ``data.classes`` it is that list, which tells
        nothing of the data; in retrieval there are none.
    train, test : tuple of int
        Samples of each client that it hosts; of the server's offer, ``test`` is its test set's.
    missing : tuple of int
        Files for training and for testing that are listed but not there.
    refusal : str
        Why it has no data to offer; empty where it has.
    """

    host: str
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    train: tuple[int, ...] = ()
    test: tuple[int, ...] = ()
    missing: tuple[int, ...] = (0, 0)
    refusal: str = ""


@dataclass(frozen=True)
class Agreement:
    """What all offers come to.

    Attributes
    ----------
    shapes : mapping of str to tuple of int
        As of every offer.
    classes : tuple of str
        Of all hosts, in label order.
    offers : mapping of int to Offer
        Rank -> what it offered.
    """

    shapes: Mapping[str, tuple[int, ...]]
    classes: tuple[str, ...]
    offers: Mapping[int, Offer]

    def told(self, rank: int) -> Agreement:
        """Return what a host is told of it: nothing of what the others offered."""
        return replace(self, offers={rank: self.offers[rank]})

    @property
    def train(self) -> list[int]:
        """Training samples of every client: workers host them in the order of their ranks."""
        return [size for rank in sorted(self.offers) for size in self.offers[rank].train]

    @property
    def test(self) -> int:
        """Test samples of all hosts."""
        return sum(sum(offer.test) for offer in self.offers.values())

    @property
    def missing(self) -> tuple[int, ...]:
        """Files of all hosts that are not there, for training and for testing."""
        return tuple(map(sum, zip(*(offer.missing for offer in self.offers.values()), strict=True)))


class Disagreement(DataError):
    """Hosts that cannot train together.

    Parameters
    ----------
    by_rank : mapping of int to sequence of str
        Rank -> a line for everything that this host should mend.
    """

    def __init__(self, by_rank: Mapping[int, Sequence[str]]) -> None:
        super().__init__("\n".join(line for lines in by_rank.values() for line in lines))
        self.by_rank = by_rank


def agree(offers: Mapping[int, Offer]) -> Agreement:
    """Return what all hosts agree on.

    Parameters
    ----------
    offers : mapping of int to Offer
        Rank -> what it offers; the server, rank 0, only where it has the test set.

    Raises
    ------
    Disagreement
        With a line for every difference, naming the host.
    """
    refused = {rank: _refusal(rank, offer) for rank, offer in offers.items() if offer.refusal}
    if refused:
        raise Disagreement(refused)
    first = min(offers)
    found = {rank: _differences(rank, offers[rank], first, offers[first]) for rank in offers}
    spelled = _spelled_alike(offers)
    lines = {rank: found[rank] + spelled.get(rank, []) for rank in offers}
    if any(lines.values()):
        raise Disagreement({rank: told for rank, told in lines.items() if told})
    return Agreement(offers[first].shapes, _union(offers.values()), offers)


def _who(rank: int, offer: Offer) -> str:
    return f"{f'worker{rank}' if rank else 'the server'} on {offer.host}"


def _refusal(rank: int, offer: Offer) -> list[str]:
    return [f"{_who(rank, offer)}: {line}" for line in offer.refusal.splitlines()]


def _differences(rank: int, offer: Offer, first: int, other: Offer) -> list[str]:
    """Return where an offer differs from the first one."""
    mine, theirs, at = offer.shapes, other.shapes, f"at {_who(first, other)}"
    found = []
    if list(mine) != list(theirs):
        found.append(
            f"modalities are {', '.join(mine)} there and {', '.join(theirs)} {at}: "
            "set data.modalities to what all have"
        )
    found += [
        f"{name} has the shape {mine[name]} there and {theirs[name]} {at}"
        + (f": set data.{_SIZES[name]}" if name in _SIZES else "")
        for name in mine
        if name in theirs and mine[name] != theirs[name]
    ]
    if bool(offer.classes) != bool(other.classes):
        task = {True: "classification (labels)", False: "retrieval (no labels)"}
        found.append(
            f"it is {task[bool(offer.classes)]} there and {task[bool(other.classes)]} {at}"
        )
    return [f"{_who(rank, offer)} disagrees: {line}" for line in found]


def _spelled_alike(offers: Mapping[int, Offer]) -> dict[int, list[str]]:
    """Return a line for every host whose class is another host's, written in another way."""
    known: dict[str, tuple[str, int]] = {}
    found: dict[int, list[str]] = {}
    for rank, offer in sorted(offers.items()):
        for name in offer.classes:
            spelling, before = known.setdefault(
                re.sub(r"[\W_]+", "", name.casefold()), (name, rank)
            )
            if spelling != name and before != rank:
                found.setdefault(rank, []).append(
                    f"{_who(rank, offer)} disagrees: the label '{name}' there is '{spelling}' at "
                    f"{_who(before, offers[before])}: write them alike, or declare data.classes"
                )
    return found


def _union(offers: Iterable[Offer]) -> tuple[str, ...]:
    """Return the classes of all: the list of each where it is the same, else all names, sorted.

    As a manifest's loader sorts them: by value where all are whole numbers.
    """
    lists = {offer.classes for offer in offers}
    if len(lists) == 1:
        return next(iter(lists))
    names = sorted({name for classes in lists for name in classes})
    if all(re.fullmatch(r"-?\d{1,18}", name) for name in names):
        names.sort(key=int)
    return tuple(names)


def renumbered(splits: Splits, classes: Sequence[str]) -> Splits:
    """Return the splits with their labels numbered by this list, which holds all of theirs.

    Parameters
    ----------
    classes : sequence of str
        Class names in label order.

    Raises
    ------
    DataError
        If a label is not in the list; names the nearest that is.
    """
    classes = tuple(classes)
    if splits.classes == classes:
        return splits
    if splits.retrieval:
        raise DataError("data.classes: the data have no labels (retrieval); leave it null")
    wrong = []
    for name in splits.classes:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1)
            wrong.append(
                f"the label '{name}' is not in data.classes"
                + (f"; did you mean '{near[0]}'?" if near else f": {', '.join(classes)}")
            )
    if wrong:
        raise DataError("\n".join(wrong))
    numbers = torch.tensor([classes.index(name) for name in splits.classes])
    train, test = (_renumbered(split, numbers) for split in (splits.train, splits.test))
    return replace(splits, train=train, test=test, classes=classes)


def _renumbered(split: Dataset, numbers: Tensor) -> Dataset:
    if isinstance(split, FileDataset):
        return replace(split, labels=numbers[split.labels])
    return Renumbered(split, numbers)


class Renumbered:
    """Any split, its classes by other numbers.

    Parameters
    ----------
    dataset : Dataset
    numbers : Tensor
        (classes,) int64: the new number of every class.
    """

    def __init__(self, dataset: Dataset, numbers: Tensor) -> None:
        self.dataset = dataset
        self.numbers = numbers
        self.labels = numbers[dataset.labels]

    def fetch(self, indices: Sequence[int], seed: int | None = None) -> Batch:
        """Return these samples."""
        batch = self.dataset.fetch(indices, seed)
        return replace(batch, labels=self.numbers[batch.labels])

    def without(self, present: Mapping[str, Tensor]) -> Renumbered:
        """Return the split without the parts that are not ``present``."""
        return Renumbered(self.dataset.without(present), self.numbers)

    def __getattr__(self, name: str) -> Any:
        # What else a split may have, as ``clients``.
        if name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


@dataclass(frozen=True)
class Elsewhere:
    """A split that lies on other hosts: how many samples it has is known here, and no more.

    Attributes
    ----------
    labels : Tensor
        (samples,) int64, all -1: not known here.
    missing : sequence of int
        As many as there are files missing.
    """

    labels: Tensor
    missing: Sequence[int]

    @classmethod
    def of(cls, samples: int, missing: int = 0) -> Elsewhere:
        """Return a split of so many samples, and files that are not there."""
        return cls(torch.full((samples,), -1), range(missing))

    def fetch(self, indices: Sequence[int], seed: int | None = None) -> Batch:
        """Fail: nothing of it is here."""
        raise AssertionError("these samples lie on other hosts")
