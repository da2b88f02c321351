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

from mpsl_dist.config import ConfigError, Experiment, load, to_dict

TINY = Path(__file__).with_name("tiny.yaml")
PAPER = sorted((ROOT / "configs" / "sweeps" / "paper").glob("*.yaml"))
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


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


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_of_the_project_loads(path: Path):
    runs, _ = sweep.read(path, ["data.root=."])
    assert len(runs) > 1


@pytest.mark.parametrize("root", [[], ["data.root=."]], ids=["built-in", "files"])
def test_the_papers_sweeps_are_ten_and_small_ones_need_no_file(here: Path, root: list[str]):
    names = {f"table{n}" for n in range(1, 6)} | {f"figure{n}" for n in range(2, 7)}
    assert {path.stem for path in PAPER} == names
    words = [*map(str, PAPER), "--profile", "tiny", *root]
    options = submit._parser().parse_intermixed_args(words)
    runs, at_once = submit._read(options)
    # Of 52 and 48, 8 are both a table's and a figure's.
    assert at_once == 2 and len(runs) == (44 if root else 40)
    assert all("-tiny-" in run.experiment.name for run in runs)
    trained = [run.experiment for run in runs if run.command == "train"]
    assert all(one.clients <= 10 and one.training.epochs <= 5 for one in trained)
    assert ("mnist-fsdd" in {one.data.name for one in trained}) == bool(root)


@pytest.fixture(scope="module")
def planned() -> dict[str, dict[str, Experiment]]:
    """The experiments of some of the paper's sweeps at their full size, by sweep and name."""
    some = [path for path in PAPER if path.stem in ("figure2", "table1", "table2")]
    read = {path.stem: sweep.read(path, [])[0] for path in some}
    return {
        stem: {run.experiment.name: run.experiment for run in runs} for stem, runs in read.items()
    }


def test_a_figure_shares_the_runs_of_its_table(planned: dict[str, dict[str, Experiment]]):
    """Under one name; that two files would have it otherwise is an error of every command."""
    figure, table = planned["figure2"], planned["table1"]
    assert figure.items() <= table.items() and len(figure) == 60


def test_a_table_has_every_cell(planned: dict[str, dict[str, Experiment]]):
    cells = {
        (one.data.name, one.method, one.clients, one.seed) for one in planned["table1"].values()
    }
    each = [(method, n) for method in ("fedavg", "fedclip", "mpsl") for n in (25, 100)]
    each.append(("centralized", 100))
    datasets = ("coco-qa", "t4sa", "kinetics-sounds", "ucf101", "meld")
    assert cells == {(d, m, n, s) for d in datasets for m, n in each for s in (1, 2, 3)}
    fedclip = [one for one in planned["table2"].values() if one.method == "fedclip"]
    assert {one.adapters.form for one in fedclip} == {"released"}


def test_a_profile_stands_in_place_of_what_it_names(here: Path):
    small = {"grid": {"clients": [2]}, "rows": {"a": {"seed": 5}, "b": {"seed": 6}}}
    tasks = {"one": {"config": str(TINY), "training": {"epochs": 3}}, "two": {"config": str(TINY)}}
    path = write_sweep(here, config=None, tasks=tasks, profiles={"small": small})
    runs, _ = sweep.read(path, ["training.epochs=2"], "small")
    found = {run.experiment.name: run.experiment for run in runs}
    assert list(found) == [
        f"rates-small-{t}-{row}-clients2" for t in ("one", "two") for row in "ab"
    ]
    assert [one.seed for one in found.values()] == [5, 6, 5, 6]
    assert [one.training.epochs for one in found.values()] == [3, 3, 2, 2]
    assert len(sweep.read(path, [])[0]) == 8
    with pytest.raises(ConfigError, match=r"--profile tny: no such profile; there: small"):
        sweep.read(path, [], "tny")
    with pytest.raises(ConfigError, match="no sweep"):
        sweep.read(TINY, [], "small")


def test_files_that_ask_for_one_run_differently_are_refused(here: Path, capsys):
    pytest.importorskip("submitit")
    first = write_sweep(here)
    second = here / "other.yaml"
    second.write_text(first.read_text() + "name: rates\n")
    assert submit.main([str(first), str(second), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("# every task") == 4
    changed = yaml.safe_load(second.read_text()) | {"set": {"seed": 3}}
    second.write_text(yaml.safe_dump(changed))
    assert submit.main([str(first), str(second), "--dry-run"]) == 2
    assert "other.yaml: another file has another run rates-clients1" in capsys.readouterr().err


def test_costs_are_counted_once_and_nothing_is_trained(here: Path, capsys):
    pytest.importorskip("submitit")
    path = write_sweep(here, command="cost", grid={"clients": [1, 3]})
    assert submit.main([str(path), "--local"]) == 0
    written = [here / "runs" / f"rates-clients{n}" / "cost.json" for n in (1, 3)]
    figures = [json.loads(file.read_text()) for file in written]
    assert [one["about"]["clients"] for one in figures] == [1, 3]
    assert not (written[0].parent / "summary.json").exists()
    capsys.readouterr()
    assert submit.main([str(path), "--local"]) == 0
    assert capsys.readouterr().out.count("is completed: skipped") == 2


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
