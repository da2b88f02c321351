"""Which client holds which training sample, and how many of them each global batch takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mpsl_dist.data.dataset import Splits
from mpsl_dist.errors import DataError

#: The positions of every client's samples in the training set: one (samples,) array a client.
Positions = list[NDArray[np.int64]]
#: Draws of the released code's partitioner before it gives up.
_TRIES = 10


@dataclass(frozen=True)
class Dealt:
    """The training samples of every client.

    Attributes
    ----------
    parts : list of array
        The positions of every client's samples in the training set.
    rule : str
        By which rule and seed they were dealt, in words.
    names : tuple of str
        The clients' own names, where the data has them.
    """

    parts: Positions
    rule: str
    names: tuple[str, ...] = ()


def deal(splits: Splits, clients: int, kind: str, alpha: float, minimum: int, seed: int) -> Dealt:
    """Spread the training samples by ``data.partition.kind``.

    ``natural`` follows the owners that the data names and makes each of them a client; otherwise
    retrieval deals pictures (it has no classes to be skewed), and classes are spread by
    :func:`partition`.
    """
    labels = splits.train.labels
    if kind == "natural":
        names, parts = natural(getattr(splits.train, "clients", None))
        return Dealt(parts, "natural: as the data names its owners, nothing drawn", names)
    if splits.retrieval:
        rule = f"shuffled pictures dealt evenly, each with all its captions; seed {seed}"
        return Dealt(deal_pictures(labels, clients, seed), rule)
    rule = f"iid: a shuffled deck dealt evenly; seed {seed}"
    if kind == "dirichlet":
        rule = (
            f"dirichlet({alpha:g}) for every class; a client below the minimum of {minimum} takes "
            f"single samples of the largest client; seed {seed}"
        )
    elif kind == "dirichlet-balanced":
        rule = (
            f"dirichlet-balanced({alpha:g}) for every class, nothing more for a client above the "
            f"mean; at least {minimum} samples each; seed {seed}"
        )
    return Dealt(partition(labels, clients, kind, alpha, minimum, seed), rule)


def natural(owners: Sequence[str] | None) -> tuple[tuple[str, ...], Positions]:
    """Return the owners' names, sorted (numbers by value), and every owner's samples.

    Raises
    ------
    DataError
        If the data names no owners, or not every sample's.
    """
    if owners is None:
        raise DataError("data.partition.kind: natural needs data that names every sample's client")
    nameless = sum(not owner.strip() for owner in owners)
    if nameless:
        raise DataError(f"data.partition.kind: natural, but {nameless} samples name no client")
    unique = set(owners)
    numbers = all(name.isdecimal() for name in unique)
    names = sorted(unique, key=lambda name: (int(name) if numbers else 0, name))
    number = {name: client for client, name in enumerate(names)}
    owner = np.array([number[name] for name in owners], dtype=np.int64)
    return tuple(names), _by_owner(owner, len(names))


def partition(
    labels: Tensor, clients: int, kind: str, alpha: float, minimum: int, seed: int
) -> Positions:
    """Spread the samples over the clients.

    ``dirichlet`` draws, for every class, the clients' proportions from Dir(alpha) (Li et al. 2021).
    ``iid`` deals a shuffled deck. A client left with fewer than ``minimum`` samples then receives
    samples one at a time, each a random one of whichever client holds most at that moment: the
    smallest change to the draw that keeps the minimum, and it always succeeds.
    ``dirichlet-balanced`` is the paper's released code's rule, see :func:`_balanced`.

    Parameters
    ----------
    labels : Tensor
        (samples,) int64.
    clients : int
        Number of clients.
    kind : str
        ``dirichlet``, ``dirichlet-balanced`` or ``iid``.
    alpha : float
        Concentration of the Dirichlet distribution; the smaller, the more the clients' classes
        differ.
    minimum : int
        Samples that every client has at least, unless ``iid``.
    seed : int
        Fixes the draw.

    Raises
    ------
    DataError
        If there are fewer than ``clients * minimum`` samples, or ``dirichlet-balanced`` gives up.
    """
    samples = len(labels)
    if samples < clients * minimum:
        raise DataError(
            f"clients: {clients} clients with at least {minimum} samples each "
            f"(data.partition.minimum) need {clients * minimum}, the training set has {samples}"
        )
    rng = np.random.default_rng(seed)
    if kind == "iid":
        return [np.sort(part) for part in np.array_split(rng.permutation(samples), clients)]
    values = labels.numpy()
    if kind == "dirichlet-balanced":
        return _balanced(values, clients, alpha, minimum, rng)
    held: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(values):
        members = rng.permutation(np.flatnonzero(values == label))
        proportions = rng.dirichlet(np.full(clients, alpha))
        # With a small alpha the draw can underflow to all zeros: then one client takes the class.
        if not np.isfinite(proportions).all() or proportions.sum() == 0:
            proportions = np.eye(clients)[rng.integers(clients)]
        cuts = np.round(np.cumsum(proportions)[:-1] * len(members)).astype(int)
        bounds = np.array([0, *cuts, len(members)])
        for client in np.flatnonzero(np.diff(bounds)):
            held[client].extend(members[bounds[client] : bounds[client + 1]].tolist())
    _fill(held, minimum, rng)
    return [np.sort(np.array(part, dtype=np.int64)) for part in held]


def _balanced(
    values: NDArray[np.int64], clients: int, alpha: float, minimum: int, rng: np.random.Generator
) -> Positions:
    """Spread the classes as the released code does, with Flower's self-balancing partitioner.

    Class by class, a client that holds more than the mean already takes nothing more, and the
    others' proportions are scaled up; of a class, a client takes samples that follow each other.
    The whole draw is repeated where a client is left with fewer than ``minimum``, and given up
    after :data:`_TRIES` draws.
    """
    mean, fewest = len(values) / clients, 0
    for _ in range(_TRIES):
        held: list[list[int]] = [[] for _ in range(clients)]
        for label in np.unique(values):
            members = np.flatnonzero(values == label)
            open_n = np.array([len(part) <= mean for part in held])
            proportions = rng.dirichlet(np.full(clients, alpha)) * open_n
            total = proportions.sum()
            # With a small alpha the draw can underflow to all zeros: then the open share alike.
            proportions = proportions / total if total > 0 else open_n / open_n.sum()
            cuts = (np.cumsum(proportions) * len(members)).astype(int)[:-1]
            for part, own in zip(held, np.split(members, cuts), strict=True):
                part.extend(own.tolist())
        sizes = [len(part) for part in held]
        if min(sizes) >= minimum:
            return [np.sort(np.array(part, dtype=np.int64)) for part in held]
        fewest = max(fewest, min(sizes))
    raise DataError(
        f"data.partition.kind: dirichlet-balanced with alpha={alpha:g} left a client with fewer "
        f"than {minimum} samples (data.partition.minimum) in {_TRIES} of {_TRIES} draws, at best "
        f"with {fewest}; take a larger alpha, fewer clients, another seed, or kind=dirichlet, "
        "which always succeeds"
    )


def deal_pictures(pictures: Tensor, clients: int, seed: int) -> Positions:
    """Deal shuffled pictures to the clients, each with all its captions (retrieval has no classes).

    Parameters
    ----------
    pictures : Tensor
        (pairs,) int64: the picture of every pair.

    Raises
    ------
    DataError
        If there are fewer pictures than clients.
    """
    unique, place = np.unique(pictures.numpy(), return_inverse=True)
    shuffled = np.random.default_rng(seed).permutation(len(unique))
    if len(shuffled) < clients:
        raise DataError(f"clients: {clients} clients, but only {len(shuffled)} training pictures")
    owner = np.empty(len(unique), dtype=np.int64)
    for client, part in enumerate(np.array_split(shuffled, clients)):
        owner[part] = client
    return _by_owner(owner[place], clients)


def _by_owner(owner: NDArray[np.int64], clients: int) -> Positions:
    """Return every client's positions, ascending, given the owner of every sample."""
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=clients))[:-1])


def _fill(held: list[list[int]], minimum: int, rng: np.random.Generator) -> None:
    for part in held:
        while len(part) < minimum:
            largest = max(held, key=len)
            part.append(largest.pop(rng.integers(len(largest))))


def shares(sizes: list[int], batch_size: int, rule: str) -> NDArray[np.int64]:
    """Plan an epoch: how many samples of every client are in every global batch.

    ``proportional`` puts the j-th of a client's n samples at (j + 1/2)/n on a line and cuts the
    line every ``batch_size`` samples (the Sainte-Laguë rule): every client's part follows its share
    of the data, every global batch but the last is full, and all clients finish together.
    ``equal`` takes ceil(B/N) of every client until it runs dry (the released code's rule).

    Parameters
    ----------
    sizes : list of int
        Training samples of every client.
    batch_size : int
        Samples of a global batch, B.
    rule : str
        ``proportional`` or ``equal``.

    Returns
    -------
    array
        (steps, clients) int64; every column sums to the client's size.
    """
    clients = len(sizes)
    if rule == "equal":
        each = -(-batch_size // clients)
        steps = max(-(-size // each) for size in sizes)
        starts = np.arange(steps)[:, None] * each
        return np.clip(np.array(sizes)[None, :] - starts, 0, each).astype(np.int64)
    owner = np.repeat(np.arange(clients), sizes)
    along = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    line = owner[np.argsort(along, kind="stable")]
    steps = -(-len(line) // batch_size)
    plan = np.zeros((steps, clients), dtype=np.int64)
    np.add.at(plan, (np.arange(len(line)) // batch_size, line), 1)
    return plan


def mini_batches(
    samples: int, counts: Sequence[int], seed: int, client: int, epoch: int
) -> dict[int, list[int]]:
    """Return which of a client's own samples, from 0, are in each of its mini-batches of an epoch.

    Parameters
    ----------
    samples : int
        How many the client has.
    counts : sequence of int
        How many of them it contributes to each step of the epoch.

    Returns
    -------
    dict of int to list of int
        Step -> positions, of the steps that it contributes to.
    """
    ends = np.cumsum(counts)
    order = epoch_order(samples, seed, client, epoch)
    return {
        step: order[ends[step] - count : ends[step]].tolist()
        for step, count in enumerate(counts)
        if count
    }


def epoch_order(samples: int, seed: int, client: int, epoch: int) -> NDArray[np.int64]:
    """Return a client's order of samples in an epoch: (samples,), fixed by its arguments alone."""
    return np.random.default_rng([seed, client, epoch]).permutation(samples)
