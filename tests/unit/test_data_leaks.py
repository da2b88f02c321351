"""Warnings of what splits share, of duplicates, and of classes that one split alone has."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from media_files import make_karpathy, write_csv, write_picture

from mpsl_dist import data
from mpsl_dist.data.fetch import leaks


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures of different contents."""
    for n in range(6):
        write_picture(tmp_path / f"{n}.png", 30 + 10 * n, size=(8, 8))
    return tmp_path


def _warnings(folder: Path, rows: list[list[str]], **options: bool) -> list[str]:
    path = write_csv(folder / "m.csv", ["image", "text", "label", "split"], rows)
    return leaks.warnings(data.load("manifest", path, 8, image_size=8), **options)


SOUND = [
    ["0.png", "s", "a", "train"],
    ["1.png", "t", "b", "train"],
    ["2.png", "u", "a", "test"],
    ["3.png", "v", "b", "test"],
]


def test_sound_splits_give_no_warning(pictures: Path) -> None:
    assert _warnings(pictures, SOUND) == []


def test_a_file_in_both_splits_is_a_leak(pictures: Path) -> None:
    (line,) = _warnings(pictures, [*SOUND, ["0.png", "another", "a", "test"]])
    assert line.startswith(f"leak: 1 file ({pictures}/0.png) in both train and test")


def test_the_same_content_under_another_name_is_a_leak(pictures: Path) -> None:
    shutil.copy(pictures / "0.png", pictures / "copy.png")
    rows = [*SOUND, ["copy.png", "another", "a", "test"]]
    (line,) = _warnings(pictures, rows)
    assert line.startswith("leak: 1 contents under several names, in both train and test")
    assert "0.png = " in line and "copy.png" in line
    assert _warnings(pictures, rows, contents=False) == []


def test_the_same_content_twice_in_a_split_is_a_duplicate(pictures: Path) -> None:
    shutil.copy(pictures / "0.png", pictures / "copy.png")
    (line,) = _warnings(pictures, [*SOUND, ["copy.png", "another", "a", "train"]])
    assert line.startswith("duplicates: 1 contents under several names in one split")


def test_samples_that_stand_twice_are_told_with_their_labels(pictures: Path) -> None:
    (line,) = _warnings(pictures, [*SOUND, SOUND[0]])
    assert line.startswith("duplicates: 1 samples several times in train with the same label")
    (line,) = _warnings(pictures, [*SOUND, ["0.png", "s", "b", "train"]])
    assert line.startswith("duplicates: 1 samples several times in train with different labels")


def test_texts_alone_leak_too(pictures: Path) -> None:
    rows = [["", "said", "a", "train"], ["", "said", "a", "test"]]
    assert _warnings(pictures, rows) == ["leak: 1 texts in both train and test, as 'said'"]


def test_classes_of_one_split_alone_are_named(pictures: Path) -> None:
    rows = [*SOUND, ["4.png", "w", "c", "train"], ["5.png", "x", "d", "test"]]
    assert _warnings(pictures, rows) == [
        "1 of 4 classes only in train, as 'c'",
        "1 of 4 classes only in test, as 'd'",
    ]


def test_the_captions_of_a_picture_belong_into_one_split(tmp_path: Path) -> None:
    make_karpathy(tmp_path, "flickr30k")
    file = tmp_path / "karpathy/dataset_flickr30k.json"
    assert leaks.warnings(data.load("flickr30k", tmp_path)) == []
    file.write_text(file.read_text().replace('"filename": "8.jpg"', '"filename": "1.jpg"'))
    (line,) = leaks.warnings(data.load("flickr30k", tmp_path))
    assert "1.jpg) in both train and test; put each, with all its captions, into one" in line
