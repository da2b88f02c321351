"""Options of big encoders and of the cache under distributed autograd, two clients a worker."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toys
from multiprocess.test_exactness import STEPS, run_gold

from mpsl_dist.config import to_dict

HALF = {"encoder": {"size": "custom", "width": 16, "depth": 2, "heads": 2, "trainable_blocks": 1}}


def _case(training: dict | None = None, **changes: dict) -> dict:
    values = to_dict(toys.experiment())["training"] | {"precision": "float64"} | (training or {})
    return {"clients_per_worker": 2, "training": values, "plugins": ["toys"]} | changes


def cases(device: str = "cpu") -> dict[str, dict]:
    frozen = HALF | {"train_tokenizers": False}
    rough = {"precision": "float32", "autocast": "bf16"}
    found = {
        "plain": _case(),
        "checkpointed": _case({"checkpoint_blocks": True}),
        "half": _case(model=HALF),
        "half checkpointed": _case({"checkpoint_blocks": True}, model=HALF),
        "float32": _case({"precision": "float32"}),
        "bf16": _case(rough),
        "bf16 checkpointed": _case(rough | {"checkpoint_blocks": True}),
        "frozen": _case(model=frozen),
        "cached": _case(model=frozen, wire={"cache": True}),
        "prefix": _case(model=frozen, wire={"cache": True, "cache_prefix": True}),
    }
    return {name: case | {"device": device} for name, case in found.items()}


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """All cases in one world; two epochs, so that what is cached is used."""
    return run_gold(tmp_path_factory.mktemp("large"), cases(), 2 * STEPS)


def difference(ours: dict, theirs: dict) -> float:
    """The largest of any parameter, server's and clients'."""
    found = [(ours["server"][k] - x).abs().max().item() for k, x in theirs["server"].items()]
    for client, state in theirs["clients"].items():
        found += [(ours["clients"][client][k] - x).abs().max().item() for k, x in state.items()]
    return max(found)


SAME = [
    ("checkpointed", "plain"),
    ("half checkpointed", "half"),
    ("bf16 checkpointed", "bf16"),
    ("cached", "frozen"),
]


@pytest.mark.parametrize(("case", "as_case"), SAME)
def test_it_is_the_same_to_the_last_bit(case: str, as_case: str, gold: dict) -> None:
    ours, theirs = gold[case][1], gold[as_case][1]
    assert ours["losses"] == theirs["losses"]
    assert difference(ours, theirs) == 0
    for mine, other in zip(ours["cut_gradients"], theirs["cut_gradients"], strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in other)


def test_every_block_is_computed_again_once_in_the_distributed_backward(gold: dict) -> None:
    plain, again = gold["plain"][1], gold["checkpointed"][1]
    assert plain["block_forwards"] == 2 * 2 * STEPS
    assert again["block_forwards"] == 2 * plain["block_forwards"]
    assert (again["forwards"], again["backwards"]) == (2 * STEPS, 2 * STEPS)


def test_the_kept_prefix_trains_the_same_and_sees_a_sample_once(gold: dict) -> None:
    ours, theirs = gold["prefix"][1], gold["frozen"][1]
    assert difference(ours, theirs) < 1e-9
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-9)
    assert theirs["block_forwards"] - ours["block_forwards"] == STEPS


def test_bfloat16_products_train_alike(gold: dict) -> None:
    rough, exact = gold["bf16"][1]["losses"], gold["float32"][1]["losses"]
    assert rough != exact
    assert rough == pytest.approx(exact, rel=2e-2)


@pytest.mark.campaign
def test_compiled_blocks_work_under_distributed_autograd(tmp_path: Path) -> None:
    """The C++ compiler takes its time."""
    single = {"precision": "float32"}
    chosen = {"plain": _case(single), "compiled": _case(single | {"compile": True})}
    found = run_gold(tmp_path, chosen, steps=2)
    losses = {case: told["losses"] for case, (_, told) in found.items()}
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-6)
