"""FedCLIP's adapters."""

from __future__ import annotations

import pytest
import torch

from mpsl_dist.models.adapters import Adapters, AttentionAdapter


def test_the_scaled_form_written_out() -> None:
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


def test_the_released_softmax_runs_over_captions_and_leaves_one_as_it_is() -> None:
    torch.manual_seed(0)
    adapters = Adapters(["image", "text"], ["image", "text"], 6, "released", late=True).double()
    image, text = torch.randn(3, 6).double(), torch.randn(3, 5, 6).double()
    first, second = (adapters.by_name["text"].attention[n] for n in (0, 2))
    score = torch.tanh(text @ first.weight.T + first.bias) @ second.weight.T + second.bias
    expected = text * (score.exp() / score.exp().sum(1, keepdim=True))
    adapted = adapters([image, text])
    torch.testing.assert_close(adapted[1], expected, rtol=1e-12, atol=0)
    assert torch.equal(adapters([image, text[:, 0]])[1], text[:, 0])  # one caption: all ones
    scaled = Adapters(["image", "text"], ["image", "text"], 6, "scaled", late=True).double()
    scaled.load_state_dict(adapters.state_dict())
    assert torch.equal(adapted[0], scaled([image, text])[0])
    assert not torch.equal(scaled([image, text[:, 0]])[1], text[:, 0])


def test_fused_early_the_released_form_is_the_scaled_one() -> None:
    torch.manual_seed(0)
    features = list(torch.randn(2, 3, 6))
    forms = [Adapters(["image", "text"], "unified", 6, form) for form in ("released", "scaled")]
    forms[1].load_state_dict(forms[0].state_dict())
    for ours, theirs in zip(forms[0](features), forms[1](features), strict=True):
        assert torch.equal(ours, theirs)
