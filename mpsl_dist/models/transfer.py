"""What one model learns of another's predictions: a unimodal client of the fusion of all modalities
(M²FedSA's knowledge transfer), and one language model of another.

Shape legend: ``b`` batch, ``d`` width, ``k`` classes or rows of a vocabulary, ``l`` length in
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Transfer:
    """A client's loss once knowledge is transferred.

    Attributes
    ----------
    lambdas : tuple of float
        Weights of the labels' loss, of the decisions' and of the features' transfer.
    divergence : "uni_multi" or "multi_uni"
    over : "mean" or "sum"
        Of the divergence, over the samples.
    least : float
        What the divergence is divided by where both losses add up to less; 0 as released.
    paper_denominator : bool
        Whether the gradient goes through the losses that the divergence is divided by.
    """

    lambdas: tuple[float, float, float]
    divergence: str = "uni_multi"
    over: str = "mean"
    least: float = 0.0
    paper_denominator: bool = False

    def loss(
        self,
        own: Tensor,
        fused: Tensor,
        logits: tuple[Tensor, Tensor],
        features: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return the client's loss, a scalar.

        Parameters
        ----------
        own, fused : Tensor
            Mean losses of its own logits and of the fused ones; ``fused`` has no gradient.
        logits, features : tuple of Tensor
            Its own and the fused, (b, k) and (b, d) each.
        """
        of_labels, of_decisions, of_features = self.lambdas
        return (
            of_labels * (own + fused / 2)
            + of_decisions * self.decisions(own, fused, *logits)
            + of_features * features_apart(*features)
        )

    def decisions(self, own: Tensor, fused: Tensor, uni_bk: Tensor, multi_bk: Tensor) -> Tensor:
        """Return the divergence over both losses: the worse they are, the weaker the transfer.

        As released, with ``least`` 0, it weighs the more, without end, the better they are.
        """
        both = (own + fused).clamp_min(self.least)
        distance = divergence(uni_bk, multi_bk, self.divergence, self.over)
        return distance / (both if self.paper_denominator else both.detach())


def divergence(uni_bk: Tensor, multi_bk: Tensor, direction: str, over: str) -> Tensor:
    """Return KL(unimodal || fused), or with ``multi_uni`` the other way round; a scalar."""
    first_bk, second_bk = (x.log_softmax(1) for x in (uni_bk, multi_bk))
    if direction == "multi_uni":
        first_bk, second_bk = second_bk, first_bk
    reduction = "batchmean" if over == "mean" else "sum"
    return functional.kl_div(second_bk, first_bk, reduction=reduction, log_target=True)


def features_apart(uni_bd: Tensor, multi_bd: Tensor) -> Tensor:
    """Return 1 minus the mean cosine of two features of each sample, a scalar, 0 to 2."""
    return 1 - functional.cosine_similarity(uni_bd, multi_bd).mean()


def pooled_kl(student_blk: Tensor, teacher_blk: Tensor, pool: int) -> Tensor:
    """Return KL(teacher || student) over the teacher's likeliest tokens and all others as one.

    After Co-PLMs (arXiv 2511.11678), which ML-ECS takes up (Eq. 14): most of a vocabulary has next
    to no probability, and a ratio of two such numbers is noise. ML-ECS leaves open which side is
    pooled, the direction and what is summed; here the teacher's ``pool`` likeliest tokens of every
    place stand by themselves, the others' probabilities are added up, and the divergence is summed
    over places and averaged over the batch.

    Parameters
    ----------
    student_blk : Tensor
        (b, l, k) logits.
    teacher_blk : Tensor
        (b, l', k) logits over the same vocabulary; it gets no gradient. Places beyond the shorter
        of both are left out.
    pool : int
        Tokens that stand by themselves; k or more gives the full divergence.

    Returns
    -------
    Tensor
        A scalar, at least 0.
    """
    shared = min(student_blk.shape[1], teacher_blk.shape[1])
    theirs_blk = functional.log_softmax(teacher_blk[:, :shared].detach(), dim=-1)
    ours_blk = functional.log_softmax(student_blk[:, :shared], dim=-1)
    if pool < theirs_blk.shape[-1]:
        top = theirs_blk.topk(pool, dim=-1).indices
        theirs_blk, ours_blk = _pooled(theirs_blk, top), _pooled(ours_blk, top)
    return functional.kl_div(ours_blk, theirs_blk, reduction="sum", log_target=True) / len(ours_blk)


def _pooled(logs_blk: Tensor, top: Tensor) -> Tensor:
    """Return log-probabilities of these tokens, and of all others together."""
    rest_blk = logs_blk.scatter(-1, top, -torch.inf)
    return torch.cat([logs_blk.gather(-1, top), rest_blk.logsumexp(-1, keepdim=True)], dim=-1)
