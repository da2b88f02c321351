"""Runs on a real Slurm: two nodes on this host, started and stopped by ``cluster.sh``."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, World, launcher, until

HERE = Path(__file__).parent
TINY = HERE / "tiny.yaml"
SUBMIT = ROOT / "launch" / "submit.py"
SBATCH = ROOT / "slurm" / "train.sbatch"
PROGRAMS = ("sbatch", "srun", "slurmctld", "slurmd", "munged")
MISSING = [program for program in PROGRAMS if shutil.which(program) is None]
#: Seconds for one job from submission to end; four processes import torch on what cores there are.
JOB = 240

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"no Slurm here ({', '.join(MISSING)}): tests/slurm/cluster.sh install"
)


class Cluster:
    """The running Slurm, and the folder that jobs are submitted from."""

    def __init__(self, folder: Path, launch) -> None:
        self.folder, self.launch = folder, launch
        self.variables = {
            "SLURM_CONF": str(folder / "slurm" / "slurm.conf"),
            # As where the environment is activated, which the plain batch file asks for.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        #: A cluster that keeps its state under a name that no other test run has.
        self.habits = folder / "habits.yaml"
        self.habits.write_text(yaml.safe_dump({"logs": str(folder / "logs"), "time": 10}))

    def start(self, *words: object) -> World:
        """Start a program that speaks to this Slurm."""
        return self.launch([str(word) for word in words], **self.variables)

    def ask(self, *words: object) -> str:
        """Run a short Slurm command; gives its output."""
        answer = subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | self.variables,
        )
        return answer.stdout.strip()

    def submit(self, config: Path, *words: str) -> World:
        """Submit with submitit and wait for the end."""
        pytest.importorskip("submitit", reason="submitit is not installed (extra 'slurm')")
        line = (sys.executable, SUBMIT, config, *words)
        return self.start(*line, "--cluster", self.habits, "--wait")

    def sbatch(self, config: Path, *words: str) -> World:
        """Submit the plain batch file and wait for the end."""
        options = ("--wait", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2")
        return self.start("sbatch", *options, SBATCH, config, *words)

    def state(self, job: str) -> str:
        """Return a job's state, empty when Slurm has forgotten it."""
        return "".join(re.findall(r"JobState=(\w+)", self.ask("scontrol", "show", "job", job)))

    def start_again(self, job: str) -> None:
        """Wait until a job is back in the queue; then shorten Slurm's two minutes of delay."""
        until(lambda: self.state(job) == "PENDING", JOB, f"job {job} in the queue again")
        # Not at once: within a second, the nodes still refuse it as the job that they just ended.
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now+10")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    script = [str(HERE / "cluster.sh")]
    # Under the mark of a launch, so that nothing of it can stay behind.
    with launcher(folder) as launch:
        status, output = _run(launch, [*script, "start", str(folder / "slurm")])
        assert status == 0, output
        try:
            yield Cluster(folder, launch)
        finally:
            _run(launch, [*script, "stop", str(folder / "slurm")])


def _run(launch, line: list[str]) -> tuple[int, str]:
    world = launch(line)
    return world.process.wait(120), world.output()


def job_of(world: World) -> str:
    """Wait for the id of the job that a program submitted."""
    pattern = re.compile(r"(?:Submitted batch job|^job) (\d+)", re.MULTILINE)
    until(lambda: bool(pattern.search(world.output())), 60, "submission")
    return pattern.search(world.output())[1]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def steps_of(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text(encoding="utf-8").count("\n") if metrics.exists() else 0


def trace(folder: Path) -> tuple[list[tuple], dict[str, bytes]]:
    """Return every loss and metric of a run, and its exported model."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [(x["step"], x["split"], x["loss"], tuple(x["metric"].items())) for x in lines]
    return numbers, {file.name: file.read_bytes() for file in (folder / "model").glob("*.saf*")}


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster) -> Path:
    """A run on two nodes through submitit, which nothing interrupts."""
    world = cluster.submit(TINY, "name=whole", "--nodes", "2", "--tasks-per-node", "2")
    status, output = world.finish(JOB)
    assert status == 0, output
    folder = cluster.folder / "runs" / "whole"
    assert "whole: completed" in output and "tail -F" in output
    return folder


def test_four_tasks_on_two_nodes_through_submitit(cluster: Cluster, uninterrupted: Path):
    found = summary(uninterrupted)
    assert (found["status"], found["clients"], found["epochs_completed"]) == ("completed", 3, 2)
    logs = sorted(path.name for path in (cluster.folder / "logs").glob("*/*_log.out"))
    assert [name.partition("_")[2] for name in logs[:4]] == [f"{n}_log.out" for n in range(4)]


def test_plain_sbatch_trains_the_same(cluster: Cluster, uninterrupted: Path):
    world = cluster.sbatch(TINY, "name=plain")
    status, output = world.finish(JOB)
    assert status == 0, output
    assert trace(cluster.folder / "runs" / "plain") == trace(uninterrupted)


def test_array_of_four_runs_skips_the_finished(cluster: Cluster):
    sweep = cluster.folder / "seeds.yaml"
    grid = {"seed": [1, 2], "training.epochs": [1, 2]}
    shared = {"clients": 1, "data.partition.kind": "iid"}
    sweep.write_text(yaml.safe_dump({"config": str(TINY), "set": shared, "grid": grid}))
    status, output = cluster.submit(sweep, "--at-once", "2").finish(2 * JOB)
    assert status == 0, output
    runs = sorted((cluster.folder / "runs").glob("seeds-*"))
    assert [run.name for run in runs] == [
        f"seeds-seed{seed}-epochs{epochs}" for seed in (1, 2) for epochs in (1, 2)
    ]
    assert all(summary(run)["status"] == "completed" for run in runs)
    script = next((cluster.folder / "logs").glob("*_0/*_submission.sh"), None) or next(
        path
        for path in (cluster.folder / "logs").rglob("*.sh")
        if "--array" in path.read_text(encoding="utf-8")
    )
    assert "--array=0-3%2" in script.read_text(encoding="utf-8")
    status, output = cluster.submit(sweep).finish(60)
    assert status == 0 and output.count("skipped") == 4, output


@pytest.mark.parametrize("way", ["submitit", pytest.param("sbatch", marks=pytest.mark.campaign)])
def test_preempted_job_requeues_itself_and_resumes_bit_for_bit(
    cluster: Cluster, uninterrupted: Path, way: str
):
    folder = cluster.folder / "runs" / f"notice-{way}"
    if way == "submitit":
        world = cluster.submit(TINY, f"name={folder.name}", "--nodes", "2")
    else:
        world = cluster.sbatch(TINY, f"name={folder.name}")
    job = job_of(world)
    until(lambda: steps_of(folder) >= 3, JOB, "first steps")
    batch = ["--batch"] if way == "sbatch" else []
    cluster.ask("scancel", *batch, "--signal=USR2", job)
    cluster.start_again(job)
    stopped = summary(folder)
    assert stopped["status"] == "stopped" and stopped["steps_completed"] >= 3
    # `sbatch --wait` ends with the first start of the job, so the state is asked for.
    until(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), JOB, f"end of job {job}")
    assert cluster.state(job) == "COMPLETED", world.output()
    assert summary(folder)["status"] == "completed"
    assert trace(folder) == trace(uninterrupted)


def test_cancelled_job_stops_and_stays_out_of_the_queue(cluster: Cluster):
    folder = cluster.folder / "runs" / "cancelled"
    world = cluster.sbatch(TINY, "name=cancelled", "training.epochs=500")
    job = job_of(world)
    until(lambda: steps_of(folder) >= 3, JOB, "first steps")
    cluster.ask("scancel", job)
    status, output = world.finish(JOB)
    assert status != 0, output
    until(lambda: cluster.state(job) == "CANCELLED", 60, "end of the job")
    assert summary(folder)["status"] == "stopped"


def test_killed_worker_fails_the_job_with_its_name(cluster: Cluster):
    folder = cluster.folder / "runs" / "killed"
    world = cluster.sbatch(
        TINY, "name=killed", "training.epochs=500", "runtime.rpc_timeout=30", "faults.on_loss=stop"
    )
    job = job_of(world)
    until(lambda: steps_of(folder) >= 3, JOB, "first steps")
    os.kill(_task(world, 3), signal.SIGKILL)
    status, _ = world.finish(60)
    assert status != 0
    until(lambda: cluster.state(job) == "FAILED", 60, "end of the job")
    assert "worker3 on 127.0.0.2 (client 2)" in summary(folder)["reason"]
    output = (cluster.folder / f"slurm-{job}.out").read_text(encoding="utf-8")
    assert "worker3 on 127.0.0.2" in output


def _task(world: World, rank: int) -> int:
    """Return the process id of a Slurm task of this launch."""
    for member in world.members():
        variables = Path(f"/proc/{member}/environ").read_bytes().split(b"\0")
        command = Path(f"/proc/{member}/cmdline").read_bytes()
        python = b"mpsl_dist" in command and b"python" in command.split(b"\0")[0]
        if python and f"SLURM_PROCID={rank}".encode() in variables:
            return member
    raise AssertionError(f"no task {rank}")
