"""A server that does nothing any more, and one that is only busy."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import toys
import yaml
from conftest import Launch, World, until
from test_launch import SLACK, errors
from test_runs import steps_done

from mpsl_dist.config import to_dict

COMMAND = str(Path(__file__).with_name("toy_command.py"))
EXIT_TIMEOUT = 20.0


@pytest.fixture
def training(launch: Launch, tmp_path: Path) -> Callable[..., World]:
    """A run with no end in sight, once it has trained some steps."""

    def train(script: str = COMMAND) -> World:
        training = to_dict(toys.experiment())["training"] | {"epochs": 100_000}
        chosen = toys.experiment(
            clients_per_worker=2,
            training=training,
            checkpoint={"every_epochs": 0},
            faults={"exit_timeout": EXIT_TIMEOUT},
        )
        config = tmp_path / "toy.yaml"
        config.write_text(yaml.safe_dump(to_dict(chosen)))
        world = launch([sys.executable, script, "train", str(config)])
        until(lambda: steps_done(tmp_path / "runs" / "toy") >= 3, 200, "three steps")
        return world

    return train


def test_a_run_whose_server_is_stopped_ends_by_one_message(training: Callable[..., World]) -> None:
    world = training()
    os.kill(world.rank(0), signal.SIGSTOP)
    began = time.monotonic()
    status, output = world.finish(180)
    assert time.monotonic() - began < EXIT_TIMEOUT + SLACK
    (error,) = errors(output)
    assert status == 1 and "the server gave no sign of life" in error, output


#: At its sixth step nothing else of the server's Python runs for longer than workers wait for it.
BUSY = """
import ctypes, sys
sys.path[:0] = [TESTS]
from mpsl_dist.__main__ import main
from mpsl_dist.methods.mpsl import Mpsl
step = Mpsl.step
def busy(self, epoch_step, number):
    if number == 5:
        ctypes.PyDLL(None).sleep(SECONDS)
    return step(self, epoch_step, number)
Mpsl.step = busy
sys.exit(main())
"""


@pytest.mark.campaign
def test_workers_stay_with_a_server_that_is_busy(
    training: Callable[..., World], tmp_path: Path
) -> None:
    script = tmp_path / "busy.py"
    tests, seconds = str(Path(COMMAND).parents[1]), str(int(EXIT_TIMEOUT + SLACK))
    script.write_text(BUSY.replace("TESTS", repr(tests)).replace("SECONDS", seconds))
    world = training(str(script))
    until(lambda: steps_done(tmp_path / "runs" / "toy") > 10, 60, "more steps")
    assert "is gone" not in world.output()
