"""What a manifest does not say is decided from all of its rows, and said."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from media_files import write_clip, write_csv, write_picture, write_sound

from mpsl_dist.actors import deployable
from mpsl_dist.actors.holdings import load_data
from mpsl_dist.actors.local_data import TestData
from mpsl_dist.data import DataError, Splits
from mpsl_dist.data.sets import manifest


def test_modalities_follow_every_clip_and_not_the_first(tmp_path: Path) -> None:
    """The order of the rows decides nothing: a silent first clip does not take the sound away."""
    write_clip(tmp_path / "silent.mp4", sound=None)
    write_clip(tmp_path / "loud.mp4")
    rows = [["silent.mp4", "train", "a"], ["loud.mp4", "train", "b"], ["loud.mp4", "test", "a"]]
    header = ["video", "split", "label"]
    for order in (rows, rows[::-1]):
        path = write_csv(tmp_path / "m.csv", header, order)
        splits = manifest.load(path, image_size=16, audio_frames=20)
        assert list(splits.shapes) == ["image", "audio"]
    path = write_csv(tmp_path / "m.csv", header, [rows[0], ["silent.mp4", "test", "a"]])
    splits = manifest.load(path, image_size=16)
    assert list(splits.shapes) == ["image"]
    assert "no audio: none of the 1 clips has a sound track" in splits.notes


def test_a_clip_may_be_declared_to_have_no_sound(tmp_path: Path) -> None:
    write_clip(tmp_path / "silent.mp4", sound=None)
    write_clip(tmp_path / "loud.mp4")
    rows = [["loud.mp4", "", "train", "a"], ["loud.mp4", "None", "train", "a"]]
    rows += [["silent.mp4", "none", "test", "a"], ["loud.mp4", "", "test", "a"]]
    path = write_csv(tmp_path / "m.csv", ["video", "audio", "split", "label"], rows)
    splits = manifest.load(path, image_size=16, audio_frames=20)
    assert [(s.audio, s.silent) for s in splits.train.samples] == [(None, False), (None, True)]
    assert splits.test.present["audio"].tolist() == [False, True]
    for part, silent in ((splits.train, 1), (splits.test, 0)):
        sounds = part.fetch([0, 1]).inputs["audio"]
        assert not sounds[silent].any() and sounds[1 - silent].any()
    path = write_csv(tmp_path / "m.csv", ["audio", "label"], [["none", "a"]])
    with pytest.raises(DataError, match="line 2: neither image, audio, video nor text"):
        manifest.load(path)


@pytest.mark.parametrize(("seconds", "frames"), [(0.5, 49), (0.1, 32), (12.0, 1024)])
def test_spectrograms_are_as_long_as_the_sounds(
    tmp_path: Path, seconds: float, frames: int
) -> None:
    write_sound(tmp_path / "short.wav", 0.1)
    write_sound(tmp_path / "long.wav", seconds)
    rows = [
        [f"{name}.wav", split, "a"] for name in ("short", "long") for split in ("train", "test")
    ]
    path = write_csv(tmp_path / "m.csv", ["audio", "split", "label"], rows)
    splits = manifest.load(path)
    assert splits.shapes == {"audio": (frames, 128)}
    (note,) = splits.notes
    assert note.startswith(f"data.audio_frames: {frames:,}, as the longest of 4 sounds")
    assert note.endswith("more is cut off") == (seconds > 11)
    assert manifest.load(path, audio_frames=20).shapes == {"audio": (20, 128)}


def _default_split(folder: Path, header: list[str], rows: list[list[object]]) -> Splits:
    for row in rows:
        if header[0] == "image" and not (folder / str(row[0])).exists():
            write_picture(folder / str(row[0]), size=(4, 4))
    splits = manifest.load(write_csv(folder / "m.csv", header, rows), image_size=8, text_length=8)
    assert any(note.startswith("no column split") for note in splits.notes)
    return splits


def test_the_default_split_is_a_fifth_of_everything_however_small_the_classes(
    tmp_path: Path,
) -> None:
    rows = [[f"text {n}", f"class {n // 3}"] for n in range(300)]
    splits = _default_split(tmp_path, ["text", "label"], rows)
    assert len(splits.test.labels) == 60
    assert torch.bincount(splits.train.labels, minlength=100).min() >= 1
    assert splits.notes[-1].endswith(
        "no column split: every fifth row of every label is for testing, 60 of 300; rows of one "
        "picture, clip or sound stay together"
    )
    again = _default_split(tmp_path, ["text", "label"], rows)
    assert again.test.samples == splits.test.samples


def test_the_only_row_of_a_class_stays_in_training(tmp_path: Path) -> None:
    rows = [[f"a {n}", "common"] for n in range(20)] + [[f"b {n}", f"rare {n}"] for n in range(20)]
    splits = _default_split(tmp_path, ["text", "label"], rows)
    assert torch.bincount(splits.train.labels, minlength=21).min() >= 1
    assert {splits.classes[k] for k in splits.test.labels} == {"common"}
    assert len(splits.test.labels) <= 8


def test_the_default_split_keeps_a_picture_and_a_client_where_they_belong(tmp_path: Path) -> None:
    """All rows of a picture are in one split; every client keeps four fifths of its rows."""
    rows = [[f"{n // 4}.png", f"question {n}", "ab"[n % 2], f"site {n // 100}"] for n in range(400)]
    splits = _default_split(tmp_path, ["image", "text", "label", "client"], rows)
    pictures = [{s.image for s in part.samples} for part in (splits.train, splits.test)]
    assert len(pictures[0]) == 80 and len(pictures[1]) == 20 and not pictures[0] & pictures[1]
    assert {name: splits.train.clients.count(name) for name in set(splits.train.clients)} == {
        f"site {n}": 80 for n in range(4)
    }


def test_pictures_with_many_rows_and_with_one_make_a_fifth_together() -> None:
    sizes = np.random.default_rng(0).integers(1, 9, size=200)
    things = np.repeat(np.arange(200), sizes)
    labels = np.arange(len(things)) % 3
    chosen = manifest.a_fifth(things, labels, np.zeros_like(things))
    assert abs(chosen.sum() - len(things) / 5) <= 8
    assert all(len(set(chosen[things == thing])) == 1 for thing in range(200))


def test_too_few_rows_for_a_split_are_refused_by_name(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "m.csv", ["text", "label"], [["t", "a"], ["u", "a"], ["v", "b"]])
    with pytest.raises(DataError, match=r"m\.csv: 3 rows are too few .*; add a column split"):
        manifest.load(path)


def test_the_index_of_many_rows_is_small(tmp_path: Path) -> None:
    """Every process of a run keeps it: 100 bytes a row, where Python objects took 400."""
    rows = 4_000
    with (tmp_path / "m.csv").open("w") as file:
        file.write("image,text,label,split,client\n")
        for n in range(rows):
            split = "test" if n % 5 == 0 else "train"
            file.write(f"photos/{n:08}.jpg,a robin on a post near the old river {n},c{n % 9},")
            file.write(f"{split},site {n % 25}\n")
    (tmp_path / "photos").mkdir()
    for n in range(rows):
        (tmp_path / f"photos/{n:08}.jpg").touch()
    manifest.load(
        write_csv(
            tmp_path / "s.csv",
            ["text", "label", "split"],
            [["a", "b", "train"], ["a", "b", "test"]],
        )
    )
    gc.collect()
    tracemalloc.start()
    try:
        splits = manifest.load(tmp_path / "m.csv")
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(splits.train.labels) == 3_200
    assert kept < 150 * rows and peak < 450 * rows


def test_a_trained_model_is_given_what_its_data_decided(tmp_path: Path) -> None:
    """Other recordings, shorter ones and clips among them, are read as the model was built for."""
    header = ["audio", "video", "label", "split"]
    rows = [["a.wav", "", "x", "train"], ["a.wav", "", "y", "test"]]
    for name, seconds in (("then", 0.5), ("now", 0.3)):
        write_sound(tmp_path / name / "a.wav", seconds)
        write_csv(tmp_path / name / "manifest.csv", header, rows)
    write_clip(tmp_path / "now/b.mp4")
    write_csv(tmp_path / "now/manifest.csv", header, [*rows, ["", "b.mp4", "x", "test"]])
    chosen = toys.experiment(data={"name": "manifest", "root": str(tmp_path / "then")})
    splits = load_data(chosen)
    deployable.build(chosen, splits).save(tmp_path / "model", chosen, splits)
    words = [f"data.root={tmp_path / 'now'}"]
    model, experiment, _ = deployable.load(tmp_path / "model", words)
    again = load_data(experiment)
    assert again.shapes == splits.shapes == {"audio": (49, 128)}
    assert "accuracy" in model.test(TestData(again.test), 4)
