"""The training loop that every method shares: epochs, tests, checkpoints, records, progress."""

from __future__ import annotations

import logging
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.config import Experiment
from mpsl_dist.data import Splits
from mpsl_dist.methods.progress import Progress
from mpsl_dist.records import checkpoint
from mpsl_dist.records.checkpoint import Manifest
from mpsl_dist.records.run_directory import RunDirectory, RunError
from mpsl_dist.records.traffic import Traffic
from mpsl_dist.runtime.process import StopRequest

_log = logging.getLogger("mpsl_dist")


class Method(Protocol):
    """What the loop asks of a method.

    A method with workers also has ``clients``, its :class:`mpsl_dist.methods.link.Link`.
    """

    #: (steps, clients): samples of every client in every step of an epoch.
    plan: NDArray[np.int64]
    traffic: Traffic
    #: Clients that were lost on the way, and steps that were begun again without a client.
    lost: set[int]
    repeated: int

    def begin_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Lay out the epoch's mini-batches, from ``first_step`` on."""
        ...

    def step(self, epoch_step: int, step: int) -> float | None:
        """Train one step; returns the global loss, None where no client was left to take part."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Test, and return metric name -> fraction."""
        ...

    def save(self, folder: str) -> None:
        """Write all state into a folder, on every process its own."""
        ...

    def restore(self, folder: str) -> None:
        """Continue from :meth:`save`."""
        ...

    def deployable(self) -> Deployable:
        """Return the model to deploy."""
        ...

    def trainable_parameters(self) -> dict[str, int]:
        """Return how many parameters one ``client`` and the ``server`` train."""
        ...


@dataclass
class _Position:
    """Where the run stands: steps and epochs done, seconds, the last loss and test."""

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    seconds: float = 0.0
    loss: float | None = None
    test: dict[str, float] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)


def train(
    experiment: Experiment, splits: Splits, method: Method, run: RunDirectory, stop: StopRequest
) -> dict[str, Any]:
    """Train to the end, or until asked to stop, and return what ``summary.json`` holds.

    A run directory with a complete checkpoint is continued from it, bit for bit.

    Raises
    ------
    RunError
        If a checkpoint or the metrics of the run directory do not fit this run.
    """
    at = _resume(experiment, method, run)
    started = time.perf_counter() - at.seconds
    steps, epochs = len(method.plan), experiment.training.epochs
    samples = int(method.plan.sum())
    with Progress(epochs * steps, at.step, samples / steps) as progress:
        while at.epoch < epochs and not stop:
            method.begin_epoch(at.epoch, at.epoch_step)
            while at.epoch_step < steps and not stop:
                _one_step(method, run, at, progress)
                at.seconds = time.perf_counter() - started
                if _due_within(experiment, at, steps):
                    _save(experiment, method, run, at)
            if at.epoch_step == steps:
                _test(method, run, at, progress)
                at.epoch, at.epoch_step = at.epoch + 1, 0
                at.seconds = time.perf_counter() - started
                if _due_after(experiment, at) and not stop:
                    _save(experiment, method, run, at)
        if stop:
            _save(experiment, method, run, at)
    status = "completed" if at.epoch == epochs else "stopped"
    if status == "completed":
        method.deployable().save(run.path / "model", experiment, splits)
    at.seconds = time.perf_counter() - started
    summary = summarize(experiment, splits, method, at, status)
    run.write_json("summary", summary)
    return summary


def _resume(experiment: Experiment, method: Method, run: RunDirectory) -> _Position:
    found = checkpoint.latest(run.checkpoints)
    if found is None:
        run.forget_after(-1)
        return _Position()
    folder, manifest = found
    if manifest.clients != experiment.clients:
        raise RunError(f"{folder}: made with {manifest.clients} clients")
    method.restore(str(folder))
    method.traffic.load(manifest.traffic)
    run.forget_after(manifest.step)
    at = _Position(manifest.step, manifest.epoch, manifest.epoch_step, manifest.seconds)
    for line in run.metrics():
        if line["split"] == "test":
            at.test = line["metric"]
        else:
            at.loss = line["loss"]
            at.step_seconds.append(line["seconds"])
    _log.info("resumed at step %d, epoch %d, from %s", at.step, at.epoch, folder)
    return at


def _one_step(method: Method, run: RunDirectory, at: _Position, progress: Progress) -> None:
    before = method.traffic.totals()
    started = time.perf_counter()
    loss = method.step(at.epoch_step, at.step)
    at.loss = at.loss if loss is None else loss
    seconds = time.perf_counter() - started
    at.step, at.epoch_step = at.step + 1, at.epoch_step + 1
    at.step_seconds.append(seconds)
    run.append_metrics(
        step=at.step,
        epoch=at.epoch,
        split="train",
        loss=loss,
        metric={},
        clients_lost=len(method.lost),
        steps_repeated=method.repeated,
        seconds=round(seconds, 6),
        bytes=method.traffic.since(before),
    )
    progress.advance(at.loss)


def _test(method: Method, run: RunDirectory, at: _Position, progress: Progress) -> None:
    before = method.traffic.totals()
    started = time.perf_counter()
    at.test = method.evaluate()
    run.append_metrics(
        step=at.step,
        epoch=at.epoch,
        split="test",
        loss=None,
        metric=at.test,
        seconds=round(time.perf_counter() - started, 6),
        bytes=method.traffic.since(before),
    )
    progress.tested(at.epoch, at.test)
    _log.info("epoch %d, step %d: loss %s, test %s", at.epoch, at.step, at.loss, at.test)


def _due_within(experiment: Experiment, at: _Position, steps: int) -> bool:
    every = experiment.checkpoint.every_steps
    return bool(every) and at.step % every == 0 and at.epoch_step < steps


def _due_after(experiment: Experiment, at: _Position) -> bool:
    rules = experiment.checkpoint
    by_epoch = rules.every_epochs and at.epoch % rules.every_epochs == 0
    by_step = rules.every_steps and at.step % rules.every_steps == 0
    return bool(by_epoch or by_step or at.epoch == experiment.training.epochs)


def _save(experiment: Experiment, method: Method, run: RunDirectory, at: _Position) -> None:
    folder = checkpoint.folder_of(run.checkpoints, at.step)
    method.save(str(folder.absolute()))
    manifest = Manifest(
        at.step,
        at.epoch,
        at.epoch_step,
        experiment.clients,
        at.seconds,
        method.traffic.by_kind(),
    )
    checkpoint.complete(run.checkpoints, manifest, experiment.checkpoint.keep)
    _log.info("checkpoint at step %d", at.step)


def summarize(
    experiment: Experiment, splits: Splits, method: Method, at: _Position, status: str
) -> dict[str, Any]:
    """Return what ``summary.json`` holds of a run that has ended with this status."""
    epochs = at.step / len(method.plan)
    per = experiment.clients * epochs if epochs else 1
    return {
        "name": experiment.name,
        "method": experiment.method,
        "dataset": experiment.data.name,
        "seed": experiment.seed,
        "clients": experiment.clients,
        "epochs_completed": at.epoch,
        "steps_completed": at.step,
        "loss": at.loss,
        "test": at.test,
        "baselines": dict(splits.baselines),
        "trainable_parameters": method.trainable_parameters(),
        "communication": {
            "up_bytes_per_client_per_epoch": method.traffic.total("up", "training") / per,
            "down_bytes_per_client_per_epoch": method.traffic.total("down", "training") / per,
            "bytes_by_phase": method.traffic.by_phase(),
            "bytes_by_kind_and_client": method.traffic.by_kind(),
            "total_bytes_by_kind": {
                kind: sum(counts) for kind, counts in method.traffic.by_kind().items()
            },
        },
        "seconds": {
            "total": round(at.seconds, 3),
            "step_median": statistics.median(at.step_seconds) if at.step_seconds else None,
        },
        "clients_lost": len(method.lost),
        "steps_repeated": method.repeated,
        "status": status,
    }


def failed_summary(
    experiment: Experiment, run: RunDirectory, reason: str, clients_lost: int = 0
) -> None:
    """Write the ``summary.json`` of a run that failed: its keys, from what ``metrics.jsonl`` has.

    What only a living run knows is null, or empty.

    Parameters
    ----------
    reason : str
        Why the run failed.
    clients_lost : int
        Clients whose workers were lost.
    """
    try:
        lines = run.metrics()
    except (RunError, OSError):  # perhaps the very reason
        lines = []
    trained = [line for line in lines if line["split"] == "train"]
    tests = [line for line in lines if line["split"] == "test"]
    # A test ends an epoch, so its step says how many steps an epoch has.
    epochs = tests[-1]["epoch"] + 1 if tests else None
    per = experiment.clients * trained[-1]["step"] * epochs / tests[-1]["step"] if epochs else None
    sent = {way: sum(line["bytes"][way] for line in trained) for way in ("up", "down")}
    seconds = [line["seconds"] for line in trained]
    summary = {
        "name": experiment.name,
        "method": experiment.method,
        "dataset": experiment.data.name,
        "seed": experiment.seed,
        "clients": experiment.clients,
        "epochs_completed": len(tests),
        "steps_completed": max((line["step"] for line in lines), default=0),
        "loss": trained[-1]["loss"] if trained else None,
        "test": tests[-1]["metric"] if tests else {},
        "baselines": {},
        "trainable_parameters": {},
        "communication": {
            "up_bytes_per_client_per_epoch": sent["up"] / per if per else None,
            "down_bytes_per_client_per_epoch": sent["down"] / per if per else None,
        },
        "seconds": {
            # Of steps and tests alone: checkpoints and the start are in no line.
            "total": round(sum(line["seconds"] for line in lines), 3) if lines else None,
            "step_median": statistics.median(seconds) if seconds else None,
        },
        "clients_lost": clients_lost,
        "status": "failed",
        "reason": reason,
    }
    run.write_json("summary", summary)
