"""Samples that lie in files: what every dataset read from disk is made of.

A dataset module lists its samples; here they are decoded. Training draws a random moment of a
clip and random crops; testing takes the middle of everything.

Shape legend: ``c`` channels, ``h`` height, ``w`` width, ``t`` frames, ``m`` mel bins, ``l`` text
length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mpsl_dist.data.dataset import Batch, Dataset, presence, rows_of
from mpsl_dist.data.decode import audio, media, text
from mpsl_dist.data.decode.cache import Cache
from mpsl_dist.data.decode.view import PIXELS, Colours, View
from mpsl_dist.errors import DataError

OnError = Literal["raise", "skip"]
#: A sample's tensors by modality, or a batch's.
Inputs = Mapping[str, Tensor]


class Sample(NamedTuple):
    """The files and the text of one sample, each None where it has no such part.

    Attributes
    ----------
    image, audio, video : str or None
        Paths; a clip stands for its picture and sound where there is no file of their own.
    text : str or None
        The text itself.
    silent : bool
        Whether the clip is known to have no sound: then the sample lacks it, which is no fault.
    """

    image: str | None = None
    audio: str | None = None
    video: str | None = None
    text: str | None = None
    silent: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that it is read from."""
        return tuple(part for part in self[:3] if part is not None)

    @property
    def sources(self) -> dict[str, str | None]:
        """The files of its picture and its sound: a clip stands for what has no file of its own."""
        sound = None if self.silent else self.video
        return {"image": self.image or self.video, "audio": self.audio or sound}

    def only(self, modalities: Collection[str]) -> Sample:
        """Return it with these of its parts alone."""
        left = self
        if "image" not in modalities:
            left = left._replace(image=None, video=None, audio=self.sources["audio"])
        if "audio" not in modalities:
            left = left._replace(audio=None, silent=True)
        return left if "text" in modalities else left._replace(text=None)


@dataclass(frozen=True)
class FileDataset:
    """A split whose samples are read from files when they are asked for.

    A sample that cannot be read is an error that names its file (``on_error`` ``raise``), or
    (``skip``) the batch says so in ``unreadable``. In training it is then replaced by another
    readable sample of the *same* mini-batch, with the same label if there is one; where nothing of
    the mini-batch can be read, its picture and sound are zeros, with its own text and label. So a
    mini-batch keeps the size that the server planned, and no client ever sees another client's
    data. At test the sample is left out: what is tested is never another sample than is said.

    A modality that a sample lacks (an empty cell, no fault) is absent: ``present`` tells which, and
    so does the batch, whose inputs are zeros there, or an empty text.

    Attributes
    ----------
    samples : sequence of Sample
    labels : Tensor
        (samples,) int64.
    view : View
        How the samples become tensors.
    on_error : str
        ``raise`` or ``skip``, see above.
    cache : Cache or None
        Keeps decoded inputs; None decodes them anew each time.
    clients : tuple of str or None
        The owner of every sample, where the data names one: a natural federation.
    """

    samples: Sequence[Sample]
    labels: Tensor
    view: View
    on_error: OnError = "raise"
    cache: Cache | None = None
    clients: tuple[str, ...] | None = None
    #: Files that the annotations name and that were not there when the dataset was loaded; the
    #: samples without them are left out.
    missing: tuple[str, ...] = ()
    #: Whether zeros and empty texts are trained as if they were data.
    zeros: bool = False

    @property
    def present(self) -> dict[str, Tensor]:
        """Which samples have a modality: (samples,) bool for each."""
        return self._has(range(len(self.samples)))

    @property
    def texts(self) -> list[str]:
        """Every sample's text as it was written; empty where there is none."""
        return [sample.text or "" for sample in self.samples]

    def _has(self, rows: Sequence[int]) -> dict[str, Tensor]:
        held = [self.samples[row] for row in rows]
        has = {
            "image": [s.sources["image"] is not None for s in held],
            "audio": [s.sources["audio"] is not None for s in held],
            "text": [s.text is not None for s in held],
        }
        return {name: torch.tensor(has[name], dtype=torch.bool) for name in self.view.modalities}

    def without(self, present: Mapping[str, Tensor]) -> FileDataset:
        """Return the split without the parts that are not ``present``; their files are not read."""
        lists = {name: there.tolist() for name, there in present.items()}
        samples = [
            sample.only({name for name, there in lists.items() if there[row]})
            for row, sample in enumerate(self.samples)
        ]
        return replace(self, samples=samples)

    @property
    def unchanging(self) -> bool:
        """Whether a sample is the same whatever the seed: no random crop, frame or window of sound,
        and nothing that another sample of a mini-batch stands in for.
        """
        has, view = [sample.sources for sample in self.samples], self.view
        moving = any(
            sample.image is None and sources["image"] is not None
            for sample, sources in zip(self.samples, has, strict=True)
        )
        drawn = "image" in view.modalities and (view.crop or moving)
        sounds = "audio" in view.modalities and any(s["audio"] is not None for s in has)
        return self.on_error == "raise" and not (drawn or sounds)

    def fetch(self, indices: Sequence[int], seed: int | None = None) -> Batch:
        """Return these samples, decoded; see :class:`mpsl_dist.data.Dataset`."""
        asked = [int(index) for index in indices]
        read: dict[int, Inputs | DataError] = {}
        stills: dict[Sample, Inputs | DataError] = {}
        for index in dict.fromkeys(asked):
            parts = self.samples[index]._replace(text=None)
            # The captions of one picture share it, but where every sample draws a crop of its own.
            drawn = seed is not None and (self.view.crop or set(parts[1:3]) != {None})
            known = not drawn and parts in stills
            read[index] = stills[parts] = stills[parts] if known else self._read(index, seed)
        good = {index: found for index, found in read.items() if not isinstance(found, DataError)}
        if seed is None:
            rows = [index for index in asked if index in good]
        else:
            rows = [self._replace(index, good) for index in asked]
        failed = {index: error for index, error in read.items() if isinstance(error, DataError)}
        return Batch(
            self._joined(rows, good),
            self.labels[torch.tensor(rows, dtype=torch.long)],
            {index: (self._file(index, error), str(error)) for index, error in failed.items()},
            self._present(rows),
        )

    def _present(self, rows: Sequence[int]) -> dict[str, Tensor] | None:
        """Return these samples' mask, as a batch has it."""
        if self.zeros or (not rows and presence(self) is None):
            return None
        return rows_of(self._has(rows), torch.arange(len(rows)))

    def _joined(self, rows: Sequence[int], read: Mapping[int, Inputs]) -> Inputs:
        """Return these samples as one tensor a modality; zeros for those that were not read."""
        inputs = {}
        for name, shape in self.view.shapes.items():
            if name == "text":
                texts = [self.samples[row].text or "" for row in rows]
                inputs[name] = text.tokenize(texts, self.view.text_length, self.view.tokens)
            elif rows:
                empty = {name: torch.zeros(shape)}
                inputs[name] = torch.stack([read.get(row, empty)[name] for row in rows])
            else:
                inputs[name] = torch.zeros(0, *shape)
        return inputs

    def _replace(self, index: int, good: Mapping[int, Inputs]) -> int:
        """Return the sample itself or, where it could not be read, the one that replaces it."""
        if index in good:
            return index
        same = [other for other in good if self.labels[other] == self.labels[index]]
        return next(iter([*same, *good]), index)

    def _read(self, index: int, seed: int | None) -> Inputs | DataError:
        """Decode one sample's picture and sound; an error where it cannot be and is allowed."""
        try:
            return read(self.samples[index], self.view, generator(seed, index), self.cache)
        except DataError as error:
            if self.on_error == "raise":
                raise
            return error

    def _file(self, index: int, error: DataError) -> str:
        return error.file or " ".join(self.samples[index].files)


def with_colours(split: Dataset, colours: Colours | None) -> Dataset:
    """Return a split with other :class:`View` colours, where it is one that has a view."""
    if not isinstance(split, FileDataset):
        return split
    return replace(split, view=replace(split.view, colours=colours))


def generator(seed: int | None, index: int) -> torch.Generator | None:
    """Return the random numbers of one sample, the same in every process; None at test."""
    if seed is None:
        return None
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def read(
    sample: Sample, view: View, random: torch.Generator | None, cache: Cache | None = None
) -> dict[str, Tensor]:
    """Decode one sample.

    Parameters
    ----------
    random : torch.Generator or None
        Draws moments, crops and colours; None takes the middle of everything, as at test.
    cache : Cache, optional
        Keeps what was decoded.

    Returns
    -------
    dict of str to Tensor
        ``image`` (3, h, w) float32 and ``audio`` (t, m) float32, log-mel, as far as the view asks
        and as it says; zeros for what the sample lacks.

    Raises
    ------
    DataError
        If a file is missing or damaged, or a clip has no sound track.
    """
    moment = 0.5 if random is None else float(torch.rand((), generator=random))
    inputs = {}
    for name in view.modalities:
        source = sample.sources.get(name)
        if name == "text":
            pass  # tokenized for the whole mini-batch at once
        elif source is None:
            inputs[name] = torch.zeros(view.shapes[name])
        elif name == "image":
            still = None if sample.image is not None else moment
            inputs[name] = _image(source, still, view, random, cache)
        else:
            at = view.audio_at if random is None else moment
            inputs[name] = _audio(source, at, view, cache)
    return inputs


def _image(
    path: str, moment: float | None, view: View, random: torch.Generator | None, cache: Cache | None
) -> Tensor:
    """Return (3, h, w) float32 of a picture, or of a clip at a moment."""

    def decode() -> Tensor:
        pixels = media.read_image(path) if moment is None else media.read_frame(path, moment)
        return _fitted(pixels, view, random)

    if cache is None or (random is not None and (view.crop or moment is not None)):
        return _scaled(decode(), view, random)
    kind = "crop" if view.crop else "squash"
    pixels = cache.get(path, f"image {kind} {view.image_size} {moment}", decode)
    return _scaled(pixels, view, random)


def picture(pixels: Tensor, view: View) -> Tensor:
    """Return what the pixels (3, h, w) uint8 of a picture become at test."""
    return _scaled(_fitted(pixels, view, None), view, None)


def _fitted(pixels: Tensor, view: View, random: torch.Generator | None) -> Tensor:
    if view.levels:
        # As Pillow weighs colours: equal ones stay what they are.
        weights = torch.tensor([19_595, 38_470, 7_471])[:, None, None]
        pixels = ((pixels.int() * weights).sum(0, keepdim=True) + 32_768 >> 16).to(torch.uint8)
    return _crop(pixels, view.image_size, random) if view.crop else _squash(pixels, view)


def _scaled(pixels: Tensor, view: View, random: torch.Generator | None) -> Tensor:
    scaled = pixels.float() / 255
    if view.levels:
        scaled = (scaled * (view.levels - 1)).round() / (view.levels - 1)
    if view.crop and random is not None:
        scaled = _jitter(scaled, random)
    colours = view.colours or (None if view.crop else PIXELS["imagenet"])
    if colours is None:
        return scaled
    mean, deviation = map(_column, colours)
    return (scaled - mean) / deviation


def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]


def _transforms() -> ModuleType:
    # Its import takes 90 MiB and three seconds, of every worker, pictures in files or not.
    from torchvision.transforms.v2 import functional

    return functional


def _squash(pixels: Tensor, view: View) -> Tensor:
    return _transforms().resize(pixels, [view.image_size, view.image_size], antialias=True)


def _crop(pixels: Tensor, size: int, random: torch.Generator | None) -> Tensor:
    """Return a (3, size, size) square of a picture resized to a shorter side of 8/7 ``size``."""
    height, width = pixels.shape[1:]
    scale = round(size * 8 / 7) / min(height, width)
    shape = [max(size, round(height * scale)), max(size, round(width * scale))]
    resized = _transforms().resize(pixels, shape, antialias=True)
    spare = [shape[0] - size, shape[1] - size]
    if random is None:
        top, left = spare[0] // 2, spare[1] // 2
    else:
        top, left = (int(torch.randint(s + 1, (), generator=random)) for s in spare)
    return resized[:, top : top + size, left : left + size].clone()


def _jitter(scaled: Tensor, random: torch.Generator) -> Tensor:
    """Return a picture mirrored half of the time, its brightness and saturation changed."""
    mirror, brightness, saturation = torch.rand(3, generator=random).tolist()
    flipped = scaled.flip(-1) if mirror < 0.5 else scaled
    brighter = _transforms().adjust_brightness(flipped, 0.8 + 0.4 * brightness)
    return _transforms().adjust_saturation(brighter, 0.8 + 0.4 * saturation)


def _audio(path: str, at: float, view: View, cache: Cache | None) -> Tensor:
    """Return (t, m) float32 of the window whose centre lies at ``at`` of the clip, 0 to 1."""
    samples = audio.samples_for(view.audio_frames)
    if cache is None and view.resampler == "ffmpeg":
        return _spectrogram(media.read_waveform(path, at, samples), view)
    if view.resampler == "torchaudio":
        waveform = _padded_at_16k(*media.read_recording(path), samples)
        return _spectrogram(media.cut(waveform, at, samples, None), view)
    stored = cache.get(path, "waveform 16000", lambda: _whole(path))
    return _spectrogram(media.cut(stored[1:], at, samples, int(stored[0])), view)


def sound(waveform: Tensor, view: View, rate: int = audio.RATE) -> Tensor:
    """Return what a waveform (s,), ``rate`` samples a second, becomes at test, as of a file."""
    samples = audio.samples_for(view.audio_frames)
    own = view.resampler == "torchaudio"
    at_16k = _padded_at_16k(waveform, rate, samples) if own else media.resample(waveform, rate)
    return _spectrogram(media.cut(at_16k, view.audio_at, samples, None), view)


def _padded_at_16k(waveform: Tensor, rate: int, samples: int) -> Tensor:
    """Return at least so many samples, resampled with the silence that a short sound ends in."""
    needed = max(len(waveform), samples * rate // audio.RATE + 64)
    return audio.resample(audio.fit(waveform, needed), rate)


def _spectrogram(waveform: Tensor, view: View) -> Tensor:
    if view.sounds == "whisper":
        return audio.log_mel(waveform, view.audio_frames)
    mean, scale = view.loudness
    return (audio.fbank(waveform, view.audio_frames) - mean) / scale


def _whole(path: str) -> Tensor:
    """Return the clip's length in samples, followed by its waveform (s,), as one tensor."""
    waveform = media.read_waveform(path)
    total = media.length(path)
    return torch.cat([torch.tensor([float(len(waveform) if total is None else total)]), waveform])
