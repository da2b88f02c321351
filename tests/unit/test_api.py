"""Runs that Python starts: what they tell, how they end, and what stays as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys
from conftest import until

import mpsl_dist
from mpsl_dist import api
from mpsl_dist.__main__ import main
from mpsl_dist.config import to_dict
from mpsl_dist.errors import ConfigError, DataError, LaunchError, RunError
from mpsl_dist.runtime import caller

#: The command's stand-in: it does what the test says, in the place of Python.
STAND_IN = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
words = sys.argv[1:]
home = Path(os.environ["MPSL_DIST_CALLER"].split(" ", 1)[1])
path = Path({path!r})
def tell(kind, message):
    (home / "failure.json").write_text(json.dumps({{"kind": kind, "message": message}}))
def step(number, split="train"):
    line = {{"step": number, "epoch": 0, "split": split, "loss": 1.0, "metric": {{}}}}
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\\n")
print("words", *words[4:], flush=True)
{does}
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., api.Run]:
    """Train by a stand-in for the command: ``start(does, **how)``."""
    path = tmp_path / "runs" / "toy"

    def run(does: str, **how: Any) -> api.Run:
        stand_in = tmp_path / "stand-in"
        stand_in.write_text(STAND_IN.format(python=sys.executable, path=str(path), does=does))
        stand_in.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(stand_in))
            experiment = to_dict(toys.experiment(output=str(tmp_path / "runs")))
            return mpsl_dist.train(experiment, **how)

    return run


@pytest.mark.parametrize(
    "does, kind, message",
    [
        ("tell('DataError', 'a.png: gone\\nb.png: gone'); sys.exit(2)", DataError, "a.png: gone\n"),
        ("tell('RemoteError', 'worker2: lost'); sys.exit(1)", RunError, "worker2: lost"),
        ("print('error: worker2 ended: SIGKILL'); sys.exit(1)", RunError, "worker2 ended: SIGKILL"),
        ("raise KeyError('torn')", RunError, "KeyError: 'torn'"),
        ("os.kill(os.getpid(), 9)", RunError, "words"),
    ],
)
def test_a_failed_run_raises_what_the_command_would_have_said(
    start: Callable[..., api.Run], does: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(RunError if kind is RunError else kind, match=message) as caught:
        start(does)
    assert type(caught.value) is kind
    run = start(does, wait=False)
    with pytest.raises(kind, match=message):
        list(run.follow())
    assert run.status == "failed" and run.summary == {}
    with pytest.raises(kind, match=message):
        run.model()


def test_a_run_is_followed_as_it_goes_and_the_one_that_it_replaces_is_not(
    start: Callable[..., api.Run], tmp_path: Path
) -> None:
    path, go = tmp_path / "runs" / "toy", tmp_path / "go"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("old: 1")
    (path / "metrics.jsonl").write_text('{"step": 9, "epoch": 0, "split": "train", "loss": 2}\n')
    (path / "summary.json").write_text('{"status": "completed"}')
    does = f"""
while not Path({str(go)!r}).exists(): time.sleep(.01)
for file in path.iterdir(): file.unlink()
(path / "config.yaml").write_text("new: 1")
step(1)
while Path({str(go)!r}).exists(): time.sleep(.01)
step(2); step(2, "test")
(path / "summary.json").write_text(json.dumps({{"status": "completed", "test": {{"a": 1}}}}))
"""
    run = start(does, overwrite=True, wait=False)
    assert run.metrics == [] and run.summary == {} and run.status == "running"
    go.touch()
    lines = run.follow()
    assert next(lines)["step"] == 1
    go.unlink()
    assert [(line["step"], line["split"]) for line in lines] == [(2, "train"), (2, "test")]
    assert len(run.metrics) == 3 and run.summary["test"] == {"a": 1}
    assert run.status == "completed" and run.output == "words --overwrite\n"


def test_waiting_shows_the_output_and_a_stop_is_no_failure(
    start: Callable[..., api.Run], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("print('step 1')", resume=True).status == "completed"
    assert capsys.readouterr().out == "words --resume\nstep 1\n"
    on_signal = "signal.signal(15, lambda *_: sys.exit(1)); print('on', flush=True); time.sleep(60)"
    run = start(on_signal, wait=False)
    until(lambda: "on" in run.output, what="the signal's handler")
    run.stop()
    assert run.wait().status == "stopped" and run.process.returncode == 1
    run.stop()


def test_an_interrupted_wait_stops_the_run(
    start: Callable[..., api.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[api.Run] = []

    def interrupted(self: api.Run) -> None:
        runs.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(api.Run, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start("time.sleep(60)")
    assert runs[0].status == "stopped"


def test_the_command_sees_no_launcher_and_the_callers_modules(
    start: Callable[..., api.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    before = dict(os.environ)
    shown = "print([n for n in os.environ if n.startswith(('SLURM', 'MASTER'))], sys.path)"
    run = start(f"sys.stdin.read(); {shown}", wait=False).wait()
    assert "[]" in run.output and all(repr(p) in run.output for p in sys.path if p)
    assert dict(os.environ) == before
    for name, value in {"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", "29400")
    with pytest.raises(LaunchError, match="this process is rank 1 of 4, by torchrun"):
        start("")


def test_mistakes_are_told_before_anything_is_started(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("clients: x\nseed: y\n")
    with pytest.raises(ConfigError, match="clients: expected .*\n.*e.yaml: seed: expected"):
        mpsl_dist.train(path)
    with pytest.raises(ConfigError, match="^clints: unknown key"):
        mpsl_dist.train({"clints": 3})
    with pytest.raises(ConfigError, match="the experiment holds what YAML can't"):
        mpsl_dist.train({"output": object()})
    with pytest.raises(LaunchError, match=r"docs/clusters\.md"):
        mpsl_dist.train({}, local=False)
    with pytest.raises(ConfigError, match="exclude each other"):
        mpsl_dist.train({}, resume=True, overwrite=True)
    for start in (mpsl_dist.train, mpsl_dist.load):
        with pytest.raises(ConfigError, match="overrides: expected key.path=value.*'epochs': 1"):
            start("quickstart", {"training": {"epochs": 1}})


def test_the_command_leaves_word_of_why_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in caller.variables(tmp_path).items():
        monkeypatch.setenv(name, value)
    assert main(["evaluate", str(tmp_path)]) == 2
    told = caller.told(tmp_path)
    assert told and f"error: {told.message}\n" == capsys.readouterr().err
    assert told.kind == "RunError"
    caller.tell(RunError("a later one"))
    assert caller.told(tmp_path) == told


def test_a_process_stops_when_its_caller_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not caller.watch()()
    for name, value in caller.variables(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert not caller.watch()()
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *call: sent.append(call))
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert caller.watch()()
    caller.follow()
    until(lambda: bool(sent), what="a signal")
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_the_package_is_cheap_to_import() -> None:
    code = "import sys, mpsl_dist; mpsl_dist.__version__; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(told.stdout.split())
    assert not loaded & {"torch", "numpy", "yaml", "mpsl_dist.api"}
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = mpsl_dist.trian  # type: ignore[attr-defined]
    assert json.dumps(sorted(mpsl_dist.__all__)) == '["Run", "load", "train"]'
