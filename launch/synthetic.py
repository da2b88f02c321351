"""Random pictures, texts and sounds of the paper's shapes, for a bench where no data lie.

``plugins: [synthetic]``, with this folder on PYTHONPATH. There is nothing to learn from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mpsl_dist.data import Batch, DatasetFacts, Splits
from mpsl_dist.data.decode.text import VOCABULARY

#: Different samples; position p of a split is one of them, so that a process holds but these.
_DIFFERENT = 16
_CLASSES = tuple(f"class {k}" for k in range(30))
_TRAIN, _TEST = 20_000, 100


@dataclass(frozen=True)
class Repeated:
    """A split that goes through a few samples again and again."""

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def fetch(self, indices: Sequence[int], seed: int | None = None) -> Batch:
        """Return these samples."""
        positions = torch.as_tensor(indices, dtype=torch.long)
        rows = positions % _DIFFERENT
        return Batch({name: x[rows] for name, x in self.inputs.items()}, self.labels[positions])


def load(
    root: str | None,
    modalities: Sequence[str],
    image_size: int = 224,
    text_length: int = 77,
    audio_frames: int = 1024,
) -> Splits:
    """Make both splits; ``root`` is not looked at."""
    shapes = {
        "image": (3, image_size, image_size),
        "text": (text_length,),
        "audio": (audio_frames, 128),
    }
    shapes = {name: shapes[name] for name in modalities}
    generator = torch.Generator().manual_seed(1)
    inputs = {
        name: torch.randint(0, VOCABULARY, (_DIFFERENT, *shape), generator=generator)
        if name == "text"
        else torch.randn((_DIFFERENT, *shape), generator=generator)
        for name, shape in shapes.items()
    }
    train, test = (
        Repeated(inputs, torch.randint(0, len(_CLASSES), (samples,), generator=generator))
        for samples in (_TRAIN, _TEST)
    )
    return Splits(train, test, shapes, _CLASSES)


datasets = {
    f"synthetic-{first}+{second}": DatasetFacts(
        partial(load, modalities=(first, second)), reads=(*read, "image_size"), files=False
    )
    for first, second, read in (
        ("image", "text", ("text_length",)),
        ("image", "audio", ("audio_frames",)),
    )
}
