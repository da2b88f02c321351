"""Numbers as whole multiples of 2^-48 in the ring of 64-bit integers, where sums are exact.

A masked sum (:mod:`mpsl_dist.actors.masking`) needs addition that wraps around, so that a uniformly
random mask hides a number perfectly and leaves no trace when it is taken off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpsl_dist.errors import DivergedError

#: Binary places behind the point. Rounding costs a number at most 2^-49 = 1.8e-15.
PLACES = 48
#: Bytes of a number.
BYTES = 8


def largest(clients: int) -> float:
    """Return the largest magnitude that each of so many clients may add without wrapping a sum."""
    return 2.0 ** (62 - PLACES) / clients


def encode(values: Tensor, clients: int, what: str) -> Tensor:
    """Return numbers in fixed point.

    Parameters
    ----------
    values : Tensor
        Of any floating-point type.
    clients : int
        How many of such tensors are summed, at most.
    what : str
        What the user should read, as "the gradients of its tokenizers".

    Returns
    -------
    Tensor
        int64, of the same shape, on CPU.

    Raises
    ------
    DivergedError
        If a number is not finite, or larger than :func:`largest`.
    """
    exact = values.detach().cpu().double()
    most = exact.abs().max().item() if exact.numel() else 0.0
    if not most <= largest(clients):  # nor where it is no number
        raise DivergedError(
            f"{what} hold {most:g}; a masked sum of {clients} clients takes numbers up to "
            f"{largest(clients):g}. Lower training.server.lr and training.client.lr, or set "
            "tokenizer_sync.masked=false"
        )
    return torch.round(exact * 2.0**PLACES).long()


def decode(whole: Tensor) -> Tensor:
    """Return what a sum of :func:`encode` stands for, float64."""
    return whole.double() / 2.0**PLACES
