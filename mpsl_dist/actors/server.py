"""The server: it owns the encoder W_b and the head W_t, and sees smashed activations only.

Shape legend: ``b`` batch, ``l`` length in tokens, ``d`` width, ``k`` classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.models.average import load_trainable, trainable_state
from mpsl_dist.models.server_model import ServerModel
from mpsl_dist.records import state

#: Smashed activations by client: early fusion one tensor each, late fusion one per modality.
Smashed = Mapping[int, list[Tensor]]


class Server:
    """The server side of the model.

    Parameters
    ----------
    model : ServerModel
    stepper : Stepper
        Steps the model's trainable parameters.
    device : str
    """

    def __init__(self, model: ServerModel, stepper: Stepper, device: str = "cpu") -> None:
        self.model = model.to(device)
        self.stepper = stepper
        self.device = device

    def forward(self, smashed: Smashed) -> dict[int, Tensor]:
        """Run the encoder once over the global batch of all clients (Eq. 3).

        Returns
        -------
        dict of int to Tensor
            Every client's own slice of the predictions, on CPU: (b_n, k) logits, or (b_n, 2, d)
            embeddings in retrieval.

        Notes
        -----
        What leaves here is a copy, and so are the gradients that come back for the activations: of
        a view that is more than half of its storage, RPC sends all of the storage, the other
        clients' rows with it.
        """
        for tensors in smashed.values():
            for tokens_bld in tensors:
                if tokens_bld.requires_grad:
                    tokens_bld.register_hook(torch.clone)
        sizes = [len(tensors[0]) for tensors in smashed.values()]
        together = [torch.cat(parts) for parts in zip(*smashed.values(), strict=True)]
        predictions_bk = self.model([tokens.to(self.device) for tokens in together]).cpu()
        slices = [slice_bk.clone() for slice_bk in predictions_bk.split(sizes)]
        return dict(zip(smashed, slices, strict=True))

    def step(self, step: int, gradients: Mapping[Tensor, Tensor]) -> None:
        """Step the server's own optimizer at the run's step ``step``, on gradients by parameter."""
        self.stepper.step(gradients, step)

    def save(self, folder: str) -> None:
        """Write encoder, head and optimizer to ``folder``."""
        parts = {"model": trainable_state(self.model), "optimizer": self.stepper.state()}
        state.save(Path(folder) / "server.pt", parts)

    def restore(self, folder: str) -> None:
        """Continue from what :meth:`save` wrote."""
        parts = state.load(Path(folder) / "server.pt", self.device)
        load_trainable(self.model, parts["model"])
        self.stepper.load(parts["optimizer"])
