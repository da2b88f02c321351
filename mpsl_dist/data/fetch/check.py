"""What is there of a dataset, what is missing, and which files are damaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mpsl_dist.data import catalog, load
from mpsl_dist.data.catalog import DatasetFacts
from mpsl_dist.data.dataset import Splits
from mpsl_dist.data.decode import media
from mpsl_dist.data.decode.samples import FileDataset, View
from mpsl_dist.data.fetch import leaks
from mpsl_dist.data.remarks import remarks
from mpsl_dist.errors import DataError

#: Files that a report names; it counts all.
_NAMED = 10
#: Classes that a report shows one by one.
_CLASSES = 12


@dataclass(frozen=True)
class Report:
    """The state of a dataset on disk; ``str()`` is for people.

    Attributes
    ----------
    name : str
        The dataset.
    root : str
        Where it was looked for.
    facts : DatasetFacts
        What is known of it.
    samples : mapping of str to int
        Samples whose files are there, per split.
    classes : mapping of str to tuple of int
        Samples of every class for training and for testing; empty for retrieval.
    shapes : mapping of str to tuple of int
        One sample's shape per modality, in the order of fusion.
    lacking : mapping of str to int
        Samples that have no such modality.
    missing : tuple of str
        Files that the annotations name and that are not there.
    damaged : mapping of str to str
        Files that cannot be read, and why. Empty if ``decoded`` is 0.
    decoded : int
        Files that were decoded for this report.
    remarks : tuple of str
        As of :func:`mpsl_dist.data.remarks.remarks`.
    warnings : tuple of str
        As of :func:`mpsl_dist.data.fetch.leaks.warnings`.
    problem : str
        Why nothing could be listed at all; empty where something could.
    """

    name: str
    root: str
    facts: DatasetFacts
    samples: Mapping[str, int] = field(default_factory=dict)
    classes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    lacking: Mapping[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    damaged: Mapping[str, str] = field(default_factory=dict)
    decoded: int = 0
    remarks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problem: str = ""

    @property
    def usable(self) -> bool:
        """Whether training can run, maybe with ``data.on_error=skip``."""
        return not self.problem and min(self.samples.values(), default=0) > 0

    @property
    def complete(self) -> bool:
        """Whether nothing is missing or damaged, and all of a known dataset is there."""
        whole = all(self.samples.get(split, 0) >= n for split, n in self._official.items())
        return self.usable and whole and not self.missing and not self.damaged

    @property
    def _official(self) -> dict[str, int]:
        whole = self.facts.samples if self.facts.confirmed else None
        return {} if whole is None else dict(zip(("train", "test"), whole, strict=True))

    def __str__(self) -> str:
        lines = [f"{self.name} under {self.root}"]
        lines += [f"  not usable: {line}" for line in self.problem.splitlines()]
        official = self._official
        for split, count in self.samples.items():
            of = f" of {official[split]:,} in the whole dataset" if split in official else ""
            lines.append(f"  {split}: {count:,} samples{of}")
        for name, shape in self.shapes.items():
            lacking = self.lacking.get(name, 0)
            absent = f", {lacking:,} samples have none" if lacking else ""
            lines.append(f"  {name}: {' x '.join(map(str, shape))}{absent}")
        lines += self._by_class()
        lines += [f"  note: {remark}" for remark in self.remarks]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        lines += _listed("missing", self.missing)
        lines += _listed("damaged", self.damaged.values())
        if self.decoded:
            lines.append(f"  decoded: {self.decoded:,} files")
        if self.facts.place and not self.complete:
            lines.append(f"  official place: {self.facts.place}")
            lines.append(
                f"  by hand: {self.facts.by_hand}"
                if self.facts.by_hand
                else "  `data download` may fetch: "
                + ", ".join(archive.name for archive in self.facts.archives)
            )
        return "\n".join(lines)

    def _by_class(self) -> list[str]:
        """Return a line for each class, the largest first; of very many the rest is summed up."""
        if not self.classes:
            return []
        by_size = sorted(self.classes.items(), key=lambda item: -sum(item[1]))
        lines = [f"  classes: {len(by_size):,} (train / test samples)"]
        lines += [f"    {name}: {train:,} / {test:,}" for name, (train, test) in by_size[:_CLASSES]]
        if rest := [counts for _, counts in by_size[_CLASSES:]]:
            train, test = (sum(column) for column in zip(*rest, strict=True))
            lines.append(f"    … and {len(rest):,} more: {train:,} / {test:,}")
        return lines


def _listed(what: str, found: Iterable[str]) -> list[str]:
    all_found = list(found)
    if not all_found:
        return []
    lines = [f"  {what}: {len(all_found):,} files"]
    lines += [f"    {one}" for one in all_found[:_NAMED]]
    if len(all_found) > _NAMED:
        lines.append(f"    … and {len(all_found) - _NAMED:,} more")
    return lines


def check(
    name: str,
    root: str | Path | None,
    *,
    decode: bool = True,
    workers: int = 1,
    limit: int | None = None,
    plugins: Sequence[str] = (),
    **options: Any,
) -> Report:
    """Look at a dataset on disk.

    Parameters
    ----------
    name, root, plugins
        As of :func:`mpsl_dist.data.load`.
    decode : bool
        Decode every file from start to end, which takes as long as an epoch of reading.
    workers : int
        Threads that decode.
    limit : int, optional
        Decode only so many files, spread evenly.
    options
        All others of :func:`mpsl_dist.data.load`.

    Raises
    ------
    DataError
        If the dataset is built in, or there is none of this name.
    ConfigError
        As :func:`mpsl_dist.data.load`.
    """
    where = str(root)
    facts = _find(name, plugins)
    # All that is missing is to be told, whatever training would say of it.
    anything = {"on_error": "skip", "max_missing": 1.0}
    options |= {option: value for option, value in anything.items() if option in facts.reads}
    try:
        splits = load(name, root, plugins=plugins, **options)
    except DataError as error:
        return Report(name, where, facts, problem=str(error))
    parts = {"train": splits.train, "test": splits.test}
    listed = {split: part for split, part in parts.items() if isinstance(part, FileDataset)}
    damaged, decoded = _decode_all(listed.values(), workers, limit) if decode else ({}, 0)
    return Report(
        name=name,
        root=where,
        facts=facts,
        samples={split: len(part.labels) for split, part in parts.items()},
        classes=_counts(splits),
        shapes=dict(splits.shapes),
        lacking=_lacking(listed.values()),
        missing=tuple(path for part in listed.values() for path in part.missing),
        damaged=damaged,
        decoded=decoded,
        remarks=tuple(remarks(splits)),
        warnings=tuple(leaks.warnings(splits, contents=decode)),
    )


def _counts(splits: Splits) -> dict[str, tuple[int, int]]:
    """Return the training and test samples of every class."""
    held = [
        torch.bincount(part.labels, minlength=len(splits.classes)).tolist()
        for part in (splits.train, splits.test)
    ]
    return dict(zip(splits.classes, zip(*held, strict=True), strict=False))


def _lacking(parts: Iterable[FileDataset]) -> Counter[str]:
    """Return how many samples have no such modality."""
    found: Counter[str] = Counter()
    for part in parts:
        found.update({name: int((~there).sum()) for name, there in part.present.items()})
    return found


def _find(name: str, plugins: Sequence[str]) -> DatasetFacts:
    try:
        facts = catalog.find(name, plugins)
        if facts.files:
            return facts
        cause = None
    except DataError as error:
        cause = error
    known = ", ".join(sorted(key for key, row in catalog.DATASETS.items() if row.files))
    raise DataError(
        f"data.name: {name} is built in or unknown; read from files are: {known}"
    ) from cause


def _decode_all(
    datasets: Iterable[FileDataset], workers: int, limit: int | None
) -> tuple[dict[str, str], int]:
    """Return the reason for every file that cannot be read, and how many files were tried."""
    tasks: dict[str, tuple[str, ...]] = {}
    for dataset in datasets:
        for sample in dataset.samples:
            for column in ("image", "audio", "video"):
                path = getattr(sample, column)
                if path is not None:
                    needs = _needs(column, dataset.view, sample.silent)
                    tasks[path] = tuple(dict.fromkeys((*tasks.get(path, ()), *needs)))
    paths = list(tasks)
    if limit is not None and len(paths) > limit:
        paths = [paths[i * len(paths) // limit] for i in range(limit)]
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        reasons = pool.map(lambda path: _fault(path, tasks[path]), paths)
        found = {path: why for path, why in zip(paths, reasons, strict=True) if why is not None}
    return found, len(paths)


def _needs(column: str, view: View, silent: bool) -> tuple[str, ...]:
    """Return what training would read of a file."""
    if column == "video":
        parts = {"frame": "image"} if silent else {"frame": "image", "sound": "audio"}
        return tuple(part for part, modality in parts.items() if modality in view.modalities)
    return ("picture",) if column == "image" else ("sound",)


def _fault(path: str, parts: tuple[str, ...]) -> str | None:
    try:
        for part in parts:
            if part == "picture":
                media.read_image(path)
            elif part == "sound":
                media.read_waveform(path)
            else:
                for fraction in (0.0, 0.5, 1.0):
                    media.read_frame(path, fraction)
    except DataError as error:
        return str(error)
    return None
