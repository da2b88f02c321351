"""From what somebody has at hand to a model's inputs: files, pictures, waveforms, texts, tensors.

Shape legend: ``b`` batch, ``c`` channels, ``h`` height, ``w`` width, ``s`` samples of a waveform,
``t`` frames, ``l`` text length.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mpsl_dist.data.decode import audio, media, samples, text
from mpsl_dist.data.decode.samples import Sample
from mpsl_dist.data.decode.view import View
from mpsl_dist.errors import DataError

#: What a clip stands for where it is not given itself.
_OF_A_CLIP = ("image", "audio")
#: What may be absent of a sample: nothing, all but one modality, or all others but none of several.
Gaps = Literal["none", "some", "others"]


class Reader:
    """Makes inputs of what is given, as the test set of a run was read.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        One sample's shape per modality, in the order of fusion.
    view : View, optional
        How files become inputs; without it, prepared tensors alone are taken.
    integers : collection of str
        The modalities whose inputs are whole numbers.
    source : str
        The model's file, for messages.
    gaps : "none", "some" or "others"
        What a sample may lack: nothing; any modalities but one; or all but one, and no fewer.
    called : str
        The model, for messages.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        view: View | None,
        integers: Collection[str] = ("text",),
        source: str = "the model",
        gaps: Gaps = "none",
        called: str = "the model",
    ) -> None:
        self.shapes = dict(shapes)
        self.view = view
        self.integers = frozenset(integers)
        self.source = source
        self.gaps = gaps if len(self.shapes) > 1 else "none"
        self.called = called

    # -- what is given -------------------------------------------------------------------------

    def samples(self, given: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bool]:
        """Return sample by sample what is given, and whether several are.

        A single thing beside several of another kind is each sample's; None in a list is absent.

        Raises
        ------
        DataError
            If a modality is missing or too much, or there are not as many of each.
        """
        given = {name: value for name, value in given.items() if value is not None}
        self.check(given)
        lists = {name: self._list(name, value) for name, value in given.items()}
        counts = {name: len(many) for name, many in lists.items() if many is not None}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name}: {count}" for name, count in counts.items())
            raise DataError(f"{told} are given; give as many of each, or one for all")
        count = next(iter(counts.values()), 1)
        if not count:
            raise DataError(f"{', '.join(counts)}: an empty list; give at least one")
        columns = {name: [given[name]] * count if m is None else m for name, m in lists.items()}
        rows = [
            {name: column[row] for name, column in columns.items() if column[row] is not None}
            for row in range(count)
        ]
        for kind in {tuple(row): row for row in rows}.values():
            self.check(kind)
        return rows, bool(counts)

    def check(self, given: Collection[str], columns: bool = False) -> None:
        """Refuse what the model has no use for, and that a modality is not there which must be.

        ``columns`` says that a table's are given, whose cells may be empty.
        """
        takes = f"{self.called} takes {self._taken()}"
        there = self.there(given)
        clip_serves = any(name in self.shapes and name not in given for name in _OF_A_CLIP)
        wrong = []
        for name in given:
            if name == "video" and "video" not in self.shapes:
                if not clip_serves:
                    wrong.append(f"video: {takes}, for which no clip is needed; leave it out")
            elif name not in self.shapes:
                wrong.append(f"{name}: {takes}, no {name}; leave it out")
        absent = [name for name in self.shapes if name not in there]
        some = self.gaps == "some" or (self.gaps == "others" and (columns or len(there) == 1))
        if not (some and there):
            wrong += [f"{name}: not given, and {takes}" for name in absent]
        if wrong:
            raise DataError("\n".join(wrong))

    def there(self, given: Collection[str]) -> list[str]:
        """Return the model's modalities that are given, those of a clip among them."""
        covered = {*given, *(_OF_A_CLIP if "video" in given else ())}
        return [name for name in self.shapes if name in covered]

    def _taken(self) -> str:
        may = {"none": "", "some": ", or some of them", "others": ", all together or one alone"}
        return " and ".join(self.shapes) + may[self.gaps]

    def apart(self, given: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Return by modality the things that are given, one or more of each; refuses as above."""
        given = {name: value for name, value in given.items() if value is not None}
        if "video" in given:
            raise DataError("video: give the pictures or the sounds of clips themselves")
        self.check(given)
        lists = {name: self._list(name, given[name]) for name in self.shapes}
        return {name: [given[name]] if m is None else m for name, m in lists.items()}

    def _list(self, name: str, value: Any) -> list[Any] | None:
        """Return several things as a list; None of a single one."""
        if isinstance(value, list):
            return value
        if isinstance(value, Tensor | np.ndarray):
            shape = self.shapes.get(name, ())
            if value.ndim == len(shape) + 1 and (tuple(value.shape[1:]) == shape or value.ndim > 3):
                return list(value)
        return None

    # -- sample by sample ----------------------------------------------------------------------

    def read(self, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return a sample's inputs, (*shape) by modality, of all that the sample has.

        Raises
        ------
        DataError
            If a file cannot be read, or a thing is none of those that are taken; all at once.
        """
        inputs, wrong = {}, []
        things = dict(sample)
        clip = things.pop("video", None) if "video" not in self.shapes else None
        if clip is not None:
            things |= {name: _Clip(clip) for name in _OF_A_CLIP if name in self.shapes} | things
        for name in self.shapes:
            if name not in things:
                continue
            try:
                inputs[name] = self._read_one(name, things[name])
            except DataError as error:
                wrong.append(str(error))
        if wrong:
            raise DataError("\n".join(dict.fromkeys(wrong)))
        return inputs

    def _read_one(self, name: str, thing: Any) -> Tensor:
        if isinstance(thing, Tensor | np.ndarray):
            thing = torch.as_tensor(thing)
            if _is_finite(name, thing) and tuple(thing.shape) == self.shapes[name]:
                whole = not thing.is_floating_point()
                if whole == (name in self.integers):
                    return thing.long() if whole else thing.float()
        if name not in _RAW:
            shape = tuple(self.shapes[name])
            raise DataError(f"{name}: expected a tensor {shape}, found {_kind(thing)}")
        if self.view is None:
            raise DataError(
                f"{name}: {self.source} does not say how {_RAW[name]} becomes an input (its data "
                "did not tell, or an older version wrote it: then the run writes model/ again with "
                f"--resume); give a prepared tensor {tuple(self.shapes[name])}"
            )
        return {"image": self._image, "audio": self._audio, "text": self._text}[name](thing)

    def _image(self, thing: Any) -> Tensor:
        assert self.view is not None
        if isinstance(thing, str | Path):
            return samples.read(Sample(image=str(thing)), self._only("image"), None)["image"]
        if isinstance(thing, _Clip):
            return samples.read(Sample(video=thing.path), self._only("image"), None)["image"]
        if isinstance(thing, Image.Image):
            return samples.picture(media.pixels_of(thing), self.view)
        if isinstance(thing, Tensor) and thing.dtype == torch.uint8 and thing.numel():
            pixels = thing[None] if thing.dim() == 2 else thing
            if pixels.dim() == 3 and pixels.shape[2] in (1, 3) and pixels.shape[0] not in (1, 3):
                pixels = pixels.permute(2, 0, 1)
            if pixels.dim() == 3 and pixels.shape[0] in (1, 3):
                return samples.picture(pixels.expand(3, -1, -1).contiguous(), self.view)
        raise DataError(
            "image: expected a file, a PIL picture, pixels (h, w), (h, w, 3) or (3, h, w) uint8, "
            f"or a prepared float tensor {tuple(self.shapes['image'])}; found {_kind(thing)}"
        )

    def _audio(self, thing: Any) -> Tensor:
        assert self.view is not None
        if isinstance(thing, str | Path):
            return samples.read(Sample(audio=str(thing)), self._only("audio"), None)["audio"]
        if isinstance(thing, _Clip):
            return samples.read(Sample(video=thing.path), self._only("audio"), None)["audio"]
        pair = isinstance(thing, tuple) and len(thing) == 2
        waveform, rate = thing if pair else (thing, audio.RATE)
        if isinstance(waveform, Tensor | np.ndarray) and isinstance(rate, int):
            waveform = torch.as_tensor(waveform)
            if not 1_000 <= rate <= 768_000:
                raise DataError(f"audio: {rate} samples per second cannot be right")
            if waveform.dim() == 1 and waveform.is_floating_point() and len(waveform):
                _is_finite("audio", waveform)
                return samples.sound(waveform.float(), self.view, rate)
        raise DataError(
            "audio: expected a file, a waveform (s,) of floats at 16,000 samples a second, the "
            "pair (waveform, samples a second), or a prepared float tensor "
            f"{tuple(self.shapes['audio'])}; found {_kind(thing)}"
        )

    def _text(self, thing: Any) -> Tensor:
        assert self.view is not None
        if isinstance(thing, str):
            return text.tokenize([thing], self.view.text_length, self.view.tokens)[0]
        shape = tuple(self.shapes["text"])
        raise DataError(f"text: expected a text, or its tokens {shape}; found {_kind(thing)}")

    def _only(self, name: str) -> View:
        assert self.view is not None
        return self.view.of_modalities(name)

    # -- as a batch ----------------------------------------------------------------------------

    def batch(self, read: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return samples as one tensor a modality; zeros for what none of them has."""
        inputs = {}
        for name, shape in self.shapes.items():
            kind = torch.long if name in self.integers else torch.float
            nothing = torch.zeros(shape, dtype=kind)
            inputs[name] = torch.stack([sample.get(name, nothing) for sample in read])
        return inputs


#: Our own modalities, as a message calls what they are read from.
_RAW = {"image": "a picture", "audio": "a sound", "text": "a text"}


class _Clip:
    """A clip in place of its picture or its sound."""

    def __init__(self, path: str | Path) -> None:
        if not isinstance(path, str | Path):
            raise DataError(f"video: expected a file, found {_kind(path)}")
        self.path = str(path)


def _is_finite(name: str, values: Tensor) -> bool:
    if values.is_floating_point() and not values.isfinite().all():
        raise DataError(f"{name}: holds numbers that are not finite")
    return True


def _kind(thing: Any) -> str:
    if isinstance(thing, Tensor | np.ndarray):
        return f"{str(thing.dtype).removeprefix('torch.')} {tuple(thing.shape)}"
    return type(thing).__name__
