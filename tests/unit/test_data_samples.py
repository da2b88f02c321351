"""Samples in files: views, randomness, faults, the cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from media_files import write_clip, write_csv, write_picture, write_sound

from mpsl_dist.data import Batch, DataError
from mpsl_dist.data.decode import media, samples, text
from mpsl_dist.data.decode.cache import Cache
from mpsl_dist.data.decode.samples import FileDataset, Sample, View
from mpsl_dist.data.fetch.check import check
from mpsl_dist.data.loading import Loaders, Reader
from mpsl_dist.data.sets import manifest, tables
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
    mean, deviation = map(np.array, samples.PIXELS["imagenet"])
    expected = (200 / 255 - mean) / deviation
    assert np.allclose(colours, expected, atol=0.02)
    assert batch.inputs["text"].shape == (1, 12) and batch.inputs["text"].dtype == torch.int64
    assert batch.inputs["text"][0, 0] == 49_406 and batch.inputs["text"][0, 5] == 49_407
    again = dataset.fetch([0], seed=3)
    assert torch.equal(batch.inputs["image"], again.inputs["image"])


@pytest.mark.parametrize("name", samples.PIXELS)
def test_colours_can_be_those_that_weights_expect(
    tmp_path: Path, clips: list[Sample], name: str
) -> None:
    mean, deviation = (torch.tensor(values)[:, None, None] for values in samples.PIXELS[name])
    picture = Sample(image=str(write_picture(tmp_path / "a.png", 200)), text="a bus")
    for sample, view in ((picture, PICTURE), (clips[0], CLIP)):
        plain = _dataset([sample], view)
        other = samples.with_colours(plain, samples.PIXELS[name])
        for seed in (None, 3):
            one, same = (d.fetch([0], seed).inputs["image"][0] for d in (plain, other))
            paper = 1.0, 0.0
            if not view.crop:
                paper = (torch.tensor(v)[:, None, None] for v in samples.PIXELS["imagenet"][::-1])
            scale, shift = paper
            assert torch.allclose(same, (one * scale + shift - mean) / deviation, atol=1e-5)


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
    batches = {0: [0, 1], 1: [3], 2: [2, 0]}
    readers = [Loaders([dataset], each).reader(dataset) for each in (0, 2)]
    for seed in (1, None):
        for reader in readers:
            reader.plan(batches, seed)
        for step in batches:
            a, b = (reader.batch(step) for reader in readers)
            assert torch.equal(a.inputs["audio"], b.inputs["audio"])
            assert torch.equal(a.labels, b.labels)


class Whose:
    """A split whose batches say which process read them, and which samples."""

    labels = torch.arange(100)

    def fetch(self, indices: Sequence[int], seed: int | None = None) -> Batch:
        process = torch.full((len(indices),), os.getpid())
        return Batch({"process": process}, torch.tensor(indices))


def test_loader_processes_last_over_epochs_and_serve_all_readers() -> None:
    loaders = Loaders([Whose(), other := Whose()], each=1)
    readers = [loaders.reader(other) for _ in range(3)]
    seen = set()
    for epoch in range(3):
        for number, reader in enumerate(readers):
            steps = range(2 + number)
            reader.plan({s: [10 * epoch + s, 30 * number] for s in steps}, seed=epoch)
        for step in range(4):
            for number in (2, 0, 1):  # in no order, and client 0 misses a step
                if step < 2 + number and (number, step) != (0, 0):
                    batch = readers[number].batch(step)
                    assert batch.labels.tolist() == [10 * epoch + step, 30 * number]
                    assert readers[number].batch(step) is batch
                    seen |= set(batch.inputs["process"].tolist())
    assert len(seen - {os.getpid()}) <= min(3, os.cpu_count()), "one pool, forked once"


@pytest.mark.parametrize("each", [0, 1])
def test_readers_may_ask_from_threads_of_their_own(each: int) -> None:
    loaders = Loaders([dataset := Whose()], each)
    readers = [loaders.reader(dataset) for _ in range(4)]
    for number, reader in enumerate(readers):
        reader.plan({step: [10 * step + number] for step in range(8)}, seed=1)

    def labels(reader: Reader) -> list[int]:
        return [int(reader.batch(step).labels) for step in range(8)]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(labels, readers))
    assert found == [[10 * step + number for step in range(8)] for number in range(4)]


def test_what_reading_needs_is_built_before_the_fork(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    make = text._tokenizer.__wrapped__
    monkeypatch.setattr(text, "_tokenizer", cache(lambda: built.append(os.getpid()) or make()))
    monkeypatch.setattr(text, "tokenize", lambda texts, length, _: _tokens(built, texts, length))
    listed = [Sample(image=str(write_picture(tmp_path / "a.png")), text="one")] * 4
    dataset = _dataset(listed, PICTURE)
    reader = Loaders([dataset], each=1).reader(dataset)
    reader.plan({step: [step] for step in range(4)}, seed=1)
    # Every batch says how many tokenizers were built in the process that made it, or before it.
    assert [int(reader.batch(step).inputs["text"][0, 0]) for step in range(4)] == [1] * 4
    assert built == [os.getpid()]


def _tokens(built: list[int], texts: Sequence[str], length: int) -> torch.Tensor:
    text._tokenizer()
    return torch.full((len(texts), length), len(built))


def test_an_unreadable_sample_is_an_error_or_replaced_in_its_batch(clips: list[Sample]) -> None:
    Path(clips[2].video).write_bytes(b"broken")
    with pytest.raises(DataError, match=r"2\.mp4"):
        _dataset(clips, CLIP).fetch([0, 1, 2])
    dataset = _dataset(clips, CLIP, on_error="skip")
    batch = dataset.fetch([1, 2, 0], seed=1)
    assert len(batch) == 3 and batch.labels.tolist() == [1, 0, 0]
    assert torch.equal(batch.inputs["image"][1], batch.inputs["image"][2]), "not the same label's"
    assert [file for file, _ in batch.unreadable.values()] == [clips[2].video]
    other = dataset.fetch([2, 1], seed=1)
    assert other.labels.tolist() == [1, 1]
    alone = dataset.fetch([2], seed=1)
    assert alone.labels.tolist() == [0] and not alone.inputs["audio"].any()


def test_at_test_nothing_stands_in_for_an_unreadable_sample(clips: list[Sample]) -> None:
    for n in (1, 2):
        Path(clips[n].video).write_bytes(b"broken")
    dataset = _dataset(clips, CLIP, on_error="skip")
    batch = dataset.fetch([3, 2, 1, 0])
    whole = dataset.fetch([3, 0])
    assert batch.labels.tolist() == [1, 0] and sorted(batch.unreadable) == [1, 2]
    assert all(torch.equal(batch.inputs[name], whole.inputs[name]) for name in CLIP.modalities)
    nothing = dataset.fetch([1, 2])
    assert len(nothing) == 0
    assert {name: x.shape for name, x in nothing.inputs.items()} == {
        name: (0, *shape) for name, shape in CLIP.shapes.items()
    }


@pytest.mark.parametrize("each", [0, 1])
def test_a_reader_counts_what_could_not_be_read_and_logs_each_file_once(
    clips: list[Sample], caplog: pytest.LogCaptureFixture, each: int
) -> None:
    Path(clips[2].video).write_bytes(b"broken")
    dataset = _dataset(clips, CLIP, on_error="skip")
    reader = Loaders([dataset], each).reader(dataset)
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            reader.plan({0: [0, 1], 1: [2, 3]}, seed)
            assert [len(reader.batch(step)) for step in (0, 1)] == [2, 2]
    assert list(reader.unread.files) == [clips[2].video]
    assert reader.unread.times == 3 and reader.unread.positions == {2}
    assert len([r for r in caplog.records if "2.mp4" in r.message]) == 1, "logged once a file"
    strict = _dataset(clips, CLIP)
    reader = Loaders([strict], each).reader(strict)
    reader.plan({0: [0], 1: [2]}, 1)
    reader.batch(0)
    with pytest.raises(DataError) as caught:
        reader.batch(1)
    assert len(str(caught.value).splitlines()) == 1 and caught.value.file == clips[2].video


def test_a_replaced_sample_brings_its_own_text(tmp_path: Path) -> None:
    listed = [
        Sample(image=str(write_picture(tmp_path / "a.png")), text="one"),
        Sample(image=str(tmp_path / "absent.png"), text="two"),
    ]
    dataset = FileDataset(listed, torch.tensor([0, 1]), PICTURE, on_error="skip")
    batch = dataset.fetch([0, 1], seed=1)
    assert torch.equal(batch.inputs["text"][0], batch.inputs["text"][1])
    alone = dataset.fetch([1], seed=1)
    assert not torch.equal(alone.inputs["text"][0], batch.inputs["text"][0])


def test_missing_parts_are_no_fault(tmp_path: Path) -> None:
    tone = str(write_sound(tmp_path / "a.wav"))
    view = View(("image", "audio", "text"), image_size=16, audio_frames=10, text_length=6)
    dataset = _dataset([Sample(audio=tone), Sample(text="hello")], view)
    batch = dataset.fetch([0, 1])
    assert not batch.inputs["image"].any() and batch.inputs["audio"][0].any()
    assert not batch.inputs["audio"][1].any() and not batch.unreadable
    assert dataset.present["audio"].tolist() == [True, False]
    assert dataset.present["text"].tolist() == [False, True]


def test_a_clip_that_is_said_to_have_no_sound_lacks_it(tmp_path: Path) -> None:
    clip = str(write_clip(tmp_path / "silent.mp4", sound=None))
    said, unsaid = Sample(video=clip, silent=True), Sample(video=clip)
    with pytest.raises(DataError, match="no sound track"):
        _dataset([unsaid], CLIP).fetch([0])
    dataset = _dataset([said, said], CLIP)
    for seed in (None, 5):
        batch = dataset.fetch([0, 1], seed)
        assert not batch.unreadable and not batch.inputs["audio"].any()
        assert batch.inputs["image"].any()
    assert {name: has.tolist() for name, has in dataset.present.items()} == {
        "image": [True, True],
        "audio": [False, False],
    }
    mixed = _dataset([said, unsaid], CLIP, on_error="skip").fetch([0, 1])
    assert sorted(mixed.unreadable) == [1], "what is said of one row is not said of another"


def test_a_manifest_says_that_a_clip_has_no_sound(tmp_path: Path) -> None:
    write_clip(tmp_path / "silent.mp4", 0.5, sound=None)
    write_clip(tmp_path / "loud.mp4", 0.5)
    rows = [("silent.mp4", "none"), ("loud.mp4", ""), ("silent.mp4", "NONE"), ("loud.mp4", "")]
    listed = [[*row, "class", split] for split in ("train", "test") for row in rows]
    path = write_csv(tmp_path / "m.csv", ["video", "audio", "label", "split"], listed)
    splits = manifest.load(path, image_size=16, audio_frames=10)
    assert splits.shapes == {"image": (3, 16, 16), "audio": (10, 128)}
    assert splits.test.present["audio"].tolist() == [False, True, False, True]
    batch = splits.test.fetch(range(4))
    assert batch.inputs["audio"].flatten(1).any(1).tolist() == [False, True, False, True]
    report = check("manifest", path)
    assert report.complete, str(report)


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
