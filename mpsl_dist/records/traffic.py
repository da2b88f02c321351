"""Every tensor byte between the server and its clients, by client, direction and kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from torch import Tensor

#: Kind -> direction ("up" is client to server, "down" server to client) and phase. Where clients
#: own the head, predictions are the features that it makes them of, and what a fusion says of them.
KINDS: dict[str, tuple[str, str]] = {
    "activations": ("up", "training"),
    "predictions": ("down", "training"),
    "losses": ("up", "training"),
    "loss_gradients": ("down", "training"),
    "pairs": ("up", "training"),
    "prediction_gradients": ("up", "training"),
    "cut_layer_gradients": ("down", "training"),
    "sync_up": ("up", "training"),
    "sync_down": ("down", "training"),
    "sync_keys_up": ("up", "training"),
    "sync_keys_down": ("down", "training"),
    "model_down": ("down", "training"),
    "model_up": ("up", "training"),
    "fused_down": ("down", "training"),
    "lora_down": ("down", "training"),
    "lora_up": ("up", "training"),
    "test_weights_up": ("up", "evaluation"),
    "test_weights_down": ("down", "evaluation"),
    "test_keys_up": ("up", "evaluation"),
    "test_keys_down": ("down", "evaluation"),
    "test_activations": ("up", "evaluation"),
    "test_predictions": ("down", "evaluation"),
}


def nbytes(value: Any) -> int:
    """Return the bytes of all tensors in a value: a tensor, or a message made of such.

    Of a tensor that is expanded from fewer numbers only these are stored, and sent.
    """
    if isinstance(value, Tensor):
        return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
    if isinstance(value, Mapping):
        return sum(nbytes(item) for item in value.values())
    if is_dataclass(value):
        return sum(nbytes(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, list | tuple):
        return sum(nbytes(item) for item in value)
    return 0


class Traffic:
    """A ledger of payload bytes. Data that stays on one host counts as if sent.

    Parameters
    ----------
    clients : int
        How many there are.
    """

    def __init__(self, clients: int) -> None:
        self.bytes = {kind: np.zeros(clients, dtype=np.int64) for kind in KINDS}

    def add(self, kind: str, client: int, value: Any) -> None:
        """Count a value that crosses for this client."""
        self.bytes[kind][client] += nbytes(value)

    def add_all(self, kind: str, values: Mapping[int, Any]) -> None:
        """Count one value per client."""
        for client, value in values.items():
            self.add(kind, client, value)

    def watch_gradients(self, kind: str, values: Mapping[int, Iterable[Tensor]]) -> None:
        """Count the gradients of these tensors, by client, as the backward brings them."""
        for client, tensors in values.items():
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(lambda g, client=client: self.add(kind, client, g))

    def total(self, direction: str, phase: str) -> int:
        """Return all clients' bytes of a direction and phase."""
        return sum(
            int(self.bytes[kind].sum()) for kind, key in KINDS.items() if key == (direction, phase)
        )

    def totals(self) -> dict[str, int]:
        """Return all clients' bytes by kind."""
        return {kind: int(counts.sum()) for kind, counts in self.bytes.items()}

    def since(self, before: Mapping[str, int]) -> dict[str, Any]:
        """Return the bytes sent since :meth:`totals` returned ``before``.

        Returns
        -------
        dict
            ``up`` and ``down``, and ``by_kind`` those of every kind that occurred.
        """
        sent = {kind: count - before[kind] for kind, count in self.totals().items()}
        by_kind = {kind: count for kind, count in sent.items() if count}
        ways = {
            way: sum(count for kind, count in by_kind.items() if KINDS[kind][0] == way)
            for way in ("up", "down")
        }
        return {**ways, "by_kind": by_kind}

    def by_phase(self) -> dict[str, dict[str, int]]:
        """Return all clients' bytes by phase and direction; no tensor crosses in the set-up."""
        return {
            phase: {way: self.total(way, phase) for way in ("up", "down")}
            for phase in ("setup", "training", "evaluation")
        }

    def by_kind(self) -> dict[str, list[int]]:
        """Return every client's bytes of every kind that occurred."""
        return {kind: counts.tolist() for kind, counts in self.bytes.items() if counts.any()}

    def load(self, by_kind: Mapping[str, list[int]]) -> None:
        """Continue from :meth:`by_kind`."""
        for kind, counts in by_kind.items():
            self.bytes[kind] = np.array(counts, dtype=np.int64)
