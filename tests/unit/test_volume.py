"""Gram volumes, their contrast and the pooled divergence, against what is known of each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mpsl_dist.models.transfer import pooled_kl
from mpsl_dist.models.volume import (
    EPSILON,
    VolumeContrast,
    contrast,
    cross_volumes,
    gram_volume,
)


def drawn(*shape: int, seed: int = 1, unit: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return functional.normalize(x, dim=-1) if unit else x


def close(ours: Tensor, theirs: Tensor | float, tolerance: float = 1e-12) -> None:
    wanted = torch.as_tensor(theirs, dtype=ours.dtype).expand_as(ours)
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)


# -- the volume --------------------------------------------------------------------------------


def test_volumes_of_few_vectors_are_norm_sine_and_one() -> None:
    one, two = drawn(4, 1, 6), drawn(4, 2, 6, unit=True)
    close(gram_volume(one, 0), one.norm(dim=-1)[:, 0])
    cosines_b = (two[:, 0] * two[:, 1]).sum(-1)
    close(gram_volume(two, 0), (1 - cosines_b.square()).sqrt())
    close(gram_volume(torch.linalg.qr(drawn(4, 6, 3)).Q.mT, 0), 1.0)


@pytest.mark.parametrize("k", [3, 4, 5])
def test_it_is_the_product_of_singular_values_and_gram_s_closed_form(k: int) -> None:
    vectors_bkd = drawn(5, k, 9)
    volumes_b = gram_volume(vectors_bkd, 0)
    close(volumes_b, torch.linalg.svdvals(vectors_bkd).prod(-1))
    close(volumes_b, torch.stack([_by_minors(v @ v.T) for v in vectors_bkd]).sqrt(), 1e-11)
    close(gram_volume(drawn(5, k, k), 0), torch.linalg.det(drawn(5, k, k)).abs())


def _by_minors(gram: Tensor) -> Tensor:
    """The determinant written out by rows, as GRAM does for 3, 4 and 5 vectors."""
    if len(gram) == 1:
        return gram[0, 0]
    columns = range(len(gram))
    rest = [gram[1:][:, [c for c in columns if c != left]] for left in columns]
    return sum((-1) ** c * gram[0, c] * _by_minors(rest[c]) for c in columns)


def test_it_is_at_most_the_product_of_norms_and_blind_to_order_and_rotation() -> None:
    vectors_bkd, rotation = drawn(20, 4, 7), torch.linalg.qr(drawn(7, 7, seed=2)).Q
    volumes_b = gram_volume(vectors_bkd, 0)
    assert bool((volumes_b <= vectors_bkd.norm(dim=-1).prod(-1)).all())  # Hadamard
    close(gram_volume(vectors_bkd[:, [2, 0, 3, 1]], 0), volumes_b)
    close(gram_volume(vectors_bkd @ rotation, 0), volumes_b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_vectors_have_no_volume_and_a_finite_gradient(dtype: torch.dtype) -> None:
    one = drawn(3, 1, 6, unit=True).to(dtype)
    equal_bkd = one.repeat(1, 3, 1).requires_grad_()
    volumes_b = gram_volume(equal_bkd)
    assert volumes_b.max().item() <= math.sqrt(EPSILON) * (1 + 1e-4)
    volumes_b.sum().backward()
    assert bool(torch.isfinite(equal_bkd.grad).all())


def test_gradients_are_those_of_finite_differences() -> None:
    vectors_bkd = drawn(3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(gram_volume, vectors_bkd)
    anchors, others = drawn(3, 5).requires_grad_(), drawn(3, 2, 5, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(cross_volumes, (anchors, others))


def test_float32_is_float64_rounded() -> None:
    middle = drawn(8, 1, 64)
    near_bkd = functional.normalize(middle + 0.05 * drawn(8, 5, 64, seed=2), dim=-1).float()
    close(gram_volume(near_bkd, 0).double(), gram_volume(near_bkd.double(), 0), 1e-6)


# -- the contrast ------------------------------------------------------------------------------


def test_every_anchor_meets_every_samples_others() -> None:
    anchors, others = drawn(4, 6), drawn(4, 2, 6, seed=2)
    volumes_bb = cross_volumes(anchors, others)
    for u in range(4):
        for v in range(4):
            together = torch.cat([anchors[u : u + 1], others[v]])[None]
            close(volumes_bb[u, v], gram_volume(together)[0])


def test_of_two_unit_vectors_it_is_info_nce_on_their_sine() -> None:
    anchors, others = drawn(6, 5, unit=True), drawn(6, 5, seed=2, unit=True)
    scores = -(1 - (anchors @ others.T).square() + EPSILON).sqrt() / 0.07
    own = torch.arange(6)
    wanted = functional.cross_entropy(scores, own) + functional.cross_entropy(scores.T, own)
    close(VolumeContrast(5, 5)(anchors, others[:, None]), wanted / 2)


def test_both_directions_count_alike_and_one_sample_is_told_from_none() -> None:
    volumes_bb = drawn(5, 5).abs()
    close(contrast(volumes_bb, 0.5), contrast(volumes_bb.T, 0.5))
    assert contrast(volumes_bb[:1, :1], 0.5).item() == 0.0


def test_a_pair_that_is_aligned_and_apart_from_others_costs_less_than_a_guess() -> None:
    axes = torch.eye(6, dtype=torch.float64)
    assert VolumeContrast(6, 6)(axes, axes[:, None]) < math.log(6) / 100


def test_of_vectors_on_one_line_no_anchor_is_told_from_another() -> None:
    """Where a sample's others are equal, no anchor gives them a volume: the loss is a guess's."""
    axes = torch.eye(6, dtype=torch.float64)
    close(VolumeContrast(6, 6)(axes, axes[:, None].repeat(1, 2, 1)), math.log(6))
    apart = torch.stack([axes, axes.roll(1, 0)], dim=1)
    assert VolumeContrast(6, 6)(axes, apart) < math.log(6) / 2


def test_anchors_of_another_width_are_projected_by_a_trained_layer() -> None:
    loss = VolumeContrast(256, 64).double()
    loss(drawn(4, 256), drawn(4, 2, 64)).backward()
    assert loss.project.weight.grad.abs().sum() > 0
    assert not list(VolumeContrast(64, 64).parameters())


def _one_step(anchors: Tensor, others: Tensor, unit: bool, sign: float) -> Tensor:
    """The other vectors after an SGD step on the contrast, signed."""
    moved = others.clone().requires_grad_()
    taken = functional.normalize(moved, dim=-1) if unit else moved
    (sign * contrast(cross_volumes(anchors, taken), 1.0)).backward()
    return (moved - 0.5 * moved.grad).detach()


def test_as_printed_without_its_minus_it_drives_what_belongs_together_apart() -> None:
    anchors, others = drawn(8, 6, unit=True), drawn(8, 2, 6, seed=2, unit=True)
    own = cross_volumes(anchors, others).diagonal().mean()
    after = {
        sign: functional.normalize(_one_step(anchors, others, True, sign), dim=-1)
        for sign in (1.0, -1.0)
    }
    assert cross_volumes(anchors, after[1.0]).diagonal().mean() < own
    assert cross_volumes(anchors, after[-1.0]).diagonal().mean() > own


def test_without_unit_length_norms_shrink() -> None:
    """The volume is homogeneous: of a tuple by itself less length is less volume."""
    vectors_bkd = drawn(4, 3, 6).requires_grad_()
    gram_volume(vectors_bkd).sum().backward()
    shrunk = (vectors_bkd - 0.01 * vectors_bkd.grad).norm(dim=-1)
    assert bool((shrunk < vectors_bkd.norm(dim=-1)).all())
    unit = drawn(4, 3, 6).requires_grad_()
    gram_volume(functional.normalize(unit, dim=-1)).sum().backward()
    close((unit * unit.grad).sum(-1), 0.0)  # length has no say


# -- the pooled divergence ---------------------------------------------------------------------


def test_equal_logits_cost_nothing_and_the_teacher_gets_no_gradient() -> None:
    ours = drawn(2, 3, 7).requires_grad_()
    theirs = drawn(2, 3, 7, seed=2).requires_grad_()
    close(pooled_kl(ours, ours, 3), 0.0)
    pooled_kl(ours, theirs, 3).backward()
    assert theirs.grad is None and ours.grad.abs().sum() > 0


@pytest.mark.parametrize("pool", [7, 99])
def test_pooling_nothing_gives_the_whole_divergence(pool: int) -> None:
    ours, theirs = drawn(2, 3, 7), drawn(2, 3, 7, seed=2)
    p, q = theirs.softmax(-1), ours.softmax(-1)
    close(pooled_kl(ours, theirs, pool), (p * (p / q).log()).sum() / 2)


def test_what_is_not_likeliest_counts_as_one() -> None:
    theirs = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]], dtype=torch.float64).log()
    ours = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]], dtype=torch.float64).log()
    wanted = 0.5 * math.log(5) + 0.3 * math.log(1.5) + 0.2 * math.log(0.2 / 0.7)
    close(pooled_kl(ours, theirs, 2), wanted)
    assert pooled_kl(ours, theirs, 2) < pooled_kl(ours, theirs, 4)


def test_places_beyond_the_shorter_are_left() -> None:
    ours, theirs = drawn(2, 5, 7), drawn(2, 3, 7, seed=2)
    close(pooled_kl(ours, theirs, 4), pooled_kl(ours[:, :3], theirs, 4))
    close(pooled_kl(theirs, ours, 4), pooled_kl(theirs, ours[:, :3], 4))
