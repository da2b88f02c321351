"""Samples that lack parts: no tokens of what is absent, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import toys
from local_fleet import in_one_process, steps_of

from mpsl_dist.__main__ import main
from mpsl_dist.actors import assembly
from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.actors.holdings import Holdings, load_data
from mpsl_dist.actors.local_data import TestData
from mpsl_dist.actors.part_checks import refusals_with_data
from mpsl_dist.analysis import flops, gapped_traffic, traffic_model
from mpsl_dist.analysis.audit import halves
from mpsl_dist.analysis.audit.victim import refuse
from mpsl_dist.analysis.cost_inputs import inputs_of
from mpsl_dist.config import Experiment, Faults, to_dict
from mpsl_dist.config.methods import METHODS, unread
from mpsl_dist.data import DataError, gaps, presence
from mpsl_dist.data.decode.samples import FileDataset, Sample, View
from mpsl_dist.errors import ConfigError
from mpsl_dist.methods import centralized
from mpsl_dist.methods.hosting import Setup, build_clients
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.psl import Psl
from mpsl_dist.models.average import trainable_state
from mpsl_dist.models.gapped import tensors_of
from mpsl_dist.models.server_model import build_encoder
from mpsl_dist.records.traffic import nbytes

STEPS = 4
#: At this seed client 1 has both modalities, 0 and 2 hear only, 3 sees only.
MISSING = {"rate": 0.5, "seed": 3}


def experiment(data: dict | None = None, **changes) -> Experiment:
    training = to_dict(toys.experiment())["training"] | {"precision": "float64"}
    chosen = {"name": "toy-image+audio", "missing": MISSING} | (data or {})
    return toys.experiment(**{"training": training} | changes, data=chosen)


def cut_gradients_of(method: Mpsl) -> list[dict[tuple[int, int], torch.Tensor]]:
    """By step, client and tensor, as the steps that follow bring them."""
    kept, forward = [], method.server.forward

    def watching(smashed: dict) -> dict[int, torch.Tensor]:
        kept.append(step := {})
        for n, sent in smashed.items():
            for i, tokens_bld in enumerate(tensors_of(sent)):
                tokens_bld.register_hook(lambda x, key=(n, i), step=step: step.update({key: x}))
        return forward(smashed)

    method.server.forward = watching
    return kept


def assert_equal_to_reference(method: Mpsl, chosen: Experiment) -> None:
    expected, cut = reference.train(chosen, STEPS), cut_gradients_of(method)
    assert steps_of(method, STEPS) == pytest.approx(expected["losses"], rel=1e-12)
    if type(method) is Mpsl:  # naive PSL passes once for every client
        for ours, theirs in zip(cut, expected["cut_gradients"], strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-9)
    for key, value in expected["server"].items():
        torch.testing.assert_close(method.server.model.state_dict()[key], value, rtol=0, atol=1e-9)
    for number, state in expected["clients"].items():
        own = method.clients.references[number].tokenizer_weights()
        assert own.keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(own[key], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["none", "gradients", "weights"])
@pytest.mark.parametrize("per", ["client", "sample"])
@pytest.mark.parametrize("fusion", ["early", "late"])
def test_training_equals_that_of_each_sample_by_itself(fusion: str, per: str, mode: str) -> None:
    """The reference has no mask: it encodes every sample alone, of its present tokens."""
    sync = {"mode": mode, "every": 2}
    chosen = experiment(
        {"missing": MISSING | {"per": per}}, model={"fusion": fusion}, tokenizer_sync=sync
    )
    assert_equal_to_reference(in_one_process(chosen), chosen)


CASES = {
    "mean of tokens": {"model": {"pooling": "mean", "post_norm": True}},
    "mean of tokens, late": {"model": {"pooling": "mean", "fusion": "late"}},
    "heads at clients": {"model": {"head_at": "client"}, "tokenizer_sync": {"mode": "weights"}},
    "computed again": {"checkpoint_blocks": True},
    "gaps of the data's own": {"data": {"name": "toy-gaps", "missing": {}}},
}


@pytest.mark.parametrize("case", CASES)
def test_so_it_is_with_other_options(case: str) -> None:
    options = dict(CASES[case])
    again = {"checkpoint_blocks": options.pop("checkpoint_blocks", False)}
    training = to_dict(experiment())["training"] | again
    chosen = experiment(options.pop("data", None), training=training, **options)
    assert_equal_to_reference(in_one_process(chosen), chosen)


@pytest.mark.parametrize("mode", ["none", "gradients", "weights"])
def test_naive_psl_takes_the_same_steps(mode: str) -> None:
    chosen = experiment(tokenizer_sync={"mode": mode, "every": 2})
    assert_equal_to_reference(in_one_process(chosen, Psl), chosen)


def test_draws_are_nested_and_leave_nobody_with_nothing() -> None:
    drawn = [gaps.draw(rate, 2000, 3, [7]) for rate in (0.0, 0.2, 0.5, 0.9)]
    assert drawn[0].all() and all(present.any(1).all() for present in drawn)
    for few, more in pairwise(drawn):
        assert not (more & ~few).any() and more.sum() < few.sum()
    # Of 0.2^3 of the rows one cell comes back.
    assert abs(1 - drawn[1].mean() - (0.2 - 0.2**3 / 3)) < 0.01
    assert not np.array_equal(drawn[2], gaps.draw(0.5, 2000, 3, [8]))


# -- what crosses --------------------------------------------------------------------------------


def whole_run(chosen: Experiment) -> Mpsl:
    """Two epochs, a test after each, and the model to deploy."""
    method = in_one_process(chosen)
    for epoch in range(2):
        method.begin_epoch(epoch)
        for step in range(len(method.plan)):
            method.step(step, epoch * len(method.plan) + step)
        method.evaluate()
    method.deployable()
    return method


AT_CLIENTS = {"test_at": "clients", "missing": MISSING | {"at_test": True}}
TRAFFIC = {
    "early": {},
    "late": {"model": {"fusion": "late"}, "tokenizer_sync": {"mode": "weights", "every": 2}},
    "by sample": {"data": {"missing": MISSING | {"per": "sample"}}},
    "gradients": {"tokenizer_sync": {"mode": "gradients", "every": 3}},
    "at clients": {"data": AT_CLIENTS, "training": {"evaluate_own": True}},
    "identical at clients": {"data": AT_CLIENTS, "tokenizer_sync": {"mode": "gradients"}},
    "coded": {"wire": {"activations": "int8", "gradients": "int4"}, "data": AT_CLIENTS},
    "coded late": {
        "wire": {"activations": "bf16"},
        "model": {"fusion": "late"},
        "data": {"missing": MISSING | {"per": "sample"}},
    },
    "heads": {"model": {"head_at": "client"}, "tokenizer_sync": {"mode": "weights"}},
    "the data's own": {"data": {"name": "toy-gaps", "missing": {}}},
    "frozen, and secret": {
        "model": {"train_tokenizers": False},
        "data": AT_CLIENTS,
        "defences": {"secret_tokenizers": True, "secret": "seed"},
    },
}


@pytest.mark.parametrize("case", TRAFFIC)
def test_counted_bytes_are_the_computed_ones(case: str) -> None:
    options = dict(TRAFFIC[case])
    training = to_dict(experiment())["training"] | options.pop("training", {})
    chosen = experiment(options.pop("data", None), training=training, **options)
    method, parts = whole_run(chosen), flops.build(chosen, inputs_of(chosen))
    found = gapped_traffic.gaps_of(Holdings.load(chosen))
    tests = np.array(list(method.test_sizes.values()))
    total = traffic_model.training(parts, method.plan, 2, found)
    once = traffic_model.exporting(parts, chosen.clients, found)
    for kind, each in traffic_model.testing(parts, tests, found).items():
        total[kind] = each * 2 + once.get(kind, 0)
    computed = {kind: x.tolist() for kind, x in total.items() if x.any()}
    assert method.traffic.by_kind() == computed


def test_a_client_builds_the_tokenizers_of_its_own_modalities_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = experiment()
    holdings = Holdings.load(chosen)
    built: list[str] = []
    build = assembly._build_tokenizer

    def counted(own: Experiment, modality: str, *rest: object) -> torch.nn.Module:
        found = build(own, modality, *rest)
        if not all(p.is_meta for p in found.parameters()):
            built.append(modality)
        return found

    monkeypatch.setattr(assembly, "_build_tokenizer", counted)
    (sees,) = build_clients(chosen, [3], holdings.only([3]))
    assert built == ["image"] and sees.describe().modalities == ("image",)
    # Its numbers are drawn after those of the pictures' tokenizer, which it has not built.
    (hears,) = build_clients(chosen, [0], holdings.only([0]))
    assert built == ["image", "audio"]
    (both,) = build_clients(chosen, [1], holdings.only([1]))
    tokenizers = [client.tokenizers.local_value().by_modality for client in (sees, hears, both)]
    assert [list(own) for own in tokenizers] == [["image"], ["audio"], ["image", "audio"]]
    first = both.tokenizer_weights()
    for client in (sees, hears):
        own = client.tokenizer_weights()
        assert own.keys() < first.keys()
        assert all(torch.equal(x, first[name]) for name, x in own.items())


def test_a_client_sends_what_it_has_and_a_mask() -> None:
    method = in_one_process(experiment())
    method.begin_epoch(0)
    sent = method.clients.references[3].tokenize(0)
    (tokens_bld,) = sent.tokens
    assert sent.present_bm.tolist() == [[True, False]] * len(tokens_bld)
    assert nbytes(sent) == tokens_bld.nbytes + 2 * len(tokens_bld)
    whole = method.clients.references[1].tokenize(0)
    assert isinstance(whole, list) and len(whole) == 1


@pytest.mark.parametrize("length", [11, 700])
def test_attention_leaves_out_masked_tokens_to_the_last_bit(length: int) -> None:
    """Longer than a block of torch's attention on CPUs, whose first is masked as a whole."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = build_encoder(16, 2, 2).double()
    tokens_bld = torch.randn(2, length, 16, dtype=torch.float64)
    there_bl = torch.ones(2, length, dtype=torch.bool)
    there_bl[0, : length - 5] = False
    found = []
    for scale in (0.0, 1e3):
        filled = torch.where(there_bl[..., None], tokens_bld, scale * tokens_bld).requires_grad_()
        out_bld = encoder(filled, present_bl=there_bl)
        (gradient,) = torch.autograd.grad(out_bld[there_bl].square().sum(), filled)
        assert not gradient[~there_bl].any() and gradient[there_bl].all()
        found.append((out_bld[there_bl], gradient[there_bl]))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    alone_bld = encoder(tokens_bld[:1, length - 5 :])
    torch.testing.assert_close(found[0][0][:5], alone_bld[0], rtol=0, atol=1e-12)


def test_gradients_come_back_for_what_is_present_alone() -> None:
    chosen = experiment({"missing": MISSING | {"per": "sample"}})
    method = in_one_process(chosen)
    steps_of(method, len(method.plan))
    counted = method.traffic.by_kind()
    gaps_found = gapped_traffic.gaps_of(Holdings.load(chosen))
    lengths = np.array(method.tokenizers.lengths)
    tokens = [int(own.sum(0) @ lengths) for own in gaps_found.train]
    assert counted["cut_layer_gradients"] == [n * 16 * 8 for n in tokens]


# -- with what else there is -----------------------------------------------------------------------


def test_noise_on_labels_and_gradients_is_the_same_for_psl() -> None:
    noise = {"label_epsilon": 1.0, "gradient_noise": 0.5, "secret": "seed"}
    chosen = experiment(defences=noise)
    ours, theirs = (steps_of(in_one_process(chosen, kind), STEPS) for kind in (Mpsl, Psl))
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert ours != pytest.approx(steps_of(in_one_process(experiment()), STEPS), rel=1e-3)


@pytest.mark.parametrize("per", ["client", "sample"])
def test_centralized_training_is_that_of_clients_that_share_every_gradient(per: str) -> None:
    data, sync = {"missing": MISSING | {"per": per}}, {"mode": "gradients"}
    together = in_one_process(experiment(data, tokenizer_sync=sync))
    chosen = experiment(data, method="centralized", faults={})
    alone = centralized.build(Setup(chosen, Holdings.load(chosen), 1))
    assert steps_of(alone, STEPS) == pytest.approx(steps_of(together, STEPS), rel=1e-9)


def test_tests_lack_parts_where_asked_for() -> None:
    chosen = experiment({"missing": MISSING | {"at_test": True}})
    method = in_one_process(chosen)
    steps_of(method, 2)
    batch, model = method.splits.test.fetch(range(30)), method.deployable()
    assert 0 < sum(int((~there).sum()) for there in batch.present.values()) <= 30
    inputs = model.to_own(batch.inputs)
    rows = model.tokenizers(inputs, batch.present)
    expected = reference.one_by_one(model.server_model, rows, batch.present)
    torch.testing.assert_close(model._predict(batch), expected, rtol=0, atol=1e-12)
    right = int((expected.argmax(1) == batch.labels).sum())
    assert method.evaluate() == {"accuracy": right / 30}


def test_a_finished_model_is_evaluated_on_what_its_run_was(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = experiment({"missing": MISSING | {"at_test": True}})
    method = in_one_process(chosen)
    method.deployable().save(tmp_path / "model", chosen, method.splits)

    def parts(model: Deployable, held: TestData, size: int) -> dict[str, float]:
        batches = held.batches(size)
        return {"parts": sum(int(x_b.sum()) for batch in batches for x_b in batch.present.values())}

    monkeypatch.setattr(Deployable, "test", parts)
    assert main(["evaluate", str(tmp_path)]) == 0
    expected = parts(method.deployable(), method.tests, 30)["parts"]
    assert f"parts {expected:.4f}" in capsys.readouterr().out


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    chosen = experiment(output=str(tmp_path), tokenizer_sync={"mode": "gradients", "every": 2})
    whole, first, second = (in_one_process(chosen) for _ in range(3))
    losses = steps_of(whole, 4)
    assert steps_of(first, 2) == losses[:2]
    folder = str(tmp_path / "checkpoint")
    second.restore(folder, first.save(folder))
    second.begin_epoch(0, 2)
    assert [second.step(step, step) for step in (2, 3)] == losses[2:]


@pytest.mark.parametrize("mode", ["none", "gradients", "weights"])
def test_a_modality_whose_clients_are_lost_stays_as_the_server_last_had_it(mode: str) -> None:
    method = in_one_process(experiment(tokenizer_sync={"mode": mode}))
    steps_of(method, 2)
    method.evaluate()
    before = trainable_state(method.tokenizers)
    method.clients.lost |= {0, 1, 2}
    assert method.step(2, 2) is not None
    after = trainable_state(method.deployable().tokenizers)
    moved = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if "audio" not in name}


def test_a_client_that_comes_back_takes_the_others_mean_of_what_it_has() -> None:
    method = in_one_process(experiment())
    steps_of(method, 2)
    first = build_clients(method.experiment, [1], Holdings.load(method.experiment))[0]
    method.clients.lost |= {0, 1, 2}
    method.clients.fleet.back = [1]
    method.clients.faults = Faults(rejoin="now")
    method.welcome(method.clients.readmit("step 2"))
    own, other = (method.clients.references[n].tokenizer_weights() for n in (1, 3))
    for name, x in first.tokenizer_weights().items():
        assert torch.equal(own[name], other.get(name, x)), name


@pytest.mark.parametrize("own", [False, True])
def test_what_a_client_is_but_tested_on_does_not_count_in_the_average(
    own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    modalities = Holdings.modalities

    def seen(self: Holdings, number: int, tests: bool = True) -> tuple[str, ...]:
        return modalities(self, number) if tests or number != 1 else ("image",)

    monkeypatch.setattr(Holdings, "modalities", seen)
    training = to_dict(experiment())["training"] | {"evaluate_own": own}
    method = in_one_process(experiment(AT_CLIENTS, training=training))
    steps_of(method, 1)
    told: dict[str, torch.Tensor] = {}
    begin = method.clients.begin_test
    monkeypatch.setattr(
        method.clients, "begin_test", lambda mean, counts: (told.update(mean), begin(mean, counts))
    )
    method.evaluate()
    weights = {n: method.clients.references[n].tokenizer_weights() for n in (0, 1, 2)}
    total = method.sizes[0] + method.sizes[2]
    for name in weights[0]:
        if "audio" in name:
            mean = sum(weights[n][name] * method.sizes[n] for n in (0, 2)) / total
            torch.testing.assert_close(told[name], mean, rtol=0, atol=1e-14)


@pytest.mark.parametrize("left", [[0, 2, 3], [3]])
def test_where_all_step_on_the_same_sums_who_comes_back_gets_each_part_of_one_that_has_it(
    left: list[int], tmp_path: Path
) -> None:
    """Weights and moments: as if it had not been away. What nobody has left it has kept itself."""
    chosen = experiment(output=str(tmp_path), tokenizer_sync={"mode": "gradients"})
    whole, method = in_one_process(chosen), in_one_process(chosen)
    losses = steps_of(whole, 4)
    assert steps_of(method, 2) == losses[:2]
    gone = [n for n in range(4) if n not in left]
    if len(left) == 1:  # who sees, alone
        method.clients.keep(str(tmp_path), "step 2")
    method.clients.lost |= set(gone)
    method.clients.fleet.back = gone
    method.clients.faults = Faults(rejoin="now")
    method.welcome(method.clients.readmit("step 2"))
    method.begin_epoch(0, 2)
    assert [method.step(step, step) for step in (2, 3)] == losses[2:]


REFUSED = {
    "tokenizer_sync.masked": {"tokenizer_sync": {"masked": True}},
    "wire.cache": {"model": {"train_tokenizers": False}, "wire": {"cache": True}},
    "server.shard": {"server": {"replicas": 2, "shard": True}},
    "defences.token_noise": {"defences": {"token_noise": 0.1}},
    "defences.shuffle_patches": {"defences": {"shuffle_patches": True}},
    "defences.nopeek": {"defences": {"nopeek": 0.1}},
    "training.evaluate_own": {"training": {"evaluate_own": True}},
    "data.name": {"data": {"name": "toy-pairs"}},
    "data.missing.at_test": {"data": {"test_at": "clients"}},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_had_with_gaps_is_refused_by_name(key: str) -> None:
    options = {"faults": {"min_clients": 3}} | REFUSED[key]
    data = options.pop("data", {})
    for missing, refused in ((MISSING, True), ({}, False)):
        chosen = experiment({"missing": missing} | data, **options)
        found = refusals_with_data(chosen, load_data(chosen))
        assert [line.split(":")[0] for line in found] == [key] * refused, found


def test_samples_without_anything_are_refused() -> None:
    chosen = experiment({"name": "toy-gaps", "missing": {}})
    splits = load_data(chosen)
    present = {name: there.clone() for name, there in splits.train.present.items()}
    for there in present.values():
        there[7] = False
    found = refusals_with_data(chosen, replace(splits, train=splits.train.without(present)))
    assert [line.split(";")[0] for line in found] == [
        "data.modalities: there are train samples without image or text"
    ]


def test_the_audit_refuses_samples_that_lack_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"data.missing.rate: audit attacks whole samples"):
        refuse(experiment())
    refuse(experiment({"missing": {}}))
    chosen = experiment({"name": "toy-gaps", "missing": {}})
    splits = load_data(chosen)
    monkeypatch.setattr(halves, "load_data", lambda *_: replace(splits, test=splits.train))
    with pytest.raises(DataError, match=r"test samples of toy-gaps lack parts, and audit attacks"):
        halves.read(chosen, 10)


def test_zeros_may_stand_in_for_what_is_absent() -> None:
    missing = MISSING | {"zeros": True}
    chosen = experiment(
        {"missing": missing}, wire={"cache": True}, model={"train_tokenizers": False}
    )
    splits = load_data(chosen)
    assert not refusals_with_data(chosen, splits)
    held = Holdings.load(chosen)
    assert presence(held.splits.train) is None and not held.modalities(3)
    batch = held.splits.train.fetch(held.dealt.parts[3])
    assert batch.present is None and not batch.inputs["audio"].any() and batch.inputs["image"].any()


def test_a_method_that_cannot_leave_parts_out_refuses_the_key_and_takes_zeros(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    knows_no_gaps = replace(METHODS["psl"], reads=("tokenizer_sync",))
    monkeypatch.setitem(METHODS, "psl", knows_no_gaps)
    assert "data.missing.rate" in unread(replace(experiment(), method="psl"))
    chosen = replace(experiment({"name": "toy-gaps", "missing": {}}), method="psl")
    splits = load_data(chosen)
    assert presence(splits.train) is None and splits.train.fetch([0]).present is None


def test_nothing_is_drawn_on_top_of_gaps_that_are_there() -> None:
    with pytest.raises(DataError, match=r"data.missing.rate: the data lack parts of their own"):
        Holdings.load(experiment({"name": "toy-gaps"}))


def test_files_whose_part_is_left_out_are_not_read() -> None:
    view = View(("image", "audio", "text"), image_size=8, audio_frames=26, text_length=6)
    samples = [Sample(video="no such clip.mp4", text="a word")] * 3
    split = FileDataset(samples, torch.zeros(3, dtype=torch.long), view)
    nothing, all_ = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    left = split.without({"image": nothing, "audio": nothing, "text": all_})
    batch = left.fetch([0, 1], seed=1)
    assert {name: there.tolist() for name, there in batch.present.items()} == {
        "image": [False, False],
        "audio": [False, False],
        "text": [True, True],
    }
    # A clip may lose either part and keep the other.
    seen = split.without({"image": all_, "audio": nothing, "text": nothing}).samples[0]
    heard = split.without({"image": nothing, "audio": all_, "text": nothing}).samples[0]
    clip = samples[0].video
    assert seen.sources == {"image": clip, "audio": None} and seen.text is None
    assert heard.sources == {"image": None, "audio": clip} and heard.image is None
