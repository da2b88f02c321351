"""What is there of a dataset, what is missing, and which files are damaged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpsl_dist.data import catalog, load
from mpsl_dist.data.catalog import DatasetFacts
from mpsl_dist.data.decode import media
from mpsl_dist.data.decode.samples import FileDataset, View
from mpsl_dist.errors import DataError

#: Files that a report names; it counts all.
_NAMED = 10


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
    classes : int
        Number of classes, 0 for retrieval.
    missing : tuple of str
        Files that the annotations name and that are not there.
    damaged : mapping of str to str
        Files that cannot be read, and why. Empty if ``decoded`` is 0.
    decoded : int
        Files that were decoded for this report.
    problem : str
        Why nothing could be listed at all; empty where something could.
    """

    name: str
    root: str
    facts: DatasetFacts
    samples: Mapping[str, int] = field(default_factory=dict)
    classes: int = 0
    missing: tuple[str, ...] = ()
    damaged: Mapping[str, str] = field(default_factory=dict)
    decoded: int = 0
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
        if self.problem:
            lines.append(f"  not usable: {self.problem}")
        official = self._official
        for split, count in self.samples.items():
            of = f" of {official[split]:,} in the whole dataset" if split in official else ""
            lines.append(f"  {split}: {count:,} samples{of}")
        if self.classes:
            lines.append(f"  classes: {self.classes}")
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
    if "on_error" in facts.reads:
        options = {**options, "on_error": "skip"}
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
        classes=len(splits.classes),
        missing=tuple(path for part in listed.values() for path in part.missing),
        damaged=damaged,
        decoded=decoded,
    )


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
                    tasks[path] = _needs(column, dataset.view, sample.silent)
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
