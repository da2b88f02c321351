"""From tables of samples, as the annotation files list them, to the splits of a dataset."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mpsl_dist.data.dataset import Splits
from mpsl_dist.data.decode.cache import Cache
from mpsl_dist.data.decode.samples import FileDataset, OnError, Sample, View
from mpsl_dist.data.sets.index import Samples
from mpsl_dist.errors import DataError

#: The share of a split's samples that may lack files, where the experiment does not say.
MAX_MISSING = 0.01
#: Missing files named in a message; it counts all.
_NAMED = 3

_log = logging.getLogger(__name__)


class Table(NamedTuple):
    """A split as its annotation files list it.

    Attributes
    ----------
    samples : Samples
    labels : sequence of int
        The class of every sample; in retrieval, which picture it belongs to.
    clients : sequence of str, optional
        The owner of every sample, where the data names one.
    """

    samples: Samples
    labels: Sequence[int]
    clients: Sequence[str] | None = None


class Files(NamedTuple):
    """What an experiment says of the files of a dataset, the same for all of them.

    Attributes
    ----------
    on_error : str
        ``raise`` or ``skip``: what becomes of files that are missing or damaged.
    max_missing : float
        The share of a split's samples that may lack files where ``on_error`` is ``skip``.
    cache : str, Path or None
        Folder that keeps decoded inputs.
    """

    on_error: OnError = "raise"
    max_missing: float = MAX_MISSING
    cache: str | Path | None = None


def keep_existing(
    samples: Sequence[Sample], files: Files, name: str, source: str
) -> tuple[list[int], tuple[str, ...]]:
    """Return the positions of the samples whose files are there, and the files that are missing.

    Parameters
    ----------
    files : Files
        What becomes of files that are missing.
    name : str
        The dataset and split, for messages.
    source : str
        Where the files come from, for messages.

    Raises
    ------
    DataError
        If some are not there and ``on_error`` is ``raise``, if more are not there than
        ``max_missing`` allows, or if none is there.
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
        first = ", ".join(list(missing)[:_NAMED])
        said = f"{name}: {lost} of {len(samples)} samples have no file, the first {first}"
        if not kept:
            raise DataError(f"{said}; {source}")
        if files.on_error == "raise":
            raise DataError(f"{said}; {source}, or leave them out with data.on_error=skip")
        if lost > files.max_missing * len(samples):
            enough = math.ceil(1000 * lost / len(samples)) / 1000
            raise DataError(
                f"{said}; more than data.max_missing={files.max_missing:g} allows; {source}, or "
                f"train without them with data.max_missing={enough:g}"
            )
        _log.warning("skipped %s", said)
    return kept, tuple(missing)


def build(
    name: str,
    train: Table,
    test: Table,
    classes: Sequence[str],
    view: View,
    files: Files,
    *,
    source: str,
    notes: Sequence[str] = (),
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
    files : Files
        What becomes of files that are missing or damaged, and the cache.
    source : str
        Where the files come from, for messages.
    notes : sequence of str
        What was decided in reading them.
    needs : sequence of str
        The splits that must have samples.

    Raises
    ------
    DataError
        If a split that is needed has no samples, or as :func:`keep_existing`.
    """
    if files.on_error not in ("raise", "skip"):
        raise DataError(f"data.on_error: expected 'raise' or 'skip', found '{files.on_error}'")
    parts = []
    for split, table in (("train", train), ("test", test)):
        if not table.samples and split in needs:
            raise DataError(f"{name}: the {split} split has no samples; {source}")
        kept, missing = keep_existing(table.samples, files, f"{name} ({split})", source)
        parts.append(
            FileDataset(
                samples=table.samples if not missing else table.samples.take(kept),
                labels=torch.tensor([table.labels[p] for p in kept], dtype=torch.long),
                view=view,
                on_error=files.on_error,
                cache=None if files.cache is None else Cache(Path(files.cache)),
                clients=None if table.clients is None else tuple(table.clients[p] for p in kept),
                missing=missing,
            )
        )
    baselines = {"majority": _majority(*parts)} if classes and len(needs) > 1 else {}
    return Splits(parts[0], parts[1], view.shapes, tuple(classes), baselines, tuple(notes))


def _majority(train: FileDataset, test: FileDataset) -> float:
    """Return the test accuracy of always answering with the most frequent class of training."""
    commonest = Counter(train.labels.tolist()).most_common(1)[0][0]
    return float((test.labels == commonest).float().mean())
