"""From tables of samples, as the annotation files list them, to the splits of a dataset."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mpsl_dist.data.dataset import Splits
from mpsl_dist.data.decode.cache import Cache
from mpsl_dist.data.decode.samples import FileDataset, OnError, Sample, View
from mpsl_dist.errors import DataError

_log = logging.getLogger(__name__)


class Table(NamedTuple):
    """A split as its annotation files list it.

    Attributes
    ----------
    samples : sequence of Sample
    labels : sequence of int
        The class of every sample; in retrieval, which picture it belongs to.
    clients : sequence of str, optional
        The owner of every sample, where the data names one.
    """

    samples: Sequence[Sample]
    labels: Sequence[int]
    clients: Sequence[str] | None = None


def keep_existing(
    samples: Sequence[Sample], on_error: OnError, name: str, source: str
) -> tuple[list[int], tuple[str, ...]]:
    """Return the positions of the samples whose files are there, and the files that are missing.

    Parameters
    ----------
    name : str
        The dataset and split, for messages.
    source : str
        Where the files come from, for messages.

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
    needs: Sequence[str] = ("train", "test"),
) -> Splits:
    """Return the splits of the listed samples, without those whose files are missing.

    Parameters
    ----------
    name : str
        The dataset, for messages.
    classes : sequence of str
        Class names in label order; empty for retrieval.
    view : View
        How a sample becomes tensors.
    on_error : str
        ``raise`` or ``skip``: what becomes of files that are missing or damaged.
    cache : str, Path or None
        Folder that keeps decoded inputs.
    source : str
        Where the files come from, for messages.
    needs : sequence of str
        The splits that must have samples.

    Raises
    ------
    DataError
        If a split that is needed has no samples, or files are missing and ``on_error`` is
        ``raise``.
    """
    if on_error not in ("raise", "skip"):
        raise DataError(f"data.on_error: expected 'raise' or 'skip', found '{on_error}'")
    parts = []
    for split, table in (("train", train), ("test", test)):
        if not table.samples and split in needs:
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
    baselines = {"majority": _majority(*parts)} if classes and len(needs) > 1 else {}
    return Splits(parts[0], parts[1], view.shapes, tuple(classes), baselines)


def _majority(train: FileDataset, test: FileDataset) -> float:
    """Return the test accuracy of always answering with the most frequent class of training."""
    commonest = Counter(train.labels.tolist()).most_common(1)[0][0]
    return float((test.labels == commonest).float().mean())
