"""A cluster's habits, and the shape of a job there as sbatch takes it."""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mpsl_dist.config import ConfigError


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
        """Read the habits; ``chosen`` values that are not None win.

        Raises
        ------
        ConfigError
            With every problem at once.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected keys and values")
        values |= {key: value for key, value in chosen.items() if value is not None}
        errors = _problems(values)
        if errors:
            raise ConfigError("\n".join(f"{path}: {error}" for error in errors))
        return cls(**values)

    def parameters(self, name: str, processes: int, nodes: int, each: int) -> dict[str, Any]:
        """Give the job in submitit's words.

        Parameters
        ----------
        name : str
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
            "srun_args": ["--kill-on-bad-exit=0"],
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
        """Give the shell lines that come before the ranks."""
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
    """Read a time limit as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

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


def _problems(values: dict[str, Any]) -> list[str]:
    found = []
    defaults = {entry.name: entry for entry in dataclasses.fields(Cluster)}
    for key, value in values.items():
        if key not in defaults:
            found.append(f"{key}: unknown key; valid: {', '.join(defaults)}")
            continue
        words = str(defaults[key].type)
        kind = {"li": list, "di": dict}.get(words[:2])
        if kind is None:
            kind = (int, str) if key == "time" else int if words.startswith("int") else str
        optional = words.endswith("None")
        if not (isinstance(value, kind) and not isinstance(value, bool)) and not (
            optional and value is None
        ):
            found.append(f"{key}: expected {words.replace('None', 'null')}, found {value!r}")
    return found
