"""What becomes of soft tokens: a language model names a class, or a head scores the classes.

Shape legend: ``b`` batch, ``l`` length in tokens, ``d`` width, ``p`` places that are predicted,
``v`` rows of the vocabulary, ``k`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: The words for classes, one character each: one token of either vocabulary.
NAMES = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


class LabelAnswers(nn.Module):
    """A language model that reads soft tokens and an instruction, and writes the class (Eq. 10).

    Parameters
    ----------
    language : nn.Module
        A causal language model of transformers, maybe with LoRA.
    instruction : sequence of int
        Tokens after the soft ones.
    labels : sequence of int
        Every class's token.
    end : int
        The token that ends an answer.
    """

    instruction_l: Tensor
    labels_k: Tensor

    def __init__(
        self, language: nn.Module, instruction: Sequence[int], labels: Sequence[int], end: int
    ) -> None:
        super().__init__()
        self.language: Any = language
        self.end = end
        self.register_buffer("instruction_l", torch.tensor([*instruction]), persistent=False)
        self.register_buffer("labels_k", torch.tensor([*labels]), persistent=False)

    def forward(self, soft_bld: Tensor, labels_b: Tensor) -> Tensor:
        """Return logits (b, p, v) at the places of the class and of the end."""
        return self._read(soft_bld, self.labels_k[labels_b][:, None], 2)

    def targets(self, labels_b: Tensor) -> Tensor:
        """Return the tokens (b, p) that ought to stand there."""
        named_b = self.labels_k[labels_b]
        return torch.stack([named_b, torch.full_like(named_b, self.end)], dim=1)

    def scores(self, soft_bld: Tensor) -> Tensor:
        """Return the classes' logits (b, k): the likeliest is what greedy decoding writes first,
        were there no words but the classes'.
        """
        none_bl = self.labels_k.new_empty(len(soft_bld), 0)
        return self._read(soft_bld, none_bl, 1)[:, 0, self.labels_k]

    def _read(self, soft_bld: Tensor, written_bl: Tensor, places: int) -> Tensor:
        asked_bl = torch.cat([self.instruction_l.expand(len(soft_bld), -1), written_bl], dim=1)
        words_bld = self.language.get_input_embeddings()(asked_bl)
        read_bld = torch.cat([soft_bld, words_bld], dim=1)
        return self.language(inputs_embeds=read_bld, logits_to_keep=places, use_cache=False).logits


class HeadAnswers(nn.Module):
    """A linear head on what a language model makes of soft tokens, or on their mean.

    Parameters
    ----------
    language : nn.Module or None
        A causal language model of transformers, maybe with LoRA; None is the logistic stand-in.
    width, classes : int
        d and k.
    """

    def __init__(self, language: nn.Module | None, width: int, classes: int) -> None:
        super().__init__()
        self.language: Any = language
        self.head = nn.Linear(width, classes)

    def forward(self, soft_bld: Tensor, labels_b: Tensor) -> Tensor:
        """Return logits (b, 1, k); the labels are not looked at."""
        return self.scores(soft_bld)[:, None]

    def targets(self, labels_b: Tensor) -> Tensor:
        """Return the classes as (b, 1)."""
        return labels_b[:, None]

    def scores(self, soft_bld: Tensor) -> Tensor:
        """Return the classes' logits (b, k)."""
        if self.language is None:
            return self.head(soft_bld.mean(1))
        read = self.language.model(inputs_embeds=soft_bld, use_cache=False)
        return self.head(read.last_hidden_state[:, -1])


#: Either way to an answer.
Answers = LabelAnswers | HeadAnswers


def answer_loss(answers: Answers, logits_bpv: Tensor, labels_b: Tensor) -> Tensor:
    """Return the cross-entropy of what ought to be answered (L_lb of Eq. 11 and 12), a scalar."""
    return functional.cross_entropy(logits_bpv.flatten(0, 1), answers.targets(labels_b).flatten())
