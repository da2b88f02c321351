"""The server as a group of replicas: equal to one server, and equal among each other."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, Launch, until
from test_exactness import _case, _retrieval, assert_equals_reference, run_gold
from test_fault_campaign import errors, experiment
from test_runs import assert_same_run, steps_done

from mpsl_dist.config import to_dict

TOY_COMMAND = str(Path(__file__).with_name("toy_command.py"))


def cases() -> dict[str, dict]:
    """Two and three replicas, early and late fusion; five uneven clients on two workers."""
    found = {}
    for replicas in (2, 3):
        for fusion, mode in (("early", "none"), ("late", "gradients")):
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
    return found


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """All cases, trained in one world."""
    return run_gold(tmp_path_factory.mktemp("replicas"), cases())


@pytest.mark.parametrize("case", cases())
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


@pytest.mark.campaign
def test_a_killed_replica_ends_the_run_and_resuming_it_equals_an_uninterrupted_one(
    torchrun: Launch, launch: Launch, tmp_path: Path
) -> None:
    config = tmp_path / "toy.yaml"
    config.write_text(yaml.safe_dump(to_dict(experiment(replicas=2))))
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
def test_fsdp_goes_together_with_a_distributed_backward_only_as_the_page_says(
    launch: Launch,
) -> None:
    status, output = launch([sys.executable, str(ROOT / "tests/measure_sharding.py")]).finish(120)
    assert status == 0, output
    page = (ROOT / "docs" / "replicas.md").read_text("utf-8")
    told = [line.strip() for line in page.splitlines() if "one graph: " in line or "cut at" in line]
    assert len(told) == 2 and all(line in output for line in told), output
