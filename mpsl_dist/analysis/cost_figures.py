"""Cost against the encoder's size, Ti to H: the paper's figure 3 with every method, and shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mpsl_dist.analysis import flops, traffic_model
from mpsl_dist.analysis.cost import TOWER
from mpsl_dist.analysis.cost_inputs import Inputs, inputs_of
from mpsl_dist.config import Encoder, Experiment
from mpsl_dist.models.server_model import SIZES

#: Image patches of the paper's encoders, in pixels.
_PATCH = {"Ti": 16, "S": 16, "B": 16, "L": 14, "H": 14}
_METHODS = ("mpsl", "fedavg", "fedclip")
_COLOURS = {"mpsl": "#1b6ca8", "fedavg": "#d1495b", "fedclip": "#8d96a3"}
_NAMES = {"mpsl": "MPSL", "fedavg": "FedAvg", "fedclip": "FedCLIP"}


@dataclass(frozen=True)
class Point:
    """One size of the encoder.

    Attributes
    ----------
    size : str
        A key of :data:`mpsl_dist.models.server_model.SIZES`.
    sent : dict of str to float
        Method -> bytes per client and epoch, both ways.
    client, tower, encoder : int
        Forward FLOPs per sample: tokenizers, frozen text tower, encoder.
    """

    size: str
    sent: dict[str, float]
    client: int
    tower: int
    encoder: int


def draw(experiment: Experiment, folder: Path) -> list[Path]:
    """Draw both figures into a folder, created if need be, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    points = [_point(experiment, size) for size in SIZES]
    traffic, share = folder / "cost_traffic.png", folder / "cost_share.png"
    _draw_traffic(experiment, inputs_of(experiment), points, traffic)
    _draw_share(experiment, points, share)
    return [traffic, share]


def resized(experiment: Experiment, size: str) -> Experiment:
    """Return the experiment with an encoder of this size, the latter half of its blocks trained."""
    model, shapes = experiment.model, inputs_of(experiment).shapes
    patch = _PATCH[size] if shapes.get("image", (3, 1))[1] % 112 == 0 else model.image_patch
    encoder = Encoder(size, trainable_blocks=SIZES[size][1] // 2)
    return replace(experiment, model=replace(model, encoder=encoder, image_patch=patch))


def _point(experiment: Experiment, size: str) -> Point:
    at, inputs = resized(experiment, size), inputs_of(experiment)
    parts = flops.build(replace(at, method="mpsl"), inputs)
    adapted = flops.build(replace(at, method="fedclip"), inputs)
    sent = {}
    for method in _METHODS:
        built = adapted if method == "fedclip" else parts
        asked = replace(built, experiment=replace(at, method=method))
        sent[method] = sum(traffic_model.per_epoch(asked).values())
    client, server = flops.count_client(parts), flops.count_server(parts)
    tower = client.pop(TOWER, flops.Flops()).forward
    encoder = sum(value.forward for name, value in server.items() if name != "head")
    return Point(size, sent, sum(value.forward for value in client.values()), tower, encoder)


def _draw_traffic(experiment: Experiment, inputs: Inputs, points: list[Point], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for method in _METHODS:
        values = [point.sent[method] / 2**20 for point in points]
        label, colour = _NAMES[method], _COLOURS[method]
        axes.plot([p.size for p in points], values, marker="o", color=colour, label=label)
        for index, value in enumerate(values):
            above = method == "mpsl" and value >= points[index].sent["fedavg"] / 2**20
            above = above or (method != "mpsl" and value >= points[index].sent["mpsl"] / 2**20)
            axes.annotate(
                f"{value:,.0f}",
                (index, value),
                (0, 7 if above else -14),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=colour,
            )
    axes.set(yscale="log", xlabel="encoder (ViT), latter half of its blocks trained")
    axes.set(ylabel="MiB per client and epoch, both ways")
    axes.margins(y=0.15)
    axes.grid(axis="y", color="0.92")
    axes.legend(frameon=False)
    each = inputs.train // experiment.clients
    title = f"{experiment.data.name}: {experiment.clients} clients of {each:,} samples"
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=130)


def _draw_share(experiment: Experiment, points: list[Point], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    bars = {"client: tokenizers": "client", "server: encoder": "encoder"}
    if points[0].tower:
        bars = {"client: frozen text tower, first epoch": "tower", **bars}
    width = 0.8 / len(bars)
    colours = {"tower": "#9cc3e0", "client": _COLOURS["mpsl"], "encoder": "0.55"}
    for number, (label, name) in enumerate(bars.items()):
        centres = [index + (number - (len(bars) - 1) / 2) * width for index in range(len(points))]
        values = [getattr(point, name) / 1e9 for point in points]
        drawn = axes.bar(centres, values, width, label=label, color=colours[name])
        if name != "encoder":
            parts = [_fraction(getattr(point, name) / point.encoder) for point in points]
            axes.bar_label(drawn, parts, fontsize=7, padding=1)
    axes.set_xticks(range(len(points)), [point.size for point in points])
    axes.set(yscale="log", xlabel="encoder (ViT)", ylabel="forward GFLOPs per sample")
    axes.margins(y=0.2)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    title = f"{experiment.data.name}: a client's part, as a fraction of the encoder's"
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=130)


def _fraction(value: float) -> str:
    return f"1/{1 / value:.0f}" if value < 0.5 else f"{value:.1f} x"
