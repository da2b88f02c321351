"""A language model as the server's encoder: by the same method, exact against one process."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import toys
from local_fleet import in_one_process, steps_of

from mpsl_dist.actors import assembly, deployable
from mpsl_dist.actors.holdings import Holdings, load_data
from mpsl_dist.actors.part_checks import refusals_with_data
from mpsl_dist.analysis import flops, traffic_model
from mpsl_dist.analysis.audit import victim
from mpsl_dist.analysis.cost import cost_of
from mpsl_dist.analysis.cost_inputs import inputs_of
from mpsl_dist.config import Experiment, to_dict
from mpsl_dist.errors import ConfigError
from mpsl_dist.methods import centralized
from mpsl_dist.methods.hosting import Setup
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.psl import Psl
from mpsl_dist.models.language import TINY, as_encoder, build_language
from mpsl_dist.models.lora import lora_state
from mpsl_dist.models.server_model import ServerModel

pytest.importorskip("transformers", reason="mpsl_dist[lm] is not installed")
pytest.importorskip("peft", reason="mpsl_dist[lm] is not installed")

STEPS = 4
LM = {"kind": "lm", "size": "custom", "width": 16, "depth": 2, "heads": 2}
LORA = LM | {"lora": {"rank": 2}}
SOFT = {"encoder": LORA, "pooling": "last", "connector": {"tokens": 3, "features": 8, "fused": 12}}
LATE = {"encoder": LM | {"trainable_blocks": 1}, "fusion": "late", "pooling": "last"}
CASES: dict[str, dict[str, Any]] = {
    "soft tokens, LoRA": {"model": SOFT},
    "all tokens, trained": {"model": {"encoder": LM, "pooling": "mean"}},
    "late, last block, heads at clients": {
        "model": LATE | {"head_at": "client"},
        "data": {"name": "toy-image+audio"},
    },
    "retrieval, frozen": {
        "model": {"encoder": LM | {"trainable_blocks": 0}, "pooling": "last", "temperature": 0.2},
        "data": {"name": "toy-pairs"},
        "clients": 3,
    },
}


def experiment(**changes: Any) -> Experiment:
    training = to_dict(toys.experiment())["training"] | {"precision": "float64"}
    return toys.experiment(training=training | changes.pop("training", {}), **changes)


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest) -> tuple[Mpsl, list[float]]:
    """A method after its first steps, and their losses."""
    method = in_one_process(experiment(**CASES[request.param]))
    return method, steps_of(method, STEPS)


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-9, msg=key)


def test_blocks_and_norm_are_the_language_models_own() -> None:
    torch.manual_seed(0)
    model = build_language(TINY).eval()
    encoder, norm = as_encoder(model)
    soft_bld = torch.randn(2, 5, TINY.width)
    with torch.no_grad():
        wanted = model.model(inputs_embeds=soft_bld).last_hidden_state
        assert torch.equal(norm(encoder(soft_bld)), wanted)


def test_the_last_token_of_a_pass_is_what_the_head_reads() -> None:
    image_bld, text_bld = torch.randn(2, 2, 4), torch.randn(2, 3, 4)
    joint = [torch.cat([image_bld, text_bld], dim=1)]

    def features(smashed: list[torch.Tensor], fusion: str, apart: bool) -> torch.Tensor:
        same = torch.nn.Identity()
        return ServerModel(same, 4, [2, 3], same, fusion, "last", False, apart).features(smashed)

    lasts_bmd = torch.stack([image_bld[:, -1], text_bld[:, -1]], dim=1)
    assert torch.equal(features(joint, "early", False), text_bld[:, -1])
    assert torch.equal(features(joint, "early", True), lasts_bmd)
    late = features([image_bld, text_bld], "late", False)
    torch.testing.assert_close(late, lasts_bmd.mean(1))


def test_it_equals_plain_training(trained: tuple[Mpsl, list[float]]) -> None:
    method, losses = trained
    expected = reference.train(method.experiment, STEPS)
    assert losses == pytest.approx(expected["losses"], rel=1e-12)
    assert_same(method.server.model.state_dict(), expected["server"])
    for number, state in expected["clients"].items():
        assert_same(method.clients.references[number].tokenizer_weights(), state)


def test_a_backward_a_client_learns_the_same(trained: tuple[Mpsl, list[float]]) -> None:
    method, losses = trained
    theirs = in_one_process(method.experiment, Psl)
    assert steps_of(theirs, STEPS) == pytest.approx(losses, rel=1e-10)
    assert_same(theirs.server.model.state_dict(), method.server.model.state_dict())


def test_centralized_training_of_one_client_is_split_learning_of_it() -> None:
    chosen = experiment(model=SOFT, clients=1)
    method = centralized.build(Setup(chosen, Holdings.load(chosen), 1))
    expected = reference.train(chosen, STEPS)
    assert steps_of(method, STEPS) == pytest.approx(expected["losses"], rel=1e-12)
    assert_same(method.learner.model.server_model.state_dict(), expected["server"])


def test_bytes_and_parameters_are_those_computed_before(trained: tuple[Mpsl, list[float]]) -> None:
    method = in_one_process(trained[0].experiment)
    steps_of(method, len(method.plan))
    chosen = method.experiment
    parts = flops.build(chosen, inputs_of(chosen))
    sent = traffic_model.training(parts, method.plan, 1)
    wanted = {kind: int(each.sum()) for kind, each in sent.items() if each.any()}
    assert {k: v for k, v in method.traffic.totals().items() if v} == wanted
    tokens = sum(method.tokenizers.lengths)
    assert wanted["activations"] == int(method.plan.sum()) * tokens * 16 * 8
    cost = cost_of(chosen)
    for owner, module in (("client", method.tokenizers), ("server", method.server.model)):
        counted = {"all": 0, "trainable": 0}
        for p in module.parameters():
            counted["all"] += p.numel()
            counted["trainable"] += p.numel() * p.requires_grad
        for quantity, number in counted.items():
            assert cost.value("parameters", "mpsl", owner, "total", quantity) == number
        assert cost.value("flops", "mpsl", owner, "total", "forward") > 0
    assert "fedclip" not in {row.method for row in cost.rows}


def test_the_operations_are_those_of_its_products() -> None:
    chosen = experiment(model=SOFT)
    counted = flops.count_server(flops.build(chosen, inputs_of(chosen)))["joint"]
    tokens, d, r = 3, 16, 2
    linear = 4 * d * d + 3 * d * (8 * d // 3) + 4 * r * 2 * d
    attention = 2 * tokens * d
    assert counted.forward == 2 * 2 * tokens * (linear + attention)


def test_a_model_that_was_saved_predicts_the_same(
    trained: tuple[Mpsl, list[float]], tmp_path: Path
) -> None:
    method, _ = trained
    metrics, model = method.evaluate(), method.deployable()
    model.save(tmp_path, method.experiment, method.splits)
    again, told, _ = deployable.load(tmp_path)
    assert told.model == method.experiment.model
    inputs = method.splits.test.fetch(range(4)).inputs
    assert torch.equal(again(again.to_own(inputs)), model.eval()(model.to_own(inputs)))
    assert again.test(method.tests, 8) == metrics


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    """Of a frozen model the checkpoint has the factors and the head, not the model."""
    chosen = experiment(model=SOFT)
    method = in_one_process(chosen)
    steps_of(method, 2)
    files = method.save(str(tmp_path))
    saved = {name for name, p in method.server.model.named_parameters() if p.requires_grad}
    factors = {f"encoder.{name}" for name in lora_state(method.server.model.encoder)}
    assert saved == factors | {"head.weight", "head.bias"}
    rest = [method.step(step, step) for step in (2, 3)]
    again = in_one_process(chosen)
    again.restore(str(tmp_path), files)
    again.begin_epoch(0, 2)
    assert [again.step(step, step) for step in (2, 3)] == rest


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"checkpoint_blocks": True}},
        {"model": {"train_tokenizers": False}, "wire": {"cache": True, "cache_prefix": True}},
    ],
    ids=["blocks computed again", "frozen prefix kept"],
)
def test_what_saves_memory_or_time_changes_nothing(change: dict[str, Any]) -> None:
    model = SOFT | {"encoder": LM | {"trainable_blocks": 1}} | change.get("model", {})
    plain = in_one_process(experiment(model=model))
    other = in_one_process(experiment(**change | {"model": model}))
    steps = len(plain.plan) + 2  # into the epoch in which the prefix is there already
    assert steps_of(other, steps) == pytest.approx(steps_of(plain, steps), rel=1e-9)


def test_a_client_needs_no_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "transformers.models.llama", "peft", "gguf"):
        monkeypatch.setitem(sys.modules, name, None)
    for model in (SOFT, SOFT | {"head_at": "client"}):
        chosen = experiment(model=model)
        splits = load_data(chosen)
        tokenizers = assembly.build_tokenizers(chosen, splits)
        inputs = splits.train.fetch([0]).inputs
        inputs["image"] = inputs["image"].double()
        assert tokenizers(inputs)[0].shape == (1, 3, 16)
    with pytest.raises(ConfigError, match=r"transformers.*mpsl_dist\[lm\]"):
        assembly.build_server_model(chosen, splits, [3])


def test_a_clients_head_begins_as_the_servers_would() -> None:
    own = experiment(model=SOFT | {"head_at": "client"})
    tokenizers = assembly.build_tokenizers(own, load_data(own))
    chosen = experiment(model=SOFT)
    server = assembly.build_server_model(chosen, load_data(chosen), [3])
    assert torch.equal(tokenizers.head.weight, server.head.weight)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a size of ViT": (SOFT | {"encoder": {"kind": "lm"}}, "encoder.size: Ti is a ViT's"),
    "first token": (SOFT | {"pooling": "cls"}, "model.pooling: a language model's first token"),
    "another norm": (SOFT | {"post_norm": True}, "model.post_norm"),
    "late with a connector": (SOFT | {"fusion": "late"}, "model.fusion: a connector fuses"),
    "odd heads": (
        SOFT | {"encoder": LM | {"width": 6, "heads": 2}},
        "model.encoder.width: 3 a head",
    ),
    "too many blocks": (
        SOFT | {"encoder": {"kind": "lm", "size": "smollm2", "depth": 31}},
        "model.encoder.depth: smollm2 has 1 to 30",
    ),
    "blocks under LoRA": (
        SOFT | {"encoder": LORA | {"trainable_blocks": 1}},
        "model.encoder.trainable_blocks: LoRA freezes",
    ),
    "no layer": (
        SOFT | {"encoder": LM | {"lora": {"rank": 2, "targets": []}}},
        "model.encoder.lora.targets: empty",
    ),
    "alpha alone": (SOFT | {"encoder": LM | {"lora": {"alpha": 2}}}, "model.encoder.lora: only"),
    "width alone": (SOFT | {"connector": {"fused": 8}}, "model.connector: only with"),
    "features": (SOFT | {"connector": {"tokens": 2, "features": 6}}, "6 is no multiple of 4"),
    "LoRA on a ViT": ({"encoder": {"lora": {"rank": 2}}}, "model.encoder.lora only with"),
    "SmolLM2 as a ViT": ({"encoder": {"size": "smollm2"}}, "model.encoder.size: smollm2 only"),
    "a ViT's last token": ({"pooling": "last"}, "model.pooling: last only with"),
    "a connector before a ViT": ({"connector": {"tokens": 2}}, "model.connector only with"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_had_is_refused_by_name(case: str) -> None:
    model, message = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        toys.experiment(model=model)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"encoder": "timm"}}, "weights.encoder: 'timm' is not for"),
        ({"weights": {"encoder": "smollm2"}}, "weights.encoder: 'smollm2' is not for"),
        ({"method": "fedclip"}, "method: fedclip's adapters are for a ViT"),
        ({"server": {"replicas": 2, "shard": True}}, "server.shard: not for a language model"),
        ({"defences": {"nopeek": 0.5}}, "defences.nopeek: acts on tokens of each modality"),
        ({"defences": {"shuffle_patches": True}}, "defences.shuffle_patches: acts on tokens"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        toys.experiment(model=SOFT, **change)
    assert message in str(caught.value)


def test_what_fits_no_data_or_no_layer_is_refused_by_name() -> None:
    pairs = experiment(model=SOFT, data={"name": "toy-pairs"})
    assert refusals_with_data(pairs, load_data(pairs)) == [
        "model.connector.tokens: a connector fuses what retrieval compares; take 0"
    ]
    odd = experiment(model=SOFT | {"encoder": LM | {"lora": {"rank": 2, "targets": ["c_attn"]}}})
    (line,) = refusals_with_data(odd, load_data(odd))
    assert line.startswith("model.encoder.lora.targets: no linear layer c_attn; the layers are")
    with pytest.raises(ConfigError, match=r"model\.connector\.tokens: audit"):
        victim.refuse(odd)
