"""The user's own data: real files of every format, and every mistake said at once."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from media_files import DATA, needs, write_clip, write_csv, write_picture, write_sound

from mpsl_dist import config, data
from mpsl_dist.__main__ import main
from mpsl_dist.actors.holdings import load_data
from mpsl_dist.data import DataError
from mpsl_dist.data.decode.text import tokenize
from mpsl_dist.data.sets import manifest

SMALL = {"image_size": 16, "audio_frames": 20, "text_length": 8}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Pictures, sounds, clips of every format; two classes, three clients; a comma in a text."""
    write_picture(tmp_path / "a.jpg")
    write_picture(tmp_path / "b.png")
    write_sound(tmp_path / "a.wav")
    write_sound(tmp_path / "a.flac", codec="flac")
    write_sound(tmp_path / "a.ogg", codec="libopus", rate=48_000)
    write_sound(tmp_path / "mp3.wav", codec="libmp3lame", container_format="mp3")
    write_clip(tmp_path / "a.mp4")
    write_clip(tmp_path / "a.avi", sound="libmp3lame")
    header = ["Image", "audio", "video", "text", "label", "split", "client", "remark"]
    rows = [
        ["a.jpg", "a.wav", "", "a dog, barking", "dog", "train", "north", "x"],
        ["b.png", "a.flac", "", "a cat", "cat", "train", "south", ""],
        ["a.jpg", "a.ogg", "", "", "dog", "train", "north", ""],
        ["b.png", "mp3.wav", "", "a cat", "cat", "train", "east", ""],
        ["", "", "a.mp4", "a clip", "dog", "train", "east", ""],
        [str(tmp_path / "a.jpg"), "", "", "no sound", "cat", "test", "", ""],
        ["", "", "a.avi", "a clip", "dog", "test", "", ""],
        ["a.jpg", "a.wav", "", "unused", "dog", "val", "south", ""],
    ]
    return write_csv(tmp_path / "manifest.csv", header, rows)


def test_mixed_files(mixed: Path) -> None:
    splits = manifest.load(mixed, **SMALL)
    assert splits.shapes == {"image": (3, 16, 16), "audio": (20, 128), "text": (8,)}
    assert splits.classes == ("cat", "dog")
    assert splits.train.labels.tolist() == [1, 0, 1, 0, 1]
    assert splits.test.labels.tolist() == [0, 1]
    assert splits.train.clients == ("north", "south", "north", "east", "east")
    batch = splits.train.fetch(range(5), seed=1)
    assert batch.inputs["audio"].flatten(1).std(dim=1).min() > 0.1, "a sound that is silent"
    assert batch.inputs["image"].flatten(1).mean(dim=1).min() > 0
    texts = ["a dog, barking", "a cat", "", "a cat", "a clip"]
    assert torch.equal(batch.inputs["text"], tokenize(texts, 8))
    test = splits.test.fetch([0, 1])
    assert not test.inputs["audio"][0].any() and test.inputs["audio"][1].any()
    assert splits.test.present["audio"].tolist() == [False, True]


def test_jsonl_is_the_same(mixed: Path) -> None:
    with mixed.open() as file:
        rows = [{k: v or None for k, v in row.items()} for row in csv.DictReader(file)]
    lines = mixed.with_suffix(".jsonl")
    lines.write_text("\n\n".join(json.dumps(row) for row in rows))
    a, b = manifest.load(mixed, **SMALL), manifest.load(lines, **SMALL)
    assert a.train.samples == b.train.samples and a.classes == b.classes
    assert a.test.clients == b.test.clients == ("", "")
    mixed.unlink()
    assert data.load("manifest", str(mixed.parent)).train.samples == a.train.samples


def test_missing_file_is_told_apart_from_missing_cell(mixed: Path) -> None:
    (mixed.parent / "a.flac").unlink()
    with pytest.raises(DataError, match=r"1 of 5 samples have no file, the first .*a\.flac"):
        manifest.load(mixed, **SMALL)
    with pytest.raises(DataError, match=r"1 of 5 samples .*more than data\.max_missing=0\.01"):
        manifest.load(mixed, on_error="skip", **SMALL)
    splits = manifest.load(mixed, on_error="skip", max_missing=0.2, **SMALL)
    assert len(splits.train.labels) == 4
    assert splits.train.clients == ("north", "north", "east", "east")


def test_every_mistake_at_once(tmp_path: Path) -> None:
    rows = [
        ["", "", "dog", "train"],
        ["a.jpg", "t", "", "train"],
        ["a.jpg", "t", "dog", "tets"],
        ["https://host/a.jpg", "t", "dog", "train"],
    ]
    path = write_csv(tmp_path / "m.csv", ["image", "text", "label", "split"], rows)
    with pytest.raises(DataError) as caught:
        manifest.load(path)
    assert [line.partition("m.csv: ")[2] for line in str(caught.value).split("\n")] == [
        "line 2: neither image, audio, video nor text",
        "line 3: no label",
        "line 4: split 'tets' is neither train nor test (nor val)",
        "line 5: image: 'https://host/a.jpg' is no file but an address",
    ]
    path.write_text("image,text,label\n" + ",,\n" * 30)
    with pytest.raises(DataError, match="and 50 more"):
        manifest.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("image,lable\na.jpg,dog\n", "unknown column 'lable'; did you mean 'label'"),
        ("label,split\ndog,train\n", "none of the columns"),
        ("image\na.jpg\n", "retrieval"),
        ("image,text,label\na.jpg,one, two,dog\n", "line 2: more cells"),
    ],
)
def test_mistakes_of_the_table(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "m.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        manifest.load(path)


def test_mistakes_of_the_place(tmp_path: Path) -> None:
    for root, message in ((None, r"data\.root"), (tmp_path, "one of"), (tmp_path / "x", "No such")):
        with pytest.raises(DataError, match=message):
            manifest.load(root)
    (tmp_path / "m.jsonl").write_text('{"image": "a.jpg"}\n[1]\n')
    with pytest.raises(DataError, match="line 2: expected an object"):
        manifest.load(tmp_path / "m.jsonl")


def test_without_a_split_every_fifth_of_a_class_is_for_testing(tmp_path: Path) -> None:
    rows = [[f"text {n}", n % 2 + 9] for n in range(20)]
    splits = manifest.load(write_csv(tmp_path / "m.csv", ["text", "label"], rows), text_length=8)
    assert splits.classes == ("9", "10") and splits.shapes == {"text": (8,)}
    assert [s.text for s in splits.test.samples] == ["text 8", "text 9", "text 18", "text 19"]
    assert splits.baselines == {"majority": 0.5}


def test_retrieval(tmp_path: Path) -> None:
    for n in range(5):
        write_picture(tmp_path / f"{n}.jpg", 40 + n)
    rows = [[f"{n}.jpg", f"caption {k} of {n}"] for n in range(5) for k in range(2)]
    path = write_csv(tmp_path / "m.csv", ["image", "text"], rows)
    splits = manifest.load(path, image_size=16, text_length=8)
    assert splits.classes == () and splits.train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert splits.test.labels.tolist() == [0, 0]
    assert splits.test.samples[0].text == "caption 0 of 4"


def test_silent_clips_give_pictures_only(tmp_path: Path) -> None:
    for n in range(2):
        write_clip(tmp_path / f"{n}.mp4", sound=None)
    rows = [[f"{n}.mp4", "train" if n == 0 else "test", "a"] for n in range(2)]
    path = write_csv(tmp_path / "m.csv", ["video", "split", "label"], rows)
    assert list(manifest.load(path, image_size=16).shapes) == ["image"]
    with pytest.raises(DataError, match="unknown 'sound'"):
        manifest.load(path, modalities=["sound"])
    with pytest.raises(DataError, match=r"modalities: text needs a column text in .*m\.csv"):
        manifest.load(path, modalities=["image", "text"])


def test_modalities_are_chosen_and_ordered_by_the_experiment(mixed: Path) -> None:
    words = ["data.name=manifest", f"data.root={mixed}", "data.modalities=[text, image]"]
    splits = load_data(config.load(ROOT / "configs/quickstart.yaml", words))
    assert list(splits.shapes) == ["text", "image"]
    assert list(splits.train.fetch([0]).inputs) == ["text", "image"]
    words[2] = "data.modalities=null"
    splits = load_data(config.load(ROOT / "configs/quickstart.yaml", words))
    assert list(splits.shapes) == ["image", "audio", "text"]
    with pytest.raises(DataError, match=r"data\.modalities: digits-qa has no use for it"):
        load_data(config.load(ROOT / "configs/quickstart.yaml", ["data.modalities=[image]"]))


def test_options_that_a_dataset_has_no_use_for_are_errors(mixed: Path) -> None:
    splits = data.load("manifest", mixed, 8, image_size=16, audio_frames=20, cache=None)
    assert splits.shapes["text"] == (8,)
    with pytest.raises(DataError, match=r"data\.audio_frames: coco-qa has no use for it"):
        data.load("coco-qa", mixed, audio_frames=20)


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    content = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    (tmp_path / "manifest.csv").write_text(content.split("```csv\n")[1].split("```")[0])
    for n, suffix in enumerate(("jpg", "png", "jpg"), start=1):
        write_picture(tmp_path / f"photos/{n}.{suffix}")
    write_sound(tmp_path / "calls/1.wav")
    write_sound(tmp_path / "calls/2.mp3", codec="libmp3lame")
    splits = manifest.load(tmp_path, **SMALL)
    assert splits.classes == ("robin", "wren") and splits.train.clients == ("north", "south")
    assert not splits.test.fetch([0]).inputs["audio"].any()


def test_the_experiment_of_the_docs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test_the_example_of_the_docs(tmp_path)
    content = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    (tmp_path / "my.yaml").write_text(content.split("```yaml\n")[1].split("```")[0])
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^python -m mpsl_dist (.* my\.yaml)$", content, re.MULTILINE)
    assert commands == ["data check my.yaml", "partition my.yaml", "train my.yaml"]
    # One process is enough to see that it trains.
    extra = {"train my.yaml": ["method=centralized", "device=cpu", "data.image_size=32"]}
    for command in commands:
        assert main([*command.split(), *extra.get(command, [])]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "2 clients with 1 to 1 samples" in said and "data.audio_frames: 99" in said
    assert "completed: test accuracy" in said


@needs("stamps")
def test_real_stamps(tmp_path: Path) -> None:
    """Real pictures, spoken and written English; the spoken name is the sound."""
    home = DATA / "stamps"
    with (home / "labels.csv").open() as file:
        listed = [
            [home / r["image"], home / r["speech"], r["text"], r["category"]]
            for r in csv.DictReader(file)
        ]
    assert len(listed) == 114
    path = write_csv(tmp_path / "m.csv", ["image", "audio", "text", "label"], listed)
    splits = manifest.load(path, image_size=32, audio_frames=100)
    assert len(splits.train.labels) + len(splits.test.labels) == 114
    batch = splits.test.fetch(range(0, len(splits.test.labels), 2))
    assert batch.inputs["audio"].flatten(1).std(dim=1).min() > 0.1
    assert batch.inputs["image"].isfinite().all()


def _refusal(path: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        manifest.load(path)
    return [line.partition(f"{path.name}: ")[2] for line in str(caught.value).split("\n")]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("path,class", ["unknown column 'path'; did you mean 'image' or 'audio' or 'video'?"]),
        ("image,class,text", ["unknown column 'class'; did you mean 'label'?"]),
        ("filename,caption,label", ["column 'filename'", "column 'caption'; did you mean 'text'?"]),
        ("imgae,text,label", ["unknown column 'imgae'; did you mean 'image'?"]),
        ("image,Label,text,label", ["two columns are called 'label'; keep one"]),
    ],
)
def test_columns_that_are_likely_meant_to_be_ours_are_refused(
    tmp_path: Path, header: str, said: list[str]
) -> None:
    path = tmp_path / "m.csv"
    path.write_text(f"{header}\n{','.join('abcd'[: header.count(',') + 1])}\n")
    lines = _refusal(path)
    assert all(any(expected in line for line in lines) for expected in said), lines


def test_columns_without_a_use_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    header = ["text", "label", "remark", "speaker"]
    rows = [[f"t{n}", "ab"[n % 2], "x", "y"] for n in range(10)]
    notes = manifest.load(write_csv(tmp_path / "m.csv", header, rows)).notes
    assert notes[:2] == (
        "the column 'remark' is not used",
        "the column 'speaker' is not used; did you mean 'client'?",
    )


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_separators_and_encodings_are_recognised(
    tmp_path: Path, delimiter: str, encoding: str
) -> None:
    rows = [["text", "label", "split"], ["ça, va; là|bas", "é", "train"], ["b", "c", "test"]]
    content = "\r\n".join(delimiter.join(f'"{cell}"' for cell in row) for row in rows)
    path = tmp_path / "m.csv"
    path.write_bytes(content.encode(encoding))
    splits = manifest.load(path, text_length=8)
    assert splits.train.samples[0].text == "ça, va; là|bas" and splits.classes == ("c", "é")
    assert ("not UTF-8; read as Windows-1252" in splits.notes) == (encoding == "cp1252")


def test_text_without_its_mark_is_no_riddle(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes("text,label\na,b\n".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"m\.csv: holds zero bytes.*save it as UTF-8"):
        manifest.load(path)
    path.write_bytes(b"\xff\xfet\0e")
    with pytest.raises(DataError, match=r"m\.csv: not valid utf-16"):
        manifest.load(path)


def test_labels_are_texts_as_they_are_written(tmp_path: Path) -> None:
    labels = ["²", "--1", "1", "1.0", "01", "true", "cat", " cat", "Cat", "x"]
    rows = [["t", label, split] for label in labels for split in ("train", "test")]
    path = write_csv(tmp_path / "m.csv", ["text", "label", "split"], rows)
    splits = manifest.load(path, text_length=8)
    assert splits.classes == tuple(sorted(labels))
    assert [note.split(" are")[0] for note in splits.notes] == [
        "the labels ' cat', 'Cat', 'cat'",
        "the labels '01', '1', '1.0', 'true'",
    ]
    lines = [
        f'{{"text": "t", "label": {label}, "split": "{split}"}}'
        for label in ("1", "1.0", "true", "1e0", '"1"')
        for split in ("train", "test")
    ]
    path = path.with_suffix(".jsonl")
    path.write_text("\n".join(lines))
    assert manifest.load(path, text_length=8).classes == ("1", "1.0", "1e0", "true")
    path.write_text('{"text": "t", "label": ["a"]}')
    assert _refusal(path) == ["line 1: label: expected a single text"]
    path.write_text('{"text": "t", "label": "a", "Label": "b"}')
    assert _refusal(path) == ["two columns are called 'label'; keep one"]


def test_numbers_are_sorted_by_their_value(tmp_path: Path) -> None:
    rows = [["t", label, s] for label in ("10", "9", "-2") for s in ("train", "test")]
    path = write_csv(tmp_path / "m.csv", ["text", "label", "split"], rows)
    assert manifest.load(path, text_length=8).classes == ("-2", "9", "10")
