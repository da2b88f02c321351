"""``mpsl_dist compare RUN_DIR…``: methods beside each other, from what their runs left behind.

Runs that differ only in seed and name are one group; means and deviations are over its runs.
``--out`` writes the same numbers three times: a markdown page, a csv with one line per group, and a
picture.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mpsl_dist.analysis.finished_run import FinishedRun, read, rounds_to
from mpsl_dist.config import from_dict
from mpsl_dist.errors import ConfigError, DataError, RunError

__all__ = [
    "FinishedRun",
    "Group",
    "client_gflop",
    "group",
    "markdown",
    "read",
    "rounds_to",
    "write",
]

_ORDER = ("centralized", "mpsl", "psl", "fedavg", "fedclip", "standalone")


@dataclass(frozen=True)
class Group:
    """Runs of one method on one task; they differ in seed.

    Attributes
    ----------
    label : str
        The method, and the settings that tell the group from others.
    runs : tuple of FinishedRun
        At least one.
    """

    label: str
    runs: tuple[FinishedRun, ...]

    @property
    def dataset(self) -> str:
        """The dataset's name."""
        return self.runs[0].summary["dataset"]

    @property
    def clients(self) -> int:
        """The number of clients, N."""
        return self.runs[0].summary["clients"]

    @cached_property
    def figures(self) -> dict[str, Any]:
        """Every figure of the group by its name, in the csv's order; None where there is none."""
        final = [run.result(run.summary["test"]) for run in self.runs]
        rounds = [run.rounds_to_peak for run in self.runs]
        traffic = [run.summary["communication"] for run in self.runs]
        steps = [run.summary["seconds"]["step_median"] for run in self.runs]
        first = self.runs[0].summary
        return {
            "method": self.label,
            "dataset": self.dataset,
            "clients": self.clients,
            "seeds": len({run.summary["seed"] for run in self.runs}),
            "rounds": first["epochs_completed"],
            "metric": self.runs[0].metric,
            "mean": statistics.fmean(final),
            "std": statistics.stdev(final) if len(final) > 1 else None,
            "rounds_to_95_percent_of_peak": statistics.fmean(rounds),
            "client_parameters": first["trainable_parameters"]["client"],
            "client_gflop_per_input": client_gflop(self.runs[0].config),
            "up_bytes_per_client_per_epoch": _mean(traffic, "up_bytes_per_client_per_epoch"),
            "down_bytes_per_client_per_epoch": _mean(traffic, "down_bytes_per_client_per_epoch"),
            "median_step_seconds": statistics.fmean(steps),
            "seconds": _mean([run.summary["seconds"] for run in self.runs], "total"),
        }


def _mean(values: Sequence[dict[str, float]], key: str) -> float:
    return statistics.fmean(value[key] for value in values)


def client_gflop(config: dict[str, Any]) -> float | None:
    """Return a client's forward GFLOP per sample, without a frozen text tower's.

    Parameters
    ----------
    config : dict
        A resolved experiment.

    Returns
    -------
    float or None
        None where clients compute nothing, or the experiment or its data cannot be had any more.
    """
    from mpsl_dist.analysis.cost import cost_of

    try:
        experiment = from_dict(config)
        cost = cost_of(experiment)
        return cost.value("flops", experiment.method, "client", "total", "forward") / 1e9
    except (ConfigError, DataError, KeyError):
        return None


def group(runs: Sequence[FinishedRun]) -> list[Group]:
    """Return groups of the runs that differ in seed alone, by dataset, clients and method.

    A group is labelled by its method, and by the settings that tell it from most other groups of
    the same method and dataset.
    """
    found: dict[str, list[FinishedRun]] = {}
    for run in runs:
        found.setdefault(json.dumps(run.settings, sort_keys=True, default=str), []).append(run)
    groups = [
        Group(_label(members[0], [others[0] for others in found.values()]), tuple(members))
        for members in found.values()
    ]
    return sorted(groups, key=lambda g: (g.dataset, g.clients, _rank(g), g.label))


def _rank(one: Group) -> int:
    method = one.runs[0].summary["method"]
    return _ORDER.index(method) if method in _ORDER else len(_ORDER)


def _label(run: FinishedRun, all_runs: Sequence[FinishedRun]) -> str:
    def task(of: FinishedRun) -> tuple[Any, ...]:
        return of.summary["method"], of.summary["dataset"], of.summary["clients"]

    rivals = [other.settings for other in all_runs if task(other) == task(run)]
    telling = {}
    for key in sorted(set().union(*rivals)):
        values = [rival.get(key) for rival in rivals]
        alike = values.count(run.settings.get(key))
        # What most of the groups have goes without saying.
        if 2 * alike <= len(values) and key not in run.unread:
            telling[key] = run.settings.get(key)
    settings = ", ".join(f"{key}={_short(value)}" for key, value in telling.items())
    return f"{run.summary['method']} ({settings})" if settings else run.summary["method"]


def _short(value: Any) -> str:
    if value is None:
        return "null"
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def markdown(groups: Sequence[Group]) -> str:
    """Return the markdown page: a method × dataset table, then a table of every other figure."""
    lines = [group_.figures for group_ in groups]
    tasks = list(dict.fromkeys(_task(line) for line in lines))
    methods = list(dict.fromkeys(line["method"] for line in lines))
    found = {(line["method"], _task(line)): line for line in lines}
    head = ["method", *tasks]
    rows = [[m, *[_result(found.get((m, task))) for task in tasks]] for m in methods]
    details = [_detail(line) for line in lines]
    return (
        "Test result in the last round, mean ± standard deviation over seeds.\n\n"
        f"{_table(head, rows)}\n\n{_table(list(details[0]), [list(d.values()) for d in details])}\n"
        f"{_remarks(groups)}"
    )


def _task(line: dict[str, Any]) -> str:
    return f"{line['dataset']}, N={line['clients']}, {line['metric']}"


def _result(line: dict[str, Any] | None) -> str:
    if line is None:
        return ""
    spread = "" if line["std"] is None else f" ± {100 * line['std']:.1f}"
    return f"{100 * line['mean']:.1f}{spread} %"


def _detail(line: dict[str, Any]) -> dict[str, str]:
    gflop = line["client_gflop_per_input"]
    return {
        "dataset": line["dataset"],
        "method": line["method"],
        "N": str(line["clients"]),
        "seeds": str(line["seeds"]),
        "rounds": str(line["rounds"]),
        "rounds to 95 % of peak": f"{line['rounds_to_95_percent_of_peak']:.1f}",
        "client parameters": f"{line['client_parameters']:,}",
        "client GFLOP per input": _giga(gflop),
        "MiB up per client and epoch": f"{line['up_bytes_per_client_per_epoch'] / 2**20:.3f}",
        "MiB down": f"{line['down_bytes_per_client_per_epoch'] / 2**20:.3f}",
        "seconds in all": f"{line['seconds']:.0f}",
    }


def _giga(gflop: float | None) -> str:
    if gflop is None:
        return ""
    return "<0.001" if 0 < gflop < 0.001 else f"{gflop:.3g}"


def _remarks(groups: Sequence[Group]) -> str:
    """Return lines on what makes the comparison unequal, and on baselines without a model."""
    remarks = []
    for dataset in dict.fromkeys(group_.dataset for group_ in groups):
        runs = [run for group_ in groups if group_.dataset == dataset for run in group_.runs]
        rounds = {run.summary["epochs_completed"] for run in runs}
        if len(rounds) > 1:
            remarks.append(f"{dataset}: unequal rounds, {', '.join(map(str, sorted(rounds)))}.")
        names = runs[0].summary["baselines"]
        told = ", ".join(f"{name} {100 * value:.1f} %" for name, value in names.items())
        if told:
            remarks.append(f"{dataset}, without any model: {told}.")
    return "".join(f"\n{remark}\n" for remark in remarks)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write(groups: Sequence[Group], out: Path) -> list[Path]:
    """Write page, csv and picture beside each other, and return their paths.

    Parameters
    ----------
    groups : sequence of Group
        At least one.
    out : Path
        The page; the others have its name with another ending. Folders on the way are created.

    Raises
    ------
    RunError
        If a file cannot be written.
    """
    table, picture = out.with_suffix(".csv"), out.with_suffix(".png")
    lines = [group_.figures for group_ in groups]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(markdown(groups), encoding="utf-8")
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)
        _draw(groups, picture)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"--out: {out} cannot be written: {reason}; choose another") from error
    return [out, table, picture]


def _draw(groups: Sequence[Group], path: Path) -> None:
    """Draw, for every task, the learning curves and the bars of the paper's figure 2."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys((g.dataset, g.clients) for g in groups))
    labels = list(dict.fromkeys(g.label for g in groups))
    colours = {label: f"C{i}" for i, label in enumerate(labels)}
    figure = Figure(figsize=(11, 3.4 * len(tasks) + 0.8), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False, width_ratios=[3, 2])
    for (curves, bars), task in zip(axes, tasks, strict=True):
        here = [g for g in groups if (g.dataset, g.clients) == task]
        for one in here:
            _draw_curve(curves, one, colours[one.label])
        metric = here[0].runs[0].metric
        curves.set(xlabel="round", ylabel=f"test {metric}", title=f"{task[0]}, N={task[1]}")
        curves.set_ylim(0, 1)
        curves.xaxis.get_major_locator().set_params(integer=True)
        curves.grid(axis="y", color="0.9")
        _draw_bars(bars, here, colours)
    handles, names = [], []
    for curves, _ in axes:
        for handle, name in zip(*curves.get_legend_handles_labels(), strict=True):
            if name not in names:
                handles.append(handle)
                names.append(name)
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def _draw_curve(axis: Any, one: Group, colour: str) -> None:
    curves = [[run.result(test) for test in run.tests] for run in one.runs]
    rounds = range(1, min(map(len, curves)) + 1)
    means = [statistics.fmean(c[i - 1] for c in curves) for i in rounds]
    axis.plot(rounds, means, color=colour, label=one.label, marker=".", markersize=4)
    if len(curves) > 1:
        lows = [min(c[i - 1] for c in curves) for i in rounds]
        highs = [max(c[i - 1] for c in curves) for i in rounds]
        axis.fill_between(rounds, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _draw_bars(axis: Any, groups: Sequence[Group], colours: dict[str, str]) -> None:
    for row, one in enumerate(groups):
        figures = one.figures
        rounds = figures["rounds_to_95_percent_of_peak"]
        axis.barh(row, rounds, color=colours[one.label])
        axis.annotate(
            f" {rounds:.1f} (ends at {100 * figures['mean']:.1f} %)", (rounds, row), va="center"
        )
    axis.set(title="rounds to 95 % of peak", yticks=[])
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.invert_yaxis()
    axis.margins(x=0.7)
    axis.spines[["top", "right"]].set_visible(False)
