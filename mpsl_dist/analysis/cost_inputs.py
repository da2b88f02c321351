"""What one sample of a dataset looks like, so that its cost is known without its data.

Our own datasets have their shapes and sizes in :data:`mpsl_dist.data.catalog.DATASETS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from mpsl_dist.actors.choices import forms_of
from mpsl_dist.actors.holdings import load_data
from mpsl_dist.config import Experiment
from mpsl_dist.data import Splits, TensorDataset, catalog
from mpsl_dist.data.decode.audio import BINS


@dataclass(frozen=True)
class Inputs:
    """The shapes and sizes of a dataset.

    Attributes
    ----------
    shapes : mapping of str to tuple of int
        One sample's shape per modality, in fusion order: image (c, h, w), audio (frames, mel bins),
        text (byte-pair tokens,).
    classes : int
        0 for retrieval.
    train, test : int
        Samples, in retrieval of the unit that ``data.unit`` says.
    captions : int
        Texts of a sample: several where it is a picture with all its captions.
    """

    shapes: Mapping[str, tuple[int, ...]]
    classes: int
    train: int
    test: int
    captions: int = 1

    def in_unit(self, unit: str) -> Inputs:
        """Return the same in pairs or in pictures, of :data:`CAPTIONS` captions each."""
        pairs = replace(
            self, train=self.train * self.captions, test=self.test * self.captions, captions=1
        )
        if unit == "pair":
            return pairs
        each = self.captions if self.captions > 1 else catalog.CAPTIONS
        return replace(pairs, train=pairs.train // each, test=pairs.test // each, captions=each)

    def times(self, modality: str) -> int:
        """Return how many inputs of a modality a sample has."""
        return self.captions if modality == "text" else 1

    @property
    def unit(self) -> str:
        """A sample in words."""
        if not self.retrieval:
            return "one"
        if self.captions == 1:
            return "a picture and a caption"
        return f"a picture with {self.captions} captions"

    @property
    def retrieval(self) -> bool:
        """Whether samples are pictures and captions."""
        return self.splits().retrieval

    def splits(self) -> Splits:
        """Return splits without a sample, from which the actors' parts can be built."""
        empty = TensorDataset({}, torch.empty(0, dtype=torch.long))
        return Splits(empty, empty, self.shapes, tuple(str(k) for k in range(self.classes)))


def inputs_of(experiment: Experiment) -> Inputs:
    """Return the shapes and sizes of an experiment's dataset.

    They are those of the catalog where it has them; any other dataset is loaded.
    """
    data = experiment.data
    facts = catalog.find(data.name, experiment.plugins)
    if facts.shapes and facts.samples is not None and not data.options:
        sounds = forms_of(experiment)["sounds"]
        sizes = data.text_length, data.image_size, data.audio_frames
        bins = None if sounds is None else BINS[sounds]
        shapes = facts.shapes_at(*sizes, bins, data.modalities)
        found = Inputs(shapes, facts.classes, *facts.samples)
        return found.in_unit(data.unit) if found.retrieval else found
    splits = load_data(experiment)
    sizes = len(splits.train.labels), len(splits.test.labels)
    captions = getattr(splits.train, "captions", 1)
    return Inputs(splits.shapes, len(splits.classes), *sizes, captions)
