"""How well an attack did, each with its standard error.

Shape legend: ``n`` samples, ``p`` pixels of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: No reconstruction counts as better than this many dB: float32 has no more to give.
CEILING_DB = 150.0
_DRAWS = 200


@dataclass(frozen=True)
class Score:
    """A figure and its standard error."""

    value: float
    error: float


def psnr(truth_np: Tensor, guess_np: Tensor) -> Score:
    """Return the mean over samples of the peak signal-to-noise ratio, in dB.

    Parameters
    ----------
    truth_np, guess_np : Tensor
        (n, p), on a scale of 0 to 1.
    """
    error_n = (truth_np - guess_np).double().square().mean(1)
    decibels_n = (-10 * torch.log10(error_n)).clamp(max=CEILING_DB)
    return _mean(decibels_n.numpy())


def r2(truth_np: Tensor, guess_np: Tensor, mean_p: Tensor) -> Score:
    """Return the share of the pixels' variance around a public mean that the guess explains."""
    error_n = (truth_np - guess_np).double().square().sum(1).numpy()
    total_n = (truth_np - mean_p).double().square().sum(1).numpy()

    def explained(rows: np.ndarray) -> float:
        return float(1 - error_n[rows].sum() / max(total_n[rows].sum(), 1e-12))

    return _bootstrapped(explained, len(error_n))


def share(right: Sequence[bool] | Tensor | np.ndarray) -> Score:
    """Return the share that is right, with its binomial standard error."""
    right_n = np.asarray(right, dtype=float)
    value = float(right_n.mean())
    return Score(value, float(np.sqrt(value * (1 - value) / len(right_n))))


def auc(scores_n: np.ndarray, positive_n: np.ndarray) -> Score:
    """Return the area under the ROC curve: how often a positive scores above a negative."""
    return _bootstrapped(lambda rows: auc_alone(scores_n[rows], positive_n[rows]), len(scores_n))


def auc_alone(scores_n: np.ndarray, positive_n: np.ndarray) -> float:
    """Return :func:`auc` without its error; one half where a class is empty."""
    high, low = scores_n[positive_n], np.sort(scores_n[~positive_n])
    if not (len(high) and len(low)):
        return 0.5
    below, equal_or_below = (np.searchsorted(low, high, side) for side in ("left", "right"))
    return float((below + equal_or_below).mean() / (2 * len(low)))


def _mean(values_n: np.ndarray) -> Score:
    spread = values_n.std(ddof=1) / np.sqrt(len(values_n)) if len(values_n) > 1 else 0.0
    return Score(float(values_n.mean()), float(spread))


def _bootstrapped(figure: Callable[[np.ndarray], float], samples: int) -> Score:
    rng = np.random.default_rng(0)
    drawn = [figure(rng.integers(samples, size=samples)) for _ in range(_DRAWS)]
    return Score(figure(np.arange(samples)), float(np.std(drawn, ddof=1)))
