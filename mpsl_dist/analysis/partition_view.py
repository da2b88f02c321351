"""``partition``: who holds what, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from mpsl_dist.actors.holdings import Holdings, clients_of_a_user, load_data
from mpsl_dist.config import ConfigError, Experiment
from mpsl_dist.data import presence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
#: Up to so many classes have a column each; above, and always in retrieval, clients are summed up.
_COLUMNS = 12
#: Clients that the table lists, and clients and classes whose names fit the picture.
_LISTED, _NAMED = 100, 40
#: Characters of a line that goes to a file or a pipe.
_WIDTH = 120


@dataclass(frozen=True)
class PartitionTable:
    """Who holds what.

    Attributes
    ----------
    counts : array
        (clients, classes) training samples; in retrieval (clients, 2) pictures and captions.
    columns : tuple of str
        The names of the columns of ``counts``.
    clients : tuple of str
        The clients' names, or their numbers.
    rule : str
        How the samples were dealt, in words.
    retrieval : bool
    has : mapping of str to array
        Modality -> (clients,) training samples that have it; empty where all have everything.
    each : int
        Clients in a row that are one user's, and have the same samples.
    public : int
        Training samples that are no client's own.
    """

    counts: NDArray[np.int64]
    columns: tuple[str, ...]
    clients: tuple[str, ...]
    rule: str
    retrieval: bool = False
    has: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    each: int = 1
    public: int = 0

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(clients,) training samples."""
        return self.counts[:, 1] if self.retrieval else self.counts.sum(1)


def holdings(experiment: Experiment) -> PartitionTable:
    """Return who holds what, after loading and dealing the data as a run would.

    Raises
    ------
    UserError
        If the data cannot be loaded or dealt.
    """
    if experiment.data.place == "own":
        raise ConfigError(
            "data.place: own, so no host sees who holds what; data check shows this host's rows"
        )
    splits = load_data(experiment)
    dealing = Holdings.deal(experiment, splits)
    dealt = dealing.dealt
    labels = splits.train.labels.numpy()
    held = [labels[part] for part in dealt.parts]
    if splits.retrieval:
        captions = getattr(splits.train, "captions", 1)  # of a sample
        counts = [[len(np.unique(own)), len(own) * captions] for own in held]
    else:
        counts = [np.bincount(own, minlength=len(splits.classes)) for own in held]
    return PartitionTable(
        np.array(counts, dtype=np.int64),
        ("pictures", "captions") if splits.retrieval else splits.classes,
        dealt.names or tuple(map(str, range(len(held)))),
        dealt.rule,
        splits.retrieval,
        _having(dealing),
        clients_of_a_user(experiment, splits),
        len(dealing.public.train),
    )


def _having(dealing: Holdings) -> dict[str, NDArray[np.int64]]:
    """Return modality -> (clients,) samples that have it, and that a client for it may see."""
    names, parts = tuple(dealing.splits.shapes), dealing.dealt.parts
    present = presence(dealing.splits.train)
    seen = [dealing.modalities(number, tests=False) or names for number in range(len(parts))]
    if present is None and all(own == names for own in seen):
        return {}
    has = np.zeros((len(names), len(parts)), dtype=np.int64)
    for number, (own, part) in enumerate(zip(seen, parts, strict=True)):
        for name in own:
            there = len(part) if present is None else int(present[name][part].sum())
            has[names.index(name), number] = there
    return dict(zip(names, has, strict=True))


def show(experiment: Experiment, out: Path, console: Console | None = None) -> None:
    """Print the table, and draw the picture into a file.

    Parameters
    ----------
    experiment : Experiment
    out : Path
        Ends in one of :data:`FORMATS`; folders on the way are created.
    console : Console, optional
        Where the table is printed; by default standard output.

    Raises
    ------
    UserError
        If ``out`` ends otherwise, or the data cannot be loaded or dealt.
    """
    if out.suffix not in FORMATS:
        raise ConfigError(f"--out: {out} must end in {', '.join(FORMATS)}")
    # The user's own names are no markup: "[x]" is a name.
    console = console or Console(markup=False)
    if not console.is_terminal:
        console.width = _WIDTH
    found = holdings(experiment)
    console.print(f"{experiment.data.name}, {len(found.clients)} clients", highlight=False)
    console.print(f"rule: {found.rule}", highlight=False, soft_wrap=True)
    if found.retrieval and experiment.data.partition.kind == "dirichlet":
        console.print("data.partition.alpha has no effect: retrieval has no classes to be skewed")
    console.print(table(found, console))
    left = len(found.clients) - _LISTED
    if left > 0:
        console.print(f"… and {left:,} more clients; the picture shows all", highlight=False)
    sizes = found.sizes
    console.print(
        f"samples of a client: {sizes.min():,} to {sizes.max():,}, median {np.median(sizes):g}; "
        f"{sizes[:: found.each].sum():,} in all",
        highlight=False,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    picture(found, experiment.data.name).savefig(out, dpi=120)
    console.print(f"drawn: {out}", highlight=False, soft_wrap=True)


def table(found: PartitionTable, console: Console) -> Table:
    """Return a table of clients × classes; where that is too wide, a summary of each client."""
    if found.retrieval or len(found.columns) <= _COLUMNS:
        whole = _table_of_classes(found)
        if console.measure(whole).maximum <= console.width:
            return whole
    summary = ("samples", "classes", "largest class", "its share", "entropy (bits)")
    return _lay_out(found, summary, [_summary(found, counts) for counts in found.counts])


def _table_of_classes(found: PartitionTable) -> Table:
    rows = [[f"{n}" if n else "·" for n in counts] for counts in found.counts]
    if found.retrieval:
        return _lay_out(found, found.columns, rows)
    whole = [[*row, str(size)] for row, size in zip(rows, found.sizes, strict=True)]
    return _lay_out(found, (*found.columns, "all"), whole)


def _lay_out(found: PartitionTable, names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    laid = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    laid.add_column("client")
    for name in names:
        laid.add_column(name, justify="left" if name == "largest class" else "right")
    for name in found.has:
        laid.add_column(f"with {name}", justify="right")
    parts = [[f"{own[n]}" for own in found.has.values()] for n in range(len(rows))]
    for client, row, part in list(zip(found.clients, rows, parts, strict=True))[:_LISTED]:
        laid.add_row(client, *row, *part)
    return laid


def _summary(found: PartitionTable, counts: NDArray[np.int64]) -> list[str]:
    total, largest = int(counts.sum()), int(counts.argmax())
    return [
        f"{total}",
        f"{np.count_nonzero(counts)}",
        found.columns[largest],
        f"{counts[largest] / total:.0%}",
        f"{entropy(counts):.2f}",
    ]


def entropy(counts: NDArray[np.int64]) -> float:
    """Return the entropy of counts (classes,) in bits: 0 for one class, log2(k) for k equal."""
    shares = counts[counts > 0] / counts.sum()
    return float((shares * np.log2(1 / shares)).sum())


def picture(found: PartitionTable, name: str) -> Figure:
    """Return a drawing of clients × classes, the darker the more samples, beside the totals."""
    from matplotlib.figure import Figure

    rows, columns = found.counts.shape
    height = min(12.0, 2.4 + 0.24 * rows)
    if found.retrieval:
        figure = Figure(figsize=(7, height), layout="constrained")
        bars = figure.subplots()
    else:
        width = min(14.0, 5.0 + 0.3 * columns)
        figure = Figure(figsize=(width, height), layout="constrained")
        grid, bars = figure.subplots(1, 2, sharey=True, width_ratios=(max(2.0, width - 3.5), 2))
        _draw_grid(figure, grid, found)
    bars.barh(range(rows), found.sizes, height=1.0 if rows > _NAMED else 0.8, color="0.45")
    bars.set(xlabel="captions" if found.retrieval else "samples", ylim=(rows - 0.5, -0.5))
    bars.spines[["top", "right"]].set_visible(False)
    if found.retrieval:
        _name_clients(bars, found)
    figure.suptitle(f"{name}\n{found.rule}", fontsize=9)
    return figure


def _draw_grid(figure: Figure, grid: Axes, found: PartitionTable) -> None:
    from matplotlib.colors import LogNorm

    largest = max(2, int(found.counts.max()))
    colours = grid.imshow(
        np.ma.masked_equal(found.counts, 0),
        norm=LogNorm(1, largest),
        cmap="viridis_r",
        aspect="auto",
        interpolation="nearest",
    )
    figure.colorbar(colours, ax=grid, label="samples (white: none)", location="left")
    _name_clients(grid, found)
    if len(found.columns) <= _NAMED:
        ticks = range(len(found.columns))
        grid.set_xticks(ticks, found.columns, rotation=60, ha="right", parse_math=False)
    else:
        grid.set_xlabel(f"{len(found.columns)} classes, in label order")


def _name_clients(axes: Axes, found: PartitionTable) -> None:
    if len(found.clients) <= _NAMED:
        axes.set_yticks(range(len(found.clients)), found.clients, parse_math=False)
    axes.set_ylabel("client")
