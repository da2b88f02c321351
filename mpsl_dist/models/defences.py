"""The mathematics of the defences: what is done to labels, tokens and gradients before they leave.

Plain torch and numpy; whose secret the draws come from is :mod:`mpsl_dist.actors.defences`' matter.

Shape legend: ``b`` batch, ``l`` length in tokens, ``d`` width, ``k`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

# -- labels ------------------------------------------------------------------------------------


def keep_probability(epsilon: float, classes: int) -> float:
    """Return how often randomised response keeps a label: e^ε / (e^ε + k - 1)."""
    return math.exp(epsilon - np.logaddexp(epsilon, math.log(classes - 1)))


def randomised_response(
    label: int, classes: int, epsilon: float, draws: np.random.Generator
) -> int:
    """Return the label, or any other one by chance: ε-differentially private (Warner 1965)."""
    if draws.random() < keep_probability(epsilon, classes):
        return label
    return (label + 1 + int(draws.integers(classes - 1))) % classes


def corrected_loss(logits_bk: Tensor, labels_b: Tensor, epsilon: float) -> Tensor:
    """Return the mean negative log likelihood of labels that went through randomised response.

    Forward correction (Patrini et al. 2017): the model's probabilities go through the same
    confusion matrix C, -log (C^T softmax(logits))_y, so that its minimum is that of clean labels.

    Returns
    -------
    Tensor
        A scalar; for ε to infinity the cross-entropy.
    """
    log_sum = float(np.logaddexp(epsilon, math.log(logits_bk.shape[1] - 1)))
    # Of C: every other entry is e^-log_sum, and the diagonal more by that times e^ε - 1.
    more = epsilon + math.log(-math.expm1(-epsilon)) - log_sum
    own_b = -functional.cross_entropy(logits_bk, labels_b.to(logits_bk.device), reduction="none")
    return -torch.logaddexp(own_b + more, own_b.new_tensor(-log_sum)).mean()


# -- tokens ------------------------------------------------------------------------------------


def shortened(tokens_bld: Tensor) -> Tensor:
    """Return tokens that are no longer than √d, what LayerNorm makes of them before it is trained.

    Shorter ones stay as they are, to the last bit.
    """
    longest = math.sqrt(tokens_bld.shape[-1])
    return tokens_bld * (longest / tokens_bld.norm(dim=-1, keepdim=True).clamp(min=longest))


def normal(draws: Sequence[np.random.Generator], like: Tensor) -> Tensor:
    """Return standard normal numbers of a tensor's shape, a generator for each of its rows."""
    rows = [generator.standard_normal(like.shape[1:]) for generator in draws]
    return torch.from_numpy(np.stack(rows)).to(like)


def token_epsilon(sigma: float, tokens: int, width: int, delta: float, times: int = 1) -> float:
    """Return the ε that Gaussian noise on all of a sample's tokens is worth at δ.

    Two samples' tokens, each at most √d long, are at most 2√(l d) apart; releases under the same
    noise add up as one under σ/√times (Dong et al. 2019).

    Parameters
    ----------
    sigma : float
        Of the noise on every number.
    tokens, width : int
        l, of all modalities together, and d.
    times : int
        How often a sample is sent.

    Raises
    ------
    ImportError
        Without the package ``dp-accounting``, the extra ``privacy``.
    """
    from dp_accounting import get_epsilon_gaussian  # two seconds, and optional

    sensitivity = 2 * math.sqrt(tokens * width)
    return float(get_epsilon_gaussian(sigma / (sensitivity * math.sqrt(times)), delta))


def shuffled(tokens_bld: Tensor, draws: Sequence[np.random.Generator]) -> Tensor:
    """Return every sample's tokens in an order of its own; the first stays, pooling reads it."""
    patches = tokens_bld.shape[1] - 1
    orders = np.stack([generator.permutation(patches) for generator in draws]) + 1
    order_bl = functional.pad(torch.from_numpy(orders).to(tokens_bld.device), (1, 0))
    return tokens_bld.gather(1, order_bl.unsqueeze(-1).expand_as(tokens_bld))


# -- what tokens tell of inputs ------------------------------------------------------------------


def distances(values: Tensor) -> Tensor:
    """Return the Euclidean distances (b, b) between rows; between texts, of their one-hot rows."""
    flat = values.flatten(1)
    if not flat.is_floating_point():
        return (flat[:, None] != flat[None]).sum(-1).double().sqrt()
    # The exact mode: a distance of zero then has a gradient of zero, and small ones are right.
    return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")


def distance_correlation(x_bb: Tensor, z_bb: Tensor) -> Tensor:
    """Return the distance correlation (Székely et al. 2007) of two sets of distances.

    Parameters
    ----------
    x_bb, z_bb : Tensor
        Distances between the same samples, as :func:`distances` returns them.

    Returns
    -------
    Tensor
        A scalar from 0 to 1; 0, with no gradient, where all samples are the same.
    """
    x_bb, z_bb = _centred(x_bb.to(z_bb)), _centred(z_bb)
    both = (x_bb * x_bb).mean() * (z_bb * z_bb).mean()
    if not both > 0:
        return z_bb.sum() * 0
    tiny = torch.finfo(z_bb.dtype).tiny
    return ((x_bb * z_bb).mean() / both.sqrt()).clamp(min=tiny).sqrt()


def _centred(x_bb: Tensor) -> Tensor:
    return x_bb - x_bb.mean(0, keepdim=True) - x_bb.mean(1, keepdim=True) + x_bb.mean()


# -- gradients -----------------------------------------------------------------------------------


def noisy_gradient(gradient: Tensor, ratio: float, draws: np.random.Generator) -> Tensor:
    """Return a mini-batch's gradient with noise: of a row ``ratio`` times as long as a row.

    A row's length is the root mean square over the mini-batch, so that noise does not tell rows
    apart; a row's noise is that long in the root mean square.
    """
    rows_bk = gradient.flatten(1)
    length = rows_bk.norm(dim=1).square().mean().sqrt()
    noise = torch.from_numpy(draws.standard_normal(rows_bk.shape)).to(gradient)
    scaled = noise * (ratio * length / math.sqrt(rows_bk.shape[1]))
    return gradient + scaled.view_as(gradient)


# -- tokenizers ----------------------------------------------------------------------------------


@torch.no_grad()
def redraw(module: nn.Module, draws: np.random.Generator) -> None:
    """Replace every matrix of a module by normal numbers of the same deviation, in place.

    Vectors, which are norms and biases, stay. Not by torch's generator: its seed has 32 bits, few
    enough to be tried one by one.
    """
    for parameter in module.parameters():
        if parameter.dim() > 1:
            drawn = torch.from_numpy(draws.standard_normal(parameter.shape, dtype=np.float32))
            parameter.copy_(drawn * float(parameter.std()))
