"""The command line: ``python -m mpsl_dist COMMAND CONFIG.yaml [key.path=value ...]``.

Exit status 0 success, 2 the user's to mend (a message, no traceback), 1 anything else.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mpsl_dist.errors import (
    ConfigError,
    DiskError,
    DivergedError,
    RefusedError,
    RemoteError,
    ResumeError,
    UserError,
)

if TYPE_CHECKING:
    from mpsl_dist.config import Experiment
    from mpsl_dist.records.run_directory import RunDirectory
    from mpsl_dist.runtime.environment import Environment


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words after the program's name; by default those of this process.

    Raises
    ------
    SystemExit
        With status 2, after a usage error; with status 0, after ``--help``.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    for word in rest:  # argparse takes no positionals after an option
        if word.startswith("-") or "=" not in word:
            parser.error(f"unrecognized argument: {word}")
        if "overrides" not in options:
            parser.error(f"{options.command} takes no key.path=value: {word}")
        options.overrides.append(word)
    options.words = list(sys.argv[1:] if arguments is None else arguments)
    # What every rank gives to Python: a script of the user's is started again as it was.
    options.again = ["-m", "mpsl_dist", *arguments] if arguments else sys.orig_argv[1:]
    # A program that calls this function may hold what its forks can't use, and torch that was
    # imported before has not read what is set here.
    forks = not arguments and "torch" not in sys.modules
    options.go_on = (lambda: _perform(options)) if forks else None
    return _perform(options)


def _perform(options: argparse.Namespace) -> int:
    """Run the command of a checked command line and return the exit status."""
    try:
        command = {"train": _train, "evaluate": _evaluate, "cost": _cost, "compare": _compare}
        command |= {"data": _data, "partition": _partition, "bench": _bench}
        command["audit"] = _audit
        return command[options.command](options)
    except UserError as error:
        return _user_error(str(error), told=isinstance(error, RefusedError))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mpsl_dist", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train an experiment: starts its processes")
    _add_experiment(train)
    train.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    train.add_argument("--overwrite", action="store_true", help="replace an existing run")
    evaluate = commands.add_parser("evaluate", help="test the model that a run left, without RPC")
    evaluate.add_argument("run", help="a run directory, runs/<name>")
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="where the data lies and how to compute; the model stays as it was trained",
    )
    cost = commands.add_parser("cost", help="parameters, FLOPs, bytes and memory, before any run")
    _add_experiment(cost)
    cost.add_argument("--out", metavar="FILE.{json,csv}", help="write every figure to a file")
    cost.add_argument("--figures", metavar="DIR", help="draw cost against the encoder's size")
    compare = commands.add_parser("compare", help="methods beside each other, from their runs")
    compare.add_argument("runs", nargs="+", metavar="RUN_DIR", help="completed run directories")
    compare.add_argument("--out", metavar="FILE.md", help="write page, csv and picture")
    bench = commands.add_parser("bench", help="steps of several methods in turns, timed by phase")
    _add_experiment(bench)
    bench.add_argument("--steps", type=int, default=20, metavar="N", help="of each method: 20")
    methods = "mpsl,psl,centralized"
    bench.add_argument("--methods", default=methods, metavar="A,B", help=f"default: {methods}")
    bench.add_argument("--out", default=".", metavar="DIR", help="for bench-<name>.json and .png")
    bench.add_argument("--overwrite", action="store_true", help="replace an earlier bench there")
    _add_audit(commands)
    _add_data_commands(commands)
    return parser


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="an experiment, configs/*.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")


def _add_audit(commands: argparse._SubParsersAction) -> None:
    audit = commands.add_parser("audit", help="what a curious server learns from what it receives")
    what = "run directories and experiments; key.path=value as for evaluate or train"
    audit.add_argument("targets", nargs="+", metavar="RUN_OR_CONFIG", help=what)
    samples = "test samples that are attacked: 200"
    audit.add_argument("--samples", type=int, default=200, metavar="N", help=samples)
    out = "default: audit-NAME, of several audit-sweep"
    audit.add_argument("--out", metavar="DIR", help=out)
    audit.add_argument("--overwrite", action="store_true", help="replace an earlier audit there")
    over = "exit with 1 if an attack finds more"
    audit.add_argument("--fail-over", nargs="+", default=[], metavar="psnr=20", help=over)
    audit.set_defaults(overrides=[])


def _add_data_commands(commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser("data", help="check a dataset on disk, or download it")
    actions = data.add_subparsers(dest="action", required=True)
    check = actions.add_parser(
        "check", help="what is there, missing or damaged, and where to get it"
    )
    _add_experiment(check)
    check.add_argument("--workers", type=int, metavar="N", help="threads that decode")
    check.add_argument("--limit", type=int, metavar="N", help="decode only N files, 0 for none")
    _add_experiment(actions.add_parser("download", help="resumed, verified, safely unpacked"))
    partition = commands.add_parser("partition", help="who holds what: a table and a picture")
    _add_experiment(partition)
    partition.add_argument("--out", metavar="FILE.png", help="default: partition-<name>.png")


def _user_error(message: str, told: bool) -> int:
    """Print a mistake and return the exit status; ``told`` if rank 0 has told its own user."""
    if not told and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        # Rank 0 meets the same error. Ending first would make a launcher end rank 0 before it can
        # say so; then the launcher ends this process. Where rank 0 meets no error (this host lacks
        # a plugin or a file), it waits for this process.
        time.sleep(60)
    _say(message)
    return 2


def _say(message: str) -> None:
    print("\n".join(f"error: {line}" for line in message.splitlines()), file=sys.stderr, flush=True)


def _status_of(error: Exception) -> int:
    """Return the exit status: 2 where it is the user's mistake, here or on a worker."""
    return 2 if getattr(error, "user_error", isinstance(error, UserError)) else 1


def _train(options: argparse.Namespace) -> int:
    from mpsl_dist import config

    # RPC tells of every lost connection in a line of its own; the run says what it means.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    experiment = config.load(options.config, options.overrides)
    if options.resume and options.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    from mpsl_dist.config.methods import comes_back, goes_on, processes_of
    from mpsl_dist.runtime import environment, launch, supervisor

    launched, patience = environment.resolve(os.environ), experiment.faults.exit_timeout
    if launched is None and processes_of(experiment) > 1:
        return _launch(options, experiment, processes_of(experiment))
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
        return _serve(experiment, processes.place_in_world(experiment, options.words))
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
    _leave(launch.run(ranks, options.again, grace, chosen, replicas, _prepared(options)))


def _prepared(options: argparse.Namespace) -> Callable[[], int] | None:
    """Import what every rank needs; return what one does that is a fork of this process."""
    if options.go_on:
        from mpsl_dist.data.decode import text

        # The first would come with the first optimizer, and take a second of every rank.
        for name in ("torch._dynamo", "mpsl_dist.methods.processes"):
            importlib.import_module(name)
        text.prepare()
    return options.go_on


def _serve(experiment: Experiment, launched: Environment) -> int:
    """Host clients; a failure of this worker alone is the launching process's to tell."""
    from mpsl_dist.methods import processes
    from mpsl_dist.runtime import launch, supervisor

    try:
        processes.serve_as_worker(experiment, launched)
    except Exception as error:
        if not launched.folder:
            raise
        launch.leave_word(launched, error)
        _leave(1)
    if launched.folder or supervisor.is_child():
        _leave(0)  # an agent that was left behind must not spoil the end of a worker that is done
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
    ):
        try:
            results.append(check())
        except UserError as error:
            refusals.append(str(error))
    if refusals:
        raise ConfigError("\n".join(refusals))
    launched, data, _ = results
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
            _leave(_status_of(error))
    _try("the learning curve", lambda: learning_curve(run))
    _report(summary, run.path)
    status = 0 if summary["status"] == "completed" else 1
    if by_command:
        _leave(status)  # Python's own end takes seconds, of which a stopped run has few
    if summary["clients_lost"] or summary["clients_returned"]:
        # RPC, or what was left of an earlier generation, is still on: see world.World.
        atexit.register(_leave, status)
    return status


def _tell_failure(experiment: Experiment, run: RunDirectory, error: Exception) -> None:
    """Print why the run failed, then record it as far as the disk allows."""
    from mpsl_dist.methods.summary import failed_summary

    reason = str(error) or type(error).__name__
    details = getattr(error, "details", "") or traceback.format_exc()
    _say(reason)
    if isinstance(error, ResumeError):
        return  # what the run left stays as it is
    path, lost = run.path / "error.txt", len(getattr(error, "lost", ()))
    if isinstance(error, DiskError):
        with contextlib.suppress(OSError):
            failed_summary(experiment, run, reason, lost)
        return
    if _try("the traceback", lambda: path.write_text(details, encoding="utf-8")):
        print(f"(traceback in {path})", file=sys.stderr)
    else:
        print(details, file=sys.stderr)
    _try("the summary", lambda: failed_summary(experiment, run, reason, lost))


def _try(what: str, write: Callable[[], object]) -> bool:
    """Write something that the run's outcome does not hang on; return whether it was written."""
    try:
        write()
    except Exception as error:
        print(f"{what} could not be written: {error}", file=sys.stderr)
        return False
    return True


def _leave(status: int) -> NoReturn:
    from mpsl_dist.runtime.process import leave

    try:
        leave(status)
    except OSError:  # standard output may lie on the disk that is full
        os._exit(status)


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


def _bench(options: argparse.Namespace) -> int:
    from mpsl_dist import config
    from mpsl_dist.analysis.bench import Bench
    from mpsl_dist.methods import processes
    from mpsl_dist.runtime import environment, launch

    experiment = config.load(options.config, options.overrides)
    bench = Bench.asked(experiment, options.steps, options.methods, options.out, options.overwrite)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    launched = environment.resolve(os.environ)
    if launched is None and bench.ranks > 1:
        _leave(bench.start(options.again))
    if launched and launched.folder:
        launch.follow(launched, experiment.faults.exit_timeout)
    launched = processes.place_in_world(bench.lead, options.words)
    if launched.rank:
        return _serve(bench.lead, launched)
    try:
        bench.run(launched)
    except Exception as error:  # others may still be in the world
        told = isinstance(error, UserError | RemoteError | DivergedError)
        _say(str(error) if told else traceback.format_exc())
        _leave(_status_of(error))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from mpsl_dist.analysis import compare

    if options.out and Path(options.out).suffix != ".md":
        raise ConfigError(f"--out: {options.out} must end in .md")
    groups = compare.group(compare.read(options.runs))
    print(compare.markdown(groups))
    for path in compare.write(groups, Path(options.out)) if options.out else ():
        print(f"wrote {path}")
    return 0


def _audit(options: argparse.Namespace) -> int:
    from mpsl_dist.analysis.audit.audit import audit_all, limits_of

    limits, targets = limits_of(options.fail_over), [*options.targets, *options.overrides]
    over = audit_all(targets, options.samples, options.out, options.overwrite, limits)
    print("\n".join(over), file=sys.stderr, end="\n" if over else "")
    return int(bool(over))


def _data(options: argparse.Namespace) -> int:
    from mpsl_dist import config
    from mpsl_dist.analysis import data_commands

    experiment = config.load(options.config, options.overrides)
    if options.action == "check":
        return data_commands.check_data(experiment, options.workers, options.limit)
    return data_commands.download_data(experiment)


def _partition(options: argparse.Namespace) -> int:
    from mpsl_dist import config
    from mpsl_dist.analysis import partition_view

    experiment = config.load(options.config, options.overrides)
    partition_view.show(experiment, Path(options.out or f"partition-{experiment.name}.png"))
    return 0


def _cost(options: argparse.Namespace) -> int:
    from mpsl_dist import config
    from mpsl_dist.analysis import cost, cost_figures, cost_table

    out = Path(options.out) if options.out else None
    cost.check_out(out)
    experiment = config.load(options.config, options.overrides)
    found = cost.cost_of(experiment)
    cost_table.show(found)
    if out:
        found.save(out)
        print(f"every figure lies in {out}")
    if options.figures:
        drawn = cost_figures.draw(experiment, Path(options.figures))
        print(f"drawn: {', '.join(map(str, drawn))}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from mpsl_dist.actors import deployable
    from mpsl_dist.actors.agreement import renumbered
    from mpsl_dist.actors.holdings import load_data, loaders_of
    from mpsl_dist.actors.local_data import TestData

    folder = Path(options.run) / "model"
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{options.run}: no model/ there; the run must be completed")
    model, experiment, classes = deployable.load(folder, options.overrides)
    place = (experiment.data.place, experiment.data.test_at)
    needs = ("test",) if place == ("own", "server") else ("train", "test")
    splits = renumbered(load_data(experiment, needs), classes)
    print(f"the test set of {experiment.data.name}:")
    held = TestData(splits.test, loaders=loaders_of(experiment, splits))
    results = model.test(held, experiment.training.test_batch_size)
    if held.unread.positions:
        print(f"left out, as they cannot be read: {len(held.unread.positions)} of {len(held)}")
    for name, value in results.items():
        print(f"{name} {value:.4f}")
    for name, value in splits.baselines.items():
        print(f"{name} {value:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
