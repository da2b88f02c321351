"""Who has which samples: the data of an experiment, dealt once a process.

Where data stay with their owners (``data.place: own``) a worker deals its own host's rows among its
own clients, and the server knows of them what :mod:`mpsl_dist.actors.agreement` says.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mpsl_dist import data
from mpsl_dist.actors.agreement import Agreement, Elsewhere, Offer, renumbered
from mpsl_dist.actors.checks import check_whole
from mpsl_dist.actors.choices import forms_of, pixels_of, writes_captions
from mpsl_dist.actors.local_data import LocalData, TestData
from mpsl_dist.config import Experiment
from mpsl_dist.config.methods import facts_of
from mpsl_dist.data import Dataset, Splits, TensorDataset, presence
from mpsl_dist.data.captioned import with_captions
from mpsl_dist.data.decode.samples import PIXELS, FileDataset, with_colours
from mpsl_dist.data.gaps import cells, leave_out
from mpsl_dist.data.loading import Loaders
from mpsl_dist.data.partition import Dealt, deal, partition, shares
from mpsl_dist.data.pictures import by_picture
from mpsl_dist.errors import ConfigError

_log = logging.getLogger("mpsl_dist")


def load_data(experiment: Experiment, needs: Sequence[str] = ("train", "test")) -> Splits:
    """Load the experiment's dataset.

    Parameters
    ----------
    needs : sequence of str
        The splits that will be used.

    Raises
    ------
    UserError
        If it is unknown, missing or damaged, has no use for an option, or has another label than
        ``data.classes``.
    """
    chosen, options = experiment.data, data_options(experiment)
    splits = data.load(chosen.name, chosen.root, chosen.text_length, needs=needs, **options)
    colours = PIXELS.get(pixels_of(experiment))
    train, test = (with_colours(split, colours) for split in (splits.train, splits.test))
    if _zeros(experiment):
        train, test = (_with_zeros(split) for split in (train, test))
    splits = replace(splits, train=train, test=test)
    if writes_captions(experiment):
        splits = with_captions(splits, chosen.name)
    elif chosen.unit == "picture":
        splits = by_picture(splits, chosen.name)
    return splits if chosen.classes is None else renumbered(splits, chosen.classes)


def _zeros(experiment: Experiment) -> bool:
    """Return whether zeros stand in for what is absent: as asked for, or all that a method can."""
    facts = facts_of(experiment)
    # A client of one modality would have nothing but zeros to go by: what lacks parts is refused.
    return experiment.data.missing.zeros or not (facts.unimodal or "data.missing" in facts.reads)


def _with_zeros(split: Dataset) -> Dataset:
    return replace(split, zeros=True) if isinstance(split, FileDataset | TensorDataset) else split


def clients_of_a_user(experiment: Experiment, splits: Splits) -> int:
    """Return how many clients in a row have the same samples: one, or one for each modality."""
    return len(splits.shapes) if facts_of(experiment).unimodal else 1


def plan_of(experiment: Experiment, splits: Splits, sizes: Sequence[int]) -> NDArray[np.int64]:
    """Return (steps, clients): samples of every client in every step of an epoch.

    Clients of one user give the same samples, which count once in ``training.batch_size``.
    """
    each = clients_of_a_user(experiment, splits)
    plan = shares(list(sizes)[::each], experiment.training.batch_size, experiment.client_share)
    return plan.repeat(each, axis=1)


def loaders_of(experiment: Experiment, splits: Splits) -> Loaders:
    """Return what reads ahead in this process, as ``data.loaders`` asks for it."""
    return Loaders((splits.train, splits.test), experiment.data.loaders)


def data_options(experiment: Experiment) -> dict[str, Any]:
    """Return what the experiment asks of its dataset, as :func:`mpsl_dist.data.load` takes it."""
    names = ("image_size", "audio_frames", "modalities", "on_error", "max_missing", "cache")
    common = {name: getattr(experiment.data, name) for name in names}
    return (
        common
        | forms_of(experiment)
        | {"plugins": experiment.plugins, "own_options": experiment.data.options}
    )


@dataclass(frozen=True)
class Public:
    """Samples that server and clients have in common (``data.public_fraction``), labels and all.

    Attributes
    ----------
    train : array
        (samples,) positions in the training split, which no client has as its own.
    test : array
        Positions in the test split that are the server's alone, where clients have the others.
    """

    train: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    test: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @classmethod
    def draw(cls, experiment: Experiment, splits: Splits) -> Public:
        """Draw them by the experiment's seed; as many of every split, rounded, as the fraction.

        Raises
        ------
        ConfigError
            If that is no training sample.
        """
        fraction, seed = experiment.data.public_fraction, experiment.seed
        sizes = [len(split.labels) for split in (splits.train, splits.test)]
        if experiment.data.test_at == "server":
            sizes[1] = 0  # the server has them all
        if not round(fraction * sizes[0]):
            raise ConfigError(
                f"data.public_fraction: {fraction} of {sizes[0]} training samples is less than "
                "one; take more"
            )
        rng = np.random.default_rng([seed, 3])
        return cls(*(np.sort(rng.permutation(size)[: round(fraction * size)]) for size in sizes))

    def left(
        self, parts: Sequence[NDArray[np.int64]], tests: Sequence[NDArray[np.int64]]
    ) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
        """Return clients' training and test samples without these.

        Raises
        ------
        ConfigError
            If a client has none left.
        """
        own = [np.setdiff1d(part, self.train) for part in parts]
        if empty := [n for n, part in enumerate(own) if not len(part)]:
            raise ConfigError(
                f"data.public_fraction: client {empty[0]} has no sample of its own left; take a "
                "smaller one, or a larger data.partition.minimum"
            )
        return own, [np.setdiff1d(test, self.test) for test in tests]


@dataclass(frozen=True)
class Holdings:
    """The samples of every client.

    Attributes
    ----------
    dealt : Dealt
        Training samples, and the rule that they were dealt by.
    tests : tuple of array
        (samples,) positions in the test split by client; all empty where the server has them.
    loaders : Loaders
        Read for everyone in this process.
    first : int
        Number of the first client whose samples these are: 0, but on a worker that has its own.
    agreement : Agreement, optional
        What the hosts agreed on whose own data these are.
    public : Public
        Samples that are no client's own.
    """

    experiment: Experiment
    splits: Splits
    dealt: Dealt
    tests: tuple[NDArray[np.int64], ...]
    loaders: Loaders
    first: int = 0
    agreement: Agreement | None = None
    public: Public = Public()

    @classmethod
    def deal(
        cls, experiment: Experiment, splits: Splits, clients: Sequence[int] | None = None
    ) -> Holdings:
        """Deal the samples by the experiment's rule and seed.

        Parameters
        ----------
        clients : sequence of int, optional
            The numbers of those among whom they are dealt, in a row; by default all. One client
            whose rows name no owner has them all, under ``natural`` too.

        Raises
        ------
        UserError
            If there are too few samples, or the data names another number of clients.
        """
        rule, numbers = experiment.data.partition, clients or range(experiment.clients)
        each = clients_of_a_user(experiment, splits)
        count, seed = max(1, len(numbers) // each), experiment.seed + numbers[0]
        nameless = getattr(splits.train, "clients", None) is None
        kind = "iid" if clients and count == 1 and nameless else rule.kind
        dealt = deal(splits, count, kind, rule.alpha, rule.minimum, seed)
        if len(dealt.parts) != count:
            key = "clients_per_worker" if clients else "clients"
            raise ConfigError(
                f"{key}: {count * each}, but the data names {len(dealt.parts)} and "
                f"data.partition.kind=natural takes each; set {key}={len(dealt.parts) * each}"
            )
        dealt = replace(dealt, parts=[part for part in dealt.parts for _ in range(each)])
        tests = [np.empty(0, dtype=np.int64)] * count
        if experiment.data.test_at == "clients":
            tests = partition(splits.test.labels, count, "iid", 1.0, 1, seed)
        tests = [part for part in tests for _ in range(each)]
        public = Public()
        if experiment.data.public_fraction:
            check_whole(experiment.data.name, splits)
            public = Public.draw(experiment, splits)
            own, tests = public.left(dealt.parts, tests)
            dealt = replace(dealt, parts=own)
        missing = experiment.data.missing
        if missing.rate:
            drawn = experiment.seed if missing.seed is None else missing.seed
            how = (missing.rate, missing.per, drawn, missing.at_test)
            splits = leave_out(splits, *how, dealt.parts, tests)
        loaders = loaders_of(experiment, splits)
        return cls(experiment, splits, dealt, tuple(tests), loaders, numbers[0], public=public)

    @classmethod
    def elsewhere(
        cls, experiment: Experiment, agreement: Agreement, own: Splits | None
    ) -> Holdings:
        """Return what the server knows of samples that lie on the workers' hosts.

        Parameters
        ----------
        own : Splits, optional
            Its own data, where it has the test set.
        """
        sizes = agreement.train
        missing_train, missing_test = agreement.missing
        test = Elsewhere.of(agreement.test, missing_test)
        if own is not None:
            test = renumbered(own, agreement.classes).test
        train = Elsewhere.of(sum(sizes), missing_train)
        splits = Splits(train, test, agreement.shapes, agreement.classes)
        parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        dealt = Dealt(parts, "own: every worker's host has its own data")
        tests, loaders = (np.empty(0, dtype=np.int64),) * len(sizes), loaders_of(experiment, splits)
        return cls(experiment, splits, dealt, tests, loaders, agreement=agreement)

    @classmethod
    def load(cls, experiment: Experiment) -> Holdings:
        """Load the experiment's data and deal it; raises as :func:`load_data` and :meth:`deal`."""
        return cls.deal(experiment, load_data(experiment))

    def only(self, numbers: Sequence[int]) -> Holdings:
        """Return the same without the samples of other clients than these, for a worker of many.

        Splits that lie in memory are cut to what these clients hold, but for a public test set
        that clients test their own models on; what lies in files is not read before it is asked
        for.
        """
        places = {number - self.first for number in numbers}

        def own(parts: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
            return [part if n in places else part[:0] for n, part in enumerate(parts)]

        mine = own(self.dealt.parts)
        train, [*parts, public] = _cut(self.splits.train, [*mine, self.public.train])
        test, tests = self.splits.test, self.tests
        everybodys = self.experiment.data.test_at == "server" and facts_of(self.experiment).alone
        if not everybodys:
            test, tests = _cut(test, own(tests))
        splits = replace(self.splits, train=train, test=test)
        return replace(
            self,
            splits=splits,
            dealt=replace(self.dealt, parts=parts),
            tests=tuple(tests),
            loaders=loaders_of(self.experiment, splits),
            public=Public(public),
        )

    @property
    def sizes(self) -> list[int]:
        """Training samples of every client."""
        return [len(part) for part in self.dealt.parts]

    def of(self, number: int) -> tuple[LocalData, TestData]:
        """Return a client's own training and test samples."""
        part, test = self.dealt.parts[number - self.first], self.tests[number - self.first]
        seed, user = self.experiment.seed, number // clients_of_a_user(self.experiment, self.splits)
        seen = self.modalities(number) if facts_of(self.experiment).unimodal else ()
        train = LocalData(self.splits.train, part, seed, user, self.loaders, seen)
        return train, TestData(self.splits.test, test, self.loaders, seen)

    def of_public(self, reader: int) -> tuple[LocalData, TestData]:
        """Return the public training samples, and the server's test samples.

        Parameters
        ----------
        reader : int
            Who reads them: a client's number, or how many clients there are for the server. Each
            has an order of its own.
        """
        seed, stream = self.experiment.seed, self.experiment.clients + 1 + reader
        train = LocalData(self.splits.train, self.public.train, seed, stream, self.loaders)
        everything = self.experiment.data.test_at == "server"
        test = None if everything else self.public.test
        return train, TestData(self.splits.test, test, self.loaders)

    @cached_property
    def _masks(self) -> tuple[Mapping[str, Tensor] | None, ...]:
        return presence(self.splits.train), presence(self.splits.test)

    def present(self, number: int) -> tuple[NDArray[np.bool_] | None, ...]:
        """Return which of a client's training, and of its test samples have which modality.

        Returns
        -------
        tuple of array or None
            (samples, m) bool each, in the client's own order; None where the split has no gaps.
        """
        parts = self.dealt.parts[number - self.first], self.tests[number - self.first]
        return tuple(
            None if mask is None else cells(mask, rows)
            for mask, rows in zip(self._masks, parts, strict=True)
        )

    def modalities(self, number: int, tests: bool = True) -> tuple[str, ...]:
        """Return those that any of a client's samples has, or without its ``tests`` any that it
        trains on; empty where these are all.
        """
        names, parts = list(self.splits.shapes), (self.dealt.parts, self.tests)
        if facts_of(self.experiment).unimodal:
            return (names[number % len(names)],) if len(names) > 1 else ()
        has = np.zeros(len(names), dtype=bool)
        for mask_nm, part in list(zip(self.present(number), parts, strict=True))[: 1 + tests]:
            has |= bool(len(part[number - self.first])) if mask_nm is None else mask_nm.any(0)
        return () if has.all() else tuple(np.array(names)[has].tolist())

    def numbered(self, classes: Sequence[str]) -> Holdings:
        """Return the same, labels numbered by this list of classes, which holds all of theirs."""
        splits = renumbered(self.splits, classes)
        return replace(self, splits=splits, loaders=loaders_of(self.experiment, splits))

    def offer(self, host: str) -> Offer:
        """Return what a host says of these, its own."""
        splits, test = self.splits, tuple(len(part) for part in self.tests)
        missing = tuple(len(getattr(part, "missing", ())) for part in (splits.train, splits.test))
        shapes, classes = dict(splits.shapes), tuple(splits.classes)
        return Offer(host, shapes, classes, tuple(self.sizes), test, missing)

    def log(self) -> None:
        """Log who holds how much, by which rule."""
        sizes = self.sizes
        _log.info(
            "partition: %s; %d clients with %d to %d training samples, median %g",
            self.dealt.rule,
            len(sizes),
            min(sizes),
            max(sizes),
            float(np.median(sizes)),
        )
        for part, name in enumerate(self.dealt.names):
            _log.info("client %d is '%s': %d samples", self.first + part, name, sizes[part])
        for name, there in (self._masks[0] or {}).items():
            held = [int(there[part].sum()) for part in self.dealt.parts]
            clients = f"{sum(map(bool, held))} of {len(held)} clients"
            _log.info("%s: %d of %d training samples, %s", name, sum(held), sum(sizes), clients)


def _cut(
    dataset: Dataset, parts: list[NDArray[np.int64]]
) -> tuple[Dataset, list[NDArray[np.int64]]]:
    """Return a split in memory with the rows that are in the parts alone, and where they are."""
    if not isinstance(dataset, TensorDataset):
        return dataset, parts
    rows = np.unique(np.concatenate(parts))  # clients of one user have the same
    kept = dataset.fetch(rows)
    texts = dataset.texts and [dataset.texts[row] for row in rows]
    cut = replace(
        dataset, inputs=kept.inputs, labels=kept.labels, present=kept.present, texts=texts
    )
    return cut, [np.searchsorted(rows, p) for p in parts]
