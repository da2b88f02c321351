"""What the rows of the methods' table promise."""

from __future__ import annotations

import inspect

import pytest
import toys

from mpsl_dist import plugins
from mpsl_dist.config.methods import METHODS, OPTIONAL, facts_of, processes_of, unread
from mpsl_dist.config.schema import Experiment
from mpsl_dist.errors import ConfigError
from mpsl_dist.typed import flatten


@pytest.mark.parametrize("method", METHODS)
def test_every_row_names_a_builder_and_keys_that_exist(method: str) -> None:
    facts, keys = METHODS[method], flatten(Experiment())
    assert next(iter(inspect.signature(plugins.resolve(facts.build)).parameters)) == "setup"
    for section in (*facts.reads, *OPTIONAL):
        assert any(key == section or key.startswith(f"{section}.") for key in keys), section
    assert all(key.startswith(OPTIONAL) for key in facts.reads)


def test_processes_are_the_server_and_its_workers_or_one() -> None:
    assert processes_of(toys.experiment(clients_per_worker=3)) == 3
    assert processes_of(toys.experiment(method="centralized")) == 1


def test_options_that_a_method_does_not_read_are_named() -> None:
    changed = {"tokenizer_sync": {"mode": "gradients"}, "federated": {"fraction": 0.5}}
    assert unread(toys.experiment(**changed)) == ["federated.fraction"]
    federated = toys.experiment(method="fedavg", **changed)
    assert unread(federated) == ["tokenizer_sync.mode"]
    alone = toys.experiment(method="centralized", clients_per_worker=2, **changed)
    found = ["clients_per_worker", "tokenizer_sync.mode", "federated.fraction"]
    assert unread(alone) == [*found, "runtime.worker_threads"]
    assert unread(toys.experiment()) == []


def test_an_unknown_method_names_the_near_one() -> None:
    with pytest.raises(ConfigError, match="unknown method .fedavgg.; did you mean .fedavg."):
        toys.experiment(method="fedavgg")
    assert facts_of(toys.experiment(method="fedclip")).adapted
