"""``mnist-fsdd``: a handwritten digit and the same digit spoken; real pictures, real voices.

MNIST and the Free Spoken Digit Dataset were not recorded together: they are paired here by their
label, with a seed of their own, so that every run and every process sees the same samples. The
voices of the test set never speak in training, and no picture is in both.

Layout under ``data.root``: ``mnist/train-images-idx3-ubyte.gz`` and
``mnist/train-labels-idx1-ubyte.gz`` (LeCun, Cortes and Burges);
``fsdd/{digit}_{speaker}_{take}.wav`` (the ``recordings`` of the repository
Jakobovski/free-spoken-digit-dataset).

Shape legend: ``n`` samples, ``s`` samples of a waveform, ``t`` frames, ``m`` mel bins.
"""

from __future__ import annotations

import gzip
import wave
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpsl_dist.data.dataset import Splits, TensorDataset, chosen
from mpsl_dist.data.decode import audio
from mpsl_dist.data.decode.view import View
from mpsl_dist.errors import DataError

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: Draws the pairs; fixed, as the dataset is one thing whatever the experiment's seed.
PAIRING_SEED = 20_260_101
#: Mean and standard deviation of the training pictures of MNIST, scaled to 0..1.
IMAGE_MEAN, IMAGE_STD = 0.1307, 0.3081
#: Mean and standard deviation of the log-mel values of the utterances of george, jackson and
#: nicolas, cut or padded to 64 frames.
AUDIO_MEAN, AUDIO_STD = -10.26, 5.42
#: The share of every digit's pictures that only the test set uses.
TEST_PICTURES = 0.2
#: Utterances whose spectrograms are made together; all at once would take a gigabyte.
_AT_ONCE = 128


def load(
    root: str | Path | None,
    *,
    train_samples: int = 4_000,
    test_samples: int = 1_000,
    test_speakers: Sequence[str] = ("theo",),
    audio_frames: int = 64,
    sounds: audio.Sounds = "kaldi",
    modalities: Sequence[str] | None = None,
) -> Splits:
    """Pair pictures and utterances of the same digit.

    Parameters
    ----------
    root : str or Path
        Folder that holds ``mnist/`` and ``fsdd/``.
    train_samples, test_samples : int
        Samples of either split, the ten digits in equal parts (the first digits take a remainder).
    test_speakers : sequence of str
        Speakers heard in the test set only; everyone else is heard in training only.
    audio_frames : int
        Frames of 10 ms; shorter utterances are padded with silence, longer ones cut.
    sounds : "kaldi" or "whisper"
        Kaldi's log-mel of 128 bins, standardised, or Whisper's of 80 as it is.
    modalities : sequence of str, optional
        ``image``, ``audio`` or both, in the order of fusion; the pairs are the same.

    Returns
    -------
    Splits
        ``image`` (1, 28, 28) and ``audio`` (audio_frames, bins), both float32; pictures and Kaldi's
        spectrograms are standardised with constants of the training set.

    Raises
    ------
    DataError
        If files are missing or damaged, or a digit has too few of them.
    """
    if root is None:
        raise DataError("data.root: mnist-fsdd needs the folder that holds mnist/ and fsdd/")
    folder = Path(root)
    images, digits = _read_mnist(folder / "mnist")
    voices = _find_utterances(folder / "fsdd")
    speakers = sorted({speaker for _, speaker, _ in voices})
    for speaker in test_speakers:
        if speaker not in speakers:
            raise DataError(f"{folder / 'fsdd'}: no speaker '{speaker}'; there: {speakers}")
    spectrograms = _spectrograms([path for *_, path in voices], audio_frames, sounds)
    spoken = torch.tensor([digit for digit, *_ in voices])
    unseen = torch.tensor([speaker in test_speakers for _, speaker, _ in voices])
    generator = torch.Generator().manual_seed(PAIRING_SEED)
    train, test = [], []
    for digit in range(len(CLASSES)):
        pictures = torch.nonzero(digits == digit).flatten()
        cut = round(len(pictures) * (1 - TEST_PICTURES))
        for rows, own, heard, total in (
            (train, pictures[:cut], ~unseen, train_samples),
            (test, pictures[cut:], unseen, test_samples),
        ):
            utterances = torch.nonzero((spoken == digit) & heard).flatten()
            count = total // 10 + (digit < total % 10)
            rows.append(_pair(own, utterances, count, digit, generator))
    split = [torch.cat(rows) for rows in (train, test)]
    shapes = {"image": (1, 28, 28), "audio": (audio_frames, audio.BINS[sounds])}
    shapes = chosen(shapes, modalities)
    view = replace(view_of(audio_frames, sounds), modalities=tuple(shapes))
    datasets = []
    for rows in split:
        inputs = {"image": images[rows[:, 0]], "audio": spectrograms[rows[:, 1]]}
        datasets.append(TensorDataset(chosen(inputs, modalities), rows[:, 2], view=view))
    return Splits(datasets[0], datasets[1], shapes, CLASSES)


def view_of(audio_frames: int, sounds: audio.Sounds) -> View:
    """Return how a picture and a recording become what :func:`load` makes of its own."""
    return View(
        ("image", "audio"),
        image_size=28,
        audio_frames=audio_frames,
        audio_at=0.0,
        colours=((IMAGE_MEAN,), (IMAGE_STD,)),
        sounds=sounds,
        levels=256,
        loudness=(AUDIO_MEAN, AUDIO_STD),
        resampler="torchaudio",
    )


def load_sensors(
    root: str | Path | None,
    *,
    train_samples: int = 4_000,
    test_samples: int = 1_000,
    voices: Sequence[str] = ("george", "jackson"),
    test_takes: int = 10,
    audio_frames: int = 64,
) -> Splits:
    """Put three sensors of one digit together: a picture, and two voices that say it.

    Parameters
    ----------
    root : str or Path
        Folder that holds ``mnist/`` and ``fsdd/``.
    train_samples, test_samples : int
        As of :func:`load`.
    voices : sequence of str
        The two speakers.
    test_takes : int
        So many first takes of every digit and speaker are heard in the test set only, the others
        in training only.

    Returns
    -------
    Splits
        ``image``, ``audio`` and ``audio2``, as of :func:`load`.

    Raises
    ------
    DataError
        As :func:`load`.
    """
    if root is None:
        raise DataError("data.root: mnist-fsdd-2 needs the folder that holds mnist/ and fsdd/")
    folder = Path(root)
    images, digits = _read_mnist(folder / "mnist")
    found = _find_utterances(folder / "fsdd")
    heard = [one for one in found if one[1] in voices]
    spectrograms = _spectrograms([path for *_, path in heard], audio_frames, "kaldi")
    spoken = torch.tensor([digit for digit, *_ in heard])
    late = _late_takes(heard, test_takes)
    generator = torch.Generator().manual_seed(PAIRING_SEED)
    splits: list[TensorDataset] = []
    for testing, total in ((False, train_samples), (True, test_samples)):
        rows = []
        for digit in range(len(CLASSES)):
            pictures = torch.nonzero(digits == digit).flatten()
            cut = round(len(pictures) * (1 - TEST_PICTURES))
            own = pictures[cut:] if testing else pictures[:cut]
            columns, count = [], total // 10 + (digit < total % 10)
            for voice in voices:
                said = torch.tensor([speaker == voice for _, speaker, _ in heard])
                which = torch.nonzero(said & (spoken == digit) & (late != testing)).flatten()
                columns.append(_pair(own, which, count, digit, generator))
            first, second = columns
            rows.append(torch.cat([first[:, :2], second[:, 1:]], dim=1))
        picture, one, other, labels = torch.cat(rows).unbind(1)
        inputs = {"image": images[picture], "audio": spectrograms[one]}
        splits.append(TensorDataset(inputs | {"audio2": spectrograms[other]}, labels))
    sound = (audio_frames, audio.BINS["kaldi"])
    return Splits(*splits, {"image": (1, 28, 28), "audio": sound, "audio2": sound}, CLASSES)


def _late_takes(heard: Sequence[tuple[int, str, Path]], first: int) -> Tensor:
    """Return which recordings are not among so many first takes of their digit and speaker."""
    seen: Counter[tuple[int, str]] = Counter()
    late = torch.zeros(len(heard), dtype=torch.bool)
    for row in sorted(range(len(heard)), key=lambda n: int(heard[n][2].stem.rpartition("_")[2])):
        own = heard[row][:2]
        late[row] = seen[own] >= first
        seen[own] += 1
    return late


def _pair(
    pictures: Tensor, utterances: Tensor, count: int, digit: int, generator: torch.Generator
) -> Tensor:
    """Draw ``count`` rows (picture, utterance, digit); no picture twice while there are enough."""
    if count and not (len(pictures) and len(utterances)):
        raise DataError(f"mnist-fsdd: no picture or no utterance of the digit {digit} for a split")
    rows = []
    for source in (pictures, utterances):
        rounds = -(-count // len(source)) if count else 0
        drawn = [source[torch.randperm(len(source), generator=generator)] for _ in range(rounds)]
        rows.append(torch.cat(drawn)[:count] if drawn else source[:0])
    return torch.stack([*rows, torch.full((count,), digit)], dim=1)


def _read_mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the pictures (n, 1, 28, 28), standardised, and their digits (n,) int64."""
    pixels = _read_idx(folder / "train-images-idx3-ubyte.gz", dimensions=3)
    digits = _read_idx(folder / "train-labels-idx1-ubyte.gz", dimensions=1)
    if len(pixels) != len(digits) or pixels.shape[1:] != (28, 28):
        raise DataError(f"{folder}: {pixels.shape} pictures do not fit {digits.shape} labels")
    images = (torch.from_numpy(pixels).float() / 255 - IMAGE_MEAN) / IMAGE_STD
    return images[:, None], torch.from_numpy(digits).long()


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read a gzipped IDX file of bytes: two zeros, type 8, the dimensions, big-endian sizes."""
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: {error}") from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < start:
        raise DataError(f"{path}: not an IDX file of bytes with {dimensions} dimensions")
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
    values = np.frombuffer(content, np.uint8, offset=start)
    if len(values) != np.prod(shape, dtype=np.int64):
        raise DataError(f"{path}: {len(values)} values, its header says {shape}")
    return values.reshape(shape).copy()


def _find_utterances(folder: Path) -> list[tuple[int, str, Path]]:
    """Return the (digit, speaker, file) of every recording, sorted by file name."""
    found = []
    for path in sorted(folder.glob("*.wav")):
        digit, _, rest = path.stem.partition("_")
        speaker, _, take = rest.rpartition("_")
        if not (digit.isdigit() and len(digit) == 1 and speaker and take.isdigit()):
            raise DataError(f"{path}: expected a name like 7_jackson_12.wav")
        found.append((int(digit), speaker, path))
    if not found:
        raise DataError(f"{folder}: no spoken digits ({{digit}}_{{speaker}}_{{take}}.wav)")
    return found


def _spectrograms(paths: Sequence[Path], frames: int, sounds: audio.Sounds) -> Tensor:
    """Return the utterances as (n, frames, bins) spectrograms, Kaldi's standardised."""
    form = audio.fbank if sounds == "kaldi" else audio.log_mel
    samples = audio.samples_for(frames)
    recordings = [_read_wave(path) for path in paths]
    spectrograms = torch.empty(len(paths), frames, audio.BINS[sounds])
    for rate in {rate for rate, _ in recordings}:
        rows = [row for row, (own, _) in enumerate(recordings) if own == rate]
        # A little more, so that the resampler's edge falls outside of what is kept.
        needed = samples * rate // audio.RATE + 64
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            waveforms = torch.stack([audio.fit(recordings[row][1], needed) for row in some])
            spectrograms[some] = form(audio.resample(waveforms, rate), frames)
    return (spectrograms - AUDIO_MEAN) / AUDIO_STD if sounds == "kaldi" else spectrograms


def _read_wave(path: Path) -> tuple[int, Tensor]:
    """Return the samples per second, and the waveform (s,)."""
    try:
        with wave.open(str(path)) as file:
            if file.getnchannels() != 1 or file.getsampwidth() != 2:
                raise DataError(f"{path}: expected mono with 16 bits a sample")
            rate, content = file.getframerate(), file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"{path}: {error or 'empty'}") from error
    if not content:
        raise DataError(f"{path}: no sound in it")
    if rate % 1_000 and rate % 11_025:
        # An odd rate makes a resampling filter of gigabytes.
        raise DataError(f"{path}: {rate} samples per second cannot be right")
    return rate, torch.from_numpy(np.frombuffer(content, "<i2").astype(np.float32)) / 32_768
