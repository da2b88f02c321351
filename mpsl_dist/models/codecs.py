"""How tokens and their gradients are coded where the model is cut, so that fewer bytes travel.

A codec turns every token into a row of bytes of one length, whatever the other tokens are. Packed
tokens cross the cut with a *carrier*: a tensor of as many numbers as their packed gradient has
bytes, which stores one of them (it is expanded), so that it costs one byte on its way. Autograd,
distributed or not, owes the carrier a gradient of its type and size, and that is what the packed
gradient travels as: bytes under the name of ``float8_e4m3fn``, with which nobody calculates.

A number that is not finite makes its whole token so: whoever looks for one still finds it.

Shape legend: ``b`` batch, ``l`` length in tokens, ``n`` tokens, ``d`` width, ``w`` bytes of a coded
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

#: Numbers of a byte: a codec's, and what autograd takes packed bytes for.
_FP8 = torch.float8_e4m3fn
#: Bytes of a token's scale, a bfloat16: it reaches as far as float32.
_SCALE = 2


class Codec(Protocol):
    """Turns tokens into bytes and back."""

    def token_bytes(self, width: int, number: int) -> int:
        """Return w, the bytes of a coded token of this width; ``number`` are those of a number."""
        ...

    def pack(self, tokens_nd: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """Return (n, w) uint8 of floating-point tokens (n, d), on CPU.

        Parameters
        ----------
        noise : torch.Generator, optional
            Rounds at random, so that the mean is kept; without it to the nearest.
        """
        ...

    def unpack(self, coded_nw: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """Return the tokens (n, d)."""
        ...


@dataclass(frozen=True)
class Cast:
    """Every number by itself, in a floating-point type; None is the type that it has."""

    dtype: torch.dtype | None = None

    def token_bytes(self, width: int, number: int) -> int:
        """Return as :meth:`Codec.token_bytes`."""
        return width * (self.dtype.itemsize if self.dtype else number)

    def pack(self, tokens_nd: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """Return as :meth:`Codec.pack`; it always rounds to the nearest."""
        return tokens_nd.to(self.dtype or tokens_nd.dtype).contiguous().view(torch.uint8)

    def unpack(self, coded_nw: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """Return as :meth:`Codec.unpack`."""
        return coded_nw.view(self.dtype or dtype).to(dtype)


@dataclass(frozen=True)
class Float8:
    """Eight-bit floating-point numbers, scaled so that a token's largest is their largest."""

    def token_bytes(self, width: int, number: int) -> int:
        """Return as :meth:`Codec.token_bytes`."""
        return _SCALE + width

    def pack(self, tokens_nd: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """Return as :meth:`Codec.pack`; it always rounds to the nearest."""
        most = torch.finfo(_FP8).max
        scale_n1 = _upward(tokens_nd.abs().amax(-1, keepdim=True).float() / most)
        values_nd = (tokens_nd.float() / _divisor(scale_n1)).clamp(-most, most).to(_FP8)
        return _behind(scale_n1, values_nd.view(torch.uint8))

    def unpack(self, coded_nw: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """Return as :meth:`Codec.unpack`."""
        scale_n1, values_nd = _apart(coded_nw)
        return (values_nd.view(_FP8).float() * scale_n1).to(dtype)


@dataclass(frozen=True)
class Integers:
    """Whole numbers of 1, 2, 4 or 8 bits: even steps between a token's largest size and its
    negative.
    """

    bits: int

    def token_bytes(self, width: int, number: int) -> int:
        """Return as :meth:`Codec.token_bytes`."""
        return _SCALE + -(-width * self.bits // 8)

    def pack(self, tokens_nd: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """Return as :meth:`Codec.pack`."""
        most = 2**self.bits - 1
        scale_n1 = _upward(tokens_nd.abs().amax(-1, keepdim=True).float())
        places_nd = (tokens_nd.float() / _divisor(scale_n1) + 1) * (most / 2)
        up = 0.5 if noise is None else torch.rand(places_nd.shape, generator=noise)
        # What is no number is known by its scale: here any place will do.
        places_nd = (places_nd + up).floor().clamp(0, most).nan_to_num(0).to(torch.uint8)
        filled = functional.pad(places_nd, (0, -places_nd.shape[1] % self._in_a_byte))
        shifted = filled.unflatten(1, (-1, self._in_a_byte)) << self._shifts()
        return _behind(scale_n1, shifted.sum(-1, dtype=torch.uint8))

    def unpack(self, coded_nw: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """Return as :meth:`Codec.unpack`."""
        most = 2**self.bits - 1
        scale_n1, bytes_nw = _apart(coded_nw)
        places_nd = ((bytes_nw.unsqueeze(-1) >> self._shifts()) & most).flatten(1)[:, :width]
        return ((places_nd.float() * (2 / most) - 1) * scale_n1).to(dtype)

    @property
    def _in_a_byte(self) -> int:
        return 8 // self.bits

    def _shifts(self) -> Tensor:
        return torch.arange(0, 8, self.bits, dtype=torch.uint8)


#: Name -> codec, of activations and gradients alike.
CODECS: dict[str, Codec] = {
    "fp32": Cast(),
    "bf16": Cast(torch.bfloat16),
    "fp8": Float8(),
    "int8": Integers(8),
    "int4": Integers(4),
    "int2": Integers(2),
}


@dataclass(frozen=True, eq=False)
class Packed:
    """Tokens (b, l, d) as they travel.

    Attributes
    ----------
    coded : Tensor
        (n * w,) uint8.
    carrier : Tensor or None
        (n * w,) ``float8_e4m3fn``, w of the gradients' codec, one byte stored; None where no
        gradient is asked for.
    shape : tuple of int
        b, l, d.
    dtype : torch.dtype
        What the tokens were, and become again.
    wire : Wire
        How both directions are coded.
    seed : int or None
        Of the gradient's random rounding; None rounds to the nearest.
    """

    coded: Tensor
    carrier: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    wire: Wire
    seed: int | None = None


#: What crosses the cut: tokens as they are, or packed.
Sent = Tensor | Packed


@dataclass(frozen=True)
class Wire:
    """How what crosses the cut is coded, in each direction.

    Attributes
    ----------
    activations, gradients : Codec
    stochastic : bool
        Whether gradients are rounded at random, where their codec can.
    """

    activations: Codec = CODECS["fp32"]
    gradients: Codec = CODECS["fp32"]
    stochastic: bool = True

    @property
    def plain(self) -> bool:
        """Whether tokens travel as they are."""
        return self.activations == self.gradients == CODECS["fp32"]

    def encode(self, tokens: Sequence[Tensor], key: Sequence[int] = ()) -> list[Sent]:
        """Return tokens as they travel.

        Parameters
        ----------
        tokens : sequence of Tensor
            (b, l, d) each, on CPU.
        key : sequence of int
            What random rounding follows from, and nothing else does.
        """
        if self.plain:
            return list(tokens)
        return [self._pack(tokens_bld, [*key, place]) for place, tokens_bld in enumerate(tokens)]

    def through(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Return tokens as they would arrive, on the device that they are on."""
        if self.plain:
            return list(tokens)
        arrived = decode(self.encode([tokens_bld.cpu() for tokens_bld in tokens]))
        return [x.to(tokens_bld.device) for x, tokens_bld in zip(arrived, tokens, strict=True)]

    def _pack(self, tokens_bld: Tensor, key: Sequence[int]) -> Packed:
        shape, dtype = tuple(tokens_bld.shape), tokens_bld.dtype
        if not (tokens_bld.requires_grad and torch.is_grad_enabled()):
            coded = self.activations.pack(tokens_bld.reshape(-1, shape[-1])).flatten()
            return Packed(coded, None, shape, dtype, self)
        coded, carrier = _Encode.apply(tokens_bld, self)
        seed = int(np.random.default_rng(key).integers(2**62)) if self.stochastic else None
        return Packed(coded, carrier, shape, dtype, self, seed)


def decode(sent: Sequence[Sent]) -> list[Tensor]:
    """Return what has arrived as tokens (b, l, d) again; a gradient goes back as it is coded."""
    return [_Decode.apply(x.carrier, x) if isinstance(x, Packed) else x for x in sent]


def carriers(sent: Sequence[Sent]) -> list[Tensor]:
    """Return those tensors whose gradients are what travels back."""
    found = [x.carrier if isinstance(x, Packed) else x for x in sent]
    return [carrier for carrier in found if carrier is not None]


class _Encode(torch.autograd.Function):
    """The client's end: tokens leave packed, their gradient arrives packed."""

    @staticmethod
    def forward(ctx: Any, tokens_bld: Tensor, wire: Wire) -> tuple[Tensor, Tensor]:
        ctx.shape, ctx.dtype, ctx.wire = tokens_bld.shape, tokens_bld.dtype, wire
        tokens_nd = tokens_bld.reshape(-1, tokens_bld.shape[-1])
        coded = wire.activations.pack(tokens_nd).flatten()
        size = len(tokens_nd) * wire.gradients.token_bytes(tokens_nd.shape[1], ctx.dtype.itemsize)
        ctx.mark_non_differentiable(coded)
        return coded, torch.zeros(1, dtype=torch.uint8).view(_FP8).expand(size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, carried: Tensor) -> tuple[Tensor, None]:
        *_, width = ctx.shape
        coded_nw = carried.view(torch.uint8).view(ctx.shape.numel() // width, -1)
        return ctx.wire.gradients.unpack(coded_nw, width, ctx.dtype).view(ctx.shape), None


class _Decode(torch.autograd.Function):
    """The server's end: tokens arrive packed, their gradient leaves packed."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor | None, packed: Packed) -> Tensor:
        ctx.wire, ctx.seed = packed.wire, packed.seed
        *_, width = packed.shape
        coded_nw = packed.coded.view(torch.Size(packed.shape).numel() // width, -1)
        tokens_nd = packed.wire.activations.unpack(coded_nw, width, packed.dtype)
        return tokens_nd.view(packed.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_bld: Tensor) -> tuple[Tensor, None]:
        noise = None if ctx.seed is None else torch.Generator().manual_seed(ctx.seed)
        gradient_nd = gradient_bld.reshape(-1, gradient_bld.shape[-1])
        return ctx.wire.gradients.pack(gradient_nd, noise).flatten().view(_FP8), None


def _upward(scale_n1: Tensor) -> Tensor:
    """Return bfloat16 scales that are none too small, as float32."""
    return (scale_n1 * (1 + 2**-8)).bfloat16().float()


def _divisor(scale_n1: Tensor) -> Tensor:
    """Return scales without zeros, which tokens of zeros have."""
    return torch.where(scale_n1 == 0, 1.0, scale_n1)


def _behind(scale_n1: Tensor, bytes_nw: Tensor) -> Tensor:
    return torch.cat([scale_n1.bfloat16().view(torch.uint8), bytes_nw], dim=1)


def _apart(coded_nw: Tensor) -> tuple[Tensor, Tensor]:
    scale_n1 = coded_nw[:, :_SCALE].contiguous().view(torch.bfloat16).float()
    return scale_n1, coded_nw[:, _SCALE:]
