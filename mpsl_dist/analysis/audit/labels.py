"""Labels from the gradients that cross: attacks that see numbers alone, and no configuration.

Shape legend: ``n`` samples, ``k`` classes, ``d`` width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: k-means begins so many times, and the tightest clusters are kept: the attacker sees no labels.
_RESTARTS = 5


def from_logits(gradient_nk: Tensor) -> Tensor:
    """Return the labels (n,) that gradients of logits tell: the smallest entry of every row.

    Softmax minus one-hot has one negative entry, whatever positive factor a sample has.
    """
    return gradient_nk.argmin(1)


def by_clusters(gradient_nd: Tensor, classes: int, labels_n: Tensor) -> tuple[Tensor, Tensor]:
    """Guess labels from gradients of features or of activations, one label a cluster being known.

    Behind a linear head a gradient is W_hᵀ(p − e_y): its direction is that of its class.

    Parameters
    ----------
    labels_n : Tensor
        (n,) the true ones, of which the attacker is told one for each cluster: that of the sample
        nearest to its centre.

    Returns
    -------
    tuple of Tensor
        Guesses (n,), and which of the samples (n,) the attacker was not told.
    """
    from sklearn.cluster import KMeans

    unit_nd = torch.nn.functional.normalize(gradient_nd.double(), dim=1).numpy()
    count = min(classes, len(np.unique(unit_nd, axis=0)))
    means = KMeans(count, n_init=_RESTARTS, random_state=0).fit(unit_nd)
    nearest_k = means.transform(unit_nd).argmin(0)
    names_k = labels_n[torch.from_numpy(nearest_k)]
    hidden_n = torch.ones(len(labels_n), dtype=torch.bool)
    hidden_n[torch.from_numpy(nearest_k)] = False
    return names_k[torch.from_numpy(means.labels_.astype(np.int64))], hidden_n


def norms(gradient_nd: Tensor) -> np.ndarray:
    """Return the gradients' lengths (n,): of an unbalanced pair of classes the rare one's are
    longer (Li et al. 2021, arXiv 2102.08504)."""
    return gradient_nd.double().norm(dim=1).numpy()


def cosines(gradient_nd: Tensor, known: int) -> np.ndarray:
    """Return the cosines (n,) to the gradient of one sample whose class is known (Li et al.)."""
    unit_nd = torch.nn.functional.normalize(gradient_nd.double(), dim=1)
    return (unit_nd @ unit_nd[known]).numpy()


def counts_from_bias(gradient_k: Tensor, mean_probability_k: Tensor, samples: int) -> Tensor:
    """Return how many samples of a mini-batch have each class, from a head's bias gradient.

    The gradient of the mean loss is the mean of softmax minus one-hot. A server that knows the
    head, because clients bring theirs together, computes the mean softmax itself.

    Parameters
    ----------
    gradient_k, mean_probability_k : Tensor
        (k,) of the mini-batch.
    samples : int
        Of the mini-batch.
    """
    return (samples * (mean_probability_k - gradient_k)).round().clamp(min=0).long()
