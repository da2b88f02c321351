"""``mpsl_dist bench CONFIG``: steps of several methods in turns, in one world.

What a figure counts is said in ``docs/performance.md``.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mpsl_dist.actors.choices import describe, device_of
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.actors.part_checks import refusals_without_data
from mpsl_dist.analysis import flops
from mpsl_dist.analysis.bench_report import Report, Setting
from mpsl_dist.analysis.cost import TOWER, about
from mpsl_dist.analysis.cost_inputs import Inputs
from mpsl_dist.analysis.stopwatch import Timed, Turn, build_timed_clients, peak_memory
from mpsl_dist.config import Experiment
from mpsl_dist.config.methods import processes_of
from mpsl_dist.errors import ConfigError
from mpsl_dist.methods import centralized, mpsl, processes, psl
from mpsl_dist.methods.hosting import Setup
from mpsl_dist.methods.method import Method
from mpsl_dist.records.run_directory import environment_of
from mpsl_dist.runtime import launch, network, world
from mpsl_dist.runtime.environment import Environment

#: What can be compared, with their clients on the watch: one model, one global batch.
METHODS: dict[str, Callable[[Setup], Method]] = {
    "mpsl": partial(mpsl.build, clients=build_timed_clients),
    "psl": partial(mpsl.build, method=psl.Psl, clients=build_timed_clients),
    "centralized": centralized.build,
}
#: Rounds of turns before the first that counts: optimizers and allocators make room in them.
WARM_UP = 3
#: Seconds between two lines of progress.
_INTERVAL = 10.0


@dataclass(frozen=True)
class Bench:
    """What is to be measured.

    Attributes
    ----------
    experiments : dict of str to Experiment
        By method.
    steps : int
        Steps of every method that count.
    out : Path
        Where ``.json`` and ``.png`` are written, without the ending.
    """

    experiments: dict[str, Experiment]
    steps: int
    out: Path

    @classmethod
    def asked(
        cls, experiment: Experiment, steps: int, methods: str, out: str, overwrite: bool
    ) -> Bench:
        """Return what a command line asks for.

        Parameters
        ----------
        experiment : Experiment
            Its own ``method`` does not matter.
        methods : str
            Names with commas between.
        out : str
            A folder.
        overwrite : bool
            Whether an earlier bench's files there may be replaced.

        Raises
        ------
        ConfigError
            With every refusal, one a line.
        """
        names, path = methods.split(","), Path(out) / f"bench-{experiment.name}"
        refusals = [*_refused_options(steps, names), *_refused_files(path, overwrite)]
        if experiment.data.place == "own":
            refusals.append("data.place: own has no pooled data; bench with data.place=simulated")
        if refusals:
            raise ConfigError("\n".join(refusals))
        # Whoever is lost ends it: nobody is waited for, and no process stands by.
        alone = replace(experiment, faults=replace(experiment.faults, on_loss="stop"))
        return cls({name: replace(alone, method=name) for name in names}, steps, path)

    @property
    def lead(self) -> Experiment:
        """The experiment that needs the most processes."""
        return max(self.experiments.values(), key=processes_of)

    @property
    def ranks(self) -> int:
        """Processes that all methods together need."""
        return processes_of(self.lead)

    def start(self, command: Sequence[str]) -> int:
        """Start every process on this machine; return the exit status.

        Parameters
        ----------
        command : sequence of str
            What every rank gives to Python.

        Raises
        ------
        UserError
            If something can be refused before.
        """
        chosen = self.lead.runtime.interface or os.environ.get("TP_SOCKET_IFNAME")
        if chosen:
            network.existing_interface(chosen, "runtime.interface or TP_SOCKET_IFNAME")
        launch.check_room(self.ranks)
        if refused := refusals_without_data(self.lead):
            raise ConfigError("\n".join(refused))
        return launch.run(self.ranks, command, self.lead.faults.exit_timeout, chosen)

    def run(self, launched: Environment) -> None:
        """Measure as the server, show the figures and write them.

        Raises
        ------
        UserError
            If the data cannot be had, or a file cannot be written.
        RemoteError
            If a worker is lost.
        """
        holdings = processes.checked_data(self.lead)
        joined = processes.join(self.lead, launched) if launched.world > 1 else None
        # Workers log where the run directory would be.
        with tempfile.TemporaryDirectory(prefix="mpsl_dist-bench-") as folder:
            timed = {
                name: connect(replace(experiment, output=folder), launched, holdings)
                for name, experiment in self.experiments.items()
            }
            turns = measure(timed, self.steps)
            memory = _memory(timed)
            setting = self._setting(launched, timed, holdings)
        if joined:
            joined.dismiss()
        report = Report(setting, turns, memory)
        report.show()
        for path in report.write(self.out):
            print(f"wrote {path}")

    def _setting(
        self, launched: Environment, timed: Mapping[str, Timed], holdings: Holdings
    ) -> Setting:
        one, splits = next(iter(timed.values())), holdings.splits
        sizes = len(splits.train.labels), len(splits.test.labels)
        inputs = Inputs(splits.shapes, len(splits.classes), *sizes)
        device = one.watch.device
        devices, placement = {world.SERVER: describe(str(device))}, {}
        if links := [one.method.clients for one in timed.values() if one.method.clients]:
            devices, placement = devices | links[0].fleet.devices, links[0].fleet.hosted
        return Setting(
            self.lead.name,
            about(self.lead, inputs) | {"workers": launched.world - 1},
            environment_of(launched.world, devices, placement),
            torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            _full_steps(one.method)[1],
            _flop(self.lead, inputs),
            WARM_UP,
        )


def _refused_options(steps: int, names: Sequence[str]) -> Iterator[str]:
    known = ", ".join(METHODS)
    for name in names:
        if name not in METHODS:
            yield f"--methods: expected some of {known}, found '{name}'"
    if len(set(names)) < len(names):
        yield f"--methods: name each once, found {','.join(names)}"
    if steps < 1:
        yield f"--steps: must be at least 1, found {steps}"


def _refused_files(path: Path, overwrite: bool) -> Iterator[str]:
    """Yield what stands in the way of ``path.json`` and ``path.png``."""
    if path.parent.exists() and not path.parent.is_dir():
        yield f"--out: {path.parent} is no folder"
    for file in (Path(f"{path}.json"), Path(f"{path}.png")):
        if file.exists() and not overwrite:
            yield f"{file} exists: choose another --out or name=..., or replace it with --overwrite"


def connect(experiment: Experiment, launched: Environment, holdings: Holdings) -> Timed:
    """Build a method with a watch around it."""
    build = METHODS[experiment.method]
    method = processes.connect(experiment, launched, holdings, build=build)
    return Timed(method, device_of(experiment))


def measure(timed: Mapping[str, Timed], steps: int) -> dict[str, list[Turn]]:
    """Train step by step in turns, in every order alike, and return what was measured.

    A round is the same step of every method. Steps whose global batch is not full are left out, and
    so is what happens between two epochs.
    """
    methods = {name: one.method for name, one in timed.items()}
    plans = [method.plan for method in methods.values()]
    assert all(np.array_equal(plan, plans[0]) for plan in plans), "the methods share no batches"
    orders = itertools.cycle(itertools.permutations(timed))
    turns: dict[str, list[Turn]] = {name: [] for name in timed}
    started = spoke = time.perf_counter()
    total, at = WARM_UP + steps, _steps(methods)
    print(f"{total} rounds of {', '.join(timed)}", flush=True)
    for done in range(total):
        epoch_step, number = next(at)
        for name in next(orders):
            turns[name].append(timed[name].turn(epoch_step, number))
        now = time.perf_counter()
        if now - spoke >= _INTERVAL:
            spoke, left = now, (now - started) / (done + 1) * (total - done - 1)
            print(f"round {done + 1} of {total}, {left:.0f} s left", flush=True)
    return {name: taken[WARM_UP:] for name, taken in turns.items()}


def _steps(methods: Mapping[str, Method]) -> Iterator[tuple[int, int]]:
    """Yield full steps, of the epoch and of the run, having begun each epoch."""
    first = next(iter(methods.values()))
    for epoch in itertools.count():
        for method in methods.values():
            method.begin_epoch(epoch)
        for epoch_step in _full_steps(first)[0]:
            yield epoch_step, epoch * len(first.plan) + epoch_step


def _full_steps(method: Method) -> tuple[list[int], int]:
    """Return the steps of an epoch whose global batch is full, and how many samples that is."""
    samples = method.plan.sum(1)
    return np.flatnonzero(samples == samples.max()).tolist(), int(samples.max())


def _memory(timed: Mapping[str, Timed]) -> dict[str, dict[str, int]]:
    """Return every process's peak memory in bytes."""
    found: dict[str, dict[str, int]] = {}
    for one in timed.values():
        link = one.method.clients
        if link:
            first = {hosted[0]: worker for worker, hosted in link.fleet.hosted.items()}
            told = link.start("peak_memory", dict.fromkeys(first, ()), "the end")()
            found |= {first[client]: peak for client, peak in told.items()}
    workers = sorted(found, key=lambda name: (len(name), name))
    return {world.SERVER: peak_memory()} | {name: found[name] for name in workers}


def _flop(experiment: Experiment, inputs: Inputs) -> int | None:
    """Return a sample's FLOPs of forward and backward, without a frozen text tower's."""
    try:
        parts = flops.build(experiment, inputs)
    except ConfigError:  # a plugin's part cannot be built on shapes alone
        return None
    client = flops.count_client(parts)
    server = flops.count_server(parts).values()
    own = [count for name, count in client.items() if name != TOWER]
    return sum(count.training for count in (*own, *server))
