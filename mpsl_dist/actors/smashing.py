"""What a client makes of a mini-batch before it sends it: tokens of what is there, defended and
fused (Eq. 1).

Shape legend: ``b`` batch, ``l`` length in tokens, ``d`` width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mpsl_dist.actors.defences import Guard, Mark
from mpsl_dist.data import Batch
from mpsl_dist.models.gapped import Gapped, mask_of
from mpsl_dist.models.tokenizers import Tokenizers, fuse


def smash(
    tokenizers: Tokenizers,
    batch: Batch,
    device: str,
    fusion: str,
    guard: Guard,
    marks: Sequence[Mark],
) -> list[Tensor] | Gapped:
    """Return the smashed activations of a mini-batch, on CPU.

    Parameters
    ----------
    device : str
        Where the tokenizers are.
    fusion : "early" or "late"
    guard : Guard
        Changes tokens; none of a mini-batch that lacks parts.
    marks : sequence of tuple
        As :meth:`mpsl_dist.actors.defences.Guard.tokens` takes them.

    Returns
    -------
    list of Tensor, or Gapped
        As of :meth:`mpsl_dist.actors.client.Client.tokenize`, uncoded.
    """
    inputs = inputs_of(batch, tokenizers, device)
    if batch.present is not None:
        tokens = tokenizers(inputs, batch.present)
        return Gapped(tuple(x_bld.cpu() for x_bld in tokens), mask_of(batch.present))
    guarded = guard.tokens(tokenizers, tokenizers(inputs), marks)
    return [smashed_bld.cpu() for smashed_bld in fuse(guarded, fusion)]


def inputs_of(batch: Batch, tokenizers: Tokenizers, device: str) -> dict[str, Tensor]:
    """Return the inputs that there are tokenizers of, on a device and in these tokenizers' type."""
    dtype = next(tokenizers.parameters()).dtype
    return {
        name: x.to(device, dtype if x.is_floating_point() else None)
        for name, x in batch.inputs.items()
        if name in tokenizers.by_modality
    }
