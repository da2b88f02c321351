"""Centralized training, in one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import toys
from local_fleet import steps_of

from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.config import Experiment, to_dict
from mpsl_dist.errors import DivergedError
from mpsl_dist.methods import centralized, loop
from mpsl_dist.methods.hosting import Setup
from mpsl_dist.models.average import trainable_state
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.runtime.process import StopRequest

DOUBLE = {"precision": "float64"}


def experiment(**changes) -> Experiment:
    settings = toys.experiment().training
    training = {"server": vars(settings.server), "client": vars(settings.client), "epochs": 2}
    training |= {"batch_size": 20} | DOUBLE | changes.pop("training", {})
    return toys.experiment(method="centralized", training=training, **changes)


def build(chosen: Experiment) -> centralized.Centralized:
    return centralized.build(Setup(chosen, Holdings.load(chosen), 1))


@pytest.mark.parametrize("share", ["proportional", "equal"])
def test_every_step_trains_on_the_clients_mini_batches(share: str) -> None:
    chosen = experiment(client_share=share)
    method = build(chosen)
    seen = []
    method.learner.train = lambda batch, step: seen.append(batch.labels) or 0.0
    twin = build(chosen)
    twin.begin_epoch(0)
    steps_of(method, len(method.plan))
    for step, labels in enumerate(seen):
        parts = [twin.held[n].batch(step).labels for n in np.flatnonzero(twin.plan[step])]
        assert torch.equal(labels, torch.cat(parts))
    assert sum(map(len, seen)) == toys.SAMPLES


@pytest.mark.parametrize("clients", [3, 10])
def test_of_equal_shares_it_is_one_pool_in_full_batches(clients: int) -> None:
    """A batch of 20 is no multiple of 3 clients, and need be none."""
    chosen = experiment(clients=clients, client_share="equal")
    method = build(chosen)
    assert method.plan.tolist() == [[20], [20], [20], [20], [10]]
    orders = []
    for epoch in range(2):
        method.begin_epoch(epoch)
        orders.append([i for step in range(5) for i in method.held[0].positions(step)])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    assert sorted(method.held[0].indices.tolist()) == list(range(toys.SAMPLES))


def test_of_one_client_equals_split_learning_of_one_client() -> None:
    # The owners' settings differ, so that none of them steps the other's part.
    training = {"client": {"lr": 3e-3, "weight_decay": 0.2}}
    chosen = experiment(clients=1, training=training)
    method = build(chosen)
    losses, expected = steps_of(method, 7), reference.train(chosen, 7)
    assert losses == pytest.approx(expected["losses"], rel=1e-12)
    for key, value in expected["server"].items():
        own = method.learner.model.server_model.state_dict()[key]
        torch.testing.assert_close(own, value, rtol=1e-10, atol=1e-12)
    for key, value in expected["clients"][0].items():
        own = dict(method.learner.model.tokenizers.named_parameters())[key]
        torch.testing.assert_close(own.detach(), value, rtol=1e-10, atol=1e-12)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    class StopAfter(StopRequest):
        def __init__(self, steps: int) -> None:
            super().__init__()
            self.left = steps

        def __bool__(self) -> bool:
            self.left -= 1
            return self.left < 0

    def run(name: str, stop: StopRequest, resume: bool = False) -> dict:
        chosen = experiment(name=name, output=str(tmp_path))
        directory = RunDirectory(chosen.run_directory)
        directory.open(to_dict(chosen), resume, False)
        method = build(chosen)
        return loop.train(chosen, method.splits, method, directory, stop)

    whole = run("whole", StopRequest())
    assert run("parts", StopAfter(6))["status"] == "stopped"
    parts = run("parts", StopRequest(), resume=True)
    assert whole["loss"] == parts["loss"] and whole["test"] == parts["test"]
    models = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts")]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_a_loss_that_is_no_number_stops_before_any_parameter() -> None:
    chosen = experiment()
    method = build(chosen)
    with torch.no_grad():
        method.learner.model.server_model.head.bias[0] = float("nan")
    before = trainable_state(method.learner.model)
    method.begin_epoch(0)
    with pytest.raises(DivergedError, match=r"loss is nan.*Lower training\.server\.lr"):
        method.step(0, 0)
    after = trainable_state(method.learner.model)
    assert all(torch.equal(before[k], after[k]) or k.endswith("head.bias") for k in before)


def test_nothing_crosses_and_no_client_trains() -> None:
    chosen = experiment()
    method = build(chosen)
    steps_of(method, 3)
    assert method.traffic.by_kind() == {}
    counts = method.trainable_parameters()
    trained = sum(p.numel() for p in method.learner.model.parameters() if p.requires_grad)
    assert counts == {"client": 0, "server": trained}
