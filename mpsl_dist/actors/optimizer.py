"""How an owner steps its own parameters on gradients that are handed to it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpsl_dist.config import Optimizer as Settings


def rate_factor(settings: Settings, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the learning rate of the run's ``step`` (from 0) as a multiple of ``settings.lr``."""
    warmup = settings.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.schedule == "step":
        return settings.gamma ** (step // steps_per_epoch // settings.every_epochs)
    if settings.schedule == "cosine":
        span = max(1, steps_per_epoch * epochs - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / span)))
    return 1.0


class Stepper:
    """A plain torch optimizer whose rate follows the run's step, not its own count of calls.

    Parameters
    ----------
    parameters : iterable of nn.Parameter
        Only those that require a gradient are kept; there may be none.
    settings : Settings
    """

    def __init__(self, parameters: Iterable[nn.Parameter], settings: Settings) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.settings = settings
        self.span = (1, 1)
        self.optimizer = _build(self.parameters, settings) if self.parameters else None

    def plan(self, steps_per_epoch: int, epochs: int) -> None:
        """Set what the schedule spans; before the first step."""
        self.span = (steps_per_epoch, epochs)

    def step(self, gradients: Mapping[Tensor, Tensor], step: int) -> None:
        """Step once at the rate of the run's step ``step``; what has no gradient stays as it is."""
        if self.optimizer is None:
            return
        rate = self.settings.lr * rate_factor(self.settings, step, *self.span)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for parameter in self.parameters:
            parameter.grad = gradients.get(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return self.optimizer.state_dict() if self.optimizer else {}

    def copied_state(self) -> dict[str, Any]:
        """Return :meth:`state` as a copy on CPU, to be sent."""
        state = copy.deepcopy(self.state())
        for values in state.get("state", {}).values():
            values |= {name: x.cpu() for name, x in values.items() if isinstance(x, Tensor)}
        return state

    def take_over(self, moments: Mapping[int, Mapping[str, Any]]) -> None:
        """Continue from another's moments, copied, by the parameter's place."""
        self.load(self.state() | {"state": copy.deepcopy(dict(moments))})

    def load(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`."""
        if self.optimizer:
            self.optimizer.load_state_dict(state)


def _build(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    # Fused: a client's few small tensors cost a step in calls, not in arithmetic.
    common = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": True}
    if settings.name == "sgd":
        return torch.optim.SGD(parameters, momentum=settings.momentum, **common)
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(parameters, **common)
