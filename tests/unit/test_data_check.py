"""The account of what is there of a dataset."""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path

import pytest
from media_files import make_coco_qa, make_kinetics_sounds, make_meld, write_clip, write_csv

from mpsl_dist.data import DataError
from mpsl_dist.data.catalog import DATASETS
from mpsl_dist.data.fetch.check import check


def test_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = check("coco-qa", make_coco_qa(tmp_path))
    assert report.usable and report.samples == {"train": 12, "test": 4}
    assert report.classes == {"answer0": (4, 2), "answer1": (4, 1), "answer2": (4, 1)}
    assert report.shapes == {"image": (3, 224, 224), "text": (77,)} and report.decoded == 8
    assert "  answer0: 4 / 2\n" in str(report) and "  image: 3 x 224 x 224\n" in str(report)
    assert "train: 12 samples of 78,736 in the whole dataset" in str(report)
    assert not report.complete and "official place" in str(report)
    facts = dataclasses.replace(DATASETS["coco-qa"], samples=(12, 4))
    monkeypatch.setitem(DATASETS, "coco-qa", facts)
    report = check("coco-qa", tmp_path)
    assert report.complete and "official place" not in str(report)


def test_missing_and_damaged_are_named(tmp_path: Path) -> None:
    pictures = make_coco_qa(tmp_path) / "ms-coco/train2014"
    (pictures / "COCO_train2014_000000000101.jpg").unlink()
    (pictures / "COCO_train2014_000000000103.jpg").write_bytes(b"damaged")
    report = check("coco-qa", tmp_path, workers=2)
    assert report.usable and not report.complete
    assert [Path(path).name for path in report.missing] == ["COCO_train2014_000000000101.jpg"]
    assert [Path(path).name for path in report.damaged] == ["COCO_train2014_000000000103.jpg"]
    assert report.samples == {"train": 10, "test": 4}
    said = str(report)
    assert "cs.toronto.edu" in said and "cocoqa-2015-05-17.zip" in said
    assert "missing: 1 files" in said and "000000000103.jpg: cannot be read" in said
    quick = check("coco-qa", tmp_path, decode=False)
    assert not quick.damaged and quick.decoded == 0
    assert check("coco-qa", tmp_path, limit=3).decoded == 3


def test_nothing_there(tmp_path: Path) -> None:
    report = check("t4sa", tmp_path)
    assert not report.usable and "b-t4sa: no such folder" in report.problem
    assert "ask for access at t4sa.it" in str(report)
    assert "data.root" in check("meld", None).problem
    with pytest.raises(DataError, match="built in"):
        check("digits-qa", None)


def test_clips_without_a_track_are_found(tmp_path: Path) -> None:
    make_kinetics_sounds(tmp_path, ["bowling"])
    write_clip(tmp_path / "kinetics-sounds/bowling/clip2_000001_000011.mp4", sound=None)
    report = check("kinetics-sounds", tmp_path)
    (reason,) = report.damaged.values()
    assert reason.endswith("clip2_000001_000011.mp4: no sound track")
    make_meld(tmp_path, 1, 1, 1)
    (tmp_path / "meld/train_splits/dia0_utt1.mp4").write_bytes(b"")
    report = check("meld", tmp_path)
    assert report.decoded == 3 and "the file is empty" in str(report)


def test_a_clip_that_is_declared_silent_is_not_damaged(tmp_path: Path) -> None:
    write_clip(tmp_path / "loud.mp4")
    write_clip(tmp_path / "silent.mp4", sound=None)
    rows = [["loud.mp4", "", "train", "a"], ["silent.mp4", "none", "test", "a"]]
    header = ["video", "audio", "split", "label"]
    report = check("manifest", write_csv(tmp_path / "m.csv", header, rows), image_size=8)
    assert report.decoded == 2 and not report.damaged and report.lacking["audio"] == 1
    assert "audio: 199 x 128, 1 samples have none" in str(report)
    report = check(
        "manifest",
        write_csv(
            tmp_path / "m.csv",
            header,
            [[*rows[0]], [*rows[0]], ["silent.mp4", "", "test", "a"], rows[1]],
        ),
        image_size=8,
    )
    (reason,) = report.damaged.values()
    assert reason.endswith("silent.mp4: no sound track")


def test_long_lists_are_cut(tmp_path: Path) -> None:
    rows = [[f"{n}.jpg", "a", "train" if n else "test"] for n in range(30)]
    path = write_csv(tmp_path / "m.csv", ["image", "label", "split"], rows)
    for n in (0, 1):
        (tmp_path / f"{n}.jpg").write_bytes(gzip.compress(b"x"))
    report = check("manifest", path)
    assert len(report.missing) == 28 and len(report.damaged) == 2
    assert "… and 18 more" in str(report)
