"""Samples that lack parts: FedAvg and FedCLIP, and what holds for every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import toys
from local_fleet import in_one_process, rounds_in_one_process, steps_of
from test_missing import AT_CLIENTS, MISSING, experiment

from mpsl_dist.actors import assembly
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.analysis import flops, gapped_traffic, traffic_model
from mpsl_dist.analysis.cost import cost_of
from mpsl_dist.analysis.cost_inputs import inputs_of
from mpsl_dist.config import Experiment, to_dict
from mpsl_dist.config.methods import METHODS
from mpsl_dist.data import TensorDataset
from mpsl_dist.methods import centralized
from mpsl_dist.methods.fedavg import FedAvg, build_clients
from mpsl_dist.methods.hosting import Setup
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.psl import Psl
from mpsl_dist.models.average import trainable_state
from mpsl_dist.models.server_model import ServerModel
from mpsl_dist.models.tokenizers import modality_of

ROUNDS = 2
READ_GAPS = [n for n, facts in METHODS.items() if "data.missing" in facts.reads and facts.common]
SAMPLE = {"data": {"missing": MISSING | {"per": "sample"}}}


def rounds_of(method: FedAvg, rounds: int = ROUNDS, first: int = 0) -> list[float | None]:
    return [method.step(0, first + round_) for round_ in range(rounds)]


def chosen_of(case: dict, method: str = "fedavg") -> Experiment:
    training = to_dict(experiment())["training"] | {"batch_size": 45}
    return experiment(**{"method": method, "training": training} | case)


CASES = {
    "fedavg": {},
    "fedavg late, by sample": SAMPLE | {"model": {"fusion": "late"}},
    "fedavg, mean of tokens": {"model": {"pooling": "mean"}},
    "fedavg, the data's own": {"data": {"name": "toy-gaps", "missing": {}}},
    "fedclip": {"method": "fedclip"},
    "fedclip, one adapter": {"method": "fedclip", "adapters": {"include": "unified"}},
    "fedclip, of sounds": {"method": "fedclip", "adapters": {"include": ["audio"]}},
}


@pytest.mark.parametrize("case", CASES)
def test_training_equals_that_of_each_sample_by_itself(case: str) -> None:
    """The reference gives every client a model of its own, and has no mask."""
    chosen = chosen_of(CASES[case])
    method, expected = rounds_in_one_process(chosen), reference.train_rounds(chosen, ROUNDS)
    assert rounds_of(method) == pytest.approx(expected["losses"], rel=1e-12)
    ours = trainable_state(method.model)
    assert ours.keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-9)


TRAFFIC = {
    "fedavg": {"federated": {"fraction": 0.75}},
    "fedavg at clients": {"data": AT_CLIENTS},
    "fedavg at clients, by sample": {"data": AT_CLIENTS | {"missing": SAMPLE["data"]["missing"]}},
    "fedclip at clients": {"method": "fedclip", "data": AT_CLIENTS},
    "fedclip, the data's own": {"method": "fedclip", "data": {"name": "toy-gaps", "missing": {}}},
}


@pytest.mark.parametrize("case", TRAFFIC)
def test_counted_bytes_are_the_computed_ones(case: str) -> None:
    chosen = chosen_of(TRAFFIC[case])
    method, parts = rounds_in_one_process(chosen), flops.build(chosen, inputs_of(chosen))
    rounds_of(method)
    method.evaluate()
    found = gapped_traffic.gaps_of(Holdings.load(chosen))
    tests = np.array([method.test_sizes.get(n, 0) for n in range(chosen.clients)])
    total = traffic_model.training(parts, method.plan, ROUNDS, found)
    total |= traffic_model.testing(parts, tests, found)
    computed = {kind: x.tolist() for kind, x in total.items() if x.any()}
    assert method.traffic.by_kind() == computed


def test_cost_counts_what_clients_send() -> None:
    whole, gapped = cost_of(experiment({"missing": {}})), cost_of(experiment())
    chosen = chosen_of({})
    parts = flops.build(chosen, inputs_of(chosen))
    audio, image = (
        sum(p.numel() for p in parts.tokenizers.by_modality[m].parameters()) * 8
        for m in ("audio", "image")
    )
    key = ("bytes_per_epoch", "fedavg", "client", "model_up", "up")
    # Of four clients two have no pictures and one no sound.
    assert whole.value(*key) - gapped.value(*key) == (2 * image + audio) / 4


@pytest.mark.parametrize("method", ["fedavg", "fedclip"])
def test_a_client_has_the_tokenizers_and_adapters_of_its_own_modalities_alone(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = chosen_of({}, method)
    holdings, built, build = Holdings.load(chosen), [], assembly._build_tokenizer
    server = rounds_in_one_process(chosen).model

    def counted(own: Experiment, modality: str, *rest: object) -> torch.nn.Module:
        built.append(modality)
        return build(own, modality, *rest)

    monkeypatch.setattr(assembly, "_build_tokenizer", counted)
    (sees,) = build_clients(chosen, [3], holdings.only([3]))
    assert built == ["image"] and sees.describe().modalities == ("image",)
    # What it saves does not depend on whom it shares a worker with.
    *_, beside = build_clients(chosen, range(4), holdings)
    assert [p.shape for p in beside.parameters()] == [p.shape for p in sees.parameters()]
    sees.begin_training([len(sees.data)], 1, 1)
    weights = trainable_state(server)
    own = {name: x for name, x in weights.items() if modality_of(name) in (None, "image")}
    sent = sees.train_round(0, own).weights
    assert sent.keys() == own.keys() < weights.keys()
    assert any(modality_of(name) == "image" for name in sent)
    with pytest.raises(ValueError, match="parameters differ"):
        sees.train_round(1, weights)


def open_method(chosen: Experiment) -> Any:
    """Any of the five, all of it in this process."""
    if chosen.method == "centralized":
        return centralized.build(Setup(chosen, Holdings.load(chosen), 1))
    if chosen.method in ("mpsl", "psl"):
        return in_one_process(chosen, {"mpsl": Mpsl, "psl": Psl}[chosen.method])
    return rounds_in_one_process(chosen)


def numbers_of(method: Any) -> tuple[list[float | None], dict[str, torch.Tensor]]:
    """Losses of some steps or rounds, then every number of the model."""
    return steps_of(method, ROUNDS), trainable_state(method.deployable())


def assert_same_numbers(one: tuple, other: tuple) -> None:
    assert one[0] == other[0] and one[1].keys() == other[1].keys()
    assert all(torch.equal(x, other[1][name]) for name, x in one[1].items())


@pytest.mark.parametrize(
    ("method", "fusion"), [("mpsl", "late"), *((method, "early") for method in READ_GAPS)]
)
def test_what_is_absent_changes_nothing_whatever_it_is(
    method: str, fusion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = chosen_of(SAMPLE | {"model": {"fusion": fusion}}, method)
    clean, fetch = numbers_of(open_method(chosen)), TensorDataset.fetch

    def spoiled(self: TensorDataset, *words: object) -> object:
        batch = fetch(self, *words)
        for name, there in (batch.present or {}).items():
            batch.inputs[name][~there] = torch.nan
        return batch

    monkeypatch.setattr(TensorDataset, "fetch", spoiled)
    assert_same_numbers(numbers_of(open_method(chosen)), clean)


@pytest.mark.parametrize("method", READ_GAPS)
def test_with_everything_present_nothing_changes(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a mask")

    monkeypatch.setattr(ServerModel, "_of_present", refuse)
    monkeypatch.setattr("mpsl_dist.actors.client.Gapped", refuse)
    default = open_method(chosen_of({"data": {"missing": {}}}, method))
    # Draws are made, and nothing falls.
    rare = {"data": {"missing": {"rate": 1e-9, "at_test": True}}}
    drawn = open_method(chosen_of(rare, method))
    assert_same_numbers(numbers_of(drawn), numbers_of(default))
    assert drawn.evaluate() == default.evaluate()
    assert drawn.traffic.by_kind() == default.traffic.by_kind()
    gapped = open_method(chosen_of(SAMPLE, method))
    with pytest.raises(Exception, match="a mask"):
        numbers_of(gapped)


def test_of_a_modality_one_local_step_is_one_on_the_samples_of_those_who_have_it() -> None:
    sgd = {"name": "sgd", "lr": 0.1}
    whole = {"batch_size": toys.SAMPLES, "precision": "float64", "server": sgd, "client": sgd}
    method = rounds_in_one_process(chosen_of(SAMPLE | {"training": whole | {"epochs": 1}}))
    before = trainable_state(method.model)
    # Client 3 trains on no sound from here on, and the others have more samples with it than not.
    held = [method.clients.references[n] for n in range(4)]
    held[3].trained = ("image",)
    method.step(0, 0)
    rows = np.concatenate([client.data.indices for client in held[:3]])
    central = rounds_in_one_process(method.experiment).clients.references[0].learner
    batch = Holdings.load(method.experiment).splits.train.fetch(rows)
    central.train(batch, 0)
    expected = trainable_state(central.model)
    for name, value in trainable_state(method.model).items():
        if modality_of(name) == "audio":
            assert not torch.equal(value, before[name])
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-13)


def test_what_nobody_of_a_round_has_stays_as_it_was() -> None:
    method = rounds_in_one_process(chosen_of({}, "fedclip"))
    rounds_of(method, 1)
    before = trainable_state(method.model)
    method.clients.lost |= {0, 1, 2}
    assert method.step(0, 1) is not None
    after = trainable_state(method.model)
    moved = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if modality_of(name) != "audio"}


def test_what_a_client_is_but_tested_on_it_takes_no_part_in() -> None:
    method = rounds_in_one_process(chosen_of({"data": AT_CLIENTS}, "fedclip"))
    client = method.clients.references[1]
    client.trained = ("image",)
    weights = trainable_state(method.model)
    sent = client.train_round(0, weights).weights
    assert {modality_of(name) for name in sent} == {None, "image"}
    assert client.test(weights, 8)[1] == len(client.test_data)


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    chosen = chosen_of({"output": str(tmp_path), "federated": {"optimizer": "keep"}})
    whole, first, second = (rounds_in_one_process(chosen) for _ in range(3))
    losses = rounds_of(whole, 3)
    assert rounds_of(first, 2) == losses[:2]
    folder = str(tmp_path / "checkpoint")
    second.restore(folder, first.save(folder))
    assert rounds_of(second, 1, first=2) == losses[2:]
    state = trainable_state(second.model)
    assert all(torch.equal(x, state[name]) for name, x in trainable_state(whole.model).items())
