"""What an audit found, for people: tables on the terminal, ``audit.json`` and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mpsl_dist import config
from mpsl_dist.actors.choices import dtype_of, width_of, wire_of
from mpsl_dist.analysis import compare
from mpsl_dist.analysis.audit.figures import METRICS, Audit, Figure, Gallery
from mpsl_dist.analysis.audit.scores import CEILING_DB
from mpsl_dist.errors import RunError

#: Checkpoints in a table, the last ones.
_STEPS = 3
#: Metrics of a sweep's columns.
_COLUMNS = ("psnr", "labels", "words", "reidentified", "membership")


def free_folder(out: str | None, audits: Sequence[str], overwrite: bool) -> Path:
    """Return the folder to write to; by default ``audit-NAME``, or ``audit-sweep`` of several.

    Parameters
    ----------
    audits : sequence of str
        Names of what will be audited.

    Raises
    ------
    RunError
        If an audit lies there already, or the folder cannot be made.
    """
    folder = Path(out or f"audit-{audits[0] if len(audits) == 1 else 'sweep'}")
    if (folder / "audit.json").exists() and not overwrite:
        raise RunError(f"--out: {folder} holds an audit; choose another, or add --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out: {folder}: {error.strerror or error}; choose another") from error
    return folder


# -- on the terminal ---------------------------------------------------------------------------


def show(audit: Audit, console: Console) -> None:
    """Print the figures of an audit, the strongest of a metric at the end bold."""
    console.print(
        f"{audit.name}: {audit.samples} test samples attacked; the attacker has {audit.public} "
        "others, which share no picture and no sound with them",
        highlight=False,
    )
    for e in (e for e in audit.equations if e.step in (*audit.steps[:1], *audit.steps[-1:])):
        size = f"d={e.width}, P={e.pixels}, stride {e.stride}{', pre-norm' if e.pre_norm else ''}"
        says = "exact" if e.deficit == 0 else f"{e.deficit} unknowns too many"
        words = f"step {e.step}, {e.of}: {size}: {says}, condition {e.condition:.3g}"
        console.print(words, highlight=False)
    if audit.figures:
        console.print(_table(audit))
    else:
        console.print(f"{audit.name}: no attack gave a figure", highlight=False)
    for note in audit.notes:
        console.print(f"note: {note}", highlight=False)


def _table(audit: Audit) -> Table:
    """Lay out a line for every attack and knowledge, metric by metric, a column for every step."""
    steps = audit.steps[:1] + audit.steps[1:][-_STEPS:]
    title = f"{audit.name}: found ± standard error"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("attack", "knowledge", "of"):
        table.add_column(head)
    for head in ("floor", *(f"step {step}" for step in steps)):
        table.add_column(head, justify="right", no_wrap=True)
    best = [audit.strongest(metric, steps[-1]) for metric in METRICS]
    for metric in METRICS:
        lines: dict[tuple[str, str, str], dict[int, Figure]] = {}
        for f in (f for f in audit.figures if f.metric == metric):
            lines.setdefault((f.attack, f.knowledge, f.of), {})[f.step] = f
        if lines:
            table.add_row("psnr, dB" if metric == "psnr" else metric, style="italic")
        for words, found in lines.items():
            last = list(found.values())[-1]
            cells = [_found(found.get(step)) for step in steps]
            style = "dim" if last.control else "bold" if last in best else None
            table.add_row(*words, _number(last.floor, metric), *cells, style=style)
        if lines:
            table.add_section()
    return table


def _found(figure: Figure | None) -> str:
    if figure is None:
        return ""
    value, error = (_number(x, figure.metric) for x in (figure.value, figure.error))
    return f"{value} ± {error}"


def _number(value: float, metric: str) -> str:
    return f"{value:.1f}" if metric == "psnr" else f"{value:.3f}"


# -- several runs ------------------------------------------------------------------------------


def grouped(audits: Sequence[Audit]) -> list[dict[str, Any]]:
    """Return one line for each group of runs that differ in seed alone, as ``compare`` groups them.

    Success is that of the strongest attack at the last step that was audited, mean and deviation
    over seeds.
    """
    lines = []
    for label, members in _groups(audits):
        line: dict[str, Any] = {"label": label, "seeds": len(members)}
        line["bits_per_activation"] = _bits(members[0])
        told = [audit.summary for audit in members if audit.summary]
        line |= _spread("accuracy", [s.get("test", {}).get("accuracy") for s in told])
        up = "up_bytes_per_client_per_epoch"
        line |= _spread(up, [s.get("communication", {}).get(up) for s in told])
        for metric in METRICS:
            best = [a.strongest(metric, step) for a in members for step in a.steps[-1:]]
            line |= _spread(metric, [f.value for f in best if f])
        lines.append(line)
    return lines


def _bits(audit: Audit) -> float:
    """Return what a number of a client's tokens takes on the wire, its token's scale with it."""
    experiment = config.from_dict(audit.settings)
    width, number = width_of(experiment), dtype_of(experiment).itemsize
    return 8 * wire_of(experiment).activations.token_bytes(width, number) / width


def _groups(audits: Sequence[Audit]) -> list[tuple[str, list[Audit]]]:
    if not all(audit.summary.get("status") == "completed" for audit in audits):
        return [(audit.name, [audit]) for audit in audits]
    by_path = {Path(audit.source): audit for audit in audits}
    found = compare.group(compare.read(list(by_path)))
    return [(one.label, [by_path[run.path] for run in one.runs]) for one in found]


def _spread(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    there = [value for value in values if value is not None]
    mean = statistics.fmean(there) if there else None
    return {name: mean, f"{name}_std": statistics.stdev(there) if len(there) > 1 else None}


def show_groups(lines: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the groups beside each other."""
    title = "the strongest attack at the last step; mean ± deviation over seeds"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("runs", "seeds", "accuracy", "MiB up", *_COLUMNS):
        left = head == "runs"
        table.add_column(head, justify="left" if left else "right", overflow="fold")
    for line in lines:
        up = line["up_bytes_per_client_per_epoch"]
        cells = [_with_spread(line, metric) for metric in _COLUMNS]
        mebi = "" if up is None else f"{up / 2**20:.3f}"
        table.add_row(
            line["label"], str(line["seeds"]), _with_spread(line, "accuracy"), mebi, *cells
        )
    console.print(table)


def _with_spread(line: dict[str, Any], name: str) -> str:
    mean, deviation = line[name], line[f"{name}_std"]
    form = "{:.1f}" if name == "psnr" else "{:.3f}"
    if mean is None:
        return ""
    return form.format(mean) + ("" if deviation is None else " ± " + form.format(deviation))


# -- files -------------------------------------------------------------------------------------


def write(audits: Sequence[Audit], folder: Path) -> list[Path]:
    """Write ``audit.json``, a picture of every modality's reconstructions, and of several runs
    what they cost against what they hide; return the paths.

    Raises
    ------
    RunError
        If a file cannot be written.
    """
    lines = grouped(audits)
    content = {"audits": [audit.as_json() for audit in audits], "groups": lines}
    path = folder / "audit.json"
    found = [path]
    try:
        path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
        for number, audit in enumerate(audits, start=1):
            name = f"{number}-{audit.name}-" if len(audits) > 1 else ""
            for of in dict.fromkeys(gallery.of for gallery in audit.galleries):
                found.append(folder / f"{name}{of}.png")
                draw_gallery(audit, of, found[-1])
        if len(lines) > 1 and all(line["up_bytes_per_client_per_epoch"] for line in lines):
            found.append(folder / "price.png")
            draw_price(lines, found[-1])
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"--out: {folder} cannot be written: {reason}") from error
    return found


def draw_gallery(audit: Audit, of: str, path: Path) -> None:
    """Draw the samples of a modality, and below them what the attacks made of their tokens."""
    from matplotlib.figure import Figure as Canvas

    ends = (audit.steps[0], audit.steps[-1])
    galleries = [g for g in audit.galleries if g.of == of and g.step in ends]
    rows = [("original", galleries[0].rows["original"])]
    for gallery in galleries:
        rows += [
            (_caption(audit, gallery, label), planes)
            for label, planes in sorted(gallery.rows.items())
            if label != "original"
        ]
    count = len(rows[0][1])
    height, width = rows[0][1].shape[2:]
    side = 1.15
    canvas = Canvas(
        figsize=(1.9 + count * side, 0.5 + len(rows) * (side * height / width + 0.05)),
        layout="constrained",
    )
    axes = canvas.subplots(len(rows), count, squeeze=False)
    for line, (label, planes) in zip(axes, rows, strict=True):
        for axis, plane in zip(line, planes, strict=True):
            picture = plane.permute(1, 2, 0).clamp(0, 1).numpy()
            grey = {"cmap": "gray", "vmin": 0, "vmax": 1} if len(plane) == 1 else {}
            axis.imshow(picture.squeeze(), interpolation="nearest", **grey)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    canvas.suptitle(f"{audit.name}: {of} as the server gets it back", fontsize=10)
    canvas.savefig(path, dpi=130)


def _caption(audit: Audit, gallery: Gallery, label: str) -> str:
    rivals = [
        f
        for f in audit.figures
        if (f.step, f.of, f.metric, f.attack) == (gallery.step, gallery.of, "psnr", label)
    ]
    best = max(rivals, key=lambda f: f.value)
    return f"{label}, step {gallery.step}\nknows: {best.knowledge}\n{best.value:.1f} dB"


def draw_price(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw what every group sends, how well it does, and what pictures leak, each by the others.

    What it sends is bits per activation where codecs differ, else bytes.
    """
    from matplotlib.figure import Figure as Canvas

    coded = len({line["bits_per_activation"] for line in lines}) > 1
    sent = "bits_per_activation" if coded else "MiB"
    names = {
        "MiB": "MiB up per client and epoch",
        "bits_per_activation": "bits per activation",
        "accuracy": "test accuracy",
        "psnr": "PSNR of the stronger attack, dB",
    }
    ends = {"psnr": 1.05 * CEILING_DB}
    canvas = Canvas(figsize=(13, 4 + 0.1 * len(lines)), layout="constrained")
    axes = canvas.subplots(1, 3)
    shown = ((sent, "accuracy"), (sent, "psnr"), ("psnr", "accuracy"))
    for axis, (x, y) in zip(axes, shown, strict=True):
        for place, line in enumerate(lines):
            up = line["up_bytes_per_client_per_epoch"]
            at = line | {"MiB": None if up is None else up / 2**20}
            if at[x] is None or at[y] is None:
                continue
            axis.errorbar(
                at[x],
                at[y],
                at[f"{y}_std"] or 0,
                marker="osD^v"[place // 10 % 5],
                color=f"C{place}",
                label=line["label"] if axis is axes[0] else None,
            )
        axis.set(xlabel=names[x], ylabel=names[y])
        axis.set_xlim(0, ends.get(x))
        if y != "accuracy":
            axis.set_ylim(0, ends[y])
        axis.grid(color="0.9")
    canvas.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    canvas.savefig(path, dpi=130)
