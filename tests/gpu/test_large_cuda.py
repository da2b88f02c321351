"""Checkpointed blocks and bfloat16 products on CUDA."""

from __future__ import annotations

import pytest
import torch
from multiprocess.test_cached_and_large import cases, difference
from multiprocess.test_exactness import run_gold

from mpsl_dist.models.server_model import build_encoder

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device on this machine"
)


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    return run_gold(tmp_path_factory.mktemp("large"), cases("cuda"))


@pytest.mark.parametrize(
    ("case", "as_case"), [("checkpointed", "plain"), ("half checkpointed", "half")]
)
def test_blocks_computed_again_train_the_same(case: str, as_case: str, gold: dict) -> None:
    """CUDA's attention adds up in no fixed order."""
    assert difference(gold[case][1], gold[as_case][1]) < 1e-9


def test_bfloat16_products_train_alike(gold: dict) -> None:
    assert gold["bf16"][1]["losses"] == pytest.approx(gold["float32"][1]["losses"], rel=2e-2)


def test_checkpoints_and_bfloat16_take_less_memory() -> None:
    def peak(checkpointed: bool, autocast: str | None) -> int:
        encoder = build_encoder(256, 8, 4).cuda()
        encoder.checkpoint_blocks, encoder.autocast = checkpointed, autocast
        tokens_bld = torch.randn(32, 197, 256, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        encoder(tokens_bld).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    plain = peak(False, None)
    assert peak(False, "bf16") < 0.8 * plain
    assert peak(True, None) < 0.4 * plain
