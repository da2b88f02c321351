"""The command line: what evaluate may change, usage errors, and an end when the disk is full."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import IO, Any
from unittest.mock import Mock

import pytest
import toys
from conftest import small_disk
from rich.console import Console

from mpsl_dist.__main__ import main
from mpsl_dist.actors import deployable, holdings
from mpsl_dist.commands import train
from mpsl_dist.config import Experiment, to_dict
from mpsl_dist.errors import RunError
from mpsl_dist.methods import processes
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.runtime import process
from mpsl_dist.runtime.environment import TORCHRUN, resolve


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run with a model that is left behind."""
    experiment = toys.experiment()
    splits = holdings.load_data(experiment)
    deployable.build(experiment, splits).save(tmp_path / "run" / "model", experiment, splits)
    return tmp_path / "run"


def change_description(run: Path, **changes: Any) -> None:
    path = run / "model" / "config.json"
    description = json.loads(path.read_text())
    description["experiment"] |= changes
    path.write_text(json.dumps(description))


def test_evaluate_takes_overrides_of_where_and_how(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Experiment] = []
    batches: list[int] = []
    load_data, test = holdings.load_data, deployable.Deployable.test

    def seen_data(experiment: Experiment, *needs: Any) -> Any:
        asked.append(experiment)
        return load_data(experiment, *needs)

    def seen_batch(self: Any, held: Any, batch_size: int) -> Any:
        batches.append(batch_size)
        return test(self, held, batch_size)

    monkeypatch.setattr(holdings, "load_data", seen_data)
    monkeypatch.setattr(deployable.Deployable, "test", seen_batch)
    words = ["data.root=/there", "data.cache=/kept", "data.on_error=skip"]
    words += ["training.test_batch_size=7", "device=cpu"]
    assert main(["evaluate", str(finished), *words]) == 0
    (experiment,) = asked
    assert (experiment.data.root, experiment.data.cache) == ("/there", "/kept")
    assert experiment.data.on_error == "skip" and batches == [7]
    changed = capsys.readouterr().out
    assert main(["evaluate", str(finished)]) == 0
    assert batches[1:] == [256] and capsys.readouterr().out == changed


def test_evaluate_loads_on_the_device_that_is_asked_for(finished: Path, capsys) -> None:
    change_description(finished, device="cuda:99")
    assert main(["evaluate", str(finished)]) == 2
    assert "device=cuda:99: no such GPU here; take device=cpu" in capsys.readouterr().err
    assert main(["evaluate", str(finished), "device=cpu"]) == 0


def test_evaluate_refuses_what_would_change_the_model(finished: Path, capsys) -> None:
    words = ["data.image_size=64", "seed=3", "sead=3", "model={pooling: mean}", "device=gpu"]
    assert main(["evaluate", str(finished), *words[:4]]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all("only data.cache, data.on_error, data." in x for x in lines)
    assert "data.image_size: the model was trained with null" in lines[0]
    assert "seed: the model was trained with 2024" in lines[1]
    assert "sead: unknown key" in lines[2] and "model: not a key but a section" in lines[3]
    assert main(["evaluate", str(finished), words[4]]) == 2
    assert "device: expected auto, cpu, cuda" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\xff", b"{", b"[]", b"{}", b'{"experiment": {"seed": "x"}}'])
def test_a_damaged_model_is_named(finished: Path, content: bytes, capsys) -> None:
    path = finished / "model" / "config.json"
    path.write_bytes(content)
    assert main(["evaluate", str(finished)]) == 2
    assert f"error: {path}: " in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, None])
def test_damaged_weights_are_named(finished: Path, content: bytes | None, capsys) -> None:
    path = finished / "model" / "model.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    assert main(["evaluate", str(finished)]) == 2
    assert f"error: {path}: " in capsys.readouterr().err


def test_a_model_trained_otherwise_than_its_files_say_is_refused(finished: Path, capsys) -> None:
    model = to_dict(toys.experiment())["model"]
    change_description(finished, model=model | {"post_norm": True})
    assert main(["evaluate", str(finished)]) == 2
    assert "model.safetensors: not this model's weights" in capsys.readouterr().err
    change_description(finished, seed="x")
    assert main(["evaluate", str(finished)]) == 2
    error = capsys.readouterr().err
    assert f"error: {finished / 'model' / 'config.json'}: seed: expected a whole number" in error


@pytest.mark.parametrize("word", ["foo=bar", "--foo", "foo"])
def test_a_word_that_a_command_does_not_take_is_a_usage_error(word: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compare", "runs/a", "--out", "x.md", word])
    assert caught.value.code == 2 and word in capsys.readouterr().err


class Left(BaseException):
    """Where the process would have ended."""


def train_and_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, full: bool
) -> tuple[int, Path]:
    """Fail in training, on a disk that is then full or not; return the exit status."""
    experiment = toys.experiment(output=str(tmp_path))

    def fail(*_: Any) -> None:
        if full:
            monkeypatch.setattr(Path, "write_text", no_space)
        raise error

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def leave(status: int) -> None:
        raise Left(status)

    monkeypatch.setattr(processes, "train_as_server", fail)
    monkeypatch.setattr(process, "leave", leave)
    monkeypatch.setattr(process.StopRequest, "listen", lambda self: None)
    options = argparse.Namespace(resume=False, overwrite=False)
    with pytest.raises(Left) as caught:
        train._train_as_server(options, experiment, None, None)
    return caught.value.args[0], experiment.run_directory


@pytest.mark.parametrize(
    "error, status", [(OSError(28, "No space left on device"), 1), (RunError("damaged"), 2)]
)
def test_a_failure_on_a_full_disk_is_told_and_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, error: Exception, status: int
) -> None:
    left, _ = train_and_fail(tmp_path, monkeypatch, error, full=True)
    said = capsys.readouterr().err
    assert left == status and f"error: {error}" in said and "Traceback" in said
    assert "the summary could not be written: [Errno 28]" in said


def test_a_failure_leaves_summary_traceback_and_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    error = RuntimeError("worker2 is lost")
    error.lost = (2, 3)  # type: ignore[attr-defined]
    left, path = train_and_fail(tmp_path, monkeypatch, error, full=False)
    said = capsys.readouterr().err
    assert left == 1 and "error: worker2 is lost\n(traceback in" in said
    assert "RuntimeError: worker2 is lost" in (path / "error.txt").read_text()
    summary = RunDirectory(path).summary()
    assert (summary["reason"], summary["clients_lost"]) == ("worker2 is lost", 2)


def test_a_worker_that_fails_is_ended_before_python_would_end_it(
    monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """RPC is on, and most of the time Python's own end would be an abort."""
    monkeypatch.setattr(process, "leave", Mock(side_effect=Left))
    launched = resolve(dict.fromkeys(TORCHRUN, "1") | {"WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    for error, ending in ((RuntimeError("no host"), Left), (RunError("refused"), RunError)):
        monkeypatch.setattr(processes, "serve_as_worker", Mock(side_effect=error))
        with pytest.raises(ending):
            train.serve(toys.experiment(), launched)
    process.leave.assert_called_once_with(1)
    assert capsys.readouterr().err.splitlines()[-1] == "RuntimeError: no host"


FULL = """
import sys
from mpsl_dist import __main__ as command_line
from mpsl_dist.records.run_directory import RunDirectory
import toys

append = RunDirectory.append_metrics
def filling(self, **values):
    append(self, **values)
    with open(self.path / "ballast", "ab") as file:
        file.write(bytes(1 << 20))
RunDirectory.append_metrics = filling
sys.exit(command_line.main(sys.argv[1:]))
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "256k") as folder:
        yield folder


def test_a_run_on_a_disk_that_fills_says_so_and_ends(disk: Path, tmp_path: Path) -> None:
    script, config = tmp_path / "filling.py", tmp_path / "e.yaml"
    script.write_text(FULL)
    values = to_dict(toys.experiment(method="centralized", output=str(disk)))
    config.write_text(json.dumps(values))
    tests = str(Path(__file__).parents[1])
    line = [sys.executable, str(script), "train", str(config)]
    variables = {"PYTHONPATH": f"{tests}:{Path(tests).parent}", "OMP_NUM_THREADS": "1"}
    # Standard output lies on the full disk too.
    with (disk / "out.txt").open("w") as out:
        done = subprocess.run(
            line, env=variables, stdout=out, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.returncode == 1, done.stderr
    assert "error: [Errno 28] No space left on device" in done.stderr


@pytest.fixture
def unread() -> Iterator[IO[str]]:
    """A real pipe, buffered, whose reader has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        yield file
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # for what a failed test left in it


@pytest.mark.parametrize("prints", [print, lambda line: Console().print(line)], ids=["", "rich"])
def test_a_reader_that_ends_early_ends_a_command_without_a_word(
    unread: IO[str], capsys, monkeypatch: pytest.MonkeyPatch, prints: Callable[[str], None]
) -> None:
    monkeypatch.setattr("mpsl_dist.__main__._perform", lambda options: prints("a table"))
    with redirect_stdout(unread):
        assert main(["explain"]) == 141
        print("what is left", flush=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("words", [["explain", "data.missing.rate"], ["--help"]], ids=" ".join)
def test_the_end_of_python_has_no_word_for_it_either(unread: IO[str], words: list[str]) -> None:
    line = [sys.executable, "-m", "mpsl_dist", *words]
    variables = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(line, stdout=unread, stderr=subprocess.PIPE, env=variables, timeout=120)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mpsl_dist.__main__._perform", Mock(side_effect=BrokenPipeError("a worker"))
    )
    with pytest.raises(BrokenPipeError, match="a worker"):
        main(["explain"])
