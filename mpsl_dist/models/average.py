"""FedAvg's weighted mean (McMahan et al. 2017), and the parameters that it is taken of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of states, key by key, in the types of the first.

    The sum runs in float64, so that equal float32 states average to themselves, bit for bit.

    Parameters
    ----------
    states : sequence of mapping
        At least one; all have the same keys and shapes.
    weights : sequence of float
        One per state; they need not sum to one.
    """
    total = float(sum(weights))
    assert states and total > 0 and len(states) == len(weights)
    result = {}
    for key, like in states[0].items():
        parts = [
            state[key].double() * (w / total) for state, w in zip(states, weights, strict=True)
        ]
        result[key] = torch.stack(parts).sum(0).to(like.dtype)
    return result


def trainable_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return copies of a module's trainable parameters on CPU, by name, without the frozen ones."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def load_trainable(module: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set a module's trainable parameters to ``state``.

    Raises
    ------
    ValueError
        If ``state`` names other parameters than the trainable ones.
    """
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if own.keys() != state.keys():
        raise ValueError(f"parameters differ: {sorted(own.keys() ^ state.keys())}")
    for name, parameter in own.items():
        parameter.copy_(state[name])
