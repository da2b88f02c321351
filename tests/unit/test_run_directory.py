"""A run directory whose files were torn or damaged, and what a failed run leaves in it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import toys
import yaml

from mpsl_dist.config import ConfigError, load, to_dict
from mpsl_dist.errors import RunError
from mpsl_dist.methods import summary
from mpsl_dist.reading import read_json, read_text, read_yaml
from mpsl_dist.records import checkpoint
from mpsl_dist.records.run_directory import RunDirectory, write_atomic

CONTRACT = {
    "name",
    "method",
    "dataset",
    "seed",
    "clients",
    "epochs_completed",
    "steps_completed",
    "test",
    "trainable_parameters",
    "communication",
    "seconds",
    "clients_lost",
    "status",
}


def line(step: int, split: str = "train", epoch: int = 0, **values: object) -> str:
    known = {"step": step, "epoch": epoch, "split": split, "seconds": 0.5, "loss": 1.0}
    known |= {"metric": {"accuracy": 0.75} if split == "test" else {}}
    return json.dumps(known | {"bytes": {"up": 800, "down": 400, "by_kind": {}}} | values)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.open(to_dict(toys.experiment()), resume=False, overwrite=False)
    return directory


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"a: [1, 2", "not valid YAML: .*line 1"),
        (b"- 3", "expected keys and values, found list"),
        (b"7", "expected keys and values, found int"),
        (b"", "empty"),
        (b"name: \xff\xfe", "not UTF-8 at byte 6"),
        (b"[" * 5000, "not valid YAML: nested too deeply"),
        (b"name: 2024-99-99", "not valid YAML: month must be in 1..12"),
    ],
)
def test_a_damaged_configuration_is_named_with_what_to_do(
    run: RunDirectory, content: bytes, reason: str
) -> None:
    (run.path / "config.yaml").write_bytes(content)
    with pytest.raises(RunError, match=rf"config\.yaml: {reason}.*--overwrite"):
        run.check({}, resume=True, overwrite=False)
    assert run.check({}, resume=False, overwrite=True)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b'{"status": "comp', "not valid JSON: .*column 12"),
        (b"[]", "expected a JSON object, found list"),
        (b"\xff", "not UTF-8"),
        (b"", "not valid JSON"),
    ],
)
def test_a_damaged_summary_or_manifest_is_named(
    run: RunDirectory, content: bytes, reason: str
) -> None:
    assert run.summary() == {}
    (run.path / "summary.json").write_bytes(content)
    with pytest.raises(RunError, match=rf"summary\.json: {reason}.*remove it"):
        run.summary()
    folder = checkpoint.folder_of(run.checkpoints, 3)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(RunError, match=rf"manifest\.json: {reason}.*remove .*step-00000003"):
        checkpoint.latest(run.checkpoints)


@pytest.mark.parametrize("change", [{"step": "three"}, {"steps": 3}, {"traffic": [1]}])
def test_a_manifest_of_another_structure_is_named(run: RunDirectory, change: dict) -> None:
    good = checkpoint.Manifest(3, 1, 0, 4, 1.5, {"activations": [1, 2, 3, 4]})
    folder = checkpoint.folder_of(run.checkpoints, 3)
    folder.mkdir(parents=True)
    checkpoint.complete(run.checkpoints, good, keep=1)
    assert checkpoint.latest(run.checkpoints) == (folder, good)
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RunError, match=r"manifest\.json: .*remove .*step-00000003"):
        checkpoint.latest(run.checkpoints)


@pytest.mark.parametrize("torn", ['{"step": 3, "epo', "\x00\x00\x00", "7", '{"step": 3}'[:-1]])
def test_a_torn_last_line_is_forgotten_with_a_warning(
    run: RunDirectory,
    torn: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = run.path / "metrics.jsonl"
    path.write_text(f"{line(1)}\n{line(2)}\n{torn}")
    run.check(to_dict(toys.experiment()), resume=True, overwrite=False)
    monkeypatch.setattr(logging.getLogger("mpsl_dist"), "propagate", True)
    with caplog.at_level(logging.WARNING, "mpsl_dist"):
        run.forget_after(2)
    assert str(path) in caplog.text and "torn" in caplog.text
    assert path.read_text() == f"{line(1)}\n{line(2)}\n"
    run.append_metrics(**json.loads(line(3)))
    assert [found["step"] for found in run.metrics()] == [1, 2, 3]


@pytest.mark.parametrize("damaged", [b'{"step": 2, "epo', b"\xff", b"", b"7", b'{"step": 2}'])
def test_a_damaged_line_before_the_last_is_named(run: RunDirectory, damaged: bytes) -> None:
    path = run.path / "metrics.jsonl"
    path.write_bytes(b"\n".join([line(1).encode(), damaged, line(3).encode(), b""]))
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 2: "):
        run.metrics()
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 2: "):  # before any process waits
        run.check(to_dict(toys.experiment()), resume=True, overwrite=False)


def test_the_cache_may_be_another_when_a_run_is_resumed(run: RunDirectory) -> None:
    moved = to_dict(toys.experiment(data={"cache": "/elsewhere"}))
    run.check(moved, resume=True, overwrite=False)
    other = to_dict(toys.experiment(data={"text_length": 7}))
    with pytest.raises(RunError, match=r"data\.text_length"):
        run.check(other, resume=True, overwrite=False)


def test_a_directory_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(RunError, match="file: .*choose another output= or name="):
        RunDirectory(tmp_path / "file").check({}, resume=False, overwrite=True)
    with pytest.raises(RunError, match="cannot be written: .*choose another output="):
        RunDirectory(tmp_path / "file" / "run").open({}, resume=False, overwrite=False)


def test_what_cannot_be_written_leaves_the_old_file_and_no_part(tmp_path: Path, monkeypatch):
    path = tmp_path / "summary.json"
    path.write_text("old")

    def full(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"] and path.read_text() == "old"


@pytest.mark.parametrize("reader", [read_text, read_json, read_yaml])
def test_a_reader_raises_the_error_that_was_asked_for(tmp_path: Path, reader: Callable) -> None:
    with pytest.raises(ConfigError, match="absent: No such file or directory; look elsewhere"):
        reader(tmp_path / "absent", ConfigError, "look elsewhere")
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="binary: not UTF-8"):
        reader(tmp_path / "binary", ConfigError)


def test_an_experiment_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_bytes(b"name: caf\xe9")
    with pytest.raises(ConfigError, match=r"e\.yaml: not UTF-8"):
        load(path)
    path.write_text("seed: 1")
    with pytest.raises(ConfigError, match="name: '2024-99-99' is not a YAML value"):
        load(path, ["name=2024-99-99"])


def test_a_failed_run_tells_what_its_metrics_know(run: RunDirectory) -> None:
    lines = [line(1), line(2), line(2, "test"), line(3, epoch=1, seconds=2.0)]
    (run.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    summary.failed_summary(toys.experiment(), run, "the disk is gone", clients_lost=2)
    found = run.summary()
    assert found.keys() >= CONTRACT
    assert (found["status"], found["reason"]) == ("failed", "the disk is gone")
    assert (found["epochs_completed"], found["steps_completed"], found["clients_lost"]) == (1, 3, 2)
    # Three steps of 800 bytes are one and a half epochs of four clients.
    assert found["communication"]["up_bytes_per_client_per_epoch"] == 2400 / 4 / 1.5
    assert found["communication"]["down_bytes_per_client_per_epoch"] == 1200 / 4 / 1.5
    assert found["seconds"] == {"total": 3.5, "step_median": 0.5}


@pytest.mark.parametrize("metrics", [None, line(1), f"damaged\n{line(2)}"])
def test_a_run_that_fails_before_an_epoch_is_over_has_every_key(
    run: RunDirectory, metrics: str | None
) -> None:
    if metrics:
        (run.path / "metrics.jsonl").write_text(metrics + "\n")
    summary.failed_summary(toys.experiment(), run, "no reason")
    found = run.summary()
    assert found.keys() >= CONTRACT and found["clients_lost"] == 0 and found["test"] == {}
    nulls = {f"{way}_bytes_per_client_per_epoch": None for way in ("up", "down")}
    assert found["communication"] == nulls
    assert found["seconds"].keys() == {"total", "step_median"}


def test_the_written_configuration_is_the_one_that_is_read(run: RunDirectory) -> None:
    assert run.config() == to_dict(toys.experiment())
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == run.config()
