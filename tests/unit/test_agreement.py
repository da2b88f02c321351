"""Hosts whose data never meet: what they say, what they agree on, what is refused and how."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from federation import make_sites, write_experiment
from local_fleet import LocalSplit, in_one_process
from media_files import write_csv

from mpsl_dist.__main__ import main
from mpsl_dist.actors import deployable
from mpsl_dist.actors.agreement import Agreement, Disagreement, Offer, agree, renumbered
from mpsl_dist.actors.holdings import Holdings, load_data
from mpsl_dist.actors.part_checks import refusals_without_data
from mpsl_dist.config.loading import HOST_KEYS, at_home
from mpsl_dist.config.schema import Experiment
from mpsl_dist.data import TensorDataset
from mpsl_dist.errors import ConfigError, DataError
from mpsl_dist.methods import federation
from mpsl_dist.methods.hosting import build_clients
from mpsl_dist.runtime import environment, world
from mpsl_dist.runtime.placement import place_in_order
from mpsl_dist.typed import flatten

SHAPES = {"image": (3, 16, 16), "text": (12,)}
NORTH = Offer("north", SHAPES, ("owl", "robin"), (12,), (4,))
SOUTH = Offer("south", SHAPES, ("owl", "wren"), (6,), (2,))


def experiment(**changes: Any) -> Experiment:
    """An experiment on two owners' own pictures and texts."""
    own = {"name": "manifest", "place": "own", "test_at": "clients", "text_length": 12}
    data = own | {"image_size": 16, "partition": {"kind": "natural"}} | changes.pop("data", {})
    return toys.experiment(clients=2, data=data, **changes)


@pytest.fixture(autouse=True)
def log_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker sends the log to a file: not that of later tests."""
    log = logging.getLogger("mpsl_dist")
    for name in ("propagate", "handlers", "level"):
        monkeypatch.setattr(log, name, getattr(log, name))


@pytest.fixture
def at_north(tmp_path: Path) -> Iterator[Path]:
    """This process is the worker of the first owner; gives the folder of its manifest."""
    _, (north, _) = make_sites(tmp_path)
    world.settle(experiment(data={"root": str(north)}, output=str(tmp_path / "runs")))
    yield north.parent
    world._residents.clear()


# -- the agreement -----------------------------------------------------------------------------


def test_classes_are_those_of_all_hosts_sorted() -> None:
    found = agree({1: NORTH, 2: SOUTH})
    assert found.classes == ("owl", "robin", "wren") and found.shapes == SHAPES
    assert found.train == [12, 6] and found.test == 6
    numbers = [replace(NORTH, classes=("2", "10")), replace(SOUTH, classes=("-1", "10"))]
    assert agree(dict(enumerate(numbers, 1))).classes == ("-1", "2", "10")


def test_a_list_that_all_hosts_have_keeps_its_order() -> None:
    declared = ("wren", "owl", "robin")
    offers = {1: replace(NORTH, classes=declared), 2: replace(SOUTH, classes=declared)}
    assert agree(offers).classes == declared


def test_clients_are_numbered_by_the_ranks_of_their_hosts() -> None:
    assert place_in_order(5, 2) == [[0, 1], [2, 3], [4]]
    offers = {2: replace(SOUTH, train=(6,)), 1: replace(NORTH, train=(7, 5))}
    assert agree(offers).train == [7, 5, 6]


def test_a_host_is_told_nothing_of_what_another_offered() -> None:
    told = agree({1: NORTH, 2: SOUTH}).told(2)
    assert told == Agreement(SHAPES, ("owl", "robin", "wren"), {2: SOUTH})


DIFFERENCES: dict[str, tuple[Offer, str]] = {
    "a missing modality": (
        replace(SOUTH, shapes={"image": SHAPES["image"]}),
        "modalities are image there and image, text at worker1 on north: set data.modalities",
    ),
    "another order": (
        replace(SOUTH, shapes=dict(reversed(SHAPES.items()))),
        "modalities are text, image there and image, text at worker1 on north",
    ),
    "another text length": (
        replace(SOUTH, shapes=SHAPES | {"text": (16,)}),
        "text has the shape (16,) there and (12,) at worker1 on north: set data.text_length",
    ),
    "retrieval": (
        replace(SOUTH, classes=()),
        "it is retrieval (no labels) there and classification (labels) at worker1 on north",
    ),
    "another spelling": (
        replace(SOUTH, classes=("Owl", "wren")),
        "the label 'Owl' there is 'owl' at worker1 on north: write them alike",
    ),
    "another separator": (
        replace(SOUTH, classes=("owl", "Ro-bin ")),
        "the label 'Ro-bin ' there is 'robin' at worker1 on north",
    ),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_a_difference_is_named_with_its_host(what: str) -> None:
    offer, said = DIFFERENCES[what]
    with pytest.raises(Disagreement) as found:
        agree({1: NORTH, 2: offer})
    assert f"worker2 on south disagrees: {said}" in str(found.value)
    assert list(found.value.by_rank) == [2]


def test_the_servers_test_set_is_held_to_the_same() -> None:
    tests = Offer("front", SHAPES | {"text": (16,)}, ("owl",), (), (9,))
    with pytest.raises(Disagreement, match=r"\(12,\) there and \(16,\) at the server on front"):
        agree({0: tests, 1: NORTH, 2: SOUTH})
    assert agree({0: replace(tests, shapes=SHAPES), 1: NORTH}).train == [12]


def test_every_host_that_has_nothing_to_offer_says_why() -> None:
    offers = {n: Offer(f"host{n}", refusal=f"a{n}\nb") for n in (1, 2)}
    with pytest.raises(Disagreement) as found:
        agree(offers | {3: SOUTH})
    assert str(found.value).splitlines() == [
        "worker1 on host1: a1",
        "worker1 on host1: b",
        "worker2 on host2: a2",
        "worker2 on host2: b",
    ]


# -- labels by the agreed list -----------------------------------------------------------------


def test_labels_are_numbered_by_the_list() -> None:
    before = toys.load(("image",))  # classes a, b, c
    after = renumbered(before, ("c", "a", "x", "b"))
    assert after.classes == ("c", "a", "x", "b")
    names = [before.classes[label] for label in before.train.labels]
    assert [after.classes[label] for label in after.train.labels] == names
    batch = after.train.fetch([5, 2, 7])
    assert torch.equal(batch.labels, after.train.labels[[5, 2, 7]])
    assert torch.equal(batch.inputs["image"], before.train.fetch([5, 2, 7]).inputs["image"])
    assert renumbered(before, before.classes) is before


def test_what_else_a_split_has_stays(tmp_path: Path) -> None:
    everything, _ = make_sites(tmp_path)
    splits = load_data(experiment(data={"root": str(everything)}))
    after = renumbered(splits, ("x", *splits.classes))
    assert after.train == replace(splits.train, labels=after.train.labels)
    assert torch.equal(after.train.labels, splits.train.labels + 1)

    class Owned(TensorDataset):
        clients = ("north",)

    toy = toys.load(("image",))
    owned = replace(toy, train=Owned(toy.train.inputs, toy.train.labels))
    split = renumbered(owned, ("c", "b", "a")).train
    assert split.clients == ("north",) and not hasattr(split, "nothing")


def test_a_label_that_is_not_declared_is_refused_with_the_near_one(tmp_path: Path) -> None:
    _, (_, south) = make_sites(tmp_path)
    declared = {"root": str(south), "classes": ["robin", "wrenn", "owl"]}
    with pytest.raises(DataError, match="label 'wren' is not in data.classes; did you mean 'wrenn"):
        load_data(experiment(data=declared))


def test_declared_classes_number_a_simulated_run_too(tmp_path: Path) -> None:
    everything, _ = make_sites(tmp_path)
    data = {"root": str(everything), "place": "simulated", "classes": ["wren", "robin", "owl"]}
    splits = load_data(experiment(data=data))
    assert splits.classes == ("wren", "robin", "owl")
    assert splits.train.labels.unique().tolist() == [0, 1, 2]


def test_retrieval_has_no_classes_to_declare() -> None:
    with pytest.raises(DataError, match="have no labels"):
        renumbered(toys.load_pairs(), ("a", "b"))


# -- who has what ------------------------------------------------------------------------------


def test_one_client_has_all_rows_of_its_host(at_north: Path) -> None:
    found = federation.own_holdings(experiment(), [1], 1)
    assert found.sizes == [12] and found.first == 1
    train, test = found.of(1)
    assert (len(train), len(test)) == (12, 4) and train.client == 1


def test_several_clients_of_a_host_share_its_rows_alone(at_north: Path) -> None:
    shared = experiment(data={"partition": {"kind": "iid"}}, clients_per_worker=2)
    found = federation.own_holdings(shared, [2, 3], 2)
    assert sorted(found.sizes) == [6, 6]
    rows = [row for n in (2, 3) for row in found.of(n)[0].indices]
    assert sorted(rows) == list(range(12))


def test_what_cannot_be_had_with_gaps_is_refused_by_the_host_that_has_them(at_north: Path) -> None:
    shared = experiment(wire={"cache": True}, model={"train_tokenizers": False})
    assert not federation.offer(shared, [0], 1).refusal
    with (at_north / "birds.csv").open() as file:
        header, first, *rows = csv.reader(file)
    first[header.index("text")] = ""
    write_csv(at_north / "birds.csv", header, [first, *rows])
    refused = federation.offer(shared, [0], 1).refusal
    assert refused.startswith("wire.cache: the server keeps whole samples"), refused


def test_more_owners_than_clients_of_a_host_are_refused(tmp_path: Path) -> None:
    everything, _ = make_sites(tmp_path)
    world.settle(experiment(data={"root": str(everything)}, output=str(tmp_path)))
    said = federation.offer(experiment(), [0], 1)
    assert "clients_per_worker: 1, but the data names 2" in said.refusal
    world._residents.clear()


def test_what_a_host_says_is_shapes_classes_and_counts(at_north: Path) -> None:
    said = federation.offer(experiment(), [0], 1)
    assert replace(said, host="north") == NORTH
    declared = experiment(data={"classes": ["owl", "robin", "wren", "dodo"]})
    assert federation.offer(declared, [0], 1).classes == ("owl", "robin", "wren", "dodo")


def test_a_host_without_its_data_says_why(at_north: Path) -> None:
    (at_north / "birds.csv").unlink()
    assert "birds.csv: No such file" in federation.offer(experiment(), [0], 1).refusal


def test_labels_follow_the_agreement_and_data_that_changed_are_refused(at_north: Path) -> None:
    shared, classes = experiment(), ("dodo", "owl", "robin")
    agreement = Agreement(SHAPES, classes, {1: federation.offer(shared, [0], 1)})
    found = federation.as_agreed(shared, [0], 1, agreement)
    assert found.splits.classes == classes
    assert found.splits.train.labels.unique().tolist() == [1, 2]
    rows = [["north-1.png", "x", "owl", split] for split in ("train", "test")]
    write_csv(at_north / "birds.csv", ["image", "text", "label", "split"], rows)
    with pytest.raises(DataError, match="have changed since the run began"):
        federation.as_agreed(shared, [0], 1, agreement)


def test_a_host_that_only_trains_has_no_use_for_test_rows(at_north: Path) -> None:
    shared = experiment(data={"test_at": "server"})
    said = federation.offer(shared, [0], 1)
    assert (said.train, said.test) == ((12,), (0,))
    agreement = Agreement(SHAPES, NORTH.classes, {1: said})
    assert len(federation.as_agreed(shared, [0], 1, agreement).of(0)[1]) == 0


def test_the_server_knows_counts_and_classes_alone() -> None:
    agreement = agree({1: NORTH, 2: SOUTH})
    found = Holdings.elsewhere(experiment(), agreement, None)
    assert found.sizes == [12, 6] and found.splits.classes == agreement.classes
    assert len(found.splits.train.labels) == 18 and len(found.splits.test.labels) == 6
    assert set(found.splits.train.labels.tolist()) == {-1}
    with pytest.raises(AssertionError):
        found.splits.train.fetch([0])


def test_the_servers_own_test_set_is_numbered_like_the_rest(tmp_path: Path) -> None:
    _, (_, south) = make_sites(tmp_path)
    tests = experiment(data={"root": str(tmp_path / "south-{rank}.csv"), "test_at": "server"})
    south.rename(south.parent.parent / "south-0.csv")
    for picture in south.parent.glob("*.png"):
        picture.rename(south.parent.parent / picture.name)
    own = federation.servers_data(tests)
    assert own is not None and not len(own.train.labels) and len(own.test.labels) == 2
    agreement = Agreement(SHAPES, ("dodo", "owl", "wren"), {1: NORTH})
    found = Holdings.elsewhere(tests, agreement, own)
    assert set(found.splits.test.labels.tolist()) <= {1, 2}
    assert federation.servers_data(experiment()) is None


@pytest.mark.parametrize("needs", [("train",), ("test",)])
def test_a_host_that_needs_one_split_passes_over_the_other(
    needs: tuple[str, ...], tmp_path: Path
) -> None:
    rows = [[f"text {n}", "ab"[n % 2]] for n in range(10)]
    whole = write_csv(tmp_path / "whole.csv", ["text", "label"], rows)
    other = {"train": "test", "test": "train"}[needs[0]]
    marked = [[*row, other if n < 4 else needs[0]] for n, row in enumerate(rows)]
    marked = write_csv(tmp_path / "marked.csv", ["text", "label", "split"], marked)
    for path, expected in ((whole, 10), (marked, 6)):
        splits = load_data(experiment(data={"root": str(path), "image_size": None}), needs)
        sizes = {"train": len(splits.train.labels), "test": len(splits.test.labels)}
        assert sizes == {needs[0]: expected, other: 0}


# -- each host's own matter --------------------------------------------------------------------


def test_a_worker_takes_the_servers_experiment_with_its_own_hosts_keys() -> None:
    shared = experiment(seed=7, output="there", data={"root": None})
    own = experiment(seed=8, output="here", data={"root": "mine-{rank}.csv"}, device="cuda:1")
    found = at_home(shared, own)
    assert (found.seed, found.output, found.device) == (7, "here", "cuda:1")
    assert federation.here(found, 2).data.root == "mine-2.csv"
    differing = {k for k, v in flatten(found).items() if v != flatten(shared)[k]}
    assert differing == {"output", "data.root", "device"} <= set(HOST_KEYS)
    assert set(HOST_KEYS) <= flatten(shared).keys()


def test_states_lie_below_each_clients_own_run_directory(tmp_path: Path) -> None:
    chosen = toys.experiment(clients=2, output=str(tmp_path / "own"))
    holdings = Holdings.load(chosen)
    link = LocalSplit(build_clients(chosen, range(2), holdings))
    link.run = tmp_path / "server"
    steps = [str(link.run / "checkpoints" / f"step-{n}") for n in (1, 2, 3)]
    files = [link.save(step, lambda: "") for step in steps]
    home = chosen.run_directory
    assert (home / "checkpoints" / "step-1" / "client-0001.pt").is_file()
    link.prune(steps[1:])
    assert sorted(p.name for p in (home / "checkpoints").iterdir()) == ["step-2", "step-3"]
    assert not link.run.exists()
    (home / "checkpoints" / "step-3" / "client-0001.pt").unlink()
    (link.run / "checkpoints" / "step-3").mkdir(parents=True)
    torch.save({}, link.run / "checkpoints" / "step-3" / "server.pt")
    del files[2]["server.pt"]
    said = link.damage(steps[2], files[2])
    assert said is not None and said.startswith("client 1: ")
    assert str(home / "checkpoints" / "step-3" / "client-0001.pt") in said
    link.restore(steps[1], files[1], lambda: None)


def test_a_simulated_run_keeps_every_state_where_the_server_says(tmp_path: Path) -> None:
    method = in_one_process(toys.experiment(output=str(tmp_path / "elsewhere")))
    method.clients.save(str(tmp_path / "here"), lambda: "")
    assert (tmp_path / "here" / "client-0000.pt").is_file()
    method.clients.prune([])
    assert (tmp_path / "here" / "client-0000.pt").is_file()


# -- what cannot work --------------------------------------------------------------------------


def test_one_process_with_all_data_has_no_owners() -> None:
    with pytest.raises(ConfigError, match="own has no meaning for method=centralized"):
        experiment(method="centralized")


def test_data_that_are_built_in_are_nobodys_own() -> None:
    (line,) = refusals_without_data(experiment(data={"name": "digits-qa", "image_size": None}))
    assert "digits-qa is built in, the same everywhere" in line


@pytest.mark.parametrize("classes", [[], ["a"], ["a", "a"], ["a", ""]])
def test_classes_are_at_least_two_and_different(classes: list[str]) -> None:
    with pytest.raises(ConfigError, match="data.classes: name at least two, each once"):
        experiment(data={"classes": classes})


#: Environment of a rank, and keys of data -> how many processes of its host read one file.
SHARING: dict[str, tuple[dict[str, int] | None, dict[str, Any], int]] = {
    "one command": (None, {}, 2),
    "one command, the server tests": (None, {"test_at": "server"}, 3),
    "one command, a file each": (None, {"root": "data-{rank}.csv"}, 0),
    "a host each": ({"LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0}, {}, 0),
    "two workers on a host": ({"LOCAL_WORLD_SIZE": 3, "LOCAL_RANK": 1}, {}, 2),
    "simulated": (None, {"place": "simulated"}, 0),
}


@pytest.mark.parametrize("how", SHARING)
def test_processes_that_would_read_one_file_are_refused(how: str) -> None:
    variables, keys, readers = SHARING[how]
    launched = None
    if variables:
        shown = {"RANK": 1, "WORLD_SIZE": 3, "MASTER_ADDR": "10.8.0.1", "MASTER_PORT": 29400}
        launched = environment.resolve({k: str(v) for k, v in (shown | variables).items()})
    chosen = experiment(data={"root": "data.csv"} | keys)
    if not readers:
        federation.refuse_shared_file(chosen, launched)
        return
    with pytest.raises(ConfigError, match=rf"{readers} processes of this host .*data-\{{rank\}}"):
        federation.refuse_shared_file(chosen, launched)


def test_data_check_looks_at_one_host_as_its_worker_would(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    _, (north, _) = make_sites(tmp_path)
    page = str(write_experiment(tmp_path))
    assert main(["data", "check", page, f"data.root={north}"]) == 0
    assert "a worker here: image, text; 12 samples for 1 clients, 4 for test" in _flat(capsys)
    rows = [["north-1.png", "a", name, "train"] for name in ("owl", "robin")]
    write_csv(north, ["image", "text", "label", "split"], rows)
    assert main(["data", "check", page, f"data.root={north}"]) == 2
    assert main(["data", "check", page, f"data.root={north}", "data.test_at=server"]) == 0
    assert main(["partition", page, f"data.root={north}"]) == 2


def _flat(capsys: pytest.CaptureFixture) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_a_model_is_tested_by_its_own_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    everything, (_, south) = make_sites(tmp_path)
    small = {"encoder": {"size": "custom", "width": 16, "depth": 1, "heads": 2}, "image_patch": 8}
    chosen = experiment(data={"root": str(everything), "place": "simulated"}, model=small)
    splits = load_data(chosen)
    model = deployable.build(chosen, splits)
    with torch.no_grad():  # every answer is "wren", which is the second class of the south alone
        model.server_model.head.bias.copy_(torch.tensor([0.0, 0.0, 1e6]))
    model.save(tmp_path / "model", chosen, splits)
    assert main(["evaluate", str(tmp_path), f"data.root={south}"]) == 0
    own = load_data(replace(chosen, data=replace(chosen.data, root=str(south)))).test.labels
    share = (own == 1).float().mean()
    assert 0 < share < 1 and f"accuracy {share:.4f}" in _flat(capsys)
