"""The built-in dataset: real digits, and questions that need the picture."""

from __future__ import annotations

import pytest
import torch

from mpsl_dist.data import DataError, load
from mpsl_dist.data.sets import digits_qa


@pytest.fixture(scope="module")
def splits():
    return load("digits-qa", text_length=10)


def test_sizes_shapes_and_ranges(splits) -> None:
    assert (len(splits.train.labels), len(splits.test.labels)) == (5768, 1420)
    assert (len(splits.train.labels) + len(splits.test.labels)) / digits_qa.PER_PICTURE == 1797
    batch = splits.train.fetch([0, 5, 7])
    assert {n: tuple(x.shape[1:]) for n, x in batch.inputs.items()} == dict(splits.shapes)
    image = splits.train.inputs["image"]
    assert image.dtype == torch.float32 and image.min() == -1 and image.max() == 1
    assert sorted(set(splits.train.labels.tolist())) == list(range(len(splits.classes)))


def test_no_test_picture_is_trained_on(splits) -> None:
    trained = {x.numpy().tobytes() for x in splits.train.inputs["image"]}
    tested = {x.numpy().tobytes() for x in splits.test.inputs["image"]}
    assert len(tested) > 300 and not trained & tested


def test_every_question_fits_its_tokens(splits) -> None:
    end_of_text = 49407
    assert (splits.train.inputs["text"] == end_of_text).any(1).all()


def test_answers_are_right() -> None:
    asked = digits_qa.QUESTIONS
    assert [asked["which digit comes next?"](d) for d in (0, 9)] == ["one", "zero"]
    assert [asked["is it even?"](d) for d in (4, 7)] == ["yes", "no"]
    assert [asked["how far from nine?"](d) for d in (9, 2)] == ["zero", "seven"]


def test_neither_picture_nor_question_suffices(splits) -> None:
    assert 0.3 < splits.baselines["question_only"] < 0.5
    assert 0.3 < splits.baselines["image_only"] < 0.5


def test_majority_answers_by_key() -> None:
    train, test = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 2, 2])
    assert digits_qa.majority("aaab", train, "aabc", test) == 0.5


def test_an_unknown_dataset_is_named_with_the_valid_ones() -> None:
    with pytest.raises(DataError, match="unknown dataset 'cifar'; valid: .*digits-qa"):
        load("cifar")
