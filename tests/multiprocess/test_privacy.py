"""Labels and raw inputs never leave a client."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import toys
from conftest import launcher, torchrun_line

from mpsl_dist.actors.assembly import build_tokenizers
from mpsl_dist.actors.holdings import load_data
from mpsl_dist.config import to_dict
from mpsl_dist.data import Splits
from mpsl_dist.models.average import trainable_state

RANKS = Path(__file__).with_name("ranks.py")


def record(folder: Path, task: str, modalities: str, **sync: object) -> list:
    """Train two epochs; give everything that the workers handed to RPC."""
    sync = sync or {"mode": "gradients", "every": 2}
    changes = {"data": {"name": f"toy-{modalities}"}, "output": str(folder)}
    experiment = toys.experiment(
        **changes, clients_per_worker=2, tokenizer_sync=sync, faults={"min_clients": 3}
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
    assert tokenizers_among(sent, modalities), "they are not masked here, and are found"


def tokenizers_among(sent: list, modalities: str) -> list[tuple[int, ...]]:
    """Return the shapes of what was sent of tokenizers as it is: a vector, or parameters."""
    chosen = toys.experiment(data={"name": f"toy-{modalities}"})
    trained = trainable_state(build_tokenizers(chosen, load_data(chosen)))
    shapes = {tuple(x.shape) for x in trained.values()}
    shapes.add((sum(x.numel() for x in trained.values()),))
    found = [tuple(x.shape) for x in sent if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return [shape for shape in found if shape in shapes]


def test_workers_send_nothing_of_their_tokenizers_but_masked(tmp_path: Path) -> None:
    """Neither in training nor for tests and the model to deploy."""
    sent = record(tmp_path, "record", "image+text", mode="weights", masked=True)
    assert tokenizers_among(sent, "image+text") == []
    whole = [x for x in sent if isinstance(x, torch.Tensor) and x.dtype == torch.long]
    assert len(whole) > 20
    bits = torch.cat([x.flatten().view(torch.uint8) for x in whole]).bincount(minlength=256)
    assert (bits - bits.float().mean()).abs().max() < 7 * bits.float().mean().sqrt()


@pytest.mark.parametrize("leak", ["leak_labels", "leak_inputs"])
def test_a_client_that_leaks_is_found(tmp_path: Path, leak: str) -> None:
    sent = record(tmp_path, leak, "image+text")
    assert offences(sent, toys.load(("image", "text")))
