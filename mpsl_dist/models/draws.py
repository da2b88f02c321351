"""The random draws of a module that is not built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


@contextmanager
def draws_alone() -> Iterator[None]:
    """Open a context in which modules get no memory and no numbers, and torch's generator moves on
    as if they did: what is built after it begins with the same numbers as with them.

    What is built within is an outline on the meta device; each of its parameters is drawn in memory
    that is given back at once.
    """
    with torch.device("meta"), _DrawnOnCpu():
        yield


class _DrawnOnCpu(TorchDispatchMode):
    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            on_cpu, named = tree_map(_on_cpu, (tuple(args), dict(kwargs)))
            func(*on_cpu, **named)
        return func(*args, **kwargs)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="cpu")
    return torch.device("cpu") if isinstance(value, torch.device) else value
