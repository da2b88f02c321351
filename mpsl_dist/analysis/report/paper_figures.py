"""The paper's figures 2 to 6, of runs of ``configs/sweeps/paper``; figure 3 of ``cost.json`` alone.

The paper prints no numbers in them, so none stand beside ours.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mpsl_dist.analysis.finished_run import FinishedRun
from mpsl_dist.analysis.report import embeddings, pictures
from mpsl_dist.analysis.report.content import Picture, Words, key_of, percent
from mpsl_dist.analysis.report.gather import setting

Runs = Sequence[FinishedRun]
_SIZES = ("Ti", "S", "B", "L", "H")


def figures(
    of: Mapping[str, Runs],
    costs: Sequence[Mapping[str, Any]],
    not_comparable: Callable[[FinishedRun], str | None],
) -> Iterator[Picture | Words]:
    """Yield the figures that there are runs of.

    Parameters
    ----------
    of : mapping
        Runs by the table or figure that they were made for.
    costs : sequence of mapping
        What ``cost.json`` files hold.
    not_comparable : callable
        Returns why a run cannot stand beside the paper's.
    """

    def mark(runs: Runs) -> str:
        why = sorted({str(told) for run in runs if (told := not_comparable(run))})
        return f" — {', '.join(why)}, not comparable with the paper's" if why else ""

    rounds = [r for r in of.get("table1", ()) if r.summary["method"] in ("fedavg", "mpsl")]
    if rounds:
        yield _figure2(rounds, mark(rounds))
    yield from _figure3(costs)
    yield from _figure4(of.get("table3", ()), mark)
    for dataset, here in _by_dataset(of.get("table4", ())).items():
        if dataset == "coco-qa" or not_comparable(here[0]):
            yield from _figure5(dataset, here, mark(here))
    if of.get("figure6"):
        yield from _figure6(of["figure6"], mark(of["figure6"]))


def blocks(run: FinishedRun) -> int:
    """Return how many blocks of the encoder were trained."""
    chosen, size = setting(run, "model.encoder.trainable_blocks"), "model.encoder.size"
    if isinstance(chosen, int):
        return chosen
    depth = setting(run, "model.encoder.depth")
    return depth if isinstance(depth, int) else {"L": 24, "H": 32}.get(setting(run, size), 12)


def _by_dataset(runs: Runs) -> dict[str, list[FinishedRun]]:
    found: dict[str, list[FinishedRun]] = {}
    for run in runs:
        found.setdefault(str(run.summary["dataset"]), []).append(run)
    return found


def _figure2(runs: Runs, mark: str) -> Picture:
    found: dict[str, list[FinishedRun]] = {}
    order = ("dataset", "clients", "method")
    for run in sorted(runs, key=lambda r: [r.summary[key] for key in order]):
        s = run.summary
        found.setdefault(f"{s['dataset']}, N={s['clients']}, {s['method']}", []).append(run)
    values = {
        label: statistics.fmean(r.rounds_to_peak for r in own) for label, own in found.items()
    }
    notes = {
        label: f"{values[label]:.1f} (ends at "
        f"{percent(statistics.fmean(r.result(r.summary['test']) for r in own))})"
        for label, own in found.items()
    }
    what = f"Figure 2: rounds to 95 % of peak performance{mark}"
    told = "; ".join(f"{label} {note}" for label, note in notes.items())
    methods = [own[0].summary["method"] for own in found.values()]
    drawing = pictures.bars("figure-2", values, "rounds", notes, methods)
    return Picture("figure-2", what, f"{what}. {told}.", drawing)


def _figure3(costs: Sequence[Mapping[str, Any]]) -> Iterator[Picture]:
    found: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for cost in costs:
        about = cost["about"]
        task = str(about.get("dataset")), int(about.get("clients") or 0)
        found.setdefault(task, {})[str(about.get("encoder"))] = cost
    for (dataset, clients), by_size in found.items():
        sizes = [size for size in _SIZES if size in by_size]
        sizes += [size for size in by_size if size not in sizes]
        series: dict[str, list[tuple[float, float]]] = {}
        for i, size in enumerate(sizes):
            for method, value in _bytes(by_size[size]).items():
                series.setdefault(method, []).append((i, value / 2**20))
        what = f"Figure 3: what a client sends and receives in an epoch, {dataset}, N={clients}"
        told = "; ".join(
            f"{method} {', '.join(f'{sizes[int(x)]} {y:,.1f}' for x, y in points)}"
            for method, points in series.items()
        )
        key, axes = key_of(f"figure-3-{dataset}-{clients}"), ("encoder", "MiB per client and epoch")
        drawing = pictures.lines(key, series, axes, ticks=sizes, logarithmic=True)
        yield Picture(key, what, f"{what}, in MiB: {told}.", drawing)


def _bytes(cost: Mapping[str, Any]) -> dict[str, float]:
    """Return bytes both ways by method, those of ``psl`` apart, which sends what ``mpsl`` does."""
    found: dict[str, float] = {}
    for row in cost["rows"]:
        shown = row["method"] in ("mpsl", "fedavg", "fedclip")
        total = row["section"] == "bytes_per_epoch" and row["part"] == "total"
        if shown and total and row["value"]:
            found[row["method"]] = found.get(row["method"], 0) + row["value"]
    return found


def _figure4(runs: Runs, mark: Callable[[Runs], str]) -> Iterator[Picture | Words]:
    """Yield the embedding spaces of every retrieval dataset's models, one seed of each."""
    retrieval = [run for run in runs if "image_to_text_r1" in run.summary["test"]]
    for dataset, here in _by_dataset(retrieval).items():
        chosen = _embedded(here)
        told, points, lacking = [], {}, []
        for title, run in chosen.items():
            try:
                points[title], explained = embeddings.plane(run.path)
                told.append(f"{title}: two components hold {percent(explained)} of the variance")
            except embeddings.Unavailable as error:
                lacking.append(f"Figure 4, {dataset}, {title}: {error}")
        if points:
            what = f"Figure 4: test pictures and captions after PCA, {dataset}{mark(here)}"
            key = key_of(f"figure-4-{dataset}")
            drawing = pictures.clouds(key, points)
            yield Picture(key, what, f"{what}. {'; '.join(told)}.", drawing)
        for line in lacking:
            yield Words(line)


def _embedded(runs: Runs) -> dict[str, FinishedRun]:
    """Return centralized, and MPSL at the batches of figure 4, or the least and the greatest."""

    def batch(run: FinishedRun) -> int:
        return setting(run, "training.batch_size")

    first: dict[tuple[str, int], FinishedRun] = {}
    for run in sorted(runs, key=lambda r: (r.summary["seed"], batch(r))):
        first.setdefault((run.summary["method"], batch(run)), run)
    sizes = sorted({size for method, size in first if method == "mpsl"})
    shown = [size for size in sizes if size in (50, 200)] or [*sizes[:1], *sizes[1:][-1:]]
    pools = {size: run for (method, size), run in first.items() if method == "centralized"}
    found = {"centralized": pools[max(pools)]} if pools else {}
    return found | {f"MPSL, batch {size}": first["mpsl", size] for size in shown}


def _lines(
    runs: Runs, x_of: Callable[[FinishedRun], float]
) -> dict[str, list[tuple[float, float]]]:
    """Return mean results by x, one line for every number of clients, and one of the pool."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in sorted(runs, key=lambda r: r.summary["clients"]):
        s = run.summary
        label = (
            "centralized" if s["method"] == "centralized" else f"{s['method']}, N={s['clients']}"
        )
        found.setdefault(label, {}).setdefault(x_of(run), []).append(run.result(s["test"]))
    return {
        label: [(x, statistics.fmean(values)) for x, values in sorted(by_x.items())]
        for label, by_x in found.items()
    }


def _told(
    series: Mapping[str, Sequence[tuple[float, float]]], names: Callable[[float], str]
) -> str:
    return "; ".join(
        f"{label} {', '.join(f'{names(x)} {percent(y)}' for x, y in points)}"
        for label, points in series.items()
    )


def _figure5(dataset: str, runs: Runs, mark: str) -> Iterator[Picture]:
    series = _lines(runs, blocks)
    what = f"Figure 5: test result by trained blocks, {dataset}{mark}"
    key, axes = key_of(f"figure-5-{dataset}"), ("trained blocks", f"test {runs[0].metric}")
    drawing = pictures.lines(key, series, axes, whole_x=True)
    yield Picture(key, what, f"{what}. {_told(series, lambda x: f'{x:g}')}.", drawing)


def _figure6(runs: Runs, mark: str) -> Iterator[Picture]:
    def order(run: FinishedRun) -> tuple[int, int]:
        size, width = setting(run, "model.encoder.size"), setting(run, "model.encoder.width")
        return (_SIZES.index(size), 0) if size in _SIZES else (-1, width or 0)

    def name(run: FinishedRun) -> str:
        rank, width = order(run)
        return _SIZES[rank] if rank >= 0 else f"width {width}"

    ticks = list(dict.fromkeys(name(run) for run in sorted(runs, key=order)))
    for dataset, here in _by_dataset(runs).items():
        series = _lines(here, lambda run: ticks.index(name(run)))
        what = f"Figure 6: test result by the encoder's size, {dataset}{mark}"
        key = key_of(f"figure-6-{dataset}")
        drawing = pictures.lines(key, series, ("encoder", f"test {here[0].metric}"), ticks=ticks)
        yield Picture(key, what, f"{what}. {_told(series, lambda x: ticks[int(x)])}.", drawing)
