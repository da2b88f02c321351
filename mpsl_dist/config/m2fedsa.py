"""The options of ``method: m2fedsa``; ``docs/m2fedsa.md`` has the reason for every default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Switch:
    """When knowledge begins to be transferred, and fusion ends to be trained; for good."""

    #: ``plateau``: once the fusion's mean loss of a round varies little; ``round``: after so many
    #: rounds; ``never``.
    rule: Literal["plateau", "round", "never"] = "plateau"
    #: Of ``plateau``: how many of the last differences between rounds are looked at.
    window: int = 10
    #: Of ``plateau``: the deviation of those must be less than so many times their mean.
    cv: float = 0.3
    #: Of ``round``: rounds before it.
    round: int = 0


@dataclass(frozen=True)
class M2FedSA:
    """One unimodal client for each modality of a user, see ``docs/m2fedsa.md``."""

    #: Blocks of every modality's encoder that are the clients'; the others are the server's.
    cut_block: int = 1
    #: Nobody trains an encoder, only what is added to it; ``false`` trains both halves as far as
    #: ``model`` has them trained, and averages the clients' halves too.
    frozen: bool = True
    #: Width of an adapter's two inner layers.
    adapter_rank: int = 64
    #: What an adapter x -> a(x) does at the end of its owner's blocks y = f(x): ``residual``
    #: y + a(y), ``parallel`` y + a(x) beside the last of them, ``plain`` a(y), as released for
    #: texts.
    adapter_form: Literal["residual", "parallel", "plain"] = "residual"
    #: One backward for all users, or users one after another, as released.
    order: Literal["parallel", "sequential"] = "parallel"
    #: Weights of the users in the average of a modality's clients after every round; ``never``
    #: leaves every client its own.
    within: Literal["samples", "uniform", "never"] = "samples"
    #: Average the middle layer of the task adapters over the modalities after every round.
    across: bool = True
    switch: Switch = field(default_factory=Switch)
    #: After the switch: weights of the labels' loss, of the decisions' and of the features'
    #: transfer.
    lambdas: list[float] = field(default_factory=lambda: [0.6, 0.2, 0.2])
    #: The decisions' distance: KL(unimodal || fused), as released, or the other way round.
    divergence: Literal["uni_multi", "multi_uni"] = "uni_multi"
    #: Over the samples of a mini-batch: ``mean``, or ``sum``, as released.
    divergence_over: Literal["mean", "sum"] = "mean"
    #: The decisions' distance is divided by the losses that it compares, or by this where they are
    #: less; 0, as released, lets it weigh the more, without end, the better both are.
    least_losses: float = 1.0
    #: Let the gradient through the sum of losses that the decisions' distance is divided by, which
    #: rewards a larger loss, as released.
    paper_denominator: bool = False
    #: What the fusion attends over: a sample's modalities, or a user's mini-batch, as released.
    fusion_attention: Literal["modalities", "batch"] = "modalities"
    #: The fusion's loss trains the task adapters too.
    fusion_trains_task_adapters: bool = False
