"""What a sample is. Knows no model and no process."""

from __future__ import annotations

from collections.abc import Callable

from mpsl_dist.data.dataset import Batch, DataError, Dataset, Splits, TensorDataset, load_batches

__all__ = ["Batch", "DataError", "Dataset", "Splits", "TensorDataset", "load", "load_batches"]


def _digits_qa(root: str | None, text_length: int) -> Splits:
    from mpsl_dist.data import digits_qa

    return digits_qa.load(text_length)


def _files(name: str) -> Callable[[str | None, int], Splits]:
    def load_files(root: str | None, text_length: int) -> Splits:
        from mpsl_dist.data import files

        return files.load(name, root, text_length)

    return load_files


#: Every dataset by name: ``load(root, text_length)``. Imports wait until one is chosen.
LOADERS: dict[str, Callable[[str | None, int], Splits]] = {
    "digits-qa": _digits_qa,
    "mnist-fsdd": _files("mnist-fsdd"),
    "coco-qa": _files("coco-qa"),
    "t4sa": _files("t4sa"),
    "kinetics-sounds": _files("kinetics-sounds"),
    "ucf101": _files("ucf101"),
    "meld": _files("meld"),
    "flickr30k": _files("flickr30k"),
    "ms-coco": _files("ms-coco"),
    "manifest": _files("manifest"),
}


def load(name: str, root: str | None = None, text_length: int = 16) -> Splits:
    """Load a dataset by name.

    Raises
    ------
    DataError
        If there is no such dataset, or its files are missing or damaged.
    """
    if name not in LOADERS:
        raise DataError(f"data.name: unknown dataset '{name}'; valid: {', '.join(sorted(LOADERS))}")
    return LOADERS[name](root, text_length)
