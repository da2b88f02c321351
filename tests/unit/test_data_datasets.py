"""The seven datasets of the paper: real files where there are any, else the official layout."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from media_files import (
    DATA,
    make_coco_qa,
    make_karpathy,
    make_kinetics_sounds,
    make_meld,
    make_t4sa,
    make_ucf101,
    needs,
    write_csv,
    write_lines,
    write_picture,
)

from mpsl_dist.data import DataError, Splits
from mpsl_dist.data.decode.samples import Sample
from mpsl_dist.data.decode.text import tokenize
from mpsl_dist.data.sets import captions, image_text, listing, video_audio
from mpsl_dist.data.sets.index import Samples


def _check(splits: Splits, modalities: list[str]) -> None:
    """Every split gives what its shapes promise; no file lies in both."""
    assert list(splits.shapes) == modalities
    for dataset in (splits.train, splits.test):
        batch = dataset.fetch([0, len(dataset.labels) - 1], seed=1)
        assert list(batch.inputs) == modalities
        for name, shape in splits.shapes.items():
            assert batch.inputs[name].shape == (2, *shape)
            expected = torch.int64 if name == "text" else torch.float32
            assert batch.inputs[name].dtype == expected
            assert batch.inputs[name].float().isfinite().all()
        assert batch.labels.dtype == torch.int64
        if splits.classes:
            assert dataset.labels.min() >= 0 and dataset.labels.max() < len(splits.classes)
    files = [{f for s in d.samples for f in s.files} for d in (splits.train, splits.test)]
    assert files[0] and files[1] and not files[0] & files[1]


def test_coco_qa(tmp_path: Path) -> None:
    splits = image_text.load_coco_qa(make_coco_qa(tmp_path), text_length=20, image_size=32)
    _check(splits, ["image", "text"])
    assert len(splits.train.labels) == 12 and len(splits.test.labels) == 4
    # answer0 stands 6 times, answer1 5 times and answer2 5 times.
    assert splits.classes == ("answer0", "answer1", "answer2")
    assert splits.train.labels.tolist() == [0, 1, 2] * 4
    batch = splits.train.fetch([4])
    assert torch.equal(batch.inputs["text"], tokenize(["what is 102"], 20))
    assert -2.2 < batch.inputs["image"].min() < batch.inputs["image"].max() < 2.7
    assert splits.baselines["majority"] == 0.5


def test_coco_qa_with_the_names_of_the_released_code(tmp_path: Path) -> None:
    make_coco_qa(tmp_path)
    (tmp_path / "coco-qa/test").rename(tmp_path / "coco-qa/val")
    for path in (tmp_path / "ms-coco").rglob("*.jpg"):
        path.rename(path.with_name(f"{int(path.stem[-12:])}.jpg"))
    splits = image_text.load_coco_qa(tmp_path, image_size=16)
    assert len(splits.test.labels) == 4 and splits.test.fetch([3]).inputs["image"].any()


def test_coco_qa_faults(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root"):
        image_text.load_coco_qa(None)
    with pytest.raises(DataError, match=r"coco-qa: no such folder.*cs\.toronto\.edu"):
        image_text.load_coco_qa(tmp_path)
    make_coco_qa(tmp_path)
    with (tmp_path / "coco-qa/train/answers.txt").open("a") as file:
        file.write("one too many\n")
    with pytest.raises(DataError, match=r"questions\.txt 12, img_ids\.txt 12, answers\.txt 13"):
        image_text.load_coco_qa(tmp_path)
    make_coco_qa(tmp_path)
    (tmp_path / "ms-coco/val2014/COCO_val2014_000000000101.jpg").unlink()
    with pytest.raises(DataError, match=r"\(test\): 2 of 4 samples.*000101\.jpg.*cocodataset"):
        image_text.load_coco_qa(tmp_path)
    splits = image_text.load_coco_qa(tmp_path, on_error="skip", max_missing=0.5)
    assert len(splits.test.labels) == 2
    with pytest.raises(DataError, match=r"on_error.*'ignore'"):
        image_text.load_coco_qa(tmp_path, on_error="ignore")


@needs("coco-qa-full-text")
def test_coco_qa_has_430_answers() -> None:
    splits = [
        image_text._read_questions(DATA / "coco-qa-full-text" / split, "")
        for split in ("train", "test")
    ]
    assert [len(split) for split in splits] == [78_736, 38_948]
    assert len({answer for split in splits for *_, answer in split}) == 430
    assert splits[0][0] == ("what is using umbrellas as a central theme", 397_899, "sculpture")


@needs("coco-qa", "ms-coco")
def test_coco_qa_on_real_pictures(tmp_path: Path) -> None:
    """48 real questions for training, 16 for testing, as the pieces hold no test split."""
    for split, part in (("train", slice(0, 48)), ("test", slice(48, 64))):
        for name in ("questions", "answers", "img_ids"):
            lines = (DATA / "coco-qa/train" / f"{name}.txt").read_text().splitlines()[part]
            path = tmp_path / "coco-qa" / split / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines))
    (tmp_path / "ms-coco").mkdir()
    (tmp_path / "ms-coco/train2014").symlink_to(DATA / "ms-coco/train2014")
    (tmp_path / "ms-coco/val2014").mkdir()
    ids = [int(n) for n in (tmp_path / "coco-qa/test/img_ids.txt").read_text().split()]
    for number in ids:
        source = DATA / "ms-coco/train2014" / f"COCO_train2014_{number:012}.jpg"
        target = tmp_path / "ms-coco/val2014" / f"COCO_val2014_{number:012}.jpg"
        if not target.exists():
            target.symlink_to(source)
    splits = image_text.load_coco_qa(tmp_path)
    assert len(splits.train.labels) == 48 and len(splits.test.labels) == 16
    batch = splits.train.fetch(range(48))
    assert batch.inputs["image"].shape == (48, 3, 224, 224)
    assert abs(batch.inputs["image"].mean()) < 0.4 and 0.7 < batch.inputs["image"].std() < 1.4


def test_t4sa(tmp_path: Path) -> None:
    splits = image_text.load_t4sa(make_t4sa(tmp_path), text_length=20, image_size=32)
    _check(splits, ["image", "text"])
    assert splits.classes == ("negative", "neutral", "positive")
    assert splits.train.labels.tolist() == [0, 1, 2] * 3 and len(splits.test.labels) == 3
    expected = tokenize(["tweet 7010, said"], 20)
    assert torch.equal(splits.test.fetch([0]).inputs["text"], expected)
    listed = tmp_path / "b-t4sa/b-t4sa_test.txt"
    listed.write_text(listed.read_text() + "data/1/9999-1.jpg 2\n")
    with pytest.raises(DataError, match="1 listed tweets, the first 9999"):
        image_text.load_t4sa(tmp_path)
    listed.write_text("data/1/7010-1.jpg five\n")
    with pytest.raises(DataError, match="line 1"):
        image_text.load_t4sa(tmp_path)


def test_kinetics_sounds(tmp_path: Path) -> None:
    names = ("tap dancing", "blowing nose")
    make_kinetics_sounds(tmp_path, names)
    splits = video_audio.load_kinetics_sounds(tmp_path, image_size=32, audio_frames=40)
    _check(splits, ["image", "audio"])
    assert len(splits.classes) == 30 and splits.classes[0] == "blowing nose"
    assert splits.train.labels.tolist() == [0] * 4 + [26] * 4
    assert splits.test.labels.tolist() == [0, 26]
    assert splits.test.samples[0].video.endswith("blowing nose/clip4_000001_000011.mp4")
    home = tmp_path / "kinetics-sounds"
    (home / "train.txt").write_text("tap dancing/clip4_000001_000011.mp4\n")
    (home / "test.txt").write_text("blowing nose/clip0_000001_000011.mp4\n")
    listed = video_audio.load_kinetics_sounds(tmp_path, image_size=32, audio_frames=40)
    assert listed.train.labels.tolist() == [26] and listed.test.labels.tolist() == [0]
    (home / "test.txt").write_text("mowing lawn/a.mp4\n")
    with pytest.raises(DataError, match="mowing lawn"):
        video_audio.load_kinetics_sounds(tmp_path)


@needs("kinetics")
def test_kinetics_sounds_takes_30_of_the_31_classes() -> None:
    """The paper's list (AV-CIL) has 30: it leaves out "mowing lawn"."""
    known = (DATA / "kinetics/kinetics_sounds_31.txt").read_text().split("\n")
    assert set(known) - {""} - set(video_audio.KINETICS_SOUNDS) == {"mowing lawn"}
    k400 = set((DATA / "kinetics/label_map_k400.txt").read_text().split("\n"))
    assert set(video_audio.KINETICS_SOUNDS) <= k400
    assert len(set(video_audio.KINETICS_SOUNDS)) == 30
    assert sorted(video_audio.KINETICS_SOUNDS) == list(video_audio.KINETICS_SOUNDS)


def test_ucf101(tmp_path: Path) -> None:
    make_ucf101(tmp_path, ["ApplyEyeMakeup", "BabyCrawling", "BaseballPitch"])
    splits = video_audio.load_ucf101(tmp_path, image_size=32, audio_frames=20)
    _check(splits, ["image", "audio"])
    assert splits.classes == ("ApplyEyeMakeup", "BabyCrawling"), "BaseballPitch has no sound"
    assert splits.train.labels.tolist() == [0] * 3 + [1] * 3
    assert splits.test.labels.tolist() == [0, 1]
    pictures = video_audio.load_ucf101(tmp_path, image_size=32, all_classes=True)
    _check(pictures, ["image"])
    assert len(pictures.classes) == 3 and len(pictures.train.labels) == 9


@needs("ucf101")
def test_ucf101_official_lists() -> None:
    home = DATA / "ucf101/ucfTrainTestlist"
    names = [line.split()[1] for line in listing.lines(home / "classInd.txt", "")]
    assert len(names) == 101 and len(video_audio.UCF_SOUNDS) == 51
    assert set(video_audio.UCF_SOUNDS) < set(names)
    counts = []
    for part in ("train", "test"):
        lines = listing.lines(home / f"{part}list01.txt", "")
        assert not any("\r" in line for line in lines)
        table = video_audio._classed(home, [line.split()[0] for line in lines], names, "")
        counts.append(len(table.samples))
        counts.append(sum(line.split("/")[0] in video_audio.UCF_SOUNDS for line in lines))
    # The paper's 4,893 and 1,943 are these 51 classes less nine clips without a track.
    assert counts == [9_537, 4_901, 3_783, 1_944]


@needs("ucf101", "video")
def test_ucf101_on_real_clips(tmp_path: Path) -> None:
    """A real clip without a track is replaced by a real one with it."""
    home = tmp_path / "ucf101"
    shutil.copytree(DATA / "ucf101/ucfTrainTestlist", home / "ucfTrainTestlist")
    folder = home / "UCF-101/ApplyLipstick"
    folder.mkdir(parents=True)
    silent = next((DATA / "ucf101/UCF-101").rglob("*.avi"))
    for group, source in ((1, "audio_track.avi"), (8, "audio_track.avi"), (9, None)):
        target = folder / f"v_ApplyLipstick_g{group:02}_c01.avi"
        target.symlink_to(DATA / "video" / source if source else silent)
    with pytest.raises(DataError, match=r"of 4901 samples have no file.*data\.max_missing=0\.01"):
        video_audio.load_ucf101(tmp_path)
    splits = video_audio.load_ucf101(tmp_path, max_missing=1.0)
    assert len(splits.classes) == 51 and len(splits.train.labels) == 2
    batch = splits.train.fetch([0, 1], seed=1)
    assert batch.inputs["image"].shape == (2, 3, 224, 224)
    assert batch.inputs["audio"].shape == (2, 98, 128)
    assert batch.inputs["image"].min() >= 0 and batch.inputs["image"].max() <= 1
    assert torch.equal(batch.inputs["image"][0], batch.inputs["image"][1])
    (file, _) = batch.unreadable[1]
    assert Path(file).name == "v_ApplyLipstick_g09_c01.avi"


def test_meld(tmp_path: Path) -> None:
    make_meld(tmp_path)
    splits = video_audio.load_meld(tmp_path, text_length=20, audio_frames=80)
    _check(splits, ["audio", "text"])
    assert splits.classes == (
        "anger",
        "disgust",
        "fear",
        "joy",
        "neutral",
        "sadness",
        "surprise",
    )
    assert len(splits.train.labels) == 10 and len(splits.test.labels) == 4
    assert splits.train.labels.tolist()[:3] == [4, 3, 0]
    assert splits.train.samples[8].text == "It's dev, 1..."
    audio = splits.test.fetch([0]).inputs["audio"][0]
    assert audio[:55].mean() > audio[62:].mean() + 0.2, "the utterance first, then silence"
    assert torch.equal(audio[65], audio[79])
    short = video_audio.load_meld(tmp_path, audio_frames=20)
    levels = [short.test.fetch([0], seed).inputs["audio"].max() for seed in (None, 1, 2, 3)]
    assert min(levels) == levels[0], "the tone grows: at test the begin"
    assert max(levels) > levels[0] + 0.1, "in training anywhere"
    (tmp_path / "meld/dev_splits_complete/dia1_utt1.mp4").unlink()
    with pytest.raises(DataError, match=r"1 of 10 samples .*data\.max_missing=0\.01"):
        video_audio.load_meld(tmp_path)
    assert len(video_audio.load_meld(tmp_path, max_missing=0.1).train.labels) == 9
    with pytest.raises(DataError, match=r"1 of 10.*dia1_utt1"):
        video_audio.load_meld(tmp_path, on_error="raise")


@needs("meld")
def test_meld_text() -> None:
    counts = {}
    for split in ("train", "dev"):
        table = video_audio._read_utterances(DATA / f"meld/{split}_sent_emo.csv", Path(), "")
        counts[split] = len(table.samples)
        assert set(table.labels) == set(range(7))
        assert not any("’" in sample.text for sample in table.samples)
    assert counts == {"train": 9_989, "dev": 1_109}
    assert table.samples[0].text == "Oh my God, he's lost it. He's totally lost it."
    assert table.labels[0] == video_audio.EMOTIONS.index("sadness")


@pytest.mark.parametrize(
    ("name", "load"),
    [("flickr30k", captions.load_flickr30k), ("coco", captions.load_ms_coco)],
)
def test_retrieval(tmp_path: Path, name: str, load: Callable[..., Splits]) -> None:
    splits = load(make_karpathy(tmp_path, name), text_length=12, image_size=32)
    _check(splits, ["image", "text"])
    assert splits.classes == () and not splits.baselines
    assert splits.train.labels.tolist() == [i for i in range(4) for _ in range(5)]
    assert splits.test.labels.tolist() == [0] * 5 + [1] * 5
    assert [s.text for s in splits.test.samples[5:7]] == [
        "picture 8 caption 0",
        "picture 8 caption 1",
    ]
    batch = splits.test.fetch([0, 1, 5])
    assert torch.equal(batch.inputs["image"][0], batch.inputs["image"][1])
    assert not torch.equal(batch.inputs["image"][0], batch.inputs["image"][2])


def test_ms_coco_with_the_names_of_the_released_code(tmp_path: Path) -> None:
    for path in (make_karpathy(tmp_path, "coco") / "ms-coco").rglob("*.jpg"):
        path.rename(path.with_name(f"{int(path.stem[-12:])}.jpg"))
    splits = captions.load_ms_coco(tmp_path, text_length=12, image_size=16)
    assert splits.test.fetch([9]).inputs["image"].any()
    annotations = tmp_path / "karpathy/dataset_coco.json"
    content = annotations.read_text()
    for old, new in (("val2014", "../../etc"), ("COCO_train2014_000000000001", "one")):
        annotations.write_text(content.replace(old, new))
        with pytest.raises(DataError, match=r"dataset_coco\.json"):
            captions.load_ms_coco(tmp_path)


def test_retrieval_without_karpathys_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="flickr30k"):
        captions.load_flickr30k(tmp_path)
    lines = []
    for n in range(20):
        write_picture(tmp_path / f"flickr30k/flickr30k-images/{n}.jpg", n + 30)
        lines += [f"{n}.jpg#{k}\tcaption {k} of {n}" for k in (1, 0, 2)]
    token = tmp_path / "flickr30k/results_20130124.token"
    token.write_text("\n".join(lines))
    splits = captions.load_flickr30k(tmp_path, image_size=16)
    assert len(splits.train.labels) == 54 and splits.test.labels.tolist() == [0] * 3 + [1] * 3
    assert splits.train.samples[0].text == "caption 0 of 0"
    token.write_text("1.jpg caption")
    with pytest.raises(DataError, match="line 1"):
        captions.load_flickr30k(tmp_path)
    (tmp_path / "karpathy").mkdir()
    (tmp_path / "karpathy/dataset_flickr30k.json").write_text(json.dumps([{"split": "train"}]))
    with pytest.raises(DataError, match="not Karpathy's format"):
        captions.load_flickr30k(tmp_path)


@needs("flickr8k")
def test_retrieval_on_real_pictures() -> None:
    splits = captions.load_flickr8k(DATA)
    assert len(splits.train.labels) == 216 * 5 and len(splits.test.labels) == 24 * 5
    assert torch.bincount(splits.train.labels).tolist() == [5] * 216
    batch = splits.test.fetch(range(10))
    assert batch.inputs["image"].shape == (10, 3, 224, 224)
    assert batch.inputs["text"].shape == (10, 77)
    assert 0.6 < batch.inputs["image"].std() < 1.5


@needs("ms-coco")
def test_ms_coco_on_real_pictures() -> None:
    splits = captions.load_ms_coco(DATA, image_size=64)
    assert len(splits.train.labels) == 72 * 5 and len(splits.test.labels) == 8 * 5
    assert splits.test.fetch([0, 39]).inputs["image"].shape == (2, 3, 64, 64)


def _pictures(folder: Path, count: int = 10) -> list[str]:
    return [write_picture(folder / f"{n}.jpg", n + 30, size=(8, 8)).name for n in range(count)]


@pytest.mark.parametrize("below", ["", "Flickr8k_text"])
def test_flickr8k_as_its_own_archives_unpack(tmp_path: Path, below: str) -> None:
    home = tmp_path / "flickr8k"
    names = _pictures(home / "Flicker8k_Dataset")
    lines = [f"{name}#{k}\tcaption {k} of {name}" for name in names for k in range(5)]
    # The official file has captions of a picture that no list and no archive has.
    write_lines(home / below / "Flickr8k.token.txt", [*lines, "9.jpg.1#0\ta caption"])
    write_lines(home / below / "Flickr_8k.trainImages.txt", names[3:9])
    write_lines(home / below / "Flickr_8k.testImages.txt", names[:2])
    splits = captions.load_flickr8k(tmp_path, image_size=16)
    assert [Path(s.image).name for s in splits.train.samples[::5]] == names[3:9]
    assert splits.test.labels.tolist() == [0] * 5 + [1] * 5
    assert splits.test.samples[6].text == "caption 1 of 1.jpg"
    assert splits.test.fetch([9]).inputs["image"].any()
    write_lines(home / below / "Flickr_8k.testImages.txt", ["x.jpg"])
    with pytest.raises(DataError, match=r"testImages\.txt: line 1: Flickr8k\.token\.txt has no"):
        captions.load_flickr8k(tmp_path)
    (home / below / "Flickr_8k.testImages.txt").unlink()
    with pytest.raises(DataError, match=r"Flickr_8k\.testImages\.txt: No such file"):
        captions.load_flickr8k(tmp_path)


def test_flickr8k_with_a_table_of_captions(tmp_path: Path) -> None:
    names = _pictures(tmp_path / "flickr8k/Images")
    rows = [[name, f"a dog, a cat {k}"] for name in names for k in range(5)]
    write_csv(tmp_path / "flickr8k/captions.txt", ["image", "caption"], rows)
    splits = captions.load_flickr8k(tmp_path, image_size=16)
    assert len(splits.train.labels) == 45 and len(splits.test.labels) == 5
    assert splits.train.samples[1].text == "a dog, a cat 1"


def test_the_tweets_that_no_list_names_cost_no_memory(tmp_path: Path) -> None:
    """Read whole, a csv with an emoji in it took eight times its size."""
    home = make_t4sa(tmp_path) / "b-t4sa"
    text = "so glad to be here with all of you, what a day \U0001f600 " * 3
    with (home / "raw_tweets_text.csv").open("a", encoding="utf-8") as file:
        file.writelines(f'{n},"{text}"\n' for n in range(10**6, 10**6 + 5_000))
    size = (home / "raw_tweets_text.csv").stat().st_size
    image_text.load_t4sa(tmp_path)
    tracemalloc.start()
    try:
        assert len(image_text.load_t4sa(tmp_path).train.labels) == 9
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 800_000 and peak < size


def test_nothing_of_an_index_is_lost(tmp_path: Path) -> None:
    """Paths below the folder and elsewhere, names that are no text, rows that lack parts."""
    odd = os.fsdecode(b"/data/\xff\xfe.jpg")
    listed = [
        Sample(text="größer 😀"),
        Sample(image="/data/a.jpg", text=""),
        Sample(video="/elsewhere/b.mp4", silent=True),
        Sample(audio=odd),
        Sample(image="/data", text="\udc80"),
    ]
    kept = Samples.of(listed, "/data")
    assert list(kept) == listed and kept[-1] == listed[-1] and kept[1:3] == listed[1:3]
    assert list(kept.take([3, 0])) == [listed[3], listed[0]]
    assert list(kept.column("audio")) == [None, None, None, odd, None]
    assert kept == Samples.of(listed, "/") and kept != kept.take([0])
    assert list(pickle.loads(pickle.dumps(kept))) == listed
    with pytest.raises(IndexError):
        kept[5]
