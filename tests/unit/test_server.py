"""What leaves the server for one client holds nothing of another."""

from __future__ import annotations

import torch
import toys
from torch import Tensor

from mpsl_dist.actors import assembly
from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.actors.server import Server


def server() -> Server:
    toy = toys.experiment()
    model = assembly.build_server_model(toy, toys.load(("image", "text")), [5, 6])
    return Server(model, Stepper(model.parameters(), toy.training.server))


def alone(tensor: Tensor) -> bool:
    """Whether a tensor's storage holds nothing but the tensor."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_slices_and_gradients_have_storage_of_their_own() -> None:
    """One client with most of the batch: RPC would send the whole storage of its view."""
    smashed = {0: [torch.randn(9, 11, 16)], 1: [torch.randn(2, 11, 16)]}
    received: dict[int, Tensor] = {}
    held = {n: [x.requires_grad_() * 1 for x in tensors] for n, tensors in smashed.items()}
    predictions = server().forward(held)
    for n, (tokens_bld,) in held.items():
        tokens_bld.register_hook(lambda g, n=n: received.update({n: g}))
    sum(slice_bk.square().sum() for slice_bk in predictions.values()).backward()
    assert all(alone(slice_bk) for slice_bk in predictions.values())
    assert {n: g.shape for n, g in received.items()} == {
        n: tensors[0].shape for n, tensors in smashed.items()
    }
    assert all(alone(gradient) for gradient in received.values())
    assert all(gradient.any() for gradient in received.values())
