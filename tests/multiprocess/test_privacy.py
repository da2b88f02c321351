"""Labels and raw inputs never leave a client."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import toys
from conftest import launcher, torchrun_line

from mpsl_dist.config import to_dict
from mpsl_dist.data import Splits

RANKS = Path(__file__).with_name("ranks.py")


def record(folder: Path, task: str, modalities: str) -> list:
    """Train two epochs; give everything that the workers handed to RPC."""
    changes = {"data": {"name": f"toy-{modalities}"}, "output": str(folder)}
    experiment = toys.experiment(
        **changes, clients_per_worker=2, tokenizer_sync={"mode": "gradients", "every": 2}
    )
    path = folder / "task.json"
    path.write_text(json.dumps({"experiment": to_dict(experiment)}))
    with launcher(folder) as launch:
        status, output = launch(torchrun_line(3, str(RANKS), task, str(path))).finish(120)
    assert status == 0, output
    return [
        item
        for rank in (1, 2)
        for item in torch.load(folder / f"sent-by-{rank}.pt", weights_only=False)
    ]


def offences(sent: list, splits: Splits) -> list[str]:
    """Return what among the sent is, or carries, labels or raw inputs."""
    found = []
    for item in sent:
        if not isinstance(item, torch.Tensor):
            found.append(item)
        elif not item.is_floating_point():
            found.append(f"a tensor of {item.dtype}, as labels and text are")
        elif _carries_rows(item, splits):
            found.append("a tensor with values of a raw input")
    return found


def _carries_rows(tensor: torch.Tensor, splits: Splits) -> bool:
    """Whether a tenth of a sample's raw values stand in the tensor, wherever they stand."""
    values = tensor.flatten()
    for name, inputs in splits.train.inputs.items():
        if name != "text":
            rows = inputs.flatten(1)
            shared = torch.isin(rows, values).float().mean(1)
            if (shared > 0.1).any():
                return True
    return False


@pytest.mark.parametrize("modalities", ["image+text", "image+audio"])
def test_workers_send_neither_labels_nor_raw_inputs(tmp_path: Path, modalities: str) -> None:
    sent = record(tmp_path, "record", modalities)
    assert sum(isinstance(item, torch.Tensor) for item in sent) > 50
    assert offences(sent, toys.load(tuple(modalities.split("+")))) == []


@pytest.mark.parametrize("leak", ["leak_labels", "leak_inputs"])
def test_a_client_that_leaks_is_found(tmp_path: Path, leak: str) -> None:
    sent = record(tmp_path, leak, "image+text")
    assert offences(sent, toys.load(("image", "text")))
