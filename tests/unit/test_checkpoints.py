"""Checkpoints that are damaged, disks that are full, runs of another length."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from conftest import small_disk
from local_fleet import in_one_process

from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.config import Experiment, to_dict
from mpsl_dist.errors import DiskError, ResumeError, RunError
from mpsl_dist.methods import centralized, loop
from mpsl_dist.methods.hosting import Setup
from mpsl_dist.models.average import average
from mpsl_dist.records import checkpoint, state
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.runtime.process import StopRequest

FILES = ("server.pt", *(f"client-{n:04d}.pt" for n in range(4)), "manifest.json")


def build(chosen: Experiment) -> Any:
    if chosen.method == "centralized":
        return centralized.build(Setup(chosen, Holdings.load(chosen), 1))
    return in_one_process(chosen)


def train(chosen: Experiment, resume: bool = False, method: Any = None) -> dict[str, Any]:
    directory = RunDirectory(chosen.run_directory)
    directory.open(to_dict(chosen), resume, False)
    method = method or build(chosen)
    return loop.train(chosen, method.splits, method, directory, StopRequest())


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file of a run but its lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


def model_of(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


# -- damaged checkpoints -----------------------------------------------------------------------


class Attack:
    """What a stranger's checkpoint may hold: code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hacked",)


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(1, path.stat().st_size)])


def _zeros(path: Path, rng: random.Random) -> None:
    start = rng.randrange(path.stat().st_size // 2)
    content = path.read_bytes()
    path.write_bytes(content[:start] + bytes(len(content) - start))


def _others(path: Path, rng: random.Random) -> None:
    other = rng.choice([name for name in FILES if name != path.name])
    shutil.copy(path.with_name(other), path)


def _earlier(path: Path, rng: random.Random) -> None:
    shutil.copy(path.parents[1] / "step-00000005" / path.name, path)


def _missing(path: Path, rng: random.Random) -> None:
    path.unlink()


def _folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _code(path: Path, rng: random.Random) -> None:
    torch.save({"model": Attack(), "tokenizers": Attack()}, path)


def _longer(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def _empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


DAMAGES = (_flip, _cut, _zeros, _others, _earlier, _missing, _folder, _code, _longer, _empty)
CASES = [(damage, name) for damage in DAMAGES for name in FILES]
SHORT = random.Random(1).sample(range(len(CASES)), 8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("finished")
    assert train(toys.experiment(output=str(folder)))["status"] == "completed"
    steps = sorted(path.name for path in (folder / "toy" / "checkpoints").iterdir())
    assert steps == ["step-00000005", "step-00000010"]
    return folder / "toy"


def damaged(finished: Path, folder: Path, damage: Callable, name: str, steps: list[int]) -> Path:
    run = folder / "toy"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns(".lock"))
    rng = random.Random(f"{damage.__name__} {name}")
    for step in steps:
        damage(checkpoint.folder_of(run / "checkpoints", step) / name, rng)
    return run


def check_damage(finished: Path, folder: Path, damage: Callable, name: str, said: Any) -> None:
    run = damaged(finished, folder, damage, name, [10])
    chosen = toys.experiment(output=str(folder))
    # A file that a flip changed in nothing that counts, as a line's end, is no damage.
    assert train(chosen, resume=True)["status"] == "completed"
    assert model_of(run) == model_of(finished) and not Path("hacked").exists()
    lines = [line for line in said.readouterr().err.splitlines() if line]
    if damage is not _flip or name != "manifest.json":
        assert len(lines) == 1 and lines[0].startswith("warning: "), lines
        assert name in lines[0] and "step-00000010" in lines[0]
        assert "continuing from" in lines[0] and "step-00000005" in lines[0]


@pytest.mark.parametrize("case", SHORT)
def test_a_damaged_checkpoint_is_passed_over(
    finished: Path, tmp_path: Path, case: int, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_damage(finished, tmp_path / "runs", *CASES[case], capsys)


@pytest.mark.campaign
def test_every_damage_of_every_file_is_passed_over(
    finished: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(CASES) == 60
    for case, (damage, name) in enumerate(CASES):
        check_damage(finished, tmp_path / str(case), damage, name, capsys)


@pytest.mark.parametrize("damage", [_cut, _code, _folder])
@pytest.mark.parametrize("name", ["server.pt", "client-0002.pt", "manifest.json"])
def test_without_a_whole_checkpoint_nothing_is_changed(
    finished: Path, tmp_path: Path, damage: Callable, name: str, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = damaged(finished, tmp_path / "runs", damage, name, [5, 10])
    before = contents(run)
    with pytest.raises(ResumeError, match="no checkpoint is left to continue from") as caught:
        train(toys.experiment(output=str(tmp_path / "runs")), resume=True)
    lines = str(caught.value).splitlines()
    assert [name in line for line in lines] == [True, True, False]
    assert contents(run) == before and not Path("hacked").exists()


def test_the_warning_is_logged_too(finished: Path, tmp_path: Path, monkeypatch) -> None:
    damaged(finished, tmp_path, _cut, "client-0001.pt", [10])
    told: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = told.append  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger("mpsl_dist"), "handlers", [handler])
    train(toys.experiment(output=str(tmp_path)), resume=True)
    assert [r.levelname for r in told if "client-0001.pt" in r.getMessage()] == ["WARNING"]


def test_no_owner_takes_a_state_over_before_all_are_whole(finished: Path, tmp_path: Path) -> None:
    run = damaged(finished, tmp_path, _cut, "client-0003.pt", [5, 10])
    method = in_one_process(toys.experiment(output=str(tmp_path)))
    with pytest.raises(ResumeError):
        train(toys.experiment(output=str(tmp_path)), resume=True, method=method)
    assert "restore" not in [message for message, _ in method.clients.calls]
    assert (run / "checkpoints" / "step-00000010").is_dir()


def test_a_checkpoint_of_an_older_version_has_no_digests_and_loads(
    finished: Path, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "toy"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("step-00000010"))
    path = run / "checkpoints" / "step-00000005" / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: values[k] for k in values if k not in ("files", "sha256")}))
    train(toys.experiment(output=str(tmp_path)), resume=True)
    assert model_of(run) == model_of(finished) and not capsys.readouterr().err


def test_a_client_that_was_lost_by_a_checkpoint_begins_with_the_others_average() -> None:
    chosen = toys.experiment(faults={"on_loss": "continue"})
    method = in_one_process(chosen)
    method.begin_epoch(0)
    method.step(0, 0)
    own = {n: c.tokenizer_weights() for n, c in method.clients.references.items()}
    with tempfile.TemporaryDirectory() as folder:
        files = method.save(folder)
        (Path(folder) / "client-0001.pt").unlink()
        del files["client-0001.pt"]
        assert method.damage(folder, files) is None
        method.restore(folder, files)
    sizes = [method.sizes[n] for n in (0, 2, 3)]
    mean = average([own[n] for n in (0, 2, 3)], sizes)
    found = method.clients.references[1].tokenizer_weights()
    assert all(torch.equal(found[key], value) for key, value in mean.items())
    assert all(
        torch.equal(method.clients.references[0].tokenizer_weights()[key], value)
        for key, value in own[0].items()
    )


@pytest.mark.parametrize(
    "change", [{"epoch": 1}, {"seconds": float("nan")}, {"step": 10**400}, {"traffic": {"x": [1]}}]
)
def test_a_manifest_that_was_changed_is_damaged(finished: Path, tmp_path: Path, change: dict):
    shutil.copytree(finished / "checkpoints", tmp_path / "c")
    path = tmp_path / "c" / "step-00000010" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    warnings: list[str] = []
    folder, _ = checkpoint.latest(tmp_path / "c", warn=warnings.append)
    assert folder.name == "step-00000005" and len(warnings) == 1 and str(path) in warnings[0]


def test_a_checkpoint_that_was_passed_over_is_no_reason_to_remove_a_good_one(
    finished: Path, tmp_path: Path
) -> None:
    damaged(finished, tmp_path, _cut, "server.pt", [10])
    chosen = toys.experiment(output=str(tmp_path), checkpoint={"every_steps": 2, "keep": 1})
    train(chosen, resume=True)
    folders = tmp_path / "toy" / "checkpoints"
    assert [path.name for path in folders.iterdir()] == ["step-00000010"]
    values = checkpoint.Manifest(3, 0, 3, 4, 1.0, {})
    checkpoint.begin(folders, 3)
    checkpoint.complete(folders, values, keep=1)
    assert (folders / "step-00000003" / "manifest.json").exists()


def test_two_checkpoints_of_one_step_are_one(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "toy")
    stop = StopRequest()
    stop.signal = "SIGTERM"
    chosen = toys.experiment(output=str(tmp_path), training={"epochs": 3})
    directory = RunDirectory(chosen.run_directory)
    directory.open(to_dict(chosen), True, False)
    manifest = tmp_path / "toy" / "checkpoints" / "step-00000010" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    method = build(chosen)
    summary = loop.train(chosen, method.splits, method, directory, stop)
    assert summary["status"] == "stopped" and manifest.stat().st_mtime_ns == before


# -- a full disk -------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "16m") as folder:
        yield folder


def fill(disk: Path, leave: int) -> Path:
    path = disk / "ballast"
    with path.open("wb") as file:
        free = shutil.disk_usage(disk).free
        file.write(bytes(max(0, free - leave)))
    return path


@pytest.mark.parametrize("kind, file", [("centralized", "server.pt"), ("mpsl", "client-0000.pt")])
def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(
    disk: Path, kind: str, file: str, tmp_path: Path
) -> None:
    chosen = toys.experiment(output=str(disk), method=kind)
    method = build(chosen)
    save, ballast = method.save, disk / "ballast"

    def full(folder: str) -> dict[str, str]:
        if folder.endswith("step-00000010"):
            fill(disk, 8192)
        return save(folder)

    method.save = full
    with pytest.raises(DiskError, match=rf"No space left on device: .*{file} cannot be written"):
        train(chosen, method=method)
    run = disk / "toy"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000005"]
    assert not [path for path in run.rglob("*.partial")]
    ballast.unlink()
    train(chosen, resume=True)
    whole = toys.experiment(output=str(tmp_path / "whole"), method=kind)
    train(whole)
    assert model_of(run) == model_of(whole.run_directory)


def test_a_full_disk_leaves_the_file_before(disk: Path) -> None:
    path = disk / "server.pt"
    state.save(path, {"a": torch.zeros(10)})
    before = path.read_bytes()
    fill(disk, 4096)
    with pytest.raises(DiskError, match=r"No space left.*server\.pt cannot be written; make room"):
        state.save(path, {"a": torch.zeros(10**6)})
    assert path.read_bytes() == before
    assert sorted(p.name for p in disk.iterdir()) == ["ballast", "server.pt"]


# -- what may change on resume -----------------------------------------------------------------

OPTIMIZER = {"lr": 1e-2, "schedule": "step", "every_epochs": 1, "gamma": 0.5, "warmup_steps": 3}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "centralized"},
        {"training": {"server": OPTIMIZER, "client": OPTIMIZER}},
        {"tokenizer_sync": {"mode": "gradients", "every": 1}},
    ],
)
def test_a_run_made_longer_equals_one_that_was_as_long_from_the_start(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    def of(epochs: int, name: str) -> Experiment:
        training = {"epochs": epochs, **changes.get("training", {})}
        given = changes | {"training": training, "name": name, "output": str(tmp_path)}
        return toys.experiment(**given)

    train(of(2, "parts"))
    parts, whole = train(of(4, "parts"), resume=True), train(of(4, "whole"))
    assert parts["epochs_completed"] == 4 and parts["status"] == "completed"
    assert model_of(tmp_path / "parts") == model_of(tmp_path / "whole")
    assert (parts["loss"], parts["test"]) == (whole["loss"], whole["test"])
    assert RunDirectory(tmp_path / "parts").config()["training"]["epochs"] == 4
    with pytest.raises(ResumeError, match=r"training\.epochs: 3 is less than the 4"):
        train(of(3, "parts"), resume=True)
    assert RunDirectory(tmp_path / "parts").config()["training"]["epochs"] == 4
    assert RunDirectory(tmp_path / "parts").summary()["status"] == "completed"


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"training": {"client": {"schedule": "cosine"}}}, "the cosine schedule of .*client spans"),
        ({"training": {"server": {"schedule": "cosine"}}}, "the cosine schedule of .*server spans"),
        ({"tokenizer_sync": {"mode": "weights", "every": 3}}, "every 3 steps also met after"),
    ],
)
def test_a_run_whose_steps_depend_on_its_end_keeps_its_length(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    before = toys.experiment(**changes)
    run = RunDirectory(tmp_path / "run")
    run.open(to_dict(before), resume=False, overwrite=False)
    longer = to_dict(before)
    longer["training"] |= {"epochs": 9}
    with pytest.raises(RunError, match=rf"training\.epochs: the run has 2, now 9; .*{reason}"):
        run.check(longer, resume=True, overwrite=False)


def test_every_difference_that_matters_is_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.open(to_dict(toys.experiment()), resume=False, overwrite=False)
    other = to_dict(toys.experiment()) | {
        "method": "psl",
        "clients": 5,
        "plugins": ["toys", "json"],
        "method_options": {"rounds": 3},
    }
    other["tokenizer_sync"] |= {"mode": "gradients"}
    other["data"] |= {"name": "toy-image+audio", "options": {"a": 1}}
    other["model"] |= {"head": {"kind": "mine", "options": {"b": 2}}, "tokenizers": {"x": {"c": 3}}}
    with pytest.raises(RunError) as caught:
        run.check(other, resume=True, overwrite=False)
    named = [line.partition(":")[0] for line in str(caught.value).splitlines()[1:]]
    assert named == [
        "clients",
        "data.name",
        "data.options.a",
        "method",
        "method_options.rounds",
        "model.head.kind",
        "model.head.options.b",
        "model.tokenizers.x.c",
        "plugins",
        "tokenizer_sync.mode",
    ]


def test_a_run_that_is_older_than_a_key_goes_on_with_its_default_alone(tmp_path: Path) -> None:
    now = to_dict(toys.experiment())
    older = now | {"model": {k: v for k, v in now["model"].items() if k != "head_at"}}
    del older["wire"]
    RunDirectory(tmp_path / "run").open(older, resume=False, overwrite=False)
    run = RunDirectory(tmp_path / "run", to_dict(Experiment()))
    run.check(now, resume=True, overwrite=False)
    now["model"]["head_at"] = "client"
    with pytest.raises(RunError, match=r"model\.head_at: the run has 'server', now 'client'"):
        run.check(now, resume=True, overwrite=False)


@pytest.mark.parametrize(
    "section, change",
    [
        ("runtime", {"rpc_timeout": 9.0}),
        ("federated", {"round_timeout": 9.0}),
        ("checkpoint", {"keep": 7}),
        ("data", {"root": "/x", "cache": "/y", "loaders": 2}),
        ("weights", {"root": "/x"}),
        ("training", {"test_batch_size": 7}),
    ],
)
def test_what_computes_the_same_may_change(tmp_path: Path, section: str, change: dict) -> None:
    run, before = RunDirectory(tmp_path / "run"), to_dict(toys.experiment())
    run.open(before, resume=False, overwrite=False)
    now = before | {section: before[section] | change}
    run.open(now, resume=True, overwrite=False)
    assert run.config() == before
    run.record(now)
    assert run.config() == now
