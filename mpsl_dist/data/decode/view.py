"""How a sample becomes tensors, the same at training, at test and wherever a model is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mpsl_dist.data.decode import audio, text

#: Mean and standard deviation of ImageNet's colours.
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Mean and standard deviation of every channel.
Colours = tuple[tuple[float, ...], tuple[float, ...]]
#: What pretrained image stems expect, by name (``clip``: OpenAI's).
PIXELS: dict[str, Colours] = {
    "imagenet": (IMAGE_MEAN, IMAGE_STD),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass(frozen=True)
class View:
    """How a sample becomes tensors.

    Attributes
    ----------
    modalities : tuple of str
        ``image`` (from the picture, else from a frame of the clip), ``audio`` (from the sound
        file, else from the clip's track) and ``text``, in the order of fusion.
    image_size : int
        Side of the square picture, in pixels.
    crop : bool
        True: the shorter side is brought to 8/7 of ``image_size`` and a square cut out (training:
        anywhere, mirrored half of the time, brightness and saturation changed by up to 0.2), values
        0..1. False: the picture is squashed to the square.
    audio_frames : int
        Frames of 10 ms.
    audio_at : float
        Centre of the window at test, 0 the start of the clip and 1 its end.
    text_length : int
        Tokens of a text.
    colours : Colours or None
        Taken out of the values 0..1; None takes ImageNet's where ``crop`` is False, else nothing.
    tokens : "clip" or "wordpiece"
        As of :func:`mpsl_dist.data.decode.text.tokenize`.
    sounds : "kaldi" or "whisper"
        Kaldi's log-mel of 128 bins, ``loudness`` taken out, or Whisper's of 80.
    levels : int or None
        A picture is one channel of so many levels of grey; None keeps three colours.
    loudness : tuple of float
        Mean and scale of Kaldi's values: AudioSet's, unless a dataset has its own.
    resampler : "ffmpeg" or "torchaudio"
        What brings sounds to 16 kHz. Above half of a recording's own rate they differ.
    """

    modalities: tuple[str, ...]
    image_size: int = 224
    crop: bool = False
    audio_frames: int = 1024
    audio_at: float = 0.5
    text_length: int = 77
    colours: Colours | None = None
    tokens: text.Tokens = "clip"
    sounds: audio.Sounds = "kaldi"
    levels: int | None = None
    loudness: tuple[float, float] = (audio.AST_MEAN, audio.AST_SCALE)
    resampler: Literal["ffmpeg", "torchaudio"] = "ffmpeg"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> View:
        """Return the view that ``dataclasses.asdict`` made these of, read from json.

        Raises
        ------
        ValueError
            If they are no view's; the message says why.
        """
        try:
            view = cls(**{name: _tuples(value) for name, value in values.items()})
            shapes = view.shapes
        except (KeyError, TypeError) as error:
            raise ValueError(f"view: {error}") from error
        if not all(isinstance(side, int) for shape in shapes.values() for side in shape):
            raise ValueError("view: a size is no whole number")
        return view

    def of_modalities(self, *names: str) -> View:
        """Return the same view of these modalities alone."""
        return replace(self, modalities=names)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """One sample's shape per modality, in the order of fusion."""
        shapes = {
            "image": (1 if self.levels else 3, self.image_size, self.image_size),
            "audio": (self.audio_frames, audio.BINS[self.sounds]),
            "text": (self.text_length,),
        }
        return {name: shapes[name] for name in self.modalities}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
