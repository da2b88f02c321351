"""The sections on clients: who holds what, what each sends, how each fares alone, who was lost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mpsl_dist.analysis import partition_view
from mpsl_dist.analysis.compare import Group
from mpsl_dist.analysis.finished_run import FinishedRun
from mpsl_dist.analysis.partition_view import PartitionTable
from mpsl_dist.analysis.report import pictures
from mpsl_dist.analysis.report.content import (
    Cell,
    Picture,
    Section,
    Table,
    Words,
    chunks,
    count,
    mean_and_spread,
    mib,
    number,
    percent,
)
from mpsl_dist.analysis.report.gather import Gathered, facts, one_of
from mpsl_dist.config import from_dict
from mpsl_dist.errors import UserError
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.records.traffic import KINDS
from mpsl_dist.typed import flatten

#: Partitions that are drawn; the others are said to be left out.
_PARTITIONS = 6
#: Clients that are named; of more it is said how many they are.
_NAMED = 40


def partition(found: Gathered) -> Section:
    """Return who holds what, dealt again as the runs dealt it."""
    section = Section("partition", "Partition: who holds what")
    tasks: dict[str, tuple[FinishedRun, dict[str, Any]]] = {}
    for run in found.runs:
        if (known := facts(run)) and known.one_process:
            continue
        # One of every rule: the seeds of a rule differ, and are as alike as its draws are.
        rule = _dealt_by(run)
        tasks.setdefault(json.dumps(rule, sort_keys=True, default=str), (run, rule))
    rules = [rule for _, rule in tasks.values()]
    for place, (run, rule) in enumerate(list(tasks.values())[:_PARTITIONS], start=1):
        section.parts.extend(_partition_of(f"partition-{place}", run, _told(run, rule, rules)))
    if len(tasks) > _PARTITIONS:
        section.parts.append(Words(f"{len(tasks) - _PARTITIONS} more partitions are not drawn."))
    if not tasks:
        section.parts.append(Words("All runs have their data in one pool."))
    return section


def _dealt_by(run: FinishedRun) -> dict[str, Any]:
    """Return what tells a run's partition from another, seeds apart: key -> value."""
    known = facts(run)
    dealt = {k: v for k, v in run.settings.items() if k == "clients" or k.startswith("data.")}
    return dealt | ({"method": run.summary["method"]} if known and known.unimodal else {})


def _told(run: FinishedRun, rule: dict[str, Any], rules: Sequence[dict[str, Any]]) -> str:
    """Return a partition in words, with what tells it from others of its data and clients."""
    task = ("data.name", "clients")
    rivals = [other for other in rules if all(other.get(k) == rule.get(k) for k in task)]
    differing = [k for k in sorted(rule) if any(other.get(k) != rule[k] for other in rivals)]
    told = [str(run.summary["dataset"]), f"N={run.summary['clients']}"]
    told += [f"{key}={rule[key]}" for key in differing]
    return ", ".join([*told, f"seed {run.summary['seed']}"])


def _partition_of(key: str, run: FinishedRun, told: str) -> Iterator[Any]:
    try:
        held = partition_view.holdings(from_dict(run.config))
    except UserError as error:
        reason = str(error).splitlines()[0]
        yield Words(f"{told}: cannot be dealt again here: {reason}")
        return
    sizes = held.sizes
    samples = flatten(run.summary).get("data.train.samples")
    # Clients of a user have the same. In retrieval a sample is a caption, or a picture with all of
    # its own.
    here = {int(sizes[:: held.each].sum()) + held.public}
    if held.retrieval:
        here.add(int(held.counts[:, 0].sum()))
    if samples is not None and samples not in here:
        yield Words(f"{told}: the data here are others than the run's, and not shown.")
        return
    yield _sizes_of(held, told)
    if held.retrieval:
        values = dict(zip(held.clients, map(float, sizes), strict=True))
        if len(values) <= _NAMED:
            yield Picture(
                key,
                f"Samples by client, {told}",
                f"Samples by client, {told}: {sizes.min()} to {sizes.max()}.",
                pictures.bars(key, values, "samples"),
            )
        return
    what = f"Training samples by client and class, {told}; the larger a dot, the more"
    alt = f"{what}. A client has {sizes.min()} to {sizes.max()} samples. {held.rule}."
    yield Picture(key, what, alt, pictures.grid(key, held.counts, held.clients, held.columns))


def _sizes_of(held: PartitionTable, told: str) -> Table:
    """Return a table of what clients hold, and where any lacks a modality of who has which."""
    sizes = held.sizes
    row = [
        Cell(told),
        Cell(held.rule),
        count(int(sizes[:: held.each].sum())),
        count(int(sizes.min())),
        Cell(f"{np.median(sizes):,g}", float(np.median(sizes))),
        count(int(sizes.max())),
        Cell("–" if held.retrieval else f"{(held.counts > 0).sum(1).mean():.1f}"),
    ]
    head = ["run", "rule", "samples", "least of a client", "median", "most", "classes of a client"]
    remarks = []
    if held.has:
        head.append("modalities of clients")
        row.append(Cell(_modalities(held)))
    if held.each > 1:
        remarks.append(f"A user has {held.each} clients in a row, which hold the same samples.")
    if held.public:
        head.append("public")
        row.append(count(held.public))
        remarks.append("Public samples are no client's own: the server and every client read them.")
    return Table(f"Samples of {told}", head, [row], " ".join(remarks))


def _modalities(held: PartitionTable) -> str:
    """Say who has which: by client where these are few, then how many samples have each."""
    having: dict[str, list[str]] = {}
    for place, client in enumerate(held.clients):
        own = " + ".join(name for name, there in held.has.items() if there[place])
        having.setdefault(own, []).append(client)
    if len(held.clients) <= _NAMED:
        who = "; ".join(f"{own}: {', '.join(some)}" for own, some in having.items())
    else:
        who = "; ".join(f"{own}: {number(len(some), 'client')}" for own, some in having.items())
    if held.each > 1:
        return who
    whole = held.sizes.sum()
    shares = ", ".join(f"{name} {percent(there.sum() / whole)}" for name, there in held.has.items())
    return f"{who} (of all samples: {shares})"


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
    rows, remark = [], ""
    for one in groups:
        known = facts(one.runs[0])
        unaveraged = known is not None and known.alone
        for name in one.runs[0].summary["test"]:
            if not name.endswith("_own_mean"):
                continue
            base = name.removesuffix("_own_mean")
            cells = [Cell(one_of(one)), Cell(base)]
            for key in (base, name, f"{base}_own_min", f"{base}_own_max"):
                values = [run.summary["test"].get(key) for run in one.runs]
                if None in values or (key == base and unaveraged):
                    cells.append(Cell("–"))
                else:
                    mean, spread = mean_and_spread(values)
                    cells.append(Cell(percent(mean, spread), mean))
            rows.append(cells)
            if unaveraged:
                remark = "–: these clients learn alone, and nobody averages their models."
    head = ["method", "metric", "averaged model", "own, mean of clients", "least", "greatest"]
    caption = "Clients' own models beside the averaged one"
    return Table(caption, head, rows, remark) if rows else None


def _when(run: FinishedRun) -> str:
    """Say after which steps the number of lost clients changed."""
    before, told = 0, []
    for line in RunDirectory(run.path).metrics():
        lost = line.get("clients_lost", before)
        if lost != before:
            told.append(f"step {line['step']}: {lost} away")
            before = lost
    return "; ".join(told[:20]) + ("; …" if len(told) > 20 else "")
