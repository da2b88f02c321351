"""The server: it owns the encoder W_b and, unless clients do, the head W_t; it sees smashed
activations only.

The boundary
------------
What the server sends to a client is its own alone, or all clients': predictions for its mini-batch
(features, where it has the head), which tell what the others have taught the encoder; gradients of
its loss and of its activations; and what the tokenizers' sync makes of all clients' (a sum of
gradients, an average of weights), which tells each of two clients the other's part. Batch sizes and
the steps' plan tell every client how much the others have together. What it receives stands in
:mod:`mpsl_dist.actors.client`.

Shape legend: ``b`` batch, ``l`` length in tokens, ``d`` width, ``k`` classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.errors import ConfigError
from mpsl_dist.models.average import load_trainable, trainable_state
from mpsl_dist.models.gapped import Crossing, Gapped, samples_of, tensors_of, together
from mpsl_dist.models.server_model import ServerModel
from mpsl_dist.records import state

#: Smashed activations by client: early fusion one tensor each, late fusion one per modality; or of
#: samples that lack parts.
Smashed = Mapping[int, Crossing]


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
        #: Frozen blocks that what is trained on has been through (``wire.cache_prefix``).
        self.begin = 0

    def forward(self, smashed: Smashed, from_cut: bool = False) -> dict[int, Tensor]:
        """Run the encoder once over the global batch of all clients (Eq. 3).

        Parameters
        ----------
        smashed : mapping of int to list of Tensor, or Gapped
        from_cut : bool
            Whether they come from the cut layer whatever is kept for training, as in tests.

        Returns
        -------
        dict of int to Tensor
            Every client's own slice of the predictions, on CPU: (b_n, k) logits, or (b_n, 2, d)
            embeddings in retrieval; of the features, where clients own the head.

        Notes
        -----
        What leaves here is a copy, and so are the gradients that come back for the activations: of
        a view that is more than half of its storage, RPC sends all of the storage, the other
        clients' rows with it.
        """
        for tensors in smashed.values():
            for tokens_bld in tensors_of(tensors):
                if tokens_bld.requires_grad:
                    tokens_bld.register_hook(torch.clone)
        begin = 0 if from_cut else self.begin
        if any(isinstance(one, Gapped) for one in smashed.values()):
            sizes = [samples_of(one) for one in smashed.values()]
            joined = together(list(smashed.values()), self.model.lengths, self.model.fusion)
            tokens = [tokens_bld.to(self.device) for tokens_bld in joined[0]]
            predictions_bk = self.model(tokens, begin, joined[1]).cpu()
        else:
            sizes, tokens = self._together(smashed)
            predictions_bk = self.model(tokens, begin).cpu()
        slices = [slice_bk.clone() for slice_bk in predictions_bk.split(sizes)]
        return dict(zip(smashed, slices, strict=True))

    def compile(self) -> None:
        """Compile the encoder's blocks, each by itself, at its first pass.

        Raises
        ------
        ConfigError
            If nothing can be compiled here.
        """
        try:
            torch.compile(torch.add)(torch.ones(2, device=self.device), 1)
        except Exception as error:  # whatever a missing compiler or Triton leads to
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ConfigError(
                f"training.compile: torch.compile does not work on the server ({reason}); install "
                "a C++ compiler (on a GPU Triton), or set training.compile=false"
            ) from error
        for block in self.model.encoder:
            block.compile()

    def encode_prefix(self, smashed: Smashed) -> dict[int, list[Tensor]]:
        """Run the frozen blocks that training begins with once over what these clients sent."""
        sizes, together = self._together(smashed)
        with torch.no_grad():
            encoded = [x_bld.cpu() for x_bld in self.model.encode(together, end=self.begin)]
        slices = zip(*(x_bld.split(sizes) for x_bld in encoded), strict=True)
        return {n: list(own) for n, own in zip(smashed, slices, strict=True)}

    def _together(self, smashed: Smashed) -> tuple[list[int], list[Tensor]]:
        """Return how many samples each client has, and all clients' activations in one batch."""
        sizes = [len(tensors[0]) for tensors in smashed.values()]
        parts = zip(*smashed.values(), strict=True)
        return sizes, [torch.cat(tensors).to(self.device) for tensors in parts]

    def whole_model(self) -> ServerModel:
        """Return encoder and head as one: here they are."""
        return self.model

    def step(self, step: int, gradients: Mapping[Tensor, Tensor]) -> None:
        """Step the server's own optimizer at the run's step ``step``, on gradients by parameter."""
        self.stepper.step(gradients, step)

    def save(self, folder: str) -> str:
        """Write encoder, head and optimizer to ``folder``; return the file's SHA-256."""
        parts = {"model": trainable_state(self.model), "optimizer": self.stepper.state()}
        return state.save(Path(folder) / state.SERVER, parts)

    def restore(self, folder: str) -> None:
        """Continue from what :meth:`save` wrote."""
        with state.continuing(Path(folder) / state.SERVER, self.device) as parts:
            load_trainable(self.model, parts["model"])
            self.stepper.load(parts["optimizer"])
