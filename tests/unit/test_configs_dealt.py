"""Every shipped experiment and every row of a sweep deals as many samples as its data have.

Labels are drawn, so that no data are needed. That all files load is shown in ``test_ways.py`` and
``tests/slurm/test_submit.py``; what they cost is counted with ``--campaign``.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from shown import shorten

from mpsl_dist import config
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.analysis.cost import cost_of
from mpsl_dist.analysis.cost_inputs import inputs_of
from mpsl_dist.config import Experiment, shipped
from mpsl_dist.data import TensorDataset
from mpsl_dist.errors import ConfigError
from mpsl_dist.reading import read_yaml

sys.path.append(str(ROOT / "launch"))
import sweep


def experiments_of(name: str, folder: Path) -> Iterator[Experiment]:
    """What a file asks for; of a sweep with its first seed alone, and that of its profiles."""
    if not name.startswith("sweeps/"):
        yield config.load(name)
        return
    path = folder / f"{name}.yaml"
    shorten(path, ["seed"])
    for profile in (None, *read_yaml(path, ConfigError).get("profiles", ())):
        for run in sweep.read(path, ["data.root=."], profile)[0]:
            yield run.experiment


def test_samples_are_dealt_to_every_client(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path, dirs_exist_ok=True)
    different = {
        repr((replace(one.data, root=None), one.clients, one.method)): one
        for name in shipped.names()
        for one in experiments_of(name, tmp_path)
    }
    assert len(different) > len(shipped.names())
    for experiment in different.values():
        deal(experiment)


def deal(experiment: Experiment) -> None:
    found = inputs_of(experiment)
    splits = found.splits()
    draw = torch.Generator().manual_seed(1)

    def drawn(samples: int) -> TensorDataset:
        if splits.retrieval:
            return TensorDataset({}, torch.arange(samples))
        return TensorDataset({}, torch.randint(found.classes, (samples,), generator=draw))

    splits = replace(splits, train=drawn(found.train), test=drawn(found.test))
    parts = Holdings.deal(experiment, splits).dealt.parts
    assert len(parts) == experiment.clients, experiment.name
    assert min(map(len, parts)) > 0, experiment.name


@pytest.mark.campaign
@pytest.mark.parametrize("name", [name for name in shipped.names() if "sweeps/" not in name])
def test_costs_are_counted(name: str, tmp_path: Path) -> None:
    cost_of(config.load(name)).save(tmp_path / "cost.json")
    counted = json.loads((tmp_path / "cost.json").read_text())
    assert counted
