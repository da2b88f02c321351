"""A cluster's habits, and the shape of a job there as sbatch takes it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpsl_dist import typed
from mpsl_dist.errors import ConfigError
from mpsl_dist.reading import read_yaml


@dataclass(frozen=True)
class Cluster:
    """The keys of ``cluster.yaml``, which says what each means."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | int = "1:00:00"
    mem: str | None = None
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    modules: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    interface: str | None = None
    signal_seconds: int = 120
    requeues: int = 10
    logs: str = "runs/slurm"
    sbatch: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, **chosen: Any) -> Cluster:
        """Read a cluster's habits from a YAML file.

        Parameters
        ----------
        path : Path
        **chosen
            Values that win over the file's, where they are not None.

        Raises
        ------
        ConfigError
            With every problem at once.
        """
        values = read_yaml(path, ConfigError)
        values |= {key: value for key, value in chosen.items() if value is not None}
        errors: list[str] = []
        cluster = typed.build(cls, values, "", errors)
        if errors:
            raise ConfigError("\n".join(f"{path}: {error}" for error in errors))
        return cluster

    def parameters(self, name: str, processes: int, nodes: int, each: int) -> dict[str, Any]:
        """Return the job as submitit's parameters.

        Parameters
        ----------
        name : str
            What the queue shows.
        processes, nodes, each : int
            All ranks, the nodes they are spread over, and the most on one node.
        """
        parameters = {
            "job_name": name,
            "time": minutes(self.time),
            "nodes": nodes,
            "ntasks_per_node": each,
            "signal_delay_s": self.signal_seconds,
            "setup": self.setup_lines(),
            # A lost rank is the server's to report, with a name; Slurm would end it before.
            "srun_args": ["--kill-on-bad-exit=0", "--no-kill"],
            "additional_parameters": {"ntasks": processes, "requeue": True, **self.sbatch},
        }
        if self.cpus_per_task:
            # srun no longer inherits it from sbatch.
            parameters["srun_args"].append(f"--cpus-per-task={self.cpus_per_task}")
        for key in ("partition", "account", "qos", "constraint", "mem"):
            parameters[key] = getattr(self, key)
        for key in ("cpus_per_task", "gpus_per_node"):
            parameters[key] = getattr(self, key)
        return {key: value for key, value in parameters.items() if value is not None}

    def setup_lines(self) -> list[str]:
        """Return the shell lines that come before the ranks."""
        exported = {key: str(value) for key, value in self.environment.items()}
        if self.interface:
            for library in ("TP", "GLOO", "NCCL"):
                exported.setdefault(f"{library}_SOCKET_IFNAME", self.interface)
        return [
            *(f"module load {shlex.quote(module)}" for module in self.modules),
            *self.setup,
            *(f"export {key}={shlex.quote(value)}" for key, value in exported.items()),
        ]


def minutes(text: str | int) -> int:
    """Return the minutes of a time limit as Slurm writes it, seconds rounded up.

    Parameters
    ----------
    text : str or int
        M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises
    ------
    ConfigError
        If it is none of these.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(text))
    if match is None:
        raise ConfigError(f"time: '{text}' is none of M, M:S, H:M:S, D-H, D-H:M, D-H:M:S")
    days, *parts = (int(part) if part else 0 for part in match.groups())
    given = sum(part is not None for part in match.groups()[1:])
    if match[1] is None and given < 3:
        parts = [0, *parts[:2]]
    hours, mins, seconds = parts
    total = (days * 24 + hours) * 60 + mins + -(-seconds // 60)
    if total < 1:
        raise ConfigError(f"time: '{text}' leaves no time")
    return total
