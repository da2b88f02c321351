"""``mpsl_dist compare``: from run directories to a table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import toys
import yaml

from mpsl_dist.__main__ import main
from mpsl_dist.analysis import compare
from mpsl_dist.config import to_dict
from mpsl_dist.errors import RunError


def write_run(
    folder: Path, name: str, curve: list[float], status: str = "completed", **changes: Any
) -> Path:
    """Leave what a run leaves: ``curve`` is its test accuracy after every round."""
    experiment = toys.experiment(name=name, **changes)
    path = folder / name
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(to_dict(experiment)))
    lines = []
    for epoch, value in enumerate(curve):
        lines.append({"step": epoch + 1, "epoch": epoch, "split": "train", "loss": 1.0})
        test = {"split": "test", "metric": {"accuracy": value}}
        lines.append({"step": epoch + 1, "epoch": epoch} | test)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "name": name,
        "method": experiment.method,
        "dataset": experiment.data.name,
        "seed": experiment.seed,
        "clients": experiment.clients,
        "epochs_completed": len(curve),
        "test": {"accuracy": curve[-1]},
        "baselines": {"image_only": 0.25},
        "trainable_parameters": {"client": 1234, "server": 5678},
        "communication": {
            "up_bytes_per_client_per_epoch": 2**20,
            "down_bytes_per_client_per_epoch": 2**19,
        },
        "seconds": {"total": 10.0, "step_median": 0.5},
        "status": status,
    }
    (path / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.mark.parametrize(
    "curve, rounds",
    [([0.5], 1), ([0.1, 0.94, 0.95, 1.0, 0.2], 3), ([1.0, 0.1], 1), ([0.0, 0.0], 1)],
)
def test_rounds_to_95_percent_of_the_best(curve: list[float], rounds: int) -> None:
    assert compare.rounds_to(curve) == rounds


def test_mean_and_deviation_are_over_seeds(tmp_path: Path) -> None:
    finals = {1: 0.5, 2: 0.6, 3: 0.8}
    runs = [
        write_run(tmp_path, f"r{seed}", [0.1, final], method="fedavg", seed=seed)
        for seed, final in finals.items()
    ]
    (only,) = compare.group(compare.read(runs))
    assert only.label == "fedavg" and only.figures["seeds"] == 3
    assert only.figures["mean"] == pytest.approx(1.9 / 3)
    # sqrt(((.1333)^2 + (.0333)^2 + (.1667)^2) / 2)
    assert only.figures["std"] == pytest.approx(0.152753, abs=1e-6)
    assert only.figures["rounds_to_95_percent_of_peak"] == 2


def test_retrieval_is_compared_by_the_mean_of_its_recalls(tmp_path: Path) -> None:
    path = write_run(tmp_path, "a", [0.5])
    recalls = {f"{way}_r{k}": k / 20 for way in ("image_to_text", "text_to_image") for k in (1, 5)}
    test = recalls | {"image_to_text_r1_own_mean": 0.9}
    line = {"step": 1, "epoch": 0, "split": "test", "metric": test}
    (path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    summary = json.loads((path / "summary.json").read_text()) | {"test": test}
    (path / "summary.json").write_text(json.dumps(summary))
    (only,) = compare.group(compare.read([path]))
    assert only.figures["metric"] == "mean recall"
    assert only.figures["mean"] == pytest.approx(0.15)


def test_a_group_is_labelled_by_what_tells_it_from_others_of_its_method(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path, "a", [0.5]),
        write_run(tmp_path, "b", [0.6], tokenizer_sync={"mode": "gradients", "every": 5}),
        write_run(tmp_path, "c", [0.7], method="centralized"),
        # Centralized training reads no tokenizer_sync: one group with the run above.
        write_run(tmp_path, "d", [0.9], method="centralized", tokenizer_sync={"mode": "weights"}),
    ]
    groups = compare.group(compare.read(runs))
    assert [g.label for g in groups] == [
        "centralized",
        "mpsl (tokenizer_sync.every=5, tokenizer_sync.mode=gradients)",
        "mpsl (tokenizer_sync.mode=none)",
    ]
    assert groups[0].figures["mean"] == pytest.approx(0.8)


def test_a_label_leaves_out_what_most_groups_have(tmp_path: Path) -> None:
    sync = {"mode": "gradients", "every": 5}
    runs = [
        write_run(tmp_path, "a", [0.5], tokenizer_sync=sync),
        write_run(tmp_path, "b", [0.5], tokenizer_sync=sync, client_share="equal"),
        # How often nothing is synchronised tells no runs apart.
        write_run(tmp_path, "c", [0.5], tokenizer_sync={"mode": "none", "every": 3}),
        write_run(tmp_path, "d", [0.5], tokenizer_sync={"mode": "none", "every": 7}),
        write_run(tmp_path, "e", [0.5], tokenizer_sync=sync, seed=9, training={"epochs": 3}),
    ]
    assert sorted(g.label for g in compare.group(compare.read(runs))) == [
        "mpsl",
        "mpsl (client_share=equal)",
        "mpsl (tokenizer_sync.mode=none)",
        "mpsl (training.epochs=3)",
    ]


def test_no_two_groups_share_a_label_where_a_key_is_null(tmp_path: Path) -> None:
    data = toys.experiment().data
    sized = {"name": data.name, "image_size": 64}
    runs = [
        write_run(tmp_path, "a", [0.5]),
        write_run(tmp_path, "b", [0.5], data=sized),
        write_run(tmp_path, "c", [0.5], data=sized, client_share="equal"),
    ]
    assert sorted(g.label for g in compare.group(compare.read(runs))) == [
        "mpsl",
        "mpsl (client_share=equal)",
        "mpsl (data.image_size=null)",
    ]


def test_the_page_sets_method_against_dataset(tmp_path: Path) -> None:
    audio = {"name": "toy-image+audio"}
    runs = [
        write_run(tmp_path, "a", [0.25, 0.5]),
        write_run(tmp_path, "b", [0.25, 0.5, 0.75], data=audio, method="fedavg"),
    ]
    page = compare.markdown(compare.group(compare.read(runs)))
    lines = page.splitlines()
    head = "| method | toy-image+audio, N=4, accuracy | toy-image+text, N=4, accuracy |"
    assert lines[2] == head
    assert "| fedavg | 75.0 % |  |" in lines and "| mpsl |  | 50.0 % |" in lines
    assert "toy-image+text, without any model: image_only 25.0 %." in lines
    assert "| 1,234 |" in page and "| 1.000 | 0.500 |" in page
    assert "unequal" not in page


def test_unequal_rounds_are_said(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "a", [0.5]), write_run(tmp_path, "b", [0.5, 0.6], method="psl")]
    page = compare.markdown(compare.group(compare.read(runs)))
    assert "toy-image+text: unequal rounds, 1, 2." in page


def test_the_command_writes_page_csv_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path, f"r{s}", [0.3, 0.5], seed=s) for s in (1, 2)]
    out = tmp_path / "made" / "table.md"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    assert out.read_text() in capsys.readouterr().out
    (line,) = csv.DictReader(out.with_suffix(".csv").open())
    assert line["method"] == "mpsl" and float(line["mean"]) == 0.5 and float(line["std"]) == 0
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_every_folder_that_cannot_be_compared_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = write_run(tmp_path, "stopped", [0.5], status="stopped")
    with pytest.raises(RunError) as caught:
        compare.read([stopped, tmp_path / "absent"])
    told = str(caught.value)
    assert "stopped: the run is stopped" in told and "absent: no summary.json" in told
    assert main(["compare", str(stopped)]) == 2
    good = write_run(tmp_path, "good", [0.5])
    assert main(["compare", str(good), "--out", "table.txt"]) == 2
    assert "must end in .md" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["summary.json", "config.yaml", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"\xff\n\xff\n", b"[1]\n[2]\n", b"7\n7\n", b"{\n{\n", b"\n"])
def test_a_damaged_file_is_named_beside_other_problems(
    tmp_path: Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, "damaged", [0.5])
    (path / name).write_bytes(content)
    assert main(["compare", str(path), str(tmp_path / "absent")]) == 2
    error = capsys.readouterr().err
    assert f"error: {path / name}: " in error and "absent: no summary.json" in error


@pytest.mark.parametrize(
    "key, value",
    [("test", {}), ("test", 0.5), ("seconds", {}), ("clients", "4"), ("communication", None)],
)
def test_a_summary_without_what_a_comparison_takes_is_named(
    tmp_path: Path, key: str, value: Any
) -> None:
    path = write_run(tmp_path, "r", [0.5])
    summary = json.loads((path / "summary.json").read_text()) | {key: value}
    (path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(RunError, match=rf"{path}.*({key}|recall)"):
        compare.read([path])


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path, capsys) -> None:
    path = write_run(tmp_path, "r", [0.5])
    assert main(["compare", str(path), "--out", str(path / "summary.json" / "table.md")]) == 2
    assert "error: --out: " in capsys.readouterr().err
