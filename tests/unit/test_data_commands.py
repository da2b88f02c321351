"""The commands ``data check``, ``data download`` and ``partition``."""

from __future__ import annotations

import dataclasses
import io
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from media_files import make_coco_qa, make_karpathy, write_csv, write_picture

from mpsl_dist import config
from mpsl_dist.__main__ import main
from mpsl_dist.analysis import partition_view
from mpsl_dist.data import catalog
from mpsl_dist.data.catalog import Archive
from mpsl_dist.errors import UserError
from mpsl_dist.methods import processes

QUICKSTART = str(ROOT / "configs/quickstart.yaml")
PAPER = ROOT / "configs/paper"


def _check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    status = main(["data", "check", *words])
    return status, capsys.readouterr().out


def test_check_says_whether_the_experiment_can_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["clients=2", "training.batch_size=4", "data.partition={kind: iid}"]
    words = [str(PAPER / "coco-qa.yaml"), f"data.root={tmp_path}", *few]
    status, said = _check(capsys, *words)
    assert status == 2 and "no such folder" in said and "cs.toronto.edu" in said
    make_coco_qa(tmp_path)
    status, said = _check(capsys, *words, "--workers", "2")
    assert status == 0 and "train: 12 samples of 78,736" in said and "decoded: 8 files" in said
    assert said.rstrip().endswith("usable")
    pictures = tmp_path / "ms-coco/train2014"
    (pictures / "COCO_train2014_000000000101.jpg").unlink()
    (pictures / "COCO_train2014_000000000103.jpg").write_bytes(b"damaged")
    status, said = _check(capsys, *words)
    assert status == 2 and "missing: 1 files" in said and "damaged: 1 files" in said
    assert "data.on_error=raise ends a run at any of these 2 files" in said
    words.append("data.on_error=skip")
    status, said = _check(capsys, *words, "--limit", "0")
    assert status == 2 and "2 of 12 samples have no file" in said and "data.max_missing" in said
    status, said = _check(capsys, *words, "data.max_missing=0.2", "--limit", "0")
    assert status == 0 and "missing: 1 files" in said and "decoded" not in said


def test_check_of_other_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = _check(capsys, QUICKSTART)
    assert status == 0 and said.startswith("digits-qa is built in: no files to check\n")
    assert "10 clients with 35 to 1,827 samples" in said
    assert "an epoch: 5,768 samples in 91 global batches of 64\n  usable\n" in said
    status, said = _check(capsys, str(PAPER / "t4sa.yaml"), f"data.root={tmp_path}")
    assert status == 2 and "ask for access at t4sa.it" in said
    words = ["data.name=mnist-fsdd", f"data.root={tmp_path}", "data.image_size=32"]
    status, said = _check(capsys, QUICKSTART, *words)
    assert status == 2 and "data.image_size: mnist-fsdd has no use for it" in said
    assert main(["data", "check", QUICKSTART, "data.name=coco"]) == 2
    assert "coco is built in or unknown; read from files are: coco-qa," in capsys.readouterr().err


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server on loopback that has all of MELD, as far as the catalogue knows."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("train_sent_emo.csv", "x" * 3_000_000)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop/meld.zip").write_bytes(content.getvalue())

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = partial(Handler, directory=str(tmp_path / "shop"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/meld.zip"
    archives = (Archive(url, "meld"),)
    facts = dataclasses.replace(catalog.DATASETS["meld"], archives=archives)
    monkeypatch.setitem(catalog.DATASETS, "meld", facts)
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("shop")
def test_download_shows_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "download", str(PAPER / "meld.yaml"), f"data.root={tmp_path / 'data'}"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "meld.zip: 2.9 of 2.9 MiB" in said or "meld.zip: 1.0 of 2.9 MiB" in said
    assert "1 files into" in said and (tmp_path / "data/meld/train_sent_emo.csv").exists()
    assert main(words) == 0 and "meld.zip: there already" in capsys.readouterr().out


def test_download_says_what_must_be_done_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "download", QUICKSTART]) == 0
    assert main(["data", "download", str(PAPER / "t4sa.yaml"), "data.root=null"]) == 2
    assert "data.root: name the folder" in capsys.readouterr().err
    assert main(["data", "download", str(PAPER / "t4sa.yaml")]) == 2
    assert "ask for access at t4sa.it" in capsys.readouterr().err


def _png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_partition_prints_the_table_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["partition", QUICKSTART, "clients=5"]) == 0
    said = capsys.readouterr().out
    assert "rule: dirichlet(0.1) for every class; a client below the minimum of 1" in said
    assert "seed 2024" in said and "5,768 in all" in said and _png(Path("partition-quickstart.png"))
    rows = [line.split() for line in said.splitlines() if line[:1].isdigit()]
    counts = [[int(cell.replace("·", "0")) for cell in row] for row in rows]
    assert [row[0] for row in counts] == [0, 1, 2, 3, 4]
    assert all(sum(row[1:-1]) == row[-1] for row in counts)
    assert sum(row[-1] for row in counts) == 5768
    # The same numbers as a run's own.
    found = partition_view.holdings(config.load(QUICKSTART, ["clients=5"]))
    assert found.counts.tolist() == [row[1:-1] for row in counts]
    assert main(["partition", QUICKSTART, "--out", "x.txt"]) == 2
    assert "must end in .png" in capsys.readouterr().err


def test_partition_of_pictures_and_of_many_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_karpathy(tmp_path, "flickr30k")
    out = tmp_path / "new/drawn.png"
    words = ["clients=3", f"data.root={tmp_path}", "training.batch_size=3", "--out", str(out)]
    assert main(["partition", str(PAPER / "flickr30k.yaml"), *words]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[2].split() == ["client", "pictures", "captions"]
    assert [line.split() for line in said[3:6]] == [
        ["0", "2", "10"],
        ["1", "1", "5"],
        ["2", "1", "5"],
    ]
    assert _png(out)
    make_coco_qa(tmp_path, train=60, answers=20)
    assert main(["partition", str(PAPER / "coco-qa.yaml"), *words]) == 0
    said = capsys.readouterr().out
    assert "largest class" in said and "entropy (bits)" in said and _png(out)


def test_entropy() -> None:
    assert partition_view.entropy(np.array([0, 7, 0])) == 0
    assert partition_view.entropy(np.array([3, 3, 3, 3])) == pytest.approx(2)


@pytest.fixture
def owned(tmp_path: Path) -> str:
    """A manifest with three owners, one of a single sample."""
    rows = []
    for n, owner in enumerate(["c10", "c10", "c9", "c10", "c9", "[x]$^$"]):
        write_picture(tmp_path / f"{n}.png")
        rows.append([f"{n}.png", f"text {n}", "ab"[n % 2], "train", owner])
    rows.append(["0.png", "text", "a", "test", ""])
    write_csv(tmp_path / "manifest.csv", ["image", "text", "label", "split", "client"], rows)
    return f"data.root={tmp_path}"


def test_a_natural_partition(
    owned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data.name=manifest", owned, "data.partition.kind=natural", "data.image_size=8"]
    words += ["--out", str(tmp_path / "p.png"), "data.partition.minimum=3"]
    assert main(["partition", QUICKSTART, *words, "clients=2"]) == 2
    error = "the data names 3 and data.partition.kind=natural takes each; set clients=3"
    assert error in capsys.readouterr().err
    assert main(["partition", QUICKSTART, *words, "clients=3"]) == 0
    said = capsys.readouterr().out
    assert "rule: natural: as the data names its owners" in said
    rows = [line.split() for line in said.splitlines() if line.startswith(("[x]$^$", "c"))]
    assert rows[1:] == [["[x]$^$", "·", "1", "1"], ["c10", "1", "2", "3"], ["c9", "2", "·", "2"]]
    assert main(["partition", QUICKSTART, "data.partition.kind=natural"]) == 2
    assert "natural needs data that names every sample's client" in capsys.readouterr().err


def _own(folder: Path, rows: list[list[str]], *words: str) -> list[str]:
    """Return the words of an experiment on a manifest of texts."""
    write_csv(folder / "manifest.csv", ["text", "label", "split", "client"], rows)
    words = ("data.name=manifest", f"data.root={folder}", "clients=2", *words)
    return [QUICKSTART, *words, "training.batch_size=4", f"output={folder / 'runs'}"]


ROWS = [
    [f"text {n}", "ab"[n % 2], "test" if n > 9 else "train", f"site {n % 3}"] for n in range(12)
]


@pytest.mark.parametrize(
    "words",
    [
        ["data.modalities=[image]"],
        ["data.partition.kind=natural"],
        ["clients=4", "data.partition.minimum=5"],
        ["model.tokenizers={image: {patch: 2}}"],
        ["model.head.kind=no_such_head"],
        ["data.audio_frames=10", "contrastive=global"],
        ["data.root=/no/such/folder"],
        [],
    ],
    ids=" ".join,
)
def test_check_refuses_what_training_refuses_and_in_its_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    given = [*_own(tmp_path, ROWS), *words]
    try:
        processes.checked_data(config.load(given[0], given[1:]))
        refused = []
    except UserError as error:
        refused = str(error).splitlines()
    assert bool(refused) == bool(words)
    status, said = _check(capsys, *given)
    assert status == (2 if refused else 0)
    assert [line for line in refused if f"not usable: {line}" not in said] == []
    assert ("  usable\n" in said) == (not refused)


def test_every_mistake_of_a_manifest_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [["", "a", "train", "x"], ["t", "", "test", "x"], *ROWS]
    status, said = _check(capsys, *_own(tmp_path, rows))
    found = [line.partition("manifest.csv: ")[2] for line in said.splitlines()[1:]]
    assert status == 2
    assert found == ["line 2: neither image, audio, video nor text", "line 3: no label"]


def test_the_share_of_missing_files_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    for share in ("1.5", "-0.1"):
        assert main(["data", "check", QUICKSTART, f"data.max_missing={share}"]) == 2
        assert f"data.max_missing: must be at {'most 1' if share > '1' else 'least 0'}" in (
            capsys.readouterr().err
        )
    status, said = _check(capsys, QUICKSTART, "data.max_missing=0.5")
    assert status == 2 and "data.max_missing: digits-qa has no use for it" in said


def test_a_built_in_set_that_training_refuses_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, said = _check(capsys, QUICKSTART, "clients=50", "data.partition.minimum=200")
    assert status == 2 and "not usable: clients: 50 clients with at least 200 samples" in said


def test_check_says_what_there_is_and_what_a_run_does_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS, ["text 1", "a", "test", ""], ["words " * 20, " a", "train", "site 0"]]
    status, said = _check(capsys, *_own(tmp_path, rows, "data.partition.kind=iid"))
    assert status == 0
    for line in (
        "train: 11 samples",
        "test: 3 samples",
        "text: 10",
        "classes: 3 (train / test samples)",
        "  b: 5 / 1",
        "   a: 1 / 0",
        "note: the labels ' a', 'a' are 2 classes; write them alike if they are one",
        "note: data.text_length=10 cuts 1 of 11 train texts at their end",
        "warning: 1 of 3 classes only in train, as ' a'",
        "warning: leak: 1 texts in both train and test, as 'text 1'",
        "the run: mpsl on text, tested at the server",
        "partition: iid: a shuffled deck dealt evenly; seed 2024; 2 clients with 5 to 6 samples",
        "an epoch: 11 samples in 3 global batches of 4",
    ):
        assert f"  {line}\n" in said, line


def test_a_run_says_what_was_decided_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [[f"text {n}", "ab"[n % 2]] for n in range(20)]
    words = _own(tmp_path, [], "method=centralized", "training.epochs=1", "device=cpu")
    write_csv(tmp_path / "manifest.csv", ["text", "label"], [*rows, ["words " * 80, "a"]])
    assert main(["train", *words, "data.text_length=null", "name=r"]) == 0
    said, log = capsys.readouterr().out, (tmp_path / "runs/r/rank0.log").read_text()
    for line in (
        "no column split: every fifth row of every label is for testing, 4 of 21; rows of one "
        "picture, clip or sound stay together",
        "data.text_length=77 cuts 1 of 17 train texts at their end",
    ):
        assert line in said and line in log
