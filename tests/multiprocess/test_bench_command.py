"""The bench command: complete figures of three methods in one world, or one clear error."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import toys
import yaml
from conftest import ROOT, Launch, World, until

from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.analysis import flops, traffic_model
from mpsl_dist.analysis.bench import WARM_UP
from mpsl_dist.analysis.cost_inputs import inputs_of
from mpsl_dist.analysis.stopwatch import PHASES
from mpsl_dist.config import to_dict
from mpsl_dist.data.partition import shares

CHOSEN = toys.experiment(clients_per_worker=2)


def _bench(launch: Launch, folder: Path, *words: str) -> World:
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(to_dict(CHOSEN)))
    line = [sys.executable, "-m", "mpsl_dist", "bench", str(path), *words]
    return launch(line, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")


def test_the_command_measures_all_methods_in_one_world(launch: Launch, tmp_path: Path) -> None:
    status, output = _bench(launch, tmp_path, "--steps", "6", "--out", "figures").finish()
    assert status == 0, output
    figures = json.loads((tmp_path / "figures" / "bench-toy.json").read_text())
    assert (tmp_path / "figures" / "bench-toy.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "runs").exists()
    assert set(figures["methods"]) == {"mpsl", "psl", "centralized"}
    for name, found in figures["methods"].items():
        assert len(found["seconds"]["each"]) == figures["steps"] == 6
        assert found["samples_per_second"] > 0 and found["flop_per_second"] > 0
        assert list(found["phases"]) == list(PHASES)
        sends = name != "centralized"
        assert all(x > 0 if sends else x >= 0 for x in found["phases"].values()), found["phases"]
        assert f"{name} " in output
    assert set(figures["ratios"]) == {"mpsl/centralized", "psl/centralized", "psl/mpsl"}
    assert set(figures["peak_memory"]) == {"server", "worker1", "worker2"}
    assert all(peak["resident"] > 2**20 for peak in figures["peak_memory"].values())
    for name in ("mpsl", "psl"):
        sent = figures["methods"][name]["bytes_per_step"]["by_kind"]
        assert {kind: 6 * each for kind, each in sent.items()} == pytest.approx(_bytes_of(6))
    assert figures["methods"]["centralized"]["bytes_per_step"]["up"] == 0


def _bytes_of(steps: int) -> dict[str, int]:
    """What the measured steps send, by kind: those after the warm-up whose batch is full."""
    holdings, parts = Holdings.load(CHOSEN), flops.build(CHOSEN, inputs_of(CHOSEN))
    plan = shares(holdings.sizes, CHOSEN.training.batch_size, CHOSEN.client_share)
    full = plan[plan.sum(1) == CHOSEN.training.batch_size]
    measured = np.resize(full, (WARM_UP + steps, CHOSEN.clients))[WARM_UP:]
    sent = traffic_model.training(parts, measured, epochs=1)
    return {kind: by_client.sum() for kind, by_client in sent.items()}


@pytest.mark.campaign
def test_a_lost_worker_ends_it_with_the_usual_error(launch: Launch, tmp_path: Path) -> None:
    world = _bench(launch, tmp_path, "--steps", "100000")
    until(lambda: "rounds of mpsl" in world.output(), 90, "the first round")
    os.kill(world.rank(2), signal.SIGKILL)
    status, output = world.finish(60)
    assert status == 1 and "worker2 (clients" in output, output
    assert "Traceback" not in output and not list(tmp_path.glob("bench-*"))
