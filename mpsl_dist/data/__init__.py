"""What a sample is. Knows no model and no process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpsl_dist.data import catalog
from mpsl_dist.data.catalog import DatasetFacts
from mpsl_dist.data.dataset import Batch, Dataset, Splits, TensorDataset, presence
from mpsl_dist.data.decode.samples import FileDataset
from mpsl_dist.errors import DataError
from mpsl_dist.plugins import options as checked_options
from mpsl_dist.plugins import resolve

__all__ = [
    "Batch",
    "DataError",
    "Dataset",
    "DatasetFacts",
    "Splits",
    "TensorDataset",
    "load",
    "presence",
]


def load(
    name: str,
    root: str | Path | None = None,
    text_length: int | None = None,
    *,
    plugins: Sequence[str] = (),
    own_options: Mapping[str, Any] | None = None,
    needs: Sequence[str] = ("train", "test"),
    **options: Any,
) -> Splits:
    """Load a dataset by name.

    Parameters
    ----------
    name : str
        One of ours (:data:`mpsl_dist.data.catalog.DATASETS`), or of a plugin.
    root : str or Path, optional
        Folder or file that it is read from; not needed by datasets that are built in.
    text_length : int, optional
        Tokens of a text; of no effect where there are no texts. None leaves the
        dataset's own default.
    plugins : sequence of str
        Modules that may define further datasets.
    own_options : mapping, optional
        Options that only this dataset has, by name.
    needs : sequence of str
        The splits that will be used, ``train``, ``test`` or both. A dataset whose parts may lie on
        several hosts reads no other one, which is empty then.
    options
        ``image_size``, ``audio_frames``, ``modalities``, ``on_error``, ``max_missing`` and
        ``cache``; None leaves the dataset's own default. ``tokens`` (``wordpiece``) and ``sounds``
        (``whisper``): how texts and sounds are put in numbers, where not as usual; everything that
        is read from files takes them.

    Raises
    ------
    DataError
        If there is no such dataset, its files are missing or damaged, or an option is given that
        it has no use for.
    ConfigError
        If a plugin cannot be imported, or ``own_options`` are not what the dataset takes.
    """
    facts = catalog.find(name, plugins)
    given = {option: value for option, value in options.items() if value is not None}
    later = {"tokens", "sounds"} - set(facts.reads)
    forms = {option: given.pop(option) for option in sorted(later & given.keys())}
    useless = sorted(given.keys() - set(facts.reads))
    if useless:
        raise DataError("\n".join(f"data.{option}: {name} has no use for it" for option in useless))
    if "text_length" in facts.reads and text_length is not None:
        given["text_length"] = text_length
    if "on_error" in facts.reads:
        given.setdefault("on_error", facts.on_error)
    if "needs" in facts.reads:
        given["needs"] = tuple(needs)
    own = checked_options(facts.options, own_options or {}, "data.options")
    if facts.options is not None:
        given["options"] = own
    return _in_forms(resolve(facts.load)(root, **given), forms, name)


def _in_forms(splits: Splits, forms: Mapping[str, str], name: str) -> Splits:
    """Return splits whose files become other tokens or spectrograms."""
    read = [split for split in (splits.train, splits.test) if len(split.labels)]
    if not forms or not read:
        return splits
    if not all(isinstance(split, FileDataset) for split in read):
        kinds = " and ".join(forms.values())
        raise DataError(
            f"data.name: {name} gives no {kinds}, which a pretrained part of the model takes; take "
            "other data, or model.text=table and model.audio=patches"
        )
    train, test = (
        replace(split, view=replace(split.view, **forms)) if len(split.labels) else split
        for split in (splits.train, splits.test)
    )
    shapes = replace(read[0].view, **forms).shapes
    return replace(splits, train=train, test=test, shapes=shapes)
