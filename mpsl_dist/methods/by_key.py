"""Who has which parameters: clients lack those of modalities that they never have.

Shape legend: ``n`` trained tokenizer parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from mpsl_dist.models.tokenizers import of_modalities

T = TypeVar("T")


@dataclass(frozen=True)
class Keys:
    """The trained parameters, and who has which; by default everybody has all.

    Attributes
    ----------
    sizes : mapping of str to int
        Name -> numbers, of all modalities together, in the order of a gradient vector; of
        tokenizers' alone.
    modalities : mapping of int to sequence of str
        Client -> those that it has; clients that have all are left out.
    trained : mapping of int to sequence of str
        Client -> those that it trains on; clients that train on all are left out.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    modalities: Mapping[int, Sequence[str]] = field(default_factory=dict)
    trained: Mapping[int, Sequence[str]] = field(default_factory=dict)

    def held(self, client: int) -> tuple[str, ...]:
        """Return the client's modalities; empty where it has all."""
        return tuple(self.modalities.get(client, ()))

    def own(self, client: int, weights: Mapping[str, T]) -> Mapping[str, T]:
        """Return those of these values by parameter that the client has."""
        return of_modalities(weights, self.held(client))

    def taught(self, client: int, weights: Mapping[str, T]) -> Mapping[str, T]:
        """Return those of a client's values that count in an average: of what it trains on."""
        return of_modalities(weights, self.trained.get(client, ()))

    def sum(self, vectors: Mapping[int, Tensor]) -> Tensor:
        """Return the sum (n,) of clients' gradient vectors, by key; there is at least one."""
        if not self.modalities:
            return sum(vectors.values())
        first = next(iter(vectors.values()))
        total_n = first.new_zeros(sum(self.sizes.values()))
        for client, vector in vectors.items():
            total_n[self._places(client)] += vector
        return total_n

    def part(self, client: int, vector_n: Tensor) -> Tensor:
        """Return the client's own part of a sum."""
        return vector_n[self._places(client)] if client in self.modalities else vector_n

    def speakers(self, clients: Sequence[int]) -> list[int]:
        """Return the first of these clients, and those after it that have what none before has."""
        found: list[int] = []
        told: set[str] = set()
        for client in clients:
            has = self.own(client, self.sizes).keys() if self.modalities else {""}
            if not has <= told:
                found.append(client)
                told |= has
        return found

    @cached_property
    def _named(self) -> dict[str, Tensor]:
        numbers = torch.arange(sum(self.sizes.values())).split(list(self.sizes.values()))
        return dict(zip(self.sizes, numbers, strict=True))

    def _places(self, client: int) -> Tensor:
        return torch.cat(list(self.own(client, self._named).values()))
