"""The paired digits, on the real pictures and voices where they are, and on made ones."""

from __future__ import annotations

import gzip
import os
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from mpsl_dist.data import DataError
from mpsl_dist.data.catalog import DATASETS
from mpsl_dist.data.sets import mnist_fsdd

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("MPSL_TEST_DATA", REPOSITORY.parent / "shared" / "data"))


def _write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Ten pictures a digit, each filled with its own number; two speakers, two takes."""
    (tmp_path / "mnist").mkdir()
    (tmp_path / "fsdd").mkdir()
    labels = np.repeat(np.arange(10), 10)
    pixels = np.broadcast_to(np.arange(100)[:, None, None], (100, 28, 28))
    _write_idx(tmp_path / "mnist/train-images-idx3-ubyte.gz", pixels)
    _write_idx(tmp_path / "mnist/train-labels-idx1-ubyte.gz", labels)
    generator = np.random.default_rng(0)
    for digit in range(10):
        for speaker in ("anna", "theo"):
            for take in range(2):
                with wave.open(str(tmp_path / f"fsdd/{digit}_{speaker}_{take}.wav"), "wb") as file:
                    file.setparams((1, 2, 8000, 0, "NONE", ""))
                    noise = generator.integers(-3000, 3000, 2400 + 100 * digit)
                    file.writeframes(noise.astype("<i2").tobytes())
    return tmp_path


def test_pairs_share_the_digit_and_splits_share_nothing(made: Path) -> None:
    splits = mnist_fsdd.load(made, train_samples=80, test_samples=20)
    pictures = {}
    for name, dataset in (("train", splits.train), ("test", splits.test)):
        batch = dataset.fetch(range(len(dataset.labels)))
        scaled = batch.inputs["image"][:, 0, 0, 0] * mnist_fsdd.IMAGE_STD + mnist_fsdd.IMAGE_MEAN
        numbers = (scaled * 255).round().int()
        assert torch.equal(numbers // 10, batch.labels.int())
        pictures[name] = set(numbers.tolist())
    assert len(pictures["train"]) == 80 and len(pictures["test"]) == 20
    assert not pictures["train"] & pictures["test"]
    sounds = [
        {row.numpy().tobytes() for row in dataset.inputs["audio"]}
        for dataset in (splits.train, splits.test)
    ]
    assert [len(group) for group in sounds] == [20, 20] and not sounds[0] & sounds[1]
    assert torch.bincount(splits.train.labels).tolist() == [8] * 10


def test_one_modality_alone_is_of_the_same_samples(made: Path) -> None:
    both, facts = mnist_fsdd.load(made, train_samples=80, test_samples=20), DATASETS["mnist-fsdd"]
    for name in ("image", "audio"):
        alone = mnist_fsdd.load(made, train_samples=80, test_samples=20, modalities=[name])
        assert dict(alone.shapes) == facts.shapes_at(modalities=[name]) == {name: both.shapes[name]}
        assert alone.train.view.modalities == (name,) and list(alone.test.inputs) == [name]
        assert torch.equal(alone.train.inputs[name], both.train.inputs[name])
        assert torch.equal(alone.train.labels, both.train.labels)
    for refused in (facts.shapes_at, lambda **chosen: mnist_fsdd.load(made, **chosen)):
        with pytest.raises(DataError, match="data.modalities: unknown 'text'; valid: image, audio"):
            refused(modalities=["text"])


def test_three_sensors_meet_one_digit_and_no_take_is_in_both_splits(made: Path) -> None:
    splits = mnist_fsdd.load_sensors(
        made, train_samples=40, test_samples=20, voices=("anna", "theo"), test_takes=1
    )
    assert list(splits.shapes) == ["image", "audio", "audio2"]
    plain = mnist_fsdd.load(made, train_samples=20, test_samples=20)
    anna = {row.numpy().tobytes() for row in plain.train.inputs["audio"]}
    theo = {row.numpy().tobytes() for row in plain.test.inputs["audio"]}
    for name, voice in (("audio", anna), ("audio2", theo)):
        heard = [
            {row.numpy().tobytes() for row in split.inputs[name]}
            for split in (splits.train, splits.test)
        ]
        assert len(heard[0]) == len(heard[1]) == 10 and not heard[0] & heard[1]
        assert heard[0] | heard[1] == voice
    pixels = splits.train.inputs["image"][:, 0, 0, 0] * mnist_fsdd.IMAGE_STD
    numbers = ((pixels + mnist_fsdd.IMAGE_MEAN) * 255).round().int()
    assert torch.equal(numbers // 10, splits.train.labels.int())


def test_two_loads_are_the_same(made: Path) -> None:
    first, second = (mnist_fsdd.load(made, train_samples=33, test_samples=9) for _ in range(2))
    assert len(first.train.labels) == 33 and len(first.test.labels) == 9
    for name in ("image", "audio"):
        assert torch.equal(first.train.inputs[name], second.train.inputs[name])
        assert torch.equal(first.test.inputs[name], second.test.inputs[name])


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("mnist/train-images-idx3-ubyte.gz", b"not gzip", "train-images"),
        ("mnist/train-images-idx3-ubyte.gz", gzip.compress(b"\0\0\x08\x03"), "not an IDX"),
        ("mnist/train-labels-idx1-ubyte.gz", None, "train-labels"),
        ("fsdd/3_anna_0.wav", b"", "3_anna_0"),
        ("fsdd/3_anna_0.wav", b"RIFF....WAVE", "3_anna_0"),
        ("fsdd/three.wav", b"", "7_jackson_12.wav"),
    ],
)
def test_damage_is_an_error_that_names_the_file(
    made: Path, path: str, content: bytes | None, message: str
) -> None:
    if content is None:
        (made / path).unlink()
    else:
        (made / path).write_bytes(content)
    with pytest.raises(DataError, match=message):
        mnist_fsdd.load(made, train_samples=10, test_samples=10)


def test_unknown_speaker_and_missing_root_are_errors(made: Path) -> None:
    with pytest.raises(DataError, match="nobody"):
        mnist_fsdd.load(made, test_speakers=["nobody"])
    with pytest.raises(DataError, match=r"data\.root"):
        mnist_fsdd.load(None)


@pytest.mark.skipif(not (DATA / "fsdd").is_dir(), reason=f"no real digits under {DATA}")
def test_real_digits() -> None:
    splits = mnist_fsdd.load(DATA)
    assert splits.classes[7] == "seven" and splits.shapes == {
        "image": (1, 28, 28),
        "audio": (64, 128),
    }
    assert torch.bincount(splits.train.labels).tolist() == [400] * 10
    assert torch.bincount(splits.test.labels).tolist() == [100] * 10
    batch = splits.train.fetch(range(4000))
    for name in ("image", "audio"):
        assert batch.inputs[name].shape == (4000, *splits.shapes[name])
        assert batch.inputs[name].dtype == torch.float32
        assert abs(batch.inputs[name].mean()) < 0.05 and abs(batch.inputs[name].std() - 1) < 0.05
