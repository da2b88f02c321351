"""FedCLIP's adapters."""

from __future__ import annotations

import pytest
import torch

from mpsl_dist.models.adapters import Adapters, AttentionAdapter


def test_the_scaled_form_is_the_released_one_written_out() -> None:
    torch.manual_seed(0)
    adapter = AttentionAdapter(6, "scaled").double()
    first, second = adapter.attention[0], adapter.attention[2]
    x = torch.randn(4, 6, dtype=torch.float64)
    score = torch.tanh(x @ first.weight.T + first.bias) @ second.weight.T + second.bias
    expected = x * (score.exp() / score.exp().sum(1, keepdim=True))
    torch.testing.assert_close(adapter(x), expected, rtol=1e-12, atol=0)


def test_the_scaled_form_leaves_about_a_widths_part_and_the_residual_form_all() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 768)
    scaled = (AttentionAdapter(768, "scaled")(x).norm() / x.norm()).item()
    residual = (AttentionAdapter(768, "residual")(x).norm() / x.norm()).item()
    assert 0.5 / 768 < scaled < 2 / 768
    assert residual == pytest.approx(1, abs=0.01)


def test_adapts_the_included_modalities_alone() -> None:
    adapters = Adapters(["image", "text"], ["image", "audio"], 8, "scaled")
    image, text = torch.randn(2, 3, 8)
    adapted = adapters([image, text])
    assert torch.equal(adapted[1], text) and not torch.equal(adapted[0], image)
    assert list(adapters.by_name) == ["image"]


def test_unified_is_one_adapter_for_all() -> None:
    adapters = Adapters(["image", "text"], "unified", 8, "residual")
    x = torch.randn(3, 8)
    image, text = adapters([x, x])
    assert torch.equal(image, text)
    assert list(adapters.by_name) == ["unified"]


def test_two_adapters_of_vit_b_have_the_published_parameters() -> None:
    # Released code on COCO-QA: 3,436,462 in all, less the classifier and the client's tokenizer.
    adapters = Adapters(["image", "text"], ["image", "text"], 768, "scaled")
    counted = sum(p.numel() for p in adapters.parameters())
    assert counted == 3_436_462 - 430 * 769 - 743_424
