"""The training loop that every method shares: epochs, tests, checkpoints, records, progress."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from mpsl_dist.config import Experiment, Faults, to_dict
from mpsl_dist.data import Splits
from mpsl_dist.errors import DiskError, RemoteError, ResumeError
from mpsl_dist.methods.evidence import look_at_tests
from mpsl_dist.methods.method import Method
from mpsl_dist.methods.progress import Progress, say, warn
from mpsl_dist.methods.summary import Position, counts, summarize
from mpsl_dist.records import checkpoint
from mpsl_dist.records.checkpoint import Manifest
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.runtime.process import StopRequest

_log = logging.getLogger("mpsl_dist")


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
        _save_model(experiment, splits, method, run)
    at.seconds = time.perf_counter() - started
    summary = summarize(experiment, splits, method, at, status)
    run.end(summary)
    return summary


def _save_model(experiment: Experiment, splits: Splits, method: Method, run: RunDirectory) -> None:
    model = method.deployable()
    if model is None:
        say("no model/: clients keep their own tokenizers, checkpoints have the server's part")
    else:
        model.save(run.path / "model", experiment, splits)


def _resume(experiment: Experiment, method: Method, run: RunDirectory) -> Position:
    """Continue from the last checkpoint that every owner finds whole."""

    def problem(folder: Path, manifest: Manifest) -> str | None:
        return _mismatch(experiment, method, folder, manifest) or method.damage(
            str(folder.absolute()), manifest.files
        )

    found = checkpoint.latest(run.checkpoints, problem, warn)
    if found is None:
        run.forget_after(-1)
        return Position()
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
    at = Position(manifest.step, manifest.epoch, manifest.epoch_step, manifest.seconds)
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


def _welcome_returned(method: Method, at: Position) -> bool:
    """Take back clients whose workers have come back; return whether there are any."""
    back = method.clients.readmit(f"step {at.step}") if method.clients else None
    if not (back and back.clients):
        return False
    method.welcome(back)
    return True


def _keep(faults: Faults, method: Method, run: RunDirectory, at: Position) -> None:
    """Have clients write their own state for their return, if it is time."""
    every = faults.save_clients_every
    if every and method.clients and at.step % every == 0:
        method.clients.keep(str((run.path / "clients").absolute()), f"step {at.step}")


def _one_step(method: Method, run: RunDirectory, at: Position, progress: Progress) -> None:
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
        **counts(method),
        seconds=round(seconds, 6),
        bytes=method.traffic.since(before),
    )
    progress.advance(at.loss)


def _test(method: Method, run: RunDirectory, at: Position, progress: Progress) -> None:
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


def _due_within(experiment: Experiment, at: Position, steps: int) -> bool:
    every = experiment.checkpoint.every_steps
    return bool(every) and at.step % every == 0 and at.epoch_step < steps


def _due_after(experiment: Experiment, at: Position) -> bool:
    rules = experiment.checkpoint
    by_epoch = rules.every_epochs and at.epoch % rules.every_epochs == 0
    by_step = rules.every_steps and at.step % rules.every_steps == 0
    return bool(by_epoch or by_step or at.epoch == experiment.training.epochs)


def _save(experiment: Experiment, method: Method, run: RunDirectory, at: Position) -> None:
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
