"""What becomes of soft tokens: a language model names a class or writes a caption, or a head scores
the classes.

Shape legend: ``b`` batch, ``l`` length in tokens, ``d`` width, ``p`` places that are predicted,
``v`` rows of the vocabulary, ``k`` classes, ``n`` places of all samples together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpsl_dist.models.language import Vocabulary
from mpsl_dist.models.server_model import computing_in

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
    #: ``bf16``: the language model computes in bfloat16; what it reads and returns keeps its type.
    autocast: str | None = None

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
        read_bld = _embedded(self.language, soft_bld, self.instruction_l, written_bl)
        return _logits(self, read_bld, places)


class CaptionAnswers(nn.Module):
    """A language model that reads soft tokens and an instruction, and writes a caption (Eq. 10).

    Parameters
    ----------
    language : nn.Module
        A causal language model of transformers, maybe with LoRA.
    instruction : str
        Read after the soft tokens.
    vocabulary : Vocabulary
        The language model's own.
    length : int
        Tokens of a caption at most, its end included; what is longer is cut.
    """

    #: What stands where a caption has ended before the longest of its mini-batch.
    NOTHING = -100

    instruction_l: Tensor
    #: As of :class:`LabelAnswers`.
    autocast: str | None = None

    def __init__(
        self, language: nn.Module, instruction: str, vocabulary: Vocabulary, length: int
    ) -> None:
        super().__init__()
        self.language: Any = language
        self.vocabulary, self.length = vocabulary, length
        asked = torch.tensor(vocabulary.encode(instruction))
        self.register_buffer("instruction_l", asked, persistent=False)

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Return captions as tokens (b, p), each after a space and with its end."""
        rows = [
            torch.tensor([*self.vocabulary.encode(f" {text}"), self.vocabulary.end][: self.length])
            for text in captions
        ]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.NOTHING)

    def forward(self, soft_bld: Tensor, wanted_bp: Tensor) -> Tensor:
        """Return logits (n, 1, v) at the places of all captions' tokens, and of no padding."""
        places = wanted_bp.shape[1]
        # A place sees none after it: what stands for padding is seen from padding alone.
        before_bp = wanted_bp[:, :-1].clamp_min(0)
        read_bld = _embedded(self.language, soft_bld, self.instruction_l, before_bp)
        return _logits(self, read_bld, places)[wanted_bp != self.NOTHING][:, None]

    def targets(self, wanted_bp: Tensor) -> Tensor:
        """Return the tokens (n, 1) that ought to stand there."""
        return wanted_bp[wanted_bp != self.NOTHING][:, None]

    @torch.no_grad()
    def write(self, soft_bld: Tensor) -> list[str]:
        """Return a caption of each, by greedy decoding: always the likeliest token."""
        none_bl = self.instruction_l.new_empty(len(soft_bld), 0)
        read_bld = _embedded(self.language, soft_bld, self.instruction_l, none_bl)
        end = self.vocabulary.end
        with computing_in(self.autocast, soft_bld.device):
            written_bl = self.language.generate(
                inputs_embeds=read_bld,
                attention_mask=read_bld.new_ones(read_bld.shape[:2], dtype=torch.long),
                max_new_tokens=self.length,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
            )
        ended = [[*row, end] for row in written_bl.tolist()]
        return [self.vocabulary.decode(row[: row.index(end)]).strip() for row in ended]


class HeadAnswers(nn.Module):
    """A linear head on what a language model makes of soft tokens, or on their mean.

    Parameters
    ----------
    language : nn.Module or None
        A causal language model of transformers, maybe with LoRA; None is the logistic stand-in.
    width, classes : int
        d and k.
    """

    #: As of :class:`LabelAnswers`.
    autocast: str | None = None

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
        with computing_in(self.autocast, soft_bld.device):
            read = self.language.model(
                inputs_embeds=soft_bld, attention_mask=_mask(soft_bld), use_cache=False
            )
        return self.head(read.last_hidden_state[:, -1].to(soft_bld.dtype))


#: Any way to an answer.
Answers = LabelAnswers | HeadAnswers | CaptionAnswers


def answer_loss(answers: Answers, logits_bpv: Tensor, labels_b: Tensor) -> Tensor:
    """Return the cross-entropy of what ought to be answered (L_lb of Eq. 11 and 12), a scalar.

    Of captions it is the mean over the tokens of all of them; ``labels_b`` are their tokens (b, p).
    """
    return functional.cross_entropy(logits_bpv.flatten(0, 1), answers.targets(labels_b).flatten())


def _logits(answers: LabelAnswers | CaptionAnswers, read_bld: Tensor, places: int) -> Tensor:
    """Return logits (b, p, v) at the last places, in the type of what is read."""
    with computing_in(answers.autocast, read_bld.device):
        read = answers.language(
            inputs_embeds=read_bld,
            attention_mask=_mask(read_bld),
            logits_to_keep=places,
            use_cache=False,
        )
    return read.logits.to(read_bld.dtype)


def _mask(read_bld: Tensor) -> Tensor | None:
    """Return no mask, and of shapes alone one of attention's own shape: transformers reads numbers
    to learn that it needs none.
    """
    batch, length, _ = read_bld.shape
    return read_bld.new_empty(batch, 1, length, length) if read_bld.is_meta else None


def _embedded(language: Any, soft_bld: Tensor, instruction_l: Tensor, written_bl: Tensor) -> Tensor:
    """Return what a language model reads: soft tokens, the instruction, what is written so far."""
    asked_bl = torch.cat([instruction_l.expand(len(soft_bld), -1), written_bl], dim=1)
    return torch.cat([soft_bld, language.get_input_embeddings()(asked_bl)], dim=1)
