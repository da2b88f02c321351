"""The figures of :mod:`mpsl_dist.analysis.cost` as text."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from mpsl_dist.analysis.cost import TOWER, Cost, Row, about, share

_MIB = 2**20


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _giga(value: float) -> str:
    return f"{value / 1e9:.4g}" if value >= 1e4 else "0"


def _mebi(value: float) -> str:
    return f"{value / _MIB:,.4g}" if value < 1000 * _MIB else f"{value / _MIB:,.0f}"


#: Section -> (title, how a value is printed).
_SECTIONS: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("Parameters", _count),
    "flops": ("GFLOPs per sample (paper: multiply-adds / 2 without attention)", _giga),
    "bytes_per_sample": ("Bytes on the wire per sample of split learning", _count),
    "bytes_per_epoch": ("MiB on the wire per client and epoch", _mebi),
    "memory": ("Peak memory, MiB", _mebi),
}


def show(cost: Cost, console: Console | None = None) -> None:
    """Print all figures."""
    console = console or Console()
    for name, value in about(cost.experiment, cost.inputs).items():
        console.print(f"{name}: {value}", highlight=False)
    for section, (title, form) in _SECTIONS.items():
        rows = [row for row in cost.rows if row.section == section]
        if rows:
            console.print(_table(rows, title, form))
    console.print(_share_lines(cost), highlight=False)


def _table(rows: list[Row], title: str, form: Callable[[float], str]) -> Table:
    """Lay out a section; methods of equal figures share a line."""
    quantities = list(dict.fromkeys(row.quantity for row in rows))
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for name in ("methods", "owner", "part"):
        table.add_column(name)
    for name in quantities:
        table.add_column(name, justify="right")
    lines: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        lines.setdefault((row.method, row.owner, row.part), {})[row.quantity] = row.value
    shared: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (method, owner, part), values in lines.items():
        cells = tuple(form(values[name]) if name in values else "" for name in quantities)
        shared.setdefault((owner, part, cells), []).append(method)
    for (owner, part, cells), methods in shared.items():
        style = "bold" if part.startswith("total") else None
        table.add_row(", ".join(methods), owner, part, *cells, style=style)
    return table


def _share_lines(cost: Cost) -> str:
    of_encoder = share(cost)
    times = f"1/{of_encoder:.0f} of" if of_encoder >= 1 else f"{1 / of_encoder:.1f} times"
    line = f"A client's forward FLOPs under MPSL are {times} the encoder's"
    if not any(row.part == TOWER for row in cost.rows):
        return line + "."
    return (
        f"{line} once the frozen text tower's outputs are kept (from the second epoch on),\n"
        f"1/{share(cost, with_tower=True):.1f} in the first epoch."
    )
