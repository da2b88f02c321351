"""M²FedSA, proven by the ten tests of its specification; all in one process, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from local_fleet import steps_of, users_in_one_process
from torch import Tensor, nn
from torch.nn import functional

from mpsl_dist.__main__ import main
from mpsl_dist.actors import deployable
from mpsl_dist.actors.halves import build_lower, build_upper
from mpsl_dist.actors.holdings import Holdings, load_data
from mpsl_dist.actors.host import Host
from mpsl_dist.actors.part_checks import refusals_with_data
from mpsl_dist.actors.transfer_switch import TransferSwitch
from mpsl_dist.actors.unimodal_client import build_clients
from mpsl_dist.analysis import cost, flops, traffic_model
from mpsl_dist.analysis.cost_inputs import inputs_of
from mpsl_dist.config import Experiment, from_dict, to_dict
from mpsl_dist.config.m2fedsa import Switch
from mpsl_dist.data.partition import epoch_order, partition, shares
from mpsl_dist.errors import ConfigError
from mpsl_dist.methods import loop
from mpsl_dist.methods.m2fedsa import M2FedSA
from mpsl_dist.models.adapters import BottleneckAdapter
from mpsl_dist.models.average import average
from mpsl_dist.models.halves import Adapted, Fusion, UpperHalf
from mpsl_dist.models.pretrained import PARTS
from mpsl_dist.models.transfer import Transfer, divergence, features_apart
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.runtime.process import StopRequest

#: Steps of an epoch of the toys.
EPOCH = 5
NAMES = ("image", "audio")
OWN = {"adapter_rank": 4, "switch": {"rule": "never"}}


def experiment(users: int = 2, **changes: Any) -> Experiment:
    own = OWN | changes.pop("m2fedsa", {})
    training = {"precision": "float64"} | changes.pop("training", {})
    data = {"name": "toy-image+audio", "partition": {"alpha": 0.5, "minimum": 20}}
    data |= changes.pop("data", {})
    return toys.experiment(
        method="m2fedsa",
        clients=2 * users,
        clients_per_worker=2,
        m2fedsa=own,
        data=data,
        training=to_dict(toys.experiment())["training"] | training,
        **changes,
    )


def clients_of(method: M2FedSA) -> dict[int, Any]:
    return method.clients.fleet.host.clients


def states(method: M2FedSA) -> dict[int, dict[str, Tensor]]:
    return {n: client.tokenizer_weights() for n, client in clients_of(method).items()}


def assert_close(ours: Mapping[Any, Tensor], theirs: Mapping[Any, Tensor], by: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(
            ours[key], value, rtol=by, atol=by, msg=lambda m, k=key: f"{k}{m}"
        )


def assert_equal(ours: Mapping[Any, Tensor], theirs: Mapping[Any, Tensor]) -> None:
    assert_close(ours, theirs, 0)


class Plain:
    """The method in one process: one graph of plain torch modules, plain optimizers, no actors."""

    def __init__(self, chosen: Experiment) -> None:
        torch.set_num_threads(1)
        self.chosen, self.splits = chosen, load_data(chosen)
        users, rule = chosen.clients // 2, chosen.data.partition
        labels, seed = self.splits.train.labels, chosen.seed
        self.parts = partition(labels, users, rule.kind, rule.alpha, rule.minimum, seed)
        self.sizes = [len(part) for part in self.parts]
        self.plan = shares(self.sizes, chosen.training.batch_size, chosen.client_share)
        self.names = list(self.splits.shapes)
        self.lowers = [
            build_lower(chosen, self.splits, [name]) for _ in self.parts for name in self.names
        ]
        self.upper = build_upper(chosen, self.splits)
        self.optimizers = [self._adamw(part) for part in (*self.lowers, self.upper)]
        self.on = False
        self.told: dict[str, list[Any]] = {"losses": [], "cut": [], "features": []}

    def _adamw(self, part: nn.Module) -> torch.optim.Optimizer:
        trained = [p for p in part.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)

    def _rows(self, user: int, step: int) -> Any:
        epoch, at = divmod(step, len(self.plan))
        start, count = self.plan[:at, user].sum(), self.plan[at, user]
        order = epoch_order(self.sizes[user], self.chosen.seed, user, epoch)
        return self.splits.train.fetch(self.parts[user][order][start : start + count].tolist())

    def loss_of(self, user: int, step: int, cut: dict, returned: dict) -> Tensor:
        """A user's loss; keeps what crosses the cut, and what comes back."""
        batch, total = self._rows(user, step), 0.0
        for place, name in enumerate(self.names):
            n = 2 * user + place
            x = batch.inputs[name]
            x = x.double() if x.is_floating_point() else x
            cut[n] = self.lowers[n].by_modality[name](x)
            returned[n] = self.upper.encoders[name](cut[n])
            cut[n].retain_grad()
            returned[n].retain_grad()
        own = [returned[2 * user + place] for place in range(2)]
        fused_bk, fused_bd = self.upper.fusion([x.detach() for x in own])
        of_fusion = functional.cross_entropy(fused_bk, batch.labels)
        for place, feature_bd in enumerate(own):
            logits_bk = self.lowers[2 * user + place].head(feature_bd)
            ce = functional.cross_entropy(logits_bk, batch.labels)
            if self.on:
                p_bk, q_bk = logits_bk.softmax(1), fused_bk.detach().softmax(1)
                apart = (p_bk * (p_bk / q_bk).log()).sum(1).mean()
                weaker = ce.detach() + of_fusion.detach()
                cosine_b = nn.CosineSimilarity()(feature_bd, fused_bd.detach())
                labels = 0.6 * (ce + of_fusion.detach() / 2)
                total = total + labels + 0.2 * apart / weaker + 0.2 * (1 - cosine_b).mean()
            else:
                total = total + ce
        return total if self.on else total + of_fusion

    def step(self, step: int) -> None:
        cut, returned, counts = {}, {}, self.plan[step % len(self.plan)]
        losses = [
            self.loss_of(u, step, cut, returned) * (int(n) / int(counts.sum()))
            for u, n in enumerate(counts)
        ]
        for part in (*self.lowers, self.upper):
            part.zero_grad()
        sum(losses).backward()
        self.told["losses"].append(sum(losses).item())
        self.told["cut"].append({n: x.grad for n, x in cut.items()})
        self.told["features"].append({n: x.grad for n, x in returned.items()})
        for optimizer in self.optimizers:
            optimizer.step()
        if (step + 1) % len(self.plan) == 0:
            self.meet()

    @torch.no_grad()
    def meet(self) -> None:
        weights = torch.tensor(self.sizes, dtype=torch.float64)
        for place in range(2):
            same = [dict(low.named_parameters()) for low in self.lowers[place::2]]
            for name in same[0]:
                mean = sum(w * own[name] for w, own in zip(weights, same, strict=True))
                for own in same:
                    own[name].copy_(mean / weights.sum())
        if self.chosen.m2fedsa.across:
            layers = [half.body.adapter.update for half in self.upper.encoders.values()]
            for name, _ in layers[0].named_parameters():
                mean = sum(layer.get_parameter(name) for layer in layers) / len(layers)
                for layer in layers:
                    layer.get_parameter(name).copy_(mean)


def watch(method: M2FedSA) -> dict[str, list[dict[int, Tensor]]]:
    """Keep the gradients of what crosses, by client, of every step."""
    told: dict[str, list[dict[int, Tensor]]] = {"cut": [], "features": []}
    forward = method.server.forward

    def watching(smashed: Mapping[int, Sequence[Tensor]], *words: Any) -> dict[int, Tensor]:
        features = forward(smashed, *words)
        for name, tensors in (
            ("cut", {n: x for n, (x,) in smashed.items()}),
            ("features", features),
        ):
            told[name].append(kept := {})
            for n, x in tensors.items():
                x.register_hook(lambda g, n=n, kept=kept: kept.update({n: g.clone()}))
        return features

    method.server.forward = watching
    return told


# -- 1 and 2: one process, one graph ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("users", "changes"),
    [
        (1, {}),
        (1, {"m2fedsa": {"frozen": False, "adapter_form": "plain"}}),
        (3, {"m2fedsa": {"switch": {"rule": "round", "round": 1}}}),
        (2, {"data": {"name": "toy-image+text"}, "m2fedsa": {"adapter_form": "parallel"}}),
    ],
    ids=["one user", "whole encoders", "transfer", "texts"],
)
def test_training_equals_one_process_with_one_graph(users: int, changes: dict) -> None:
    chosen = experiment(users, **changes)
    method, plain = users_in_one_process(chosen), Plain(chosen)
    told = watch(method)
    for step in range(EPOCH + 2):
        plain.on = step >= EPOCH and chosen.m2fedsa.switch.rule == "round"
        plain.step(step)
    losses = steps_of(method, EPOCH + 2)
    assert losses == pytest.approx(plain.told["losses"], rel=1e-9)
    for step in range(EPOCH + 2):
        for name in ("cut", "features"):
            assert_close(told[name][step], plain.told[name][step], 1e-9)
    assert_close(
        dict(method.server.model.named_parameters()), dict(plain.upper.named_parameters()), 1e-9
    )
    for n, state in states(method).items():
        trained = {k: p for k, p in plain.lowers[n].named_parameters() if p.requires_grad}
        assert_close(state, {k: p.detach() for k, p in trained.items()}, 1e-9)


def test_the_task_adapters_gradient_is_the_users_sum_weighted_by_their_samples() -> None:
    chosen = experiment(3, m2fedsa={"within": "never", "across": False})
    method, plain, met = users_in_one_process(chosen), Plain(chosen), {}
    kept = method.server.step
    method.server.step = lambda number, gradients: (met.update(gradients), kept(number, gradients))
    steps_of(method, 1)
    names = {p: name for name, p in method.server.model.named_parameters()}
    ours = {names[p]: g for p, g in met.items() if p in names and ".adapter." in names[p]}
    counts, expected = plain.plan[0], {name: 0 for name in ours}
    for user, count in enumerate(counts):
        plain.upper.zero_grad()
        plain.loss_of(user, 0, {}, {}).backward()
        for name in ours:
            own = plain.upper.get_parameter(name).grad
            expected[name] = expected[name] + own * (int(count) / int(counts.sum()))
    assert len(set(counts.tolist())) > 1
    assert any(bool(g.any()) for g in ours.values())
    assert_close(ours, expected, 1e-12)


def test_users_one_after_another_train_the_server_in_turn() -> None:
    chosen = experiment(2, m2fedsa={"order": "sequential"})
    method, plain = users_in_one_process(chosen), Plain(chosen)
    losses = steps_of(method, 2)
    for step in range(2):
        told = []
        for user in range(2):
            for part in (*plain.lowers, plain.upper):
                part.zero_grad()
            loss = plain.loss_of(user, step, {}, {})
            loss.backward()
            told.append(loss.item() * int(plain.plan[step, user]) / int(plain.plan[step].sum()))
            for n in (2 * user, 2 * user + 1, -1):
                plain.optimizers[n].step()
        assert losses[step] == pytest.approx(sum(told), rel=1e-9)
    assert_close(
        dict(method.server.model.named_parameters()), dict(plain.upper.named_parameters()), 1e-9
    )


# -- 3 and 4: the cut and the adapters -------------------------------------------------------------


def test_where_the_encoder_is_cut_changes_no_loss_and_no_gradient() -> None:
    found = []
    for cut in range(3):
        plain = Plain(experiment(1, m2fedsa={"cut_block": cut}))
        torch.manual_seed(3)
        for adapter in plain.upper.adapters():
            nn.init.normal_(adapter.up.weight)
        loss = plain.loss_of(0, 0, {}, {})
        loss.backward()
        server = {k: p.grad for k, p in plain.upper.named_parameters() if p.grad is not None}
        server = {k: g for k, g in server.items() if ".adapter." in k or "fusion" in k}
        heads = {
            f"{n}{k}": p.grad
            for n, low in enumerate(plain.lowers)
            for k, p in low.head.named_parameters()
        }
        found.append({"loss": loss.detach()} | server | heads)
    assert len(found[0]) > 12
    for other in found[1:]:
        assert_close(other, found[0], 1e-12)


@pytest.mark.parametrize("form", ["residual", "parallel", "plain"])
def test_an_adapter_begins_as_if_it_were_not_there_but_for_the_released_form(form: str) -> None:
    chosen = experiment(1, m2fedsa={"adapter_form": form})
    splits = load_data(chosen)
    lower, upper = build_lower(chosen, splits), build_upper(chosen, splits)
    for name in NAMES:
        x = splits.test.inputs[name].double()
        body = upper.encoders[name].body
        adapted = upper.encoders[name](lower.by_modality[name](x))
        bare = body.blocks(lower.by_modality[name].blocks(x))[:, 0]
        assert torch.equal(adapted, bare) == (form != "plain"), name


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "cuts"), [("minilm", (0, 4, 6)), ("efficientnet-lite0", (0, 3, 7))]
)
def test_pretrained_parts_are_cut_anywhere_and_empty_places_stay_empty(
    name: str, cuts: tuple[int, ...]
) -> None:
    part, found = PARTS[name].build(), []
    texts = torch.tensor([[101, 7592, 102, 0, 0], [101, 2088, 2003, 2307, 102]])
    x = texts if name == "minilm" else random(2, 3, 8, 8).float()
    for cut in cuts:
        low, (*blocks, end) = part.low(cut), part.high(cut)
        width = low(x).shape[1 if x.dim() == 4 else -1]
        lower = Adapted(low, BottleneckAdapter(width, 4, added=True), "residual")
        body = Adapted(nn.Sequential(*blocks), BottleneckAdapter(part.width, 4, True), "residual")
        found.append(UpperHalf(body, end, "mean", nn.Identity())(lower(x)))
        nn.init.normal_(lower.adapter.up.bias)
        moved = lower(x) != low(x)
        assert moved.any() and (name != "minilm" or not moved[0, 3:].any())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


# -- 5: averages -----------------------------------------------------------------------------------


def one_round(method: M2FedSA) -> tuple[dict, dict, list[dict]]:
    """Train a round; gives the uploads, what clients have then, and task adapters before."""
    uploaded, before, link = {}, [], method.clients
    fetch, end = link.tokenizer_weights, method.server.end_round

    def fetching(*words: Any, **more: Any) -> Any:
        sent = fetch(*words, **more)
        uploaded.update(sent)
        return sent

    def ending() -> None:
        adapters = method.server.model.adapters()
        before.extend({k: p.detach().clone() for k, p in a.named_parameters()} for a in adapters)
        end()

    link.tokenizer_weights, method.server.end_round = fetching, ending
    steps_of(method, EPOCH)
    return uploaded, states(method), before


@pytest.mark.parametrize("within", ["samples", "uniform"])
def test_a_round_ends_with_the_average_of_each_modalitys_clients(within: str) -> None:
    method = users_in_one_process(experiment(3, m2fedsa={"within": within}))
    uploaded, after, before = one_round(method)
    for place, name in enumerate(NAMES):
        clients = range(place, 6, 2)
        weights = [method.sizes[n] if within == "samples" else 1 for n in clients]
        mean = average([uploaded[n] for n in clients], weights)
        assert {key.split("by_modality.")[1].split(".")[0] for key in mean} == {name}
        assert not torch.equal(
            *[uploaded[n][f"head.by_modality.{name}.weight"] for n in clients][:2]
        )
        for n in clients:
            assert_close(after[n], mean, 1e-15)
            assert_equal(after[n], after[place])
    first, second = method.server.model.adapters()
    for layer in ("down", "up"):
        for adapter, own in zip((first, second), before, strict=True):
            for key, p in getattr(adapter, layer).named_parameters(prefix=layer):
                assert torch.equal(p, own[key])
    for key, p in first.update.named_parameters(prefix="update"):
        assert torch.equal(p, second.get_parameter(key))
        torch.testing.assert_close(
            p.detach(), (before[0][key] + before[1][key]) / 2, rtol=0, atol=1e-16
        )
        assert not torch.equal(before[0][key], before[1][key])


def test_the_average_of_one_user_is_its_own_and_never_leaves_all_as_they_are() -> None:
    uploaded, after, _ = one_round(users_in_one_process(experiment(1)))
    for n in uploaded:
        assert_close(after[n], uploaded[n], 1e-15)
    method = users_in_one_process(experiment(2, m2fedsa={"within": "never", "across": False}))
    uploaded, after, before = one_round(method)
    assert not uploaded
    assert not torch.equal(*[after[n]["head.by_modality.image.weight"] for n in (0, 2)])
    for adapter, own in zip(method.server.model.adapters(), before, strict=True):
        assert_equal({k: p.detach() for k, p in adapter.named_parameters()}, own)


# -- 6: what is transferred ------------------------------------------------------------------------


def random(*shape: int) -> Tensor:
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(shape[-1])
    )


@pytest.mark.parametrize("direction", ["uni_multi", "multi_uni"])
@pytest.mark.parametrize("over", ["mean", "sum"])
def test_the_decisions_distance_is_a_divergence(direction: str, over: str) -> None:
    uni, multi = random(6, 4).requires_grad_(), random(6, 4).flip(0)
    found = divergence(uni, multi, direction, over)
    p, q = (x.softmax(1) for x in ((uni, multi) if direction == "uni_multi" else (multi, uni)))
    by_hand = (p * (p / q).log()).sum() / (6 if over == "mean" else 1)
    torch.testing.assert_close(found, by_hand)
    assert found > 0.1
    assert divergence(multi, multi, direction, over) == 0
    torch.testing.assert_close(divergence(uni + 7, multi - 2, direction, over), found)
    assert torch.autograd.gradcheck(lambda x: divergence(x, multi, direction, over), uni)


def test_features_are_apart_by_their_angle_alone() -> None:
    one, other = random(6, 5).requires_grad_(), random(6, 5).flip(0)
    found = features_apart(one, other)
    assert 0 < found < 2
    torch.testing.assert_close(features_apart(one * 3, other * 0.1), found)
    assert features_apart(one, 2 * one).item() == pytest.approx(0, abs=1e-12)
    assert features_apart(one, -one).item() == pytest.approx(2)
    assert torch.autograd.gradcheck(lambda x: features_apart(x, other), one)


def gradient(transfer: Transfer | None) -> Tensor:
    feature, head = random(6, 5).requires_grad_(), random(5, 3)
    logits, labels = feature @ head, torch.tensor([0, 1, 2, 0, 1, 2])
    own, fused = functional.cross_entropy(logits, labels), torch.tensor(0.7, dtype=torch.float64)
    if transfer is not None:
        own = transfer.loss(own, fused, (logits, random(6, 3)), (feature, random(6, 5).flip(0)))
    return torch.autograd.grad(own, feature)[0]


def test_without_weights_for_what_is_transferred_the_gradient_is_that_of_before() -> None:
    assert torch.equal(gradient(Transfer((1.0, 0.0, 0.0))), gradient(None))
    own, paper = (Transfer((0.6, 0.2, 0.2), paper_denominator=x) for x in (False, True))
    assert not torch.allclose(gradient(own), gradient(paper))


def test_good_predictions_do_not_make_the_transfer_weigh_without_end() -> None:
    uni, multi, tiny = random(6, 3), random(6, 3).flip(0), torch.tensor(1e-3, dtype=torch.float64)
    found = divergence(uni, multi, "uni_multi", "mean")
    bound, released = Transfer((1.0, 1.0, 1.0), least=1.0), Transfer((1.0, 1.0, 1.0))
    assert bound.decisions(tiny, tiny, uni, multi) == found
    torch.testing.assert_close(released.decisions(tiny, tiny, uni, multi), found / 2e-3)
    worse = torch.tensor(2.0, dtype=torch.float64)
    torch.testing.assert_close(bound.decisions(worse, worse, uni, multi), found / 4)


# -- 7: the switch ---------------------------------------------------------------------------------


def fired(rule: Switch, losses: Sequence[float]) -> list[bool]:
    switch, found = TransferSwitch(rule), []
    for loss in losses:
        switch.add(loss + 1, 1)  # 1 and 3 samples with this mean
        switch.add(loss - 1 / 3, 3)
        switch.end_round()
        found.append(switch.on)
    return found


def test_the_switch_turns_at_the_first_round_whose_last_differences_are_alike() -> None:
    # Differences of 5, 1, 1, 1, 9: alike once three in a row are 1, at the fifth loss.
    losses = [10.0, 5.0, 4.0, 5.0, 4.0, 13.0]
    rule = Switch("plateau", window=3, cv=0.3)
    assert fired(rule, losses) == [False, False, False, False, True, True]
    assert fired(Switch("plateau", window=3, cv=1.0), losses) == [False] * 3 + [True] * 3
    assert fired(rule, [2.0] * 4) == [False] * 3 + [True]
    assert fired(Switch("round", round=2), losses) == [False, True, True, True, True, True]
    assert fired(Switch("never"), losses) == [False] * 6
    assert TransferSwitch(Switch("round")).on


def test_the_fusion_is_trained_until_the_switch_and_frozen_to_the_bit_after_it() -> None:
    method = users_in_one_process(experiment(2, m2fedsa={"switch": {"rule": "round", "round": 1}}))
    fusion = method.server.model.fusion
    seen = [{k: p.detach().clone() for k, p in fusion.named_parameters()}]
    for epoch in range(2):
        method.begin_epoch(epoch)
        for step in range(EPOCH):
            method.step(step, epoch * EPOCH + step)
        seen.append({k: p.detach().clone() for k, p in fusion.named_parameters()})
    assert all(not torch.equal(seen[0][k], seen[1][k]) for k in seen[0] if "bias" not in k)
    assert_equal(seen[2], seen[1])


def run(chosen: Experiment, resume: bool = False) -> Path:
    directory = RunDirectory(chosen.run_directory)
    directory.open(to_dict(chosen), resume, False)
    method = users_in_one_process(chosen)
    loop.train(chosen, method.splits, method, directory, StopRequest())
    return chosen.run_directory


def test_a_run_that_goes_on_across_the_switch_is_the_same_to_the_bit_and_can_be_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def of(epochs: int, name: str, **more: Any) -> Experiment:
        rule = {"switch": {"rule": "plateau", "window": 1, "cv": 10.0}}  # after the second round
        training = {"epochs": epochs, "precision": "float32"}
        return experiment(name=name, output=str(tmp_path), m2fedsa=rule, training=training, **more)

    run(of(2, "parts", checkpoint={"every_steps": 3}))
    parts, whole = run(of(4, "parts"), resume=True), run(of(4, "whole"))
    model = [folder / "model" / "model.safetensors" for folder in (parts, whole)]
    assert model[0].read_bytes() == model[1].read_bytes()
    other = run(of(4, "never", data={"test_at": "clients"}))
    assert users_in_one_process(of(4, "whole")).server.switch.on is False
    capsys.readouterr()
    assert main(["evaluate", str(whole)]) == 0
    said = capsys.readouterr().out
    for name in ("accuracy", "accuracy_image", "accuracy_audio", "accuracy_fused"):
        assert f"\n{name} 0." in said
    loaded, _, _ = deployable.load(other / "model")
    x = load_data(of(4, "whole")).test.inputs
    alone = loaded({"audio": x["audio"]})
    assert torch.equal(alone, loaded.predictions(x)["audio"]) and alone.shape == (30, 3)


# -- 8 and 9: the fusion ---------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["modalities", "batch"])
def test_a_fused_prediction_depends_on_other_samples_in_the_released_form_alone(
    attention: str,
) -> None:
    torch.manual_seed(5)
    fusion = Fusion(2, 8, 2, 3, attention).double()
    one, other = random(6, 8), random(6, 8).flip(0)
    logits, feature = fusion([one, other])
    assert logits.shape == (6, 3) and feature.shape == (6, 8)
    changed = [torch.cat([x[:1], 2 * x[1:].flip(0)]) for x in (one, other)]
    same = torch.allclose(fusion(changed)[0][0], logits[0], rtol=0, atol=1e-12)
    assert same == (attention == "modalities")


@pytest.mark.parametrize(("attention", "modalities"), [("batch", 2), ("modalities", 1)])
def test_who_attends_to_itself_alone_passes_its_value_on(attention: str, modalities: int) -> None:
    torch.manual_seed(5)
    fusion = Fusion(modalities, 8, 2, 3, attention).double()
    features = [random(1, 8), random(1, 8).flip(1)][:modalities]
    value = fusion.attend(torch.cat(features, dim=1))[:, 16:]
    expected = functional.gelu(fusion.reduce(value))
    torch.testing.assert_close(fusion(features)[1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("through", [False, True])
def test_the_fusions_loss_trains_the_task_adapters_only_if_asked_to(through: bool) -> None:
    method = users_in_one_process(experiment(1, m2fedsa={"fusion_trains_task_adapters": through}))
    fuse, asked = method.server.fuse, []

    def fusing(features: Mapping[int, Tensor]) -> Any:
        fused, trained = fuse(features), [*method.server.model.adapters()[0].parameters()]
        options = {"allow_unused": True, "retain_graph": True}
        asked.extend(torch.autograd.grad(fused[0][0].sum(), trained, **options))
        return fused

    method.server.fuse = fusing
    steps_of(method, 1)
    assert asked and all((gradient is not None) == through for gradient in asked)


def test_a_texts_adapter_moves_and_frozen_halves_do_not() -> None:
    method = users_in_one_process(experiment(2, data={"name": "toy-image+text"}))
    first = build_lower(method.experiment, method.splits).state_dict()
    steps_of(method, 2)
    for n, client in clients_of(method).items():
        name = ("image", "text")[n % 2]
        assert list(client.tokenizers.local_value().by_modality) == [name]
        for key, value in client.tokenizers.local_value().state_dict().items():
            moved = not torch.equal(value, first[key])
            assert moved == ("adapter" in key or key.startswith("head")), key


# -- 10: what crosses ------------------------------------------------------------------------------


def widths(method: M2FedSA) -> dict[str, int]:
    """Numbers of what crosses the cut of a sample, by modality."""
    lower, x = method.tokenizers.by_modality, method.splits.test.inputs
    with torch.no_grad():
        return {m: lower[m](x[m][:1].double()).numel() for m in NAMES}


@pytest.mark.parametrize("test_at", ["server", "clients"])
@pytest.mark.parametrize(
    "changes", [{}, {"frozen": False, "within": "never"}], ids=["frozen", "whole, apart"]
)
def test_counted_bytes_are_the_formulas_and_the_computed_ones(test_at: str, changes: dict) -> None:
    chosen = experiment(
        2,
        m2fedsa={"switch": {"rule": "round", "round": 1}} | changes,
        data={"name": "toy-image+audio", "test_at": test_at},
        training={"epochs": 2},
    )
    method = users_in_one_process(chosen)
    steps_of(method, 2 * EPOCH)
    method.evaluate()
    counted, d, k, number = method.traffic.by_kind(), 16, 3, 8
    for n, client in clients_of(method).items():
        samples, a = method.sizes[n], widths(method)[NAMES[n % 2]]
        weights = sum(x.numel() for x in client.tokenizer_weights().values())
        steps = int((method.plan[:, n] > 0).sum())
        # Until the switch the fused logits, and their gradients; then with them the fused feature.
        expected = {
            "activations": 2 * samples * a,
            "cut_layer_gradients": 2 * samples * a,
            "predictions": samples * (2 * d + 2 * k + d),
            "prediction_gradients": samples * (2 * d + k),
            "losses": 2 * 2 * steps,
            "loss_gradients": 2 * 2 * steps,
            "sync_up": 2 * weights * (chosen.m2fedsa.within != "never"),
            "sync_down": 2 * weights * (chosen.m2fedsa.within != "never"),
        }
        for kind, numbers in expected.items():
            assert counted.get(kind, [0] * 4)[n] == numbers * number, (kind, n)
    parts = flops.build(chosen, inputs_of(chosen))
    held = Holdings.load(chosen).tests
    sizes = np.array([len(part) for part in held])
    sent = traffic_model.training(parts, method.plan, 2) | traffic_model.testing(parts, sizes)
    assert counted == {kind: x.tolist() for kind, x in sent.items() if x.any()}


def test_no_input_no_label_and_no_logits_of_a_client_cross() -> None:
    method, crossed, serve = users_in_one_process(experiment(2)), [], Host.serve
    host = method.clients.fleet.host

    def serving(message: str, arguments: Any, *rest: Any) -> Any:
        answers = serve(host, message, arguments, *rest)
        crossed.extend(leaves([arguments, answers]))
        return answers

    host.serve = serving
    logits = []
    for client in clients_of(method).values():
        client.tokenizers.local_value().head.register_forward_hook(
            lambda _, x, y: logits.append(y.detach().clone())
        )
    private = logits
    for step in range(EPOCH):
        if not step:
            method.begin_epoch(0)
        for n, client in clients_of(method).items():
            batch = client.data.batch(step)
            assert list(batch.inputs) == [NAMES[n % 2]]
            private += [batch.labels.double(), *(x.double() for x in batch.inputs.values())]
        method.step(step, step)
    method.evaluate()
    assert len(crossed) > 50 and len(private) > 50
    for sent in crossed:
        assert not any(holds(sent.double().flatten(), ours.double().flatten()) for ours in private)


def holds(sent_n: Tensor, ours_n: Tensor) -> bool:
    """Whether these numbers stand somewhere in what was sent, one after the other."""
    starts = (sent_n[: len(sent_n) - len(ours_n) + 1] == ours_n[0]).nonzero().flatten()
    return any(torch.equal(sent_n[start : start + len(ours_n)], ours_n) for start in starts)


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [x for item in value for x in leaves(item)] if isinstance(value, list | tuple) else []


# -- users, losses, refusals -----------------------------------------------------------------------


def test_a_user_whose_client_is_lost_sits_out_until_it_is_back() -> None:
    method = users_in_one_process(experiment(3))
    method.begin_epoch(0)
    method.step(0, 0)

    def fail(*_: Any) -> None:
        raise RuntimeError("gone")

    clients_of(method)[2].loss = fail
    method.clients.fleet.calls.clear()
    assert method.step(1, 1) is not None
    assert method.repeated == 1 and method.clients.lost == {2}
    asked = [clients for message, clients in method.clients.fleet.calls if message == "step"]
    assert asked == [[0, 1, 4, 5]]
    for step in range(2, EPOCH):
        method.step(step, step)
    own = states(method)
    assert_equal(own[3], own[1])  # it is averaged all the same
    fleet, holdings = method.clients.fleet, Holdings.load(method.experiment)
    fleet.rebuild = lambda numbers: build_clients(method.experiment, numbers, holdings)
    fleet.back = [2]
    method.welcome(method.clients.readmit("the next epoch"))
    assert_close(states(method)[2], own[0], 1e-15)
    fleet.calls.clear()
    steps_of(method, 1)
    assert ("step", [0, 1, 2, 3, 4, 5]) in fleet.calls
    assert set(method.evaluate()) == {
        "accuracy",
        "accuracy_image",
        "accuracy_audio",
        "accuracy_fused",
    }


def test_what_it_never_reads_or_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        experiment(
            tokenizer_sync={"mode": "weights"},
            training={"autocast": "bf16", "precision": "float32"},
            m2fedsa={"lambdas": [1.0], "cut_block": -1},
            data={"missing": {"rate": 0.3}},
        )
    for said in (
        "tokenizer_sync.mode: method=m2fedsa never reads it",
        "data.missing.rate: method=m2fedsa never reads it",
        "training.autocast: method=m2fedsa cuts",
        "m2fedsa.lambdas: expected three",
        "m2fedsa.cut_block: must be at least 0",
    ):
        assert said in str(refused.value)
    assert not refusals_with_data(experiment(), load_data(experiment()))
    cases = {
        "clients: a user has one client for each of image, audio; 3 is no multiple": {"clients": 3},
        "clients: a user has one client for each of image, audio; 1 is no multiple": {"clients": 1},
        "m2fedsa.cut_block: 3, but the encoder of image has 2 blocks": {"cut_block": 3},
        "m2fedsa.adapter_form: parallel needs a block": {
            "adapter_form": "parallel",
            "cut_block": 2,
        },
    }
    gaps = experiment(data={"name": "toy-gaps"})  # of the data's own
    (said,) = refusals_with_data(gaps, load_data(gaps))
    assert said.startswith("data.name: samples of toy-gaps lack parts")
    for said, change in cases.items():
        values = to_dict(experiment())
        values = (
            values | change
            if "clients" in change
            else values | {"m2fedsa": values["m2fedsa"] | change}
        )
        found = refusals_with_data(from_dict(values), load_data(experiment()))
        assert len(found) == 1 and found[0].startswith(said), found


def test_cost_has_its_rows_where_it_is_the_method() -> None:
    found = cost.cost_of(experiment(2))
    adapter, head = 4 * 16 + 4 + 4 * 4 + 4 + 16 * 4 + 16, 16 * 3 + 3
    assert found.value("parameters", "m2fedsa", "client", "total", "trainable") == 2 * (
        adapter + head
    )
    assert found.value("bytes_per_epoch", "m2fedsa", "client", "sync_up", "up") == 8 * (
        adapter + head
    )
    assert "m2fedsa" not in {row.method for row in cost.cost_of(toys.experiment()).rows}
