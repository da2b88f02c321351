"""The house in one picture, from the code: ``python -m mpsl_dist.analysis.house --out FILE.png``.

``--check`` prints what breaks the house's rules instead, and exits with status 1 if anything does.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpsl_dist.analysis.house_plan import (
    BESIDE,
    PACKAGE,
    Edge,
    House,
    faults,
    read,
    room_of,
    rows,
    upward,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In pixels from the picture's upper left corner.
_WIDTH, _MARGIN, _GAP, _COLUMN, _LINE, _HEAD = 1600, 24, 92, 158, 15, 32
#: Between arrows that run side by side.
_LANE = 32
#: Where an arrow ends it runs straight, beside its number.
_STUB = 30
#: Files in a column, before a box takes another column.
_LONGEST = 7
_COLOURS = ("#4d4d4d", "#a6611a", "#7b3f98", "#1b6ca8", "#2a7f4f", "#b23a6e", "#0f8b8d")
_LEGEND = (
    "An arrow: imports from room to room, its width and number how many (file to file). "
    "Beside a file: its lines. Bottom row: the ground, its importers named in it."
)

Column = list[tuple[str, str]]


@dataclass(frozen=True)
class Box:
    """A room as it is drawn.

    Attributes
    ----------
    row : int
        0 for the ground.
    left, top, width, height : float
        In pixels.
    columns : list of list of (str, str)
        What is written in it: names and their lines.
    """

    row: int
    left: float
    top: float
    width: float
    height: float
    columns: list[Column]

    @property
    def middle(self) -> float:
        """The x of its middle."""
        return self.left + self.width / 2

    @property
    def bottom(self) -> float:
        """The y of its lower edge."""
        return self.top + self.height


def picture(house: House) -> Figure:
    """Draw the rooms in layers from the command line down to the ground, and their imports."""
    from matplotlib.figure import Figure

    layers = rows(house)
    boxes = _lay_out(house, layers)
    width = max(box.left + box.width for box in boxes.values()) + _MARGIN
    width, height = max(_WIDTH, width), max(box.bottom for box in boxes.values()) + _MARGIN
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.text(_MARGIN, 22, f"{PACKAGE}: who imports whom", fontsize=14, weight="bold", va="center")
    up = upward(house.edges())
    legend = f"{_LEGEND} Red: an import that goes up." if up else _LEGEND
    axes.text(_MARGIN, 46, legend, fontsize=8.5, color="0.35", va="center")
    drawn = {e: n for e, n in house.edges().items() if e[0] in boxes and e[1] in boxes}
    down = {e: n for e, n in drawn.items() if e not in up and boxes[e[1]].row > 0}
    sources = [
        room for layer in reversed(layers) for room in layer if any(room == a for a, _ in down)
    ]
    colours = {room: _COLOURS[at % len(_COLOURS)] for at, room in enumerate(sources)}
    for edge, points in _ways(boxes, down, width).items():
        _draw_arrow(axes, points, down[edge], colours[edge[0]])
    for a, b in up:
        ends = [(boxes[a].middle, boxes[a].top), (boxes[b].middle, boxes[b].bottom)]
        _draw_arrow(axes, ends, drawn[a, b], "red")
    for room, box in boxes.items():
        lines = sum(n for module, n in house.lines.items() if room_of(module) == room)
        _draw_box(axes, room, box, lines, colours.get(room, "0.45"))
        if box.row == 0:
            _draw_importers(axes, room, box, drawn)
    return figure


def _columns(house: House, room: str) -> list[Column]:
    """Return the files of a room, those of a sub-folder under its name, in columns."""
    folders: dict[str, Column] = {"": []}
    for module, lines in sorted(house.lines.items()):
        is_folder = module in house.folders
        parts = module.split(".") + ["__init__"] * is_folder
        *folder, name = parts[1 if module.startswith(BESIDE) else 2 :] or [""]
        if room_of(module) == room and name and lines > is_folder:
            folders.setdefault("/".join(folder), []).append((name, f"{lines}"))
    blocks = [[(name, lines)] for name, lines in folders.pop("")]
    for folder, files in folders.items():
        blocks.append([(f"{folder}/", ""), *(("    " + name, lines) for name, lines in files)])
    total = sum(map(len, blocks))
    tall = _LONGEST if folders else -(-total // (-(-total // _LONGEST) or 1))
    columns: list[Column] = []
    for block in blocks:  # a folder's files stay under its name
        if not columns or len(columns[-1]) + len(block) > max(tall, len(block)):
            columns.append([])
        columns[-1] += block
    return columns


def _lay_out(house: House, layers: Sequence[Sequence[str]]) -> dict[str, Box]:
    columns = {room: _columns(house, room) for layer in layers for room in layer}
    widths = {room: max(1, len(found)) * _COLUMN + 24.0 for room, found in columns.items()}
    whole = max(_WIDTH, *(sum(widths[r] + _MARGIN for r in row) + _MARGIN for row in layers))
    boxes: dict[str, Box] = {}
    top = 74.0
    for row, layer in reversed(list(enumerate(layers))):
        tall = max([len(column) for room in layer for column in columns[room]], default=1)
        height = _HEAD + 8.0 + _LINE * tall
        if row == 0:
            top, height = top - _GAP + 30, 66.0 if len(layer) < 4 else 96.0
            widths |= {room: (whole - _MARGIN) / len(layer) - _MARGIN for room in layer}
        inside = [room for room in layer if room != BESIDE]
        space = (whole - sum(widths[room] for room in inside)) / (len(inside) + 1)
        left = space
        for room in inside:
            boxes[room] = Box(row, left, top, widths[room], height, columns[room])
            left += widths[room] + space
        if BESIDE in layer:
            left = whole - _MARGIN - widths[BESIDE]
            boxes[BESIDE] = Box(row, left, top, widths[BESIDE], height, columns[BESIDE])
        top += height + _GAP
    return boxes


def _ways(
    boxes: dict[str, Box], edges: Iterable[Edge], width: float
) -> dict[Edge, list[tuple[float, float]]]:
    """Return the points that each arrow runs through, past the boxes between its ends."""
    beside = [(a, b) for a, b in edges if boxes[a].row == boxes[b].row]
    edges = [edge for edge in edges if edge not in beside]
    ends: dict[Edge, float] = {}
    for room, box in boxes.items():
        # Arrows from far above arrive outside, those from near above inside: fewer cross.
        side = 1 if box.middle > width / 2 else -1
        into = sorted((e for e in edges if e[1] == room), key=lambda e: side * boxes[e[0]].row)
        ends |= _side_by_side(box, into)
    lanes: dict[Edge, list[tuple[float, float]]] = defaultdict(list)
    for row in range(max(box.row for box in boxes.values()), 0, -1):
        layer = sorted((box for box in boxes.values() if box.row == row), key=lambda box: box.left)
        past = [e for e in edges if boxes[e[0]].row > row > boxes[e[1]].row]
        for edge, x in _past(layer, {e: ends[e] for e in past}, width).items():
            lanes[edge] += [(x, layer[0].top), (x, layer[0].bottom)]
    ways = {}
    for room, box in boxes.items():
        out = [e for e in edges if e[0] == room]
        out.sort(key=lambda e: lanes[e][0][0] if lanes[e] else ends[e])
        for edge, x in _side_by_side(box, out).items():
            foot = boxes[edge[1]].top
            last = [(ends[edge], foot - _STUB), (ends[edge], foot)]
            ways[edge] = [(x, box.bottom), *lanes[edge], *last]
    for a, b in beside:
        left, right = sorted((boxes[a], boxes[b]), key=lambda box: box.left)
        y = left.top + left.height / 2
        pair = [(left.left + left.width, y), (right.left, y)]
        ways[a, b] = pair if left is boxes[a] else pair[::-1]
    return ways


def _side_by_side(box: Box, edges: Sequence[Edge]) -> dict[Edge, float]:
    step = min(_LANE, (box.width - 20) / max(1, len(edges)))
    first = box.middle - step * (len(edges) - 1) / 2
    return {edge: first + step * at for at, edge in enumerate(edges)}


def _past(layer: Sequence[Box], wished: dict[Edge, float], width: float) -> dict[Edge, float]:
    """Return where arrows pass a row: at the x they wish, or in the nearest space between boxes."""
    rights = [_MARGIN / 2, *(box.left + box.width + _MARGIN for box in layer)]
    lefts = [*(box.left - _MARGIN for box in layer), width - _MARGIN / 2]
    spaces = [(a, b) for a, b in zip(rights, lefts, strict=True) if a <= b]
    shared: dict[tuple[float, float], list[Edge]] = defaultdict(list)
    for edge in sorted(wished, key=lambda e: wished[e]):
        x = wished[edge]
        shared[min(spaces, key=lambda s: max(s[0] - x, x - s[1]))].append(edge)
    found: dict[Edge, float] = {}
    for (low, high), inside in shared.items():
        step = min(_LANE / 2, (high - low) / len(inside))
        xs = [min(max(wished[edge], low), high) for edge in inside]
        for at in range(1, len(xs)):
            xs[at] = max(xs[at], xs[at - 1] + step)
        over = high
        for at in reversed(range(len(xs))):
            xs[at] = min(xs[at], over)
            over = xs[at] - step
        found |= dict(zip(inside, xs, strict=True))
    return found


def _draw_arrow(axes: Axes, points: Sequence[tuple[float, float]], count: int, colour: str) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    ends, codes = [points[0]], [Curve.MOVETO]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        half = (y0 + y1) / 2
        ends += [(x0, half), (x1, half), (x1, y1)] if x0 != x1 and y0 != y1 else [(x1, y1)]
        codes += [Curve.CURVE4] * 3 if x0 != x1 and y0 != y1 else [Curve.LINETO]
    thick = 0.9 + 0.28 * count
    arrow = FancyArrowPatch(
        path=Curve(ends, codes),
        arrowstyle="-|>",
        mutation_scale=9 + 1.2 * thick,
        linewidth=thick,
        color=colour,
        alpha=0.85,
        joinstyle="miter",
        capstyle="butt",
        zorder=2,
    )
    axes.add_patch(arrow)
    x, y = points[-1]
    aside = points[-2][1] == y
    at = (
        ((x + points[-2][0]) / 2, y - 9)
        if aside
        else (x + 5 + thick, y - 22 if y > points[0][1] else y + 24)
    )
    axes.text(*at, f"{count}", fontsize=7, color=colour, va="center", zorder=4)


def _draw_box(axes: Axes, room: str, box: Box, lines: int, colour: str) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import FancyBboxPatch

    tint = tuple(0.9 + 0.1 * part for part in to_rgb(colour))
    shape = FancyBboxPatch(
        (box.left, box.top),
        box.width,
        box.height,
        boxstyle="round,pad=0,rounding_size=6",
        facecolor=tint,
        edgecolor=colour,
        linewidth=1.4,
        zorder=3,
    )
    axes.add_patch(shape)
    name = f"{room}/" if box.columns else room
    axes.text(box.left + 12, box.top + 17, name, fontsize=11, weight="bold", va="center", zorder=4)
    right = box.left + box.width - 12
    said = f"{lines:,} lines"
    axes.text(right, box.top + 17, said, fontsize=8, color="0.4", va="center", ha="right", zorder=4)
    for at, column in enumerate(box.columns):
        left = box.left + 12 + at * _COLUMN
        for line, (name, count) in enumerate(column):
            y = box.top + _HEAD + 6 + line * _LINE
            weight = "normal" if count else "bold"
            axes.text(left, y, name, fontsize=8, weight=weight, va="center", zorder=4)
            right = left + _COLUMN - 14
            axes.text(right, y, count, fontsize=7.5, color="0.5", va="center", ha="right", zorder=4)


def _draw_importers(axes: Axes, room: str, box: Box, edges: dict[Edge, int]) -> None:
    """Write who imports a file of the ground: arrows from everywhere would hide the rest."""
    named = [f"{a}\xa0{count}" for (a, b), count in sorted(edges.items()) if b == room]
    said = textwrap.wrap(f"imported by {', '.join(named) or 'nothing'}", int(box.width / 7))
    for line, text in enumerate(said):
        y = box.top + _HEAD + 4 + line * _LINE
        axes.text(box.left + 12, y, text, fontsize=8, color="0.35", va="center", zorder=4)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(prog=f"{PACKAGE}.analysis.house", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="draw the picture")
    parser.add_argument("--check", action="store_true", help="print what breaks the rules")
    here = Path(__file__).resolve().parents[2]
    parser.add_argument("--root", type=Path, default=here, help="the folder of the package")
    options = parser.parse_args(arguments)
    if not (options.out or options.check):
        parser.error("say --out FILE.png, --check or both")
    if options.out and options.out.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--out: {options.out} must end in .png, .svg or .pdf")
    if not (options.root / PACKAGE).is_dir():
        parser.error(f"--root: no {PACKAGE}/ in {options.root}")
    house = read(options.root)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        picture(house).savefig(options.out)
        print(f"drawn: {options.out}")
    found = faults(house) if options.check else []
    if options.check:
        print("\n".join(found or map(" ".join, reversed(rows(house)))))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
