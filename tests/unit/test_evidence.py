"""What results rest on: damaged and missing files are left out of tests, counted and said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import toys
from local_fleet import LocalRounds, in_one_process
from media_files import write_csv, write_picture

from mpsl_dist.actors import deployable
from mpsl_dist.actors.holdings import Holdings, load_data
from mpsl_dist.actors.local_data import TestData
from mpsl_dist.config import Experiment, from_dict, to_dict
from mpsl_dist.data import Batch
from mpsl_dist.data.decode.samples import FileDataset
from mpsl_dist.errors import DataError
from mpsl_dist.methods import centralized, fedavg, loop, standalone
from mpsl_dist.methods.evidence import sentences
from mpsl_dist.methods.hosting import BuildClients, Setup
from mpsl_dist.methods.link import Transport
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.runtime.process import StopRequest

METHODS = ("mpsl", "fedavg", "centralized")
#: Where clients read a public test set too, each for itself.
ALL = (*METHODS, "standalone")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twenty pictures to train on and six to test with, in two classes, dark and bright."""
    rows = []
    for split, count in (("train", 20), ("test", 6)):
        for n in range(count):
            write_picture(tmp_path / f"{split}{n}.png", (60, 220)[n % 2], size=(8, 8))
            rows.append([f"{split}{n}.png", ("dark", "bright")[n % 2], split])
    return write_csv(tmp_path / "manifest.csv", ["image", "label", "split"], rows).parent


def damage(folder: Path, *names: str) -> None:
    for name in names:
        (folder / f"{name}.png").write_bytes(b"no picture")


def experiment(folder: Path, method: str = "mpsl", **data: Any) -> Experiment:
    chosen = {"name": "manifest", "root": str(folder), "image_size": 8, "on_error": "skip"}
    chosen |= {"max_missing": 0.5}
    return toys.experiment(
        method=method,
        clients=2,
        output=str(folder / "runs"),
        data=chosen | {"partition": {"kind": "iid"}} | data,
        training={"batch_size": 10, "epochs": 2, "test_batch_size": 4},
    )


def build(chosen: Experiment) -> Any:
    if chosen.method == "mpsl":
        return in_one_process(chosen)
    holdings = Holdings.load(chosen)
    if chosen.method == "centralized":
        return centralized.build(Setup(chosen, holdings, 1))
    if chosen.method == "standalone":

        def local(build: BuildClients) -> Transport:
            return LocalRounds(build(chosen, [0, 1], holdings)).fleet

        return standalone.build(Setup(chosen, holdings, 1, transport=local))
    clients = fedavg.build_clients(chosen, [0, 1], holdings)
    model = deployable.build(chosen, holdings.splits)
    return fedavg.FedAvg(chosen, holdings.splits, model, LocalRounds(clients))


def train(chosen: Experiment, method: Any = None, resume: bool = False) -> dict[str, Any]:
    directory = RunDirectory(chosen.run_directory)
    directory.open(to_dict(chosen), resume, False)
    method = method or build(chosen)
    loop.train(chosen, method.splits, method, directory, StopRequest())
    return json.loads((directory.path / "summary.json").read_text())


@pytest.mark.parametrize("place", ["server", "clients"])
@pytest.mark.parametrize("loaders", [0, 1])
@pytest.mark.parametrize("method", ALL)
def test_damaged_and_missing_files_are_counted_apart(
    pictures: Path, method: str, loaders: int, place: str
) -> None:
    damage(pictures, "train0", "train7", "test1")
    (pictures / "train3.png").unlink()
    (pictures / "test4.png").unlink()
    (pictures / "test5.png").unlink()
    chosen = experiment(pictures, method, test_at=place, loaders=loaders)
    assert train(chosen)["data"] == {
        "classes": 2,
        "train": {
            "samples": 19,
            "files_missing": 1,
            "files_damaged": 2,
            "samples_replaced": 4,  # two in each of two epochs
        },
        "test": {"samples": 4, "files_missing": 2, "files_damaged": 1, "samples_left_out": 1},
    }


@pytest.mark.parametrize("place", ["server", "clients"])
@pytest.mark.parametrize("method", METHODS)
def test_an_accuracy_is_that_of_the_samples_that_can_be_read(
    pictures: Path, method: str, place: str
) -> None:
    chosen = experiment(pictures, method, test_at=place)
    whole = build(chosen).evaluate()["accuracy"]
    assert whole == 0.5, "untrained, it has one answer for all"
    right = next(
        name for name, n in (("dark", 0), ("bright", 1)) if _alone(chosen, pictures, n) == 1.0
    )
    damage(pictures, *(("test0", "test2") if right == "dark" else ("test1", "test3")))
    method = build(chosen)
    assert method.evaluate()["accuracy"] == pytest.approx(1 / 4)
    assert method.damage_met().left_out == 2


def _alone(chosen: Experiment, folder: Path, position: int) -> float:
    """The accuracy of an untrained model on one test sample."""
    splits = load_data(chosen)
    model = deployable.build(chosen, splits)
    return model.test(TestData(splits.test, [position]), 1)["accuracy"]


@pytest.mark.parametrize("place", ["server", "clients"])
def test_everyones_own_accuracy_leaves_it_out_too(pictures: Path, place: str) -> None:
    damage(pictures, "test0", "test1", "test2")
    values = to_dict(experiment(pictures, test_at=place))
    values["training"]["evaluate_own"] = True
    method = build(from_dict(values))
    found = method.evaluate()
    assert found["accuracy"] in (1 / 3, 2 / 3) and found["accuracy_own_max"] <= 1
    if place == "server":
        # Untrained tokenizers are all alike.
        assert found["accuracy_own_mean"] == found["accuracy"]


@pytest.mark.parametrize("place", ["server", "clients"])
def test_a_test_batch_is_read_once_for_all_tokenizers_and_in_the_middle(
    pictures: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = to_dict(experiment(pictures, test_at=place))
    values["training"]["evaluate_own"] = True
    method = build(from_dict(values))
    read: list[int] = []
    fetch = FileDataset.fetch

    def seen(self: FileDataset, indices: Sequence[int], seed: int | None = None) -> Batch:
        assert seed is None, "a view of training"
        read.extend(indices)
        return fetch(self, indices, seed)

    monkeypatch.setattr(FileDataset, "fetch", seen)
    method.evaluate()
    assert sorted(read) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("place", ["server", "clients"])
@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_test_file_ends_the_run_before_its_first_step(
    pictures: Path, method: str, place: str
) -> None:
    damage(pictures, "test5")
    chosen = experiment(pictures, method, test_at=place, on_error="raise")
    built = build(chosen)
    built.step = None
    with pytest.raises(DataError, match=r"test5\.png: cannot be read"):
        train(chosen, built)


@pytest.mark.parametrize("method", ALL)
def test_without_a_readable_test_sample_nothing_is_trained(pictures: Path, method: str) -> None:
    damage(pictures, *(f"test{n}" for n in range(6)))
    with pytest.raises(DataError, match="no test sample can be read"):
        train(experiment(pictures, method))


@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_training_file_ends_a_run_that_was_told_so(pictures: Path, method: str) -> None:
    damage(pictures, "train5")
    with pytest.raises(DataError, match=r"train5\.png: cannot be read"):
        train(experiment(pictures, method, on_error="raise"))


@pytest.mark.parametrize("method", ALL)
def test_a_resumed_run_goes_on_counting(pictures: Path, method: str) -> None:
    damage(pictures, "train0", "test1")
    values = to_dict(experiment(pictures, method))
    values["training"]["epochs"] = 1
    assert train(from_dict(values))["data"]["train"]["samples_replaced"] == 1
    values["training"]["epochs"] = 3
    found = train(from_dict(values), resume=True)["data"]
    assert (found["train"]["samples_replaced"], found["train"]["files_damaged"]) == (3, 1)
    assert found["test"]["samples_left_out"] == 1


def test_a_retrieval_test_has_no_pair_but_its_own(tmp_path: Path) -> None:
    rows = []
    for n in range(8):
        write_picture(tmp_path / f"{n}.png", 30 * n + 20, size=(8, 8))
        split = "train" if n < 4 else "test"
        rows += [[f"{n}.png", f"picture {n} caption {k}", split] for k in range(2)]
    write_csv(tmp_path / "manifest.csv", ["image", "text", "split"], rows)
    damage(tmp_path, "5", "7")
    held = TestData(load_data(experiment(tmp_path)).test)
    batches = list(held.batches(3))
    labels = [label for batch in batches for label in batch.labels.tolist()]
    assert labels == [0, 0, 2, 2] and sorted(held.unread.positions) == [2, 3, 6, 7]
    assert len(held.unread.files) == 2


def test_the_console_says_sizes_and_faults() -> None:
    split = {"samples": 20, "files_missing": 0, "files_damaged": 0}
    train, test = {**split, "samples_replaced": 0}, {**split, "samples_left_out": 0}
    whole = {"classes": 3, "train": train, "test": test}
    assert sentences(whole) == ["data: 20 training samples, 20 for testing, 3 classes"]
    train |= {"files_damaged": 2, "samples_replaced": 9}
    test |= {"files_missing": 1, "files_damaged": 1, "samples_left_out": 4}
    assert sentences(whole)[1:] == [
        "train data: missing files: 0, damaged: 2; times that another sample stood in: 9",
        "test data: missing files: 1, damaged: 1; samples left out of every result: 4",
    ]
