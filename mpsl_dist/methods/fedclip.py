"""FedCLIP (Lu et al. 2023) as the paper compares with it: FedAvg around a frozen encoder.

Clients run the whole encoder but train only tokenizers, classifier and the attention adapters on
the pooled features (:mod:`mpsl_dist.models.adapters`); only those travel.
"""

from __future__ import annotations

from mpsl_dist.config import Experiment
from mpsl_dist.data import Splits
from mpsl_dist.methods import fedavg
from mpsl_dist.methods.fedavg import FedAvg


def build(experiment: Experiment, splits: Splits, threads: int) -> FedAvg:
    """Build as for FedAvg: what the method changes is the model that ``assembly`` builds."""
    method = fedavg.build(experiment, splits, threads)
    assert not any(p.requires_grad for p in method.model.server_model.encoder.parameters())
    return method
