"""What one sample of every dataset looks like, so that its cost is known without its data.

Shapes are those of the readers in :mod:`mpsl_dist.data`; samples are those of the official splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mpsl_dist.config import Experiment
from mpsl_dist.data import Splits, TensorDataset
from mpsl_dist.methods.setup import load_data


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
        Samples; in retrieval pictures.
    captions : int
        Texts per picture in retrieval, else 1.
    """

    shapes: Mapping[str, tuple[int, ...]]
    classes: int
    train: int
    test: int
    captions: int = 1

    def splits(self) -> Splits:
        """Give splits without a sample, from which the actors' parts can be built."""
        empty = TensorDataset({}, torch.empty(0, dtype=torch.long))
        return Splits(empty, empty, self.shapes, tuple(str(k) for k in range(self.classes)))


def _known(text: int) -> dict[str, Inputs]:
    picture = (3, 224, 224)
    image_text = {"image": picture, "text": (text,)}
    return {
        "coco-qa": Inputs(image_text, 430, 78_736, 38_948),
        "t4sa": Inputs(image_text, 3, 368_586, 51_000),
        "kinetics-sounds": Inputs({"image": picture, "audio": (1024, 128)}, 30, 15_376, 3_844),
        "ucf101": Inputs({"image": picture, "audio": (98, 128)}, 51, 4_893, 1_943),
        "meld": Inputs({"audio": (766, 128), "text": (text,)}, 7, 11_096, 2_610),
        "flickr30k": Inputs(image_text, 0, 29_000, 1_000, captions=5),
        "ms-coco": Inputs(image_text, 0, 82_783, 5_000, captions=5),
        "digits-qa": Inputs({"image": (1, 8, 8), "text": (text,)}, 12, 5_768, 1_420),
        "mnist-fsdd": Inputs({"image": (1, 28, 28), "audio": (64, 128)}, 10, 4_000, 1_000),
    }


def inputs_of(experiment: Experiment) -> Inputs:
    """Give the measures of an experiment's dataset; the user's own data is looked into."""
    known = _known(experiment.data.text_length)
    if experiment.data.name in known:
        return known[experiment.data.name]
    splits = load_data(experiment)
    sizes = len(splits.train.labels), len(splits.test.labels)
    return Inputs(splits.shapes, len(splits.classes), *sizes)
