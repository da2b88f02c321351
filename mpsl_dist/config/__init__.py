"""One experiment: frozen dataclasses <- YAML <- ``key.path=value``."""

from mpsl_dist.config.loading import from_dict, load, to_dict
from mpsl_dist.config.parts import Encoder, Model, Weights
from mpsl_dist.config.schema import (
    Adapters,
    Data,
    Defences,
    Experiment,
    Faults,
    Optimizer,
    Training,
)
from mpsl_dist.errors import ConfigError

__all__ = [
    "Adapters",
    "ConfigError",
    "Data",
    "Defences",
    "Encoder",
    "Experiment",
    "Faults",
    "Model",
    "Optimizer",
    "Training",
    "Weights",
    "from_dict",
    "load",
    "to_dict",
]
