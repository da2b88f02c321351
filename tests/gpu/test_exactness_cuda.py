"""The gold test on CUDA, every tensor staged through CPU on its way."""

from __future__ import annotations

import pytest
import torch
from multiprocess.test_exactness import assert_equals_reference, cases, run_gold

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device on this machine"
)


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    return run_gold(tmp_path_factory.mktemp("gold"), cases("cuda"))


@pytest.mark.parametrize("case", cases("cuda"))
def test_training_on_cuda_equals_a_single_process(case: str, gold: dict) -> None:
    experiment, told = gold[case]
    assert_equals_reference(experiment, told)
