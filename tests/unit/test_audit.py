"""``mpsl_dist audit``: real clients and a real server in one process, heard by a curious server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import yaml
from local_fleet import in_one_process, steps_of
from rich.console import Console

from mpsl_dist.__main__ import main
from mpsl_dist.analysis.audit import audit as command
from mpsl_dist.analysis.audit import halves, report
from mpsl_dist.analysis.audit.figures import Audit, Figure, over
from mpsl_dist.analysis.audit.victim import Victim
from mpsl_dist.config import Experiment, load, to_dict
from mpsl_dist.records import checkpoint
from mpsl_dist.records.checkpoint import Manifest
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.runtime.answers import name_clients

#: Patches of twelve numbers in tokens of sixteen: exact.
MODEL = {"encoder": {"size": "custom", "width": 16, "depth": 1, "heads": 2}, "image_patch": 2}
TRAINING = {
    "epochs": 1,
    "batch_size": 6,
    "server": {"lr": 1e-2},
    "client": {"lr": 3e-2},
}


def tiny(**changes: Any) -> Experiment:
    changes = {"clients": 2, "model": MODEL, "training": TRAINING} | changes
    return toys.experiment(**changes)


def leave_run(folder: Path, steps: int = 4, **changes: Any) -> Path:
    """Leave what a completed run leaves, trained in this process."""
    experiment = tiny(output=str(folder), **changes)
    path = experiment.run_directory
    method = in_one_process(experiment)
    steps_of(method, steps)
    where = checkpoint.begin(path / "checkpoints", steps)
    files = method.save(str(where.absolute()))
    state = Manifest(steps, 0, steps, experiment.clients, 1.0, {}, files)
    checkpoint.complete(path / "checkpoints", state, keep=2)
    (path / "config.yaml").write_text(yaml.safe_dump(to_dict(experiment)))
    test = {"split": "test", "metric": {"accuracy": 0.5}, "step": steps, "epoch": 0}
    (path / "metrics.jsonl").write_text(json.dumps(test) + "\n")
    parameters = method.trainable_parameters()
    summary = {
        "name": experiment.name,
        "method": experiment.method,
        "dataset": experiment.data.name,
        "seed": experiment.seed,
        "clients": experiment.clients,
        "epochs_completed": 1,
        "test": {"accuracy": 0.5},
        "baselines": {},
        "trainable_parameters": parameters,
        "communication": {
            "up_bytes_per_client_per_epoch": 2**20,
            "down_bytes_per_client_per_epoch": 2**20,
        },
        "seconds": {"total": 1.0, "step_median": 0.1},
        "status": "completed",
    }
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def write_config(folder: Path, **changes: Any) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(to_dict(tiny(output=str(folder), **changes))))
    return str(path)


def audited(**changes: Any) -> Audit:
    return command.audit(tiny(**changes), samples=12)


def value(found: Audit, metric: str, attack: str, knowledge: str = "initial") -> float:
    return figure(found, metric, attack, knowledge).value


def figure(found: Audit, metric: str, attack: str, knowledge: str = "initial") -> Figure:
    rows = [f for f in found.figures if (f.metric, f.knowledge) == (metric, knowledge)]
    return next(f for f in reversed(rows) if f.attack == attack)


@pytest.fixture(scope="module")
def of_a_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, dict[str, Any]]:
    """A run whose tokenizers drift apart, and its audit: path, exit status, audit.json."""
    path = leave_run(tmp_path_factory.mktemp("drifted"))
    out = path.parent / "found"
    status = main(["audit", str(path), "--samples", "12", "--out", str(out)])
    return path, status, json.loads((out / "audit.json").read_text())


def test_a_configuration_is_audited_at_its_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_config(tmp_path), tmp_path / "out"
    assert main(["audit", path, "--samples", "12", "--out", str(out)]) == 0
    (found,) = json.loads((out / "audit.json").read_text())["audits"]
    best = found["strongest"]["0"]
    assert best["labels"]["value"] == best["words"]["value"] == best["reidentified"]["value"] == 1
    assert best["psnr"]["attack"] == "exact" and best["psnr"]["value"] > 90
    assert best["membership"]["value"] == 1
    assert [e["deficit"] for e in found["equations"]] == [0]
    assert (out / "image.png").read_bytes().startswith(b"\x89PNG")
    assert "psnr" in capsys.readouterr().out


def test_permuted_labels_are_guessed_by_chance(tmp_path: Path) -> None:
    splits = halves.read(tiny(), 12).splits
    found = audited()
    controls = [f for f in found.figures if f.control]
    assert len(controls) == 3
    assert len(splits.classes) == 3
    for f in controls:  # the control's own chance, within four of its errors
        assert abs(f.value - f.floor) < 4 * (f.floor * (1 - f.floor) / f.samples) ** 0.5
        assert f not in (found.strongest("labels"),)


def test_knowing_a_clients_own_weights_beats_the_average_beats_the_initial_ones(
    of_a_run: tuple[Path, int, dict[str, Any]],
) -> None:
    _, status, content = of_a_run
    (found,) = content["audits"]
    exact = {
        (f["step"], f["knowledge"]): f["value"]
        for f in found["figures"]
        if (f["metric"], f["attack"]) == ("psnr", "exact")
    }
    assert status == 0
    assert set(exact) == {(0, "initial"), (4, "initial"), (4, "average"), (4, "own")}
    assert exact[4, "own"] > 80 > exact[4, "average"] + 20
    assert exact[4, "average"] > exact[4, "initial"]


def test_an_audit_leaves_the_run_and_the_weights_as_they_are(
    of_a_run: tuple[Path, int, dict[str, Any]],
) -> None:
    path, *_ = of_a_run
    experiment = load(path / "config.yaml")
    victim = Victim(experiment, halves.read(experiment, 12))
    (folder,) = checkpoint.complete_ones(path / "checkpoints")
    victim.restore(folder)
    owners = [*victim.clients.values(), victim.method.server.stepper]
    before = [p.clone() for p in parameters_of(owners)]
    first, second = victim.hear(), victim.hear()
    assert all(map(torch.equal, before, parameters_of(owners)))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.tokens[0], other.tokens[0])
        assert torch.equal(one.of_predictions_nk, other.of_predictions_nk)


def parameters_of(owners: list[Any]) -> list[torch.Tensor]:
    return [p for o in owners for p in (o.parameters() if callable(o.parameters) else o.parameters)]


@pytest.mark.parametrize("name", ["digits-qa", "toy-image+text"])
def test_what_is_audited_and_what_the_attacker_has_share_no_picture(name: str) -> None:
    experiment = tiny(data={"name": name})
    read = halves.read(experiment, 40 if name == "digits-qa" else 12)
    own, others = halves.keys(read.audited), halves.keys(read.public)
    assert len(own) == (40 if name == "digits-qa" else 12) and len(others) >= 10
    assert not {tuple(key) for key in own} & {tuple(key) for key in others}
    again = halves.read(experiment, len(own))
    assert torch.equal(again.audited.labels, read.audited.labels)


def test_clients_hold_the_audited_samples_alone() -> None:
    read = halves.read(tiny(), 12)
    heard = Victim(tiny(), read).hear()
    sent = torch.cat([one.inputs["image"] for one in heard]).flatten(1)
    wanted = read.audited.inputs["image"].flatten(1)
    assert sorted(sent[:, 0].tolist()) == sorted(wanted[:, 0].tolist())


def test_attacks_see_what_has_been_coded() -> None:
    plain, coded = audited(), audited(wire={"activations": "int8", "gradients": "int8"})
    seen = figure(coded, "psnr", "exact")
    assert seen.floor + 10 < seen.value
    assert value(coded, "psnr", "exact") < value(plain, "psnr", "exact") - 50
    assert value(coded, "labels", "smallest entry", "none") == 1
    assert any(f.of == "cut-layer gradient" for f in coded.figures)


def test_an_audit_leaves_no_secret_where_its_experiment_will_be_run(tmp_path: Path) -> None:
    path = write_config(tmp_path, defences={"token_noise": 0.5})
    assert main(["audit", path, "--samples", "12", "--out", str(tmp_path / "out")]) == 0
    directory = RunDirectory(load(path).run_directory)
    assert not directory.check(to_dict(load(path)), resume=False, overwrite=False)


def test_a_run_that_was_moved_is_heard_with_the_secrets_it_was_trained_with(tmp_path: Path) -> None:
    model, data = MODEL | {"train_tokenizers": False}, {"test_at": "clients"}
    path = leave_run(tmp_path / "old", defences={"secret_tokenizers": True}, model=model, data=data)
    experiment = load(path / "config.yaml")
    trained = in_one_process(experiment).clients.references
    moved = path.rename(tmp_path / "moved")
    before = sorted(moved.rglob("*"))
    with command.set_aside(experiment, RunDirectory(moved)) as aside:
        victim = Victim(aside, halves.read(experiment, 12))
    for n, client in victim.clients.items():
        own, true = client.tokenizers.local_value(), trained[n].tokenizers.local_value()
        assert all(map(torch.equal, own.state_dict().values(), true.state_dict().values()))
    assert sorted(moved.rglob("*")) == before and not path.exists()


@pytest.mark.parametrize("lacking", [[0, 1], [1], []], ids=str)
def test_a_run_that_was_copied_without_its_secrets_says_whose_are_drawn_anew(
    lacking: list[int], tmp_path: Path
) -> None:
    path = leave_run(tmp_path, steps=1, defences={"token_noise": 0.5})
    for n in lacking:
        (path / "secrets" / f"client-{n:04d}.key").unlink()
    found = command.audit(load(path / "config.yaml"), RunDirectory(path), samples=12)
    told = [note for note in found.notes if "secret" in note]
    assert len(told) == bool(lacking)
    for note in told:
        assert note.startswith(f"{path / 'secrets'}: no secret of {name_clients(lacking)} there")


def test_frozen_tokenizers_that_send_once_are_heard_once(tmp_path: Path) -> None:
    found = audited(model=MODEL | {"train_tokenizers": False}, wire={"cache": True})
    assert value(found, "psnr", "exact") > 90
    assert not any(f.of == "cut-layer gradient" for f in found.figures)  # none is sent


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "psl"},
        {"tokenizer_sync": {"mode": "gradients"}},
        {"tokenizer_sync": {"mode": "weights"}},
        {"model": MODEL | {"fusion": "late", "pre_norm": False}},
        {"device": "cuda"},
    ],
    ids=str,
)
def test_whatever_the_variant_labels_and_pictures_are_found(changes: dict[str, Any]) -> None:
    found = audited(**changes)
    assert value(found, "labels", "smallest entry", "none") == 1
    assert value(found, "psnr", "exact") > 90


def test_retrieval_has_no_labels_to_find() -> None:
    model = MODEL | {"image_patch": 4}
    found = audited(data={"name": "toy-pairs"}, model=model, contrastive="global")
    assert not [f for f in found.figures if f.metric == "labels"]
    assert "labels: none, the task has no classes" in found.notes
    assert value(found, "words", "nearest row of the table") == 1


def test_too_much_found_is_an_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["audit", write_config(tmp_path), "--samples", "12", "--out", str(tmp_path / "a")]
    assert main([*line, "--fail-over", "psnr=200", "labels=1.0"]) == 0
    assert main([*line, "--overwrite", "--fail-over", "psnr=20", "labels=1"]) == 1
    told = capsys.readouterr().err
    assert "psnr" in told and "is over 20 (exact, image, knowledge initial)" in told
    assert "labels" not in told


def test_what_is_no_number_is_over_every_limit() -> None:
    found = audited()
    found.figures = [replace(found.figures[0], metric="psnr", value=float("nan"))]
    (line,) = over([found], {"psnr": 20.0})
    assert "psnr nan is no number, so not known to be below 20" in line
    assert over([found], {"words": 0.5}) == []


def test_an_audit_that_found_no_figure_says_so(tmp_path: Path) -> None:
    found = audited()
    assert found.figures and found.equations
    found.figures, found.galleries = [], []
    console = Console(record=True)
    report.show(found, console)
    assert "toy: no attack gave a figure" in console.export_text()
    report.show_groups(report.grouped([found, found]), console)
    (path,) = report.write([found], tmp_path)
    (written,) = json.loads(path.read_text())["audits"]
    assert written["figures"] == [] and written["strongest"] == {}


def test_several_runs_stand_beside_each_other(
    of_a_run: tuple[Path, int, dict[str, Any]], tmp_path: Path
) -> None:
    first = of_a_run[0]
    second = leave_run(tmp_path / "b", seed=7)
    third = leave_run(tmp_path / "c", wire={"activations": "int2"})
    out = tmp_path / "out"
    runs = [str(path) for path in (first, second, third)]
    assert main(["audit", *runs, "--samples", "10", "--out", str(out)]) == 0
    lines = json.loads((out / "audit.json").read_text())["groups"]
    assert sorted(line["seeds"] for line in lines) == [1, 2]
    alone = next(line for line in lines if line["seeds"] == 1)
    assert "wire.activations=int2" in alone["label"]
    assert alone["psnr"] < next(line["psnr"] for line in lines if line["seeds"] == 2)
    assert (out / "price.png").exists() and (out / "3-toy-image.png").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["no/such/run"], "no/such/run: no such run directory or configuration"),
        (["{config}", "method=centralized"], "method: centralized has no clients"),
        (["{config}", "method=fedavg"], "method: fedavg sends weights alone"),
        (["{config}", "--samples", "3"], "--samples: at least 10, not 3"),
        (["{config}", "--fail-over", "loudness=3"], "--fail-over: no metric 'loudness'"),
        (["{config}", "--fail-over", "psnr=high"], "--fail-over: psnr=high: no number"),
        (["{config}", "--fail-over", "psnr=nan"], "--fail-over: psnr=nan: no number"),
        (["{config}", "nonsense=3"], "nonsense"),
        (["{folder}"], "no config.yaml there"),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_what_cannot_be_audited_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = write_config(tmp_path), ["--out", str(tmp_path / "out")]
    there = [word.format(config=config, folder=tmp_path) for word in words]
    assert main(["audit", *there, *out]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_earlier_audit_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "audit.json").write_text("{}")
    assert main(["audit", write_config(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds an audit" in capsys.readouterr().err
    assert (tmp_path / "out" / "audit.json").read_text() == "{}"
