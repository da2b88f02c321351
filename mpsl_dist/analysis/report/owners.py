"""The sections on clients: who holds what, what each sends, how each fares alone, who was lost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mpsl_dist.analysis import partition_view
from mpsl_dist.analysis.compare import Group
from mpsl_dist.analysis.finished_run import FinishedRun
from mpsl_dist.analysis.report import pictures
from mpsl_dist.analysis.report.content import (
    Cell,
    Picture,
    Section,
    Table,
    Words,
    chunks,
    count,
    key_of,
    mean_and_spread,
    mib,
    percent,
)
from mpsl_dist.analysis.report.gather import Gathered, one_of
from mpsl_dist.config import from_dict
from mpsl_dist.config.methods import METHODS
from mpsl_dist.errors import UserError
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.records.traffic import KINDS
from mpsl_dist.typed import flatten

#: Partitions that are drawn; the others are said to be left out.
_PARTITIONS = 6
#: What of the configuration tells a partition from another, seeds apart.
_DEALT_BY = ("clients", "data")


def partition(found: Gathered) -> Section:
    """Return who holds what, dealt again as the runs dealt it."""
    section = Section("partition", "Partition: who holds what")
    tasks: dict[str, FinishedRun] = {}
    for run in found.runs:
        facts = METHODS.get(run.summary["method"])
        if facts and facts.one_process:
            continue
        # One of every rule: the seeds of a rule differ, and are as alike as its draws are.
        rule = {key: run.config.get(key) for key in _DEALT_BY}
        tasks.setdefault(json.dumps(rule, sort_keys=True, default=str), run)
    for run in itertools.islice(tasks.values(), _PARTITIONS):
        section.parts.extend(_partition_of(run))
    if len(tasks) > _PARTITIONS:
        section.parts.append(Words(f"{len(tasks) - _PARTITIONS} more partitions are not drawn."))
    if not tasks:
        section.parts.append(Words("All runs have their data in one pool."))
    return section


def _partition_of(run: FinishedRun) -> Iterator[Any]:
    told = f"{run.summary['dataset']}, N={run.summary['clients']}, seed {run.summary['seed']}"
    try:
        held = partition_view.holdings(from_dict(run.config))
    except UserError as error:
        reason = str(error).splitlines()[0]
        yield Words(f"{told}: cannot be dealt again here: {reason}")
        return
    sizes = held.sizes
    samples = flatten(run.summary).get("data.train.samples")
    # In retrieval a sample is a caption, or a picture with all of its own.
    here = {int(sizes.sum()), *([int(held.counts[:, 0].sum())] if held.retrieval else [])}
    if samples is not None and samples not in here:
        yield Words(f"{told}: the data here are others than the run's, and not shown.")
        return
    rows = [
        [
            Cell(told),
            Cell(held.rule),
            count(int(sizes.sum())),
            count(int(sizes.min())),
            Cell(f"{np.median(sizes):,g}", float(np.median(sizes))),
            count(int(sizes.max())),
            Cell("–" if held.retrieval else f"{(held.counts > 0).sum(1).mean():.1f}"),
        ]
    ]
    head = ["run", "rule", "samples", "least of a client", "median", "most", "classes of a client"]
    yield Table(f"Samples of {told}", head, rows)
    key = key_of(f"partition-{told}")
    if held.retrieval:
        values = dict(zip(held.clients, map(float, sizes), strict=True))
        if len(values) <= 40:
            yield Picture(
                key,
                f"Samples by client, {told}",
                f"{sizes.min()} to {sizes.max()}.",
                pictures.bars(key, values, "samples"),
            )
        return
    what = f"Training samples by client and class, {told}; the larger a dot, the more"
    alt = f"{what}. A client has {sizes.min()} to {sizes.max()} samples. {held.rule}."
    yield Picture(key, what, alt, pictures.grid(key, held.counts, held.clients, held.columns))


def traffic(found: Gathered) -> Section:
    """Return bytes by kind, per client and epoch, and how unequal clients are."""
    section = Section("traffic", "Traffic")
    sending = [(g, _by_kind(g)) for g in found.groups]
    silent = [g.label for g, kinds in sending if not kinds]
    sending = [(g, kinds) for g, kinds in sending if kinds]
    if silent:
        told = ", ".join(dict.fromkeys(silent))
        section.parts.append(Words(f"Nothing is sent by, or known of: {told}."))
    for part, some in enumerate(chunks(sending, 12)):
        rows = {
            f"{g.label}, {g.dataset}, N={g.clients}": {
                f"{kind} ({KINDS[kind][0]})": value / 2**20
                for kind, value in kinds.items()
                if KINDS[kind][1] == "training"
            }
            for g, kinds in some
        }
        key = f"traffic-{part + 1}"
        told = "; ".join(f"{row} {sum(parts.values()):.3f} MiB" for row, parts in rows.items())
        what = "Bytes of training by kind, per client and epoch"
        drawing = pictures.stacked(key, rows, "MiB per client and epoch")
        section.parts.append(Picture(key, what, f"{what}. {told}.", drawing))
    if sending:
        section.parts.append(_kinds(sending))
    return section


def _by_kind(one: Group) -> dict[str, float]:
    """Return a group's mean bytes per client and epoch by kind, those of tests too."""
    found: dict[str, list[float]] = {}
    for run in one.runs:
        sent = run.summary["communication"].get("total_bytes_by_kind") or {}
        per = run.summary["clients"] * run.summary["epochs_completed"]
        for kind, value in sent.items():
            if kind in KINDS and per:
                found.setdefault(kind, []).append(value / per)
    return {kind: sum(values) / len(one.runs) for kind, values in found.items()}


def _kinds(sending: Sequence[tuple[Group, dict[str, float]]]) -> Table:
    found = [kind for kind in KINDS if any(kind in kinds for _, kinds in sending)]
    rows = []
    for one, kinds in sending:
        each = _of_each(one)
        ends = [mib(min(each)), mib(max(each))] if each else [Cell("–"), Cell("–")]
        own = [mib(kinds[kind]) if kind in kinds else Cell("–") for kind in found]
        rows.append([Cell(one_of(one)), *own, *ends])
    heads = [f"{kind.replace('_', ' ')}, {KINDS[kind][0]}" for kind in found]
    return Table(
        "What is sent, by kind: MiB per client and epoch, and all kinds of one client",
        ["method", *heads, "least of a client", "most of a client"],
        rows,
        "Kinds that begin with test are of tests, the others of training.",
    )


def _of_each(one: Group) -> list[float]:
    """Return the bytes per epoch, of all kinds, of every client of every run."""
    found: list[float] = []
    for run in one.runs:
        sent = run.summary["communication"].get("bytes_by_kind_and_client") or {}
        totals = [sum(each) for each in zip(*sent.values(), strict=True)]
        found += [total / run.summary["epochs_completed"] for total in totals]
    return found


def clients(found: Gathered) -> Section:
    """Return clients' own models beside the averaged one, and who was lost and came back."""
    section = Section("clients", "Clients")
    own = _own_models(found.groups)
    if own:
        section.parts.append(own)
    else:
        section.parts.append(
            Words(
                "No run tested its clients with their own tokenizers "
                "(training.evaluate_own=true does)."
            )
        )
    rows = []
    for run in found.runs:
        told = [run.summary.get(k, 0) for k in ("clients_lost", "clients_returned")]
        told.append(run.summary.get("steps_repeated", 0))
        if any(told):
            rows.append([Cell(run.path.name), *map(count, told), Cell(_when(run))])
    if rows:
        head = ["run", "clients lost", "returned", "steps repeated", "when"]
        section.parts.append(Table("Losses and returns of clients", head, rows))
    else:
        section.parts.append(Words("No run lost a client, and no step was repeated."))
    return section


def _own_models(groups: Sequence[Group]) -> Table | None:
    rows = []
    for one in groups:
        for name, _ in one.runs[0].summary["test"].items():
            if not name.endswith("_own_mean"):
                continue
            base = name.removesuffix("_own_mean")
            cells = [Cell(one_of(one)), Cell(base)]
            for key in (base, name, f"{base}_own_min", f"{base}_own_max"):
                values = [run.summary["test"].get(key) for run in one.runs]
                if None in values:
                    cells.append(Cell("–"))
                else:
                    mean, spread = mean_and_spread(values)
                    cells.append(Cell(percent(mean, spread), mean))
            rows.append(cells)
    head = ["method", "metric", "averaged model", "own, mean of clients", "least", "greatest"]
    return Table("Clients' own tokenizers beside their average", head, rows) if rows else None


def _when(run: FinishedRun) -> str:
    """Say after which steps the number of lost clients changed."""
    before, told = 0, []
    for line in RunDirectory(run.path).metrics():
        lost = line.get("clients_lost", before)
        if lost != before:
            told.append(f"step {line['step']}: {lost} away")
            before = lost
    return "; ".join(told[:20]) + ("; …" if len(told) > 20 else "")
