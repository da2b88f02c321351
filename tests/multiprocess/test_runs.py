"""Whole runs by the command line: resume, interruption, failures. Real torchrun, real signals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, small_disk, until
from safetensors.torch import load_file

from mpsl_dist import config as configs
from mpsl_dist.analysis import watch
from mpsl_dist.config.methods import processes_of

WORLD = 3
CONFIG = {
    "name": "run",
    "clients": 4,
    "clients_per_worker": 2,
    "tokenizer_sync": {"mode": "gradients", "every": 2},
    "data": {"name": "digits-qa", "text_length": 10, "partition": {"alpha": 0.5}},
    "model": {
        "encoder": {"size": "custom", "width": 16, "depth": 1, "heads": 2},
        "image_patch": 4,
    },
    "training": {
        "epochs": 2,
        "batch_size": 400,
        "server": {"lr": 1e-3, "schedule": "cosine"},
        "client": {"lr": 1e-3},
    },
    "checkpoint": {"every_steps": 4},
    "faults": {"on_loss": "stop"},
    "runtime": {"server_threads": 1, "worker_threads": 1},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def train(torchrun, config: Path, *words: str, **variables: str):
    return torchrun(WORLD, "-m", "mpsl_dist", "train", str(config), *words, **variables)


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum('"train"' in line for line in lines)


def trained_state(run: Path) -> dict[str, torch.Tensor]:
    """Every number that a run ends with: the model, and every owner's parameters and moments."""
    state = load_file(run / "model" / "model.safetensors")
    last = max((run / "checkpoints").glob("step-*"))
    for path in last.glob("*.pt"):
        for name, value in _tensors(torch.load(path)):
            state[f"{path.name} {name}"] = value
    return state


def _tensors(value, name: str = ""):
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")


def assert_same_run(one: Path, other: Path) -> None:
    ours, theirs = trained_state(one), trained_state(other)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), f"{key} differs"
    told = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    for key in ("test", "loss", "steps_completed", "communication", "status"):
        assert told[0][key] == told[1][key], key
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (one, other)]
    steps = [[json.loads(line)["step"] for line in each] for each in lines]
    assert steps[0] == steps[1]


def assert_watched(run: Path) -> None:
    """Who looks on by the run's files alone is told what its summary says."""
    seen, summary = watch.Watcher(run).look(), json.loads((run / "summary.json").read_text())
    assert (seen.status, seen.tally.step) == (summary["status"], summary["steps_completed"])
    environment = json.loads((run / "environment.json").read_text())
    assert seen.steps == environment["steps_per_epoch"] * seen.epochs
    per_epoch = summary["communication"]["up_bytes_per_client_per_epoch"]
    assert f"{per_epoch / 2**20:.2f} MiB up" in dict(watch.rows(seen))["traffic"]


def test_interrupted_and_killed_runs_resume_bit_identical(torchrun, config, tmp_path) -> None:
    world = train(torchrun, config, "name=whole")
    status, output = world.finish()
    assert status == 0, output
    runs = tmp_path / "runs"
    assert_watched(runs / "whole")

    world = train(torchrun, config, "name=parts")
    until(lambda: steps_done(runs / "parts") >= 6, 90, "six steps")
    os.killpg(world.process.pid, signal.SIGINT)  # Ctrl-C in a terminal reaches every process
    _, output = world.finish()
    stopped = json.loads((runs / "parts" / "summary.json").read_text())
    assert stopped["status"] == "stopped" and stopped["steps_completed"] >= 6, output
    assert_watched(runs / "parts")

    world = train(torchrun, config, "name=parts", "--resume")
    until(lambda: steps_done(runs / "parts") >= 18, 90, "eighteen steps")
    os.kill(world.rank(2), signal.SIGKILL)
    status, output = world.finish()
    assert status != 0
    assert re.search(r"error: worker2 \(clients .*\): lost in \w+, step \d+", output), output
    assert json.loads((runs / "parts" / "summary.json").read_text())["status"] == "failed"

    status, output = train(torchrun, config, "name=parts", "--resume").finish()
    assert status == 0, output
    assert_same_run(runs / "parts", runs / "whole")


@pytest.mark.campaign
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(torchrun, config, tmp_path) -> None:
    status, output = train(torchrun, config).finish()
    assert status == 0, output
    run = tmp_path / "runs" / "run"
    shutil.copytree(run, tmp_path / "whole")
    last, before = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    part = last / "client-0002.pt"
    part.write_bytes(part.read_bytes()[:-100])
    status, output = train(torchrun, config, "--resume").finish()
    assert status == 0, output
    (warning,) = re.findall(r"warning: .*", output)
    assert (
        str(part) in warning and f"continuing from runs/run/checkpoints/{before.name}" in warning
    ), warning
    assert_same_run(run, tmp_path / "whole")

    summary = (run / "summary.json").read_text()
    for part in (run / "checkpoints").glob("*/client-0001.pt"):
        part.write_bytes(b"")
    status, output = train(torchrun, config, "--resume").finish()
    assert status != 0 and "no checkpoint is left to continue from" in output, output
    assert output.count("client-0001.pt: damaged") == 2
    assert (run / "summary.json").read_text() == summary


FULL = """
import runpy, sys
from contextlib import suppress
from mpsl_dist.actors.client import Client
save = Client.save
def full(self, folder):
    if self.number == 3 and folder.endswith("step-00000008"):
        with suppress(OSError), open(BALLAST, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    return save(self, folder)
Client.save = full
sys.argv = ["mpsl_dist", *sys.argv[1:]]
runpy.run_module("mpsl_dist", run_name="__main__")
"""


def test_a_clients_full_disk_stops_the_run_and_keeps_the_last_checkpoint(
    torchrun, config, tmp_path
) -> None:
    disk, script = tmp_path / "disk", tmp_path / "full.py"
    script.write_text(FULL.replace("BALLAST", repr(str(disk / "ballast"))))
    with small_disk(disk, "16m"):
        world = torchrun(WORLD, str(script), "train", str(config), f"output={disk}")
        status, output = world.finish()
        expected = (
            r"error: .*client 3: DiskError: .*No space left.*client-0003\.pt cannot be written"
        )
        assert status != 0 and len(re.findall(expected, output)) == 1, output
        ours = re.split(r"torch[./]distributed[./]elastic", output)[0]
        assert "Traceback" not in ours, output
        run = disk / "run"
        assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000004"]
        assert not list(run.rglob("*.partial"))


def test_workers_end_when_the_server_is_killed(torchrun, config, tmp_path) -> None:
    world = train(torchrun, config, "training.epochs=500")
    until(lambda: steps_done(tmp_path / "runs" / "run") >= 2, 90, "two steps")
    os.kill(world.rank(0), signal.SIGKILL)
    status, _ = world.finish(90)
    assert status != 0


@pytest.mark.campaign
def test_workers_that_ask_for_the_server_all_the_time_take_no_end_for_its_death(
    torchrun, tmp_path
) -> None:
    ranks = str(ROOT / "tests" / "multiprocess" / "ranks.py")
    status, output = torchrun(9, ranks, "end", str(tmp_path / "none")).finish()
    assert status == 0, output
    assert "gone" not in output and "terminate" not in output


FAULTY = """
import runpy, sys
from mpsl_dist.actors.local_data import LocalData
batch = LocalData.batch
def faulty(self, step):
    if self.client == 3 and step == 5:
        raise OSError("clip_0042.mp4: truncated")
    return batch(self, step)
LocalData.batch = faulty
sys.argv = ["mpsl_dist", *sys.argv[1:]]
runpy.run_module("mpsl_dist", run_name="__main__")
"""


def test_a_clients_error_reaches_the_user_with_its_name_and_step(torchrun, config, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    status, output = torchrun(WORLD, str(script), "train", str(config)).finish()
    assert status != 0
    expected = r"error: worker(\d), tokenize, step 5: client 3: OSError: clip_0042.mp4: truncated"
    (worker,) = re.findall(expected, output)
    assert "Traceback" not in re.split(expected, output)[0], output
    run = tmp_path / "runs" / "run"
    assert "clip_0042" in (run / "error.txt").read_text()
    assert "clip_0042" in (run / f"rank{worker}.log").read_text()


def test_the_test_set_may_lie_with_the_clients_and_own_tokenizers_be_tested(
    torchrun, config, tmp_path
) -> None:
    words = ["training.evaluate_own=true", "training.epochs=1", "tokenizer_sync.mode=weights"]
    results = {}
    for place in ("server", "clients"):
        world = train(torchrun, config, *words, f"name={place}", f"data.test_at={place}")
        status, output = world.finish()
        assert status == 0, output
        summary = tmp_path / "runs" / place / "summary.json"
        results[place] = json.loads(summary.read_text())
    test = {place: result["test"] for place, result in results.items()}
    assert test["clients"]["accuracy"] == test["server"]["accuracy"]
    assert set(test["clients"]) == set(test["server"]) >= {"accuracy_own_mean"}
    kinds = {p: set(r["communication"]["total_bytes_by_kind"]) for p, r in results.items()}
    assert kinds["clients"] - kinds["server"] == {
        "test_activations",
        "test_predictions",
        "test_weights_down",
    }


def test_the_model_left_behind_gives_the_runs_accuracy_without_rpc(
    torchrun, launch, config, tmp_path
) -> None:
    import sys

    assert train(torchrun, config, "training.epochs=1").finish()[0] == 0
    run = tmp_path / "runs" / "run"
    status, output = launch([sys.executable, "-m", "mpsl_dist", "evaluate", str(run)]).finish()
    expected = json.loads((run / "summary.json").read_text())["test"]["accuracy"]
    assert status == 0 and f"accuracy {expected:.4f}" in output, output


def test_a_wrong_number_of_processes_names_the_right_line(torchrun, config) -> None:
    status, output = torchrun(2, "-m", "mpsl_dist", "train", str(config)).finish()
    assert status != 0
    assert "need 3 processes, torchrun started 2" in output
    assert f"torchrun --standalone --nproc-per-node 3 -m mpsl_dist train {config}" in output


def test_the_quickstart_config_is_the_one_that_the_script_starts() -> None:
    script = (ROOT / "launch" / "quickstart.sh").read_text()
    assert "-m mpsl_dist train configs/quickstart.yaml" in script
    quickstart = configs.load(ROOT / "configs" / "quickstart.yaml")
    assert processes_of(quickstart) == 3
