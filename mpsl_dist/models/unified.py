"""ML-ECS' unified model (Liu et al., section 3.1): encoders, connector and a language model.

Shape legend: ``b`` batch, ``m`` modalities, ``h`` the width that modalities share, ``s`` the fused
width, ``l`` length in tokens, ``d`` the language model's width, ``p`` places, ``v`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpsl_dist.models.answers import Answers
from mpsl_dist.models.connector import Connected
from mpsl_dist.models.volume import VolumeContrast


@dataclass(frozen=True)
class Read:
    """What the model makes of inputs on the way.

    Attributes
    ----------
    modalities_bmh : Tensor
        The modalities' representations (Eq. 4), (b, m, h), in fusion order.
    fused_bs : Tensor
        The fused representation (Eq. 9), (b, s).
    """

    modalities_bmh: Tensor
    fused_bs: Tensor


class Proxy(nn.Module):
    """A smaller language model beside another, with a soft-prompt generator of its own (Co-PLMs).

    Parameters
    ----------
    generator : nn.Module
        (b, s) -> (b, tokens * d).
    answers : Answers
    tokens : int
        Soft tokens of a sample.
    """

    def __init__(self, generator: nn.Module, answers: Answers, tokens: int) -> None:
        super().__init__()
        self.generator = generator
        self.answers = answers
        self.tokens = tokens

    def prompt(self, fused_bs: Tensor) -> Tensor:
        """Return the soft tokens (b, l, d) of a fused representation."""
        return self.generator(fused_bs).unflatten(1, (self.tokens, -1))


class Unified(nn.Module):
    """Encoders, connector, and a language model or what stands for it.

    Parameters
    ----------
    tokenizers : Connected
        Encoders and connector.
    answers : Answers
    contrast : VolumeContrast
        With anchors of the fused width on a device, of a modality's on the server.
    proxy : Proxy, optional
        What travels in the place of ``answers``.
    """

    def __init__(
        self,
        tokenizers: Connected,
        answers: Answers,
        contrast: VolumeContrast,
        proxy: Proxy | None = None,
    ) -> None:
        super().__init__()
        self.tokenizers = tokenizers
        self.answers = answers
        self.contrast = contrast
        self.proxy = proxy

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that it reads, in fusion order."""
        return tuple(self.tokenizers.by_modality)

    @property
    def generator(self) -> nn.Module:
        """The soft-prompt generator, f_spg."""
        return self.tokenizers.connector.generator

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the modalities' features by name, of inputs as in a ``Batch``."""
        like = next(self.parameters())
        own = {
            name: inputs[name].to(
                like.device, like.dtype if inputs[name].is_floating_point() else None
            )
            for name in self.modalities
        }
        return self.tokenizers.features(own)

    def read(self, features: Mapping[str, Tensor]) -> Read:
        """Return representations of features."""
        connector = self.tokenizers.connector
        projected = connector.project(features)
        return Read(torch.stack([*projected.values()], dim=1), connector.fuse(projected))

    def prompt(self, fused_bs: Tensor) -> Tensor:
        """Return the soft tokens (b, l, d) of a fused representation."""
        return self.tokenizers.connector.prompt(fused_bs)

    def scores(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the classes' logits (b, k) of inputs."""
        return self.answers.scores(self._soft(inputs))

    def write(self, inputs: Mapping[str, Tensor]) -> list[str]:
        """Return what a language model that writes captions writes of inputs."""
        return self.answers.write(self._soft(inputs))

    def _soft(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.prompt(self.read(self.encode(inputs)).fused_bs)


def shared_state(model: Unified, exchange: str) -> dict[str, Tensor]:
    """Return copies on CPU of what travels of a model, by name.

    Parameters
    ----------
    exchange : str
        ``lora``: what is trained of the language model (Algorithm 1); ``all``: whatever is trained
        but the contrast's anchors; ``proxy``: what is trained of the proxy's language model, and
        the encoders; ``none``.
    """
    return {n: p.detach().cpu().clone() for n, p in shared_parameters(model, exchange).items()}


@torch.no_grad()
def load_shared(model: Unified, exchange: str, state: Mapping[str, Tensor]) -> None:
    """Set what travels of a model; ``state`` may have more than it, of other modalities.

    Raises
    ------
    ValueError
        If ``state`` lacks what the model has.
    """
    own = shared_parameters(model, exchange)
    if lacking := own.keys() - state.keys():
        raise ValueError(f"parameters are missing: {sorted(lacking)}")
    for name, parameter in own.items():
        parameter.copy_(state[name])


def shared_parameters(model: Unified, exchange: str) -> dict[str, nn.Parameter]:
    """Return what :func:`shared_state` copies."""
    first = _TRAVELS[exchange]
    return {n: p for n, p in model.named_parameters() if p.requires_grad and n.startswith(first)}


_ENCODERS = ("tokenizers.by_modality.", "tokenizers.pre_norm.", "tokenizers.encoders.")
#: How the names of parameters that travel begin.
_TRAVELS: dict[str, tuple[str, ...]] = {
    "lora": ("answers.",),
    "all": ("answers.", "tokenizers."),
    "proxy": ("proxy.answers.", *_ENCODERS),
    "none": (),
}


def freeze_absent(model: Unified) -> None:
    """Freeze the projectors of modalities that nothing is read of; zeros stand for these."""
    for name, projector in model.tokenizers.connector.projectors.items():
        if name not in model.modalities:
            projector.requires_grad_(False)
