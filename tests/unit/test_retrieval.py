"""The contrastive loss and recall, against definitions written out by hand."""

from __future__ import annotations

import pytest
import torch

from mpsl_dist.data.partition import deal_pictures
from mpsl_dist.methods.objective import number_apart
from mpsl_dist.models.heads import PairEmbedding
from mpsl_dist.models.server_model import ServerModel
from mpsl_dist.models.tasks import contrastive_loss, recalls


def test_the_loss_of_two_pairs_by_hand() -> None:
    embeddings = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [0.0, 3.0]]])
    # Logits [[2, 0], [0, 3]]: each row and column is log(1 + e^-own) away from its pair.
    expected = (torch.log1p(torch.exp(torch.tensor([-2.0, -3.0])))).mean()
    torch.testing.assert_close(contrastive_loss(embeddings, torch.tensor([0, 1])), expected)


def test_another_caption_of_the_same_picture_is_no_negative() -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(3, 2, 4)
    together = contrastive_loss(embeddings, torch.tensor([7, 7, 9]))
    logits = embeddings[:, 0] @ embeddings[:, 1].T
    rows = [[0, 2], [1, 2], [0, 1, 2]]
    forth = [torch.logsumexp(logits[i, rows[i]], 0) - logits[i, i] for i in range(3)]
    back = [torch.logsumexp(logits[rows[i], i], 0) - logits[i, i] for i in range(3)]
    torch.testing.assert_close(together, torch.stack(forth + back).mean())


def test_one_pair_alone_has_no_loss_and_no_gradient() -> None:
    embeddings = torch.randn(1, 2, 4, requires_grad=True)
    loss = contrastive_loss(embeddings, torch.tensor([3]))
    loss.backward()
    assert loss.item() == 0 and not embeddings.grad.any()


def test_recall_ranks_over_the_whole_set_both_ways() -> None:
    image = torch.eye(12)
    captions, picture = image.repeat_interleave(2, 0), torch.arange(12).repeat_interleave(2)
    assert set(recalls(image, captions, picture).values()) == {1.0}
    worse = captions.clone()
    worse[0] = 0.9 * image[1] + 0.5 * image[0]  # its own picture comes second
    found = recalls(image, worse, picture)
    assert found["text_to_image_r1"] == pytest.approx(23 / 24)
    assert found["text_to_image_r5"] == 1.0
    assert found["image_to_text_r1"] == 1.0  # its other caption still comes first


def test_chance_recall_is_k_over_n() -> None:
    torch.manual_seed(0)
    picture = torch.arange(500)
    found = recalls(torch.randn(500, 64), torch.randn(500, 64), picture)
    assert found["text_to_image_r10"] == pytest.approx(10 / 500, abs=0.02)


def test_two_towers_never_mix_pairs_or_modalities() -> None:
    head = PairEmbedding(normalize=True, temperature=0.5)
    towers = ServerModel(
        torch.nn.Identity(), 4, [5, 2], head, "late", "cls", post_norm=False, apart=True
    )
    image, text = torch.randn(3, 5, 4), torch.randn(3, 2, 4)
    together = towers([image, text])
    assert together.shape == (3, 2, 4)
    torch.testing.assert_close(together[:, 0].norm(dim=1), torch.full((3,), 2.0))
    torch.testing.assert_close(together[:, 1].norm(dim=1), torch.ones(3))
    other = towers([image, torch.randn(3, 2, 4)])
    torch.testing.assert_close(other[:, 0], together[:, 0])


def test_captions_stay_with_their_picture() -> None:
    pictures = torch.arange(40).repeat_interleave(5)
    parts = deal_pictures(pictures, 7, seed=1)
    owners = [set(pictures[part].tolist()) for part in parts]
    assert sum(len(o) for o in owners) == 40 == len(set().union(*owners))
    assert sum(len(part) for part in parts) == 200


def test_pictures_of_different_clients_are_numbered_apart() -> None:
    pairs = [torch.tensor([0, 1, 0]), torch.tensor([0]), torch.tensor([1, 0])]
    assert number_apart(pairs).tolist() == [0, 1, 0, 2, 4, 3]
