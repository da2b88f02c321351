"""A tiny three-modality dataset for tests, and experiments on it. Not for training."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mpsl_dist.config import Experiment, from_dict
from mpsl_dist.data import DatasetFacts, Splits, TensorDataset
from mpsl_dist.data.decode.text import VOCABULARY
from mpsl_dist.data.decode.view import View

SHAPES = {"image": (3, 8, 8), "audio": (26, 36), "text": (6,)}
CLASSES = ("a", "b", "c")
PAIR_SHAPES = {name: SHAPES[name] for name in ("image", "text")}
SAMPLES = 90
ENCODER = {"size": "custom", "width": 16, "depth": 2, "heads": 2}


def load(modalities: tuple[str, ...]) -> Splits:
    """Random inputs with random labels, always the same."""

    def split(seed: int, samples: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        inputs = {}
        for name in modalities:
            shape = (samples, *SHAPES[name])
            if name == "text":
                inputs[name] = torch.randint(0, VOCABULARY, shape, generator=generator)
            else:
                inputs[name] = torch.randn(shape, generator=generator)
        labels = torch.randint(0, len(CLASSES), (samples,), generator=generator)
        return TensorDataset(inputs, labels)

    shapes = {name: SHAPES[name] for name in modalities}
    return Splits(split(1, SAMPLES), split(2, 30), shapes, CLASSES)


def load_gaps() -> Splits:
    """Pictures and texts of which every third sample lacks the picture, every fourth the text."""
    splits = load(("image", "text"))
    place = torch.arange(SAMPLES)
    present = {"image": place % 3 > 0, "text": (place % 4 > 0) | (place % 3 == 0)}
    return replace(splits, train=splits.train.without(present))


def load_viewed() -> Splits:
    """Pictures and texts that say how files become such inputs."""
    splits, view = load(("image", "text")), View(("image", "text"), image_size=8, text_length=6)
    train, test = (replace(split, view=view) for split in (splits.train, splits.test))
    return replace(splits, train=train, test=test)


def load_pairs() -> Splits:
    """Forty pictures with two captions each, for retrieval."""
    splits = load(("image", "text"))
    pictures = torch.arange(80) // 2
    inputs = {
        "image": splits.train.inputs["image"][pictures],
        "text": splits.train.inputs["text"][:80],
    }
    train = TensorDataset(inputs, pictures)
    return Splits(
        train, TensorDataset(train.fetch(range(20)).inputs, pictures[:20]), PAIR_SHAPES, ()
    )


def load_captions() -> Splits:
    """Thirty pictures with sounds and two captions each, and ten for testing.

    Every other picture is dark; captions of these begin with an a, those of bright ones with a b.
    """
    splits = load(("image", "audio"))

    def captioned(split: TensorDataset, pictures: int) -> TensorDataset:
        of_pair = torch.arange(2 * pictures) // 2
        inputs = dict(split.fetch(of_pair.tolist()).inputs)
        inputs["image"] += 4.0 * (of_pair % 2)[:, None, None, None] - 2.0
        inputs["text"] = torch.zeros(2 * pictures, 6, dtype=torch.long)
        texts = [f"{'ab'[n // 2 % 2]} {'yes' if n % 2 else 'no'}" for n in range(2 * pictures)]
        return TensorDataset(inputs, of_pair, texts=texts)

    return Splits(captioned(splits.train, 30), captioned(splits.test, 10), SHAPES, ())


#: The toys as a plugin's datasets: ``plugins: [toys]``.
datasets: dict[str, DatasetFacts] = {
    name: DatasetFacts(
        lambda root, load=make, **_: load(), reads=("on_error", "cache"), files=False
    )
    for name, make in {
        "toy-pairs": load_pairs,
        "toy-gaps": load_gaps,
        "toy-viewed": load_viewed,
        "toy-captions": load_captions,
        "toy-image+text": partial(load, ("image", "text")),
        "toy-image+audio": partial(load, ("image", "audio")),
        "toy-audio+text": partial(load, ("audio", "text")),
    }.items()
}


def experiment(**changes: Any) -> Experiment:
    """A small experiment on a toy; ``changes`` are top-level sections."""
    values: dict[str, Any] = {
        "name": "toy",
        "plugins": ["toys"],
        "clients": 4,
        "data": {"name": "toy-image+text", "partition": {"alpha": 0.5, "minimum": 3}},
        "model": {
            "encoder": ENCODER,
            "image_patch": 4,
        },
        "training": {
            "epochs": 2,
            "batch_size": 20,
            "server": {"lr": 1e-2, "weight_decay": 0.1},
            "client": {"lr": 1e-2, "weight_decay": 0.1},
        },
        "device": "cpu",
        "runtime": {"server_threads": 1, "worker_threads": 1},
    }
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **value} if both else value
    return from_dict(values)
