"""``mpsl_dist report``: the page says what whole runs say, and harms nothing."""

from __future__ import annotations

import html.parser
import itertools
import json
import re
from pathlib import Path
from typing import Any

import finished_runs
import pytest
import yaml
from test_compare import write_run

from mpsl_dist.__main__ import main
from mpsl_dist.analysis import compare
from mpsl_dist.analysis.report import paper, pictures
from mpsl_dist.analysis.report.gather import gather
from mpsl_dist.records.run_directory import RunDirectory

CURVE = [0.3, 0.51234567]


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: elements, and tables by their captions."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self._rows: list[list[list[Any]]] = []
        self._in: list[str] = []
        self._caption = self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._in.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append(["", None])
        elif tag == "data":
            self._rows[-1][-1][1] = dict(attributes)["value"]

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.tables[self._caption] = [[tuple(cell) for cell in row] for row in self._rows]
        while self._in and self._in.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text += "" if "style" in self._in else data
        if "caption" in self._in:
            self._caption += data
        elif ("td" in self._in or "th" in self._in) and self._rows:
            self._rows[-1][-1][0] += data

    def table(self, beginning: str) -> dict[str, dict[str, tuple[str, float | None]]]:
        """Row -> column -> the text, and the figure behind it."""
        (rows,) = [rows for caption, rows in self.tables.items() if caption.startswith(beginning)]
        head = [text for text, _ in rows[0]]
        return {
            row[0][0]: {
                name: (text, None if value is None else float(value))
                for name, (text, value) in zip(head, row, strict=True)
            }
            for row in rows[1:]
        }


def write_whole(folder: Path, name: str, curve: list[float] = CURVE, **changes: Any) -> Path:
    """A run with what a real one records besides: bytes by kind, losses, its environment."""
    path = write_run(folder, name, curve, **changes)
    sent = {"activations": [2**20, 3 * 2**20, 2**20, 2**20], "predictions": [2**19] * 4}
    added = {
        "steps_completed": len(curve),
        "loss": 0.7654321,
        "clients_lost": 0,
        "clients_returned": 0,
        "steps_repeated": 0,
    }
    summary = json.loads((path / "summary.json").read_text()) | added
    summary["communication"] |= {
        "bytes_by_kind_and_client": sent,
        "total_bytes_by_kind": {kind: sum(each) for kind, each in sent.items()},
    }
    (path / "summary.json").write_text(json.dumps(summary))
    command = ["mpsl_dist", "train", "a b.yaml"]
    told = {"mpsl_dist": "9.8.7", "git_commit": "abc1234", "command": command}
    (path / "environment.json").write_text(json.dumps(told))
    return path


def change(path: Path, **changes: Any) -> None:
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | changes))


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    """Two seeds of MPSL, a run of FedAvg that lost a client, and folders that are not whole."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_whole(folder, "a1", seed=1, training={"evaluate_own": True}),
        write_whole(folder, "a2", [0.4, 0.6], seed=2, training={"evaluate_own": True}),
        write_whole(folder, "<script>alert(1)<b>|*b*", [0.25, 0.45], method="fedavg"),
    ]
    for path, own in zip(runs[:2], (0.8, 0.9), strict=True):
        last = json.loads((path / "summary.json").read_text())["test"]
        ends = {"accuracy_own_mean": own, "accuracy_own_min": 0.7, "accuracy_own_max": 1.0}
        change(path, test=last | ends)
    change(runs[2], clients_lost=1, clients_returned=2, steps_repeated=3)
    lines = (runs[2] / "metrics.jsonl").read_text().splitlines()
    lost = json.dumps(json.loads(lines[2]) | {"clients_lost": 1})
    (runs[2] / "metrics.jsonl").write_text("\n".join([*lines[:2], lost, *lines[3:]]) + "\n")
    stopped = write_run(folder, "stopped", [0.5], status="stopped")
    failed = write_run(folder, "failed", [0.5], status="failed")
    change(failed, reason="the disk is full")
    damaged = write_run(folder, "damaged", [0.5])
    (damaged / "metrics.jsonl").write_text("{\n{\n")
    out = folder / "out"
    everything = [*runs, stopped, failed, damaged, folder / "absent", runs[0]]
    assert main(["report", *map(str, everything), "--out", str(out)]) == 0
    return runs, out


def test_every_runs_figures_are_those_of_its_summary(reported: tuple[list[Path], Path]) -> None:
    runs, out = reported
    table = Page(out / "report.html").table("Every run")
    assert list(table) == [run.name for run in runs]
    for run in runs:
        summary, row = RunDirectory(run).summary(), table[run.name]
        assert row["test"] == (
            f"{100 * summary['test']['accuracy']:.1f} %",
            summary["test"]["accuracy"],
        )
        assert row["seconds"][1] == summary["seconds"]["total"]
        assert row["loss"][1] == summary["loss"]
        assert row["steps"][1] == summary["steps_completed"]
        assert (row["seed"][0], row["mpsl_dist"][0]) == (str(summary["seed"]), "9.8.7")


def test_the_markdown_has_the_same_figures(reported: tuple[list[Path], Path]) -> None:
    _runs, out = reported
    page, written = Page(out / "report.html"), (out / "report.md").read_text("utf-8")
    for caption, rows in page.tables.items():
        _, _, rest = written.partition(f"*{caption}")
        lines = [line for line in rest.splitlines()[2:] if line.startswith("| ")][: len(rows)]
        found = [
            [cell.strip(" *") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines
        ]
        del found[1]  # the line beneath the head
        wanted = [[text for text, _ in row] for row in rows[: len(found)]]
        assert [row[1:] for row in found[1:]] == [row[1:] for row in wanted[1:]], caption


def test_groups_have_means_and_deviations_over_seeds(reported: tuple[list[Path], Path]) -> None:
    page = Page(reported[1] / "report.html")
    row = page.table("Test result")["mpsl"]["toy-image+text, N=4, accuracy"]
    assert row == ("55.6 ± 6.2 %", pytest.approx((CURVE[1] + 0.6) / 2))
    assert "mpsl with 55.6 ± 6.2 % test accuracy (2 seeds, 2 rounds)" in page.text
    assert "without any model: image_only 25.0 %" in page.text


def test_traffic_is_by_kind_client_and_epoch(reported: tuple[list[Path], Path]) -> None:
    _runs, out = reported
    row = Page(out / "report.html").table("What is sent")["mpsl on toy-image+text, N=4"]
    # 6 MiB of 4 clients in 2 epochs, and half a MiB of each besides; one client has 3 of the 6.
    assert row["activations, up"] == ("0.750", 0.75 * 2**20)
    assert row["predictions, down"] == ("0.250", 0.25 * 2**20)
    assert row["least of a client"][1] == 0.75 * 2**20
    assert row["most of a client"][1] == 1.75 * 2**20


def test_clients_own_models_losses_and_returns_are_told(reported: tuple[list[Path], Path]) -> None:
    _runs, out = reported
    page = Page(out / "report.html")
    own = page.table("Clients' own")["mpsl on toy-image+text, N=4"]
    assert own["averaged model"][1] == pytest.approx((CURVE[1] + 0.6) / 2)
    assert own["own, mean of clients"][0] == "85.0 ± 7.1 %"
    (lost,) = page.table("Losses").values()
    assert [lost[key][1] for key in ("clients lost", "returned", "steps repeated")] == [1, 2, 3]
    assert lost["when"][0] == "step 2: 1 away"


def test_folders_that_are_not_whole_are_named_with_the_reason(
    reported: tuple[list[Path], Path],
) -> None:
    page = Page(reported[1] / "report.html")
    told = {Path(folder).name: row["why"][0] for folder, row in page.table("Folders").items()}
    assert told["stopped"] == "the run is stopped, not completed"
    assert told["failed"] == "the run is failed, not completed: the disk is full"
    assert "metrics.jsonl: line 1" in told["damaged"] and "no summary.json" in told["absent"]
    assert "4 folders left out" in page.text


def test_what_users_write_is_escaped(reported: tuple[list[Path], Path]) -> None:
    runs, out = reported
    page = Page(out / "report.html")
    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert runs[2].name in page.text
    assert "<script" not in (out / "report.md").read_text("utf-8")
    for drawing in (out / "pictures").iterdir():
        assert "<script" not in drawing.read_text("utf-8")


def test_the_page_needs_nothing_from_elsewhere(reported: tuple[list[Path], Path]) -> None:
    page = Page(reported[1] / "report.html")
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "embed"), tag
        for key in ("src", "srcset", "href", "data", "style"):
            address = attributes.get(key) or ""
            assert address.startswith(("data:", "#")) or not address, (tag, address)
    text = (reported[1] / "report.html").read_text("utf-8")
    assert "url(" not in text and "@import" not in text and "http" not in text


def test_the_page_can_be_read_without_sight_or_mouse(reported: tuple[list[Path], Path]) -> None:
    page = Page(reported[1] / "report.html")
    tags = [tag for tag, _ in page.elements]
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert tags.count("table") == tags.count("caption") == len(page.tables) > 0
    assert all("scope" in attributes for tag, attributes in page.elements if tag == "th")
    assert all(len(a["alt"] or "") > 20 for tag, a in page.elements if tag == "img")
    ids = [a["id"] for _, a in page.elements if "id" in a]
    links = [a["href"] for tag, a in page.elements if tag == "a"]
    assert len(set(ids)) == len(ids) and {link[1:] for link in links} <= set(ids)
    boxes = [a for tag, a in page.elements if a.get("class") == "box"]
    assert boxes and all(a["tabindex"] == "0" and a["aria-label"] for a in boxes)


def test_colours_can_be_told_from_either_background() -> None:
    for background, ink in ((pictures.LIGHT, pictures.INK), (pictures.DARK, pictures.CHALK)):
        assert pictures.contrast(background, ink) > 7
        for colour in pictures.COLOURS:
            assert pictures.contrast(background, colour) >= 3, (background, colour)
    assert pictures.contrast("#ffffff", "#000000") == pytest.approx(21)


def test_partition_is_dealt_again(reported: tuple[list[Path], Path]) -> None:
    (row,) = Page(reported[1] / "report.html").table("Samples of toy").values()
    assert row["samples"][1] == 90 and row["least of a client"][1] >= 3


def test_a_folder_is_never_overwritten_unasked(tmp_path: Path, capsys: Any) -> None:
    run, out = write_run(tmp_path, "r", [0.5]), tmp_path / "out"
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert "Report of r" in Page(out / "report.html").text
    (out / "report.html").write_text("mine")
    assert main(["report", str(run), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "report.html").read_text() == "mine"
    (out / "pictures" / "old.svg").touch()
    assert main(["report", str(run), "--out", str(out), "--overwrite"]) == 0
    assert "Report of r" in (out / "report.html").read_text("utf-8")
    assert not (out / "pictures" / "old.svg").exists()
    # A run, or anybody's folder, is no report.
    assert main(["report", str(run), "--out", str(run), "--overwrite"]) == 2
    assert (
        "other things than a report" in capsys.readouterr().err and (run / "config.yaml").exists()
    )


def test_without_a_whole_run_nothing_is_written(tmp_path: Path, capsys: Any) -> None:
    stopped = write_run(tmp_path, "stopped", [0.5], status="stopped")
    assert main(["report", str(stopped), "--out", str(tmp_path / "out")]) == 2
    assert "stopped: the run is stopped" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def of_paper(folder: Path, name: str, result: float, **summary: Any) -> Path:
    """A run that says it is of the paper's sweeps: ViT-B, pretrained, 15 epochs."""
    path = write_run(folder, name, [result], seed=summary.pop("seed", 1))
    values = yaml.safe_load((path / "config.yaml").read_text())
    values["model"]["encoder"] = {"size": summary.pop("size", "B"), "trainable_blocks": 6}
    values["weights"]["encoder"] = summary.pop("weights", "meta-transformer")
    values["training"]["batch_size"] = summary.pop("batch_size", 100)
    values["clients"] = summary.get("clients", 25)
    (path / "config.yaml").write_text(yaml.safe_dump(values))
    about = {"dataset": "coco-qa", "clients": 25, "epochs_completed": 15, "method": "mpsl"}
    change(path, **(about | summary))
    return path


def paper_tables(paths: list[Path]) -> list[Any]:
    found = list(paper.sections_of(gather(paths)))
    return [part for section in found for part in section.parts if hasattr(part, "rows")]


def test_ours_stands_beside_the_papers_figure(tmp_path: Path) -> None:
    runs = [
        of_paper(tmp_path, f"table1-coco-qa-n25-mpsl-seed{s}", r, seed=s)
        for s, r in ((1, 0.5), (2, 0.6))
    ]
    (table,) = paper_tables(runs)
    cells = {row[0].text: row[table.head.index("COCO-QA")] for row in table.rows}
    assert cells["N=25, MPSL"].text == "55.0 ± 7.1"
    assert cells["N=25, MPSL"].below == "paper 53.3 ± 0.4"
    assert (cells["N=100, FedAvg"].text, cells["N=100, FedAvg"].below) == ("–", "paper 53.5 ± 0.2")


def test_a_part_of_centralized_is_of_the_same_batch(tmp_path: Path) -> None:
    runs = [
        of_paper(tmp_path, "table3-coco-qa-mpsl-batch_size100-seed1", 0.3),
        of_paper(
            tmp_path, "table3-coco-qa-centralized-batch_size100-seed1", 0.4, method="centralized"
        ),
        of_paper(
            tmp_path,
            "table3-coco-qa-centralized-batch_size50-seed1",
            0.6,
            method="centralized",
            batch_size=50,
        ),
    ]
    (table,) = paper_tables(runs)
    (row,) = table.rows
    assert (row[2].text, row[2].below) == ("75.0", "paper 73.6")
    assert row[1].text == "–" and row[1].below == "paper 69.4"


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"called": "table1-tiny-coco-qa-n25-mpsl-seed1"}, "tiny profile"),
        ({"dataset": "digits-qa"}, "another dataset"),
        ({"size": "S"}, "not ViT-B"),
        ({"weights": "random"}, "random weights"),
        ({"epochs_completed": 2}, "2 epochs"),
    ],
)
def test_no_small_run_stands_beside_a_published_figure(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    name = changes.pop("called", "table1-coco-qa-n25-mpsl-seed1")
    (table,) = paper_tables([of_paper(tmp_path, name, 0.5, **changes)])
    assert why in table.caption and "not comparable" in table.caption
    assert not [cell for row in table.rows for cell in row if "paper" in cell.below]


def test_published_figures_are_the_papers() -> None:
    found = paper.published()
    assert found["table1"]["accuracy"][100]["fedclip"]["ucf101"] == [56.4, 1.2]
    assert found["table2"]["text_to_image"]["mpsl"]["flickr30k"]["r10"] == [65.5, 1.1]
    assert found["table3"]["part"]["ucf101"][300] == 100.0
    assert found["table4"]["part"]["ms-coco"][25][12] == 68.5
    assert found["table5"]["accuracy"]["kinetics-sounds"]["mpsl"]["late"] == 66.2


def test_the_papers_figures_say_their_points_in_words(tmp_path: Path) -> None:
    runs = [
        of_paper(tmp_path, "table1-coco-qa-n25-mpsl-seed1", 0.5),
        of_paper(tmp_path, "table4-coco-qa-n25-trainable_blocks6-seed1", 0.4),
        of_paper(tmp_path, "figure6-vit-s-n25-seed1", 0.3, size="S"),
        of_paper(tmp_path, "table3-flickr30k-mpsl-batch_size50-seed1", 0.2, dataset="flickr30k"),
    ]
    recalls = {f"{way}_r{k}": 0.2 for way in ("image_to_text", "text_to_image") for k in (1, 10)}
    change(runs[3], test=recalls)
    counted = tmp_path / "figure3-coco-qa-S-clients100"
    counted.mkdir()
    row = {"section": "bytes_per_epoch", "owner": "client", "part": "total", "method": "mpsl"}
    rows = [row | {"quantity": way, "value": 2**20, "unit": "bytes"} for way in ("up", "down")]
    about = {"dataset": "coco-qa", "clients": 100, "encoder": "S"}
    (counted / "cost.json").write_text(json.dumps({"about": about, "rows": rows}))
    (drawn,) = [s for s in paper.sections_of(gather([*runs, counted])) if s.key == "paper-figures"]
    told = {getattr(part, "alt", None) or part.text for part in drawn.parts}
    for wanted in (
        "Figure 2: .* coco-qa, N=25, mpsl 1.0 \\(ends at 50.0 %\\)",
        "Figure 3: .* coco-qa, N=100, in MiB: mpsl S 2.0",
        "Figure 4, flickr30k, MPSL, batch 100: .*no model/ there",
        "Figure 5: .* mpsl, N=25 6 40.0 %",
        "Figure 6: .* mpsl, N=25 S 30.0 %",
    ):
        assert any(re.search(wanted, text) for text in told), (wanted, told)


# -- runs of several methods -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of five methods on one task, their data dealt in five ways."""
    folder = tmp_path_factory.mktemp("several")
    uneven, even = ({"partition": {"alpha": alpha, "minimum": 3}} for alpha in (0.1, 1000.0))
    gaps = uneven | {"missing": {"rate": 0.5, "seed": 3}}
    ways = [("mpsl", uneven), ("mpsl", even), ("fedavg", uneven), ("standalone", uneven)]
    ways += [("mpsl", gaps), ("m2fedsa", uneven), ("mlecs", uneven)]
    runs = [
        finished_runs.write(
            folder, finished_runs.experiment(method, f"{place}-{method}", data=data)
        )
        for place, (method, data) in enumerate(ways)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "client_gflop", lambda config: None)  # slow, and not looked at
        assert main(["report", *map(str, runs), "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_every_partition_has_a_title_and_a_picture_of_its_own(several: Path) -> None:
    page, written = Page(several / "report.html"), (several / "report.md").read_text("utf-8")
    titles = [caption for caption in page.tables if caption.startswith("Samples of")]
    for telling in ("alpha=0.1,", "alpha=1000.0,", "rate=0.5,", "=m2fedsa,", "fraction=0.3,"):
        assert any(telling in title for title in titles), telling
    drawn = re.findall(r"\(pictures/(partition-.*?\.svg)\)", written)
    assert len(set(drawn)) == len(drawn) == len(titles) == 5
    shapes = {
        re.sub(r"partition-\d", "", (several / "pictures" / name).read_text()) for name in drawn[:2]
    }
    assert len(shapes) == 2


def test_samples_of_users_with_several_clients_and_public_ones_are_the_runs(several: Path) -> None:
    page = Page(several / "report.html")
    assert "the data here are others than the run's" not in page.text
    found = {
        caption: dict(zip(*([text for text, _ in row] for row in rows), strict=True))
        for caption, rows in page.tables.items()
        if caption.startswith("Samples of")
    }
    (users,) = [row for caption, row in found.items() if "m2fedsa" in caption]
    assert users["samples"] == "90" and users["modalities of clients"] == "image: 0, 2; audio: 1, 3"
    (public,) = [row for caption, row in found.items() if "fraction=0.3" in caption]
    assert (public["samples"], public["public"]) == ("63", "27")
    (gaps,) = [row for caption, row in found.items() if "rate=0.5" in caption]
    assert re.match("audio: 0, 2; image \\+ audio: 1; image: 3 ", gaps["modalities of clients"])
    whole = [row for row in found.values() if "modalities of clients" not in row]
    assert len(whole) == 3


def test_further_metrics_of_a_test_are_told_by_name(several: Path) -> None:
    (rows,) = [
        rows
        for caption, rows in Page(several / "report.html").tables.items()
        if caption.startswith("Further test results")
    ]
    told = {(row[0][0].split()[0], row[1][0]): row[2][0] for row in rows[1:]}
    assert told == {
        ("m2fedsa", "accuracy_image"): "60.0 %",
        ("m2fedsa", "accuracy_audio"): "40.0 %",
        ("m2fedsa", "accuracy_fused"): "75.0 %",
        ("mlecs", "f1"): "40.0 %",
        ("mlecs", "server_accuracy"): "70.0 %",
        ("mlecs", "server_f1"): "65.0 %",
        ("mlecs", "product_gap"): "0.0125",
        ("mlecs", "accuracy of single clients"): "20.0 % to 80.0 %",
    }


def test_nobody_averages_the_models_of_clients_that_learn_alone(several: Path) -> None:
    page = Page(several / "report.html")
    (alone,) = page.table("Clients' own models").values()
    assert alone["averaged model"] == ("–", None)
    assert alone["own, mean of clients"] == ("35.0 %", 0.35)
    assert "nobody averages their models" in page.text
