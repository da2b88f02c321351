"""The sections that any runs have: the answer in figures, results, curves, the runs themselves."""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from mpsl_dist.analysis.compare import Group
from mpsl_dist.analysis.report import pictures
from mpsl_dist.analysis.report.content import (
    Cell,
    Fold,
    Picture,
    Points,
    Section,
    Table,
    Words,
    chunks,
    count,
    key_of,
    mean_and_spread,
    mib,
    number,
    percent,
    share,
)
from mpsl_dist.analysis.report.gather import (
    Gathered,
    by_task,
    config_text,
    environment,
    environment_text,
    one_of,
)
from mpsl_dist.records.run_directory import RunDirectory

#: What a metric's name has in it, and what is said of it beneath.
_MEANING = {
    "_fused": "accuracy_fused is of all modalities together; accuracy, which methods are compared "
    "by, is the mean over the modalities, each by itself.",
    "server_": "server_… is of the server's model; other accuracies and scores are means over "
    "clients.",
    "product_gap": "product_gap is how far the product of averaged LoRA factors is from the "
    "average of their products.",
}
#: Points of a curve of losses.
_POINTS = 200


def summary(found: Gathered) -> Section:
    """Return what was trained, and the answer in figures."""
    groups, runs = found.groups, found.runs
    parts: list[Any] = []
    if runs:
        methods = ", ".join(dict.fromkeys(str(run.summary["method"]) for run in runs))
        sets = ", ".join(dict.fromkeys(str(run.summary["dataset"]) for run in runs))
        seeds = len({run.summary["seed"] for run in runs})
        hours = sum(run.summary["seconds"]["total"] for run in runs) / 3600
        what = (
            f"{number(len(runs), 'completed run')} in {number(len(groups), 'group')} (the runs of "
            f"a group differ in seed alone; {number(seeds, 'seed')}): {methods} on {sets}; "
            f"{hours:.2f} hours of training in all."
        )
        parts += [Words(what), Points(list(_answers(groups)))]
    if found.costs:
        parts.append(
            Words(f"{number(len(found.costs), 'experiment')} counted by `cost`, not trained.")
        )
    if found.left_out:
        parts.append(
            Words(f"{number(len(found.left_out), 'folder')} left out: see the end.", marked=True)
        )
    return Section("summary", "Summary", parts)


def _answers(groups: Sequence[Group]) -> Iterator[str]:
    """Yield a sentence for every dataset and number of clients: who is best, beside what."""
    pools = [g for g in groups if g.runs[0].summary["method"] == "centralized"]
    for (dataset, clients), here in by_task(groups).items():
        apart = [g for g in here if g not in pools]
        best = max(apart or here, key=lambda g: g.figures["mean"])
        figures = best.figures
        told = (
            f"{dataset}, {f'N={clients}' if apart else 'one pool'}: "
            f"{'best is ' if len(apart) > 1 else ''}{best.label} with "
            f"{percent(figures['mean'], figures['std'])} test {figures['metric']} "
            f"({number(figures['seeds'], 'seed')}, {number(figures['rounds'], 'round')})"
        )
        pool = [g for g in pools if g.dataset == dataset and apart]
        pool = [g for g in pool if g.clients == clients] or pool
        if pool:
            reached = max(pool, key=lambda g: g.figures["mean"]).figures
            told += f"; centralized at best {percent(reached['mean'], reached['std'])}"
        names = best.runs[0].summary["baselines"]
        if names:
            least = ", ".join(f"{name} {percent(value)}" for name, value in names.items())
            told += f"; without any model: {least}"
        yield f"{told}."


def results(found: Gathered) -> Section:
    """Return the methods beside each other."""
    groups = found.groups
    parts: list[Any] = [_matrix(groups)]
    if any(g.runs[0].metric == "mean recall" for g in groups):
        parts.append(_recalls([g for g in groups if g.runs[0].metric == "mean recall"]))
    if further := _further(groups):
        parts.append(further)
    parts.append(_details(groups))
    return Section("results", "Methods beside each other", parts)


def _matrix(groups: Sequence[Group]) -> Table:
    tasks = by_task(groups)
    labels = list(dict.fromkeys(g.label for g in groups))
    rows = []
    for label in labels:
        row = [Cell(label)]
        for here in tasks.values():
            own = next((g for g in here if g.label == label), None)
            best = own is not None and len(here) > 1 and own is _best(here)
            row.append(Cell("–") if own is None else _result(own, best))
        rows.append(row)
    heads = [f"{name}, N={n}, {here[0].runs[0].metric}" for (name, n), here in tasks.items()]
    return Table(
        "Test result in the last round, mean ± standard deviation over seeds; "
        "bold: the best of its column",
        ["method", *heads],
        rows,
        _unequal(tasks),
    )


def _best(groups: Sequence[Group]) -> Group:
    return max(groups, key=lambda g: g.figures["mean"])


def _result(one: Group, best: bool = False) -> Cell:
    figures = one.figures
    return Cell(percent(figures["mean"], figures["std"]), figures["mean"], best=best)


def _unequal(tasks: Any) -> str:
    told = []
    for (name, n), here in tasks.items():
        rounds = sorted({g.figures["rounds"] for g in here})
        if len(rounds) > 1:
            told.append(f"{name}, N={n}: unequal rounds, {', '.join(map(str, rounds))}.")
    return " ".join(told)


def _recalls(groups: Sequence[Group]) -> Table:
    names = [n for n in groups[0].runs[0].summary["test"] if "_own_" not in n]
    rows = []
    for one in groups:
        row = [Cell(one_of(one))]
        for name in names:
            values = [run.summary["test"].get(name) for run in one.runs]
            if None in values:
                row.append(Cell("–"))
                continue
            mean, spread = mean_and_spread(values)
            row.append(Cell(percent(mean, spread), mean))
        rows.append(row)
    heads = [name.replace("_r", " R@").replace("_", " ") for name in names]
    return Table("Recall", ["method", *heads], rows)


def _further(groups: Sequence[Group]) -> Table | None:
    """Return what the tests of methods with several models told besides, metric by metric."""
    rows, remarks = [], {}
    for one in groups:
        first = one.runs[0]
        numbered: dict[str, list[float]] = {}
        for name in first.summary["test"]:
            shown = re.fullmatch(r"\w+_own_\w+|\w+_r\d+", name) or name == first.metric
            values = [run.summary["test"].get(name) for run in one.runs]
            if shown or None in values:
                continue
            if own := re.fullmatch(r"(\w+)_\d+", name):
                numbered.setdefault(own[1], []).extend(values)
                continue
            mean, spread = mean_and_spread(values)
            rows.append([Cell(one_of(one)), Cell(name), _figure(name, mean, spread)])
            remarks |= {part: told for part, told in _MEANING.items() if part in name}
        for name, values in numbered.items():
            ends = " to ".join(_figure(name, x).text for x in (min(values), max(values)))
            rows.append([Cell(one_of(one)), Cell(f"{name} of single clients"), Cell(ends)])
    head = ["method", "metric", "test"]
    caption = "Further test results in the last round, mean ± standard deviation over seeds"
    return Table(caption, head, rows, " ".join(remarks.values())) if rows else None


def _figure(name: str, value: float, spread: float | None = None) -> Cell:
    """Return a metric's cell: a share in per cent, any other figure as it is."""
    if any(part in name for part in ("accuracy", "f1", "rouge")):
        return Cell(percent(value, spread), value)
    return Cell(f"{value:.3g}" + ("" if spread is None else f" ± {spread:.2g}"), value)


def _details(groups: Sequence[Group]) -> Table:
    rows = []
    for one in groups:
        f = one.figures
        gflop = f["client_gflop_per_input"]
        rows.append(
            [
                Cell(f"{f['method']} on {f['dataset']}"),
                count(f["clients"]),
                count(f["seeds"]),
                count(f["rounds"]),
                Cell(f"{f['rounds_to_95_percent_of_peak']:.1f}", f["rounds_to_95_percent_of_peak"]),
                count(f["client_parameters"]),
                Cell("–" if gflop is None else f"{gflop:.3g}", gflop),
                mib(f["up_bytes_per_client_per_epoch"]),
                mib(f["down_bytes_per_client_per_epoch"]),
                Cell(f"{f['median_step_seconds']:.3f}", f["median_step_seconds"]),
                Cell(f"{f['seconds']:,.0f}", f["seconds"]),
            ]
        )
    head = [
        "method",
        "N",
        "seeds",
        "rounds",
        "rounds to 95 % of peak",
        "trained at a client",
        "client GFLOP per input",
        "MiB up",
        "MiB down",
        "seconds a step",
        "seconds in all",
    ]
    return Table("What it takes, means over seeds; MiB per client and epoch", head, rows)


def curves(found: Gathered) -> Section:
    """Return learning curves and rounds to 95 % of the peak, for every dataset and N."""
    section = Section("curves", "Learning curves")
    for (dataset, clients), here in by_task(found.groups).items():
        task = f"{dataset}, N={clients}"
        for part, some in enumerate(chunks(here, pictures.LINES), start=1):
            key = key_of(f"curve-{task}-{part}")
            metric = some[0].runs[0].metric
            means = {g.label: _curve(g) for g in some}
            ends = ", ".join(f"{label} {percent(y[-1][1])}" for label, y in means.items())
            what = f"Test {metric} of {task} after every round"
            drawing = pictures.lines(
                key, means, ("round", f"test {metric}"), {g.label: _band(g) for g in some}, True
            )
            section.parts.append(
                Picture(
                    key,
                    f"{what}; bands reach from the least to the greatest of the seeds",
                    f"{what}. In the last round: {ends}.",
                    drawing,
                )
            )
            section.parts.extend(_losses(task, part, some))
        section.parts.append(_peaks(task, here))
    return section


def _results_by_round(one: Group) -> list[tuple[float, ...]]:
    each = [[run.result(test) for test in run.tests] for run in one.runs]
    return list(zip(*each, strict=False))


def _curve(one: Group) -> list[tuple[float, float]]:
    by_round = enumerate(_results_by_round(one), start=1)
    return [(i, statistics.fmean(values)) for i, values in by_round]


def _band(one: Group) -> list[tuple[float, float]]:
    by_round = _results_by_round(one)
    return [(min(values), max(values)) for values in by_round] if len(one.runs) > 1 else []


def _losses(task: str, part: int, groups: Sequence[Group]) -> Iterator[Picture]:
    """Yield the training losses of every group's first run."""
    found = {}
    for one in groups:
        lines = RunDirectory(one.runs[0].path).metrics()
        steps = [(s["step"], s["loss"]) for s in lines if s["split"] == "train"]
        # In rounds, as a step of one method is a whole round of another.
        each = one.figures["rounds"] / max((step for step, _ in steps), default=1)
        steps = [(step * each, loss) for step, loss in steps if isinstance(loss, int | float)]
        if steps:
            found[one.label] = _smooth(steps)
    if found:
        key = key_of(f"loss-{task}-{part}")
        ends = ", ".join(f"{label} {points[-1][1]:.3g}" for label, points in found.items())
        what = f"Global training loss of {task}, the first run of each group, smoothed"
        drawing = pictures.lines(key, found, ("round", "training loss"), whole_x=True)
        yield Picture(key, what, f"{what}. At the end: {ends}.", drawing)


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most so many points, each the mean of as many as it stands for."""
    each = -(-len(points) // _POINTS)
    parts = [points[start : start + each] for start in range(0, len(points), each)]
    return [(part[-1][0], statistics.fmean(loss for _, loss in part)) for part in parts]


def _peaks(task: str, groups: Sequence[Group]) -> Picture:
    key = key_of(f"peak-{task}")
    values = {g.label: g.figures["rounds_to_95_percent_of_peak"] for g in groups}
    notes = {
        g.label: f"{values[g.label]:.1f} (ends at {percent(g.figures['mean'])})" for g in groups
    }
    told = ", ".join(f"{label} {note}" for label, note in notes.items())
    what = f"Rounds to 95 % of the best test result, {task}"
    drawing = pictures.bars(key, values, "rounds", notes)
    return Picture(key, what, f"{what}: {told}.", drawing)


def all_runs(found: Gathered) -> Section:
    """Return every run: its figures, versions, configuration and command."""
    section = Section("runs", "Runs")
    rows = []
    for run in found.runs:
        s = run.summary
        loss = s.get("loss")
        rows.append(
            [
                Cell(run.path.name),
                Cell(s["method"]),
                Cell(s["dataset"]),
                Cell(str(s["seed"])),
                count(s["clients"]),
                count(s["epochs_completed"]),
                count(s.get("steps_completed", 0)),
                share(run.result(s["test"])),
                Cell(run.metric),
                Cell("–" if loss is None else f"{loss:.4g}", loss),
                Cell(f"{s['seconds']['total']:,.1f}", s["seconds"]["total"]),
                Cell(str(environment(run).get("mpsl_dist", "–"))),
                Cell(str(environment(run).get("git_commit") or "–")),
            ]
        )
    head = ["run", "method", "dataset", "seed", "N", "rounds", "steps", "test", "metric", "loss"]
    head += ["seconds", "mpsl_dist", "commit"]
    section.parts.append(Table("Every run, as its summary.json has it", head, rows))
    for run in found.runs:
        command = environment(run).get("command") or []
        shown = shlex.join(map(str, command)) if command else "not recorded"
        section.parts.append(
            Fold(
                f"{run.path.name}: command, versions, configuration",
                [
                    ("command", shown),
                    ("environment.json", environment_text(run)),
                    ("config.yaml", config_text(run)),
                ],
            )
        )
    return section


def left_out(found: Gathered) -> Section:
    """Return folders that are not reported, and why."""
    rows = [[Cell(folder), Cell(why)] for folder, why in found.left_out]
    table = Table("Folders that are not in this report", ["folder", "why"], rows)
    return Section("left-out", "Left out", [table])
