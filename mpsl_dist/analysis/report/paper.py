"""The paper's tables and figures, of runs of ``configs/sweeps/paper``.

A run says by its name which table or figure it is of (``table1-coco-qa-n25-mpsl-seed1``). A
published figure stands beside ours only where :func:`not_comparable` finds nothing; other runs have
tables of their own, without any published figure in them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml

from mpsl_dist.analysis.finished_run import FinishedRun
from mpsl_dist.analysis.report.content import (
    Cell,
    Section,
    Table,
    Words,
    mean_and_spread,
    number,
)
from mpsl_dist.analysis.report.gather import Gathered, setting
from mpsl_dist.analysis.report.paper_figures import blocks, figures

_NAME = re.compile(r"(table[1-5]|figure[36])-")
_METHODS = ("fedavg", "fedclip", "mpsl")
_SPOKEN = {"centralized": "Centralized", "fedavg": "FedAvg", "fedclip": "FedCLIP", "mpsl": "MPSL"}
#: Epochs of the released code; the paper names none.
_EPOCHS = 15

Runs = Sequence[FinishedRun]


@lru_cache(maxsize=1)
def published() -> dict[str, Any]:
    """Return the paper's figures, as ``published.yaml`` holds them."""
    file = resources.files("mpsl_dist.analysis.report").joinpath("published.yaml")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def table_of(run: FinishedRun) -> str | None:
    """Return which table or figure a run is of, by its name; None where of none."""
    found = _NAME.match(str(run.summary["name"]))
    return found.group(1) if found else None


def not_comparable(run: FinishedRun) -> str | None:
    """Return why a run cannot stand beside a published figure; None where it can."""
    if re.match(r"(table\d|figure\d)-tiny-", str(run.summary["name"])):
        return "tiny profile"
    if run.summary["dataset"] not in published()["datasets"]:
        return "another dataset than the paper's"
    size = setting(run, "model.encoder.size")
    if size != "B" and table_of(run) != "figure6":
        return f"encoder of size {size}, not ViT-B"
    if setting(run, "weights.encoder") in (None, "random"):
        return "encoder from random weights"
    if run.summary["epochs_completed"] < _EPOCHS:
        return f"{run.summary['epochs_completed']} epochs, not {_EPOCHS}"
    return None


def sections_of(found: Gathered) -> Iterator[Section]:
    """Yield a section of the paper's tables and one of its figures, if there are runs of them."""
    of: dict[str, list[FinishedRun]] = {}
    for run in found.runs:
        of.setdefault(table_of(run) or "", []).append(run)
    parts: list[Any] = []
    for key, build in _TABLES.items():
        theirs = [run for run in of.get(key, ()) if not_comparable(run) is None]
        others = [run for run in of.get(key, ()) if not_comparable(run)]
        if theirs:
            parts.append(build(theirs, published()[key]))
        if others:
            parts += _apart(key, others, build(others, {}))
    if parts:
        yield Section("paper-tables", "The paper's tables", parts)
    drawn = list(figures(of, found.costs, not_comparable))
    if drawn:
        yield Section("paper-figures", "The paper's figures", drawn)


def _apart(key: str, runs: Runs, table: Table) -> list[Any]:
    why = ", ".join(sorted({str(not_comparable(run)) for run in runs}))
    warning = (
        f"Not comparable with the paper's {_spoken(key)}: {why}. The table has its shape; no "
        "published figure stands in it."
    )
    marked = Table(f"{table.caption} — {why}, not comparable", table.head, table.rows, table.remark)
    return [Words(warning, marked=True), marked]


def _spoken(key: str) -> str:
    return f"{key[:-1].capitalize()} {key[-1]}"


def score(run: FinishedRun) -> float:
    """Return accuracy, or image-to-text recall at 1, as a fraction."""
    test = run.summary["test"]
    return test["accuracy"] if "accuracy" in test else test.get("image_to_text_r1", 0.0)


def _with(runs: Runs, **wanted: Any) -> list[FinishedRun]:
    """Return the runs of this dataset, method and number of clients; None is any."""
    return [
        run
        for run in runs
        if all(run.summary[key] == value for key, value in wanted.items() if value is not None)
    ]


def _datasets(runs: Runs, theirs: bool) -> list[str]:
    """Return datasets in the paper's order; names that it does not know come last."""
    there = list(dict.fromkeys(str(run.summary["dataset"]) for run in runs))
    known = [name for name in published()["datasets"] if name in there]
    return known if theirs else [*known, *(name for name in there if name not in known)]


def _heading(dataset: str) -> str:
    return published()["datasets"].get(dataset, dataset)


def _mean(values: Sequence[float], paper: Any = None) -> Cell:
    """Return a cell of fractions in per cent over the paper's figure."""
    below = "" if paper is None else f"paper {_as_printed(paper)}"
    if not values:
        return Cell("–", None, below)
    mean, spread = mean_and_spread(values)
    shown = f"{100 * mean:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")
    return Cell(shown, mean, below)


def _as_printed(paper: Any) -> str:
    if isinstance(paper, list):
        return f"{paper[0]:.1f} ± {paper[1]:.1f}"
    return f"{paper:.1f}"


def _at(values: Mapping[Any, Any], *path: Any) -> Any:
    node: Any = values
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _trained(runs: Runs, method: str, paper: Mapping[str, Any]) -> Cell:
    """Return the millions of parameters that a client trains; centralized, of the whole model."""
    counts = [run.summary["trainable_parameters"] for run in runs]
    values = [c["client"] + (c.get("server", 0) if method == "centralized" else 0) for c in counts]
    theirs = _at(paper, "parameters", method)
    below = "" if theirs is None else f"paper {theirs:g}"
    if not values:
        return Cell("–", None, below)
    mean = sum(values) / len(values)
    return Cell(f"{mean / 1e6:.3g}", mean, below)


def _numbers_of_clients(runs: Runs) -> list[int]:
    return sorted({run.summary["clients"] for run in runs if _is_federated(run)})


def _is_federated(run: FinishedRun) -> bool:
    return run.summary["method"] != "centralized"


def table1(runs: Runs, paper: Mapping[Any, Any]) -> Table:
    """Return methods by number of clients × datasets."""
    sets = _datasets(runs, bool(paper))
    clients = sorted({*_numbers_of_clients(runs), *((25, 100) if paper else ())})
    rows = []
    for n, method in [(None, "centralized"), *((n, m) for n in clients for m in _METHODS)]:
        here = _with(runs, method=method, clients=n)
        theirs = _at(paper, "accuracy", n) if n else _at(paper, "accuracy")
        cells = [
            _mean([score(r) for r in _with(here, dataset=name)], _at(theirs or {}, method, name))
            for name in sets
        ]
        label = _SPOKEN[method] if n is None else f"N={n}, {_SPOKEN[method]}"
        if here or paper:
            rows.append([Cell(label), *cells, _trained(here, method, paper)])
    head = ["method", *map(_heading, sets), "trained parameters (M)"]
    return Table("Table 1: test accuracy in %, mean ± standard deviation over seeds", head, rows)


def table2(runs: Runs, paper: Mapping[Any, Any]) -> Table:
    """Return methods by direction × recalls of both retrieval datasets."""
    sets, rows = _datasets(runs, bool(paper)), []
    ways = {"image_to_text": "Image to text", "text_to_image": "Text to image"}
    for way, spoken in ways.items():
        for method in ("centralized", *_METHODS):
            here = _with(runs, method=method)
            cells = []
            for name in sets:
                tests = [run.summary["test"] for run in _with(here, dataset=name)]
                for at in ("r1", "r10"):
                    values = [t[f"{way}_{at}"] for t in tests if f"{way}_{at}" in t]
                    cells.append(_mean(values, _at(paper, way, method, name, at)))
            if here or paper:
                label = Cell(f"{spoken}, {_SPOKEN[method]}")
                rows.append([label, *cells, _trained(here, method, paper)])
    heads = [f"{_heading(name)} {at}" for name in sets for at in ("R@1", "R@10")]
    clients = ", ".join(f"N={n}" for n in _numbers_of_clients(runs)) or "one pool"
    head = ["method", *heads, "trained parameters (M)"]
    return Table(f"Table 2: retrieval with {clients}, recall in %", head, rows)


def _part(runs: Runs, pools: Runs, paper: Any) -> Cell:
    """Return MPSL's mean as a part of centralized training's."""
    pooled = [score(run) for run in pools]
    if not runs or not pooled or not sum(pooled):
        return _mean([], paper)
    ours = sum(map(score, runs)) / len(runs) / (sum(pooled) / len(pooled))
    return Cell(f"{100 * ours:.1f}", ours, "" if paper is None else f"paper {_as_printed(paper)}")


def table3(runs: Runs, paper: Mapping[Any, Any]) -> Table:
    """Return datasets × global batches, as parts of centralized."""
    sizes = sorted({setting(run, "training.batch_size") for run in runs})
    rows = []
    for name in _datasets(runs, bool(paper)):
        for n in _numbers_of_clients(_with(runs, dataset=name)):
            here = _with(runs, dataset=name)
            cells = []
            for size in sizes:
                of_size = [r for r in here if setting(r, "training.batch_size") == size]
                own = _with(of_size, method="mpsl", clients=n)
                theirs = _at(paper, "part", name, size) if n == _at(paper, "clients") else None
                cells.append(_part(own, _with(of_size, method="centralized"), theirs))
            rows.append([Cell(f"{_heading(name)}, N={n}"), *cells])
    return Table(
        "Table 3: part of centralized in %, by the global batch (accuracy, or image-to-text R@1)",
        ["dataset", *map(str, sizes)],
        rows,
        "Centralized training with batches of the same size counts as 100 %.",
    )


def table4(runs: Runs, paper: Mapping[Any, Any]) -> Table:
    """Return datasets × trained blocks for every number of clients, as parts of centralized."""
    counts = [n for n in sorted({blocks(run) for run in runs}) if not paper or n in (1, 6, 12)]
    clients, pools, rows = _numbers_of_clients(runs), _with(runs, method="centralized"), []
    for name in _datasets(runs, bool(paper)):
        cells = []
        for n, trained in [(n, b) for n in clients for b in counts]:
            here = [r for r in _with(runs, dataset=name) if blocks(r) == trained]
            own, pool = _with(here, method="mpsl", clients=n), _with(here, method="centralized")
            theirs = _at(paper, "part", name, n, trained)
            cells.append(_part(own, pool, theirs) if pools else _mean([score(r) for r in own]))
        rows.append([Cell(_heading(name)), *cells])
    heads = [f"N={n}, {number(b, 'block')}" for n in clients for b in counts]
    if pools:
        what, remark = "part of centralized in %", "Centralized with the same blocks is 100 %."
    else:
        what, remark = "test result itself in %", "No centralized run is here to be the 100 %."
    return Table(f"Table 4: {what}, by trained blocks", ["dataset", *heads], rows, remark)


def table5(runs: Runs, paper: Mapping[Any, Any]) -> Table:
    """Return datasets × early and late fusion, centralized and MPSL."""
    columns = [(m, f) for m in ("centralized", "mpsl") for f in ("early", "late")]
    rows = []
    for name in _datasets(runs, bool(paper)):
        cells = []
        for method, fusion in columns:
            here = _with(runs, dataset=name, method=method)
            own = [score(run) for run in here if setting(run, "model.fusion") == fusion]
            cells.append(_mean(own, _at(paper, "accuracy", name, method, fusion)))
        rows.append([Cell(_heading(name)), *cells])
    head = ["dataset", *(f"{_SPOKEN[method]}, {fusion}" for method, fusion in columns)]
    clients = ", ".join(f"N={n}" for n in _numbers_of_clients(runs)) or "one pool"
    return Table(f"Table 5: early and late fusion, {clients}, test accuracy in %", head, rows)


_TABLES: dict[str, Callable[[Runs, Mapping[Any, Any]], Table]] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "table5": table5,
}
