"""A run's trackers, and a run watched from outside: by its files alone, however they stand."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toys
from local_fleet import in_one_process
from rich.console import Console

from mpsl_dist.__main__ import main
from mpsl_dist.analysis import watch
from mpsl_dist.config import Experiment, to_dict
from mpsl_dist.methods import loop, processes
from mpsl_dist.records import lock
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.runtime.process import StopRequest

told: list[dict[str, Any]] = []


def hook(line: dict[str, Any]) -> None:
    """A tracker of a user's: remembers, and spoils what it was given."""
    told.append(json.loads(json.dumps(line)))
    line.get("metric", {}).clear()


def failing(line: dict[str, Any]) -> None:
    told.append(line)
    raise SystemExit("no route to the tracker") if line["step"] > 1 else OSError("no route")


not_callable = 3


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    told.clear()
    # The package's log is this process's; other tests listen to it.
    monkeypatch.setattr(processes, "log_to", lambda path: logging.getLogger("mpsl_dist"))


def tracked(tmp_path: Path, **tracking: Any) -> Experiment:
    return toys.experiment(output=str(tmp_path), tracking=tracking)


def train(chosen: Experiment, resume: bool = False) -> dict[str, Any]:
    run = processes.open_run(chosen, resume, overwrite=False)
    method = in_one_process(chosen)
    return loop.train(chosen, method.splits, method, run, StopRequest())


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard itself reads: tag -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    tags = found.Tags()["scalars"]
    return {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in tags}


def test_trackers_are_told_what_metrics_jsonl_holds_and_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    closed, close = [], SummaryWriter.close
    monkeypatch.setattr(SummaryWriter, "close", lambda self: closed.append(close(self)))
    chosen = tracked(tmp_path, tensorboard=True, hook="test_watching:hook")
    summary = train(chosen)
    run = RunDirectory(chosen.run_directory)
    lines = run.metrics()
    *during, end = told
    assert during == [{"run": str(run.path), **line} for line in lines]
    assert end == {"run": str(run.path), "split": "end", **run.summary()}
    assert summary["test"] == lines[-1]["metric"] and summary["test"]  # the hook spoils its own
    assert len(closed) == 1  # the process may end without Python's end
    seen = scalars(run.path / "tensorboard")
    steps = {line["step"]: line for line in lines if line["split"] == "train"}
    assert seen["train/loss"] == pytest.approx({k: line["loss"] for k, line in steps.items()})
    assert seen["train/bytes/up"] == {k: line["bytes"]["up"] for k, line in steps.items()}
    tests = {x["step"]: x["metric"]["accuracy"] for x in lines if x["split"] == "test"}
    assert seen["test/accuracy"] == pytest.approx(tests) and len(tests) == 2


def test_a_resumed_run_hides_the_steps_that_it_takes_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    chosen = tracked(tmp_path, tensorboard=True)
    for resume, losses in ((False, {1: 1.0, 2: 2.0, 3: 3.0}), (True, {2: 20.0})):
        run = processes.open_run(chosen, resume, overwrite=False)
        run.forget_after(1)
        for step, loss in losses.items():
            run.append_metrics(step=step, epoch=0, split="train", loss=loss, metric={})
        run.end({"status": "stopped"})
        del run  # and its lock
    assert scalars(chosen.run_directory / "tensorboard")["train/loss"] == {1: 1.0, 2: 20.0}


def test_a_tracker_that_fails_is_told_of_once_and_the_run_goes_on(tmp_path: Path, capsys) -> None:
    chosen = tracked(tmp_path, hook="test_watching:failing")
    run = processes.open_run(chosen, resume=False, overwrite=False)
    for step in (1, 2):
        run.append_metrics(step=step, epoch=0, split="train", loss=1.0)
    run.end({"status": "completed"})
    warning = "tracking.hook failed and is told no more; the run goes on: OSError: no route"
    assert capsys.readouterr().err == f"warning: {warning}\n" and len(told) == 1
    assert len(run.metrics()) == 2 and run.summary() == {"status": "completed"}
    again = processes.open_run(chosen, resume=True, overwrite=False)
    again.append_metrics(step=3, epoch=0, split="train", loss=1.0)  # a tracker that ends Python
    assert "SystemExit: no route to the tracker" in capsys.readouterr().err


@pytest.mark.parametrize(
    "tracking, reason",
    [
        ({"hook": "nowhere_at_all:hook"}, "tracking.hook: nowhere_at_all:hook cannot be had: Modu"),
        ({"hook": "test_watching:nothing"}, "tracking.hook: test_watching:nothing cannot be had"),
        ({"hook": "test_watching"}, "tracking.hook: 'test_watching' is no place; write package."),
        ({"hook": "test_watching:not_callable"}, "test_watching:not_callable is no function"),
        ({"tensorboard": True}, "tracking.tensorboard: tensorboard is not installed; pip install"),
    ],
)
def test_a_tracker_that_cannot_be_had_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, tracking: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    chosen = toys.experiment(method="centralized", output=str(tmp_path / "runs"), tracking=tracking)
    (tmp_path / "toy.yaml").write_text(json.dumps(to_dict(chosen)))
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    (tmp_path / "runs" / "toy" / "notes").write_text("precious")
    assert main(["train", str(tmp_path / "toy.yaml")]) == 2
    said = capsys.readouterr().err
    assert reason in said and "toy exists and is no run directory" in said  # all at once


def line(step: int, split: str = "train", **values: Any) -> dict[str, Any]:
    known = {"step": step, "epoch": (step - 1) // 4, "split": split, "loss": 1.0, "metric": {}}
    return known | {"seconds": 0.5, "bytes": {"up": 3 << 20, "down": 1 << 20}} | values


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of two epochs with four steps each, that nobody has."""
    directory = RunDirectory(tmp_path / "runs" / "toy")
    directory.path.mkdir(parents=True)
    directory.record(to_dict(toys.experiment()))
    directory.write_json("environment", {"steps_per_epoch": 4})
    return directory


HOLDER = """
import sys
from pathlib import Path
from mpsl_dist.records import lock
held = lock.take(Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(run: RunDirectory) -> Iterator[Callable[[], None]]:
    """Another process that has the run directory, as the server of a run; called, it is killed."""
    command = [sys.executable, "-c", HOLDER, str(run.path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "taken\n"

    def kill() -> None:
        process.kill()
        process.wait(30)

    yield kill
    kill()
    process.communicate()


def look(run: RunDirectory) -> watch.Standing:
    return watch.Watcher(run.path).look()


def test_a_run_is_followed_from_before_its_beginning_to_its_end(tmp_path: Path) -> None:
    run, shown = RunDirectory(tmp_path / "runs" / "toy"), []
    acts: list[Callable[[], object]] = [
        lambda: run.path.mkdir(parents=True),
        lambda: run.record(to_dict(toys.experiment())),
        lambda: run.append_metrics(**line(1)),
        lambda: [run.append_metrics(**line(step)) for step in (2, 3, 4)],
        lambda: run.append_metrics(**line(4, "test", metric={"accuracy": 0.5}, loss=None)),
        lambda: run.write_json("summary", {"status": "stopped"}),
    ]
    end = watch.follow(run.path, shown.append, lambda: acts.pop(0)())
    running = ["running"] * 3
    assert [s.status for s in shown] == ["waiting", "waiting", "starting", *running, "stopped"]
    assert end is shown[-1] and end.exit_status == 1 and not acts
    assert shown[3].steps is None and shown[5].steps == 8  # by the test that ended an epoch


def test_what_is_told_of_a_run_is_what_its_lines_add_up_to(run: RunDirectory) -> None:
    for step in range(1, 5):
        run.append_metrics(**line(step, loss=2.0 / step))
    run.append_metrics(**line(4, "test", metric={"accuracy": 0.75}, loss=None, seconds=3.0))
    run.append_metrics(**line(5, loss=None, clients_lost=1, clients_returned=2, steps_repeated=3))
    rows = dict(watch.rows(look(run)))
    assert rows["what"] == "mpsl on toy-image+text, 4 clients"
    assert rows["step"] == "5 of 8, epoch 2 of 2" and rows["loss"] == "0.5000"
    assert rows["accuracy"] == "0.7500 after epoch 1, highest 0.7500 after epoch 1"
    assert rows["traffic"] == "3.00 MiB up, 1.00 down a client and epoch; 20 MiB in all"
    assert rows["clients"] == "3 of 4 alive, 1 lost, 2 returned, 3 steps repeated"
    # Three steps of 0.5 s and a test of 3 s are left.
    assert rows["time"] == "0.50 s a step, 6 s in steps and tests, about 4 s left"


def test_a_line_counts_once_it_is_whole_and_a_torn_one_never(run: RunDirectory) -> None:
    watcher, text = watch.Watcher(run.path), json.dumps(line(2))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(f'{json.dumps(line(1))}\n{{"step": 7, "ep\n[]\n{text[:30]}')
        file.flush()
        assert watcher.look().tally.step == 1
        file.write(f"{text[30:]}\n")
        file.flush()
        assert watcher.look().tally.step == 2 and watcher.look().tally.losses == [1.0, 1.0]


def test_a_resumed_run_is_counted_anew(run: RunDirectory) -> None:
    watcher = watch.Watcher(run.path)
    for step in (1, 2, 3):
        run.append_metrics(**line(step))
    assert watcher.look().tally.step == 3
    run.forget_after(1)
    for step in (2, 3):  # as long as before
        run.append_metrics(**line(step, loss=5.0))
    assert watcher.look().tally.losses == [1.0, 5.0, 5.0]


def test_a_run_that_somebody_has_runs_whatever_summary_lies_there(run, holder, monkeypatch) -> None:
    """A resumed run leaves the summary of its stop behind until its own end."""
    # A look that took the lock, for however short, could meet a run that begins.
    monkeypatch.setattr(lock.fcntl, "lockf", lambda *_: pytest.fail("a look took the lock"))
    assert look(run).status == "starting"
    run.append_metrics(**line(1))
    run.write_json("summary", {"status": "stopped"})
    found = look(run)
    assert (found.status, found.exit_status, found.ended) == ("running", 0, False)
    assert f"process {found.who.split()[1]} on {os.uname().nodename}" == found.who
    holder()
    assert look(run).status == "stopped"
    (run.path / "summary.json").unlink()
    gone = look(run)
    assert gone.status == "gone" and gone.ended and gone.exit_status == 1
    assert "gone without a word" in dict(watch.rows(gone))["status"]


def test_a_run_on_another_host_is_not_gone_because_its_lock_is_not_seen(run, holder) -> None:
    holder()
    assert look(run).status == "gone"
    (run.path / ".lock").write_text("process 17 on node3")
    assert look(run).status == "starting"


def test_a_run_has_ended_by_its_last_step_whatever_times_its_files_have(run: RunDirectory) -> None:
    for step in (1, 2):
        run.append_metrics(**line(step))
    (run.path / ".lock").write_text(f"process 17 on {os.uname().nodename}")
    run.write_json("summary", {"status": "completed", "steps_completed": 2})
    os.utime(run.path / "metrics.jsonl", ns=(2**62, 2**62))
    for host in (os.uname().nodename, "node3"):  # where it ran, and a copy elsewhere
        (run.path / ".lock").write_text(f"process 17 on {host}")
        assert (look(run).status, look(run).exit_status) == ("completed", 0)
    run.append_metrics(**line(3))  # resumed, with more epochs
    os.utime(run.path / "metrics.jsonl", ns=(0, 0))
    assert look(run).status == "running"


@pytest.mark.parametrize(
    "name, text, status, said",
    [
        ("config.yaml", "", "completed", "config.yaml: empty"),
        ("config.yaml", "clients: [", "completed", "config.yaml: not valid YAML"),
        ("config.yaml", "clients: 4", "completed", "config.yaml: no method, data.name, training"),
        ("summary.json", "{", "ended, it cannot be read how", "summary.json: not valid JSON"),
        ("environment.json", "{", "completed", "environment.json: not valid JSON"),
        ("metrics.jsonl", None, "completed", "metrics.jsonl: not there, and summary.json tells"),
        ("metrics.jsonl", "torn\n", "completed", "metrics.jsonl: line 1 is no whole line"),
    ],
)
def test_a_damaged_file_is_named_and_is_a_failure(
    run: RunDirectory, capsys, name: str, text: str | None, status: str, said: str
) -> None:
    (run.path / ".lock").write_text(f"process 17 on {os.uname().nodename}")
    if name == "metrics.jsonl" and text:
        (run.path / name).write_text(text)
    run.append_metrics(**line(1))
    run.write_json("summary", {"status": "completed", "steps_completed": 1})
    if text is None:
        (run.path / name).unlink()
    elif name != "metrics.jsonl":
        (run.path / name).write_text(text)
    assert main(["watch", str(run.path), "--once"]) == 1
    told = dict(row.split(maxsplit=1) for row in capsys.readouterr().out.splitlines())
    assert told["status"].startswith(status) and told["damaged"].startswith(said)
    assert "of 0" not in " ".join(told.values())
    assert look(run).ended


@pytest.mark.parametrize("summary, status", [("completed", 0), ("failed", 1), (None, 0)])
def test_without_a_terminal_one_plain_summary_is_printed(
    run: RunDirectory, capsys, summary: str | None, status: int
) -> None:
    run.append_metrics(**line(1))
    if summary:
        lost = 0 if summary == "completed" else 4
        known = {"status": summary, "reason": "worker2 is lost", "clients_lost": lost}
        run.write_json("summary", known)
    for once in ([], ["--once"]):
        assert main(["watch", str(run.path), *once]) == status
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"run        {run.path}"
        said = {"failed": "failed: worker2 is lost", None: "running"}.get(summary, summary)
        assert lines[1] == f"status     {said}"
        assert lines[3] == "step       1 of 8, epoch 1 of 2"
        alive = "0 of 4 alive, 4 lost" if summary == "failed" else "4 of 4 alive"
        assert f"clients    {alive}" in "\n".join(lines)


def test_what_is_no_run_is_refused_and_what_is_not_there_yet_waits(tmp_path: Path, capsys) -> None:
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    assert main(["watch", str(tmp_path / "runs")]) == 2
    assert "is no run directory: it has no config.yaml" in capsys.readouterr().err
    assert main(["watch", str(tmp_path / "runs" / "later"), "--once"]) == 1
    assert "waiting: the run has not begun" in capsys.readouterr().out


@pytest.mark.parametrize("width", [50, 80, 120, 200])
def test_a_run_fits_the_terminal_and_shows_its_curves(run: RunDirectory, width: int) -> None:
    for step in range(1, 9):
        run.append_metrics(**line(step, loss=8.0 - step))
        if step % 4 == 0:
            run.append_metrics(**line(step, "test", metric={"accuracy": step / 8}, loss=None))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(watch.panel(look(run), width))
    shown = console.export_text().splitlines()
    assert max(map(len, shown)) == min(width, 120)
    assert any("█▇▆▅▄▃▂▁" in row for row in shown) and any("▁█" in row for row in shown)


@pytest.mark.parametrize(
    "seconds, said",
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (3900, "1 h 05 min"), (90000, "1 d 1 h")],
)
def test_times_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert watch.span(seconds) == said


def test_curves_are_of_finite_numbers_alone() -> None:
    assert watch.curve([float("nan")], 5) == "" and watch.curve([1.0, 1.0], 5) == "▁▁"
    assert watch.curve([float("inf"), 3.0, 3.0, 1.0, 1.0], 2) == "█▁"
