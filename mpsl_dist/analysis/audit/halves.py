"""Data of the audit and of its attacker: disjoint halves of the run's own test data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpsl_dist.actors.holdings import load_data
from mpsl_dist.config import Experiment
from mpsl_dist.data import Dataset, Splits, TensorDataset, presence
from mpsl_dist.errors import DataError

#: Samples that the attacker has of its own, at most.
PUBLIC = 1000


@dataclass(frozen=True)
class Halves:
    """What clients send of, and what the attacker has; they share no picture and no sound.

    Attributes
    ----------
    splits : Splits
        The run's, its training split replaced by the audited samples: what clients hold here.
    audited, public : TensorDataset
    """

    splits: Splits
    audited: TensorDataset
    public: TensorDataset


def read(experiment: Experiment, samples: int) -> Halves:
    """Draw both halves of the test data, always the same for an experiment's seed.

    Parameters
    ----------
    samples : int
        To audit; fewer where the test data has less than twice as many.

    Raises
    ------
    UserError
        If the data cannot be read, or has too few samples.
    """
    needs = ("test",) if experiment.data.place == "own" else ("train", "test")
    # The attacks look at one text a sample.
    in_pairs = replace(experiment, data=replace(experiment.data, unit="pair"))
    splits = load_data(in_pairs, needs)
    if presence(splits.test) is not None:
        raise DataError(
            f"data.name: test samples of {experiment.data.name} lack parts, and audit attacks "
            "whole ones; set data.missing.zeros=true"
        )
    total = len(splits.test.labels)
    rng = np.random.default_rng([experiment.seed, total])
    drawn = rng.permutation(total)[: 2 * samples + PUBLIC]
    held = _fetch(splits.test, drawn.tolist())
    audited, public = _apart(keys(held), min(samples, len(held.labels) // 2), rng)
    if min(len(audited), len(public)) < 10:
        raise DataError(
            f"data.name: {experiment.data.name}: {total} test samples are too few to audit; both "
            "the audit and its attacker need ten that share no picture"
        )
    own, others = _rows(held, audited), _rows(held, public[:PUBLIC])
    return Halves(replace(splits, train=own, test=_rows(held, audited[:0])), own, others)


def keys(held: TensorDataset, names: Sequence[str] = ()) -> list[list[bytes]]:
    """Return every sample's contents as digests, one for each modality; by default of pixels alone.

    Words are few and shared by all, so that a text tells no samples apart.
    """
    pixels = [name for name, x in held.inputs.items() if x.is_floating_point()]
    contents = [
        [hashlib.sha256(row.numpy().tobytes()).digest() for row in held.inputs[name]]
        for name in names or pixels or held.inputs
    ]
    return [list(row) for row in zip(*contents, strict=True)]


def _fetch(dataset: Dataset, positions: list[int]) -> TensorDataset:
    batch = dataset.fetch(positions)
    return TensorDataset(dict(batch.inputs), batch.labels)


def _rows(held: TensorDataset, rows: Sequence[int]) -> TensorDataset:
    some = held.fetch(list(rows))
    return TensorDataset(dict(some.inputs), some.labels)


def _apart(
    digests: Sequence[Sequence[bytes]], samples: int, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Return rows of both halves: samples that share any content lie in the same one."""
    owner: dict[tuple[int, bytes], int] = {}
    leader = list(range(len(digests)))

    def find(row: int) -> int:
        while leader[row] != row:
            row = leader[row]
        return row

    for row, contents in enumerate(digests):
        for content in enumerate(contents):
            leader[find(row)] = find(owner.setdefault(content, row))
    groups: dict[int, list[int]] = {}
    for row in range(len(digests)):
        groups.setdefault(find(row), []).append(row)
    halves: tuple[list[int], list[int]] = ([], [])
    for place in rng.permutation(len(groups)):
        group = list(groups.values())[place]
        halves[len(halves[0]) >= samples].extend(group)
    return halves[0][:samples], halves[1]
