"""FedAvg and FedCLIP, in one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from local_fleet import LocalRounds

from mpsl_dist.actors import deployable
from mpsl_dist.actors.federated_client import Update
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.actors.local_data import LocalData
from mpsl_dist.config import ConfigError, Experiment, to_dict
from mpsl_dist.methods import centralized, loop
from mpsl_dist.methods.fedavg import FedAvg, aggregate, build_clients, draw
from mpsl_dist.methods.hosting import Setup
from mpsl_dist.models.average import trainable_state
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.runtime.process import StopRequest

SGD = {"name": "sgd", "lr": 0.1}


def experiment(method: str = "fedavg", **changes) -> Experiment:
    base = to_dict(toys.experiment())["training"] | {"precision": "float64"}
    training = base | changes.pop("training", {})
    return toys.experiment(method=method, training=training, **changes)


def fedavg(chosen: Experiment) -> FedAvg:
    """The method with all its clients in this process."""
    holdings = Holdings.load(chosen)
    clients = build_clients(chosen, list(range(chosen.clients)), holdings)
    splits = holdings.splits
    return FedAvg(chosen, splits, deployable.build(chosen, splits), LocalRounds(clients))


def pooled(chosen: Experiment) -> centralized.Centralized:
    return centralized.build(Setup(chosen, Holdings.load(chosen), 1))


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module, tolerance: float) -> None:
    """Every parameter within ``tolerance``, absolute."""
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        error = (p - q).abs().max().item()
        assert error <= tolerance, f"{key}: off by {error:.2e}"


@pytest.mark.parametrize("batch_size", [toys.SAMPLES, 20])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_of_one_client_equals_centralized_step_for_step(batch_size: int, schedule: str) -> None:
    settings = {"lr": 1e-2, "weight_decay": 0.1, "schedule": schedule, "warmup_steps": 3}
    training = {"batch_size": batch_size, "server": settings, "client": settings, "epochs": 4}
    chosen = experiment(clients=1, training=training)
    federated, central = fedavg(chosen), pooled(chosen)
    for epoch in range(4):
        central.begin_epoch(epoch)
        steps = len(central.plan)
        losses = [central.step(at, epoch * steps + at) for at in range(steps)]
        sizes = central.plan.sum(1)
        told = federated.step(0, epoch)
        assert told == pytest.approx(np.average(losses, weights=sizes), rel=1e-14)
        assert_same(federated.model, central.learner.model, 0.0)


@pytest.mark.parametrize("form", ["scaled", "residual"])
def test_retrieval_has_the_same_methods(form: str) -> None:
    task = {"data": {"name": "toy-pairs"}, "adapters": {"form": form}}
    federated = fedavg(experiment("fedclip", **task))
    before = trainable_state(federated.model)
    assert {k.split(".")[1] for k in before if k.startswith("server_model")} == {"adapters"}
    federated.step(0, 0)
    after = trainable_state(federated.model)
    assert not any(torch.equal(before[k], after[k]) for k in before if "adapters" in k)
    assert {"image_to_text_r1", "text_to_image_r10"} <= federated.evaluate().keys()


def test_of_one_client_equals_centralized_in_retrieval_too() -> None:
    chosen = experiment(clients=1, data={"name": "toy-pairs"})
    federated, central = fedavg(chosen), pooled(chosen)
    central.begin_epoch(0)
    for step in range(len(central.plan)):
        central.step(step, step)
    federated.step(0, 0)
    assert_same(federated.model, central.learner.model, 0.0)


def test_identical_data_and_one_local_sgd_step_equals_centralized_sgd() -> None:
    training = {"batch_size": toys.SAMPLES, "server": SGD, "client": SGD}
    chosen = experiment(training=training, federated={"batch_size": toys.SAMPLES})
    federated = fedavg(chosen)
    same = np.arange(toys.SAMPLES)
    for client in federated.clients.references.values():
        client.data = LocalData(federated.splits.train, same, chosen.seed, 0)
        client.counts = [toys.SAMPLES]
    central = pooled(experiment(clients=1, training=training))
    for round_ in range(3):
        federated.step(0, round_)
        central.begin_epoch(round_)
        central.step(0, round_)
        assert_same(federated.model, central.learner.model, 1e-13)


def test_unlike_data_and_one_local_sgd_step_equals_centralized_sgd() -> None:
    # A weighted mean of one-step SGD is one SGD step on the weighted mean of the gradients.
    training = {"batch_size": toys.SAMPLES, "server": SGD, "client": SGD}
    chosen = experiment(training=training)
    federated, central = fedavg(chosen), pooled(chosen)
    assert len(set(federated.sizes.values())) > 1
    for round_ in range(3):
        federated.step(0, round_)
        central.begin_epoch(round_)
        central.step(0, round_)
        assert_same(federated.model, central.learner.model, 1e-13)


def test_the_aggregate_is_the_mean_weighted_by_samples() -> None:
    def update(samples: int, *values: float) -> Update:
        return Update({"w": torch.tensor(values, dtype=torch.float64)}, samples, 0.0)

    mean = aggregate({0: update(1, 1.0, 10.0), 3: update(3, 2.0, 20.0), 5: update(6, 4.0, -5.0)})
    # (1 + 3*2 + 6*4) / 10 and (10 + 3*20 - 6*5) / 10
    assert mean["w"].tolist() == pytest.approx([3.1, 4.0], rel=1e-15)


def test_a_rounds_result_is_the_mean_of_what_the_clients_sent() -> None:
    federated = fedavg(experiment())
    sent: dict[int, Update] = {}
    for n, client in federated.clients.references.items():
        client.train_round = lambda *a, n=n, train=client.train_round: sent.setdefault(n, train(*a))
    federated.step(0, 0)
    total = sum(federated.sizes.values())
    for key, value in trainable_state(federated.model).items():
        by_hand = sum(federated.sizes[n] * sent[n].weights[key] for n in sent) / total
        torch.testing.assert_close(value, by_hand, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "method, model", [("fedavg", {"encoder": {"trainable_blocks": 1}}), ("fedclip", {})]
)
def test_frozen_parameters_never_move_or_travel(method: str, model: dict) -> None:
    model = to_dict(toys.experiment())["model"] | model
    model["encoder"] = to_dict(toys.experiment())["model"]["encoder"] | model["encoder"]
    federated = fedavg(experiment(method, model=model))
    models = [federated.model, federated.clients.references[0].model]
    frozen = [
        {k: p.clone() for k, p in m.named_parameters() if not p.requires_grad} for m in models
    ]
    trained = {k: p.numel() for k, p in federated.model.named_parameters() if p.requires_grad}
    encoder = {k for k in frozen[0] if ".encoder." in k}
    assert encoder and "tokenizers.by_modality.text.table.weight" in frozen[0]
    if method == "fedclip":
        assert len(encoder) == sum(1 for _ in federated.model.server_model.encoder.parameters())
    rounds = 2
    for round_ in range(rounds):
        federated.step(0, round_)
    for model, before in zip(models, frozen, strict=True):
        now = dict(model.named_parameters())
        assert all(torch.equal(now[key], value) for key, value in before.items())
    counted = federated.traffic.by_kind()
    everything_trained = [8 * sum(trained.values()) * rounds] * 4
    assert counted == {"model_down": everything_trained, "model_up": everything_trained}
    update = federated.clients.references[1].train_round(2, trainable_state(federated.model))
    assert update.weights.keys() == trained.keys()


def test_fedclip_trains_adapters_classifier_and_tokenizers() -> None:
    federated = fedavg(experiment("fedclip"))
    before = trainable_state(federated.model)
    parts = ("tokenizers.", "server_model.adapters.", "server_model.head.")
    assert {next(p for p in parts if key.startswith(p)) for key in before} == set(parts)
    federated.step(0, 0)
    after = trainable_state(federated.model)
    assert [key for key in before if torch.equal(before[key], after[key])] == []


def test_around_frozen_tokenizers_adapters_and_classifier_alone_are_averaged() -> None:
    model = to_dict(toys.experiment())["model"] | {"train_tokenizers": False}
    federated = fedavg(experiment("fedclip", model=model))
    parts = ("server_model.adapters.", "server_model.head.")
    assert all(key.startswith(parts) for key in trainable_state(federated.model))
    federated.step(0, 0)
    sent = sum(p.numel() * p.element_size() for p in trainable_state(federated.model).values())
    assert federated.traffic.by_kind() == {"model_down": [sent] * 4, "model_up": [sent] * 4}


def test_one_seed_gives_every_method_the_same_first_weights() -> None:
    plain, central = fedavg(experiment()).model, pooled(experiment("centralized")).learner.model
    adapted = dict(fedavg(experiment("fedclip")).model.named_parameters())
    assert_same(plain, central, 0.0)
    for key, value in plain.named_parameters():
        assert torch.equal(value, adapted[key])


@pytest.mark.parametrize("fraction, expected", [(1.0, 10), (0.3, 3), (0.01, 1)])
def test_draws_a_fraction_of_the_clients_anew_every_round(fraction: float, expected: int) -> None:
    rounds = [draw(10, fraction, 1, round_) for round_ in range(200)]
    assert all(len(set(d)) == expected and d == sorted(d) for d in rounds)
    assert rounds == [draw(10, fraction, 1, round_) for round_ in range(200)]
    assert set().union(*rounds) == set(range(10))
    if expected < 10:
        assert rounds != [draw(10, fraction, 2, round_) for round_ in range(200)]


def test_only_drawn_clients_are_sent_the_model() -> None:
    federated = fedavg(experiment(federated={"fraction": 0.5}))
    federated.step(0, 0)
    drawn = draw(4, 0.5, 2024, 0)
    assert federated.clients.calls[-1] == ("train_round", drawn)
    down = federated.traffic.by_kind()["model_down"]
    assert [n for n in range(4) if down[n]] == drawn


def test_optimizers_are_kept_or_begun_anew() -> None:
    def moments_after_two_rounds(rule: str) -> int:
        federated = fedavg(experiment(federated={"optimizer": rule}))
        federated.step(0, 0)
        federated.step(0, 1)
        state = federated.clients.references[0].learner.optimizer_state()
        return int(state["server_model"]["state"][0]["step"])

    steps = sum(count > 0 for count in fedavg(experiment()).clients.references[0].counts)
    assert moments_after_two_rounds("keep") == 2 * steps
    assert moments_after_two_rounds("reset") == steps


def test_local_epochs_go_through_the_samples_in_new_orders() -> None:
    federated = fedavg(experiment(federated={"local_epochs": 3, "batch_size": 7}))
    client = federated.clients.references[0]
    seen: list[torch.Tensor] = []
    steps: list[int] = []
    client.learner.train = lambda batch, step: (
        seen.append(batch.inputs["text"]),
        steps.append(step),
        0.0,
    )[-1]
    client.train_round(1, trainable_state(federated.model))
    assert sum(map(len, seen)) == 3 * len(client.data)
    assert max(map(len, seen)) <= 7
    epochs = torch.cat(seen).chunk(3)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[0].sort(0).values, epochs[1].sort(0).values)
    per_round, _ = client.span
    assert steps == sorted(steps) and per_round <= steps[0] and steps[-1] < 2 * per_round


def test_clients_that_hold_the_test_set_score_it_themselves() -> None:
    at_clients = experiment(data={"name": "toy-image+text", "test_at": "clients"})
    federated = fedavg(at_clients)
    federated.step(0, 0)
    found = federated.evaluate()
    whole = federated.model.test(federated.tests, 256)["accuracy"]
    assert found == {"accuracy": pytest.approx(whole, abs=1e-12)}
    assert "test_weights_down" in federated.traffic.by_kind()


@pytest.mark.parametrize("rule", ["keep", "reset"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(rule: str, tmp_path: Path) -> None:
    def run(name: str, stop: StopRequest, resume: bool = False) -> dict:
        chosen = experiment(name=name, output=str(tmp_path), federated={"optimizer": rule})
        directory = RunDirectory(chosen.run_directory)
        directory.open(to_dict(chosen), resume, False)
        method = fedavg(chosen)
        if name == "parts" and not resume:
            train = method.step
            method.step = lambda *a: (train(*a), setattr(stop, "signal", "SIGTERM"))[0]
        return loop.train(chosen, method.splits, method, directory, stop)

    whole = run("whole", StopRequest())
    assert run("parts", StopRequest())["status"] == "stopped"
    parts = run("parts", StopRequest(), resume=True)
    assert whole["loss"] == parts["loss"] and whole["communication"] == parts["communication"]
    models = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts")]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_a_deployed_fedclip_model_predicts_as_the_trained_one(tmp_path: Path) -> None:
    chosen = experiment("fedclip", adapters={"include": "unified", "form": "residual"})
    federated = fedavg(chosen)
    federated.step(0, 0)
    federated.model.save(tmp_path, chosen, federated.splits)
    loaded, _, _ = deployable.load(tmp_path)
    inputs = federated.model.to_own(federated.splits.test.fetch(range(10)).inputs)
    assert torch.equal(loaded(inputs), federated.model(inputs))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"federated": {"fraction": 1.5}}, "federated.fraction: must be at most 1"),
        ({"federated": {"local_epochs": 0}}, "federated.local_epochs: must be at least 1"),
        ({"federated": {"batch_size": 0}}, "federated.batch_size: must be at least 1"),
        ({"federated": {"optimiser": "keep"}}, "did you mean 'federated.optimizer'"),
        ({"adapters": {"include": []}}, "adapters.include: empty"),
        ({"adapters": {"include": ["picture"]}}, "adapters.include: expected a list of"),
    ],
)
def test_says_what_is_wrong_with_a_configuration(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        experiment("fedclip", **changes)
