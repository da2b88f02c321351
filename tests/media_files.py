"""Small real media files, and small datasets in the official layouts."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
#: Real public data, beside the repository; users do not have it.
DATA = Path(os.environ.get("MPSL_TEST_DATA", REPOSITORY.parent / "shared" / "data"))


def needs(*parts: str) -> pytest.MarkDecorator:
    """Skip, saying so, without these real files."""
    missing = [part for part in parts if not (DATA / part).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} under {DATA}")


def write_picture(path: Path, value: int = 128, size: tuple[int, int] = (64, 48)) -> Path:
    """Write one grey (width, height) picture; its left half is darker by 20."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), value, np.uint8)
    pixels[:, : size[0] // 2] -= 20
    Image.fromarray(pixels).save(path)
    return path


def _tone(seconds: float, rate: int, channels: int) -> np.ndarray:
    """A tone of 440 Hz that grows louder, (channels, samples) float32."""
    time = np.arange(round(seconds * rate)) / rate
    sound = np.sin(2 * np.pi * 440 * time) * (0.05 + 0.9 * time / max(seconds, 1e-9))
    return np.tile(sound.astype(np.float32), (channels, 1))


def _encode_sound(
    container: av.container.OutputContainer, stream: av.AudioStream, sound: np.ndarray, rate: int
) -> None:
    layout = "stereo" if len(sound) == 2 else "mono"
    resampler = av.AudioResampler(stream.format, stream.layout, rate)
    for start in range(0, sound.shape[1], 1024):
        piece = np.ascontiguousarray(sound[:, start : start + 1024])
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        for converted in resampler.resample(frame):
            container.mux(stream.encode(converted))
    container.mux(stream.encode(None))


def write_sound(
    path: Path,
    seconds: float = 1.0,
    *,
    codec: str = "pcm_s16le",
    container_format: str | None = None,
    rate: int = 16_000,
    channels: int = 1,
) -> Path:
    """Write a tone; the format follows the name unless it is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=container_format) as container:
        layout = "stereo" if channels == 2 else "mono"
        stream = container.add_stream(codec, rate=rate, layout=layout)
        _encode_sound(container, stream, _tone(seconds, rate, channels), rate)
    return path


def write_clip(
    path: Path,
    seconds: float = 2.0,
    *,
    sound: str | None = "aac",
    size: tuple[int, int] = (64, 48),
    codec: str = "mpeg4",
    options: dict[str, str] | None = None,
) -> Path:
    """Write a clip, ten frames a second, that brightens from black to white; maybe with a tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        video = container.add_stream(codec, rate=10)
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        track = container.add_stream(sound, rate=16_000, layout="mono") if sound else None
        count = round(seconds * 10)
        for position in range(count):
            pixels = np.full((size[1], size[0], 3), 255 * position // max(count - 1, 1), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode(None))
        if track is not None:
            _encode_sound(container, track, _tone(seconds, 16_000, 1), 16_000)
    return path


def write_lines(path: Path, lines: Sequence[object]) -> Path:
    """Write lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    """Write a csv file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def make_coco_qa(root: Path, train: int = 12, test: int = 4, answers: int = 3) -> Path:
    """COCO-QA in its official layout; picture ``i`` is shared by questions ``2 i``, ``2 i + 1``."""
    for split, images, count in (("train", "train2014", train), ("test", "val2014", test)):
        ids = [100 + n // 2 for n in range(count)]
        words = [f"answer{n % answers}" for n in range(count)]
        write_lines(root / "coco-qa" / split / "questions.txt", [f"what is {n}" for n in ids])
        write_lines(root / "coco-qa" / split / "answers.txt", words)
        write_lines(root / "coco-qa" / split / "img_ids.txt", ids)
        for number in set(ids):
            name = f"COCO_{images}_{number:012}.jpg"
            write_picture(root / "ms-coco" / images / name, number)
    return root


def make_t4sa(root: Path, train: int = 9, test: int = 3) -> Path:
    """B-T4SA in its official layout, with one tweet that no list names."""
    home, tweets, number = root / "b-t4sa", [], 7000
    for split, count in (("train", train), ("test", test)):
        listed = []
        for n in range(count):
            number += 1
            write_picture(home / f"data/{number % 3}/{number}-1.jpg", 100 + n)
            listed.append(f"data/{number % 3}/{number}-1.jpg {n % 3}")
            tweets.append([number, f"tweet {number}, said"])
        write_lines(home / f"b-t4sa_{split}.txt", listed)
    write_csv(home / "raw_tweets_text.csv", ["id", "text"], [*tweets, [1, "unlisted"]])
    return root


def make_kinetics_sounds(root: Path, classes: Sequence[str], clips: int = 5) -> Path:
    """Clips with sound, in folders named by class."""
    for name in classes:
        for n in range(clips):
            write_clip(root / "kinetics-sounds" / name / f"clip{n}_000001_000011.mp4")
    return root


def make_ucf101(root: Path, classes: Sequence[str], train: int = 3, test: int = 1) -> Path:
    """UCF101's folders and lists (line ends as in the official ones) for some classes."""
    home = root / "ucf101"
    index = "".join(f"{n} {name}\r\n" for n, name in enumerate(classes, start=1))
    lists = {"trainlist01": "", "testlist01": ""}
    for number, name in enumerate(classes, start=1):
        for n in range(train + test):
            clip = f"{name}/v_{name}_g{n + 1:02}_c01.avi"
            write_clip(home / "UCF-101" / clip, 1.5, sound="libmp3lame")
            if n < test:
                lists["testlist01"] += f"{clip}\r\n"
            else:
                lists["trainlist01"] += f"{clip} {number}\r\n"
    (home / "ucfTrainTestlist").mkdir(parents=True)
    for name, content in {"classInd": index, **lists}.items():
        (home / "ucfTrainTestlist" / f"{name}.txt").write_bytes(content.encode())
    return root


def make_meld(root: Path, train: int = 7, dev: int = 3, test: int = 4) -> Path:
    """MELD in its official layout."""
    emotions = ("neutral", "joy", "anger", "sadness", "surprise", "fear", "disgust")
    header = ["Sr No.", "Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID"]
    folders = {
        "train": ("train_splits", train),
        "dev": ("dev_splits_complete", dev),
        "test": ("output_repeated_splits_test", test),
    }
    for split, (folder, count) in folders.items():
        rows = []
        for n in range(count):
            write_clip(root / "meld" / folder / f"dia{n}_utt1.mp4", 0.6, size=(32, 32))
            rows.append([n + 1, f"It’s {split}, {n}…", "Joey", emotions[n % 7], n, 1])
        write_csv(root / "meld" / f"{split}_sent_emo.csv", header, rows)
    return root


def make_karpathy(root: Path, name: str, train: int = 4, test: int = 2) -> Path:
    """Flickr30k (``flickr30k``) or MS-COCO (``coco``) with Karpathy's file."""
    images, number = [], 0
    for split, count in (("train", train), ("restval", 1), ("val", 1), ("test", test)):
        for _ in range(count):
            number += 1
            if name == "coco":
                below = "train2014" if split == "train" else "val2014"
                file = f"COCO_{below}_{number:012}.jpg"
                write_picture(root / "ms-coco" / below / file, 30 + number)
            else:
                below, file = "", f"{number}.jpg"
                write_picture(root / "flickr30k" / "flickr30k-images" / file, 30 + number)
            captions = [{"raw": f"picture {number} caption {k} "} for k in range(6)]
            image = {"split": split, "filename": file, "imgid": number, "sentences": captions}
            images.append({**image, "filepath": below} if below else image)
    path = root / "karpathy" / f"dataset_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "dataset": name}))
    return root
