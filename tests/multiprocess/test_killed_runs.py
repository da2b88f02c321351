"""Every process of a run is killed again and again; what it resumes to is the uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import Launch, World, until
from test_runs import CONFIG, assert_same_run, steps_done

EPOCHS, KILLS, SEED = 4, 10, 20


def losses(run: Path) -> list[tuple]:
    """Every number of training and tests that ``metrics.jsonl`` holds."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["split"], line["loss"], line["metric"]) for line in lines]


def kill(world: World) -> None:
    """End every process of a run at once, the launching one first."""
    while members := world.members():
        for member in members:
            try:
                os.kill(member, signal.SIGKILL)
            except ProcessLookupError:
                continue
    world.process.wait(10)


@pytest.mark.campaign
def test_a_run_killed_at_ten_random_moments_is_the_uninterrupted_run_to_the_last_bit(
    launch: Launch, tmp_path: Path
) -> None:
    config, runs = tmp_path / "config.yaml", tmp_path / "runs"
    training = CONFIG["training"] | {"epochs": EPOCHS}
    config.write_text(yaml.safe_dump(CONFIG | {"training": training}))
    line = [sys.executable, "-m", "mpsl_dist", "train", str(config)]
    status, output = launch([*line, "name=whole"]).finish(300)
    assert status == 0, output
    total = steps_done(runs / "whole")

    draw = random.Random(SEED)
    # Some kills find the run at the same step again: what it did since its checkpoint is lost.
    moments = sorted(draw.randrange(1, total) for _ in range(KILLS))
    for number, steps in enumerate(moments):
        resume = ["--resume"] if number else []
        world = launch([*line, "name=parts", *resume])
        until(lambda at=steps: steps_done(runs / "parts") >= at, 120, f"{steps} steps")
        time.sleep(draw.uniform(0, 0.3))  # somewhere in a step, a test or a checkpoint
        assert world.process.poll() is None, world.output()
        kill(world)
    status, output = launch([*line, "name=parts", "--resume"]).finish(300)
    assert status == 0, output
    assert_same_run(runs / "parts", runs / "whole")
    assert losses(runs / "parts") == losses(runs / "whole")
