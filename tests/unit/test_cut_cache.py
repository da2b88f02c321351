"""With ``wire.cache`` a sample's activations cross once, and training stays what it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import toys
from local_fleet import in_one_process, steps_of

from mpsl_dist.actors import part_checks
from mpsl_dist.actors.checks import check_cache
from mpsl_dist.actors.cut_cache import Aging, CutCache
from mpsl_dist.analysis import cost, flops, traffic_model
from mpsl_dist.analysis.cost_inputs import inputs_of
from mpsl_dist.config import Experiment
from mpsl_dist.data.decode.samples import FileDataset, Sample, View
from mpsl_dist.errors import ConfigError
from mpsl_dist.methods.link import Back
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.psl import Psl

EPOCHS = 3
CASES: dict[str, dict] = {
    "early": {},
    "late": {"data": {"name": "toy-image+audio"}, "model": {"fusion": "late"}},
    "dry clients": {"client_share": "equal"},
    "global contrast": {"data": {"name": "toy-pairs"}, "clients": 3, "contrastive": "global"},
    "pictures": {"data": {"name": "toy-pairs", "unit": "picture"}, "clients": 3},
}


def experiment(cache: bool = True, **changes: Any) -> Experiment:
    model = {"train_tokenizers": False} | changes.pop("model", {})
    wire = {"cache": cache} | changes.pop("wire", {})
    return toys.experiment(model=model, wire=wire, **changes)


def train(chosen: Experiment, kind: type[Mpsl] = Mpsl) -> tuple[Mpsl, list[float | None]]:
    method = in_one_process(chosen, kind)
    return method, steps_of(method, EPOCHS * len(method.plan))


def assert_same(ours: Mpsl, theirs: Mpsl) -> None:
    state = theirs.server.model.state_dict()
    for key, value in ours.server.model.state_dict().items():
        assert torch.equal(value, state[key]), key


def sample_bytes(chosen: Experiment) -> int:
    parts = flops.build(chosen, inputs_of(chosen))
    return traffic_model.per_sample(parts)["activations"]


@pytest.mark.parametrize(("case", "kind"), [*((case, Mpsl) for case in CASES), ("early", Psl)])
def test_training_is_the_same_to_the_last_bit_at_an_epochs_bytes(
    case: str, kind: type[Mpsl]
) -> None:
    plain, expected = train(experiment(False, **CASES[case]), kind)
    cached, losses = train(experiment(**CASES[case]), kind)
    assert losses == expected
    assert_same(cached, plain)
    ours, theirs = cached.traffic.totals(), plain.traffic.totals()
    assert ours.pop("activations") * EPOCHS == theirs.pop("activations")
    assert ours == theirs and not ours["cut_layer_gradients"]


def test_once_all_is_kept_nobody_is_asked_to_tokenize() -> None:
    method, _ = train(experiment())
    asked = [message for message, _ in method.clients.calls]
    assert asked.count("tokenize") == len(method.plan)
    assert asked.count("loss") == EPOCHS * len(method.plan)


def test_beyond_the_limit_the_oldest_are_dropped_and_sent_again() -> None:
    """The toys are far below a MiB, so the limit is set in bytes."""
    chosen = experiment()
    plain, expected = train(experiment(False))
    method = in_one_process(chosen)
    each = sample_bytes(chosen)
    limit = 40 * each + 5
    method.clients.cache.kept.limit = limit
    losses, sizes = [], []
    for step in range(EPOCHS * len(method.plan)):
        epoch, epoch_step = divmod(step, len(method.plan))
        if epoch_step == 0:
            method.begin_epoch(epoch)
        losses.append(method.step(epoch_step, step))
        sizes.append(method.clients.cache.kept.size)
    assert losses == expected
    assert_same(method, plain)
    assert max(sizes) == 40 * each
    sent = method.traffic.by_kind()["activations"]
    once, always = toys.SAMPLES * each, EPOCHS * toys.SAMPLES * each
    assert once < sum(sent) < always


def test_the_oldest_goes_first() -> None:
    kept: Aging[str] = Aging(limit=25)
    for position, value in enumerate("abc"):
        kept.put(0, position, value, 10)
    assert [kept.get(0, p) for p in range(3)] == [None, "b", "c"]
    kept.put(0, 1, "B", 10)
    kept.put(1, 0, "other", 10)
    assert kept.get(0, 1) == "B" and kept.get(0, 2) is None
    kept.forget([0])
    assert (len(kept), kept.size) == (1, 10)
    kept.put(1, 1, "larger than all", 30)
    assert (len(kept), kept.size) == (0, 0)


def test_a_cache_smaller_than_a_mini_batch_still_completes_it() -> None:
    chosen = experiment()
    method = in_one_process(chosen)
    method.clients.cache.kept.limit = 2 * sample_bytes(chosen)
    _, expected = train(experiment(False))
    assert steps_of(method, EPOCHS * len(method.plan)) == expected


@pytest.mark.parametrize("message", ["tokenize", "loss"])
def test_an_abandoned_attempt_and_a_fresh_return_cost_bytes_and_no_bit(message: str) -> None:
    """A client is lost in the middle of a step and comes back, as new, for the next epoch."""

    def run(cache: bool) -> tuple[Mpsl, list[float | None]]:
        method = in_one_process(experiment(cache))
        steps, losses = len(method.plan), []
        method.begin_epoch(0)
        lost = method.clients.references[2]
        for step in range(EPOCHS * steps):
            epoch, epoch_step = divmod(step, steps)
            if step == 2:
                setattr(lost, message, _fail)
            if step == steps:
                method.clients.fleet.back = [2]
                method.welcome(method.clients.readmit("test"))
            if step and epoch_step == 0:
                method.begin_epoch(epoch)
            losses.append(method.step(epoch_step, step))
        assert method.repeated == 1 and not method.clients.lost
        return method, losses

    plain, expected = run(False)
    cached, losses = run(True)
    assert losses == expected
    assert_same(cached, plain)
    sent = cached.traffic.bytes["activations"] // sample_bytes(experiment())
    others = [n for n in cached.sizes if n != 2]
    # What of an abandoned attempt had not arrived from all is asked for again.
    assert sum(sent[n] for n in others) >= sum(cached.sizes[n] for n in others)
    # The one that came back begins anew: all of its samples again.
    before = sum(cached.plan[: 2 + (message == "loss"), 2])
    assert sent[2] == before + cached.sizes[2]


def _fail(*_: Any) -> None:
    raise ConnectionError("gone")


def test_who_was_only_slow_is_not_forgotten_and_a_fresh_process_is() -> None:
    method, _ = train(experiment())
    kept = method.clients.cache.kept
    method.welcome(Back(fresh=[], awake=[1]))
    assert len(kept) == toys.SAMPLES
    method.welcome(Back(fresh=[1], awake=[]))
    assert len(kept) == toys.SAMPLES - method.sizes[1]


def test_a_client_sends_the_rows_that_are_asked_for() -> None:
    method = in_one_process(experiment())
    method.begin_epoch(0)
    client = method.clients.references[0]
    whole, some = client.tokenize(0)[0], client.tokenize(0, [2, 0])[0]
    assert torch.equal(some, whole[[2, 0]])


def test_what_is_kept_has_storage_of_its_own() -> None:
    """A view would hold the memory of its whole mini-batch, beyond the limit."""
    cache = CutCache(seed=1)
    cache.begin_epoch(0, {0: [4]})
    cache.complete(0, [0], lambda asked: {0: [torch.randn(4, 3, 2)]})
    row = cache.kept.get(0, 0)[0]
    assert row.untyped_storage().nbytes() == row.nbytes


# -- what is said before -------------------------------------------------------------------------


def test_cost_says_the_memory_and_the_bytes_of_the_whole_run() -> None:
    chosen = experiment(training={"epochs": 10, "batch_size": 20})
    each, everything = sample_bytes(chosen), 90 * sample_bytes(chosen)
    off = replace(chosen, wire=replace(chosen.wire, cache=False))
    plain, cached = cost.cost_of(off), cost.cost_of(chosen)
    memory = ("memory", "mpsl", "server", "cached activations", "peak")
    assert cached.value(*memory) == everything
    sent = ("bytes_per_epoch", "mpsl", "client", "activations", "up")
    assert plain.value(*sent) == 90 * each / 4
    assert cached.value(*sent) == pytest.approx(90 * each / 4 / 10)
    for method in ("fedavg", "centralized"):
        assert not [r for r in cached.rows if r.method == method and "cached" in r.part]


def test_cost_caps_the_memory_at_the_limit() -> None:
    chosen = experiment(data={"name": "digits-qa", "partition": {"minimum": 3}})
    limited = replace(chosen, wire=replace(chosen.wire, cache_limit=1))
    found = [r.value for r in cost.cost_of(limited).rows if r.part == "cached activations"]
    assert found == [2**20] * 2


# -- refusals ------------------------------------------------------------------------------------


def test_every_reason_against_it_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        toys.experiment(wire={"cache": True, "cache_limit": 0}, clients=0)
    lines = str(error.value).splitlines()
    assert any("wire.cache: a tokenizer that is trained" in line for line in lines)
    assert any("wire.cache_limit: must be at least 1" in line for line in lines)
    assert any(line.startswith("clients:") for line in lines)
    with pytest.raises(ConfigError, match="cache_limit: only with wire.cache=true"):
        toys.experiment(wire={"cache_limit": 4})


PICTURE, SOUND, CLIP = (
    Sample(image="a.png", text="a"),
    Sample(audio="a.wav"),
    Sample(video="a.mp4"),
)


@pytest.mark.parametrize(
    ("sample", "view", "options", "unchanging"),
    [
        (PICTURE, View(("image", "text")), {}, True),
        (PICTURE, View(("image", "text"), crop=True), {}, False),
        (PICTURE, View(("image", "text")), {"on_error": "skip"}, False),
        (SOUND, View(("audio",)), {}, False),
        (CLIP, View(("image",)), {}, False),
        (CLIP, View(("text",)), {}, True),
        (CLIP._replace(image="a.png"), View(("image",)), {}, True),
    ],
)
def test_a_dataset_of_files_says_whether_it_is_drawn_anew(
    sample: Sample, view: View, options: dict, unchanging: bool
) -> None:
    dataset = FileDataset([sample], torch.tensor([0]), view, **options)
    assert dataset.unchanging == unchanging


def test_data_that_change_are_refused_with_the_key() -> None:
    chosen, splits = experiment(), toys.load(("image", "text"))

    def refusal(**options: Any) -> str:
        train = FileDataset([CLIP], torch.tensor([0]), View(("image",)), **options)
        with pytest.raises(ConfigError) as error:
            check_cache(chosen, replace(splits, train=train))
        return str(error.value)

    assert "change from epoch to epoch" in refusal()
    assert "data.on_error=raise" in refusal(on_error="skip")
    silent = type("Plugins", (), {"labels": torch.tensor([0])})()
    with pytest.raises(ConfigError, match="does not say that it is 'unchanging'"):
        check_cache(chosen, replace(splits, train=silent))
    check_cache(experiment(False), replace(splits, train=silent))


def test_a_frozen_tokenizer_with_dropout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, splits = experiment(), toys.load(("image", "text"))
    assert part_checks.refusals_with_data(chosen, splits) == []
    build = part_checks.assembly.build_on_meta

    def dropping(*words: Any) -> Any:
        tokenizers, model = build(*words)
        tokenizers.by_modality["image"].drop = torch.nn.Dropout(0.1)
        return tokenizers, model

    monkeypatch.setattr(part_checks.assembly, "build_on_meta", dropping)
    (line,) = part_checks.refusals_with_data(chosen, splits)
    assert line.startswith("wire.cache: the tokenizer of image has dropout")
