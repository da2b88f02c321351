"""The paper's experiments as shipped: every file is valid, whatever the method, and says what the
paper says, and the released code's defaults where the paper says nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mpsl_dist import config
from mpsl_dist.actors.checks import check_patches, check_task
from mpsl_dist.analysis.cost_inputs import inputs_of
from mpsl_dist.config.methods import METHODS, unread
from mpsl_dist.data.catalog import DATASETS

PAPER = sorted((Path(__file__).parents[2] / "configs" / "paper").glob("*.yaml"))


def test_there_is_one_for_each_dataset() -> None:
    names = "coco-qa t4sa kinetics-sounds ucf101 meld flickr30k ms-coco"
    assert {path.stem for path in PAPER} == set(names.split()) <= set(DATASETS)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_settings_of_the_paper(path: Path) -> None:
    experiment = config.load(path)
    retrieval = path.stem in ("flickr30k", "ms-coco")
    assert experiment.data.name == path.stem and experiment.clients == 100
    assert experiment.model.encoder.size == "B"
    assert experiment.model.encoder.trainable_blocks == ("all" if retrieval else 6)
    early = path.stem in ("coco-qa", "t4sa", "meld")
    assert experiment.model.fusion == ("early" if early else "late")
    assert experiment.training.epochs == 15
    for optimizer in (experiment.training.server, experiment.training.client):
        assert (optimizer.name, optimizer.lr) == ("adam", 1e-4)
        assert (optimizer.schedule, optimizer.every_epochs, optimizer.gamma) == ("step", 5, 0.1)
    partition = experiment.data.partition
    assert partition.kind == ("iid" if retrieval else "dirichlet-balanced")
    assert retrieval or (partition.alpha, partition.minimum) == (0.5, 10)
    assert experiment.data.unit == ("picture" if retrieval else "pair")
    assert experiment.client_share == "equal"
    assert experiment.training.batch_size == (
        200 if retrieval else {"t4sa": 400, "ucf101": 300}.get(path.stem, 500)
    )


@pytest.mark.parametrize("method", [m for m, facts in METHODS.items() if facts.common])
@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_method_takes_it_as_it_stands(path: Path, method: str) -> None:
    experiment = config.load(path, [f"method={method}"])
    splits = inputs_of(experiment).splits()
    check_task(experiment, splits)
    check_patches(experiment, splits)
    # What a method has no use for is said in a line, not refused.
    unused = {"centralized": ["clients_per_worker"], "fedclip": ["model.encoder.trainable_blocks"]}
    expected = unused.get(method, [])
    if experiment.model.encoder.trainable_blocks == "all":
        expected = [key for key in expected if key == "clients_per_worker"]
    assert unread(experiment) == expected
