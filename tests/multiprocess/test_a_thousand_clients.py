"""A thousand clients on four and on eight workers. Long: ``--campaign``."""

from __future__ import annotations

import json
from pathlib import Path

import measure_clients
import pytest
import torch
from conftest import launcher, torchrun_line
from local_fleet import in_one_process, steps_of

from mpsl_dist.config import Experiment, from_dict, load, to_dict

ROOT = Path(__file__).parents[2]
RANKS = Path(__file__).with_name("ranks.py")
CLIENTS, STEPS = 1000, 2
#: KiB that a further client takes besides its tensors: Python's objects, its part of a step's
#: graph, its messages under way.
BESIDES = 256

pytestmark = pytest.mark.campaign


def quickstart(workers: int) -> Experiment:
    words = [f"clients={CLIENTS}", f"clients_per_worker={CLIENTS // workers}", "device=cpu"]
    words += [f"training.batch_size={CLIENTS}", "tokenizer_sync={mode: weights, every: 1}"]
    threads = ["runtime.server_threads=1", "runtime.worker_threads=1"]
    return load(ROOT / "configs" / "quickstart.yaml", words + threads)


def over(folder: Path, workers: int) -> dict:
    """Train some steps over so many workers; gives every number that came of it."""
    task = folder / f"{workers}.json"
    experiment = to_dict(quickstart(workers)) | {"output": str(folder)}
    task.write_text(json.dumps({"steps": STEPS, "experiments": [experiment]}))
    with launcher(folder) as launch:
        line = torchrun_line(workers + 1, str(RANKS), "gold", str(task))
        status, output = launch(line).finish(500)
    assert status == 0, output
    return torch.load(task.with_suffix(".pt"))[0]


def test_they_train_the_same_on_four_workers_on_eight_and_in_one_process(tmp_path: Path) -> None:
    four, eight = over(tmp_path, 4), over(tmp_path, 8)
    alone = in_one_process(from_dict(to_dict(quickstart(4))))
    assert steps_of(alone, STEPS) == four["losses"] == eight["losses"]
    for key, value in alone.server.model.state_dict().items():
        assert torch.equal(four["server"][key], value), key
        assert torch.equal(eight["server"][key], value), key
    assert len(four["clients"]) == len(eight["clients"]) == CLIENTS
    for n, client in alone.clients.references.items():
        for key, value in client.tokenizer_weights().items():
            assert torch.equal(four["clients"][n][key], value), (n, key)
            assert torch.equal(eight["clients"][n][key], value), (n, key)


def test_a_further_client_takes_no_memory_but_its_own() -> None:
    words = ["model.encoder.width=256", "training.batch_size=1000", "tokenizer_sync.mode=none"]
    few, hosts, _ = measure_clients.measure(200, 4, words, 3.0)
    all_, same, _ = measure_clients.measure(CLIENTS, 4, words, 3.0)
    assert hosts == same == 4
    further = (all_ - few) / (CLIENTS - 200)
    assert further <= 4 * measure_clients.trained_bytes(words) + BESIDES * 2**10
