"""``train``: as the command that starts the ranks, as the server, or as a worker."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpsl_dist.commands.ending import attempt, leave, say, status_of
from mpsl_dist.errors import ConfigError, DiskError, ResumeError, UserError

if TYPE_CHECKING:
    from mpsl_dist.config import Experiment
    from mpsl_dist.records.run_directory import RunDirectory
    from mpsl_dist.runtime.environment import Environment


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add ``train`` to the command line."""
    train = commands.add_parser("train", help="train an experiment: starts its processes")
    add_experiment(train)
    train.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    train.add_argument("--overwrite", action="store_true", help="replace an existing run")
    train.set_defaults(run=_train)


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Add the words of a command that reads an experiment."""
    parser.add_argument("config", help="an experiment's file, or a shipped one's name")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")


def _train(options: argparse.Namespace) -> int:
    from mpsl_dist import config

    # RPC tells of every lost connection in a line of its own; the run says what it means.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    experiment = config.load(options.config, options.overrides)
    if options.resume and options.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    from mpsl_dist.config.methods import comes_back, goes_on, processes_of
    from mpsl_dist.runtime import caller, environment, launch, supervisor

    launched, patience = environment.resolve(os.environ), experiment.faults.exit_timeout
    if launched is None and processes_of(experiment) > 1:
        return _launch(options, experiment, processes_of(experiment))
    if launched is None:
        caller.follow()
    worker = launched is not None and launched.rank > 0
    hosts = launched is not None and launched.rank >= experiment.server.replicas
    if hosts and goes_on(experiment) and not supervisor.is_child():
        # Before torch is imported, but in a fork: the rank itself stays small.
        restarts = experiment.faults.restarts if comes_back(experiment) else 0
        look = launch.follower(launched, patience) if launched.folder else None
        go_on = options.go_on if launched.folder else None
        return supervisor.supervise(options.again, patience, restarts, look, go_on)
    if supervisor.is_child():
        supervisor.follow_parent()
    elif launched and launched.folder:
        launch.follow(launched, patience)
    from mpsl_dist.methods import processes

    if worker:
        return serve(experiment, processes.place_in_world(experiment, options.words))
    launched, data = _check_everything(options, experiment)
    return _train_as_server(options, experiment, launched, data)


def _launch(options: argparse.Namespace, experiment: Experiment, ranks: int) -> int:
    """Start server and workers on this machine; refuse what can be refused before."""
    # Before numpy and torch read it: a pool of threads can't be forked. The run sets its own.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from mpsl_dist import config
    from mpsl_dist.actors.part_checks import refusals_without_data
    from mpsl_dist.methods.federation import refuse_shared_file
    from mpsl_dist.records.run_directory import RunDirectory
    from mpsl_dist.runtime import launch, network

    chosen = experiment.runtime.interface or os.environ.get("TP_SOCKET_IFNAME")
    if chosen:
        network.existing_interface(chosen, "runtime.interface or TP_SOCKET_IFNAME")
    try:
        launch.check_room(ranks)
        refuse_shared_file(experiment, None)
        defaults = config.to_dict(config.Experiment())
        directory = RunDirectory(experiment.run_directory, defaults)
        directory.check(config.to_dict(experiment), options.resume, options.overwrite)
        if refused := refusals_without_data(experiment):
            raise ConfigError("\n".join(refused))
    except UserError:
        _check_everything(options, experiment)  # raises, and tells what else is wrong
        raise
    # Python's own end would take seconds, and what is to be done is done.
    grace, replicas = experiment.faults.exit_timeout, experiment.server.replicas
    leave(launch.run(ranks, options.again, grace, chosen, replicas, _prepared(options)))


def _prepared(options: argparse.Namespace) -> Callable[[], int] | None:
    """Import what every rank needs; return what one does that is a fork of this process."""
    if options.go_on:
        from mpsl_dist.data.decode import text

        # The first would come with the first optimizer, and take a second of every rank.
        for name in ("torch._dynamo", "mpsl_dist.methods.processes"):
            importlib.import_module(name)
        text.prepare()
    return options.go_on


def serve(experiment: Experiment, launched: Environment) -> int:
    """Host clients; a failure of this worker alone is the launching process's to tell."""
    from mpsl_dist.methods import processes
    from mpsl_dist.runtime import launch, supervisor

    try:
        processes.serve_as_worker(experiment, launched)
    except Exception as error:
        if launched.folder:
            launch.leave_word(launched, error)
        elif isinstance(error, UserError):
            raise
        else:
            traceback.print_exc()
        leave(1)  # RPC may be on: Python's own end would abort
    if launched.folder or supervisor.is_child():
        leave(0)  # an agent that was left behind must not spoil the end of a worker that is done
    return 0


def _check_everything(
    options: argparse.Namespace, experiment: Experiment
) -> tuple[Environment, Any]:
    """Do everything that can refuse the run, and report all refusals at once."""
    from mpsl_dist import config
    from mpsl_dist.methods import processes
    from mpsl_dist.records.run_directory import RunDirectory

    resolved, defaults = config.to_dict(experiment), config.to_dict(config.Experiment())
    directory = RunDirectory(experiment.run_directory, defaults)
    results, refusals = [], []
    for check in (
        lambda: processes.place_in_world(experiment, options.words),
        lambda: processes.checked_at_server(experiment),
        lambda: directory.check(resolved, options.resume, options.overwrite),
        lambda: processes.trackers_of(experiment),
    ):
        try:
            results.append(check())
        except UserError as error:
            refusals.append(error)
    if len(refusals) == 1:
        raise refusals[0]
    if refusals:
        raise ConfigError("\n".join(map(str, refusals)))
    launched, data, *_ = results
    return launched, data


def _train_as_server(
    options: argparse.Namespace, experiment: Experiment, launched: Environment, data: Any
) -> int:
    from mpsl_dist.analysis.plots import learning_curve
    from mpsl_dist.methods import processes
    from mpsl_dist.runtime.process import StopRequest

    run = processes.open_run(experiment, options.resume, options.overwrite)
    by_command = bool(launched and launched.folder)  # a stop before the first step ends it at once
    stop = StopRequest(None if by_command else experiment.faults.exit_timeout)
    if not by_command:
        stop.listen()
    try:
        summary = processes.train_as_server(experiment, launched, data, run, stop)
    except Exception as error:
        try:
            _tell_failure(experiment, run, error)
        finally:
            leave(status_of(error))
    attempt("the learning curve", lambda: learning_curve(run))
    _report(summary, run.path)
    status = 0 if summary["status"] == "completed" else 1
    if by_command:
        leave(status)  # Python's own end takes seconds, of which a stopped run has few
    if summary["clients_lost"] or summary["clients_returned"]:
        # RPC, or what was left of an earlier generation, is still on: see world.World.
        atexit.register(leave, status)
    return status


def _tell_failure(experiment: Experiment, run: RunDirectory, error: Exception) -> None:
    """Print why the run failed, then record it as far as the disk allows."""
    from mpsl_dist.methods.summary import failed_summary
    from mpsl_dist.runtime import caller

    reason = str(error) or type(error).__name__
    details = getattr(error, "details", "") or traceback.format_exc()
    caller.tell(error)
    say(reason)
    if isinstance(error, ResumeError):
        return  # what the run left stays as it is
    path, lost = run.path / "error.txt", len(getattr(error, "lost", ()))
    if isinstance(error, DiskError):
        with contextlib.suppress(OSError):
            failed_summary(experiment, run, reason, lost)
        return
    if attempt("the traceback", lambda: path.write_text(details, encoding="utf-8")):
        print(f"(traceback in {path})", file=sys.stderr)
    else:
        print(details, file=sys.stderr)
    attempt("the summary", lambda: failed_summary(experiment, run, reason, lost))


def _report(summary: dict[str, Any], path: Path) -> None:
    from mpsl_dist.methods.evidence import sentences

    test = ", ".join(f"{name} {value:.3f}" for name, value in summary["test"].items())
    against = ", ".join(f"{name} {value:.3f}" for name, value in summary["baselines"].items())
    print(f"{summary['status']}: test {test or 'not yet'}")
    if against:
        print(f"baselines: {against}")
    for line in sentences(summary["data"])[1:]:
        print(line)
    traffic = summary["communication"]
    print(
        f"{summary['clients']} clients, {summary['epochs_completed']} epochs, "
        f"{summary['seconds']['total']:.0f} s; per client and epoch "
        f"{traffic['up_bytes_per_client_per_epoch'] / 2**20:.2f} MiB up, "
        f"{traffic['down_bytes_per_client_per_epoch'] / 2**20:.2f} MiB down"
    )
    print(f"everything lies in {path}")
    if summary["status"] == "stopped":
        print("stopped on request; the same command with --resume continues")
