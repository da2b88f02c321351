"""``mpsl_dist cost CONFIG``: parameters, FLOPs, bytes and memory of every method before any run.

Needs no weights and, but for the user's own datasets, no data. What each figure counts is said in
``docs/cost.md``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from mpsl_dist.actors.choices import clients_own_head, writes_captions
from mpsl_dist.actors.cut_cache import limit_of
from mpsl_dist.analysis import flops, mlecs_compute, mlecs_cost, traffic_model, unimodal
from mpsl_dist.analysis.cost_inputs import Inputs, inputs_of
from mpsl_dist.analysis.flops import CONNECTOR, HEAD, NORM, Flops, ModelParts
from mpsl_dist.config import ConfigError, Experiment
from mpsl_dist.config import Optimizer as OptimizerSettings
from mpsl_dist.config.methods import METHODS, facts_of
from mpsl_dist.models.connector import Connected

TOWER = "text tower"
WITH_TOWER = f"total with {TOWER}"


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes
    ----------
    section : str
        ``parameters``, ``flops``, ``bytes_per_sample``, ``bytes_per_epoch`` or ``memory``.
    method : str
        A key of :data:`mpsl_dist.config.methods.METHODS`.
    owner : "client", "server" or "worker"
        A worker hosts ``clients_per_worker`` clients.
    part : str
        What of the owner, ``total`` for all of it.
    quantity : str
        Which count of the part: ``all`` or ``trainable`` parameters; ``forward``, ``training`` or
        ``paper`` FLOPs; bytes ``up`` or ``down``; ``peak`` memory.
    value : float
        In ``unit``.
    unit : str
        ``parameters``, ``FLOP per sample`` or ``bytes``.
    """

    section: str
    method: str
    owner: str
    part: str
    quantity: str
    value: float
    unit: str


@dataclass(frozen=True)
class Cost:
    """All figures of an experiment, every method beside every other."""

    experiment: Experiment
    inputs: Inputs
    rows: tuple[Row, ...]

    def value(self, section: str, method: str, owner: str, part: str, quantity: str) -> float:
        """Return one figure.

        Raises
        ------
        KeyError
            If there is no such row.
        """
        key = (section, method, owner, part, quantity)
        for row in self.rows:
            if (row.section, row.method, row.owner, row.part, row.quantity) == key:
                return row.value
        raise KeyError(key)

    def save(self, path: Path) -> None:
        """Write all rows as .json or .csv, by the path's ending; create folders on the way."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(row) for row in self.rows]
        if path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            return
        head = {"name": self.experiment.name, "about": about(self.experiment, self.inputs)}
        path.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


def check_out(path: Path | None) -> None:
    """Refuse a kind of file that :meth:`Cost.save` does not write.

    Raises
    ------
    ConfigError
        If the path ends in neither .json nor .csv.
    """
    if path is not None and path.suffix not in (".json", ".csv"):
        raise ConfigError(f"--out: {path} must end in .json or .csv")


def about(experiment: Experiment, inputs: Inputs) -> dict[str, object]:
    """Return what the figures are of: dataset, shapes, encoder, clients, batch, by name."""
    encoder, batch = experiment.model.encoder, experiment.training.batch_size
    return {
        "dataset": experiment.data.name,
        "shapes": {name: list(shape) for name, shape in inputs.shapes.items()},
        "classes": inputs.classes,
        "train_samples": inputs.train,
        "sample": inputs.unit,
        "steps_per_epoch": _steps(experiment, inputs),
        "encoder": encoder.size,
        "trainable_blocks": encoder.trainable_blocks,
        "fusion": experiment.model.fusion,
        "text": experiment.model.text,
        "clients": experiment.clients,
        "batch_size": batch,
    }


def _steps(experiment: Experiment, inputs: Inputs) -> str:
    """Say how many steps an epoch has if all clients hold equally many samples."""
    if not inputs.retrieval:
        return f"{len(traffic_model.equal_plan(experiment, inputs.train)):,}"
    steps = {
        unit: len(traffic_model.equal_plan(experiment, inputs.in_unit(unit).train))
        for unit in ("pair", "picture")
    }
    return f"{steps['pair']:,} of pairs, {steps['picture']:,} of pictures"


def cost_of(experiment: Experiment, inputs: Inputs | None = None) -> Cost:
    """Return every method's figures for an experiment; its own ``method`` matters to m2fedsa alone,
    whose clients are not everybody's: its rows are there where it is the experiment's own.

    Parameters
    ----------
    experiment : Experiment
    inputs : Inputs, optional
        The dataset's shapes and sizes, by default :func:`inputs_of` the experiment.
    """
    inputs = inputs or inputs_of(experiment)
    # All methods train one and the same model, but for those that freeze its encoder and add
    # adapters; and it is cut in two ways.
    language = experiment.model.encoder.kind == "lm"  # which has no adapters
    # What has models of its own is counted for itself alone.
    shown = [
        m
        for m, facts in METHODS.items()
        if facts.common
        and (not facts.unimodal or m == experiment.method)
        and not (language and facts.adapted)
    ]
    each = {method: replace(experiment, method=method) for method in shown}
    kinds = {
        m: (METHODS[m].adapted, METHODS[m].unimodal, clients_own_head(own))
        for m, own in each.items()
    }
    by_kind = {kind: each[method] for method, kind in kinds.items()}
    measured = {kind: Measured(flops.build(own, inputs)) for kind, own in by_kind.items()}
    rows: list[Row] = []
    for method, own in each.items():
        of = measured[kinds[method]]
        parts = replace(of.parts, experiment=own)
        rows += _parameters(method, parts)
        rows += _flops(method, of.client, of.server)
        if inputs.retrieval:
            rows += _rows_of_other_unit(method, parts)
        rows += _bytes(method, parts)
        if not METHODS[method].unimodal:
            rows += _memory(method, parts, of)
    if experiment.method == "mlecs":
        rows += _edge_rows(experiment, inputs)
    return Cost(experiment, inputs, tuple(rows))


def _edge_rows(experiment: Experiment, inputs: Inputs) -> Iterator[Row]:
    """Yield what ML-ECS trains, and the bytes of a round, of a device that has every modality."""
    if writes_captions(experiment):  # the text is no input then
        shapes = {name: shape for name, shape in inputs.shapes.items() if name != "text"}
        inputs = replace(inputs, shapes=shapes)
    numbers = mlecs_cost.trained_numbers(experiment, inputs)
    for owner in ("client", "server"):
        own = {part: value for (of, part), value in numbers.items() if of == owner}
        for part, value in (own | {"total": sum(own.values())}).items():
            yield Row("parameters", "mlecs", owner, part, "trainable", value, "parameters")
    totals = {"up": 0, "down": 0}
    for kind, value in mlecs_cost.round_bytes(experiment, inputs, 0, [*inputs.shapes]).items():
        way = traffic_model.direction(kind)
        totals[way] += value
        yield Row("bytes_per_epoch", "mlecs", "client", kind, way, value, "bytes")
    for way, value in totals.items():
        yield Row("bytes_per_epoch", "mlecs", "client", "total", way, value, "bytes")
    if mlecs_compute.countable(experiment):
        yield from _edge_compute(experiment, inputs)


def _edge_compute(experiment: Experiment, inputs: Inputs) -> Iterator[Row]:
    """Yield the operations and the memory of ML-ECS' models."""
    models = mlecs_compute.build(experiment, inputs)
    for owner, counted in mlecs_compute.operations(models).items():
        named = {
            name if name in (TOWER, CONNECTOR) or "model" in name else f"tokenize {name}": value
            for name, value in counted.items()
        }
        for name, value in mlecs_compute.totals(named, TOWER):
            yield from _flop_rows("mlecs", owner, name, value)
    batch = experiment.training.batch_size // experiment.clients
    for owner, items in mlecs_compute.memory(models, batch).items():
        for part, value in (items | {"total": sum(items.values())}).items():
            yield Row("memory", "mlecs", owner, part, "peak", value, "bytes")


class Measured:
    """What was counted of a model, each thing once.

    Parameters
    ----------
    parts : ModelParts
    """

    def __init__(self, parts: ModelParts) -> None:
        self.parts = parts
        counted = unimodal if facts_of(parts.experiment).unimodal else flops
        self.client = counted.count_client(parts)
        self.server = counted.count_server(parts)
        self._kept: dict[tuple[str, int], int] = {}

    def kept(self, part: str, batch: int) -> int:
        """Return the bytes that a part keeps for the backward of ``batch`` samples."""
        if (part, batch) not in self._kept:
            count = flops.kept_by_client if part == "client" else flops.kept_by_server
            self._kept[part, batch] = count(self.parts, batch)
        return self._kept[part, batch]


def owner_of(method: str, part: str) -> str:
    """Return who runs the ``client`` or ``server`` part of the model under a method."""
    facts = METHODS[method]
    return facts.tokenizers if part == "client" else facts.server_model


def _parameters(method: str, parts: ModelParts) -> Iterator[Row]:
    tokenizers, model = parts.tokenizers, parts.server_model
    own = {**tokenizers.by_modality, "pre-norm": tokenizers.pre_norm}
    if isinstance(tokenizers, Connected):
        own[CONNECTOR] = nn.ModuleList([tokenizers.encoders, tokenizers.connector])
    if any(True for _ in tokenizers.head.parameters()):
        own[HEAD] = tokenizers.head
    modules = {("client", name): module for name, module in own.items()} | {
        ("server", name): module
        for name, module in model.named_children()
        if any(True for _ in module.parameters())
    }
    counted = flops.parameters({f"{owner}/{name}": m for (owner, name), m in modules.items()})
    totals: dict[str, list[int]] = {}
    for key, numbers in counted.items():
        part, name = key.split("/")
        owner = owner_of(method, part)
        sums = totals.setdefault(owner, [0, 0])
        for index, (quantity, value) in enumerate(zip(("all", "trainable"), numbers, strict=True)):
            sums[index] += value
            yield Row("parameters", method, owner, name, quantity, value, "parameters")
    for owner, sums in totals.items():
        for quantity, value in zip(("all", "trainable"), sums, strict=True):
            yield Row("parameters", method, owner, "total", quantity, value, "parameters")


def _flops(method: str, client: dict[str, Flops], server: dict[str, Flops]) -> Iterator[Row]:
    named = {"client": {}, "server": {}}
    for name, value in client.items():
        plain = name in (TOWER, CONNECTOR, HEAD)
        named["client"][name if plain else f"tokenize {name}"] = value
    for name, value in server.items():
        named["server"][name if name in (HEAD, NORM) else f"encode {name}"] = value
    totals: dict[tuple[str, str], Flops] = {}
    for part, counted in named.items():
        owner = owner_of(method, part)
        for name, value in counted.items():
            yield from _flop_rows(method, owner, name, value)
            for total in ("total", WITH_TOWER) if name != TOWER else (WITH_TOWER,):
                totals[owner, total] = totals.get((owner, total), Flops()) + value
    for (owner, total), value in totals.items():
        if total == "total" or (TOWER in client and owner == owner_of(method, "client")):
            yield from _flop_rows(method, owner, total, value)


def _rows_of_other_unit(method: str, parts: ModelParts) -> Iterator[Row]:
    """Yield retrieval's totals in the other unit: a pair, or a picture with all its captions."""
    inputs = parts.inputs.in_unit("picture" if parts.inputs.captions == 1 else "pair")
    other, kept = replace(parts, inputs=inputs), ("total", "activations", "cut_layer_gradients")
    of = inputs.unit.removeprefix("a ")
    counted = _flops(method, flops.count_client(other), flops.count_server(other))
    for row in (*counted, *_bytes(method, other)):
        if row.part.startswith(kept) and (row.section != "bytes_per_epoch" or row.part == "total"):
            yield replace(row, part=f"{row.part}, {of}")


def _flop_rows(method: str, owner: str, part: str, value: Flops) -> Iterator[Row]:
    for quantity in ("forward", "training", "paper"):
        number = getattr(value, quantity)
        yield Row("flops", method, owner, part, quantity, number, "FLOP per sample")


def _bytes(method: str, parts: ModelParts) -> Iterator[Row]:
    if METHODS[method].one_process:
        return
    if METHODS[method].split:
        each = unimodal if METHODS[method].unimodal else traffic_model
        for kind, value in each.per_sample(parts).items():
            direction = traffic_model.direction(kind)
            yield Row("bytes_per_sample", method, "client", kind, direction, value, "bytes")
    totals = {"up": 0.0, "down": 0.0}
    for kind, value in traffic_model.per_epoch(parts).items():
        direction = traffic_model.direction(kind)
        totals[direction] += value
        yield Row("bytes_per_epoch", method, "client", kind, direction, value, "bytes")
    for direction, value in totals.items():
        yield Row("bytes_per_epoch", method, "client", "total", direction, value, "bytes")


def _memory(method: str, parts: ModelParts, of: Measured) -> Iterator[Row]:
    experiment = parts.experiment
    batch = min(experiment.training.batch_size, parts.inputs.train)
    own = -(-batch // experiment.clients)
    client = _held(parts, "client", experiment.training.client)
    server = _held(parts, "server", experiment.training.server)
    facts = METHODS[method]
    if facts.split:
        cut = sum(parts.tokenizers.lengths) * parts.width * parts.bytes_per_number
        if facts.backwards == "per client":  # each leaves gradients of its own
            server["gradients"] *= experiment.clients
        client["kept for backward"] = of.kept("client", own)
        client["cut layer and its gradient"] = 2 * own * cut
        server["kept for backward"] = of.kept("server", batch)
        server["cut layer and its gradient"] = 2 * batch * cut
        if experiment.wire.cache:
            server["cached activations"] = _cached(experiment, parts.inputs.train * cut)
        owners = {"client": client, "server": server, "worker": _hosted(parts, client)}
    else:
        whole = {name: client[name] + server[name] for name in client}
        size = batch if facts.one_process else experiment.federated.batch_size or own
        whole["kept for backward"] = of.kept("client", size) + of.kept("server", size)
        owners = {owner_of(method, "client"): whole}
        if not (facts.one_process or facts.alone):
            owners["server"] = _averaging(parts, whole["parameters"])
    for owner, items in owners.items():
        for part, value in (items | {"total": sum(items.values())}).items():
            yield Row("memory", method, owner, part, "peak", value, "bytes")


def _hosted(parts: ModelParts, client: dict[str, int]) -> dict[str, int]:
    """Return the memory in bytes of a worker's clients, which share what is frozen."""
    count = min(parts.experiment.clients_per_worker, parts.experiment.clients)
    frozen = client["parameters"] - traffic_model.trained_bytes(parts, "client")
    own = sum(client.values()) - frozen
    return {"frozen, once": frozen, f"clients' own, {count} times": count * own}


def _cached(experiment: Experiment, everything: int) -> int:
    limit = limit_of(experiment)
    return everything if limit is None else min(limit, everything)


def _averaging(parts: ModelParts, model: int) -> dict[str, int]:
    """Return a federated server's memory in bytes: its model, and all updates at once."""
    trained = sum(traffic_model.trained_bytes(parts, part) for part in ("client", "server"))
    drawn = max(1, round(parts.experiment.federated.fraction * parts.experiment.clients))
    return {"parameters": model, "updates": drawn * trained}


def _held(parts: ModelParts, part: str, settings: OptimizerSettings) -> dict[str, int]:
    """Return the bytes that lie in memory whatever the batch."""
    module = parts.tokenizers if part == "client" else parts.server_model
    trained = traffic_model.trained_bytes(parts, part)
    return {
        "parameters": sum(p.numel() for p in module.parameters()) * parts.bytes_per_number,
        "gradients": trained,
        "optimizer": flops.moments(settings) * trained,
    }


def share(cost: Cost, with_tower: bool = False) -> float:
    """Return the ratio of the encoder's forward FLOPs to a client's, under MPSL."""
    rows = [r for r in cost.rows if (r.section, r.method) == ("flops", "mpsl")]
    encoder = sum(r.value for r in rows if r.part[:7] == "encode " and r.quantity == "forward")
    total = WITH_TOWER if with_tower else "total"
    return encoder / cost.value("flops", "mpsl", "client", total, "forward")
