"""ML-ECS in one process: what each limit of it is equal to, and what leaves a device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from local_fleet import WatchedFleet
from torch.nn import functional

from mpsl_dist.actors import cloud, predictor
from mpsl_dist.actors.checks import check_missing
from mpsl_dist.actors.edge_device import DeviceUpdate, EdgeDevice
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.actors.host import Host
from mpsl_dist.actors.stream import Stream
from mpsl_dist.config import ConfigError, Experiment
from mpsl_dist.data.gaps import draw
from mpsl_dist.errors import DataError
from mpsl_dist.methods import mlecs
from mpsl_dist.methods.device_link import DeviceLink
from mpsl_dist.methods.mlecs import Mlecs, build_cloud, build_devices
from mpsl_dist.models.answers import answer_loss
from mpsl_dist.models.average import trainable_state
from mpsl_dist.models.lora import average_by_rank, edited, to_rank
from mpsl_dist.models.unified import load_shared, shared_state
from mpsl_dist.records.traffic import Traffic, nbytes

#: No public samples, and nothing that needs them.
PRIVATE = {"public_steps": 0, "server_steps": 0, "contrast": False, "transfer": False}
SMALL = {
    **{"width": 16, "edge_blocks": 1, "server_blocks": 2, "rank": 2, "features": 8, "shared": 8},
    **{"fused": 12, "tokens": 2, "instruction": "is", "pool": 8},
    **{"public_steps": 2, "private_steps": 3, "server_steps": 2},
}


#: The row of the sweep, of a language model that its proxy is half of.
CO_PLMS = {"exchange": "proxy", "aggregate": "samples", "contrast": False, "edge_blocks": 2}
LACKING = {"missing": {"rate": 0.5, "seed": 3}}


def experiment(language: str = "none", public: float = 0.3, **changes: Any) -> Experiment:
    """Three devices with pictures and sounds, of which each may lack one."""
    own = {"language": language, "answer": "head" if language == "none" else "label"}
    rules = SMALL | own | changes.pop("mlecs", {})
    data = {"name": "toy-image+audio", "public_fraction": public} | changes.pop("data", {})
    if not public:  # the server's model learns nothing, and so is not tested
        data["test_at"] = "clients"
        if "missing" in data:
            data["missing"] = data["missing"] | {"at_test": True}
    training = {"batch_size": 12, "precision": "float64", "epochs": 3}
    training |= changes.pop("training", {})
    whole = {"method": "mlecs", "clients": 3, "mlecs": rules, "data": data, "training": training}
    return toys.experiment(**(whole | changes))


def in_one_process(chosen: Experiment) -> Mlecs:
    """The method with all its devices in this process."""
    torch.set_num_threads(1)
    holdings = Holdings.load(chosen)
    devices = build_devices(chosen, range(chosen.clients), holdings)
    link = DeviceLink(WatchedFleet(Host(devices)), Traffic(chosen.clients), chosen.faults)
    return Mlecs(chosen, build_cloud(chosen, holdings), link)


def devices_of(method: Mlecs) -> dict[int, EdgeDevice]:
    return method.clients.fleet.host.clients


def rounds(method: Mlecs, count: int, first: int = 0) -> None:
    for round_ in range(first, first + count):
        method.step(0, round_)


def states(method: Mlecs) -> list[dict[str, torch.Tensor]]:
    """All that is trained anywhere."""
    models = [d.model for d in devices_of(method).values()]
    models += [method.cloud.large, method.cloud.small]
    return [trainable_state(model) for model in models] + [method.cloud.shared]


def assert_same(ours: Any, theirs: Any, tolerance: float = 0.0) -> None:
    for own, other in zip(ours, theirs, strict=True):
        assert own.keys() == other.keys()
        for key in own:
            assert (own[key] - other[key]).abs().max() <= tolerance, key


# -- limits ------------------------------------------------------------------------------------


class Alone:
    """Plain torch on a copy of a device's model and its own mini-batches."""

    def __init__(self, chosen: Experiment, device: EdgeDevice) -> None:
        self.model, rules = copy.deepcopy(device.model), device.stepper.settings
        own = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            own, lr=rules.lr, weight_decay=rules.weight_decay, fused=True
        )
        data = Holdings.load(chosen).of(device.number)[0]
        self.stream = Stream(data, mlecs.batch_of(chosen))

    def train(self, round_: int, steps: int) -> None:
        for _, _, batch in self.stream.part(round_, steps):
            fused = self.model.read(self.model.encode(batch.inputs)).fused_bs
            logits = self.model.answers(self.model.prompt(fused), batch.labels)
            self.optimizer.zero_grad()
            answer_loss(self.model.answers, logits, batch.labels).backward()
            self.optimizer.step()


@pytest.mark.parametrize("exchange", ["lora", "all"])
def test_of_one_device_without_public_samples_it_is_centralized_tuning(exchange: str) -> None:
    pytest.importorskip("peft", reason="mpsl_dist[lm] is not installed")
    rules = PRIVATE | {"private_steps": 1, "exchange": exchange, "dropout": 0, "lora_dropout": 0}
    chosen = experiment("tiny", 0, clients=1, mlecs=rules)
    method = in_one_process(chosen)
    alone = Alone(chosen, devices_of(method)[0])
    alone.train(0, 5)
    before = states(method)[0]
    rounds(method, 5)
    assert_same([states(method)[0]], [trainable_state(alone.model)])
    moved = {key for key in before if not torch.equal(before[key], states(method)[0][key])}
    assert any("lora_B" in key for key in moved) and any("by_modality" in key for key in moved)


def test_uniform_weights_without_contrast_and_transfer_are_fedavg_over_the_factors() -> None:
    """Over two rounds: every device goes on from the mean, with its own encoders and connector."""
    pytest.importorskip("peft", reason="mpsl_dist[lm] is not installed")
    rules = PRIVATE | {"aggregate": "uniform", "dropout": 0, "lora_dropout": 0}
    chosen = experiment("tiny", 0, mlecs=rules, data={"missing": {"rate": 0.5}})
    method = in_one_process(chosen)
    devices = devices_of(method)
    assert len({device.model.modalities for device in devices.values()}) > 1
    alone = [Alone(chosen, device) for device in devices.values()]
    for round_ in range(2):
        for one in alone:
            one.train(round_, 3)
        rounds(method, 1, round_)
        sent = [shared_state(one.model, "lora") for one in alone]
        assert sent[0].keys() == method.cloud.shared.keys()
        assert all("lora_" in key for key in sent[0])
        for key, value in method.cloud.shared.items():
            by_hand = sum(state[key] for state in sent) / 3
            torch.testing.assert_close(value, by_hand, rtol=1e-12, atol=1e-15)
        for one in alone:
            load_shared(one.model, "lora", method.cloud.shared)
    method.evaluate()  # which sends the mean
    for device, one in zip(devices.values(), alone, strict=True):
        assert_same([shared_state(device.model, "lora")], [method.cloud.shared])
        assert_same([trainable_state(device.model)], [trainable_state(one.model)], 1e-12)


def test_without_exchange_every_device_is_a_run_of_its_own() -> None:
    rules = {"exchange": "none", "transfer": False, "contrast": False}
    chosen = experiment(mlecs=rules, data={"missing": {"rate": 0.5, "seed": 1}})
    method = in_one_process(chosen)
    rounds(method, 3)
    holdings = Holdings.load(chosen)
    for number, device in devices_of(method).items():
        (alone,) = build_devices(chosen, [number], holdings.only([number]))
        for round_ in range(3):
            alone.train_round(round_, None, {})
        assert_same([trainable_state(alone.model)], [trainable_state(device.model)])
    assert method.traffic.by_kind() == {}


# -- the average -------------------------------------------------------------------------------


def test_devices_weigh_as_many_modalities_as_they_have() -> None:
    def update(modalities: int, value: float) -> DeviceUpdate:
        return DeviceUpdate({"x": torch.tensor([value], dtype=torch.float64)}, 7, modalities, 0.0)

    method = in_one_process(experiment())
    of = {4: update(1, 1.0), 0: update(2, 10.0), 2: update(3, 100.0)}
    assert method._aggregate(of)["x"].item() == pytest.approx((1 + 20 + 300) / 6, rel=1e-15)
    turned = dict(reversed(of.items()))
    torch.testing.assert_close(method._aggregate(turned)["x"], method._aggregate(of)["x"])
    assert torch.equal(method._aggregate({0: of[0]})["x"], of[0].weights["x"])


def test_where_all_have_everything_the_weights_are_uniform() -> None:
    first, second = (
        in_one_process(experiment(mlecs={"aggregate": one})) for one in ("modalities", "uniform")
    )
    for method in (first, second):
        rounds(method, 1)
    assert_same(states(first), states(second))


def test_ranks_average_row_by_row_over_those_who_have_the_row() -> None:
    def factors(rank: int, value: float) -> dict[str, torch.Tensor]:
        return {
            "l.lora_A.default.weight": torch.full((rank, 3), value, dtype=torch.float64),
            "l.lora_B.default.weight": torch.full((4, rank), -value, dtype=torch.float64),
        }

    found = average_by_rank([factors(1, 1.0), factors(2, 2.0), factors(3, 5.0)], [1, 1, 2])
    assert found["l.lora_A.default.weight"][:, 0].tolist() == [13 / 4, 4.0, 5.0]
    assert found["l.lora_B.default.weight"][0].tolist() == [-13 / 4, -4.0, -5.0]
    cut = to_rank(found, 2)
    assert cut["l.lora_A.default.weight"].shape == (2, 3)
    assert cut["l.lora_B.default.weight"].shape == (4, 2)


def test_editing_sets_back_the_layer_that_turned_furthest() -> None:
    names = [f"layers.{layer}.q.lora_A.default.weight" for layer in range(3)]
    before = {name: torch.tensor([1.0, 0.0]) for name in names}
    turned = ([1.0, 0.1], [0.0, 1.0], [9.0, 0.0])
    after = {name: torch.tensor(x) for name, x in zip(names, turned, strict=True)}
    found = edited(after, before, 1)
    assert [found[name].tolist() for name in names] == [pytest.approx(turned[0]), [1, 0], [9, 0]]


# -- a round -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"aggregate": "uniform", "ranks": [1, 2, 2], "edit": 1},
        {"proximal": 0.1},
        {"exchange": "all", "transfer": False},
        CO_PLMS,
        {"answer": "head"},
    ],
    ids=["ml-ecs", "fedilora", "fedmllm", "multi-fedavg", "co-plms", "head"],
)
def test_bytes_and_trained_numbers_are_what_was_computed_beforehand(rules: dict[str, Any]) -> None:
    pytest.importorskip("peft", reason="mpsl_dist[lm] is not installed")
    from mpsl_dist.analysis.cost_inputs import Inputs
    from mpsl_dist.analysis.mlecs_cost import round_bytes, trained_numbers

    chosen = experiment("tiny", mlecs=rules, data={"missing": {"rate": 0.5, "seed": 3}})
    method = in_one_process(chosen)
    rounds(method, 1)
    inputs = Inputs({n: toys.SHAPES[n] for n in ("image", "audio")}, 3, toys.SAMPLES, 30)
    held = {n: device.model.modalities for n, device in devices_of(method).items()}
    assert len({len(own) for own in held.values()}) > 1
    counted = method.traffic.by_kind()
    for number, own in held.items():
        foreseen = round_bytes(chosen, inputs, number, own)
        assert foreseen == {kind: sent[number] for kind, sent in counted.items() if sent[number]}
    totals = dict.fromkeys(("client", "server"), 0)
    for (owner, _), trained in trained_numbers(chosen, inputs).items():
        totals[owner] += trained
    assert totals == method.trainable_parameters()


def test_what_leaves_a_device_are_factors_and_three_numbers() -> None:
    pytest.importorskip("peft", reason="mpsl_dist[lm] is not installed")
    method = in_one_process(experiment("tiny", data={"missing": {"rate": 0.5, "seed": 3}}))
    device = devices_of(method)[0]
    update = device.train_round(0, method.cloud.fused_table(), method.cloud.shared)
    assert {key.split(".lora_")[0] for key in update.weights} == {
        f"answers.language.model.layers.0.self_attn.{name}_proj" for name in "qkvo"
    }
    assert update.modalities == len(device.model.modalities)
    assert nbytes(update) == nbytes(method.cloud.shared)


def test_a_device_never_reads_what_it_lacks() -> None:
    chosen = experiment(data={"missing": {"rate": 0.5, "seed": 3}})
    holdings = Holdings.load(chosen)
    lacking = [n for n in range(3) if holdings.modalities(n)]
    assert lacking
    for number in lacking:
        holdings = Holdings.load(chosen)
        (device,) = build_devices(chosen, [number], holdings)
        (absent,) = set(holdings.splits.shapes) - set(device.model.modalities)
        holdings.splits.train.inputs[absent].fill_(torch.nan)
        table = torch.zeros(27, chosen.mlecs.fused, dtype=torch.float64)
        shared = shared_state(device.model, "lora")
        assert np.isfinite(device.train_round(0, table, shared).loss)


def test_public_samples_are_nobodys_own_and_the_same_for_all() -> None:
    holdings = Holdings.load(experiment(data={"test_at": "clients"}))
    public, test = holdings.public.train, holdings.public.test
    assert len(public) == 27 and len(test) == 9
    everybody = np.concatenate([*holdings.dealt.parts, public])
    assert sorted(everybody.tolist()) == list(range(toys.SAMPLES))
    tested = np.concatenate([*holdings.tests, test])
    assert sorted(tested.tolist()) == list(range(30))
    wanted = holdings.of_public(3)[0].indices
    whole = holdings.splits.train.fetch(wanted)
    cut = holdings.only([1])
    own = cut.splits.train.fetch(cut.of_public(1)[0].indices)
    assert all(torch.equal(own.inputs[name], whole.inputs[name]) for name in whole.inputs)
    with pytest.raises(ConfigError, match=r"data.public_fraction: client \d has no sample"):
        Holdings.load(experiment(public=0.97))


def test_who_has_what_is_nested_in_the_rate() -> None:
    absent = [~draw(rate, 10_000, 3, [5]) for rate in (0.2, 0.3, 0.5)]
    assert (absent[0] <= absent[1]).all() and (absent[1] <= absent[2]).all()
    assert not any(cells.all(1).any() for cells in absent)
    # One in (rate ** 3) rows would have had nothing, and keeps one cell.
    for rate, cells in zip((0.2, 0.3, 0.5), absent, strict=True):
        assert cells.mean() == pytest.approx(rate - rate**3 / 3, abs=0.01)


# -- losses ------------------------------------------------------------------------------------


def test_a_devices_first_public_step_is_equation_11_by_hand() -> None:
    """Cross-entropy, and the volume contrast with what the server makes of the same samples."""
    chosen = experiment(mlecs={"dropout": 0.0})
    method, holdings = in_one_process(chosen), Holdings.load(chosen)
    device, large = devices_of(method)[0], method.cloud.large
    _, rows, batch = next(iter(device.public.part(0, 1)))
    assert rows != list(range(len(rows)))
    model = copy.deepcopy(device.model)
    read = model.read(model.encode(batch.inputs))
    logits = model.answers(model.prompt(read.fused_bs), batch.labels)
    whole = holdings.splits.train.fetch(holdings.public.train[rows].tolist())
    anchors_bs = large.read(large.encode(whole.inputs)).fused_bs.detach()
    said = functional.cross_entropy(logits[:, 0], batch.labels)
    by_hand = said + model.contrast(anchors_bs, read.modalities_bmh)
    assert by_hand.item() - said.item() > 0.1
    losses = []
    step = device._step
    device._step = lambda round_, at, loss: losses.append(loss.item()) or step(round_, at, loss)
    device.train_round(0, method.cloud.fused_table(), method.cloud.shared)
    assert losses[0] == pytest.approx(by_hand.item(), rel=1e-12)


def test_the_servers_steps_are_equations_15_and_16_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model's cross-entropy and divergence from the other; the large one's contrast of a
    modality, drawn for the step, with all others.
    """
    method = in_one_process(experiment(mlecs={"dropout": 0.0}))
    rounds(method, 2)  # the two begin alike
    large, small = method.cloud.large, method.cloud.small
    found: list[tuple[Any, float]] = []
    monkeypatch.setattr(
        cloud, "step_on", lambda loss, stepper, _: found.append((stepper, loss.item()))
    )
    (_, _, batch) = next(iter(method.cloud.public.part(0, 1)))
    read = large.read(large.encode(batch.inputs))
    large_bk = large.answers(large.prompt(read.fused_bs), batch.labels)[:, 0]
    small_bk = small.answers(small.prompt(read.fused_bs), batch.labels)[:, 0]

    def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        logs = [functional.log_softmax(x, dim=1) for x in (student, teacher)]
        return functional.kl_div(*logs, log_target=True, reduction="batchmean")  # the pool has all

    assert divergence(large_bk, small_bk) > 1e-6
    method.cloud._step(0, batch)
    said = functional.cross_entropy(small_bk, batch.labels)
    assert found[0][0] is method.cloud.small_stepper
    assert found[0][1] == pytest.approx((said + divergence(small_bk, large_bk)).item(), 1e-12)
    said = functional.cross_entropy(large_bk, batch.labels)
    apart = large.contrast(read.modalities_bmh[:, 0], read.modalities_bmh[:, 1:])  # as 1 with 0
    by_hand = said + apart + divergence(large_bk, small_bk)
    assert found[1][0] is method.cloud.large_stepper
    assert found[1][1] == pytest.approx(by_hand.item(), rel=1e-12)


def test_the_servers_contrast_is_of_a_modality_that_is_drawn_with_all_others() -> None:
    method = in_one_process(experiment())
    draws = torch.Generator().manual_seed(0)
    modalities_bmh = torch.randn(4, 3, 8, dtype=torch.float64, generator=draws)
    found, drawn = [], []
    for place in range(20):
        found.append(method.cloud._contrast(place, modalities_bmh).item())
        own = int(np.random.default_rng([method.experiment.seed, place, 4]).integers(3))
        others = modalities_bmh[:, [m for m in range(3) if m != own]]
        drawn.append(method.cloud.large.contrast(modalities_bmh[:, own], others).item())
    assert found == drawn
    assert len(set(found)) == 3


@pytest.mark.parametrize("part", ["contrast", "transfer"])
def test_contrast_and_transfer_are_trained_by_server_and_contrast_by_devices(part: str) -> None:
    def trained(**on: bool) -> tuple[Any, ...]:
        rules = {"contrast": False, "transfer": False, "dropout": 0} | on
        method = in_one_process(experiment(mlecs=rules))
        method.cloud.enhance(0, method.cloud.shared)
        large, small = trainable_state(method.cloud.large), trainable_state(method.cloud.small)
        table = method.cloud.fused_table() if on.get("contrast") else None
        device = devices_of(method)[0]
        device.train_round(0, table, shared_state(device.model, "lora"))
        return large, small, trainable_state(device.model)

    moved = []
    for ours, plain in zip(trained(**{part: True}), trained(), strict=True):
        moved.append(any(not torch.equal(ours[key], plain[key]) for key in plain))
    assert moved == {"contrast": [True, False, True], "transfer": [True, True, False]}[part]


def test_a_stream_meets_every_sample_once_an_epoch_and_orders_them_anew() -> None:
    data = Holdings.load(experiment()).of(0)[0]
    per_epoch = -(-len(data) // 4)
    parts = [list(Stream(data, 4).part(number, 2)) for number in range(per_epoch)]
    told = [positions for part in parts for _, positions, _ in part]
    first, second = np.concatenate(told).reshape(2, -1).tolist()
    assert sorted(first) == sorted(second) == list(range(len(data)))
    assert first != second
    whole = [positions for _, positions, _ in Stream(data, 4).part(0, 2 * per_epoch)]
    assert whole == told


def test_a_lost_device_is_left_out_of_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = PRIVATE | {"aggregate": "uniform"}
    chosen = experiment(public=0, mlecs=rules)
    method, other = in_one_process(chosen), in_one_process(chosen)
    updates = [
        device.train_round(0, None, other.cloud.shared) for device in devices_of(other).values()
    ]

    def fails(*words: Any) -> None:
        raise RuntimeError("gone")

    monkeypatch.setattr(devices_of(method)[1], "train_round", fails)
    assert method.step(0, 0) == pytest.approx((updates[0].loss + updates[2].loss) / 2)
    assert method.clients.lost == {1}
    for key, value in method.cloud.shared.items():
        by_hand = (updates[0].weights[key] + updates[2].weights[key]) / 2
        torch.testing.assert_close(value, by_hand, rtol=1e-14, atol=0)
    method.step(0, 1)


def test_a_device_that_comes_back_goes_on_from_what_it_kept(tmp_path: Path) -> None:
    chosen = experiment()
    method, whole = in_one_process(chosen), in_one_process(chosen)
    for one in (method, whole):
        rounds(one, 1)
    method.clients.keep(str(tmp_path / "clients"), "step 1")
    holdings = Holdings.load(chosen)
    fleet = method.clients.fleet
    fleet.rebuild = lambda numbers: build_devices(chosen, numbers, holdings)
    method.clients.lost, fleet.back = {2}, [2]
    method.welcome(method.clients.readmit("step 1"))
    for one in (method, whole):
        rounds(one, 1, 1)
    assert_same(states(method), states(whole))


@pytest.mark.parametrize("row", [{}, CO_PLMS], ids=["ml-ecs", "co-plms"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    pytest.importorskip("peft", reason="mpsl_dist[lm] is not installed")
    rules = {"dropout": 0.5, "lora_dropout": 0.5} | row
    chosen = experiment("tiny", mlecs=rules, data={"missing": {"rate": 0.5}})
    whole, first = in_one_process(chosen), in_one_process(chosen)
    rounds(whole, 3)
    rounds(first, 1)
    folder = str(tmp_path / "step-1")
    files = first.save(folder)
    second = in_one_process(chosen)
    assert second.damage(folder, files) is None
    torch.manual_seed(123)  # nothing may rest on torch's own generator
    second.restore(folder, files)
    assert second.evaluate() == first.evaluate()
    rounds(second, 2, 1)
    assert_same(states(whole), states(second))
    assert whole.evaluate() == second.evaluate()


def test_scores_are_the_mean_of_devices_each_with_its_own_and_the_servers() -> None:
    chosen = experiment(data={"test_at": "clients"})
    method = in_one_process(chosen)
    assert sum(method.read_tests()) == 30
    found = method.evaluate()
    for name in ("accuracy", "f1"):
        each = [found[f"{name}_{n}"] for n in range(3)]
        assert found[name] == pytest.approx(sum(each) / 3)
        assert 0 <= found[f"server_{name}"] <= 1
    assert "accuracy_0" not in in_one_process(experiment()).evaluate()


def test_macro_f1_is_the_mean_over_classes_of_a_devices_own_test_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = experiment(data={"test_at": "clients"})
    device = devices_of(in_one_process(chosen))[0]
    labels = torch.cat([batch.labels for batch in device.tests.batches(100)])
    # Everything is the first class: its precision is its share, its recall is 1.
    monkeypatch.setattr(
        type(device.model), "scores", lambda _, inputs: torch.eye(3)[[0] * len(inputs["image"])]
    )
    scores, samples = device.test(shared_state(device.model, "lora"), 4)
    share = (labels == 0).double().mean().item()
    assert scores["accuracy"] == share and samples == len(labels) and 0 < share < 1
    assert scores["f1"] == pytest.approx(2 * share / (1 + share) / len(labels.unique()))


@pytest.mark.parametrize(
    "rules, told",
    [({}, True), (CO_PLMS, True), ({"ranks": [1, 2, 2]}, False), ({"exchange": "all"}, False)],
    ids=["ml-ecs", "co-plms", "ranks", "all"],
)
def test_how_far_averages_are_apart_is_told_of_factors_of_one_shape(
    rules: dict[str, Any], told: bool
) -> None:
    pytest.importorskip("peft", reason="mpsl_dist[lm] is not installed")
    method = in_one_process(experiment("tiny", mlecs={"transfer": "exchange" not in rules} | rules))
    rounds(method, 1)
    scores = method.evaluate()
    assert ("product_gap" in scores) == told
    assert scores.get("product_gap", 1) > 0


def test_a_server_without_steps_has_no_model_and_no_score() -> None:
    method = in_one_process(experiment(public=0, mlecs=PRIVATE))
    rounds(method, 1)
    assert method.deployable() is None
    assert not [name for name in method.evaluate() if name.startswith("server")]


def test_a_table_that_no_device_uses_is_not_sent() -> None:
    method = in_one_process(experiment(mlecs={"public_steps": 0}))
    rounds(method, 1)
    assert set(method.traffic.by_kind()) == {"lora_down", "lora_up"}


def test_the_model_of_a_run_is_the_servers_large_one(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="mpsl_dist[lm] is not installed")
    chosen = experiment("tiny", data={"missing": {"rate": 0.5}})
    method = in_one_process(chosen)
    rounds(method, 1)
    splits = Holdings.load(chosen).splits
    method.deployable().save(tmp_path, chosen, splits)
    model = predictor.load(tmp_path)
    tests = splits.test.fetch(range(30))
    logits = model(tests.inputs)
    assert torch.equal(logits, method.cloud.large.scores(tests.inputs))
    named = [one.label for one in model.predict(**tests.inputs)]
    right = [toys.CLASSES[k] == name for k, name in zip(tests.labels, named, strict=True)]
    assert method.evaluate()["server_accuracy"] == sum(right) / 30 < 1
    with pytest.raises(DataError, match="audio"):
        model.predict(image=tests.inputs["image"])


@pytest.mark.parametrize("answer", ["label", "head"])
def test_autocast_computes_language_models_in_bfloat16_and_nothing_else(answer: str) -> None:
    pytest.importorskip("peft", reason="mpsl_dist[lm] is not installed")

    def trained(autocast: str | None) -> tuple[Mlecs, float, dict[str, float]]:
        training = {"precision": "float32", "autocast": autocast}
        method = in_one_process(experiment("tiny", mlecs={"answer": answer}, training=training))
        for model in (method.cloud.large, *(d.model for d in devices_of(method).values())):
            for part in (model.answers.language.model.layers[0].mlp, model.generator):
                part.register_forward_hook(lambda *at: seen.add((type(at[0]), at[2].dtype)))
        return method, method.step(0, 0), method.evaluate()

    seen: set[tuple[type, torch.dtype]] = set()
    plain, loss, _ = trained(None)
    assert {dtype for _, dtype in seen} == {torch.float32}
    seen.clear()
    rough, rough_loss, scores = trained("bf16")
    parts = {type(rough.cloud.large.answers.language.model.layers[0].mlp): torch.bfloat16}
    assert dict(seen) == parts | {type(rough.cloud.large.generator): torch.float32}
    assert rough_loss != loss
    assert rough_loss == pytest.approx(loss, rel=2e-2)
    assert {x.dtype for state in states(rough) for x in state.values()} == {torch.float32}
    assert scores.keys() == plain.evaluate().keys()


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"public": 0}, "mlecs.contrast: needs public samples"),
        ({"mlecs": {"answer": "label"}}, "mlecs.answer: without a language model"),
        ({"mlecs": {"exchange": "none"}}, "mlecs.transfer: with mlecs.exchange=lora alone"),
        ({"language": "tiny", "mlecs": {"ranks": [1, 1, 1]}}, "mlecs.ranks: one for each"),
        ({"mlecs": {"exchange": "proxy"}}, "mlecs.exchange: proxy is of the blocks"),
        (
            {"language": "tiny", "mlecs": {"exchange": "proxy", "proxy_blocks": 2}},
            "mlecs.proxy_blocks: at most mlecs.edge_blocks=1",
        ),
        (
            {"language": "tiny", "mlecs": {"exchange": "proxy", "public_steps": 0}},
            "mlecs.public_steps: a proxy learns",
        ),
        (
            {"language": "tiny", "mlecs": {"exchange": "proxy", "proximal": 0.1}},
            "mlecs.proximal: with mlecs.exchange=lora alone",
        ),
        (
            {"training": {"autocast": "bf16", "precision": "float32"}},
            "training.autocast: mlecs.language=none",
        ),
        ({"mlecs": {"width": 6}}, "mlecs.width: must be a multiple of 4"),
        ({"language": "tiny", "mlecs": {"width": 12}}, "mlecs.width: must be a multiple of 8"),
        (
            {"language": "smollm2", "mlecs": {"edge_blocks": 31}},
            "mlecs.edge_blocks: SmolLM2 has 30",
        ),
        ({"mlecs": PRIVATE}, "data.test_at: server, whose model has no steps"),
        (
            {"data": {"missing": {"rate": 0.5, "at_test": True}}},
            "data.missing.at_test: the server's model has every modality",
        ),
        ({"public": 0.004}, "data.public_fraction: 0.004 of 90 training samples is less than one"),
        ({"data": {"name": "toy-gaps"}}, "data.name: samples of toy-gaps lack parts"),
        (
            {"public": 0, "mlecs": PRIVATE, "data": {"name": "toy-gaps"}},
            "data.name: samples of toy-gaps lack parts",
        ),
        ({"data": {"missing": {"rate": 0.5, "per": "sample"}}}, "data.missing.per: mlecs"),
    ],
)
def test_what_cannot_be_had_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        found = experiment(**changes)
        holdings = Holdings.load(found)
        check_missing(found, holdings.splits)
        mlecs.build_cloud(found, holdings)
