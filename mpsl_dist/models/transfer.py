"""What a unimodal client learns of the fusion of all modalities (M²FedSA's knowledge transfer).

Shape legend: ``b`` batch, ``d`` width, ``k`` classes.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    paper_denominator : bool
        Whether the gradient goes through what the divergence is divided by.
    """

    lambdas: tuple[float, float, float]
    divergence: str = "uni_multi"
    over: str = "mean"
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
        """Return the divergence over both losses: the worse they are, the weaker the transfer."""
        both = own + fused
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
