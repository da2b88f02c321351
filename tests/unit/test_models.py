"""Tokenizers and the server's model: shapes, the paper's sizes, independence of samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpsl_dist.models.average import average, load_trainable, trainable_state
from mpsl_dist.models.heads import linear
from mpsl_dist.models.server_model import SIZES, ServerModel, build_encoder
from mpsl_dist.models.tokenizers import (
    Patchify,
    PatchTokenizer,
    TextTokenizer,
    Tokenizers,
    fuse,
    token_table,
)


@pytest.mark.parametrize(("frames", "tokens"), [(98, 108), (1024, 1212), (766, 912)])
def test_audio_patches_are_counted_as_ast_does(frames: int, tokens: int) -> None:
    tokenizer = PatchTokenizer(1, frames, 128, 16, 10, 8)
    assert tokenizer(torch.zeros(2, frames, 128)).shape == (2, tokens + 1, 8)


def test_the_papers_client_sizes() -> None:
    image = PatchTokenizer(3, 224, 224, 16, 16, 768)
    audio = PatchTokenizer(1, 98, 128, 16, 10, 768)

    def count(parts: dict) -> int:
        return sum(p.numel() for p in Tokenizers(parts, 768, pre_norm=True).parameters())

    assert count({"image": image}) == 743_424
    assert count({"image": image, "audio": audio}) == 1_024_512


@pytest.mark.parametrize(
    ("size", "millions"), [("Ti", 5.34), ("S", 21.29), ("B", 85.05), ("L", 302.3), ("H", 629.7)]
)
def test_the_papers_encoder_sizes(size: str, millions: float) -> None:
    with torch.device("meta"):
        encoder = build_encoder(*SIZES[size])
    count = sum(p.numel() for p in encoder.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.06)


def test_only_the_last_blocks_are_trained() -> None:
    encoder = build_encoder(16, 4, 2, trainable_blocks=1)
    trained = {name.split(".")[0] for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {"3"}


@pytest.mark.parametrize("fusion", ["early", "late"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_sample_is_predicted_the_same_alone_and_in_a_batch(fusion: str, pooling: str) -> None:
    torch.manual_seed(0)
    lengths = [5, 3]
    model = ServerModel(
        build_encoder(16, 2, 2), 16, lengths, linear(16, 4), fusion, pooling, True
    ).double()
    tokens = fuse([torch.randn(6, n, 16, dtype=torch.float64) for n in lengths], fusion)
    together = model(tokens)
    alone = torch.cat([model([t[i : i + 1] for t in tokens]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_pooling_takes_the_tokens_it_says() -> None:
    model = ServerModel(torch.nn.Identity(), 4, [2, 3], linear(4, 4), "early", "cls", False)
    model.head = torch.nn.Identity()
    joint = torch.randn(1, 5, 4)
    torch.testing.assert_close(model([joint]), (joint[:, 0] + joint[:, 2]) / 2)
    model.pooling = "mean"
    torch.testing.assert_close(model([joint]), joint.mean(1))


def test_the_frozen_token_table_is_neither_trained_nor_sent() -> None:
    table = token_table(100, 8, trainable=False)
    tokenizers = Tokenizers({"text": TextTokenizer(table, 6)}, 8, pre_norm=True)
    assert set(trainable_state(tokenizers)) == {
        "by_modality.text.positions",
        "pre_norm.weight",
        "pre_norm.bias",
    }


def test_equal_states_average_to_themselves_bit_for_bit() -> None:
    state = {"w": torch.randn(50)}
    mean = average([state] * 7, [3, 1, 4, 1, 5, 9, 2])
    assert torch.equal(mean["w"], state["w"])


def test_the_average_is_weighted_by_samples() -> None:
    mean = average([{"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}], [3, 1])
    assert mean["w"].item() == 2.0


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="bias"):
        load_trainable(torch.nn.Linear(2, 2), {"weight": torch.zeros(2, 2)})


@pytest.mark.parametrize("sides", [(28, 28), (30, 21)])
@pytest.mark.parametrize("stride", [4, 3])
def test_patches_are_embedded_as_by_a_convolution(sides: tuple[int, int], stride: int) -> None:
    torch.manual_seed(0)
    ours = Patchify(3, 8, 4, stride, bias=False).double()
    theirs = nn.Conv2d(3, 8, 4, stride, bias=False).double()
    theirs.load_state_dict(ours.state_dict())
    plane_bchw = torch.randn(2, 3, *sides, dtype=torch.float64)
    found, expected = ours(plane_bchw), theirs(plane_bchw).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    upstream = torch.randn_like(expected)
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=0, atol=1e-12)
