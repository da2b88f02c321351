"""Everything that crosses between the clients of this process and their server, written down.

The transport of a method that runs in one process: the same messages reach the same actors, and
each is kept with the gradients that the backward sends for it, both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpsl_dist.models.codecs import Packed, decode
from mpsl_dist.runtime.answers import Answers
from mpsl_dist.runtime.local import LocalFleet


@dataclass
class Message:
    """A call of one client, as the server has it.

    Attributes
    ----------
    name : str
        The client's method.
    client : int
    sent, answer : Any
        Arguments and answer, tensors as they arrive: decoded.
    of_sent, of_answer : list of Tensor
        Gradients that came back for tensors that the server sent, and that it sent back for those
        in the answer: as they arrive.
    """

    name: str
    client: int
    sent: Any
    answer: Any
    of_sent: list[Tensor] = field(default_factory=list)
    of_answer: list[Tensor] = field(default_factory=list)


class Wiretap(LocalFleet):
    """A :class:`LocalFleet` that keeps every message."""

    def __init__(self, host: Any) -> None:
        super().__init__(host)
        self._heard: list[Message] = []

    def start(
        self,
        message: str,
        arguments: Mapping[int, Sequence[Any]],
        where: str = "",
        autograd: Any = None,
    ) -> Callable[[], Answers]:
        """Call a method of these clients at once; the function returned gives the answers."""
        wait = super().start(message, arguments, where, autograd)
        for client, answer in wait().by_client.items():
            heard = Message(message, client, _arrived(arguments[client]), _arrived(answer))
            _watch(arguments[client], heard.of_sent)
            _watch(answer, heard.of_answer)
            self._heard.append(heard)
        return wait

    def take(self) -> list[Message]:
        """Return what was heard since the last time."""
        heard, self._heard = self._heard, []
        return heard


def _arrived(value: Any) -> Any:
    """Return what the receiver has of a value: a copy, outside of any graph."""
    if isinstance(value, Packed):
        with torch.no_grad():
            return decode([value])[0].detach().clone()
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: _arrived(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_arrived(part) for part in value]
    return value


def _watch(value: Any, gradients: list[Tensor]) -> None:
    for tensor, back in _crossing(value):
        if tensor.requires_grad:
            tensor.register_hook(partial(_note, gradients, back))


def _note(gradients: list[Tensor], back: Callable[[Tensor], Tensor], gradient: Tensor) -> None:
    gradients.append(back(gradient).detach().cpu().clone())


def _crossing(value: Any) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Yield the tensors of a value that gradients travel for, and how to read such a gradient."""
    if isinstance(value, Packed):
        if value.carrier is not None:
            yield value.carrier, partial(_unpacked, value)
    elif isinstance(value, Tensor):
        yield value, lambda gradient: gradient
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _crossing(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _crossing(part)


def _unpacked(packed: Packed, carried: Tensor) -> Tensor:
    width = packed.shape[-1]
    coded_nw = carried.view(torch.uint8).reshape(torch.Size(packed.shape).numel() // width, -1)
    return packed.wire.gradients.unpack(coded_nw, width, packed.dtype).view(packed.shape)
