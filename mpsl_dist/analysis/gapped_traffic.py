"""Bytes that cross where samples lack parts: none of what is absent, and a mask beside the rest.

Shape legend: ``b`` batch, ``m`` modalities, ``n`` samples of a client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpsl_dist.actors.choices import wire_of
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.actors.local_data import batch_sizes
from mpsl_dist.analysis import flops
from mpsl_dist.analysis.flops import ModelParts
from mpsl_dist.config import Experiment
from mpsl_dist.config.methods import facts_of
from mpsl_dist.data.gaps import drawn_cells
from mpsl_dist.data.partition import mini_batches
from mpsl_dist.methods.by_key import Keys

#: Which of a client's samples have which modality, (n, m) bool.
Cells = NDArray[np.bool_]


@dataclass(frozen=True)
class Gaps:
    """What every client's samples have.

    Attributes
    ----------
    train, test : tuple of array
        (n, m) bool by client, in the client's own order; without test samples (0, m).
    names : tuple of str
        The modalities.
    """

    train: tuple[Cells, ...]
    test: tuple[Cells, ...]
    names: tuple[str, ...]

    def keys(self, parts: ModelParts, whole: bool = False, tests: bool = True) -> Keys:
        """Return which client trains which tokenizer parameters, bytes in place of numbers.

        Parameters
        ----------
        whole : bool
            Those of the server's part too.
        tests : bool
            Whether its test samples count for what modalities a client has.
        """
        number, modules = parts.bytes_per_number, [parts.tokenizers, parts.server_model]
        trained = (pair for module in modules[: 1 + whole] for pair in module.named_parameters())
        sizes = {name: p.numel() * number for name, p in trained if p.requires_grad}
        each = zip(self.train, self.test, strict=True) if tests else zip(self.train)
        has = [np.concatenate(own).any(0) for own in each]
        held = {n: tuple(np.array(self.names)[there]) for n, there in enumerate(has)}
        return Keys(sizes, {n: own for n, own in held.items() if len(own) < len(self.names)})

    def weights(
        self, parts: ModelParts, whole: bool = False, tests: bool = True
    ) -> NDArray[np.int64]:
        """Return the bytes of every client's :meth:`keys`, (clients,)."""
        keys = self.keys(parts, whole, tests)
        return np.array([sum(keys.own(n, keys.sizes).values()) for n in range(len(self.train))])

    def speakers(self, parts: ModelParts) -> NDArray[np.int64]:
        """Return who sends where few speak for all: (clients,), 1 or 0."""
        found = np.zeros(len(self.train), dtype=np.int64)
        found[self.keys(parts).speakers(range(len(found)))] = 1
        return found


def gaps_of(holdings: Holdings) -> Gaps | None:
    """Return what every client's samples have; None where they lack nothing."""
    names = tuple(holdings.splits.shapes)
    masks = []
    for n, size in enumerate(holdings.sizes):
        sizes = size, len(holdings.tests[n])
        whole = (np.ones((held, len(names)), dtype=bool) for held in sizes)
        found = zip(holdings.present(n), whole, strict=True)
        masks.append([ones if own is None else own for own, ones in found])
    train, test = map(tuple, zip(*masks, strict=True))
    return None if all(own.all() for own in (*train, *test)) else Gaps(train, test, names)


def expected(experiment: Experiment, names: Sequence[str], samples: int) -> Gaps | None:
    """Return gaps as they are drawn, as if all clients held equally many samples in a row.

    None where nothing is drawn: gaps that data have of their own are not known without them.
    """
    missing = experiment.data.missing
    if not missing.rate or missing.zeros or "data.missing" not in facts_of(experiment).reads:
        return None
    parts = np.array_split(np.arange(samples), experiment.clients)
    seed = experiment.seed if missing.seed is None else missing.seed
    cells_nm = drawn_cells(missing.rate, missing.per, seed, samples, parts, len(names))
    none = np.ones((0, len(names)), dtype=bool)
    return Gaps(tuple(cells_nm[own] for own in parts), (none,) * len(parts), tuple(names))


def of_training(
    parts: ModelParts, plan: NDArray[np.int64], epochs: int, gaps: Gaps
) -> dict[str, NDArray[np.int64]]:
    """Return the activations' bytes of ``epochs`` epochs, and their gradients', by client."""
    seed, found = parts.experiment.seed, []
    for n, cells_nm in enumerate(gaps.train):
        batches = (
            cells_nm[rows]
            for epoch in range(epochs)
            for rows in mini_batches(len(cells_nm), plan[:, n], seed, n, epoch).values()
        )
        found.append(_both_ways(parts, batches))
    up, down = np.array(found, dtype=np.int64).T
    return {"activations": up, "cut_layer_gradients": down}


def of_test(parts: ModelParts, gaps: Gaps) -> NDArray[np.int64]:
    """Return the activations' bytes of one test at the clients, by client."""
    each = max(1, parts.experiment.training.test_batch_size // len(gaps.test))
    found = []
    for cells_nm in gaps.test:
        ends = np.cumsum(batch_sizes(len(cells_nm), each))
        batches = np.split(cells_nm, ends[:-1]) if len(ends) else []
        found.append(_both_ways(parts, batches, carried=False)[0])
    return np.array(found, dtype=np.int64)


def _both_ways(
    parts: ModelParts, batches: Iterable[Cells], carried: bool = True
) -> tuple[int, int]:
    """Return the bytes of mini-batches' activations, and of their gradients.

    Parameters
    ----------
    carried : bool
        Whether gradients come back, and need carriers where the wire is coded.
    """
    cost = _costs(parts)
    sent = [cost(cells_bm, carried) for cells_bm in batches]
    return sum(up for up, _ in sent), sum(down for _, down in sent)


def _costs(parts: ModelParts) -> Callable[[Cells, bool], tuple[int, int]]:
    wire, number = wire_of(parts.experiment), parts.bytes_per_number
    names, lengths = list(parts.inputs.shapes), np.array(parts.tokenizers.lengths)
    trained_m = np.array([flops.embed(parts, name, 1).requires_grad for name in names])
    up = wire.activations.token_bytes(parts.width, number)
    down = wire.gradients.token_bytes(parts.width, number)
    early = parts.server_model.fusion == "early"

    def cost(cells_bm: Cells, carried: bool) -> tuple[int, int]:
        whole, rows_m = bool(cells_bm.all()), cells_bm.sum(0)
        # Whole samples travel as one tensor in early fusion, in which everything is trained or not.
        asked_m = np.full_like(trained_m, trained_m.any()) if whole and early else trained_m
        tensors = int(asked_m.any()) if whole and early else int((asked_m & (rows_m > 0)).sum())
        carriers = 0 if wire.plain or not carried else tensors
        mask = 0 if whole else cells_bm.size
        sent, back = int(rows_m @ lengths), int((rows_m * asked_m) @ lengths)
        return sent * up + mask + carriers, back * down

    return cost
