"""Parts of samples that are left out on purpose (``data.missing``), drawn so that rates are nested.

Shape legend: ``n`` rows of cells, ``m`` modalities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsl_dist.data.dataset import Dataset, Splits, presence
from mpsl_dist.errors import DataError

#: Streams of a seed: the clients' cells, the training samples', the test samples'.
_CLIENTS, _TRAIN, _TEST = range(3)
#: Positions in a split, by client.
Parts = Sequence[NDArray[np.int64]]


def draw(rate: float, rows: int, modalities: int, seed: Sequence[int]) -> NDArray[np.bool_]:
    """Return which cells are present: (n, m), each absent with the chance ``rate``.

    A cell is absent where its own uniform number lies below the rate: what is absent at one rate is
    so at every higher one. Where a row would have nothing, its largest number stays.

    Parameters
    ----------
    seed : sequence of int
        What the numbers are drawn from, and nothing else is.
    """
    uniform_nm = np.random.default_rng(seed).random((rows, modalities))
    largest_nm = uniform_nm == uniform_nm.max(1, keepdims=True)
    return (uniform_nm >= rate) | largest_nm


def leave_out(
    splits: Splits,
    rate: float,
    per: str,
    seed: int,
    at_test: bool,
    parts: Parts,
    tests: Parts,
) -> Splits:
    """Return splits without what the draws leave out.

    Parameters
    ----------
    rate, per, seed, at_test
        As ``data.missing`` has them.
    parts, tests : sequence of array
        Every client's training and test samples; no test samples where the server holds them.

    Raises
    ------
    DataError
        If the data have gaps of their own, or cannot leave anything out.
    """
    names = list(splits.shapes)
    for split in (splits.train, splits.test):
        if presence(split) is not None:
            raise DataError(
                "data.missing.rate: the data lack parts of their own, and nothing is drawn on top "
                "of them; set data.missing.rate=0"
            )
        if not hasattr(split, "without"):
            raise DataError(
                f"data.missing.rate: {type(split).__name__} has no 'without(present)'; set "
                "data.missing.rate=0"
            )

    def drawn(split: Dataset, held: Parts, stream: int) -> Dataset:
        how = rate, per, seed, len(split.labels), held, len(names), stream
        return split.without(_by_name(names, drawn_cells(*how)))

    train = drawn(splits.train, parts, _TRAIN)
    test = drawn(splits.test, tests, _TEST) if at_test else splits.test
    return replace(splits, train=train, test=test)


def drawn_cells(
    rate: float,
    per: str,
    seed: int,
    samples: int,
    held: Parts,
    modalities: int,
    stream: int = _TRAIN,
) -> NDArray[np.bool_]:
    """Return which samples of a split have which modality, (n, m).

    Parameters
    ----------
    samples : int
        n.
    held : sequence of array
        Every client's; all empty where the server holds them, and there is nobody to draw for.
    """
    if per == "sample" or not any(map(len, held)):
        return draw(rate, samples, modalities, [seed, stream])
    clients_cm = draw(rate, len(held), modalities, [seed, _CLIENTS])
    cells_nm = np.ones((samples, modalities), dtype=bool)
    for client, own in enumerate(held):
        cells_nm[own] = clients_cm[client]
    return cells_nm


def _by_name(names: Sequence[str], cells_nm: NDArray[np.bool_]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(cells_nm[:, m].copy()) for m, name in enumerate(names)}


def cells(present: Mapping[str, Tensor], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return the mask (n, m) of these rows of a split, modalities in the order of fusion."""
    return np.stack([there.numpy()[rows] for there in present.values()], axis=1)
