"""``model.head_at: client``: the server's model ends at the features, every client owns a head."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import toys
from local_fleet import in_one_process, steps_of
from torch import Tensor

from mpsl_dist.__main__ import main
from mpsl_dist.actors import assembly, deployable
from mpsl_dist.actors.checks import check_task
from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.actors.holdings import Holdings, load_data
from mpsl_dist.actors.learner import Learner
from mpsl_dist.analysis import cost, flops, traffic_model
from mpsl_dist.analysis.cost_inputs import inputs_of
from mpsl_dist.config import Experiment, to_dict
from mpsl_dist.errors import ConfigError
from mpsl_dist.methods import loop
from mpsl_dist.methods.centralized import Centralized
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.psl import Psl
from mpsl_dist.models.average import average, load_trainable
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.runtime.process import StopRequest

#: Into the second epoch, and a multiple of the synced steps.
STEPS = 6
LATE = {"data": {"name": "toy-image+audio"}, "model": {"fusion": "late"}}
PAIRS = {"data": {"name": "toy-pairs"}, "clients": 3, "model": {"temperature": 0.2}}


def experiment(head_at: str = "client", **changes: Any) -> Experiment:
    training = {"precision": "float64"} | changes.pop("training", {})
    model = {"head_at": head_at} | changes.pop("model", {})
    return toys.experiment(
        training=to_dict(toys.experiment())["training"] | training, model=model, **changes
    )


def train(chosen: Experiment, kind: type[Mpsl] = Mpsl) -> tuple[Mpsl, list[float]]:
    method = in_one_process(chosen, kind)
    return method, steps_of(method, STEPS)


def states(method: Mpsl) -> dict[int, dict[str, Tensor]]:
    return {n: c.tokenizer_weights() for n, c in method.clients.references.items()}


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], by: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=by, msg=lambda m, k=key: k + m)


def assert_equals_reference(chosen: Experiment) -> Mpsl:
    (method, losses), expected = train(chosen), reference.train(chosen, STEPS)
    assert losses == pytest.approx(expected["losses"], rel=1e-9)
    assert_close(method.server.model.state_dict(), expected["server"], 1e-9)
    for client, state in states(method).items():
        assert_close(state, expected["clients"][client], 1e-9)
    return method


# -- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, PAIRS], ids=["classes", "pairs"])
def test_every_head_begins_with_the_numbers_that_it_would_have_at_the_server(changes: dict) -> None:
    changes = changes | {"seed": 7}
    model = changes.get("model", {}) | {"head_at": "client"}
    splits = load_data(toys.experiment(**changes))
    there, here = (
        toys.experiment(**changes | {"model": m}) for m in (model, model | {"head_at": "server"})
    )
    theirs, ours = (deployable.build(e, splits) for e in (there, here))
    heads = theirs.tokenizers.head.state_dict()
    assert heads and not list(theirs.server_model.head.parameters())
    before = ours.state_dict()
    for key, value in theirs.state_dict().items():
        where = key.replace("tokenizers.head.", "server_model.head.")
        assert torch.equal(value, before.pop(where)), key
    assert not before


@pytest.mark.parametrize(
    ("clients", "mode"), [*itertools.product((1, 2, 3, 4), ("none", "gradients", "weights"))]
)
def test_training_equals_a_single_process_with_a_head_for_each(clients: int, mode: str) -> None:
    fusion = LATE if (clients + len(mode)) % 2 else {}
    method = assert_equals_reference(
        experiment(clients=clients, tokenizer_sync={"mode": mode, "every": 2}, **fusion)
    )
    one, *others = states(method).values()
    assert {"head.weight", "head.bias"} < set(one)
    same = [torch.equal(one["head.weight"], other["head.weight"]) for other in others]
    assert same == [mode != "none"] * (clients - 1)


@pytest.mark.parametrize("mode", ["none", "gradients", "weights"])
def test_frozen_tokenizers_leave_the_heads_to_be_trained(mode: str) -> None:
    chosen = experiment(
        model={"train_tokenizers": False}, tokenizer_sync={"mode": mode, "every": 2}
    )
    method = assert_equals_reference(chosen)
    first = assembly.build_tokenizers(chosen, method.splits).head.weight
    for state in states(method).values():
        assert set(state) == {"head.weight", "head.bias"}
        assert not torch.equal(state["head.weight"], first)


@pytest.mark.parametrize(
    "changes", [PAIRS, {"client_share": "equal"}], ids=["pairs", "dry clients"]
)
def test_so_do_retrieval_and_clients_that_run_dry(changes: dict) -> None:
    assert_equals_reference(experiment(**changes))


def test_gradients_in_step_are_central_training_with_the_servers_head() -> None:
    method, losses = train(experiment(tokenizer_sync={"mode": "gradients", "every": 1}))
    chosen = experiment("server", method="centralized")
    holdings = Holdings.load(chosen)
    learner = Learner(deployable.build(chosen, holdings.splits), chosen.training)
    central = Centralized(chosen, holdings, learner)
    assert losses == pytest.approx(steps_of(central, STEPS), rel=1e-8)
    whole = learner.model.state_dict()
    for key, value in method.deployable().state_dict().items():
        where = key.replace("tokenizers.head.", "server_model.head.")
        torch.testing.assert_close(value, whole[where], rtol=0, atol=1e-8, msg=key)


@pytest.mark.parametrize("prefix", [False, True])
def test_a_cache_of_frozen_tokens_changes_nothing_for_the_heads(prefix: bool) -> None:
    encoder = to_dict(toys.experiment())["model"]["encoder"] | {"trainable_blocks": 1}
    model = {"train_tokenizers": False, "encoder": encoder}
    wire = {"cache": True, "cache_prefix": prefix}
    cached, losses = train(experiment(model=model, wire=wire))
    plain, expected = train(experiment(model=model))
    assert losses == expected
    for client, state in states(plain).items():
        for key, value in states(cached)[client].items():
            assert torch.equal(value, state[key]), (client, key)


@pytest.mark.parametrize("mode", ["none", "gradients", "weights"])
def test_naive_psl_agrees(mode: str) -> None:
    chosen = experiment(tokenizer_sync={"mode": mode, "every": 2})
    (ours, losses), (theirs, others) = train(chosen), train(chosen, Psl)
    assert losses == pytest.approx(others, rel=1e-10)
    assert ours.traffic.by_kind() == theirs.traffic.by_kind()
    for client, state in states(ours).items():
        assert_close(state, states(theirs)[client], 1e-10)


def test_the_messages_of_a_step_stay_the_papers_five_with_one_pass_of_the_encoder() -> None:
    method, passes = in_one_process(experiment()), []
    method.server.model.encoder.register_forward_hook(lambda *_: passes.append("forward"))
    method.server.model.encoder.register_full_backward_hook(lambda *_: passes.append("backward"))
    steps_of(method, 1)
    everyone = [0, 1, 2, 3]
    assert method.clients.calls[-3:] == [(m, everyone) for m in ("tokenize", "loss", "step")]
    assert passes == ["forward", "backward"]


# -- what the server learns --------------------------------------------------------------------


def test_gradients_of_features_tell_the_labels_apart() -> None:
    """What the docstring of ``actors/client.py`` warns of: samples of a class pull one way."""
    method, met = in_one_process(experiment()), {}
    forward = method.server.forward

    def watching(smashed: Any) -> dict[int, Tensor]:
        features = forward(smashed)
        for client, x_bd in features.items():
            x_bd.register_hook(lambda g_bd, n=client: met.update({n: g_bd}))
        return features

    method.server.forward = watching
    steps_of(method, 1)
    for client, gradients_bd in met.items():
        labels_b = method.clients.references[client].data.batch(0).labels
        unit_bd = torch.nn.functional.normalize(gradients_bd)
        alike_bb = unit_bd @ unit_bd.T > 0.5
        assert torch.equal(alike_bb, labels_b[:, None] == labels_b[None, :]), client


# -- tests, and the model that is left ---------------------------------------------------------


def accuracy(method: Mpsl, state: Mapping[str, Tensor], held: Any) -> float:
    """Of tokenizers and head in this state, without a message."""
    own = assembly.build_tokenizers(method.experiment, method.splits)
    load_trainable(own, state)
    return Deployable(own, method.server.model, method.task).test(held, 256)["accuracy"]


@pytest.mark.parametrize("test_at", ["server", "clients"])
def test_a_test_averages_the_heads_and_lets_each_stand_alone(test_at: str) -> None:
    method, _ = train(
        experiment(
            data={"name": "toy-image+text", "test_at": test_at}, training={"evaluate_own": True}
        )
    )
    held = method.clients.references
    for n, client in held.items():  # heads that no other's can stand for
        client.tokenizers.local_value().head.bias.data[n % len(toys.CLASSES)] += 100.0
    found, at_clients = method.evaluate(), test_at == "clients"
    parts = [client.test_data if at_clients else method.tests for client in held.values()]
    sizes = [method.test_sizes[n] if at_clients else 1 for n in held]
    own = [accuracy(method, states(method)[n], part) for n, part in zip(held, parts, strict=True)]
    mean = average(list(states(method).values()), list(method.sizes.values()))
    right = [accuracy(method, mean, p) * n for p, n in zip(parts, sizes, strict=True)]
    assert found["accuracy"] == pytest.approx(sum(right) / sum(sizes))
    assert found["accuracy_own_mean"] == pytest.approx(sum(own) / len(own))
    assert (found["accuracy_own_min"], found["accuracy_own_max"]) == (min(own), max(own))
    assert len(set(own)) > 1


def run(chosen: Experiment, resume: bool = False) -> Path:
    directory = RunDirectory(chosen.run_directory)
    directory.open(to_dict(chosen), resume, False)
    method = in_one_process(chosen)
    loop.train(chosen, method.splits, method, directory, StopRequest())
    return chosen.run_directory


def test_the_model_that_a_run_leaves_has_the_averaged_head_and_resumes_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def of(epochs: int, name: str) -> Experiment:
        return experiment(
            name=name,
            output=str(tmp_path),
            training={"epochs": epochs, "precision": "float32"},
        )

    run(of(2, "parts"))
    parts, whole = run(of(3, "parts"), resume=True), run(of(3, "whole"))
    model = [folder / "model" / "model.safetensors" for folder in (parts, whole)]
    assert model[0].read_bytes() == model[1].read_bytes()
    loaded, _, _ = deployable.load(whole / "model")
    first = assembly.build_tokenizers(of(3, "whole"), load_data(of(3, "whole"))).head
    assert not torch.equal(loaded.tokenizers.head.weight, first.weight)
    assert main(["evaluate", str(whole)]) == 0
    assert "accuracy" in capsys.readouterr().out


# -- what it costs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_sync": {"mode": "gradients", "every": 2}},
        LATE,
        PAIRS,
        {"model": {"train_tokenizers": False, "post_norm": True}},
        {"model": {"train_tokenizers": False, "encoder": {"trainable_blocks": 0}}},
    ],
    ids=["early", "late", "pairs", "frozen tokenizers", "heads alone"],
)
def test_counted_bytes_are_the_computed_ones(changes: dict) -> None:
    if "encoder" in changes.get("model", {}):
        encoder = to_dict(toys.experiment())["model"]["encoder"] | changes["model"]["encoder"]
        changes = {"model": changes["model"] | {"encoder": encoder}}
    chosen = experiment(**changes)
    method = in_one_process(chosen)
    steps_of(method, len(method.plan))
    sent = traffic_model.training(flops.build(chosen, inputs_of(chosen)), method.plan, 1)
    counted = method.traffic.by_kind()
    if chosen.tokenizer_sync.mode == "gradients":  # the last step of a run meets, not of an epoch
        sent.pop("sync_up"), sent.pop("sync_down")
        counted.pop("sync_up"), counted.pop("sync_down")
    assert counted == {kind: x.tolist() for kind, x in sent.items() if x.any()}


def test_the_head_moves_to_the_client_and_features_travel_both_ways() -> None:
    here, there = (cost.cost_of(experiment(at)) for at in ("server", "client"))
    width, classes = 16, len(toys.CLASSES)

    def moved(section: str, part: str, quantity: str) -> None:
        server, client = (
            [c.value(section, "mpsl", owner, part, quantity) for c in (here, there)]
            for owner in ("server", "client")
        )
        assert server[0] - server[1] == client[1] - client[0] > 0, (section, part, quantity)

    moved("parameters", "total", "trainable")
    for quantity in ("forward", "training", "paper"):
        moved("flops", "total", quantity)
    for part in ("parameters", "gradients", "optimizer"):
        moved("memory", part, "peak")
    head = (width + 1) * classes
    assert there.value("parameters", "mpsl", "client", "head", "trainable") == head
    for kind, way in (("predictions", "down"), ("prediction_gradients", "up")):
        sent = [c.value("bytes_per_epoch", "mpsl", "client", kind, way) for c in (here, there)]
        assert sent[1] * classes == sent[0] * width
    kept = [c.value("memory", "mpsl", "client", "kept for backward", "peak") for c in (here, there)]
    assert kept[1] - kept[0] == 5 * width * 8  # the features of a mini-batch, in float64
    assert not {row for row in here.rows if row.method == "fedavg"} ^ {
        row for row in there.rows if row.method == "fedavg"
    }


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["centralized", "fedavg", "fedclip"])
def test_methods_with_the_whole_model_in_one_hand_refuse_it(method: str) -> None:
    with pytest.raises(ConfigError, match=f"model.head_at: client, but method={method} has the"):
        experiment(method=method)


def test_the_server_has_nothing_to_contrast() -> None:
    with pytest.raises(ConfigError, match="contrastive: .*model.head_at=client it has none"):
        experiment(**PAIRS, contrastive="global")
    chosen = experiment(**PAIRS)
    check_task(chosen, load_data(chosen))
