"""Many workers on one host: shared memory fails there beyond 18, sockets must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Launch

TINY = Path(__file__).with_name("tiny.yaml")


@pytest.mark.campaign
@pytest.mark.parametrize("workers", [20, 40])
def test_many_workers_start_train_and_stop(torchrun: Launch, tmp_path: Path, workers: int):
    words = [f"clients={workers}", "training.epochs=1", "runtime.start_timeout=900"]
    words += ["runtime.rpc_timeout=900", "data.partition.kind=iid"]
    world = torchrun(workers + 1, "-m", "mpsl_dist", "train", str(TINY), *words)
    status, output = world.finish(1200)
    assert status == 0, output
    found = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert (found["status"], found["clients"]) == ("completed", workers)
