"""What a sample is. Knows no model and no process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpsl_dist.data.dataset import Batch, Dataset, Splits, TensorDataset, load_batches
from mpsl_dist.errors import DataError

__all__ = ["Batch", "DataError", "Dataset", "Splits", "TensorDataset", "load", "load_batches"]


def _digits_qa(root: str | None, text_length: int, **options: Any) -> Splits:
    from mpsl_dist.data import digits_qa

    useless = sorted(name for name, value in options.items() if value is not None)
    if useless:
        raise DataError("\n".join(f"data.{name}: digits-qa has no use for it" for name in useless))
    return digits_qa.load(text_length)


def _files(name: str) -> Callable[..., Splits]:
    def load_files(root: str | None, text_length: int, **options: Any) -> Splits:
        from mpsl_dist.data import files

        return files.load(name, root, text_length, **options)

    return load_files


_FROM_FILES = (
    "mnist-fsdd",
    "coco-qa",
    "t4sa",
    "kinetics-sounds",
    "ucf101",
    "meld",
    "flickr8k",
    "flickr30k",
    "ms-coco",
    "manifest",
)
#: Every dataset by name: ``load(root, text_length, **options)``. Imports wait until one is chosen.
LOADERS: dict[str, Callable[..., Splits]] = {
    "digits-qa": _digits_qa,
    **{name: _files(name) for name in _FROM_FILES},
}


def load(name: str, root: str | None = None, text_length: int = 16, **options: Any) -> Splits:
    """Load a dataset by name.

    Parameters
    ----------
    options
        ``image_size``, ``audio_frames``, ``modalities``, ``on_error``, ``cache``; None is the
        dataset's own.

    Raises
    ------
    DataError
        If there is no such dataset, or its files are missing or damaged, or an option is given
        that it has no use for.
    """
    if name not in LOADERS:
        raise DataError(f"data.name: unknown dataset '{name}'; valid: {', '.join(sorted(LOADERS))}")
    return LOADERS[name](root, text_length, **options)
