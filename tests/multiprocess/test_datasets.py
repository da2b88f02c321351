"""One epoch of MPSL on each dataset's small files, by its shipped experiment and the real loop.

Only sizes are overridden, and weights that no test may download.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launcher, torchrun_line
from media_files import (
    make_coco_qa,
    make_karpathy,
    make_kinetics_sounds,
    make_meld,
    make_t4sa,
    make_ucf101,
    write_csv,
    write_picture,
    write_sound,
)

from mpsl_dist import config
from mpsl_dist.actors import deployable
from mpsl_dist.actors.holdings import load_data
from mpsl_dist.actors.local_data import TestData
from mpsl_dist.config import Experiment, to_dict

HERE = Path(__file__).parent
FILES: dict[str, Callable[[Path], object]] = {
    "coco-qa": make_coco_qa,
    "t4sa": make_t4sa,
    "kinetics-sounds": lambda root: make_kinetics_sounds(root, ["bowling", "singing"]),
    "ucf101": lambda root: make_ucf101(root, ["ApplyEyeMakeup", "BabyCrawling"]),
    "meld": make_meld,
    "flickr30k": lambda root: make_karpathy(root, "flickr30k"),
    "ms-coco": lambda root: make_karpathy(root, "coco"),
}
#: Training samples of these small files; in retrieval pictures, with five captions each.
SAMPLES = {
    "coco-qa": 12,
    "t4sa": 9,
    "kinetics-sounds": 8,
    "ucf101": 6,
    "meld": 10,
    "flickr30k": 4,
    "ms-coco": 4,
    "manifest": 8,
}
SMALL = (
    "clients=2",
    "clients_per_worker=2",
    "data.image_size=32",
    "data.partition={kind: dirichlet, alpha: 0.1}",
    "model.encoder={size: custom, width: 32, depth: 2, heads: 2, trainable_blocks: 1}",
    "weights={}",
    "training.epochs=1",
    "training.batch_size=4",
    "device=cpu",
    "runtime={server_threads: 1, worker_threads: 1}",
)


def _experiment(name: str, root: Path, output: Path) -> Experiment:
    """The shipped experiment, made small."""
    words = [*SMALL, f"data.root={root}", f"output={output}", f"name={name}"]
    words.append("model.text=table")
    if name == "meld":
        words.remove("data.image_size=32")
    if name in ("kinetics-sounds", "ucf101", "meld"):
        words.append("data.audio_frames=98")
    return config.load(ROOT / "configs/paper" / f"{name}.yaml", words)


def _own_data(folder: Path, output: Path) -> Experiment:
    """A manifest whose rows name their owners."""
    rows = []
    for n in range(12):
        write_picture(folder / f"{n}.jpg", 60 + 10 * n)
        write_sound(folder / f"{n}.wav", 0.5)
        split, owner = "test" if n % 3 == 2 else "train", "north" if n < 4 else "south"
        rows.append([f"{n}.jpg", f"{n}.wav", f"note {n}", "ab"[n % 2], split, owner])
    columns = ["image", "audio", "text", "label", "split", "client"]
    path = write_csv(folder / "manifest.csv", columns, rows)
    words = [*SMALL, f"data.root={path}", f"output={output}", "name=manifest"]
    words += ["data.name=manifest", "data.partition.kind=natural", "data.audio_frames=98"]
    return config.load(ROOT / "configs/quickstart.yaml", words)


@pytest.fixture(scope="module")
def experiments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Experiment]:
    """Every experiment, trained in one world of a server and a worker."""
    folder = tmp_path_factory.mktemp("datasets")
    root, output = folder / "data", folder / "runs"
    for make in FILES.values():
        make(root)
    chosen = {name: _experiment(name, root, output) for name in FILES}
    chosen["manifest"] = _own_data(folder / "own", output)
    task = folder / "task.json"
    task.write_text(json.dumps([to_dict(experiment) for experiment in chosen.values()]))
    with launcher(folder) as launch:
        line = torchrun_line(2, str(HERE / "dataset_ranks.py"), str(task))
        status, said = launch(line).finish(240)
    assert status == 0, said
    return chosen


@pytest.mark.parametrize("name", SAMPLES)
def test_an_epoch_on_small_files(name: str, experiments: dict[str, Experiment]) -> None:
    experiment = experiments[name]
    run = experiment.run_directory
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["dataset"]) == ("completed", name)
    assert summary["epochs_completed"] == 1 and summary["clients_lost"] == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert len(losses) == summary["steps_completed"] >= SAMPLES[name] // 4
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    retrieval = name in ("flickr30k", "ms-coco")
    assert ("image_to_text_r1" if retrieval else "accuracy") in summary["test"]
    assert all(0 <= value <= 1 for value in summary["test"].values())
    assert len(load_data(experiment).train.labels) == SAMPLES[name]
    assert "WARNING" not in (run / "rank1.log").read_text()


@pytest.mark.parametrize("name", SAMPLES)
def test_the_model_to_deploy_repeats_the_test(
    name: str, experiments: dict[str, Experiment]
) -> None:
    folder = experiments[name].run_directory
    summary = json.loads((folder / "summary.json").read_text())
    torch.set_num_threads(1)
    model, experiment, _ = deployable.load(folder / "model")
    held = TestData(load_data(experiment).test)
    again = model.test(held, experiment.training.test_batch_size)
    assert again == pytest.approx({key: summary["test"][key] for key in again})


def test_a_natural_federation_is_logged(experiments: dict[str, Experiment]) -> None:
    log = (experiments["manifest"].run_directory / "rank0.log").read_text()
    assert "partition: natural" in log and "2 clients with 3 to 5 training samples" in log
    assert "client 0 is 'north'" in log and "client 1 is 'south'" in log
