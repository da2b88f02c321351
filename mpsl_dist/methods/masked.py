"""Masked sums, as the server takes them: what it learns of the clients' tokenizers is their sum.

The protocol and what it protects stand in :mod:`mpsl_dist.actors.masking` and ``docs/masked.md``.

Shape legend: ``m`` clients of a sum, ``n`` trained tokenizer parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsl_dist.actors import masking
from mpsl_dist.actors.masking import KEY, Masked
from mpsl_dist.config import Experiment
from mpsl_dist.config.split_checks import FEWEST_IN_SUM
from mpsl_dist.errors import RemoteError
from mpsl_dist.methods.link import Link
from mpsl_dist.methods.progress import warn
from mpsl_dist.models import fixed_point
from mpsl_dist.models.average import trainable_state
from mpsl_dist.models.tokenizers import Tokenizers
from mpsl_dist.runtime.answers import name_clients

#: Kind of traffic of masked vectors -> kinds of the keys and seeds up and down.
_KEYS = {
    "sync_up": ("sync_keys_up", "sync_keys_down"),
    "test_weights_up": ("test_keys_up", "test_keys_down"),
}
#: Clients whose vectors the server holds at once.
_AT_ONCE = 64


@dataclass
class Masks:
    """What the server keeps between masked sums.

    Attributes
    ----------
    like : dict of str to Tensor
        The trained tokenizer parameters' names, shapes and type.
    begun : int
        Sums that were begun, those too that were not opened.
    """

    like: dict[str, Tensor]
    begun: int = 0

    def of_sum(self, vector_n: Tensor) -> Tensor:
        """Return a sum in the type of the parameters."""
        return vector_n.to(next(iter(self.like.values())).dtype)

    def named(self, vector_n: Tensor) -> dict[str, Tensor]:
        """Return a vector's parameters by name, in their shapes and type."""
        parts = vector_n.split([x.numel() for x in self.like.values()])
        return {
            name: part.view_as(x).to(x.dtype)
            for (name, x), part in zip(self.like.items(), parts, strict=True)
        }


def masks_of(experiment: Experiment, tokenizers: Tokenizers) -> Masks | None:
    """Return what masked sums need; None where ``tokenizer_sync.masked`` asks for none.

    Raises
    ------
    ConfigError
        If the package for it is not installed.
    """
    if not experiment.tokenizer_sync.masked:
        return None
    masking.require()
    return Masks(trainable_state(tokenizers))


def masked_sum(
    link: Link, masks: Masks, what: str, shares: Mapping[int, float], where: str, kind: str
) -> tuple[Tensor, list[int]] | None:
    """Return the sum of vectors of those of these clients that have one and stay to the end.

    Parameters
    ----------
    what : "gradients" or "weights"
        What they add: as of :meth:`mpsl_dist.actors.client.Client.offer_key`.
    shares : mapping of int to float
        Client -> what its vector is multiplied by, where it is.
    where : str
        What the user should read, as "step 17".
    kind : str
        Of traffic, that the vectors count as.

    Returns
    -------
    tuple of Tensor and list of int, or None
        (n,) float64 and whose vectors are in it; None where fewer than three have one.

    Notes
    -----
    A client that is lost before its vector has arrived is left out: the others keep theirs, and
    begin again with other masks. One that is lost after that is in the sum.
    """
    keys_up, keys_down = _KEYS[kind]
    while True:
        number, masks.begun = masks.begun, masks.begun + 1
        asked = [n for n in shares if n not in link.lost]
        words = {n: (number, what, shares[n], len(asked)) for n in asked}
        offered = link.start("offer_key", words, where, up=keys_up)()
        keys = {n: key for n, key in sorted(offered.items()) if key is not None}
        if len(keys) < FEWEST_IN_SUM:
            return None
        found = _locked(link, number, keys, where, (keys_down, kind))
        if found is not None:
            locked_n, sealed = found
            seed = _unlock(link, number, list(keys), sealed, where, (keys_down, keys_up))
            whole_n = locked_n - masking.expand(seed.numpy().tobytes(), len(locked_n))
            return fixed_point.decode(whole_n), list(keys)
        warn(f"{where}: the masked sum is begun again without the lost")


def _locked(
    link: Link, number: int, keys: Mapping[int, Tensor], where: str, kinds: tuple[str, str]
) -> tuple[Tensor, Tensor] | None:
    """Return the sum of all masked vectors, and the lock's sealed seed; None if one is lacking."""
    members, table = tuple(keys), torch.stack(list(keys.values()))
    total_n, sealed = torch.zeros((), dtype=torch.long), None
    for start in range(0, len(members), _AT_ONCE):
        asked = members[start : start + _AT_ONCE]
        words = dict.fromkeys(asked, (number, members, table))
        sent: dict[int, Masked] = link.start("mask", words, where, down=kinds[0], up=kinds[1])()
        if len(sent) < len(asked):
            return None
        for masked in sent.values():
            total_n = total_n + masked.vector_n
            sealed = sealed if masked.sealed is None else masked.sealed
    assert sealed is not None
    return total_n, sealed


def _unlock(
    link: Link,
    number: int,
    members: Sequence[int],
    sealed: Tensor,
    where: str,
    kinds: tuple[str, str],
) -> Tensor:
    """Ask one client after the other for the lock's seed, until one answers.

    Raises
    ------
    RemoteError
        If all are lost, while enough others are left for the run to go on.
    """
    for place, client in enumerate(members):
        row = sealed[place].clone() if place else None
        words = {client: (number, row)} if client not in link.lost else {}
        told = link.start("unlock", words, where, down=kinds[0], up=kinds[1])()
        if told:
            return told[client]
    raise RemoteError(
        f"{where}: {name_clients(members)} are lost, and nobody else can open their masked sum. "
        "Start them again, and the run with --resume"
    )


def sum_bytes(taking_part: NDArray[np.bool_], numbers: int, kind: str) -> dict[str, NDArray]:
    """Return the bytes of a masked sum in which nobody is lost, by kind and client.

    Parameters
    ----------
    taking_part : array
        (clients,) bool: who has a vector; all zero bytes where these are too few.
    numbers : int
        n.
    """
    keys_up, keys_down = _KEYS[kind]
    part = taking_part.astype(np.int64) * (taking_part.sum() >= FEWEST_IN_SUM)
    first = (part * np.cumsum(part) == 1).astype(np.int64)
    sealed, opened = first * KEY * part.sum(), first * KEY
    return {
        kind: part * numbers * fixed_point.BYTES + sealed,
        # Who has nothing to add offers no key; of too few, keys are all that crosses.
        keys_up: taking_part * KEY + opened,
        keys_down: part * part.sum() * KEY,
    }
