"""Samples in files: views, randomness, faults, the cache."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from media_files import write_clip, write_picture, write_sound

from mpsl_dist.data import DataError, load_batches
from mpsl_dist.data.decode import media, samples
from mpsl_dist.data.decode.cache import Cache
from mpsl_dist.data.decode.samples import FileDataset, Sample, View
from mpsl_dist.data.sets import tables
from mpsl_dist.data.sets.tables import Files

CLIP = View(("image", "audio"), image_size=32, crop=True, audio_frames=20)
PICTURE = View(("image", "text"), image_size=32, text_length=12)


@pytest.fixture
def clips(tmp_path: Path) -> list[Sample]:
    """Four clips of two seconds."""
    return [Sample(video=str(write_clip(tmp_path / f"{n}.mp4"))) for n in range(4)]


def _dataset(listed: list[Sample], view: View, **options) -> FileDataset:
    labels = torch.arange(len(listed)) % 2
    return FileDataset(listed, labels, view, **options)


def test_pictures_are_squashed_and_standardised(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", 200)
    dataset = _dataset([Sample(image=str(path), text="A red bus.")], PICTURE)
    batch = dataset.fetch([0])
    assert batch.inputs["image"].shape == (1, 3, 32, 32)
    colours = batch.inputs["image"][0, :, 5, 30]
    expected = (200 / 255 - np.array(samples.IMAGE_MEAN)) / np.array(samples.IMAGE_STD)
    assert np.allclose(colours, expected, atol=0.02)
    assert batch.inputs["text"].shape == (1, 12) and batch.inputs["text"].dtype == torch.int64
    assert batch.inputs["text"][0, 0] == 49_406 and batch.inputs["text"][0, 5] == 49_407
    again = dataset.fetch([0], seed=3)
    assert torch.equal(batch.inputs["image"], again.inputs["image"])


def test_testing_is_deterministic_and_takes_the_middle(clips: list[Sample]) -> None:
    dataset = _dataset(clips, CLIP)
    first, second = dataset.fetch([0, 2]), dataset.fetch([2, 0])
    assert torch.equal(first.inputs["image"][0], second.inputs["image"][1])
    assert torch.equal(first.inputs["audio"][0], second.inputs["audio"][1])
    assert first.inputs["image"].min() >= 0 and first.inputs["image"].max() <= 1
    assert abs(first.inputs["image"].mean() - 0.5) < 0.1
    assert first.inputs["audio"].shape == (2, 20, 128)
    assert -1.5 < first.inputs["audio"].mean() < 1 and first.inputs["audio"].isfinite().all()


def test_training_draws_by_seed_and_sample(clips: list[Sample]) -> None:
    dataset = _dataset(clips, CLIP)
    one, same, other = (dataset.fetch([1, 3], seed=s) for s in (5, 5, 6))
    alone = dataset.fetch([3], seed=5)
    for name in ("image", "audio"):
        assert torch.equal(one.inputs[name], same.inputs[name])
        assert torch.equal(one.inputs[name][1], alone.inputs[name][0])
        assert not torch.equal(one.inputs[name], other.inputs[name])
        # The clips are alike: what differs was drawn.
        assert not torch.equal(one.inputs[name][0], one.inputs[name][1])
    twice = _dataset([clips[0], clips[0]], CLIP).fetch([0, 1], seed=5).inputs["image"]
    assert not torch.equal(twice[0], twice[1]), "one clip in two samples is drawn twice"
    shades = [dataset.fetch([0], seed=s).inputs["image"].mean().item() for s in range(30)]
    assert min(shades) < 0.25 and max(shades) > 0.75


def test_loader_processes_give_the_same(clips: list[Sample]) -> None:
    dataset = _dataset(clips, CLIP)
    batches = [[0, 1], [3], [2, 0]]
    here = list(load_batches(dataset, batches, seed=1))
    there = list(load_batches(dataset, batches, seed=1, loaders=1))
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.inputs["audio"], b.inputs["audio"])
        assert torch.equal(a.labels, b.labels)


def test_an_unreadable_sample_is_an_error_or_replaced_in_its_batch(
    clips: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    Path(clips[2].video).write_bytes(b"broken")
    with pytest.raises(DataError, match=r"2\.mp4"):
        _dataset(clips, CLIP).fetch([0, 1, 2])
    dataset = _dataset(clips, CLIP, on_error="skip")
    with caplog.at_level(logging.WARNING):
        batch = dataset.fetch([1, 2, 0], seed=1)
        dataset.fetch([2, 3])
    assert len(batch) == 3 and batch.labels.tolist() == [1, 0, 0]
    assert torch.equal(batch.inputs["image"][1], batch.inputs["image"][2]), "not the same label's"
    assert list(dataset.unreadable) == [clips[2].video]
    assert len([r for r in caplog.records if "2.mp4" in r.message]) == 1, "logged once a file"
    other = dataset.fetch([2, 1])
    assert other.labels.tolist() == [1, 1]
    alone = dataset.fetch([2])
    assert alone.labels.tolist() == [0] and not alone.inputs["audio"].any()


def test_a_replaced_sample_brings_its_own_text(tmp_path: Path) -> None:
    listed = [
        Sample(image=str(write_picture(tmp_path / "a.png")), text="one"),
        Sample(image=str(tmp_path / "absent.png"), text="two"),
    ]
    dataset = FileDataset(listed, torch.tensor([0, 1]), PICTURE, on_error="skip")
    batch = dataset.fetch([0, 1])
    assert torch.equal(batch.inputs["text"][0], batch.inputs["text"][1])
    alone = dataset.fetch([1])
    assert not torch.equal(alone.inputs["text"][0], batch.inputs["text"][0])


def test_missing_parts_are_no_fault(tmp_path: Path) -> None:
    tone = str(write_sound(tmp_path / "a.wav"))
    view = View(("image", "audio", "text"), image_size=16, audio_frames=10, text_length=6)
    dataset = _dataset([Sample(audio=tone), Sample(text="hello")], view)
    batch = dataset.fetch([0, 1])
    assert not batch.inputs["image"].any() and batch.inputs["audio"][0].any()
    assert not batch.inputs["audio"][1].any() and not dataset.unreadable
    assert dataset.present["audio"].tolist() == [True, False]
    assert dataset.present["text"].tolist() == [False, True]


@pytest.mark.parametrize("seed", [None, 4])
def test_cached_inputs_are_the_same_and_are_read_from_the_cache(
    tmp_path: Path, clips: list[Sample], seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Sample(image=str(write_picture(tmp_path / "a.jpg")))
    for listed, view in ((clips, CLIP), ([picture], View(("image",), image_size=32))):
        cache = Cache(tmp_path / "cache")
        plain = _dataset(listed, view).fetch([0], seed)
        _dataset(listed, view, cache=cache).fetch([0], seed)
        if "audio" in view.modalities:
            monkeypatch.setattr(media, "read_waveform", None)
        if seed is None:
            monkeypatch.setattr(media, "read_frame", None)
            monkeypatch.setattr(media, "read_image", None)
        cached = _dataset(listed, view, cache=cache).fetch([0], seed)
        for name, tensor in plain.inputs.items():
            assert torch.allclose(tensor, cached.inputs[name], atol=1e-4), name
        monkeypatch.undo()


def test_the_cache_follows_the_file_and_heals(tmp_path: Path) -> None:
    path, cache = write_picture(tmp_path / "a.png", 50), Cache(tmp_path / "cache")
    dataset = _dataset([Sample(image=str(path))], View(("image",), image_size=8), cache=cache)
    dark = dataset.fetch([0]).inputs["image"]
    (entry,) = cache.folder.rglob("*.npy")
    for damage in (b"", b"damaged", entry.read_bytes()[:100]):
        entry.write_bytes(damage)
        assert torch.equal(dataset.fetch([0]).inputs["image"], dark)
        assert np.load(entry).shape == (3, 8, 8)
    write_picture(path, 250, size=(65, 48))
    assert dataset.fetch([0]).inputs["image"].mean() > dark.mean() + 1
    assert not list(cache.folder.rglob("*.part"))


def test_missing_files_are_found_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed = [Sample(image=str(write_picture(tmp_path / "a.png")))]
    listed += [Sample(image=str(tmp_path / f"{n}.png")) for n in range(3)]
    with pytest.raises(DataError, match=r"3 of 4 samples have no file.*0\.png.*the shop"):
        tables.keep_existing(listed, Files("raise"), "toys", "the shop")
    with caplog.at_level(logging.WARNING):
        kept, missing = tables.keep_existing(listed, Files("skip", 0.75), "toys", "the shop")
    assert kept == [0] and [Path(path).name for path in missing] == ["0.png", "1.png", "2.png"]
    assert "3 of 4" in caplog.text
    with pytest.raises(DataError, match="3 of 3"):
        tables.keep_existing(listed[1:], Files("skip", 1.0), "toys", "the shop")


def test_more_missing_files_than_allowed_are_an_error(tmp_path: Path) -> None:
    """A set of which almost nothing is there must not train on the rest without a word."""
    write_picture(tmp_path / "a.png")
    listed = [Sample(image=str(tmp_path / "a.png"))] * 99
    listed += [Sample(image=str(tmp_path / f"{n}.png")) for n in range(5)]
    assert len(tables.keep_existing(listed[:100], Files("skip"), "toys", "the shop")[0]) == 99
    with pytest.raises(DataError) as caught:
        tables.keep_existing(listed, Files("skip"), "toys", "the shop")
    said = str(caught.value)
    assert "toys: 5 of 104 samples have no file" in said and "0.png" in said and "2.png" in said
    assert "more than data.max_missing=0.01 allows; the shop" in said
    assert said.endswith("train without them with data.max_missing=0.049")
    assert len(tables.keep_existing(listed, Files("skip", 0.049), "toys", "the shop")[0]) == 99
