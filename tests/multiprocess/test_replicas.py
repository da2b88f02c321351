"""The server as a group of replicas: equal to one server, and equal among each other."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import yaml
from conftest import ROOT, Launch, until
from test_exactness import _case, _retrieval, assert_equals_reference, run_gold
from test_fault_campaign import errors, experiment
from test_runs import assert_same_run, steps_done

from mpsl_dist.config import to_dict

MODES = {"early": "none", "late": "gradients"}
TOY_COMMAND = str(Path(__file__).with_name("toy_command.py"))


def cases() -> dict[str, dict]:
    """Two and three replicas, early and late fusion; five uneven clients on two workers."""
    found = {}
    for replicas in (2, 3):
        for fusion, mode in MODES.items():
            case = _case(fusion, "image+text", "float64")
            found[f"{replicas} replicas, {fusion}, {mode}"] = case | {
                "clients": 5,
                "clients_per_worker": 3,
                "server": {"replicas": replicas},
                "tokenizer_sync": {"mode": mode, "every": 1},
            }
    group = {"clients": 3, "clients_per_worker": 2, "server": {"replicas": 3}}
    found["global contrast"] = _retrieval("global", "float64") | group
    found["dry clients"] = found["2 replicas, late, gradients"] | {"client_share": "equal"}
    late = found["2 replicas, late, gradients"]
    found["heads at clients"] = late | {"model": late["model"] | {"head_at": "client"}}
    gaps = {"name": "toy-image+audio", "missing": {"rate": 0.5, "seed": 3, "per": "sample"}}
    for fusion in ("early", "late"):
        found[f"gaps, {fusion}"] = found[f"2 replicas, {fusion}, {MODES[fusion]}"] | {
            "data": gaps,
        }
    return found


def sharded_cases() -> dict[str, dict]:
    """The same in shards, and what shards might stumble over."""
    found = {}
    for name, case in cases().items():
        if "gaps" in name:  # refused
            continue
        found[name] = case | {"server": case["server"] | {"shard": True}}
    late, early = found["3 replicas, late, gradients"], found["2 replicas, early, none"]
    found["dry clients"] = late | {"client_share": "equal"}  # in the fifth step one has none
    again = {"training": early["training"] | {"checkpoint_blocks": True}}
    found["blocks computed again"] = early | again
    frozen = {"encoder": toys.ENCODER | {"trainable_blocks": 1}}
    found["frozen blocks"] = early | {"model": early["model"] | frozen}
    return {f"shards: {name}": case | {"name": name} for name, case in found.items()}


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """All cases, trained in one world."""
    return run_gold(tmp_path_factory.mktemp("replicas"), cases() | sharded_cases())


@pytest.mark.parametrize("case", cases() | sharded_cases())
def test_a_group_of_replicas_equals_a_single_process(case: str, gold: dict) -> None:
    experiment, told = gold[case]
    assert_equals_reference(experiment, told)


@pytest.mark.parametrize("case", cases())
def test_replicas_stay_equal_to_the_last_bit(case: str, gold: dict) -> None:
    experiment, told = gold[case]
    assert len(told["replicas"]) == experiment.server.replicas - 1
    for replica in told["replicas"]:
        assert replica["model"].keys() == told["server"].keys()
        for key, value in told["server"].items():
            assert torch.equal(replica["model"][key], value), key
        assert replica["moments"].keys() == told["moments"].keys()
        for key, value in told["moments"].items():
            assert torch.equal(replica["moments"][key], value), key


@pytest.mark.parametrize("case", sharded_cases())
def test_a_replica_in_shards_holds_its_part_of_every_number(case: str, gold: dict) -> None:
    experiment, told = gold[case]
    replicas, model = experiment.server.replicas, told["server"]
    numbers = sum(x.numel() for x in model.values() if x.ndim)
    trained = sum(x.numel() for x in told["saved"]["model"].values() if x.ndim)
    assert len(told["held"]) == replicas
    assert [sum(held) for held in zip(*told["held"], strict=True)] == [numbers, 2 * trained]
    for parameters, moments in told["held"]:
        # Rows are whole: of three classes' two replicas have two and one.
        assert parameters < 1.1 * numbers / replicas and moments < 1.1 * 2 * trained / replicas


@pytest.mark.parametrize("case", sharded_cases())
def test_shards_go_on_from_a_checkpoint_to_the_last_bit(case: str, gold: dict) -> None:
    _, told = gold[case]
    assert_equal(told["again"], told["on"])
    assert told["again"][0][0] != told["losses"][0]


@pytest.mark.parametrize("case", sharded_cases())
def test_a_checkpoint_is_the_same_with_shards_and_without(case: str, gold: dict) -> None:
    _, told = gold[case]
    plain, resaved = told["plain"]
    assert_equal(resaved, plain)


def assert_equal(ours: Any, theirs: Any) -> None:
    """To the last bit, whatever holds the tensors."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_equal(value, theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    else:
        assert ours == theirs


@pytest.mark.campaign
@pytest.mark.parametrize("shard", [False, True])
def test_a_killed_replica_ends_the_run_and_resuming_it_equals_an_uninterrupted_one(
    shard: bool, torchrun: Launch, launch: Launch, tmp_path: Path
) -> None:
    config = tmp_path / "toy.yaml"
    config.write_text(yaml.safe_dump(to_dict(experiment(replicas=2, shard=shard))))
    command = [sys.executable, TOY_COMMAND, "train", str(config)]
    assert launch([*command, "name=whole"]).finish(300)[0] == 0

    world, runs = launch([*command, "name=parts"]), tmp_path / "runs"
    until(lambda: steps_done(runs / "parts") >= 12, 200, "twelve steps")
    os.kill(world.rank(1), signal.SIGKILL)
    status, output = world.finish(200)
    (error,) = errors(output)
    assert status == 1 and "replica1" in error and "lost" in error, output

    status, output = torchrun(5, TOY_COMMAND, *command[2:], "name=parts", "--resume").finish(300)
    assert status == 0, output
    assert_same_run(runs / "parts", runs / "whole")


@pytest.mark.campaign
def test_fsdp_does_not_go_together_with_a_distributed_backward(launch: Launch) -> None:
    status, output = launch([sys.executable, str(ROOT / "tests/measure_sharding.py")]).finish(120)
    assert status == 0, output
    page = (ROOT / "docs" / "replicas.md").read_text("utf-8")
    (told,) = [line.strip() for line in page.splitlines() if "FSDP2 has no gradient" in line]
    assert told in output, output
