"""Retrieval by the picture: a sample is a picture with all its captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import toys

from mpsl_dist.actors import deployable
from mpsl_dist.actors.defences import guarantees
from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.actors.holdings import Holdings, load_data
from mpsl_dist.actors.local_data import TestData
from mpsl_dist.analysis.audit import halves
from mpsl_dist.config import Experiment
from mpsl_dist.data import Batch, DataError, TensorDataset
from mpsl_dist.data.pictures import Pictures, by_picture
from mpsl_dist.models import defences as noise
from mpsl_dist.models.tasks import contrastive_loss


def experiment(unit: str = "picture", **changes) -> Experiment:
    return toys.experiment(data={"name": "toy-pairs", "unit": unit}, **changes)


@pytest.fixture(scope="module")
def model() -> Deployable:
    torch.manual_seed(0)
    return deployable.build(experiment(), load_data(experiment())).double().eval()


def test_a_picture_comes_with_all_its_captions() -> None:
    pairs, pictures = toys.load_pairs().train, load_data(experiment()).train
    assert pictures.labels.tolist() == list(range(40)) and pictures.captions == 2
    batch = pictures.fetch([7, 3])
    assert batch.labels.tolist() == [7, 3] and list(batch.inputs) == ["image", "text"]
    assert torch.equal(batch.inputs["image"], pairs.inputs["image"][[14, 6]])
    assert torch.equal(batch.inputs["text"], pairs.inputs["text"][torch.tensor([[14, 15], [6, 7]])])


def test_pairs_of_one_picture_need_not_lie_together() -> None:
    pairs = TensorDataset({"text": torch.arange(6)[:, None]}, torch.tensor([4, 2, 4, 2, 9, 9]))
    pictures = Pictures.of(pairs, "these")
    assert pictures.labels.tolist() == [2, 4, 9]
    assert pictures.fetch([1, 0]).inputs["text"].squeeze(2).tolist() == [[0, 2], [1, 3]]


def test_what_has_no_such_unit_is_refused() -> None:
    with pytest.raises(DataError, match="these have 1 to 2; take data.unit=pair"):
        Pictures.of(TensorDataset({}, torch.tensor([0, 0, 1])), "these")
    with pytest.raises(DataError, match="which toys has not"):
        by_picture(toys.load(("image", "text")), "toys")


def test_the_same_client_has_the_same_pictures_in_either_unit() -> None:
    for client, pairs in enumerate(Holdings.load(experiment("pair")).dealt.parts):
        pictures = Holdings.load(experiment()).dealt.parts[client]
        assert pictures.tolist() == sorted(set((pairs // 2).tolist()))


def test_every_caption_is_encoded_by_itself(model: Deployable) -> None:
    pairs, pictures = (load_data(experiment(unit)).train for unit in ("pair", "picture"))
    together = model(model.to_own(pictures.fetch(range(5)).inputs))
    apart = model(model.to_own(pairs.fetch(range(10)).inputs))
    assert together.shape == (5, 3, 16)
    torch.testing.assert_close(together[:, 0], apart[::2, 0], rtol=1e-12, atol=1e-12)
    captions = together[:, 1:].flatten(0, 1)
    torch.testing.assert_close(captions, apart[:, 1], rtol=1e-12, atol=1e-12)


def test_the_loss_is_the_sum_over_captions() -> None:
    embeddings, pictures = torch.randn(6, 4, 8), torch.tensor([0, 1, 2, 3, 3, 4])
    each = [contrastive_loss(embeddings[:, [0, k]], pictures) for k in (1, 2, 3)]
    torch.testing.assert_close(contrastive_loss(embeddings, pictures), sum(each))


def test_recall_is_the_same_in_either_unit(model: Deployable) -> None:
    pairs, pictures = (TestData(load_data(experiment(u)).test) for u in ("pair", "picture"))
    assert len(pairs) == 2 * len(pictures)
    assert model.test(pairs, 8) == pytest.approx(model.test(pictures, 3), abs=1e-12)


def test_what_cannot_be_read_is_counted_by_the_picture() -> None:
    @dataclass
    class Torn:
        """The pairs 2 and 3 cannot be read: left out at test, replaced by pair 0 in training."""

        labels: torch.Tensor

        def fetch(self, indices: Sequence[int], seed: int | None = None) -> Batch:
            torn = {pair: ("b.jpg", "torn") for pair in indices if pair in (2, 3)}
            rows = [0 if pair in torn else pair for pair in indices if seed or pair not in torn]
            return Batch({"text": torch.tensor(rows)[:, None]}, self.labels[rows], torn)

    pictures = Pictures.of(Torn(torch.tensor([0, 0, 1, 1, 2, 2])), "these")
    tested, trained = pictures.fetch([1, 2]), pictures.fetch([1, 2], seed=1)
    assert tested.labels.tolist() == [2] and trained.labels.tolist() == [0, 2]
    assert tested.unreadable == trained.unreadable == {1: ("b.jpg", "torn")}


def test_noise_is_counted_for_all_tokens_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(noise, "token_epsilon", lambda _, *size: sizes.append(size[0]) or 1.0)
    for unit in ("pair", "picture"):
        chosen = experiment(unit, defences={"token_noise": 1, "secret": "seed"})
        guarantees(chosen, load_data(chosen))
    assert sizes[-1] - sizes[0] == 6  # a second text of six tokens


def test_an_audit_looks_at_pairs() -> None:
    chosen = experiment()
    assert halves.read(chosen, 10).audited.inputs["text"].dim() == 2
