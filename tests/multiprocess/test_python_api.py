"""The script of docs/python.md with real processes, and runs from Python that fail or are left."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, until

import mpsl_dist
from mpsl_dist.__main__ import main
from mpsl_dist.data.sets import digits_qa
from mpsl_dist.errors import ConfigError, RunError
from mpsl_dist.records.run_directory import RunDirectory

PAGE = ROOT / "docs" / "python.md"
#: What torch and open_clip set for themselves, in any process that loads a model.
LIBRARIES = ("TORCHINDUCTOR_CACHE_DIR", "TOKENIZERS_PARALLELISM")
TINY: dict[str, Any] = {
    "name": "tiny",
    "clients": 2,
    "data": {"name": "digits-qa", "partition": {"kind": "iid"}},
    "model": {"encoder": {"size": "custom", "width": 8, "depth": 1, "heads": 1}, "image_patch": 4},
    "training": {"epochs": 100_000, "batch_size": 400},
    "checkpoint": {"every_epochs": 0},
    "faults": {"on_loss": "stop"},
}


def state_of_this_process() -> dict[str, Any]:
    return {
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "threads": threading.enumerate(),
        "environment": {n: value for n, value in os.environ.items() if n not in LIBRARIES},
        "words": list(sys.argv),
        "folder": os.getcwd(),
        "distributed": torch.distributed.is_initialized(),
    }


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The page's script as a notebook runs it: in a process that has a life of its own."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "configs").symlink_to(ROOT / "configs")
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    assert len(script.splitlines()) <= 16
    names: dict[str, Any] = {}
    torch.set_num_threads(1)
    before = state_of_this_process()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.chdir(folder)
        exec(compile(script, str(PAGE), "exec"), names)
        left = state_of_this_process()
        run = names["run"]
        run.path = run.path.absolute()
    left["folder"] = before["folder"]  # ours
    yield SimpleNamespace(**names, before=before, left=left, folder=folder, shown=shown.getvalue())


def test_a_script_trains_and_predicts_and_stays_what_it_was(notebook: SimpleNamespace) -> None:
    assert notebook.left == notebook.before
    assert notebook.run.status == "completed"
    assert notebook.shown.splitlines()[-1].startswith("Prediction(label=")
    assert notebook.run.metrics == RunDirectory(notebook.run.path).metrics()
    assert "completed: test accuracy" in notebook.run.output


def test_the_loaded_model_has_the_accuracy_that_the_run_tested(notebook: SimpleNamespace) -> None:
    splits = digits_qa.load(text_length=10)
    test = splits.test
    found = notebook.model.predict(**test.inputs)
    right = [
        one.label == splits.classes[label]
        for one, label in zip(found, test.labels.tolist(), strict=True)
    ]
    assert sum(right) / len(right) == notebook.run.summary["test"]["accuracy"]


def test_the_commands_of_the_page_run(notebook: SimpleNamespace, monkeypatch, capsys) -> None:
    monkeypatch.chdir(notebook.folder)
    notebook.picture.save("digit.png")
    Path("questions.csv").write_text("image,text\ndigit.png,is it even?\n")
    pages = "\n".join(page.read_text("utf-8") for page in (PAGE, ROOT / "README.md"))
    lines = re.findall(r"^    .*python -m mpsl_dist ((?:predict|export) .*)$", pages, re.M)
    assert len(lines) == 5
    for line in lines:
        assert main(shlex.split(line)) == 0, line
    printed = capsys.readouterr().out
    assert f"{notebook.answer.label} {notebook.answer.probability:.4f}" in printed
    assert repr(notebook.answer.probability) in Path("answers.csv").read_text()
    again = mpsl_dist.load("hub/quickstart").predict(image="digit.png", text="is it even?")
    assert again == notebook.answer


# -- what ends otherwise ---------------------------------------------------------------------------


def steps_of(run: mpsl_dist.Run) -> int:
    assert run.status == "running", run.output
    return len(run.metrics)


def rank_of(run: mpsl_dist.Run, number: int) -> int:
    """The process of a rank, a child of the run's command."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == run.process.pid and (folder / "comm").read_text() == f"rank{number}\n":
                return int(folder.name)
    raise AssertionError(f"no rank {number}")


@pytest.mark.campaign
def test_stopped_continued_and_killed_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = mpsl_dist.train(TINY, wait=False)
    until(lambda: steps_of(run) >= 3, 120, "three steps")
    run.stop()
    assert run.status == "stopped" and run.summary["status"] == "stopped"
    with pytest.raises(RunError, match="runs/tiny exists; continue it with --resume"):
        mpsl_dist.train(TINY)
    done = run.summary["steps_completed"]
    run = mpsl_dist.train(TINY, resume=True, wait=False)
    until(lambda: steps_of(run) >= done + 3, 120, "three more steps")
    os.kill(rank_of(run, 2), signal.SIGKILL)
    with pytest.raises(RunError, match="worker2"):
        run.wait()
    assert run.status == "failed" and "worker2" in run.summary["reason"]


@pytest.mark.campaign
def test_a_refusal_of_the_server_is_the_commands(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="data.root: mnist-fsdd needs the folder"):
        mpsl_dist.train(TINY, "data.name=mnist-fsdd")
    for method in ("centralized", "mpsl"):
        with pytest.raises(ConfigError, match="^model.image_patch: 99 does not divide"):
            mpsl_dist.train(TINY, "model.image_patch=99", f"method={method}")


@pytest.mark.campaign
@pytest.mark.parametrize("method", ["mpsl", "centralized"])
def test_a_run_ends_with_the_program_that_started_it(tmp_path: Path, method: str) -> None:
    script = (
        "import json, sys, time, mpsl_dist\n"
        f"run = mpsl_dist.train({TINY!r}, 'method={method}', wait=False)\n"
        "next(run.follow())\n"
        "print(json.dumps([run.process.pid, str(run.path.absolute())]), flush=True)\n"
        "time.sleep(600)\n"
    )
    line = [sys.executable, "-c", script]
    with subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout
        process, path = json.loads(program.stdout.readline())
        program.kill()
    until(lambda: not Path(f"/proc/{process}").exists(), 60, "the end of the run")
    assert RunDirectory(Path(path)).summary()["status"] == "stopped"
