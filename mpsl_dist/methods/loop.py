"""The training loop that every method shares: epochs, tests, checkpoints, records, progress."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.actors.local_data import Damage
from mpsl_dist.config import Experiment, Faults, to_dict
from mpsl_dist.data import Splits
from mpsl_dist.errors import DiskError, RemoteError, ResumeError, RunError
from mpsl_dist.methods.evidence import evidence, look_at_tests
from mpsl_dist.methods.link import Link
from mpsl_dist.methods.progress import Progress, warn
from mpsl_dist.records import checkpoint
from mpsl_dist.records.checkpoint import Manifest
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.records.traffic import Traffic
from mpsl_dist.runtime.process import StopRequest

_log = logging.getLogger("mpsl_dist")


class Method(Protocol):
    """What the loop asks of a method."""

    #: (steps, clients): samples of every client in every step of an epoch.
    plan: NDArray[np.int64]
    traffic: Traffic
    #: None where there are no workers.
    clients: Link | None
    #: Steps that were begun again without a client.
    repeated: int

    def welcome(self, clients: list[int]) -> None:
        """Let clients go on that have come back, as they were at the start of the run.

        Asked only of a method that goes on without the lost (``tolerant``).
        """
        ...

    def begin_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Lay out the epoch's mini-batches, from ``first_step`` on."""
        ...

    def step(self, epoch_step: int, step: int) -> float | None:
        """Train one step; returns the global loss, None where no client was left to take part."""
        ...

    def read_tests(self) -> Iterator[int]:
        """Read every test sample once, and yield how many can be read, batch by batch."""
        ...

    def damage_met(self) -> Damage:
        """Return how much of the data could not be read so far."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Test, and return metric name -> fraction."""
        ...

    def save(self, folder: str) -> dict[str, str]:
        """Write all state; returns the name of every file written -> its SHA-256.

        Raises
        ------
        DiskError
            If a file cannot be written, here or where a client is.
        """
        ...

    def damage(self, folder: str, files: Mapping[str, str]) -> str | None:
        """Say what is wrong with the files that :meth:`save` wrote; None if they are whole.

        No state is touched. ``files`` is what :meth:`save` returned, or empty where nobody kept it.
        """
        ...

    def restore(self, folder: str, files: Mapping[str, str]) -> None:
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
    #: The step of the last checkpoint.
    saved: int | None = None


def train(
    experiment: Experiment, splits: Splits, method: Method, run: RunDirectory, stop: StopRequest
) -> dict[str, Any]:
    """Train to the end, or until asked to stop, and return what ``summary.json`` holds.

    A run directory with a complete checkpoint is continued from it, bit for bit.

    Raises
    ------
    RunError
        If a checkpoint or the metrics of the run directory do not fit this run.
    DataError
        If test files cannot be read, see :func:`mpsl_dist.methods.evidence.look_at_tests`.
    """
    if method.clients and experiment.data.place == "own":
        method.clients.run = run.path.absolute()
    at = _resume(experiment, method, run)
    look_at_tests(splits, method, stop)
    started = time.perf_counter() - at.seconds
    steps, epochs, faults = len(method.plan), experiment.training.epochs, experiment.faults
    samples = int(method.plan.sum())
    with Progress(epochs * steps, at.step, samples / steps) as progress:
        while at.epoch < epochs and not stop:
            _welcome_returned(method, at)
            method.begin_epoch(at.epoch, at.epoch_step)
            while at.epoch_step < steps and not stop:
                if faults.rejoin == "now" and _welcome_returned(method, at):
                    method.begin_epoch(at.epoch, at.epoch_step)
                _one_step(method, run, at, progress)
                _keep(faults, method, run, at)
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
    """Continue from the last checkpoint that every owner finds whole."""

    def problem(folder: Path, manifest: Manifest) -> str | None:
        return _mismatch(experiment, method, folder, manifest) or method.damage(
            str(folder.absolute()), manifest.files
        )

    found = checkpoint.latest(run.checkpoints, problem, warn)
    if found is None:
        run.forget_after(-1)
        return _Position()
    folder, manifest = found
    done = manifest.epoch + bool(manifest.epoch_step)
    if done > experiment.training.epochs:
        raise ResumeError(
            f"training.epochs: {experiment.training.epochs} is less than the {done} that the run "
            f"has begun, by {folder}"
        )
    method.traffic.load(manifest.traffic)
    method.restore(str(folder.absolute()), manifest.files)
    run.record(to_dict(experiment))
    run.forget_after(manifest.step)
    at = _Position(manifest.step, manifest.epoch, manifest.epoch_step, manifest.seconds)
    at.saved = manifest.step
    for line in run.metrics():
        if line["split"] == "test":
            at.test = line["metric"]
        else:
            at.loss = at.loss if line["loss"] is None else line["loss"]
            at.step_seconds.append(line["seconds"])
            method.repeated = line.get("steps_repeated", 0)
            if method.clients:
                method.clients.done = at.step
                method.clients.returned = line.get("clients_returned", 0)
    _log.info("resumed at step %d, epoch %d, from %s", at.step, at.epoch, folder)
    return at


def _mismatch(
    experiment: Experiment, method: Method, folder: Path, manifest: Manifest
) -> str | None:
    if manifest.clients != experiment.clients:
        return f"{folder}: made with {manifest.clients} clients"
    steps = len(method.plan)
    whole = manifest.epoch * steps + manifest.epoch_step
    if manifest.epoch_step >= steps or manifest.step != whole:
        return f"{folder}: made with epochs of another length than {steps} steps"
    return None


def _welcome_returned(method: Method, at: _Position) -> bool:
    """Take back clients whose workers have come back; return whether there are any."""
    back = method.clients.readmit(f"step {at.step}") if method.clients else []
    if back:
        method.welcome(back)
    return bool(back)


def _keep(faults: Faults, method: Method, run: RunDirectory, at: _Position) -> None:
    """Have clients write their own state for their return, if it is time."""
    every = faults.save_clients_every
    if every and method.clients and at.step % every == 0:
        method.clients.keep(str((run.path / "clients").absolute()), f"step {at.step}")


def _counts(method: Method) -> dict[str, int]:
    link = method.clients
    return {
        "clients_lost": len(link.lost) if link else 0,
        "clients_returned": link.returned if link else 0,
        "steps_repeated": method.repeated,
    }


def _one_step(method: Method, run: RunDirectory, at: _Position, progress: Progress) -> None:
    before = method.traffic.totals()
    started = time.perf_counter()
    loss = method.step(at.epoch_step, at.step)
    at.loss = at.loss if loss is None else loss
    seconds = time.perf_counter() - started
    at.step, at.epoch_step = at.step + 1, at.epoch_step + 1
    if method.clients:
        method.clients.done = at.step
    at.step_seconds.append(seconds)
    run.append_metrics(
        step=at.step,
        epoch=at.epoch,
        split="train",
        loss=loss,
        metric={},
        **_counts(method),
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
    """Write a checkpoint, unless the last one is of this step.

    Raises
    ------
    DiskError
        If an owner's disk does not take it; the checkpoints before it stay as they are.
    """
    if at.saved == at.step:
        return
    try:
        folder = checkpoint.begin(run.checkpoints, at.step)
        files = method.save(str(folder.absolute()))
        manifest = Manifest(
            at.step,
            at.epoch,
            at.epoch_step,
            experiment.clients,
            at.seconds,
            method.traffic.by_kind(),
            files,
        )
        checkpoint.complete(run.checkpoints, manifest, experiment.checkpoint.keep)
    except (DiskError, RemoteError):
        checkpoint.abandon(run.checkpoints, at.step)
        raise
    at.saved = at.step
    if method.clients:
        kept = [str(path.absolute()) for path in checkpoint.complete_ones(run.checkpoints)]
        method.clients.prune(kept)
    _log.info("checkpoint at step %d", at.step)


def summarize(
    experiment: Experiment, splits: Splits, method: Method, at: _Position, status: str
) -> dict[str, Any]:
    """Return what ``summary.json`` holds of a run that has ended with this status."""
    epochs = at.step / len(method.plan)
    per = experiment.clients * epochs if epochs else 1
    return (
        _about(experiment)
        | {
            "epochs_completed": at.epoch,
            "steps_completed": at.step,
            "loss": at.loss,
            "test": at.test,
            "baselines": dict(splits.baselines),
            "data": evidence(splits, method.damage_met()),
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
            "status": status,
        }
        | _counts(method)
    )


def _about(experiment: Experiment) -> dict[str, Any]:
    return {
        "name": experiment.name,
        "method": experiment.method,
        "dataset": experiment.data.name,
        "seed": experiment.seed,
        "clients": experiment.clients,
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
    summary = _about(experiment) | {
        "epochs_completed": len(tests),
        "steps_completed": max((line["step"] for line in lines), default=0),
        "loss": trained[-1]["loss"] if trained else None,
        "test": tests[-1]["metric"] if tests else {},
        "baselines": {},
        "data": {},
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
        "clients_returned": trained[-1].get("clients_returned", 0) if trained else 0,
        "steps_repeated": trained[-1].get("steps_repeated", 0) if trained else 0,
        "status": "failed",
        "reason": reason,
    }
    run.write_json("summary", summary)
