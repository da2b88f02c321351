"""Submit a run, or a sweep of runs, to Slurm: every Slurm task is one rank, the server first.

    python launch/submit.py configs/quickstart.yaml training.epochs=5 --nodes 2 --time 2:00:00
    python launch/submit.py configs/sweeps/alpha.yaml --at-once 4 --dry-run
    python launch/submit.py configs/sweeps/paper/*.yaml --profile tiny --local

A cluster's habits (partition, account, modules, interface ...) come from ``launch/cluster.yaml``.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # works from a checkout that is not installed
sys.path.append("")  # plugins beside the experiment, as ``python -m`` finds them

import follow  # noqa: E402
import sweep  # noqa: E402
from cluster import Cluster, minutes  # noqa: E402
from job import TrainJob  # noqa: E402
from sweep import PlannedRun  # noqa: E402

from mpsl_dist import config  # noqa: E402
from mpsl_dist.errors import ConfigError, UserError  # noqa: E402
from mpsl_dist.records.run_directory import RunDirectory  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit as asked and return the exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words after the program's name; by default those of this process.

    Returns
    -------
    int
        0 success, 2 an error that the user can mend, 1 a run that failed while it was followed.
    """
    options = _parser().parse_intermixed_args(arguments)
    try:
        _require_submitit()
        runs, at_once = _read(options)
        cluster = Cluster.read(options.cluster, **_habits(options))
        runs = _count_costs(_to_submit(runs, options), options)
        groups = _by_shape(runs)
        if options.nodes * (options.tasks_per_node or 10**9) < max(groups, default=0):
            raise ConfigError(
                f"{max(groups)} ranks do not fit {options.nodes} nodes with "
                f"--tasks-per-node {options.tasks_per_node}"
            )
        if options.dry_run:
            return _show(groups, cluster, options, at_once)
        return _submit(groups, cluster, options, at_once)
    except UserError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="submit.py", description=__doc__.splitlines()[0])
    what = "experiments or sweeps, configs/**/*.yaml, and key.path=value for all of them"
    parser.add_argument("words", nargs="+", metavar="CONFIG_OR_key.path=value", help=what)
    parser.add_argument("--profile", help="of sweeps that have it: tiny is minutes on two cores")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--tasks-per-node", type=int, help="ranks on a node; default: evenly")
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("--cpus-per-task", type=int)
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--time", help="time limit, as Slurm writes it")
    parser.add_argument("--cluster", type=Path, default=HERE / "cluster.yaml", metavar="FILE")
    parser.add_argument("--at-once", type=int, help="jobs of a sweep at a time")
    parser.add_argument("--resume", action="store_true", help="continue an existing run")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="print the sbatch file, submit nothing")
    how.add_argument("--local", action="store_true", help="run here, without Slurm")
    parser.add_argument("--wait", action="store_true", help="follow rank 0 until the end")
    return parser


def _habits(options: argparse.Namespace) -> dict[str, Any]:
    names = ("partition", "account", "time", "gpus_per_node", "cpus_per_task")
    return {name: getattr(options, name) for name in names}


def _require_submitit() -> None:
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "submitit is missing: pip install 'mpsl_dist[slurm]', or do without it: "
            "sbatch slurm/train.sbatch CONFIG"
        ) from error


def _read(options: argparse.Namespace) -> tuple[list[PlannedRun], int | None]:
    """Read every file; what two of them ask for alike is one run."""
    files = [Path(word) for word in options.words if "=" not in word]
    if not files:
        raise ConfigError("no file was given: an experiment or a sweep, configs/**/*.yaml")
    options.title = files[0].stem if len(files) == 1 else files[0].resolve().parent.name
    overrides = [word for word in options.words if "=" in word]
    runs, limits, errors = {}, [], []
    for path in files:
        try:
            found, limit = sweep.read(path, overrides, options.profile)
        except UserError as error:
            errors.append(str(error))
            continue
        limits += [limit] if limit else []
        for run in found:
            known = runs.setdefault(run.experiment.run_directory, run)
            if known.experiment != run.experiment:
                errors.append(f"{path}: another file has another run {run.experiment.name}")
    if errors:
        raise ConfigError("\n".join(errors))
    return list(runs.values()), min(limits, default=None)


def _count_costs(runs: list[PlannedRun], options: argparse.Namespace) -> list[PlannedRun]:
    """Count what runs of ``command: cost`` would cost, here and now; return the others."""
    for run in runs:
        if run.command == "cost" and not options.dry_run:
            from mpsl_dist.analysis.cost import cost_of

            cost_of(run.experiment).save(run.cost_file)
            RunDirectory(run.experiment.run_directory).record(config.to_dict(run.experiment))
            print(f"{run.experiment.run_directory}: counted", flush=True)
    return [run for run in runs if run.command == "train"]


def _to_submit(runs: list[PlannedRun], options: argparse.Namespace) -> list[PlannedRun]:
    """Leave out finished runs of a sweep; refuse to meddle with other existing ones."""
    errors, left = [], []
    for run in runs:
        try:
            if _is_left(run, options, alone=len(runs) == 1):
                left.append(run)
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(errors))
    return left


def _is_left(run: PlannedRun, options: argparse.Namespace, alone: bool) -> bool:
    where = run.experiment.run_directory
    if options.overwrite or not run.exists:
        return True
    difference = run.difference()
    if difference:
        raise ConfigError(f"{where} is another run, {difference}: rename it, or --overwrite")
    if run.completed:
        print(f"{where} is completed: skipped")
        return False
    if alone and not options.resume:
        raise ConfigError(f"{where} exists: continue it with --resume, or --overwrite")
    return True


def _by_shape(runs: Sequence[PlannedRun]) -> dict[int, list[PlannedRun]]:
    """Group runs by their number of processes: the tasks of a job array have one shape."""
    groups: dict[int, list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault(run.processes, []).append(run)
    return groups


def _parameters(
    runs: Sequence[PlannedRun], cluster: Cluster, options: argparse.Namespace, at_once: int | None
) -> dict[str, Any]:
    processes, nodes = runs[0].processes, min(options.nodes, runs[0].processes)
    each = options.tasks_per_node or -(-processes // nodes)
    name = runs[0].experiment.name if len(runs) == 1 else options.title
    limit = options.at_once or at_once
    chosen = cluster.parameters(name, processes, nodes, each)
    return chosen | ({"array_parallelism": limit} if limit else {})


def _job(run: PlannedRun, options: argparse.Namespace) -> TrainJob:
    how = ["--overwrite"] if options.overwrite else ["--resume"] if run.exists else []
    return TrainJob(
        config=str(run.config.resolve()),
        arguments=(*run.settings, *how),
        run_directory=str(run.experiment.run_directory.absolute()),
        port=_free_port() if options.local else None,
    )


def _show(
    groups: dict[int, list[PlannedRun]],
    cluster: Cluster,
    options: argparse.Namespace,
    limit: int | None,
) -> int:
    from submitit.slurm.slurm import _make_sbatch_string

    for runs in groups.values():
        command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {cluster.logs}/%j"
        print(
            _make_sbatch_string(
                command=command,
                folder=f"{cluster.logs}/%j",
                map_count=len(runs) if len(runs) > 1 else None,
                **_parameters(runs, cluster, options, limit),
            )
        )
        for run in runs:
            job = _job(run, options)
            print(f"# every task: mpsl_dist train {shlex.join([job.config, *job.arguments])}")
    return 0


def _submit(
    groups: dict[int, list[PlannedRun]],
    cluster: Cluster,
    options: argparse.Namespace,
    limit: int | None,
) -> int:
    import cloudpickle
    import job as job_module
    import submitit

    cloudpickle.register_pickle_by_value(job_module)  # the job's Python need not find this folder
    if options.local:
        return _run_here(groups, cluster, options, limit)
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ConfigError("no sbatch on this machine: use a login node, --local or --dry-run")
    followed = []
    for runs in groups.values():
        executor = submitit.SlurmExecutor(f"{cluster.logs}/%j", max_num_timeout=cluster.requeues)
        executor.update_parameters(**_parameters(runs, cluster, options, limit))
        with executor.batch():
            jobs = [executor.submit(_job(run, options)) for run in runs]
        followed += list(zip(runs, jobs, strict=True))
    for run, job in followed:
        _announce(run, job)
        print(f"  follow: tail -F {shlex.quote(str(job.paths.stdout))}")
    if followed:
        ids = ",".join(sorted({str(job.job_id).partition("_")[0] for _, job in followed}))
        print(f"  state: squeue --jobs {ids}   cancel: scancel {ids.replace(',', ' ')}")
    if options.wait:
        return follow.until_done([(run, follow.SlurmState(job)) for run, job in followed])
    return 0


def _run_here(
    groups: dict[int, list[PlannedRun]],
    cluster: Cluster,
    options: argparse.Namespace,
    limit: int | None,
) -> int:
    """Run one after another with submitit's local executor, as many at once as asked."""
    import submitit

    failed, running, logs = 0, [], f"{cluster.logs}/%j"
    waiting = [run for runs in groups.values() for run in runs]
    if options.nodes > 1:
        raise ConfigError("--local runs on this machine alone: leave --nodes out")
    while waiting:
        batch = [waiting.pop(0) for _ in range(min(options.at_once or limit or 1, len(waiting)))]
        for run in batch:
            executor = submitit.LocalExecutor(logs, max_num_timeout=cluster.requeues)
            executor.update_parameters(
                tasks_per_node=run.processes,
                timeout_min=minutes(cluster.time),
                signal_delay_s=cluster.signal_seconds,
                gpus_per_node=cluster.gpus_per_node or 0,
            )
            job = executor.submit(_job(run, options))
            _announce(run, job)
            running.append((run, follow.LocalState(job)))
        failed |= follow.until_done(running[-len(batch) :])
    return failed


def _announce(run: PlannedRun, job: Any) -> None:
    print(f"job {job.job_id}: {run.experiment.name}, {run.processes} ranks")
    print(f"  logs: {job.paths.folder}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
