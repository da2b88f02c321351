"""An hour of losses: every minute a random worker is killed, and comes back.

``MPSL_TEST_MINUTES`` is another number of minutes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from conftest import Launch, World, until
from test_lost_workers import hosting
from test_runs import steps_done

WORKERS, SEED, MINUTE = 5, 7, 60.0
CONFIG = {
    "clients": 20,
    "clients_per_worker": 4,
    "device": "cpu",
    "tokenizer_sync": {"mode": "gradients", "every": 5},
    "data": {"name": "digits-qa", "text_length": 10, "partition": {"alpha": 0.5}},
    "model": {
        "encoder": {"size": "custom", "width": 32, "depth": 2, "heads": 2},
        "image_patch": 4,
    },
    "training": {
        "epochs": 1_000_000,
        "batch_size": 200,
        "server": {"lr": 1e-3},
        "client": {"lr": 1e-3},
    },
    "checkpoint": {"every_epochs": 20},
    "faults": {"rejoin": "now", "restarts": 1_000, "client_timeout": 20.0},
    "runtime": {"server_threads": 1, "worker_threads": 1},
}


@dataclass
class Samples:
    """What a process holds, over time."""

    process: int
    megabytes: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def take(self) -> None:
        pages = int(Path(f"/proc/{self.process}/statm").read_text().split()[1])
        self.megabytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.files.append(len(os.listdir(f"/proc/{self.process}/fd")))


def quarters(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the second and of the last quarter; the first one is the start."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])


def accuracies(run: Path) -> dict[int, float]:
    """Test accuracy by epoch."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {x["epoch"]: x["metric"]["accuracy"] for x in lines if x["split"] == "test"}


def begin(launch: Launch, folder: Path, name: str) -> World:
    """Start a run with no end in sight; wait for its first steps."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    world = launch([sys.executable, "-m", "mpsl_dist", "train", str(config), f"name={name}"])
    until(lambda: steps_done(folder / "runs" / name) >= 3, 300, "three steps")
    return world


def stop(world: World) -> str:
    """Stop a run as by Ctrl-C; it leaves a checkpoint."""
    os.killpg(world.process.pid, signal.SIGINT)
    _, output = world.finish(120)
    assert output.endswith("stopped on request; the same command with --resume continues\n"), output
    return output


@pytest.mark.campaign
def test_a_run_that_loses_a_worker_every_minute_learns_as_the_undisturbed_one(
    launch: Launch, tmp_path: Path
) -> None:
    minutes, draw = int(os.environ.get("MPSL_TEST_MINUTES", "60")), random.Random(SEED)
    lost, calm = tmp_path / "runs" / "lost", tmp_path / "runs" / "calm"
    world = begin(launch, tmp_path, "lost")
    server = Samples(world.rank(0))
    for _ in range(minutes):
        rank, began = draw.randint(1, WORKERS), time.monotonic()
        process, done = hosting(world, rank), steps_done(lost)
        os.kill(process, signal.SIGKILL)
        until(lambda r=rank, p=process: returned(world, r, p), MINUTE, "the worker's return")
        until(lambda at=done: steps_done(lost) > at + 3, MINUTE, "more steps")
        # The server is looked at four times a minute.
        for quarter in range(1, 5):
            time.sleep(max(0.0, began + quarter * MINUTE / 4 - time.monotonic()))
            server.take()
    stop(world)

    summary = json.loads((lost / "summary.json").read_text())
    parts = list(max((lost / "checkpoints").glob("step-*")).glob("client-*.pt"))
    assert summary["status"] == "stopped" and len(parts) == CONFIG["clients"], summary
    told = (lost / "rank0.log").read_text().count("is lost")
    assert told == minutes * CONFIG["clients_per_worker"]

    world, found = begin(launch, tmp_path, "calm"), accuracies(lost)
    # Far beyond where learning ends, at a third of the time.
    until(
        lambda: steps_done(calm) >= steps_done(lost) // 3, minutes * MINUTE, "a third of the steps"
    )
    stop(world)
    expected = accuracies(calm)
    last = sorted(found.keys() & expected.keys())[-20:]
    with_losses, without = (
        statistics.median(x[epoch] for epoch in last) for x in (found, expected)
    )
    print(f"accuracy {with_losses:.3f} beside {without:.3f} at epochs {last}")
    print(f"megabytes {server.megabytes}, open files {server.files}")
    assert with_losses == pytest.approx(without, abs=0.03)
    for values, slack in ((server.megabytes, 20.0), (server.files, 2.0)):
        early, late = quarters(values)
        assert late <= 1.05 * early + slack, values


def returned(world: World, rank: int, before: int) -> bool:
    """Whether another process hosts the clients of a rank."""
    try:
        return hosting(world, rank) != before
    except AssertionError:  # none, at the moment
        return False
