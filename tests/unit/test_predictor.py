"""A trained model in other hands: raw things in, named classes out, the run's own numbers."""

from __future__ import annotations

import csv
import json
import wave
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import media_files
import numpy as np
import pytest
import torch
import toys
from local_fleet import in_one_process, steps_of
from PIL import Image
from torch import Tensor

from mpsl_dist.__main__ import main
from mpsl_dist.actors import deployable, holdings, predictor
from mpsl_dist.config import from_dict, to_dict
from mpsl_dist.data.decode import samples
from mpsl_dist.data.decode.samples import Sample
from mpsl_dist.data.sets import mnist_fsdd
from mpsl_dist.errors import ConfigError, DataError, RunError, UserError
from mpsl_dist.methods import loop, testing
from mpsl_dist.records.run_directory import RunDirectory, environment_of
from mpsl_dist.runtime.process import StopRequest

QUESTION = "is it even?"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run on digits-qa with all its clients in this process, and what its last test computed."""
    output = tmp_path_factory.mktemp("runs")
    chosen = toys.experiment(
        name="digits",
        output=str(output),
        clients=3,
        data={"name": "digits-qa", "text_length": 10},
        training={"epochs": 1, "batch_size": 1_000, "evaluate_own": True},
    )
    method = in_one_process(chosen)
    directory = RunDirectory(chosen.run_directory)
    directory.open(to_dict(chosen), resume=False, overwrite=False)
    tested: list[tuple[dict[str, Tensor], Tensor]] = []
    score = deployable.Deployable.score

    def seen(self: deployable.Deployable, batch: Any) -> int:
        tested.append((dict(batch.inputs), self._predict(batch)))
        return score(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deployable.Deployable, "score", seen)
        loop.train(chosen, method.splits, method, directory, StopRequest())
    directory.write_json("environment", environment_of(1, {}, {}))
    return SimpleNamespace(path=directory.path, splits=method.splits, tested=tested, method=method)


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory, run: SimpleNamespace) -> SimpleNamespace:
    """A picture of the test set as a file, and as what it was made of."""
    batch = run.splits.test.fetch([7])
    levels = (batch.inputs["image"][0, 0] + 1) * 8
    pixels = (levels * 255 / 16).round().to(torch.uint8)
    path = tmp_path_factory.mktemp("pictures") / "digit.png"
    Image.fromarray(pixels.numpy()).save(path)
    return SimpleNamespace(path=path, pixels=pixels, input=batch.inputs["image"][0])


def test_predictions_are_the_runs_own_bit_for_bit(run: SimpleNamespace) -> None:
    """Every batch of the run's test: with the average, then with each client's own tokenizers."""
    models = [predictor.load(run.path), *(predictor.load(run.path, client=k) for k in range(3))]
    test = run.splits.test
    assert len(run.tested) == 4 * -(-len(test.labels) // 256)
    for place, (inputs, logits_bk) in enumerate(run.tested):
        with torch.no_grad():
            assert torch.equal(models[place % 4](inputs), logits_bk)
    told = RunDirectory(run.path).summary()["test"]
    classes, everything = run.splits.classes, dict(test.inputs)
    answers = [model.predict(**everything) for model in models]
    for one, logits_bk in zip(answers, [logits_bk for _, logits_bk in run.tested], strict=False):
        assert [*one[0].probabilities.values()] == logits_bk[0].double().softmax(0).tolist()
        assert tuple(one[0].probabilities) == classes
    right = [
        [one.label == classes[label] for one, label in zip(found, test.labels, strict=True)]
        for found in answers
    ]
    accuracies = [sum(each) / len(each) for each in right]
    assert accuracies[0] == told["accuracy"]
    assert max(accuracies[1:]) == told["accuracy_own_max"]
    assert min(accuracies[1:]) == told["accuracy_own_min"] < told["accuracy_own_max"]


def test_predictions_are_those_of_split_learning_bit_for_bit(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where clients hold the test set: tokens of all, one encoder pass, each its slice."""
    chosen = from_dict(to_dict(run.method.experiment) | {"name": "apart"})
    chosen = replace(chosen, data=replace(chosen.data, test_at="clients"))
    method = in_one_process(chosen)
    steps_of(method, 2)
    clients = method.clients.references
    batches: list[dict[int, Tensor]] = []
    asked = type(method.clients).score

    def seen(self: Any, batch: int, predictions: dict[int, Tensor], own: bool = False) -> Any:
        batches.append({n: p.clone() for n, p in predictions.items()})
        inputs.append({n: clients[n].test_data.batch(batch).inputs for n in predictions})
        return asked(self, batch, predictions, own=own)

    inputs: list[dict[int, Any]] = []
    monkeypatch.setattr(type(method.clients), "score", seen)
    testing.evaluate(method)
    method.deployable().save(run.path.parent / "apart" / "model", chosen, method.splits)
    model = predictor.load(run.path.parent / "apart")
    assert model.reader.view == predictor.load(run.path).reader.view
    for given, predictions in list(zip(inputs, batches, strict=True))[::2]:
        joined = {name: torch.cat([given[n][name] for n in given]) for name in model.modalities}
        with torch.no_grad():
            assert torch.equal(model(joined), torch.cat([predictions[n] for n in given]))


def test_a_file_a_picture_pixels_and_a_prepared_tensor_are_one(
    run: SimpleNamespace, digit: SimpleNamespace
) -> None:
    model = predictor.load(run.path)
    tokens = model.inputs(image=digit.path, text=QUESTION)["text"][0]
    picture = Image.open(digit.path)
    forms = [str(digit.path), digit.path, picture, picture.convert("RGBA"), digit.pixels]
    forms += [digit.pixels.numpy(), np.stack([digit.pixels] * 3, axis=2), digit.input]
    forms += [digit.input.numpy()]
    first = model.predict(image=forms[0], text=QUESTION)
    assert sum(first.probabilities.values()) == pytest.approx(1)
    assert first.label == max(first.probabilities, key=first.probabilities.__getitem__)
    assert first.probability == first.probabilities[first.label]
    for form in forms:
        assert torch.equal(model.inputs(image=form, text=QUESTION)["image"][0], digit.input)
        assert model.predict(image=form, text=tokens) == first


def test_several_are_one_after_the_other_and_one_serves_all(
    run: SimpleNamespace, digit: SimpleNamespace
) -> None:
    model = predictor.load(run.path, "training.test_batch_size=2")
    texts = [QUESTION, "is it odd?", "how far from nine?"]
    found = model.predict(image=digit.path, text=texts)
    alone = [model.predict(image=digit.path, text=text) for text in texts]
    for one, other in zip(found, alone, strict=True):
        assert one.label == other.label
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)
    assert model.predict(image=[digit.path], text=QUESTION) == [alone[0]]


def manifest_model(folder: Path, rows: list[list[str]], header: list[str]) -> Any:
    """An untrained model on a manifest, saved and loaded, beside the splits of the manifest."""
    path = media_files.write_csv(folder / "manifest.csv", header, rows)
    chosen = from_dict(
        to_dict(toys.experiment())
        | {"data": {"name": "manifest", "root": str(path), "image_size": 32, "text_length": 8}}
    )
    splits = holdings.load_data(chosen)
    deployable.build(chosen, splits).save(folder / "model", chosen, splits)
    return predictor.load(folder), splits


def test_colours_sounds_and_texts_become_what_the_manifest_makes_of_them(tmp_path: Path) -> None:
    rows = []
    for number in range(4):
        media_files.write_picture(tmp_path / f"{number}.png", 60 * number + 30)
        media_files.write_sound(tmp_path / f"{number}.wav", 0.6 + number / 10, rate=22_050)
        split = "test" if number % 2 else "train"
        rows.append([f"{number}.png", f"{number}.wav", f"text {number}", f"l{number % 2}", split])
    model, splits = manifest_model(tmp_path, rows, ["image", "audio", "text", "label", "split"])
    wanted = splits.test.fetch([0]).inputs
    files = {"image": tmp_path / "1.png", "audio": tmp_path / "1.wav", "text": "text 1"}
    with wave.open(str(files["audio"])) as file:
        numbers = np.frombuffer(file.readframes(10**6), "<i2").astype(np.float32) / 32_768
    given = {"image": Image.open(files["image"]), "audio": (numbers, 22_050), "text": "text 1"}
    for things in (files, given):
        inputs = model.inputs(**things)
        assert inputs.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(inputs[name], value), name


def test_a_clip_stands_for_its_picture_and_its_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for number in range(4):
        media_files.write_clip(tmp_path / f"{number}.mp4", 1.0 + number / 10)
        rows.append([f"{number}.mp4", f"l{number % 2}", "test" if number % 2 else "train"])
    model, splits = manifest_model(tmp_path, rows, ["video", "label", "split"])
    wanted = splits.test.fetch([0]).inputs
    inputs = model.inputs(video=tmp_path / "1.mp4")
    assert {name: torch.equal(inputs[name], x) for name, x in wanted.items()} == {
        "image": True,
        "audio": True,
    }
    other = media_files.write_picture(tmp_path / "own.png")
    assert not torch.equal(
        model.inputs(video=tmp_path / "1.mp4", image=other)["image"], wanted["image"]
    )
    silent = torch.zeros(model.reader.shapes["audio"])
    answer = model.predict(video=tmp_path / "1.mp4", audio=silent)
    table = media_files.write_csv(tmp_path / "in.csv", ["video", "audio"], [["1.mp4", "none"]])
    capsys.readouterr()
    assert main(["predict", str(tmp_path), "--csv", str(table)]) == 0
    assert repr(answer.probability) in capsys.readouterr().out


def test_a_spoken_digit_is_heard_as_the_dataset_heard_it(tmp_path: Path) -> None:
    """Its recordings have 8,000 samples a second, and its loader a resampler of its own."""
    generator, paths = np.random.default_rng(0), []
    for take, length in enumerate((2_400, 9_000)):
        paths.append(tmp_path / f"1_anna_{take}.wav")
        with wave.open(str(paths[-1]), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(generator.integers(-3000, 3000, length).astype("<i2").tobytes())
    view = mnist_fsdd.view_of(64, "kaldi")
    heard = mnist_fsdd._spectrograms(paths, 64, "kaldi")
    for path, wanted in zip(paths, heard, strict=True):
        assert torch.equal(samples.read(Sample(audio=str(path)), view, None)["audio"], wanted)
        waveform, rate = mnist_fsdd._read_wave(path)[1], 8_000
        assert torch.equal(samples.sound(waveform, view, rate), wanted)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"image": "a.png"}, "text: not given, and the model takes image and text"),
        ({}, "image: not given, and the model takes image and text\ntext: not given"),
        ({"image": "a", "text": "b", "audio": "c"}, "audio: the model takes image and text, no a"),
        ({"image": "a", "text": "b", "video": "c"}, "for which no clip is needed; leave it out"),
        ({"image": "gone.png", "text": "a"}, "gone.png: no such file"),
        ({"image": ["1.png", "2.png"], "text": "a"}, "1.png: no such file\n2.png: no such file"),
        ({"image": ["a", "b"], "text": ["c"] * 3}, "image: 2, text: 3 are given; give as many"),
        ({"image": [], "text": "a"}, "image: an empty list"),
        ({"image": 3, "text": 4}, "image: expected a file, .*; found int\ntext: expected a text"),
        ({"image": torch.zeros(1, 9, 9), "text": "a"}, r"tensor \(1, 8, 8\); found float32 \(1, 9"),
        ({"image": torch.full((1, 8, 8), torch.nan), "text": "a"}, "image: holds numbers that are"),
    ],
)
def test_what_is_missing_or_too_much_or_unreadable_is_named(
    run: SimpleNamespace, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"(?s){message}"):
        predictor.load(run.path).predict(**given)


def test_a_retrieval_model_ranks_as_the_runs_test_did(tmp_path: Path) -> None:
    chosen = toys.experiment(data={"name": "toy-pairs"})
    splits = toys.load_pairs()
    whole = deployable.build(chosen, splits)
    whole.save(tmp_path / "model", chosen, splits)
    model = predictor.load(tmp_path)
    inputs = splits.test.fetch(range(20)).inputs
    pairs_b2d = whole._predict(splits.test.fetch(range(20)))
    similar_nm = model.similarity(image=inputs["image"][:7], text=inputs["text"])
    torch.testing.assert_close(similar_nm, pairs_b2d[:7, 0] @ pairs_b2d[:, 1].T)
    with pytest.raises(ConfigError, match="a retrieval model: use similarity"):
        model.predict(image=inputs["image"], text=inputs["text"])
    with pytest.raises(DataError, match="text: .* does not say how a text becomes an input"):
        model.similarity(image=inputs["image"], text="two owls")


def test_a_model_of_an_older_version_takes_prepared_tensors_and_says_why(
    run: SimpleNamespace, digit: SimpleNamespace, tmp_path: Path
) -> None:
    description = json.loads((run.path / "model" / "config.json").read_text())
    assert description.pop("view")["levels"] == 17
    (tmp_path / "config.json").write_text(json.dumps(description))
    (tmp_path / "model.safetensors").hardlink_to(run.path / "model" / "model.safetensors")
    model = predictor.load(tmp_path)
    tokens = torch.zeros(10, dtype=torch.long)
    assert model.predict(image=digit.input, text=tokens) == predictor.load(run.path).predict(
        image=digit.path, text=tokens
    )
    with pytest.raises(DataError, match=r"config\.json does not say how a picture becomes an inpu"):
        model.predict(image=digit.path, text=tokens)


@pytest.mark.parametrize(
    "path, client, message",
    [
        ("", 3, "client=3: the run has the clients 0 to 2"),
        ("gone", None, "gone: no such folder; name a run directory"),
        ("checkpoints", None, "no model/ and no config.json there"),
    ],
)
def test_models_and_clients_that_are_not_there_are_named(
    run: SimpleNamespace, path: str, client: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        predictor.load(run.path / path, client=client)


# -- the commands ----------------------------------------------------------------------------------


def test_predict_names_the_likely_classes(
    run: SimpleNamespace, digit: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--image", str(digit.path), "--text", QUESTION]
    assert main(["predict", str(run.path), *words]) == 0
    first = capsys.readouterr().out.splitlines()
    wanted = predictor.load(run.path).predict(image=digit.path, text=QUESTION)
    assert len(first) == 5 and first[0] == f"{wanted.label} {wanted.probability:.4f}"
    assert main(["predict", str(run.path), *words, "--text", "is it odd?", "device=cpu"]) == 0
    two = capsys.readouterr().out.splitlines()
    assert len(two) == 2 and two[1].endswith("is it odd?")
    assert main(["predict", str(run.path), "--image", str(digit.path)]) == 2
    assert capsys.readouterr().err.startswith("error: text: not given")
    assert main(["predict", str(run.path), *words, "--csv", "a.csv"]) == 2
    assert main(["predict", str(run.path)]) == 2


def test_a_table_names_bad_rows_and_predicts_the_others(
    run: SimpleNamespace, digit: SimpleNamespace, tmp_path: Path, capsys
) -> None:
    rows = [
        ["7", digit.path, QUESTION, "yes"],
        ["8", "gone.png", QUESTION, "no"],
        ["9", digit.path, "", "no"],
        ["10", digit.path, "is it odd?", "no", "more"],
        ["11", digit.path, "is it odd?", "no"],
    ]
    table = media_files.write_csv(tmp_path / "in.csv", ["id", "image", "text", "label"], rows)
    out = tmp_path / "out.csv"
    assert main(["predict", str(run.path), "--csv", str(table), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"error: {table}: line 3: {tmp_path / 'gone.png'}: no such file" in said
    assert f"error: {table}: line 4: text: not given" in said
    assert f"error: {table}: line 5: more cells than the header has" in said
    assert f"error: {table}: 3 of 5 rows could not be predicted" in said
    with out.open() as file:
        found = list(csv.DictReader(file))
    assert [row["id"] for row in found] == ["7", "8", "9", "10", "11"]
    assert [bool(row["error"]) for row in found] == [False, True, True, True, False]
    texts = [QUESTION, "is it odd?"]
    wanted = predictor.load(run.path).predict(image=digit.path, text=texts)
    good = [(row["prediction"], row["probability"]) for row in found if not row["error"]]
    assert good == [(one.label, repr(one.probability)) for one in wanted]
    assert main(["predict", str(run.path), "--csv", str(table), "--out", str(out)]) == 2
    assert "exists; replace it with --overwrite" in capsys.readouterr().err


def test_a_table_of_json_lines_of_good_rows_is_a_success(
    run: SimpleNamespace, digit: SimpleNamespace, tmp_path: Path, capsys
) -> None:
    table = tmp_path / "in.jsonl"
    row = {"text": QUESTION, "image": str(digit.path), "audio": "a.wav"}
    table.write_text(json.dumps(row) + "\n")
    assert main(["predict", str(run.path), "--csv", str(table)]) == 0
    told = capsys.readouterr()
    assert "the column 'audio' is not used: the model takes image and text" in told.err
    assert told.out.splitlines()[0] == "text,image,audio,prediction,probability,error"
    for line, status in (("{}", 2), ('{"text": ', 2)):
        table.write_text(json.dumps(row) + f"\n{line}\n")
        assert main(["predict", str(run.path), "--csv", str(table)]) == status
        assert f"{table}: line 2: " in capsys.readouterr().err
    table.write_text('{"photo": "a.png"}\n')
    assert main(["predict", str(run.path), "--csv", str(table)]) == 2
    assert "none of the columns image, audio, video, text; there: 'pho" in capsys.readouterr().err


def test_a_retrieval_model_ranks_texts_for_pictures_and_scores_the_pairs_of_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["an owl", "a red barn", "two boats", "rain"]
    rows = []
    for number, text in enumerate(texts):
        media_files.write_picture(tmp_path / f"{number}.png", 60 * number + 30)
        rows.append([f"{number}.png", text, "test" if number % 2 else "train"])
    model, _ = manifest_model(tmp_path, rows, ["image", "text", "split"])
    pictures = [str(tmp_path / f"{number}.png") for number in range(2)]
    similar_nm = model.similarity(image=pictures, text=texts)
    assert similar_nm.shape == (2, 4)
    capsys.readouterr()
    words = [word for text in texts for word in ("--text", text)]
    given = [word for picture in pictures for word in ("--image", picture)]
    assert main(["predict", str(tmp_path), *given, *words]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    for place, picture in enumerate(pictures):
        order = similar_nm[place].argsort(descending=True).tolist()
        assert [text for _, name, text in lines if name == picture] == [texts[n] for n in order]
    assert main(["predict", str(tmp_path), "--csv", str(tmp_path / "manifest.csv")]) == 0
    found = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    own = [float(row["similarity"]) for row in found]
    assert own[:2] == pytest.approx(similar_nm.diagonal().tolist(), abs=1e-5)
    assert main(["predict", str(tmp_path), *given[:2]]) == 2
    assert "error: text: not given, and the model takes image and text" in capsys.readouterr().err


@pytest.fixture
def hub(run: SimpleNamespace, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "hub"
    line = ["export", str(run.path), "--to", str(folder), "--license", "cc-by-4.0"]
    assert main(line) == 0
    yield folder


def test_an_exported_model_predicts_the_same_and_names_no_place(
    run: SimpleNamespace, digit: SimpleNamespace, hub: Path, tmp_path: Path
) -> None:
    given = {"image": digit.path, "text": QUESTION}
    assert predictor.load(hub).predict(**given) == predictor.load(run.path).predict(**given)
    assert str(run.path.parent) not in (hub / "config.json").read_text()
    assert main(["export", str(run.path), "--to", str(tmp_path / "own"), "--client", "1"]) == 0
    own = predictor.load(tmp_path / "own").predict(**given)
    assert own == predictor.load(run.path, client=1).predict(**given)
    assert own != predictor.load(hub).predict(**given)
    assert "model-index" not in (tmp_path / "own" / "README.md").read_text()


def test_the_card_is_one_that_the_hub_reads_with_the_runs_figures(
    run: SimpleNamespace, hub: Path
) -> None:
    from huggingface_hub import ModelCard

    card, told = ModelCard.load(hub / "README.md"), RunDirectory(run.path).summary()
    assert card.data.license == "cc-by-4.0" and "mpsl" in card.data.tags
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == told["test"]
    assert f"| test accuracy | {told['test']['accuracy']:.4f} |" in card.text
    for part in ("5768 samples", "3 clients, Dir(0.5)", "arXiv 2502.06355", "torch 2.", "Privacy"):
        assert part in card.text


def test_an_export_is_never_written_over_unasked(run: SimpleNamespace, hub: Path, capsys) -> None:
    line = ["export", str(run.path), "--to"]
    assert main([*line, str(hub)]) == 2
    assert "holds files; replace them with --overwrite" in capsys.readouterr().err
    assert main([*line, str(hub), "--overwrite"]) == 0
    assert main([*line, str(run.path / "model"), "--overwrite"]) == 2
    assert "is the run's own model" in capsys.readouterr().err
    assert main(["export", str(hub), "--to", str(hub / "again")]) == 2
    assert "the card is filled from the run; export from its directory" in capsys.readouterr().err


def test_a_clients_part_of_another_step_than_the_model_is_refused(
    run: SimpleNamespace, tmp_path: Path
) -> None:
    for name in ("config.yaml", "model", "checkpoints"):
        (tmp_path / name).symlink_to(run.path / name)
    summary = RunDirectory(run.path).summary()
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"steps_completed": 1}))
    with pytest.raises(RunError, match="client=0: .* is not of the step"):
        predictor.load(tmp_path, client=0)
