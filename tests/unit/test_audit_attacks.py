"""Attacks of an audit on tensors alone: what is exact is exact, and what is noise tells nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpsl_dist.analysis.audit import attacks, labels, matching, pictures, scores, words
from mpsl_dist.analysis.audit.attacks import by_modality
from mpsl_dist.analysis.audit.figures import Audit
from mpsl_dist.analysis.audit.victim import Heard
from mpsl_dist.data import TensorDataset
from mpsl_dist.models.tokenizers import PatchTokenizer, TextTokenizer, Tokenizers, token_table


def tokenizers_of(
    width: int, patch: int, stride: int, pre_norm: bool, merge: int = 1, channels: int = 1
) -> Tokenizers:
    torch.manual_seed(3)
    image = PatchTokenizer(channels, 8, 8, patch, stride, width, merge)
    built = Tokenizers({"image": image}, width, pre_norm)
    if pre_norm:  # as after training
        torch.nn.init.normal_(built.pre_norm.weight, mean=1.0, std=0.2)
        torch.nn.init.normal_(built.pre_norm.bias, std=0.2)
    return built.double()


def some_planes(count: int = 4, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(count, channels, 8, 8, generator=generator).double()


def seen(built: Tokenizers, planes: Tensor) -> tuple[Tensor, pictures.Patches]:
    """What the server receives of planes, without the first token, and what it knows."""
    known = pictures.known_patches(
        built.by_modality["image"], built.pre_norm, tuple(planes.shape[1:])
    )
    assert known is not None
    return built({"image": planes})[0][:, 1:].detach(), known


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("patch, stride", [(4, 4), (2, 2), (4, 2)])
@pytest.mark.parametrize("width", [3, 4, 5, 6, 10, 15, 16, 17, 18, 24])
def test_pictures_come_back_whole_where_the_rank_says_so_and_nowhere_else(
    width: int, patch: int, stride: int, pre_norm: bool
) -> None:
    planes = some_planes()
    tokens, known = seen(tokenizers_of(width, patch, stride, pre_norm), planes)
    guess = pictures.solve(tokens, known, torch.full((1, 8, 8), 0.5).double())
    worst = float((guess - planes).abs().amax())
    assert pictures.exactness(known).exact == (worst < 1e-4), worst


def test_without_a_norm_float32_tokens_give_pictures_within_1e_5() -> None:
    planes = some_planes()
    tokens, known = seen(tokenizers_of(24, 4, 4, pre_norm=False), planes)
    guess = pictures.solve(tokens.float(), known, torch.zeros(1, 8, 8))
    assert (guess - planes).abs().amax() < 1e-5


def test_exactness_counts_the_numbers_that_are_missing() -> None:
    for width, pre_norm, deficit in ((16, False, 0), (16, True, 2), (12, True, 6), (18, True, 0)):
        _, known = seen(tokenizers_of(width, 4, 4, pre_norm), some_planes())
        assert pictures.exactness(known).deficit == deficit
    # Overlapping patches share their pixels: nine tokens of ten numbers for 64 pixels.
    _, known = seen(tokenizers_of(10, 4, 2, pre_norm=True), some_planes())
    assert pictures.exactness(known).exact


def test_a_plane_too_large_to_be_ranked_is_counted() -> None:
    _, known = seen(tokenizers_of(10, 4, 2, pre_norm=True), some_planes())
    large = replace(known, shape=(1, 64, 64))
    assert pictures.exactness(large).exact
    assert not pictures.exactness(replace(large, weight_dp=known.weight_dp[:5])).exact


def test_shuffled_patches_are_put_back() -> None:
    planes = some_planes()
    tokens, known = seen(tokenizers_of(24, 2, 2, pre_norm=True), planes)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    guess = pictures.solve(tokens[:, order], known, torch.zeros(1, 8, 8))
    assert (guess - planes).abs().amax() < 1e-6


def test_merged_tokens_give_the_mean_patch() -> None:
    planes = some_planes()
    tokens, known = seen(tokenizers_of(24, 2, 2, pre_norm=True, merge=2), planes)
    guess = pictures.solve(tokens, known, torch.zeros(1, 8, 8))
    means = planes.unflatten(3, (2, 2, 2)).unflatten(2, (2, 2, 2)).mean((3, 6), keepdim=True)
    wanted = means.expand(-1, -1, 2, 2, 2, 2, 2, 2).flatten(5).flatten(2, 4)
    assert (guess - wanted).abs().amax() < 1e-6
    cut = pictures.cut(planes, known)
    assert torch.allclose(pictures.join(cut, known, torch.zeros(1, 8, 8).double()), wanted)


def test_a_regression_on_public_pictures_needs_no_weights() -> None:
    built = tokenizers_of(24, 4, 4, pre_norm=True)
    public, planes = some_planes(300).roll(1, 0), some_planes(310)[300:]
    pairs, known = seen(built, public)
    ridge = pictures.learn(pairs, pictures.cut(public, known))
    guess = pictures.join(ridge.guess(seen(built, planes)[0]), known, public.mean(0))
    floor = scores.psnr(planes.flatten(1), public.mean(0).flatten()[None].expand(10, -1)).value
    assert scores.psnr(planes.flatten(1), guess.flatten(1)).value > floor + 10


def test_endless_noise_leaves_the_mean_picture() -> None:
    built = tokenizers_of(24, 4, 4, pre_norm=True)
    generator = torch.Generator().manual_seed(2)

    def noisy(planes: Tensor) -> Tensor:
        tokens = seen(built, planes)[0]
        return tokens + 1e4 * torch.randn(tokens.shape, generator=generator).double()

    public, planes = some_planes(300), some_planes(340)[300:]
    known = seen(built, planes)[1]
    ridge = pictures.learn(noisy(public), pictures.cut(public, known))
    mean = public.mean(0)
    guesses = [
        pictures.join(ridge.guess(noisy(planes)), known, mean),
        pictures.solve(noisy(planes), known, mean),
    ]
    floor = scores.psnr(planes.flatten(1), mean.flatten()[None].expand(40, -1)).value
    for guess in guesses:
        found = scores.psnr(planes.flatten(1), guess.clamp(0, 1).flatten(1)).value
        assert found < floor + 0.5


# -- labels ------------------------------------------------------------------------------------


def softmax_gradients(samples: int = 300, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    labels_n = torch.randint(classes, (samples,), generator=generator)
    logits = 0.3 * torch.randn(samples, classes, generator=generator)
    return logits.softmax(1) - torch.eye(classes)[labels_n], labels_n


def test_logit_gradients_tell_labels_whatever_each_samples_scale() -> None:
    gradient, labels_n = softmax_gradients()
    scale = torch.rand(len(labels_n), 1, generator=torch.Generator().manual_seed(1)) + 1e-3
    assert torch.equal(labels.from_logits(gradient * scale), labels_n)


def test_feature_gradients_fall_into_a_cluster_a_class() -> None:
    gradient, labels_n = softmax_gradients()
    head = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    guess, hidden = labels.by_clusters(gradient @ head, 5, labels_n)
    assert int((~hidden).sum()) == 5
    assert (guess == labels_n)[hidden].double().mean() >= 0.99


def test_noise_in_place_of_gradients_tells_no_labels() -> None:
    _, labels_n = softmax_gradients(1000)
    noise = torch.randn(1000, 16, generator=torch.Generator().manual_seed(3))
    guess, hidden = labels.by_clusters(noise, 5, labels_n)
    assert abs((guess == labels_n)[hidden].double().mean() - 0.2) < 0.06


def test_a_bias_gradient_counts_the_labels_of_a_mini_batch() -> None:
    gradient, labels_n = softmax_gradients(20)
    mean = (gradient + torch.eye(5)[labels_n]).mean(0)
    counts = labels.counts_from_bias(gradient.mean(0), mean, 20)
    assert torch.equal(counts, torch.bincount(labels_n, minlength=5))


def test_length_and_direction_of_a_gradient_separate_two_classes() -> None:
    """Li et al.: a rare class has the longer gradients, and all its gradients point its way."""
    rare = torch.tensor([True] * 10 + [False] * 90)
    certain = torch.full((100, 1), 0.1)  # the probability of the rare class, for all samples
    towards = torch.where(rare[:, None], certain - 1, certain)
    gradient = towards * torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
    assert scores.auc(labels.norms(gradient), rare.numpy()).value == 1
    assert scores.auc(labels.cosines(gradient, 0), rare.numpy()).value == 1


def test_the_area_under_the_curve_is_a_half_for_equal_scores() -> None:
    positive = np.array([True, False] * 10)
    assert scores.auc(np.ones(20), positive).value == 0.5
    assert scores.auc(positive.astype(float), positive).value == 1


# -- words and matching ------------------------------------------------------------------------


@pytest.mark.parametrize("pre_norm", [True, False])
def test_every_word_of_a_known_table_comes_back(pre_norm: bool) -> None:
    torch.manual_seed(4)
    text = TextTokenizer(token_table(500, 16, trainable=False), 6)
    built = Tokenizers({"text": text}, 16, pre_norm)
    ids = torch.randint(500, (20, 6))
    tokens = built({"text": ids})[0].detach()
    assert torch.equal(words.nearest_words(tokens, text, built.pre_norm), ids)


def test_a_candidate_that_was_sent_is_nearest_in_any_order_of_its_tokens() -> None:
    tokens = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1))
    in_place, in_any = matching.distances([tokens[:3, [2, 0, 1, 4, 3]]], [tokens])
    assert in_any.argmin(1).tolist() == [0, 1, 2]
    assert float(in_any[1, 1]) < 1e-6 < float(in_place[1, 1])


def test_modalities_are_told_apart_by_their_numbers_of_tokens() -> None:
    lengths = {"image": 5, "audio": 3, "text": 2}
    whole = torch.zeros(1, 10, 4)
    assert {n: x.shape[1] for n, x in by_modality([whole], lengths).items()} == lengths
    assert list(by_modality([whole[:, :7]], lengths)) == ["image", "text"]
    assert list(by_modality([whole[:, :3], whole[:, :2]], lengths)) == ["audio", "text"]
    assert by_modality([whole[:, :9]], lengths) == {}


# -- what arrives decides what is attacked -----------------------------------------------------


def scene_of(back: Tensor, labels_n: Tensor, classes: int, **heard: Any) -> attacks.Scene:
    """A scene with one client, of which no more was heard than gradients."""
    whole = {"of_tokens": None, "of_vectors": []} | heard
    one = Heard(0, {}, labels_n, [], back, **whole)
    parameters = [torch.zeros(classes, 4), torch.zeros(classes)]
    client = SimpleNamespace(parameters=lambda: parameters)
    victim = SimpleNamespace(clients={0: client}, experiment=SimpleNamespace(seed=1))
    names = tuple(map(str, range(classes)))
    read = SimpleNamespace(splits=SimpleNamespace(classes=names))
    found = Audit("a", "m", "", {}, {}, len(labels_n), 0)
    return attacks.Scene(0, victim, read, [one], {}, {}, found)


def test_what_is_kept_of_samples_is_taken_for_no_other_samples() -> None:
    """As of a part of the public ones, which nobody else holds while others are made."""
    scene = scene_of(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), 2)
    scene.victim.pairs = lambda client, tokenizers, samples: ([samples.labels], {})
    own, public = Tokenizers({}, 4, False), TensorDataset({}, torch.arange(20))
    for count in range(1, 20):
        some = TensorDataset({}, public.labels[:count])
        ((labels_n,), _) = scene.sent_by(0, own, some)
        del some
        assert len(labels_n) == count


def found_by(scene: attacks.Scene) -> dict[str, float]:
    attacks.attack_labels(scene)
    return {f.attack: f.value for f in scene.audit.figures if f.metric.startswith("labels")}


def test_gradients_of_features_are_clustered_and_not_taken_for_logits() -> None:
    gradient, labels_n = softmax_gradients()
    head = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    found = found_by(scene_of(gradient @ head, labels_n, 5))
    assert "smallest entry" not in found
    assert found["clusters"] >= 0.99
    assert found["control: labels permuted, clusters"] < 0.4


def test_a_head_that_clients_hold_and_bring_together_tells_label_counts() -> None:
    gradient, labels_n = softmax_gradients(24)
    vector = torch.cat([torch.zeros(20), (gradient.mean(0))])
    scene = scene_of(gradient, labels_n, 5, of_vectors=[(vector, labels_n)])
    attacks.attack_labels(scene)
    (counts,) = [f for f in scene.audit.figures if f.metric == "label_counts"]
    assert counts.value > 0.85 > counts.floor
