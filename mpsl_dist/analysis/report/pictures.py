"""Drawings of a report, as SVG that follows the page into dark and out of it."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours of lines and bars: at least 3 : 1 against either background (WCAG 2.1, 1.4.11).
COLOURS = ("#2777c2", "#d1611e", "#1a9467", "#b857a8", "#8b7500", "#8467d6", "#d2486a", "#6f7f8f")
#: The page's backgrounds and what is written on them.
LIGHT, DARK, INK, CHALK = "#ffffff", "#14181d", "#1c2126", "#e4e8ec"
_DASHES, _MARKERS = ("-", "--", "-.", ":"), "os^Dv*PX"
#: Stands for the ink while matplotlib draws.
_INK = "#010203"
_FAINT = "#8a929a"
#: Lines that one picture may hold and still be read.
LINES = 10
#: Characters of a line of a legend.
_WIDTH = 80
#: Characters of a line beside a bar.
_BESIDE = 44


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours, 1 to 21, as WCAG 2.1 defines it."""
    brighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def drawn(draw: Callable[[Figure], None], width: float, height: float, name: str) -> str:
    """Return what ``draw`` leaves on a figure of so many inches, as SVG in the page's own ink.

    Parameters
    ----------
    name : str
        Makes the ids within the SVG its own.
    """
    import matplotlib
    from matplotlib.figure import Figure

    ink = (
        "text.color",
        "axes.edgecolor",
        "axes.labelcolor",
        "axes.titlecolor",
        "xtick.color",
        "ytick.color",
    )
    chosen = dict.fromkeys(ink, _INK) | {
        "svg.hashsalt": name,
        "svg.fonttype": "path",
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "text.parse_math": False,
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    }
    file = io.StringIO()
    with matplotlib.rc_context(chosen):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    return _in_ink(file.getvalue())


def _in_ink(svg: str) -> str:
    """Return the drawing without its preamble, with the ink of whoever looks at it."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    style = (
        f"<style>svg{{color:{INK}}}@media(prefers-color-scheme:dark){{svg{{color:{CHALK}}}}}"
        "</style>"
    )
    return re.sub(r"(<svg[^>]*>)", rf"\1{style}", svg, count=1).replace(_INK, "currentColor")


def look(i: int) -> dict[str, Any]:
    """Return colour, dashes and marker of the i-th line: no two of the first eight share one."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": _DASHES[i % len(_DASHES)],
        "marker": _MARKERS[i % len(_MARKERS)],
    }


def lines(
    name: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    axes: tuple[str, str],
    spreads: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    whole_x: bool = False,
    ticks: Sequence[str] = (),
    logarithmic: bool = False,
) -> str:
    """Return lines by their labels.

    Parameters
    ----------
    series : mapping of str to sequence of (x, y)
    axes : (str, str)
        What x and y are.
    spreads : mapping of str to sequence of (least, most), optional
        Of every point.
    ticks : sequence of str
        Names of x = 0, 1, ...
    """

    def draw(figure: Figure) -> None:
        plot = figure.subplots()
        for i, (label, points) in enumerate(series.items()):
            x, y = zip(*points, strict=True)
            plot.plot(x, y, label=label, markersize=3.5, linewidth=1.5, **_thin(look(i), len(x)))
            band = (spreads or {}).get(label)
            if band:
                plot.fill_between(x, *zip(*band, strict=True), color=COLOURS[i % 8], alpha=0.15)
        plot.set(xlabel=axes[0], ylabel=axes[1])
        if logarithmic:
            plot.set_yscale("log")
            plot.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        if ticks:
            plot.set_xticks(range(len(ticks)), ticks)
        elif whole_x:
            plot.xaxis.get_major_locator().set_params(integer=True)
        plot.grid(axis="y", color=_FAINT, alpha=0.35, linewidth=0.6)
        _legend(figure, plot)

    return drawn(draw, 7.2, 3.3 + _legend_height(series), name)


def _thin(chosen: dict[str, Any], points: int) -> dict[str, Any]:
    return chosen if points <= 60 else chosen | {"marker": None}


def _columns(labels: Iterable[str]) -> int:
    longest = max((len(label) for label in labels), default=0)
    return 4 if longest <= 14 else 2 if longest <= 44 else 1


def _legend(figure: Figure, plot: Axes, **how: Any) -> None:
    handles, labels = plot.get_legend_handles_labels()
    wrapped = [textwrap.fill(label, _WIDTH) for label in labels]
    columns = _columns(labels)
    figure.legend(handles, wrapped, loc="outside lower center", ncols=columns, **how)


def _legend_height(labels: Iterable[str]) -> float:
    """Return the inches of a legend."""
    lines = [-(-max(1, len(label)) // _WIDTH) for label in labels]
    return 0.2 * math.ceil(sum(lines) / _columns(labels))


def bars(
    name: str,
    values: Mapping[str, float],
    axis: str,
    notes: Mapping[str, str] | None = None,
    kinds: Sequence[str] = (),
) -> str:
    """Return one horizontal bar for every label, with a note at its end.

    Parameters
    ----------
    kinds : sequence of str
        What each bar is one of; bars of a kind share a colour.
    """
    colours = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(dict.fromkeys(kinds))}

    def draw(figure: Figure) -> None:
        plot = figure.subplots()
        for row, (label, value) in enumerate(values.items()):
            colour = colours[kinds[row]] if kinds else COLOURS[0]
            plot.barh(row, value, color=colour, height=0.7)
            note = (notes or {}).get(label, f"{value:g}")
            plot.annotate(f" {note}", (value, row), va="center")
        _rows(plot, list(values))
        plot.set_xlabel(axis)
        # Room for the notes, which the layout knows nothing of.
        plot.set_xlim(0, 1.75 * max(*values.values(), 1e-9))

    return drawn(draw, 7.2, 1.0 + 0.3 * len(values), name)


def _two_lines(label: str) -> str:
    """Return a label that fits beside its bar; keys without their sections where it is long."""
    if len(label) > _BESIDE:
        label = re.sub(r"(?<=[( ])(?:\w+\.)+(\w+=)", r"\1", label)
    return "\n".join(textwrap.wrap(label, _BESIDE, max_lines=2, placeholder=" …"))


def stacked(name: str, rows: Mapping[str, Mapping[str, float]], axis: str) -> str:
    """Return a horizontal bar for every row, made of its parts."""

    def draw(figure: Figure) -> None:
        plot = figure.subplots()
        parts = list(dict.fromkeys(part for own in rows.values() for part in own))
        left = np.zeros(len(rows))
        for i, part in enumerate(parts):
            values = np.array([own.get(part, 0.0) for own in rows.values()])
            hatch = ("", "///", "...", "xxx")[i // len(COLOURS) % 4]
            colour = COLOURS[i % len(COLOURS)]
            plot.barh(range(len(rows)), values, 0.7, left, color=colour, label=part, hatch=hatch)
            left += values
        _rows(plot, list(rows))
        plot.set_xlabel(axis)
        _legend(figure, plot)

    parts = {part for own in rows.values() for part in own}
    return drawn(draw, 7.2, 1.2 + 0.3 * len(rows) + _legend_height(parts), name)


def _rows(plot: Axes, labels: Sequence[str]) -> None:
    shortened = [_two_lines(label) for label in labels]
    plot.set_yticks(range(len(labels)), shortened)
    plot.set_ylim(len(labels) - 0.4, -0.6)
    plot.tick_params(axis="y", length=0)


def grid(name: str, counts: NDArray[np.int64], rows: Sequence[str], columns: Sequence[str]) -> str:
    """Return clients × classes, a dot for every pair, its area the samples."""

    def draw(figure: Figure) -> None:
        plot = figure.subplots()
        row, column = np.nonzero(counts)
        held = counts[row, column]
        plot.scatter(column, row, s=2 + 110 * held / held.max(), color=COLOURS[0], linewidths=0)
        plot.set_ylim(len(rows) - 0.4, -0.6)
        plot.set_xlim(-0.6, len(columns) - 0.4)
        plot.set(ylabel="client", xlabel="class")
        if len(rows) <= 30:
            plot.set_yticks(range(len(rows)), rows)
        if len(columns) <= 30:
            plot.set_xticks(range(len(columns)), columns, rotation=60, ha="right")
        plot.grid(color=_FAINT, alpha=0.2, linewidth=0.5)
        plot.set_axisbelow(True)

    return drawn(draw, 7.2, min(9.0, 1.6 + 0.22 * len(rows)), name)


def clouds(name: str, points: Mapping[str, Mapping[str, NDArray[np.floating]]]) -> str:
    """Return panels beside each other of clouds of points (n, 2): panel -> label -> points."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(points), squeeze=False, sharex=True, sharey=True)[0]
        for panel, (title, of) in zip(panels, points.items(), strict=True):
            for i, (label, xy) in enumerate(of.items()):
                panel.scatter(
                    *xy.T,
                    s=(14, 6)[i % 2],
                    color=COLOURS[i],
                    marker="ox"[i % 2],
                    alpha=(1, 0.8)[i % 2],
                    linewidths=(0, 0.7)[i % 2],
                    label=label,
                    zorder=2 - i,  # the first, of which there are fewer, on top
                )
            panel.set(title=title, xticks=[], yticks=[])
        _legend(figure, panels[0], markerscale=2.0)

    return drawn(draw, max(3.6, 2.6 * len(points)), 3.2, name)
