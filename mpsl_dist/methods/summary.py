"""Where a run stands, and what ``summary.json`` holds of it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from mpsl_dist.actors.defences import guarantees
from mpsl_dist.config import Experiment
from mpsl_dist.data import Splits
from mpsl_dist.errors import RunError
from mpsl_dist.methods.evidence import evidence
from mpsl_dist.methods.method import Method
from mpsl_dist.records.run_directory import RunDirectory


@dataclass
class Position:
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


def counts(method: Method) -> dict[str, int]:
    """Return what a run counts of its losses."""
    link = method.clients
    return {
        "clients_lost": len(link.lost) if link else 0,
        "clients_returned": link.returned if link else 0,
        "steps_repeated": method.repeated,
    }


def summarize(
    experiment: Experiment, splits: Splits, method: Method, at: Position, status: str
) -> dict[str, Any]:
    """Return what ``summary.json`` holds of a run that has ended with this status."""
    epochs = at.step / len(method.plan)
    per = experiment.clients * epochs if epochs else 1
    guaranteed = guarantees(experiment, splits)
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
        | counts(method)
        | ({"privacy": guaranteed} if guaranteed else {})
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
    run.end(summary)
