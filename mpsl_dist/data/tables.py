"""From a listed table of samples to the splits of a dataset."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mpsl_dist.data.cache import Cache
from mpsl_dist.data.dataset import Splits
from mpsl_dist.data.samples import FileDataset, OnError, Sample, View
from mpsl_dist.errors import DataError

_log = logging.getLogger(__name__)


class Table(NamedTuple):
    """A split as a dataset module lists it."""

    samples: Sequence[Sample]
    labels: Sequence[int]
    clients: Sequence[str] | None = None


def keep_existing(
    samples: Sequence[Sample], on_error: OnError, name: str, source: str
) -> tuple[list[int], tuple[str, ...]]:
    """Give the positions of the samples whose files are there, and the files that are not there.

    Raises
    ------
    DataError
        If some are not there and ``on_error`` is ``raise``, or if none is there.
    """
    listed: dict[str, frozenset[str]] = {}

    def exists(path: str) -> bool:
        folder, file = os.path.split(path)
        if folder not in listed:
            try:
                listed[folder] = frozenset(os.listdir(folder))
            except OSError:
                listed[folder] = frozenset()
        return file in listed[folder]

    kept: list[int] = []
    missing: dict[str, None] = {}
    for position, sample in enumerate(samples):
        gone = [path for path in sample.files if not exists(path)]
        missing.update(dict.fromkeys(gone))
        if not gone:
            kept.append(position)
    if missing:
        lost = len(samples) - len(kept)
        first = next(iter(missing))
        said = f"{name}: {lost} of {len(samples)} samples have no file, the first {first}"
        if not kept:
            raise DataError(f"{said}; {source}")
        if on_error == "raise":
            raise DataError(f"{said}; {source}, or leave them out with data.on_error=skip")
        _log.warning("skipped %s", said)
    return kept, tuple(missing)


def build(
    name: str,
    train: Table,
    test: Table,
    classes: Sequence[str],
    view: View,
    *,
    on_error: OnError,
    cache: str | Path | None,
    source: str,
) -> Splits:
    """Make the splits of the listed samples, without those whose files are not there.

    Parameters
    ----------
    source : str
        Where the files are to be had, said when some are missing.
    """
    if on_error not in ("raise", "skip"):
        raise DataError(f"data.on_error: expected 'raise' or 'skip', found '{on_error}'")
    parts = []
    for split, table in (("train", train), ("test", test)):
        if not table.samples:
            raise DataError(f"{name}: the {split} split has no samples; {source}")
        kept, missing = keep_existing(table.samples, on_error, f"{name} ({split})", source)
        parts.append(
            FileDataset(
                samples=[table.samples[p] for p in kept],
                labels=torch.tensor([table.labels[p] for p in kept], dtype=torch.long),
                view=view,
                on_error=on_error,
                cache=None if cache is None else Cache(Path(cache)),
                clients=None if table.clients is None else tuple(table.clients[p] for p in kept),
                missing=missing,
            )
        )
    baselines = {"majority": _majority(*parts)} if classes else {}
    return Splits(parts[0], parts[1], view.shapes, tuple(classes), baselines)


def _majority(train: FileDataset, test: FileDataset) -> float:
    """Give the test accuracy of always naming the commonest class of training."""
    commonest = Counter(train.labels.tolist()).most_common(1)[0][0]
    return float((test.labels == commonest).float().mean())
