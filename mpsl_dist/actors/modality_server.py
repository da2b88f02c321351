"""The server of M²FedSA: the upper halves of all modalities' encoders, task adapters, the fusion.

The boundary
------------
It has no labels, and no classifier of a single modality. What it sends to a client is the feature
of the client's own mini-batch, what the fusion made of this mini-batch of all of the user's
clients, their gradients, and the average of its modality's clients.

Shape legend: ``b`` batch, ``d`` width, ``k`` classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.actors.server import Server, Smashed
from mpsl_dist.actors.transfer_switch import TransferSwitch
from mpsl_dist.config.m2fedsa import M2FedSA
from mpsl_dist.models.average import average, load_trainable, trainable_state
from mpsl_dist.models.halves import UpperModel
from mpsl_dist.records import state


class ModalityServer(Server):
    """As :class:`~mpsl_dist.actors.server.Server`, with an encoder for each modality.

    Parameters
    ----------
    model : UpperModel
    stepper : Stepper
        Steps the model's trainable parameters.
    options : M2FedSA
    device : str
    """

    def __init__(
        self, model: UpperModel, stepper: Stepper, options: M2FedSA, device: str = "cpu"
    ) -> None:
        super().__init__(model, stepper, device)
        self.options = options
        self.modalities = list(model.encoders)
        self.switch = TransferSwitch(options.switch)

    def user_of(self, client: int) -> int:
        """Return whose a client is; a user's clients follow each other, in the order of fusion."""
        return client // len(self.modalities)

    def forward(self, smashed: Smashed, from_cut: bool = True) -> dict[int, Tensor]:
        """Return every client's feature (b, d), on CPU: one pass a modality for all its clients.

        Parameters
        ----------
        smashed : mapping of int to list of Tensor
            By client, what crossed the cut.
        from_cut : bool
            As of :meth:`Server.forward`; here everything comes from the cut.
        """
        found: dict[int, Tensor] = {}
        for place, half in enumerate(self.model.encoders.values()):
            own = {n: x for n, x in smashed.items() if n % len(self.modalities) == place}
            for (tensor,) in own.values():
                if tensor.requires_grad:
                    tensor.register_hook(torch.clone)  # as Server.forward has it
            if own:
                sizes, (cut,) = self._together(own)
                slices = half(cut).cpu().split(sizes)
                found |= dict(zip(own, (slice_bd.clone() for slice_bd in slices), strict=True))
        return {client: found[client] for client in smashed}

    def fuse(self, features: Mapping[int, Tensor]) -> dict[int, tuple[Tensor, ...]]:
        """Return what the fusion makes of every user's features, a copy for each of its clients.

        Until knowledge is transferred its logits (b, k), to be trained; then these and its feature
        (b, d), as they are. Users are fused apart: nobody's prediction depends on another's data.
        """
        found: dict[int, tuple[Tensor, ...]] = {}
        for user in dict.fromkeys(map(self.user_of, features)):
            clients = [n for n in features if self.user_of(n) == user]
            own = [features[n].to(self.device) for n in clients]
            if not (self.options.fusion_trains_task_adapters and not self.switch.on):
                own = [feature_bd.detach() for feature_bd in own]
            with torch.no_grad() if self.switch.on else nullcontext():
                fused = [x.cpu() for x in self.model.fusion(own)]
            told = fused if self.switch.on else fused[:1]
            found |= {n: tuple(x.clone() for x in told) for n in clients}
        return found

    def end_round(self) -> None:
        """Look at the fusion's losses, and bring the task adapters' middle layers together."""
        self.switch.end_round()
        layers = [adapter.update for adapter in self.model.adapters()]
        if self.options.across:
            mean = average([trainable_state(layer) for layer in layers], [1.0] * len(layers))
            for layer in layers:
                load_trainable(layer, mean)

    def save(self, folder: str) -> str:
        """Write what is trained, the optimizer and the switch; return the file's SHA-256."""
        parts = {"model": trainable_state(self.model), "optimizer": self.stepper.state()}
        return state.save(Path(folder) / state.SERVER, parts | {"switch": self.switch.state()})

    def restore(self, folder: str) -> None:
        """Continue from what :meth:`save` wrote."""
        super().restore(folder)
        with state.continuing(Path(folder) / state.SERVER, self.device) as parts:
            self.switch.load(parts["switch"])
