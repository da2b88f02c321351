"""The one table of datasets, and datasets of a user's own beside it."""

from __future__ import annotations

import dataclasses
import inspect
import uuid
from pathlib import Path
from typing import get_args

import pytest
from media_files import (
    make_coco_qa,
    make_karpathy,
    make_kinetics_sounds,
    make_meld,
    make_t4sa,
    make_ucf101,
    write_lines,
    write_picture,
)

from mpsl_dist import data
from mpsl_dist.data import DataError
from mpsl_dist.data.catalog import DATASETS, Option
from mpsl_dist.data.fetch.check import check
from mpsl_dist.data.fetch.download import download
from mpsl_dist.errors import ConfigError
from mpsl_dist.plugins import resolve

OWN = """
from dataclasses import dataclass

import torch

from mpsl_dist.data import DatasetFacts, Splits, TensorDataset


@dataclass(frozen=True)
class Options:
    samples: int = 6
    noise: float = 0.0


def load(root, *, image_size=4, options):
    def split(samples):
        inputs = {"image": torch.full((samples, 1, image_size, image_size), options.noise)}
        return TensorDataset(inputs, torch.arange(samples) % 2)

    shapes = {"image": (1, image_size, image_size)}
    return Splits(split(options.samples), split(2), shapes, ("a", str(root)))


datasets = {"noise": DatasetFacts(load, reads=("image_size",), options=Options)}
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module with a dataset ``noise``; its name is new for every test."""
    module = f"own_data_{uuid.uuid4().hex}"
    (tmp_path / f"{module}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return module


@pytest.mark.parametrize("name", DATASETS)
def test_every_row_leads_to_a_loader_that_takes_what_the_row_says(name: str) -> None:
    facts = DATASETS[name]
    loader = resolve(facts.load)
    assert callable(loader) and set(facts.reads) <= set(get_args(Option))
    taken = inspect.signature(loader).parameters
    assert next(iter(taken)) == "root" and set(facts.reads) == set(taken) & set(get_args(Option))
    # Its own defaults, for whoever calls it directly, are those of the row.
    if "on_error" in facts.reads:
        assert taken["on_error"].default == facts.on_error
    assert facts.place or not (facts.archives or facts.by_hand)


def test_shapes_and_classes_are_those_of_the_loaded_data(tmp_path: Path) -> None:
    make_coco_qa(tmp_path)
    make_t4sa(tmp_path)
    make_kinetics_sounds(tmp_path, ["bowling", "singing"])
    make_ucf101(tmp_path, ["ApplyEyeMakeup", "BabyCrawling"])
    make_meld(tmp_path)
    make_karpathy(tmp_path, "flickr30k")
    make_karpathy(tmp_path, "coco")
    made = set(DATASETS) - {"flickr8k", "mnist-fsdd", "mnist-fsdd-2", "manifest"}
    for name in made:
        facts = DATASETS[name]
        splits = data.load(name, str(tmp_path))
        assert list(splits.shapes.items()) == list(facts.shapes.items()), name
        assert splits.retrieval == (facts.classes == 0), name
        if name not in ("coco-qa", "ucf101"):  # the small files have fewer
            assert len(splits.classes) == facts.classes, name
        others = {"image_size": 32, "audio_frames": 40}
        given = {option: others[option] for option in facts.reads if option in others}
        splits = data.load(name, str(tmp_path), 9, **given)
        assert dict(splits.shapes) == facts.shapes_at(9, 32, 40), name


def test_a_dataset_of_ones_own(own: str) -> None:
    assert len(data.load("noise", plugins=[own]).train.labels) == 6
    splits = data.load(
        "noise",
        "here",
        plugins=[own],
        own_options={"samples": 4, "noise": 0.5},
        image_size=3,
        cache=None,
    )
    assert splits.shapes == {"image": (1, 3, 3)} and splits.classes == ("a", "here")
    assert splits.train.inputs["image"].shape == (4, 1, 3, 3)
    assert (splits.train.inputs["image"] == 0.5).all()
    report = check("noise", "here", plugins=[own], own_options={"samples": 3})
    assert report.usable and report.complete and report.samples == {"train": 3, "test": 2}


def test_mistakes_in_own_options_name_their_key(own: str) -> None:
    with pytest.raises(ConfigError) as caught:
        data.load("noise", plugins=[own], own_options={"sample": 4, "noise": "much"})
    assert str(caught.value).split("\n") == [
        "data.options.sample: unknown key; did you mean 'data.options.samples'?",
        "data.options.noise: expected a number, found 'much'",
    ]
    with pytest.raises(ConfigError, match=r"data\.options\.samples: no such option"):
        data.load("digits-qa", own_options={"samples": 4})
    with pytest.raises(DataError, match=r"data\.audio_frames: noise has no use for it"):
        data.load("noise", plugins=[own], audio_frames=4)


def test_mistakes_in_names(own: str) -> None:
    with pytest.raises(DataError, match=r"data\.name: unknown dataset 'nose'.*'noise'"):
        data.load("nose", plugins=[own])
    with pytest.raises(DataError, match=r"data\.name: unknown dataset 'noise'"):
        data.load("noise")
    with pytest.raises(ConfigError, match="plugins: no_such_module cannot be imported"):
        data.load("noise", plugins=["no_such_module"])
    with pytest.raises(DataError, match="noise is built in or unknown"):
        check("noise", None)


def test_faults_of_a_file_are_the_business_of_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_meld(tmp_path)
    (tmp_path / "meld/dev_splits_complete/dia1_utt1.mp4").unlink()
    assert len(data.load("meld", str(tmp_path), max_missing=0.1).train.labels) == 9
    with pytest.raises(DataError, match=r"1 of 10.*dia1_utt1"):
        data.load("meld", str(tmp_path), on_error="raise")
    monkeypatch.setitem(DATASETS, "meld", dataclasses.replace(DATASETS["meld"], on_error="raise"))
    with pytest.raises(DataError, match=r"1 of 10.*dia1_utt1"):
        data.load("meld", str(tmp_path))


def test_messages_about_flickr8k_name_it(tmp_path: Path) -> None:
    """It shares its formats with Flickr30k, and once had its name in all messages too."""

    def said() -> str:
        with pytest.raises(DataError) as caught:
            data.load("flickr8k", str(tmp_path))
        return str(caught.value)

    assert "flickr8k is read from it" in said() and "Flickr8k: nlp.cs.illinois" in said()
    write_picture(tmp_path / "flickr8k/images/0.jpg")
    assert "Flickr8k.token.txt; official place: Flickr8k" in said()
    captions = [f"{n}.jpg#0\ta caption" for n in range(10)]
    write_lines(tmp_path / "flickr8k/captions.token", captions)
    assert said().startswith("flickr8k (train): 8 of 9 samples have no file")
    report = str(check("flickr8k", tmp_path))
    assert "official place: Flickr8k" in report and "put them into flickr8k/images/" in report
    with pytest.raises(DataError, match="flickr8k: ask for the pictures"):
        download("flickr8k", tmp_path)
    assert "30k" not in said() + report
