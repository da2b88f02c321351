"""What a bench has measured: medians, spread and ratios as JSON, a table and a picture."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mpsl_dist.analysis.stopwatch import PHASES, Seconds, Turn, directions
from mpsl_dist.errors import RunError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Words of a GPU's name -> its peak in FLOP/s, bf16 without sparsity, from NVIDIA's data sheets of
#: the H200, H100, A100, L40S and L4 Tensor Core GPUs (where a sheet has the figure with sparsity
#: alone: half of it). The first row counts all of whose words are in the name.
PEAKS: dict[tuple[str, ...], float] = {
    ("H200", "NVL"): 835.5e12,
    ("H200",): 989.5e12,
    ("H100", "NVL"): 835.5e12,
    ("H100", "PCIe"): 756e12,
    ("H100",): 989.5e12,
    ("A100",): 312e12,
    ("L40S",): 362e12,
    ("L4",): 121e12,
}
_MIB = 2**20
_MIDDLE = ("median", "lower_quartile", "upper_quartile")


def peak_of(device: str) -> float | None:
    """Return a GPU's bf16 peak in FLOP/s by its name; None where it is not known, or a part."""
    words = set(re.split(r"[ \-]", device))
    if "MIG" in words:
        return None
    return next((peak for known, peak in PEAKS.items() if words.issuperset(known)), None)


@dataclass(frozen=True)
class Setting:
    """What the figures are of.

    Attributes
    ----------
    name : str
        The experiment's.
    about : dict
        Dataset, encoder, clients and the like.
    environment : dict
        As in a run directory.
    gpu : str or None
        Name of the server's GPU.
    samples : int
        Of the global batch.
    flop_per_sample : int or None
        Forward and backward of the whole model.
    warm_up : int
        Rounds that do not count.
    """

    name: str
    about: dict[str, Any]
    environment: dict[str, Any]
    gpu: str | None
    samples: int
    flop_per_sample: int | None
    warm_up: int


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles, extremes and mean."""
    least, lower, median, upper, most = np.percentile(values, (0, 25, 50, 75, 100)).tolist()
    return {
        "median": median,
        "lower_quartile": lower,
        "upper_quartile": upper,
        "least": least,
        "most": most,
        "mean": float(np.mean(values)),
    }


def typical(turns: Sequence[Turn]) -> list[Turn]:
    """Return the half of the turns that is neither fast nor slow, whose means still add up."""
    quarter = len(turns) // 4
    return sorted(turns, key=lambda turn: turn.seconds)[quarter : len(turns) - quarter]


def _mean(parts: Sequence[Mapping[str, float]]) -> Seconds:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: float(np.mean([part.get(name, 0.0) for part in parts])) for name in names}


@dataclass(frozen=True)
class Report:
    """All figures.

    Attributes
    ----------
    setting : Setting
    turns : mapping of str to sequence of Turn
        By method, in the order of the rounds.
    memory : mapping
        Process -> peak memory in bytes, ``resident`` and on a ``gpu``.
    """

    setting: Setting
    turns: Mapping[str, Sequence[Turn]]
    memory: Mapping[str, Mapping[str, int]]

    @property
    def figures(self) -> dict[str, Any]:
        """Everything, as the JSON has it."""
        setting = self.setting
        return {
            "name": setting.name,
            "about": setting.about,
            "samples_per_step": setting.samples,
            "steps": len(next(iter(self.turns.values()))),
            "warm_up": setting.warm_up,
            "flop_per_step": setting.flop_per_sample and setting.flop_per_sample * setting.samples,
            "gpu": setting.gpu,
            "methods": {name: self._method(turns) for name, turns in self.turns.items()},
            "ratios": self.ratios,
            "peak_memory": {process: dict(peak) for process, peak in self.memory.items()},
            "environment": setting.environment,
        }

    @property
    def ratios(self) -> dict[str, dict[str, float]]:
        """Spread of a method's seconds over another's in the same round, as ``psl/mpsl``."""
        order = [name for name in ("centralized", "mpsl", "psl") if name in self.turns]
        pairs = itertools.combinations(order, 2)
        return {f"{slow}/{fast}": spread(self._by_round(slow, fast)) for fast, slow in pairs}

    def _by_round(self, slow: str, fast: str) -> list[float]:
        rounds = zip(self.turns[slow], self.turns[fast], strict=True)
        return [one.seconds / other.seconds for one, other in rounds]

    def _method(self, turns: Sequence[Turn]) -> dict[str, Any]:
        seconds, middle = spread([turn.seconds for turn in turns]), typical(turns)
        sent = _mean([turn.sent for turn in turns])
        found = {
            "seconds": seconds | {"each": [turn.seconds for turn in turns]},
            "samples_per_second": self.setting.samples / seconds["median"],
            "phases": _mean([turn.phases for turn in middle]),
            "slowest_worker": _mean([turn.slowest_worker for turn in middle]),
            "bytes_per_step": directions(sent) | {"by_kind": sent},
        }
        if self.setting.flop_per_sample:
            rate = self.setting.flop_per_sample * found["samples_per_second"]
            found["flop_per_second"] = rate
            peak = peak_of(self.setting.gpu or "")
            if peak:
                found["share_of_bf16_peak"] = rate / peak
        return found

    def show(self, console: Console | None = None) -> None:
        """Print the tables."""
        console, figures = console or Console(), self.figures
        console.print(_title(self.setting), highlight=False)
        console.print(_steps_table(figures))
        console.print(_phases_table(figures["methods"]))
        if self.setting.flop_per_sample:
            rates = [_rate(name, found) for name, found in figures["methods"].items()]
            console.print("; ".join(rates), highlight=False)
        told = [f"{process} {_peaks(peak)}" for process, peak in figures["peak_memory"].items()]
        console.print(f"peak memory, all methods together: {'; '.join(told)}", highlight=False)

    def write(self, path: Path) -> list[Path]:
        """Write ``path.json`` and ``path.png``, and return them; create folders on the way.

        Raises
        ------
        RunError
            If one cannot be written.
        """
        written = [Path(f"{path}{ending}") for ending in (".json", ".png")]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.figures, indent=1, default=str)
            written[0].write_text(f"{text}\n", encoding="utf-8")
            self._draw(written[1])
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"--out: {path} cannot be written: {reason}; choose another") from error
        return written

    def _draw(self, path: Path) -> None:
        """Draw a bar of phases for every method, and every step as a stroke above it."""
        from matplotlib.figure import Figure

        figures = self.figures
        methods = figures["methods"]
        figure = Figure(figsize=(10, 1.7 + 0.95 * len(methods)), layout="constrained")
        axes = figure.subplots()
        right = 1.6e3 * max(sum(found["phases"].values()) for found in methods.values())
        for row, (name, found) in enumerate(methods.items()):
            end = _draw_phases(axes, row, found["phases"])
            axes.annotate(f"  {_words(name, figures)}", (end, row), va="center")
            each = [1e3 * seconds for seconds in found["seconds"]["each"]]
            axes.plot(each, [row - 0.36] * len(each), "|", color="0.35", markersize=6)
            if beyond := sum(x > right for x in each):
                axes.annotate(f"{beyond} more → ", (right, row - 0.36), ha="right", va="center")
        axes.set_yticks(range(len(methods)), methods)
        axes.set(xlabel="ms a step: phases (mean of the middle half), every step as a stroke")
        axes.set(xlim=(0, right), ylim=(len(methods) - 0.5, -0.5))
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(
            loc="outside lower center",
            ncols=len(PHASES),
            frameon=False,
            fontsize=8,
        )
        figure.suptitle(_title(self.setting), fontsize=9)
        figure.savefig(path, dpi=120)


def _draw_phases(axes: Axes, row: int, phases: Mapping[str, float]) -> float:
    """Draw a method's phases one after the other; return where they end."""
    end = 0.0
    for number, (phase, title) in enumerate(PHASES.items()):
        width, label = 1e3 * phases[phase], title if row == 0 else None
        colour = "0.8" if phase == "rest" else f"C{number}"
        axes.barh(row, width, left=end, height=0.5, color=colour, label=label)
        end += width
    return end


def _title(setting: Setting) -> str:
    about = setting.about
    return (
        f"{setting.name}: {about['dataset']}, encoder {about['encoder']}, {about['clients']} "
        f"clients on {about['workers']} workers, global batch {setting.samples}, "
        f"{setting.gpu or setting.environment['devices']['server']}"
    )


def _words(name: str, figures: Mapping[str, Any]) -> str:
    median = f"{1e3 * figures['methods'][name]['seconds']['median']:.4g} ms"
    against = figures["ratios"].get(f"{name}/centralized")
    return f"{median}, {against['median']:.2f} × centralized" if against else median


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _steps_table(figures: Mapping[str, Any]) -> Table:
    title = f"Median and quartiles of {figures['steps']} steps; ratio: to centralized in the round"
    columns = ["ms", "quartiles", "samples/s", "ratio", "quartiles", "MiB up", "down"]
    table = _table(title, columns)
    for name, found in figures["methods"].items():
        seconds, sent = found["seconds"], found["bytes_per_step"]
        ratio = figures["ratios"].get(f"{name}/centralized")
        table.add_row(
            name,
            *_middle(
                {key: 1e3 * seconds[key] for key in _MIDDLE}, 1 if seconds["median"] < 1 else 0
            ),
            f"{found['samples_per_second']:,.0f}",
            *(_middle(ratio, 2) if ratio else ("", "")),
            f"{sent['up'] / _MIB:.2f}",
            f"{sent['down'] / _MIB:.2f}",
        )
    return table


def _rate(name: str, found: Mapping[str, Any]) -> str:
    share = found.get("share_of_bf16_peak")
    of_peak = f", {share:.1%} of the bf16 peak" if share else ""
    return f"{name} {found['flop_per_second'] / 1e12:.3g} TFLOP/s{of_peak}"


def _middle(values: Mapping[str, float], places: int) -> tuple[str, str]:
    """Return the median, and the quartiles."""
    median, lower, upper = (f"{values[key]:.{places}f}" for key in _MIDDLE)
    return median, f"{lower}–{upper}"


def _phases_table(methods: Mapping[str, Any]) -> Table:
    table = _table("Phases, ms: mean of the middle half of the steps", list(PHASES))
    for name, found in methods.items():
        table.add_row(name, *(f"{1e3 * found['phases'][phase]:.1f}" for phase in PHASES))
    return table


def _peaks(peak: Mapping[str, int]) -> str:
    return ", ".join(f"{count / _MIB:,.0f} MiB {where}" for where, count in peak.items())
