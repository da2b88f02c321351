"""What one language model learns of another's: the pooled divergence of their predictions.

Shape legend: ``b`` batch, ``l`` length in tokens, ``k`` rows of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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
