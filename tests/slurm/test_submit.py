"""What ``launch/submit.py`` would submit, on machines with and without Slurm."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Launch

sys.path.insert(0, str(ROOT / "launch"))
import cluster
import job
import submit
import sweep

from mpsl_dist.config import ConfigError, load, to_dict

TINY = Path(__file__).with_name("tiny.yaml")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_sweep(folder: Path, **changes: object) -> Path:
    values = {
        "config": str(TINY),
        "set": {"training": {"epochs": 1}},
        "grid": {"clients": [1, 3], "training.server.lr": [1e-3, 0.01]},
    } | changes
    path = folder / "rates.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value}))
    return path


def finish(experiment, status: str) -> None:
    folder = experiment.run_directory
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(experiment)))
    (folder / "summary.json").write_text(json.dumps({"status": status}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30", 30), (45, 45), ("30:30", 31), ("2:00:00", 120), ("1-0", 1440), ("1-02:30:00", 1590)],
)
def test_time_limits(text, expected):
    assert cluster.minutes(text) == expected


@pytest.mark.parametrize("text", ["soon", "", "1:2:3:4", "0", "-5"])
def test_no_time_limit(text):
    with pytest.raises(ConfigError, match="time"):
        cluster.minutes(text)


def test_cluster_habits_name_every_mistake_at_once(tmp_path: Path):
    path = tmp_path / "habits.yaml"
    path.write_text("partitoin: gpu\ncpus_per_task: many\nmodules: cuda\ntime: 3:00:00\n")
    with pytest.raises(ConfigError) as error:
        cluster.Cluster.read(path)
    assert all(word in str(error.value) for word in ("partitoin", "cpus_per_task", "modules"))
    assert cluster.Cluster.read(ROOT / "launch" / "cluster.yaml") == cluster.Cluster()


def test_dry_run_prints_the_batch_file(here: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("submitit")
    habits = {"partition": "slow", "modules": ["cuda/13.0"], "interface": "ib0", "qos": "low"}
    (here / "habits.yaml").write_text(yaml.safe_dump(habits))
    words = [str(TINY), "--dry-run", "--cluster", "habits.yaml", "--partition", "gpu"]
    assert submit.main([*words, "--nodes", "2", "--gpus-per-node", "8", "--time", "1-0"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "#SBATCH --partition=gpu",
        "#SBATCH --qos=low",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks=4",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=1440",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR2@120",
        "module load cuda/13.0",
        "export TP_SOCKET_IFNAME=ib0",
    ):
        assert line in shown.splitlines()
    assert f"train {TINY}" in shown
    assert not (here / "runs").exists()


def test_sweep_is_the_grid_in_arrays_of_one_shape(here: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("submitit")
    path = write_sweep(here, at_once=2)
    runs, at_once = sweep.read(path, ["seed=7"])
    assert at_once == 2
    assert [run.experiment.name for run in runs] == [
        f"rates-clients{clients}-lr{rate}" for clients in (1, 3) for rate in (0.001, 0.01)
    ]
    assert [run.processes for run in runs] == [2, 2, 4, 4]
    assert {run.experiment.seed for run in runs} == {7}
    assert runs[1].experiment.training.server.lr == 0.01
    finish(runs[0].experiment, "completed")
    finish(runs[1].experiment, "stopped")
    assert submit.main([str(path), "seed=7", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "rates-clients1-lr0.001 is completed: skipped" in shown
    assert "rates-clients1-lr0.01\"' --resume" in shown
    assert "#SBATCH --array=0-1%2" in shown and "#SBATCH --ntasks=4" in shown


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_sweep_of_the_project_loads(path: Path):
    runs, _ = sweep.read(path, ["data.root=."])
    assert len(runs) > 1


def test_mistakes_of_a_sweep_are_named_at_once(here: Path):
    with pytest.raises(ConfigError) as error:
        sweep.read(write_sweep(here, grid={"sead": [1], "clients": 3}, at_once=-1), [])
    assert "grid.clients" in str(error.value) and "at_once" in str(error.value)
    with pytest.raises(ConfigError, match=r"sead: unknown key; did you mean 'seed'"):
        sweep.read(write_sweep(here, grid={"sead": [1]}), [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clientz=3"], "did you mean 'clients'"),
        (["name=new", "--tasks-per-node", "3"], "4 ranks do not fit"),
        (["name=new", "--time", "soon"], "time"),
        (["--cluster", "nowhere.yaml"], "nowhere.yaml"),
        (["seed=1"], "seed was 2024 there and is 1 now"),
        ([], "continue it with --resume"),
    ],
)
def test_refusals(here: Path, capsys: pytest.CaptureFixture, words: list[str], message: str):
    pytest.importorskip("submitit")
    finish(load(TINY), "stopped")
    assert submit.main([str(TINY), *words, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\xff", b"[", b"- 3", b"7", b": :"])
@pytest.mark.parametrize("which", ["experiment", "sweep", "habits", "config", "summary"])
def test_a_damaged_file_is_named(
    here: Path, capsys: pytest.CaptureFixture, which: str, content: bytes
):
    pytest.importorskip("submitit")
    experiment = load(TINY)
    finish(experiment, "stopped")
    run = experiment.run_directory
    damaged = {"config": run / "config.yaml", "summary": run / "summary.json"}
    path = damaged.get(which, here / f"{which}.yaml")
    path.write_bytes(content)
    asked = {"experiment": [str(path)], "sweep": [str(path)]}.get(which, [str(TINY)])
    habits = ["--cluster", str(path)] if which == "habits" else []
    assert submit.main([*asked, "--dry-run", "--resume", *habits]) == 2
    assert f"error: {path}: " in capsys.readouterr().err


def test_a_sweep_over_no_keys_is_refused(here: Path):
    with pytest.raises(ConfigError, match="found the key 3"):
        sweep.read(write_sweep(here, grid={3: [1]}), [])


def test_a_job_with_a_damaged_summary_is_not_queued_again(here: Path):
    experiment = load(TINY)
    finish(experiment, "stopped")
    task = job.TrainJob(str(TINY), (), str(experiment.run_directory))
    assert task._is_stopped()
    (experiment.run_directory / "summary.json").write_text("{")
    assert not task._is_stopped()


def test_without_submitit_it_says_what_to_do(here: Path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert submit.main([str(TINY)]) == 2
    assert "pip install 'mpsl_dist[slurm]'" in capsys.readouterr().err


def test_a_job_that_starts_again_resumes(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    experiment = load(TINY)
    task = job.TrainJob(str(TINY), ("seed=1", "--overwrite"), str(experiment.run_directory))
    assert task._arguments() == ["seed=1", "--overwrite"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert task._arguments() == ["seed=1", "--overwrite"]  # it never came to a run directory
    finish(experiment, "stopped")
    assert task._arguments() == ["seed=1", "--resume"]


def test_a_queued_run_is_what_was_submitted_though_its_file_changed(here: Path):
    path = here / "mine.yaml"
    path.write_text(TINY.read_text())
    (run,), _ = sweep.read(path, ["seed=7"])
    task = submit._job(run, submit._parser().parse_args([str(path)]))
    path.write_text(TINY.read_text() + "\ntokenizer_sync: {mode: weights}\n")
    assert load(path, ["seed=7"]) != run.experiment
    assert load(path, task.arguments) == run.experiment


def test_local_executor_trains(launch: Launch, tmp_path: Path):
    pytest.importorskip("submitit")
    (tmp_path / "habits.yaml").write_text(yaml.safe_dump({"time": 10}))
    words = [str(TINY), "clients=1", "training.epochs=1", "--local", "--wait"]
    line = [sys.executable, str(ROOT / "launch" / "submit.py"), *words, "--cluster", "habits.yaml"]
    status, output = launch(line).finish(240)
    assert status == 0, output
    found = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert found["status"] == "completed"
