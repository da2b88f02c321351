"""Workers that die, hang, fail or stop in the middle of a real run, which goes on without them."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, World, until

WORLD = 4
CONFIG = {
    "name": "run",
    "clients": 6,
    "clients_per_worker": 2,
    "device": "cpu",
    "data": {"name": "digits-qa", "text_length": 10, "partition": {"alpha": 0.5}},
    "model": {
        "encoder": {"size": "custom", "width": 16, "depth": 1, "heads": 2},
        "image_patch": 4,
    },
    "training": {
        "epochs": 3,
        "batch_size": 300,
        "server": {"lr": 1e-3},
        "client": {"lr": 1e-3},
    },
    "faults": {"client_timeout": 8.0, "exit_timeout": 15.0, "rejoin": "never"},
    "runtime": {"server_threads": 1, "worker_threads": 1},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def lines(folder: Path) -> list[dict]:
    path = folder / "runs" / "run" / "metrics.jsonl"
    written = path.read_text().splitlines(keepends=True) if path.exists() else []
    # The last line may be on its way.
    return [json.loads(line) for line in written if line.endswith("\n")]


def steps_done(folder: Path) -> int:
    return sum(line["split"] == "train" for line in lines(folder))


def hosting(world: World, rank: int) -> int:
    """Id of the process that hosts a rank's clients, the child of the rank's own."""
    return world.rank(rank, hosts=True)


def assert_went_on_without(folder: Path, rank: int) -> dict:
    summary = json.loads((folder / "runs" / "run" / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["clients_lost"] == 2, summary
    assert summary["epochs_completed"] == 3
    log = (folder / "runs" / "run" / "rank0.log").read_text()
    told = [line for line in log.splitlines() if "is lost" in line]
    assert len(told) == 2 and all(f"worker{rank}" in line for line in told), told
    return summary


@pytest.mark.campaign
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_worker_that_dies_or_stops_is_left_behind(
    number: signal.Signals, torchrun, config: Path, tmp_path: Path
) -> None:
    world = torchrun(WORLD, "-m", "mpsl_dist", "train", str(config))
    until(lambda: steps_done(tmp_path) >= 3, 240, "three steps")
    os.kill(hosting(world, 2), number)
    status, output = world.finish(240)
    assert status == 0, output
    summary = assert_went_on_without(tmp_path, 2)
    assert summary["steps_repeated"] <= 1
    assert "worker2 ended by SIGKILL; not started again" in output


#: Client 3 fails, or is too slow, in a method at the fifth call.
FAULTY = """
import runpy, sys, time
from mpsl_dist.actors.client import Client
how, name = sys.argv.pop(1), sys.argv.pop(1)
method, calls = getattr(Client, name), []
def faulty(self, *words):
    if self.number == 3:
        calls.append(1)
        if len(calls) == 5:
            if how == "fails":
                raise OSError("clip_0042.mp4: truncated")
            time.sleep(12)
    return method(self, *words)
setattr(Client, name, faulty)
sys.argv = ["mpsl_dist", *sys.argv[1:]]
runpy.run_module("mpsl_dist", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("how", "message", "lost"),
    [
        ("fails", "loss", 1),
        pytest.param("is slow", "loss", 2, marks=pytest.mark.campaign),
        pytest.param("fails", "tokenize", 1, marks=pytest.mark.campaign),
        pytest.param("fails", "step", 1, marks=pytest.mark.campaign),
    ],
)
def test_a_client_that_fails_or_is_slow_is_left_behind(
    how: str, message: str, lost: int, torchrun, config: Path, tmp_path: Path
) -> None:
    """An error is its client's alone; with a late answer all clients of the worker are late."""
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    words = [str(script), how, message, "train", str(config)]
    status, output = torchrun(WORLD, *words, PYTHONPATH=str(ROOT)).finish(240)
    assert status == 0, output
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert (summary["status"], summary["clients_lost"]) == ("completed", lost), summary
    assert summary["steps_repeated"] == (message != "step")
    counted = [line["clients_lost"] for line in lines(tmp_path) if line["split"] == "train"]
    assert counted[0] == 0 and counted[-1] == lost


#: The worker of client 3 is killed in its third masked sum, having sent its key.
KILLED = """
import os, runpy, signal, sys
from mpsl_dist.actors.client import Client
mask, calls = Client.mask, []
def deadly(self, *words):
    if self.number == 3:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    return mask(self, *words)
Client.mask = deadly
sys.argv = ["mpsl_dist", *sys.argv[1:]]
runpy.run_module("mpsl_dist", run_name="__main__")
"""


def test_a_masked_sum_goes_on_without_a_worker_that_is_killed_in_it(
    torchrun, config: Path, tmp_path: Path
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    sync = ["mode=gradients", "masked=true"]
    words = [str(script), "train", str(config), *(f"tokenizer_sync.{word}" for word in sync)]
    words += ["faults.min_clients=3"]
    status, output = torchrun(WORLD, *words, PYTHONPATH=str(ROOT)).finish(240)
    assert status == 0, output
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert (summary["status"], summary["clients_lost"]) == ("completed", 2), summary
    assert summary["steps_repeated"] == 0
    assert "lost in mask, step 2" in output
    assert "step 2: the masked sum is begun again without the lost" in output


def test_a_worker_that_was_slow_comes_back_by_itself(
    torchrun, config: Path, tmp_path: Path
) -> None:
    """Its process goes on, with the state that it had."""
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    words = [str(script), "is slow", "loss", "train", str(config), "faults.rejoin=now"]
    world = torchrun(WORLD, *words, "training.epochs=100000", PYTHONPATH=str(ROOT))

    def all_there_again() -> bool:
        last = lines(tmp_path)[-1:]
        return bool(last) and last[0].get("clients_returned") == 2

    until(all_there_again, 240, "two returns")
    os.kill(world.process.pid, signal.SIGINT)
    _, output = world.finish(120)
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert (summary["clients_lost"], summary["clients_returned"]) == (0, 2), output
    assert "started again" not in output


def test_where_it_is_told_to_it_stops_and_names_the_client(
    torchrun, config: Path, tmp_path: Path
) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    words = [str(script), "fails", "loss", "train", str(config), "faults.on_loss=stop"]
    status, output = torchrun(WORLD, *words, PYTHONPATH=str(ROOT)).finish(240)
    assert status != 0 and "client 3: OSError: clip_0042.mp4: truncated" in output, output
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert (summary["status"], summary["clients_lost"]) == ("failed", 1)


#: Client 3's part of the backward fails as soon as there is a file called ``fail``.
BACKWARD = """
import runpy, sys
from pathlib import Path
from mpsl_dist.actors.client import Client
tokenize = Client.tokenize
def fail(gradient):
    raise RuntimeError("no gradient today")
def failing(self, step):
    smashed = tokenize(self, step)
    if self.number == 3 and Path("fail").exists():
        smashed[0].register_hook(fail)
    return smashed
Client.tokenize = failing
sys.argv = ["mpsl_dist", *sys.argv[1:]]
runpy.run_module("mpsl_dist", run_name="__main__")
"""


def test_a_client_whose_backward_fails_while_all_answer_is_found_and_left_behind(
    torchrun, config: Path, tmp_path: Path
) -> None:
    """Where others were lost before, too: who is gone for long is not taken for the cause."""
    script = tmp_path / "failing.py"
    script.write_text(BACKWARD)
    words = [str(script), "train", str(config), "training.epochs=8"]
    world = torchrun(WORLD, *words, PYTHONPATH=str(ROOT))
    until(lambda: steps_done(tmp_path) >= 3, 240, "three steps")
    said = world.output().splitlines()
    (other,) = (n for n in (1, 2, 3) if any(re.match(rf"worker{n} .*: clients 0", s) for s in said))
    os.kill(hosting(world, other), signal.SIGKILL)
    until(lambda: lines(tmp_path)[-1].get("clients_lost") == 2, 60, "a loss")
    (tmp_path / "fail").touch()
    status, output = world.finish(200)
    assert status == 0, output
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert (summary["status"], summary["clients_lost"]) == ("completed", 3), output
    assert output.count("client 3 is lost: client 3: backward failed: ") == 1
