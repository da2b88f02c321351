"""What completed runs of every method leave behind: untrained models, and figures made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import toys
import yaml

from mpsl_dist.actors import deployable
from mpsl_dist.actors.holdings import load_data
from mpsl_dist.config import Experiment, to_dict

_SPLIT = ("activations", "predictions", "prediction_gradients", "cut_layer_gradients")
#: What a method's experiment has besides.
_OWN: dict[str, dict[str, Any]] = {
    "m2fedsa": {"clients_per_worker": 2},
    "mlecs": {
        "mlecs": {
            **{"language": "none", "answer": "head", "width": 16, "edge_blocks": 1},
            **{"server_blocks": 1, "rank": 2, "features": 8, "shared": 8, "fused": 12},
        },
        "data": {"public_fraction": 0.3},
    },
}
#: What a test of a method gives.
_TESTS: dict[str, dict[str, float]] = {
    "m2fedsa": {"accuracy": 0.5, "accuracy_image": 0.6, "accuracy_audio": 0.4}
    | {"accuracy_fused": 0.75},
    "mlecs": {"accuracy": 0.5, "f1": 0.4, "accuracy_0": 0.2, "accuracy_1": 0.8}
    | {"server_accuracy": 0.7, "server_f1": 0.65, "product_gap": 0.0125},
    "standalone": {"accuracy": 0.35, "accuracy_own_mean": 0.35, "accuracy_own_min": 0.2}
    | {"accuracy_own_max": 0.5},
}
#: What crosses.
_SENT = {
    **dict.fromkeys(("mpsl", "psl"), _SPLIT),
    **dict.fromkeys(("fedavg", "fedclip"), ("model_down", "model_up")),
    "m2fedsa": (*_SPLIT, "sync_up", "sync_down"),
    "mlecs": ("fused_down", "lora_down", "lora_up"),
}


def experiment(method: str, name: str, **changes: Any) -> Experiment:
    """A toy of pictures and sounds among four clients, trained by a method."""
    values: dict[str, Any] = {"name": name, "method": method, "data": {"name": "toy-image+audio"}}
    for changed in (_OWN.get(method, {}), changes):
        for key, value in changed.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return toys.experiment(**values)


def write(folder: Path, chosen: Experiment, model: bool = False) -> Path:
    """Leave what a run leaves, its ``model/`` only if asked for; return its directory."""
    path, splits = folder / chosen.name, load_data(chosen)
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(to_dict(chosen)))
    test = _TESTS.get(chosen.method, {"accuracy": 0.5})
    lines = [{"step": 1, "epoch": 0, "split": "train", "loss": 1.0}]
    lines.append({"step": 1, "epoch": 0, "split": "test", "metric": test})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sent = {kind: [2**20] * chosen.clients for kind in _SENT.get(chosen.method, ())}
    whole = {split: {"samples": len(getattr(splits, split).labels)} for split in ("train", "test")}
    summary = {
        **{"name": chosen.name, "method": chosen.method, "dataset": chosen.data.name},
        **{"seed": chosen.seed, "clients": chosen.clients, "status": "completed"},
        **{"epochs_completed": 1, "steps_completed": 1, "loss": 1.0, "test": test, "baselines": {}},
        "data": {"classes": len(splits.classes), **whole},
        "trainable_parameters": {"client": 1234, "server": 5678},
        "communication": {
            "up_bytes_per_client_per_epoch": 2**20,
            "down_bytes_per_client_per_epoch": 2**19,
            "bytes_by_kind_and_client": sent,
            "total_bytes_by_kind": {kind: int(np.sum(each)) for kind, each in sent.items()},
        },
        "seconds": {"total": 10.0, "step_median": 0.5},
    }
    (path / "summary.json").write_text(json.dumps(summary))
    if model:
        deployable.build(chosen, splits).save(path / "model", chosen, splits)
    return path
