"""mpsl_dist: the distributed runtime for Multimodal Parallel Split Learning (MPSL).

``train`` an experiment and ``load`` a trained model, from Python: docs/python.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Run", "load", "train"]

if TYPE_CHECKING:
    from mpsl_dist.api import Run, load, train


def __getattr__(name: str) -> Any:
    # Later, as every process imports this package and few use these.
    if name not in __all__:
        raise AttributeError(f"module 'mpsl_dist' has no attribute '{name}'")
    from mpsl_dist import api

    return getattr(api, name)
