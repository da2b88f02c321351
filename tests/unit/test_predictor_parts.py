"""A trained model of which a part is asked: a client's own modalities, a sample that lacks some."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import media_files
import pytest
import torch
import toys
from local_fleet import LocalRounds, in_one_process, users_in_one_process
from torch import Tensor

import mpsl_dist
from mpsl_dist.__main__ import main
from mpsl_dist.actors import deployable
from mpsl_dist.actors.deployable import Deployable, UnimodalDeployable
from mpsl_dist.actors.holdings import Holdings, load_data
from mpsl_dist.actors.local_data import TestData
from mpsl_dist.actors.predictor import Predictor
from mpsl_dist.actors.raw import Reader
from mpsl_dist.config import Experiment, to_dict
from mpsl_dist.data import presence
from mpsl_dist.errors import ConfigError, DataError, RunError
from mpsl_dist.methods import loop, standalone
from mpsl_dist.methods.hosting import Setup
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.runtime.process import StopRequest

#: At this seed client 1 has both modalities, 0 and 2 read only, 3 sees only.
MISSING = {"rate": 0.5, "seed": 3}
HELD = [("text",), ("image", "text"), ("text",), ("image",)]
QUESTION = "is it even?"
#: Of devices that write captions of pictures.
WRITES = {
    "method": "mlecs",
    "mlecs": {"answer": "caption"},
    "data": {"name": "toy-captions", "unit": "picture", "public_fraction": 0.3}
    | {"partition": {"kind": "iid"}},
}
#: Of clients whose tokenizers no one else can use.
SECRET = {
    "defences": {"secret_tokenizers": True, "secret": "seed"},
    "model": {"train_tokenizers": False},
    "data": {"name": "toy-viewed", "test_at": "clients"},
}


def experiment(output: Path, missing: dict | None = None, **changes: Any) -> Experiment:
    data = {"name": "toy-viewed", "missing": missing or {}}
    training = {"epochs": 1, "batch_size": 90}
    return toys.experiment(**{"output": str(output), "data": data, "training": training} | changes)


def trained(method: Any) -> SimpleNamespace:
    """A method that has run to its end in this process, and what it left."""
    chosen = method.experiment
    directory = RunDirectory(chosen.run_directory)
    directory.open(to_dict(chosen), resume=False, overwrite=False)
    loop.train(chosen, method.splits, method, directory, StopRequest())
    inputs = method.splits.test.fetch(range(6)).inputs
    return SimpleNamespace(path=directory.path, method=method, inputs=inputs)


@pytest.fixture(scope="module")
def gapped(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Split learning with clients that lack modalities."""
    output = tmp_path_factory.mktemp("gapped")
    return trained(in_one_process(experiment(output, MISSING)))


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """M²FedSA with two users; their classifiers stay their own."""
    chosen = experiment(
        tmp_path_factory.mktemp("users"),
        method="m2fedsa",
        clients_per_worker=2,
        m2fedsa={"within": "never", "frozen": False},
    )
    return trained(users_in_one_process(chosen))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Clients by themselves, some of which lack modalities."""
    chosen = experiment(tmp_path_factory.mktemp("alone"), MISSING, method="standalone")
    holdings = Holdings.load(chosen)
    everybody = standalone.build_clients(chosen, range(chosen.clients), holdings)
    fleet = LocalRounds(everybody).fleet
    return trained(standalone.build(Setup(chosen, holdings, 1, transport=lambda _: fleet)))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return media_files.write_picture(tmp_path_factory.mktemp("pictures") / "a.png")


def things(held: Collection[str], picture: Path) -> dict[str, str]:
    return {name: {"image": str(picture), "text": QUESTION}[name] for name in held}


def words_of(held: Collection[str], picture: Path) -> list[str]:
    given = things(held, picture)
    return [word for name in held for word in (f"--{name}", given[name])]


def only_there(held: Collection[str], samples: int) -> dict[str, Tensor]:
    return {
        name: torch.full((samples,), name in held, dtype=torch.bool) for name in ("image", "text")
    }


def exported(run: Path, client: int, folder: Path) -> Predictor:
    line = ["export", str(run), "--client", str(client), "--to", str(folder / "hub")]
    assert main(line) == 0
    return mpsl_dist.load(folder / "hub")


# -- a client's own part ---------------------------------------------------------------------------


def test_a_clients_own_part_takes_the_modalities_that_it_has(
    gapped: SimpleNamespace, picture: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for client, held in enumerate(HELD):
        model = mpsl_dist.load(gapped.path, client=client)
        assert model.modalities == held
        own = gapped.method.clients.references[client].tokenizers.local_value()
        whole = Deployable(own, gapped.method.server.model, gapped.method.task)
        missing = None if len(held) == 2 else only_there(held, 6)
        inputs = {name: gapped.inputs[name] for name in held}
        with torch.no_grad():
            assert torch.equal(model(gapped.inputs), whole(inputs, missing))
        line = ["predict", str(gapped.path), "--client", str(client)]
        assert main([*line, *words_of(held, picture)]) == 0
        told = capsys.readouterr().out.splitlines()
        one = model.predict(**things(held, picture))
        assert told[0] == f"{one.label} {one.probability:.4f}"
    with pytest.raises(DataError, match="^text: client 3's model takes image, no text; leave it"):
        mpsl_dist.load(gapped.path, client=3).predict(image=picture, text="a")
    own = mpsl_dist.load(gapped.path, client=3).predict(image=picture)
    assert exported(gapped.path, 3, tmp_path).predict(image=picture) == own
    assert "\nFrom image, it tells" in (tmp_path / "hub" / "README.md").read_text()
    loaded, _, _ = deployable.load(tmp_path / "hub")
    with torch.no_grad():
        logits_bk = mpsl_dist.load(gapped.path, client=3)(gapped.inputs)
        assert torch.equal(loaded(gapped.inputs), logits_bk)


def test_a_unimodal_client_predicts_by_its_own_classifier_from_its_modality(
    users: SimpleNamespace, picture: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Client u*M + m is user u's for modality m."""
    method = users.method
    for client in range(4):
        name = ("image", "text")[client % 2]
        model = mpsl_dist.load(users.path, client=client)
        assert model.modalities == (name,)
        own = method.clients.fleet.host.clients[client].tokenizers.local_value()
        whole = UnimodalDeployable(own, method.server.model, method.task)
        with torch.no_grad():
            found = whole.predictions({name: users.inputs[name]})
            assert torch.equal(model(users.inputs), found[name])
        line = ["predict", str(users.path), "--client", str(client)]
        assert main([*line, *words_of([name], picture)]) == 0
        one = model.predict(**things([name], picture))
        assert capsys.readouterr().out.startswith(f"{one.label} {one.probability:.4f}\n")
        assert main([*line, *words_of(["image", "text"], picture)]) == 2
        assert f"client {client}'s model takes {name}, no " in capsys.readouterr().err
    own = mpsl_dist.load(users.path, client=3).predict(text=QUESTION)
    assert own != mpsl_dist.load(users.path, client=1).predict(text=QUESTION)
    assert exported(users.path, 3, tmp_path).predict(text=QUESTION) == own
    loaded, _, _ = deployable.load(tmp_path / "hub")
    assert loaded.test(TestData(method.splits.test), 30).keys() == {"accuracy", "accuracy_text"}


# -- a part of a sample ----------------------------------------------------------------------------


def test_a_modality_alone_is_answered_by_its_own_classifier_and_all_by_the_fusion(
    users: SimpleNamespace, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = mpsl_dist.load(users.path)
    given = {"image": picture, "text": QUESTION}
    logits = model.model.predictions(model.inputs(**given))
    with torch.no_grad():
        assert torch.equal(model(users.inputs), model.model.predictions(users.inputs)["fused"])
    texts, pictures = [QUESTION, None, QUESTION], [picture, picture, None]
    mixed = model.predict(image=pictures, text=texts)
    for one, held in zip(mixed, ["fused", "image", "text"], strict=True):
        kind = ["image", "text"] if held == "fused" else [held]
        wanted = logits[held][0].double().softmax(0).tolist()
        assert [*model.predict(**things(kind, picture)).probabilities.values()] == wanted
        assert [*one.probabilities.values()] == pytest.approx(wanted, abs=1e-6)
        assert main(["predict", str(users.path), *words_of(kind, picture)]) == 0
        whose = "image and text together" if held == "fused" else f"{held} alone"
        assert capsys.readouterr().err == f"from {whose}:\n"
    with pytest.raises(DataError, match="^image: not given, .*\ntext: not given"):
        model.predict()
    with pytest.raises(DataError, match="samples lack different parts"):
        model.inputs(image=pictures, text=texts)


def test_a_fusion_has_no_word_for_some_of_three_modalities() -> None:
    reader = Reader(toys.SHAPES, None, gaps="others")
    reader.check(["audio"])
    reader.check(["image", "audio", "text"])
    reader.check(["image", "audio"], columns=True)
    message = "^text: not given, and the model takes image and audio and text, all together or one"
    with pytest.raises(DataError, match=message):
        reader.check(["image", "audio"])
    with pytest.raises(DataError, match=message):
        reader.check(["video"])


def test_what_is_not_given_is_absent_where_the_model_learned_of_gaps(
    gapped: SimpleNamespace, picture: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = mpsl_dist.load(gapped.path)
    inputs = model.inputs(image=picture)
    assert [*inputs] == ["image"]
    with torch.no_grad():
        logits_bk = model.model(inputs, only_there(["image"], 1))
        assert torch.equal(model(inputs), logits_bk)
        whole_bk = model.model(gapped.inputs)
        assert torch.equal(model(gapped.inputs), whole_bk)
    one = model.predict(image=picture)
    assert [*one.probabilities.values()] == logits_bk[0].double().softmax(0).tolist()
    assert one != model.predict(image=picture, text=QUESTION)
    rows = [[picture, ""], [picture, QUESTION], ["", QUESTION]]
    table = media_files.write_csv(tmp_path / "in.csv", ["image", "text"], rows)
    assert main(["predict", str(gapped.path), "--csv", str(table)]) == 0
    found = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    given = {"image": [picture, picture, None], "text": [None, QUESTION, QUESTION]}
    wanted = model.predict(**given)
    assert [float(row["probability"]) for row in found] == [one.probability for one in wanted]
    assert wanted[0].probability == pytest.approx(one.probability, abs=1e-6)
    assert main(["predict", str(gapped.path)]) == 2


def test_a_manifest_with_empty_cells_makes_a_model_that_answers_without_sound(
    tmp_path: Path,
) -> None:
    files = [media_files.write_picture(tmp_path / f"{n}.png", 60 * n + 30) for n in range(4)]
    sound = media_files.write_sound(tmp_path / "a.wav", 0.3)
    rows = [
        [f.name, "a.wav", "ab"[n % 2], "train" if n < 2 else "test"] for n, f in enumerate(files)
    ]
    models = []
    for kind, cell in (("whole", "a.wav"), ("gaps", "")):
        rows[0][1] = cell
        path = media_files.write_csv(
            tmp_path / f"{kind}.csv", ["image", "audio", "label", "split"], rows
        )
        data = {"name": "manifest", "root": str(path), "image_size": 8, "audio_frames": 32}
        chosen = toys.experiment(data=data)
        splits = load_data(chosen)
        assert (presence(splits.train) is None) == (kind == "whole")
        deployable.build(chosen, splits).save(tmp_path / kind / "model", chosen, splits)
        models.append(mpsl_dist.load(tmp_path / kind))
    whole, gaps = models
    assert whole.predict(image=files[1], audio=sound) == gaps.predict(image=files[1], audio=sound)
    present = {"image": torch.tensor([True]), "audio": torch.tensor([False])}
    with torch.no_grad():
        inputs = gaps.inputs(image=files[1], audio=sound)
        expected = gaps.model(inputs, present)[0].double().softmax(0).tolist()
    assert [*gaps.predict(image=files[1]).probabilities.values()] == expected
    message = "^audio: not given, and the model takes image and audio$"
    with pytest.raises(DataError, match=message):
        whole.predict(image=files[1])
    with pytest.raises(DataError, match=message):
        whole({"image": inputs["image"]})


@pytest.mark.parametrize(
    "missing, changes",
    [
        (MISSING | {"zeros": True}, {}),
        (MISSING, {"method": "standalone"}),  # of each client all samples lack the same
        ({}, {"method": "fedavg"}),
        ({}, {}),
    ],
)
def test_a_model_that_never_met_gaps_asks_for_everything(
    missing: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    chosen = experiment(tmp_path, missing, **changes)
    splits = load_data(chosen)
    deployable.build(chosen, splits).save(tmp_path / "model", chosen, splits)
    with pytest.raises(DataError, match="^image: not given, and the model takes image and text$"):
        mpsl_dist.load(tmp_path).predict(text=QUESTION)


# -- runs that leave no common model ---------------------------------------------------------------


def test_of_clients_by_themselves_one_is_chosen(
    alone: SimpleNamespace,
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    for client, held in enumerate(HELD):
        model = mpsl_dist.load(alone.path, client=client)
        assert model.modalities == held
        given = things(held, picture)
        folder = alone.path / "model" / f"client-{client:04d}"
        assert mpsl_dist.load(folder).predict(**given) == model.predict(**given)
        line = ["predict", str(alone.path), "--client", str(client), *words_of(held, picture)]
        assert main(line) == 0
    assert exported(alone.path, 3, tmp_path).predict(image=picture) == model.predict(image=picture)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "client 3's own model" in card and "The test is of all clients' own models" in card
    line = ["export", str(folder), "--to", str(tmp_path / "again")]
    assert main(line) == 0
    assert (tmp_path / "again" / "README.md").read_text() == card
    capsys.readouterr()
    for line in (
        ["predict", "--text", "a"],
        ["export", "--to", str(tmp_path / "no")],
        ["evaluate"],
    ):
        assert main([line[0], str(alone.path), *line[1:]]) == 2
        said = capsys.readouterr().err
        assert "its clients have each a whole model of their own; name one" in said
        assert str(alone.path / "model" / "client-0000") in said and "--client 0" in said
    with pytest.raises(RunError, match="client=4: .* has no client-0004"):
        mpsl_dist.load(alone.path, client=4)
    with pytest.raises(ConfigError, match="client=1: .*client-0003 is one client's whole model"):
        mpsl_dist.load(folder, client=1)


@pytest.mark.parametrize(
    "status, changes, why",
    [
        ("stopped", {}, "the run must be completed"),
        ("completed", {}, "the run writes it again with --resume"),
        ("completed", SECRET, "its clients keep their own tokenizers"),
        ("completed", WRITES, "what was trained writes captions"),
    ],
)
def test_a_run_without_a_model_says_why(
    status: str, changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    chosen = experiment(tmp_path, **changes)
    directory = RunDirectory(chosen.run_directory)
    directory.open(to_dict(chosen), resume=False, overwrite=False)
    directory.write_json("summary", {"status": status})
    with pytest.raises(RunError, match=f"toy: no model/ there; {why}"):
        mpsl_dist.load(directory.path)


def test_a_model_that_writes_captions_is_no_classifier_and_ranks_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = to_dict(experiment(tmp_path, **WRITES))
    shapes = {"image": [3, 8, 8], "audio": [26, 36]}
    description = {"experiment": told, "shapes": shapes, "classes": [], "view": None}
    (tmp_path / "config.json").write_text(json.dumps(description))
    assert main(["predict", str(tmp_path), "--image", "a.png"]) == 2
    assert "this model writes captions (mlecs.answer: caption)" in capsys.readouterr().err
