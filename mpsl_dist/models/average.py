"""FedAvg's weighted mean (McMahan et al. 2017), and the parameters that it is taken of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Mean:
    """A weighted mean of states that come one by one; none of them is kept.

    The sum runs in float64, so that equal float32 states average to themselves, bit for bit.

    Parameters
    ----------
    total : float
        The weights of all that are expected; fewer may come.
    """

    def __init__(self, total: float) -> None:
        self.total = total
        #: The weights of those that came.
        self.weight = 0.0
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._like: dict[str, torch.dtype] = {}

    def add(self, state: Mapping[str, Tensor], weight: float) -> None:
        """Take in a state; of a key that it lacks, the others' mean is taken."""
        for key, x in state.items():
            part = x.double() * (weight / self.total)
            self._sums[key] = self._sums[key].add_(part) if key in self._sums else part
            self._weights[key] = self._weights.get(key, 0.0) + weight
            self._like.setdefault(key, x.dtype)
        self.weight += weight

    def result(self) -> dict[str, Tensor]:
        """Return the mean of what came, key by key, in the types of who first had it."""
        assert self.weight > 0
        missed = {key: self.total / weight for key, weight in self._weights.items()}
        return {key: (x * missed[key]).to(self._like[key]) for key, x in self._sums.items()}


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of states, as :class:`Mean` takes it.

    Parameters
    ----------
    states : sequence of mapping
        At least one.
    weights : sequence of float
        One per state; they need not sum to one.
    """
    mean = Mean(float(sum(weights)))
    for state, weight in zip(states, weights, strict=True):
        mean.add(state, weight)
    return mean.result()


def trainable_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return copies of a module's trainable parameters on CPU, by name, without the frozen ones."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def load_trainable(
    module: torch.nn.Module, state: Mapping[str, Tensor], some: bool = False
) -> None:
    """Set a module's trainable parameters to ``state``.

    Parameters
    ----------
    some : bool
        Whether ``state`` may lack some, which then stay as they are.

    Raises
    ------
    ValueError
        If ``state`` names other parameters than the trainable ones.
    """
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    wrong = state.keys() - own.keys() if some else own.keys() ^ state.keys()
    if wrong:
        raise ValueError(f"parameters differ: {sorted(wrong)}")
    for name, values in state.items():
        own[name].copy_(values)
