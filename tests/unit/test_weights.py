"""Weights from elsewhere give the same features as where they came from."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import toys
from open_clip.transformer import TextTransformer, VisionTransformer
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from mpsl_dist import data
from mpsl_dist.actors import assembly, deployable
from mpsl_dist.actors.choices import pixels_of
from mpsl_dist.config import ConfigError, from_dict
from mpsl_dist.data.decode.text import tokenize
from mpsl_dist.errors import WeightsError
from mpsl_dist.models.average import trainable_state
from mpsl_dist.models.clip_text import ClipText, build_text_tower
from mpsl_dist.models.server_model import build_encoder
from mpsl_dist.models.tokenizers import PatchTokenizer, copy_of
from mpsl_dist.models.weight_sources import fetch, read
from mpsl_dist.models.weights import load_encoder, load_stem, load_text

WIDTH, DEPTH, HEADS = 48, 3, 4
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def shaken(module: nn.Module) -> nn.Module:
    """Move every parameter off its initial zeros and ones, so that a mix-up shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module.eval()


def blocks() -> nn.Sequential:
    norm = partial(nn.LayerNorm, eps=1e-5)
    return shaken(
        nn.Sequential(*(Block(WIDTH, HEADS, qkv_bias=True, norm_layer=norm) for _ in range(DEPTH)))
    )


def vision(image_size: int = 32, width: int = WIDTH) -> VisionTransformer:
    return shaken(VisionTransformer(image_size, 8, width, DEPTH, HEADS, 4.0, output_dim=16))


def text_tower(output_dim: int = 32) -> TextTransformer:
    return shaken(TextTransformer(width=32, heads=2, layers=2, output_dim=output_dim))


def whole_clip() -> dict[str, Tensor]:
    """The state_dict of a CLIP as open_clip has it: image and text side in one."""
    image = {f"visual.{key}": value for key, value in vision().state_dict().items()}
    return image | text_tower().state_dict() | {"logit_scale": torch.tensor(4.6)}


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


# -- encoder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_meta_transformer_file_gives_the_same_features(tmp_path: Path, suffix: str) -> None:
    theirs, path = blocks(), tmp_path / f"encoder{suffix}"
    if suffix == ".pth":
        torch.save(theirs.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(theirs.state_dict(), path)
    ours = build_encoder(WIDTH, DEPTH, HEADS).eval()
    account = load_encoder(ours, *reversed(fetch("encoder", str(path), "custom", None, "")))
    x_bld = torch.randn(2, 7, WIDTH)
    assert close(ours(x_bld), theirs(x_bld))
    assert len(account.loaded) == len(theirs.state_dict()) and not account.left


def test_meta_transformer_by_its_released_name(tmp_path: Path) -> None:
    theirs = {f"{i}.{k}": v for i in range(2) for k, v in blocks()[0].state_dict().items()}
    torch.save(theirs, tmp_path / "Meta-Transformer_base_patch16_encoder.pth")
    name, state = fetch("encoder", "meta-transformer", "B", str(tmp_path), "")
    assert state.keys() == theirs.keys() and "base_patch16" in name
    with pytest.raises(WeightsError, match=r"Meta-Transformer_large_patch14_encoder.*weights.root"):
        fetch("encoder", "meta-transformer", "L", str(tmp_path), "")
    with pytest.raises(WeightsError, match="size B and L"):
        fetch("encoder", "meta-transformer", "S", str(tmp_path), "")


def test_timm_vit_gives_the_same_features() -> None:
    theirs = shaken(
        TimmViT(img_size=32, patch_size=8, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS)
    )
    ours = build_encoder(WIDTH, DEPTH, HEADS).eval()
    account = load_encoder(ours, theirs.state_dict(), "timm:small")
    x_bld = torch.randn(2, 7, WIDTH)
    assert close(ours(x_bld), theirs.blocks(x_bld))
    assert {"cls_token", "pos_embed", "head.weight", "norm.bias"} <= set(account.left)


@pytest.mark.parametrize("size", ["Ti"])
def test_a_pretrained_size_of_timm_fits(size: str) -> None:
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    load_encoder(build_encoder(192, 12, 3), state, "timm:vit_tiny_patch16_224")


def test_open_clip_visual_gives_the_same_features() -> None:
    state = whole_clip()
    theirs = vision()
    theirs.load_state_dict({k[7:]: v for k, v in state.items() if k.startswith("visual.")})
    encoder = build_encoder(WIDTH, DEPTH, HEADS).eval()
    stem, norm = PatchTokenizer(3, 32, 32, 8, 8, WIDTH), nn.LayerNorm(WIDTH)
    load_encoder(encoder, state, "clip")
    account = load_stem(stem, norm, state, "clip", "image")
    image_bchw = torch.randn(2, 3, 32, 32)
    embedded_bld = norm(stem(image_bchw))
    assert close(embedded_bld, theirs._embeds(image_bchw))
    assert close(encoder(embedded_bld), theirs.transformer(theirs._embeds(image_bchw)))
    assert not account.missing and not account.changed


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("1.mlp.fc1.bias"), r"file: '1\.mlp\.fc1\.bias' is missing"),
        (lambda s: s.update({"3.norm1.bias": s["2.norm1.bias"]}), r"'3\.norm1\.bias' has no place"),
        (lambda s: s.update({"0.ls1.gamma": torch.ones(48)}), r"'0\.ls1\.gamma' has no place"),
        (
            lambda s: s.update({"0.norm2.weight": torch.ones(64)}),
            r"file: '0\.norm2\.weight' is 64, this model needs 48",
        ),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused_whole(spoil, message: str) -> None:
    state = dict(blocks().state_dict())
    spoil(state)
    ours = build_encoder(WIDTH, DEPTH, HEADS)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(WeightsError, match=message):
        load_encoder(ours, state, "file")
    assert all(torch.equal(before[key], value) for key, value in ours.state_dict().items())


def test_a_file_without_blocks_names_what_it_has() -> None:
    with pytest.raises(WeightsError, match=r"no transformer blocks.*head\.\* \(2\), fc"):
        load_encoder(
            build_encoder(WIDTH, 1, HEADS),
            {"head.weight": torch.ones(1), "head.bias": torch.ones(1), "fc": torch.ones(1)},
            "file",
        )


# -- stems -----------------------------------------------------------------------------------------


def test_timm_stem_folds_its_bias_into_the_positions() -> None:
    theirs = shaken(TimmViT(img_size=32, patch_size=8, embed_dim=WIDTH, depth=1, num_heads=HEADS))
    ours = PatchTokenizer(3, 32, 32, 8, 8, WIDTH)
    account = load_stem(ours, nn.LayerNorm(WIDTH), theirs.state_dict(), "timm:small", "image")
    image_bchw = torch.randn(2, 3, 32, 32)
    assert close(ours(image_bchw), theirs._pos_embed(theirs.patch_embed(image_bchw)))
    assert account.missing == ("pre_norm.weight", "pre_norm.bias")
    assert "bias added" in str(account) and "missing: pre_norm.* (2)" in str(account)


@pytest.mark.parametrize("sides", [(48, 48), (16, 32)])
def test_positions_are_resized_as_timm_resizes_them(sides: tuple[int, int]) -> None:
    theirs = shaken(TimmViT(img_size=32, patch_size=8, embed_dim=WIDTH, depth=1, num_heads=HEADS))
    state = theirs.state_dict()
    ours = PatchTokenizer(3, *sides, 8, 8, WIDTH)
    account = load_stem(ours, nn.Identity(), state, "timm:small", "image")
    theirs.set_input_size(img_size=sides)
    image_bchw = torch.randn(1, 3, *sides)
    assert close(ours(image_bchw), theirs._pos_embed(theirs.patch_embed(image_bchw)))
    assert f"positions 4x4 -> {sides[0] // 8}x{sides[1] // 8}" in account.changed


def test_merged_patches_take_every_patchs_own_weights() -> None:
    theirs = shaken(TimmViT(img_size=32, patch_size=8, embed_dim=WIDTH, depth=1, num_heads=HEADS))
    every, merged = (PatchTokenizer(3, 32, 32, 8, 8, WIDTH, merge) for merge in (1, 2))
    for stem in (every, merged):
        account = load_stem(stem, nn.Identity(), theirs.state_dict(), "timm:small", "image")
        assert not any("positions 4x4" in change for change in account.changed)
    image_bchw = torch.randn(2, 3, 32, 32)
    tokens_bld = every(image_bchw)
    assert close(merged(image_bchw)[:, 1], tokens_bld[:, [1, 2, 5, 6]].mean(1))


def test_grey_pictures_take_the_sum_of_the_kernels() -> None:
    state = {f"visual.{key}": value for key, value in vision().state_dict().items()}
    colour, grey = PatchTokenizer(3, 32, 32, 8, 8, WIDTH), PatchTokenizer(1, 32, 32, 8, 8, WIDTH)
    for stem in (colour, grey):
        load_stem(stem, nn.Identity(), state, "clip", "image")
    picture_b1hw = torch.randn(2, 1, 32, 32)
    assert close(grey(picture_b1hw), colour(picture_b1hw.expand(-1, 3, -1, -1)))


def ast_state(width: int) -> dict[str, Tensor]:
    """The stem of the hub's AST: a plane of (mel bins, frames), CLS and distillation token."""
    stem = "audio_spectrogram_transformer.embeddings."
    return {
        f"{stem}cls_token": torch.randn(1, 1, width),
        f"{stem}distillation_token": torch.randn(1, 1, width),
        f"{stem}position_embeddings": torch.randn(1, 1214, width),
        f"{stem}patch_embeddings.projection.weight": torch.randn(width, 1, 16, 16) * 0.05,
        f"{stem}patch_embeddings.projection.bias": torch.randn(width),
        "classifier.dense.weight": torch.randn(3, width),
    }


def test_ast_stem_gives_the_same_tokens() -> None:
    state = ast_state(WIDTH)
    stem = "audio_spectrogram_transformer.embeddings."
    ours = PatchTokenizer(1, 1024, 128, 16, 10, WIDTH)
    account = load_stem(ours, nn.LayerNorm(WIDTH), state, "ast", "audio")
    audio_btm = torch.randn(1, 1024, 128)
    # The hub's model: channel in front, time last, patches in the order of (mel, time).
    theirs_bdmt = nn.functional.conv2d(
        audio_btm.unsqueeze(1).transpose(2, 3),
        state[f"{stem}patch_embeddings.projection.weight"],
        state[f"{stem}patch_embeddings.projection.bias"],
        stride=10,
    )
    positions = state[f"{stem}position_embeddings"]
    tokens_bld = theirs_bdmt.flatten(2).transpose(1, 2) + positions[:, 2:]
    in_our_order = tokens_bld.unflatten(1, (12, 101)).transpose(1, 2).flatten(1, 2)
    assert close(ours(audio_btm)[:, 1:], in_our_order)
    assert close(ours(audio_btm)[:, :1], state[f"{stem}cls_token"] + positions[:, :1])
    assert not account.missing


def test_ast_positions_fit_a_shorter_clip() -> None:
    ours = PatchTokenizer(1, 98, 128, 16, 10, WIDTH)
    account = load_stem(ours, nn.LayerNorm(WIDTH), ast_state(WIDTH), "ast", "audio")
    assert "positions 101x12 -> 9x12" in account.changed


def test_a_stem_that_does_not_fit_names_the_key() -> None:
    state = {f"visual.{key}": value for key, value in vision().state_dict().items()}
    with pytest.raises(
        WeightsError, match=r"clip: 'visual\.conv1\.weight' is 48x3x8x8.*48x3x16x16"
    ):
        load_stem(PatchTokenizer(3, 32, 32, 16, 16, WIDTH), nn.Identity(), state, "clip", "image")
    with pytest.raises(WeightsError, match="no audio stem"):
        load_stem(PatchTokenizer(1, 32, 32, 16, 16, WIDTH), nn.Identity(), state, "clip", "audio")
    del state["visual.class_embedding"]
    with pytest.raises(WeightsError, match=r"'visual\.class_embedding' is missing"):
        load_stem(PatchTokenizer(3, 32, 32, 8, 8, WIDTH), nn.Identity(), state, "clip", "image")


# -- text tower ------------------------------------------------------------------------------------

TEXTS = ["what color is the car?", "how many people sit there?"]


def test_open_clip_text_tower_gives_the_same_features() -> None:
    theirs = text_tower()
    ours = ClipText(text_tower(), WIDTH)
    account = load_text(ours, whole_clip() | theirs.state_dict(), "clip")
    tokens_bl = tokenize(TEXTS, 77)
    expected_be = theirs(tokens_bl)
    token_b1d = ours(tokens_bl)
    assert token_b1d.shape == (2, 1, WIDTH)
    assert close(token_b1d[:, 0, :32], expected_be)
    assert not token_b1d[:, 0, 32:].any()
    assert "logit_scale" in account.left and "visual.conv1.weight" in account.left


def test_a_short_row_gives_what_the_full_one_gives() -> None:
    ours = ClipText(text_tower(), WIDTH)
    assert close(ours.encode(tokenize(TEXTS, 12)), ours.encode(tokenize(TEXTS, 77)))


def test_a_text_is_embedded_once_and_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, ran = ClipText(text_tower(), WIDTH), []
    encode = ours.encode
    monkeypatch.setattr(ours, "encode", lambda tokens: ran.append(len(tokens)) or encode(tokens))
    tokens_bl = tokenize(TEXTS, 12)
    first = ours(tokens_bl)
    assert torch.equal(ours(tokens_bl.flip(0)), first.flip(0))
    assert torch.equal(ours(tokens_bl[:1]), first[:1])
    assert ran == [1, 1]


def test_the_tower_is_never_trained() -> None:
    ours = ClipText(text_tower(), WIDTH)
    assert not any(p.requires_grad for p in ours.parameters())
    assert not ours(tokenize(TEXTS, 12)).requires_grad
    assert copy.deepcopy(ours) is ours


def test_a_narrow_encoder_gets_a_projection() -> None:
    ours, again = ClipText(text_tower(64), WIDTH), ClipText(text_tower(64), WIDTH)
    tokens_bl = tokenize(TEXTS, 12)
    assert ours(tokens_bl).shape == (2, 1, WIDTH)
    assert torch.equal(ours.narrow_ed, again.narrow_ed)


def test_a_tower_that_does_not_fit_names_the_key() -> None:
    ours = ClipText(text_tower(), WIDTH)
    state = text_tower().state_dict()
    del state["ln_final.bias"]
    with pytest.raises(WeightsError, match=r"hub: 'ln_final\.bias' is missing"):
        load_text(ours, state, "hub")
    with pytest.raises(ValueError, match=r"model\.text_tower: open_clip has no architecture"):
        build_text_tower("ViT-nothing")
    with pytest.raises(ValueError, match="no classic CLIP text tower"):
        build_text_tower("xlm-roberta-base-ViT-B-32")


# -- files and configuration -----------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 broken"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"weights\.image: .*damaged"):
        read(path, "image")


def test_other_contents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no file"):
        read(tmp_path / "absent.pth", "image")
    torch.save({"a": [1, 2]}, tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="no state_dict"):
        read(tmp_path / "list.pt", "image")
    torch.save(nn.Linear(1, 1), tmp_path / "pickled.pt")
    with pytest.raises(WeightsError, match="no file of plain tensors"):
        read(tmp_path / "pickled.pt", "image")
    torch.save({"state_dict": {"module.a": torch.ones(1)}}, tmp_path / "wrapped.pt")
    assert read(tmp_path / "wrapped.pt", "image").keys() == {"a"}


def test_every_bad_source_is_named_at_once() -> None:
    values = {
        "weights": {"encoder": "timmm", "image": "ast", "audio": "timm", "text": "clip"},
        "model": {"train_token_table": True, "text_tower": "ViT-B-16"},
    }
    with pytest.raises(ConfigError) as caught:
        from_dict(values)
    for key in ("weights.encoder", "weights.image", "weights.audio", "weights.text", "text_tower"):
        assert key in str(caught.value)


def test_a_size_without_a_default_says_so() -> None:
    with pytest.raises(WeightsError, match=r"weights\.image: clip has no default.*size=Ti"):
        fetch("image", "clip", "Ti", None, "")


@pytest.mark.parametrize(
    ("part", "source", "tower", "message"),
    [
        ("encoder", "clip:ViT-B-16/openai", "", "trained with QuickGELU"),
        ("encoder", "clip:ViT-B-16-quickgelu/dfn2b", "", "trained with QuickGELU"),
        ("text", "clip", "ViT-B-16", r"take model\.text_tower=ViT-B-16-quickgelu"),
        (
            "text",
            "clip:ViT-B-16/laion2b_s34b_b88k",
            "ViT-B-16-quickgelu",
            r"model\.text_tower=ViT-B-16 and weights\.text=clip:ViT-B-16/laion2b",
        ),
        ("text", "clip:ViT-L-14/laion2b_s32b_b82k", "ViT-B-16", r"model\.text_tower=ViT-L-14 "),
    ],
)
def test_weights_of_another_activation_are_refused(
    part: str, source: str, tower: str, message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        fetch(part, source, "B", None, tower)


def test_a_failed_download_advises_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host\nand a long story")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError) as caught:
        fetch("encoder", "timm", "Ti", None, "")
    assert "timm:vit_tiny_patch16_224.augreg_in21k cannot be had: no route to host" in str(
        caught.value
    )
    assert "local file" in str(caught.value) and "long story" not in str(caught.value)


def test_an_experiment_begins_with_its_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = whole_clip()
    torch.save(theirs, tmp_path / "clip.pt")
    toy = toys.experiment(
        model={
            "encoder": {"size": "custom", "width": WIDTH, "depth": DEPTH, "heads": HEADS},
            "image_patch": 8,
        },
        weights=dict.fromkeys(("encoder", "image"), str(tmp_path / "clip.pt")),
    )
    splits = data.load(toy.data.name, plugins=["toys"])
    with caplog.at_level("INFO", logger="mpsl_dist"):
        tokenizers = assembly.build_tokenizers(toy, splits)
        again = copy_of(tokenizers)
        server = assembly.build_server_model(toy, splits, tokenizers.lengths)
    assert torch.equal(tokenizers.by_modality["image"].cls.flatten(), theirs[_CLS])
    assert torch.equal(again.by_modality["image"].cls, tokenizers.by_modality["image"].cls)
    key = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    assert torch.equal(server.encoder[0].mlp.fc1.weight, theirs[key])
    assert caplog.text.count("weights.image from") == 1
    assert "positions 4x4 -> 1x1" in caplog.text and "weights.encoder from" in caplog.text


def test_clients_of_a_process_share_one_tower() -> None:
    toy = toys.experiment(model={"text": "clip", "text_tower": "ViT-B-16"})
    splits = data.load(toy.data.name, plugins=["toys"])
    tower = assembly.build_shared_text(toy, splits)
    first, second = (assembly.build_tokenizers(toy, splits, tower) for _ in range(2))
    assert first.by_modality["text"] is second.by_modality["text"] is tower
    assert first.lengths[1] == 1
    assert not any("text" in name for name in trainable_state(first))
    inputs = splits.train.fetch([0, 1]).inputs
    assert first(inputs)[1].shape == (2, 1, 16)


_CLS = "visual.class_embedding"


# -- what the pixels are standardised with -----------------------------------------------------


@pytest.mark.parametrize(
    ("source", "size", "pixels"),
    [
        ("random", "B", "paper"),
        ("stem.safetensors", "B", "paper"),
        ("clip", "B", "clip"),
        ("clip", "L", "half"),
        ("clip:ViT-B-16/openai", "Ti", "clip"),
        ("timm", "Ti", "half"),
        ("timm", "H", "clip"),
        ("timm:vit_base_patch16_224.mae", "B", "imagenet"),
    ],
)
def test_pixels_are_those_that_the_image_weights_were_trained_on(
    source: str, size: str, pixels: str
) -> None:
    chosen = from_dict({"weights": {"image": source}, "model": {"encoder": {"size": size}}})
    assert pixels_of(chosen) == pixels
    told = replace(chosen, data=replace(chosen.data, pixels="imagenet"))
    assert pixels_of(told) == "imagenet"


def test_a_saved_model_keeps_what_its_pixels_were(tmp_path: Path) -> None:
    chosen = toys.experiment()
    splits = toys.load(("image", "text"))
    model = deployable.build(chosen, splits)
    as_trained = replace(chosen, weights=replace(chosen.weights, image="clip:ViT-B-16/openai"))
    model.save(tmp_path, as_trained, splits)
    _, experiment, _ = deployable.load(tmp_path)
    assert experiment.weights.image == "random" and experiment.data.pixels == "clip"
