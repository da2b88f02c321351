"""Clients that learn alone: N of them are N centralized runs, and nothing but numbers crosses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from local_fleet import LocalRounds

from mpsl_dist.__main__ import main
from mpsl_dist.actors import assembly, deployable
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.actors.learner import Learner
from mpsl_dist.actors.local_data import TestData
from mpsl_dist.analysis import flops, traffic_model
from mpsl_dist.analysis.cost_inputs import inputs_of
from mpsl_dist.config import ConfigError, Experiment, to_dict
from mpsl_dist.config.methods import unread
from mpsl_dist.methods import centralized, loop
from mpsl_dist.methods.hosting import Setup
from mpsl_dist.methods.standalone import Standalone, build, build_clients, over_clients
from mpsl_dist.models.average import trainable_state
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.records.traffic import nbytes
from mpsl_dist.runtime.process import StopRequest

#: At this seed client 1 has both modalities, 0 and 2 hear only, 3 sees only.
MISSING = {"rate": 0.5, "seed": 3}
PLACES = ("server", "clients")


def experiment(data: dict | None = None, **changes: Any) -> Experiment:
    chosen = {"name": "toy-image+audio"} | (data or {})
    return toys.experiment(**{"method": "standalone"} | changes, data=chosen)


def alone(chosen: Experiment) -> Standalone:
    """The method with all its clients in this process, each with a worker's view of the data."""
    holdings = Holdings.load(chosen)

    def clients(numbers: list[int]) -> list[Any]:
        return build_clients(chosen, numbers, holdings.only(numbers))

    def local(_: Any) -> Any:
        link = LocalRounds(clients(list(range(chosen.clients))))
        link.fleet.rebuild = clients
        return link.fleet

    return build(Setup(chosen, holdings, 1, transport=local))


def client_of(method: Standalone, number: int) -> Any:
    return method.clients.fleet.host.clients[number]


def centralized_on(chosen: Experiment, number: int, method: Standalone) -> Learner:
    """Centralized training on one client's data alone, in the mini-batches that it has here."""
    holdings = Holdings.load(chosen).only([number])
    learner = Learner(deployable.build(chosen, holdings.splits), chosen.training)
    run = centralized.Centralized(chosen, holdings, learner)
    counts, steps, rounds = client_of(method, number).counts, *client_of(method, number).span
    run.plan = np.zeros((steps, chosen.clients), dtype=np.int64)
    run.plan[:, number] = counts
    learner.plan(steps, rounds)
    for epoch in range(rounds):
        run.begin_epoch(epoch)
        for step in np.flatnonzero(counts):
            run.step(int(step), epoch * steps + int(step))
    return learner


CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "late": {"model": {"fusion": "late"}},
    "by client": {"data": {"missing": MISSING}},
    "by sample": {"data": {"missing": MISSING | {"per": "sample"}}},
    "text, frozen blocks": {
        "data": {"name": "toy-gaps"},
        "model": {"encoder": toys.ENCODER | {"trainable_blocks": 1}},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_every_client_is_a_centralized_run_of_its_data_bit_for_bit(case: str) -> None:
    settings = {"lr": 1e-2, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 3}
    training = {"batch_size": 30, "server": settings, "client": settings, "epochs": 2}
    chosen = experiment(training=training, **CASES[case])
    method = alone(chosen)
    for round_ in range(2):
        method.step(0, round_)
    first = trainable_state(deployable.build(chosen, method.splits))
    for number in range(chosen.clients):
        learner = centralized_on(chosen, number, method)
        expected, own = trainable_state(learner.model), client_of(method, number).weights
        assert all(torch.equal(own[key], expected[key]) for key in own)
        assert not any(torch.equal(own[key], first[key]) for key in own)
        # What it has not is what its data never moved.
        assert all(torch.equal(expected[key], first[key]) for key in expected.keys() - own.keys())
        of_client = client_of(method, number)
        found, samples = of_client.test({}, 256)
        if len(of_client.model.tokenizers.by_modality) == 2:
            whole = learner.model.test(TestData(method.splits.test), 256)
            assert (found, samples) == (whole, len(method.splits.test.labels))


def run_to_the_end(
    chosen: Experiment, method: Any, stop_after: int | None = None, resume: bool = False
) -> dict[str, Any]:
    directory, stop, step = RunDirectory(chosen.run_directory), StopRequest(), method.step
    directory.open(to_dict(chosen), resume, False)

    def stepping(*where: int) -> float | None:
        if where[1] + 1 == stop_after:
            stop.signal = "SIGTERM"
        return step(*where)

    method.step = stepping
    return loop.train(chosen, method.splits, method, directory, stop)


def test_a_run_of_one_client_is_the_centralized_run_and_leaves_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"clients": 1, "output": str(tmp_path)}
    ours, theirs = (
        experiment(name="ours", **one),
        experiment(name="theirs", method="centralized", **one),
    )
    found = run_to_the_end(ours, alone(ours))
    expected = run_to_the_end(theirs, centralized.build(Setup(theirs, Holdings.load(theirs), 1)))
    assert found["test"]["accuracy"] == expected["test"]["accuracy"]
    files = ["ours/model/client-0000/model.safetensors", "theirs/model/model.safetensors"]
    assert (tmp_path / files[0]).read_bytes() == (tmp_path / files[1]).read_bytes()
    assert main(["evaluate", str(tmp_path / "ours/model/client-0000")]) == 0
    assert f"accuracy {found['test']['accuracy']:.4f}" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "ours")]) == 2
    assert "model/client-0000" in capsys.readouterr().err


@pytest.mark.parametrize("place", PLACES)
def test_no_tensor_crosses_and_none_is_computed_to_cross(place: str) -> None:
    chosen = experiment({"test_at": place})
    method = alone(chosen)
    answers: list[Any] = []
    start = method.clients.fleet.start

    def heard(message: str, arguments: Any, *words: Any) -> Any:
        assert not any(map(nbytes, arguments.values())), message
        wait = start(message, arguments, *words)
        return lambda: answers.append(wait()) or answers[-1]

    method.clients.fleet.start = heard
    method.step(0, 0)
    method.evaluate()
    assert answers and not any(nbytes(answer.by_client) for answer in answers)
    assert method.traffic.by_kind() == {}
    parts = flops.build(chosen, inputs_of(chosen))
    held = np.full(4, 5)
    assert traffic_model.per_epoch(parts) == traffic_model.testing(parts, held) == {}


def test_a_client_builds_the_tokenizers_of_its_own_modalities_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[str] = []
    tokenizer = assembly._build_tokenizer
    monkeypatch.setattr(
        assembly, "_build_tokenizer", lambda e, m, *a: built.append(m) or tokenizer(e, m, *a)
    )
    chosen = experiment({"missing": MISSING})
    holdings = Holdings.load(chosen)
    (sees,) = build_clients(chosen, [3], holdings.only([3]))
    assert built == ["image"] and [*sees.model.tokenizers.by_modality] == ["image"]
    assert not any("audio" in key for key in sees.weights)
    batch = next(sees.test_data.batches(30))
    assert len(batch) == 30 and not batch.present["audio"].any() and not batch.inputs["audio"].any()


def test_what_a_client_cannot_see_of_a_test_set_with_gaps_is_left_out() -> None:
    method = alone(experiment({"missing": MISSING | {"at_test": True}}))
    present = method.splits.test.present
    assert [client_of(method, n).test({}, 7)[1] for n in range(4)] == [
        int(present["audio"].sum()),
        30,
        int(present["audio"].sum()),
        int(present["image"].sum()),
    ]


def test_a_model_that_is_left_predicts_without_the_absent_modality(tmp_path: Path) -> None:
    method = alone(experiment({"missing": MISSING}, output=str(tmp_path)))
    method.step(0, 0)
    method.deployable().save(Path(), method.experiment, method.splits)
    for number, held in enumerate([["audio"], ["image", "audio"], ["audio"], ["image"]]):
        loaded, _, _ = deployable.load(tmp_path / "toy" / "model" / f"client-{number:04d}")
        assert [*loaded.tokenizers.by_modality] == held
        accuracy = loaded.test(TestData(method.splits.test), 256)
        assert client_of(method, number).test({}, 256) == (accuracy, 30)


def test_results_are_over_predictions_over_clients_and_over_their_training_samples() -> None:
    results = {0: ({"accuracy": 1.0}, 10), 1: ({"accuracy": 0.5}, 30), 2: ({}, 0)}
    assert over_clients(results, {0: 3, 1: 1, 2: 50}) == {
        "accuracy": pytest.approx(0.625),
        "accuracy_own_mean": 0.75,
        "accuracy_own_weighted": 0.875,
        "accuracy_own_std": pytest.approx(0.125**0.5),
        "accuracy_own_min": 0.5,
        "accuracy_own_max": 1.0,
    }
    assert over_clients({}, {}) == {}


def test_every_client_ranks_a_retrieval_set_itself() -> None:
    method = alone(experiment({"name": "toy-pairs"}))
    method.step(0, 0)
    assert {"image_to_text_r1", "text_to_image_r10_own_max"} <= method.evaluate().keys()


@pytest.mark.parametrize("place", PLACES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(place: str, tmp_path: Path) -> None:
    def chosen(name: str) -> Experiment:
        data = {"test_at": place, "missing": MISSING | {"at_test": place == "clients"}}
        return experiment(data, name=name, output=str(tmp_path))

    whole = run_to_the_end(chosen("whole"), alone(chosen("whole")))
    stopped = run_to_the_end(chosen("parts"), alone(chosen("parts")), stop_after=1)
    assert stopped["status"] == "stopped"
    parts = run_to_the_end(chosen("parts"), alone(chosen("parts")), resume=True)
    assert (whole["loss"], whole["test"]) == (parts["loss"], parts["test"])
    for number in range(4):
        name = f"model/client-{number:04d}/model.safetensors"
        models = [tmp_path / run / name for run in ("whole", "parts")]
        assert models[0].read_bytes() == models[1].read_bytes()


def test_a_client_that_comes_back_goes_on_from_its_own_file_and_nobody_else_notices(
    tmp_path: Path,
) -> None:
    chosen = experiment(training={"batch_size": 20, "epochs": 3})
    calm, method = alone(chosen), alone(chosen)
    for round_ in range(3):
        calm.step(0, round_)
    method.step(0, 0)
    method.clients.keep(str(tmp_path), "step 1")
    method.clients.lost |= {2}
    method.step(0, 1)
    assert method.clients.fleet.calls[-1] == ("train_round", [0, 1, 3])
    method.clients.fleet.back = [2]
    method.welcome(method.clients.readmit("step 2"))
    method.step(0, 2)

    def same(one: Standalone, other: Standalone, number: int) -> bool:
        a, b = (client_of(of, number).weights for of in (one, other))
        return all(torch.equal(a[key], b[key]) for key in a)

    assert [same(calm, method, n) for n in range(4)] == [True, True, False, True]
    missed = alone(chosen)
    missed.step(0, 0)
    missed.step(0, 2)
    assert same(method, missed, 2)


def test_what_it_never_reads_is_named_and_what_cannot_be_is_refused() -> None:
    asked = {"fraction": 0.5, "optimizer": "reset", "local_epochs": 2}
    chosen = experiment(tokenizer_sync={"mode": "gradients"}, federated=asked)
    assert unread(chosen) == ["tokenizer_sync.mode", "federated.fraction", "federated.optimizer"]
    with pytest.raises(ConfigError, match="data.test_at: server, but with method=standalone"):
        experiment({"place": "own"})
