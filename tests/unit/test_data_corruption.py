"""Damaged media files: each is read or refused by name; none crashes, hangs or shrinks a batch.

Run as a program, this file reads the variants that lie in a folder and prints what became of each:
a decoder's crash must not take the tests with it.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from media_files import DATA, write_clip, write_picture, write_sound

#: Seconds in which one file must be read or refused, on a busy machine.
PATIENCE = 20.0
KINDS = {"jpg": "image", "png": "image", "mp4": "video", "avi": "video"}
DAMAGES = ("truncated", "flipped", "renamed", "empty")


def originals(folder: Path) -> list[Path]:
    """Small files of every format: real ones where they are at hand, else made."""
    found = [
        write_sound(folder / "made.wav"),
        write_sound(folder / "made.flac", codec="flac"),
        write_sound(folder / "made.ogg", codec="libopus", rate=48_000),
        write_sound(folder / "made.mp3", codec="libmp3lame"),
        write_clip(folder / "made.mp4", options={"movflags": "faststart"}),
        write_clip(folder / "made.avi", sound="libmp3lame"),
        write_picture(folder / "made.jpg", size=(300, 200)),
        write_picture(folder / "made.png"),
    ]
    for pattern in ("fsdd/0_*_1*.wav", "esc10/*.flac", "stamps/a*.ogg", "stamps/a*.png"):
        found += sorted(DATA.glob(pattern))[:2]
    for pattern in ("ms-coco/train2014/*.jpg", "flickr8k/images/*.jpg", "video/audio_track.avi"):
        found += sorted(DATA.glob(pattern))[:2]
    return found


def write_variants(folder: Path, count: int, seed: int) -> list[Path]:
    """Write damaged copies, named by their number, damage and what they are read as."""
    chance = random.Random(seed)
    sources = originals(folder / "originals")
    variants = folder / "variants"
    variants.mkdir()
    for number in range(count):
        damage = DAMAGES[number % 3 if number % 20 else 3]
        source = sources[chance.randrange(len(sources))]
        content = bytearray(source.read_bytes())
        suffix = source.suffix
        if damage == "truncated":
            del content[chance.randrange(len(content)) :]
        elif damage == "flipped":
            # Half of them in the header, where the lengths and the codecs stand.
            reach = min(len(content), 1_000) if chance.random() < 0.5 else len(content)
            for _ in range(chance.choice((1, 3, 10, 100))):
                content[chance.randrange(reach)] ^= 1 << chance.randrange(8)
        elif damage == "renamed":
            suffix = chance.choice([s for s in (".jpg", ".wav", ".mp4", ".ogg") if s != suffix])
        else:
            content.clear()
        (variants / f"{number:04}-{damage}{suffix}").write_bytes(content)
    return sorted(variants.iterdir())


def read_variants(folder: Path) -> None:
    """Fetch every variant beside a good sample; print a line of JSON each."""
    import torch

    from mpsl_dist.data.decode.samples import FileDataset, Sample, View

    torch.set_num_threads(1)
    good = {
        "image": folder / "originals/made.png",
        "video": folder / "originals/made.mp4",
        "audio": folder / "originals/made.wav",
    }
    modalities = {"image": ("image",), "audio": ("audio",), "video": ("image", "audio")}
    for path in sorted((folder / "variants").iterdir()):
        kind = KINDS.get(path.suffix[1:], "audio")
        samples = [Sample(**{kind: str(file)}) for file in (path, good[kind])]
        view = View(modalities[kind], image_size=32, crop=kind == "video", audio_frames=50)
        dataset = FileDataset(samples, torch.tensor([0, 1]), view, on_error="skip")
        begin, refused = time.monotonic(), {}
        for seed in (None, 7):
            batch = dataset.fetch([0, 1], seed)
            assert len(batch) == (2 if seed else 2 - len(batch.unreadable))
            assert all(tensor.isfinite().all() for tensor in batch.inputs.values())
            refused |= dict(batch.unreadable.values())
        outcome = {"seconds": time.monotonic() - begin, "refused": [*refused.values()]}
        print(json.dumps({"name": path.name, **outcome}), flush=True)


def _campaign(folder: Path, count: int, seed: int) -> None:
    variants = write_variants(folder, count, seed)
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=120 + count * PATIENCE / 10,
        check=False,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    last = results[-1]["name"] if results else "none"
    assert done.returncode == 0, f"status {done.returncode} after {last}: {done.stderr[-2000:]}"
    assert [result["name"] for result in results] == [path.name for path in variants]
    counts: Counter[tuple[str, str]] = Counter()
    for result in results:
        damage = result["name"].partition("-")[2].partition(".")[0]
        counts[damage, "refused" if result["refused"] else "read"] += 1
        assert len(result["refused"]) <= 1 and result["seconds"] < PATIENCE, result
        assert all(result["name"] in reason for reason in result["refused"]), result
    print(f"{count} variants: {dict(counts)}; slowest {max(r['seconds'] for r in results):.2f} s")
    assert sum(counts.values()) == count
    assert counts["empty", "read"] == 0 and counts["empty", "refused"] > 0
    assert counts["truncated", "refused"] > counts["truncated", "read"]
    # A flipped bit mostly changes a colour, a wrong name nothing where the kind is the same.
    assert counts["flipped", "read"] and counts["renamed", "read"] and counts["renamed", "refused"]


def test_a_hundred_damaged_files(tmp_path: Path) -> None:
    _campaign(tmp_path, 100, seed=1)


@pytest.mark.campaign
def test_a_thousand_damaged_files(tmp_path: Path) -> None:
    _campaign(tmp_path, 1_000, seed=2)


if __name__ == "__main__":
    read_variants(Path(sys.argv[1]))
