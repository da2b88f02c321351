"""What one sample of every dataset looks like, so that its cost is known without its data.

Shapes are those of the readers in :mod:`mpsl_dist.data`; samples are those of the official splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mpsl_dist.actors.holdings import load_data
from mpsl_dist.config import Data, Experiment
from mpsl_dist.data import Splits, TensorDataset

#: Captions of a picture in the retrieval datasets.
CAPTIONS = 5


@dataclass(frozen=True)
class Inputs:
    """A dataset's measures.

    Attributes
    ----------
    shapes : mapping of str to tuple of int
        One sample's shape per modality, in fusion order: image (c, h, w), audio (frames, mel bins),
        text (byte-pair tokens,).
    classes : int
        0 for retrieval.
    train, test : int
        Samples; in retrieval pairs of a picture and a caption.
    """

    shapes: Mapping[str, tuple[int, ...]]
    classes: int
    train: int
    test: int

    @property
    def retrieval(self) -> bool:
        """Whether samples are pairs of a picture and a caption."""
        return self.classes == 0

    def splits(self) -> Splits:
        """Give splits without a sample, from which the actors' parts can be built."""
        empty = TensorDataset({}, torch.empty(0, dtype=torch.long))
        return Splits(empty, empty, self.shapes, tuple(str(k) for k in range(self.classes)))


def _known(rules: Data) -> dict[str, Inputs]:
    picture = (3, rules.image_size or 224, rules.image_size or 224)
    text = (rules.text_length,)
    image_text = {"image": picture, "text": text}

    def audio(frames: int) -> tuple[int, int]:
        return rules.audio_frames or frames, 128

    def pairs(train: int, test: int) -> Inputs:
        return Inputs(image_text, 0, CAPTIONS * train, CAPTIONS * test)

    return {
        "coco-qa": Inputs(image_text, 430, 78_736, 38_948),
        # Not confirmed: the official lists are given on request only.
        "t4sa": Inputs(image_text, 3, 368_586, 51_000),
        "kinetics-sounds": Inputs({"image": picture, "audio": audio(1024)}, 30, 15_376, 3_844),
        "ucf101": Inputs({"image": picture, "audio": audio(98)}, 51, 4_893, 1_943),
        "meld": Inputs({"audio": audio(766), "text": text}, 7, 11_096, 2_610),
        "flickr8k": pairs(6_000, 1_000),
        "flickr30k": pairs(29_000, 1_000),
        "ms-coco": pairs(82_783, 5_000),
        "digits-qa": Inputs({"image": (1, 8, 8), "text": text}, 12, 5_768, 1_420),
        "mnist-fsdd": Inputs({"image": (1, 28, 28), "audio": audio(64)}, 10, 4_000, 1_000),
    }


def inputs_of(experiment: Experiment) -> Inputs:
    """Give the measures of an experiment's dataset; the user's own data is looked into."""
    known = _known(experiment.data)
    if experiment.data.name in known:
        return known[experiment.data.name]
    splits = load_data(experiment)
    sizes = len(splits.train.labels), len(splits.test.labels)
    return Inputs(splits.shapes, len(splits.classes), *sizes)
