"""What two splits share that they should not, and what one of them has twice."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from mpsl_dist.data.dataset import Splits
from mpsl_dist.data.decode.samples import FileDataset, Sample

#: Files and classes that a warning names; it counts all.
_NAMED = 3
#: Bytes of a file that are read together.
_PIECE = 1 << 20


def warnings(splits: Splits, contents: bool = True) -> list[str]:
    """Return a line for every kind of leak, of duplicate, and of class that one split alone has.

    Parameters
    ----------
    contents : bool
        Whether to read files of the same size and compare what is in them; else only their names.
    """
    found = _lonely_classes(splits) if splits.classes else []
    train, test = splits.train, splits.test
    if not (isinstance(train, FileDataset) and isinstance(test, FileDataset)):
        return found
    files = [_files(part) for part in (train, test)]
    shared = [path for path in files[0] if path in files[1]]
    of = "with all its captions" if splits.retrieval else "with its samples"
    if shared:
        found.append(f"leak: {_some(shared)} in both train and test; put each, {of}, into one")
    if contents:
        found += _same_contents(files)
    texts = [{sample.text for sample in part.samples if not sample.files} for part in (train, test)]
    if both := sorted(texts[0] & texts[1]):
        found.append(f"leak: {len(both):,} texts in both train and test, as '{both[0][:60]}'")
    for name, part in (("train", train), ("test", test)):
        found += _twice(name, part)
    return found


def _files(part: FileDataset) -> dict[str, None]:
    return dict.fromkeys(path for sample in part.samples for path in sample.files)


def _some(paths: Sequence[str]) -> str:
    """Count files and name the first."""
    named = ", ".join(paths[:_NAMED])
    return f"{len(paths):,} {'file' if len(paths) == 1 else 'files'} ({named})"


def _lonely_classes(splits: Splits) -> list[str]:
    count = len(splits.classes)
    held = [torch.bincount(part.labels, minlength=count) for part in (splits.train, splits.test)]
    found = []
    for here, (own, other) in {"train": held, "test": held[::-1]}.items():
        alone = [splits.classes[k] for k in torch.nonzero((own > 0) & (other == 0)).flatten()]
        if alone:
            named = ", ".join(f"'{name}'" for name in alone[:_NAMED])
            found.append(f"{len(alone):,} of {count:,} classes only in {here}, as {named}")
    return found


def _same_contents(files: Sequence[Mapping[str, None]]) -> list[str]:
    """Compare files that have the same size: between the splits, and within each."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for path in dict.fromkeys([*files[0], *files[1]]):
        with contextlib.suppress(OSError):  # told of where files are decoded
            by_size[os.path.getsize(path)].append(path)
    by_content: dict[bytes, list[str]] = defaultdict(list)
    for path in (path for same in by_size.values() if len(same) > 1 for path in same):
        by_content[_digest(path)].append(path)
    found, pairs = [], [same for same in by_content.values() if len(same) > 1]
    leaks = [s for s in pairs if any(p in files[0] for p in s) and any(p in files[1] for p in s)]
    # The same name in both is told of already.
    leaks = [s for s in leaks if not all(p in files[0] and p in files[1] for p in s)]
    if leaks:
        found.append(
            f"leak: {len(leaks):,} contents under several names, in both train and test, as "
            f"{' = '.join(leaks[0][:_NAMED])}"
        )
    within = [s for s in pairs if s not in leaks]
    if within:
        found.append(
            f"duplicates: {len(within):,} contents under several names in one split, as "
            f"{' = '.join(within[0][:_NAMED])}"
        )
    return found


def _digest(path: str) -> bytes:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.digest()


def _twice(name: str, part: FileDataset) -> list[str]:
    """Tell of samples that are in a split more than once, with the same label or another."""
    labels: dict[Sample, list[int]] = defaultdict(list)
    for sample, label in zip(part.samples, part.labels.tolist(), strict=True):
        labels[sample].append(label)
    again = {sample: held for sample, held in labels.items() if len(held) > 1}
    found = []
    for what, chosen in (
        ("the same label", [s for s, held in again.items() if len(set(held)) < len(held)]),
        ("different labels", [s for s, held in again.items() if len(set(held)) > 1]),
    ):
        if chosen:
            first = _spoken(chosen[0])
            found.append(
                f"duplicates: {len(chosen):,} samples several times in {name} with {what}, "
                f"as {first}"
            )
    return found


def _spoken(sample: Sample) -> str:
    parts: Iterable[str] = (*sample.files, *([f"'{sample.text[:60]}'"] if sample.text else []))
    return " ".join(parts)
