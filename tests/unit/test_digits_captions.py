"""The built-in retrieval dataset: rows of real digits, and captions that say which."""

from __future__ import annotations

import pytest
import torch

from mpsl_dist.data import load
from mpsl_dist.data.sets import digits_captions


@pytest.fixture(scope="module")
def splits():
    return load("digits-captions", text_length=12)


def test_sizes_and_shapes(splits) -> None:
    captions = len(digits_captions.CAPTIONS)
    assert len(splits.train.labels) == captions * digits_captions.TRAIN_PICTURES
    assert len(splits.test.labels) == captions * digits_captions.TEST_PICTURES
    assert splits.retrieval and dict(splits.shapes) == {"image": (1, 8, 24), "text": (12,)}
    assert torch.bincount(splits.test.labels).tolist() == [captions] * 200


def test_every_caption_fits_its_tokens_and_belongs_to_one_test_picture(splits) -> None:
    end_of_text = 49407
    for split in (splits.train, splits.test):
        assert (split.inputs["text"] == end_of_text).any(1).all()
    assert len(splits.test.inputs["text"].unique(dim=0)) == len(splits.test.labels)


def test_no_test_caption_and_no_test_digit_is_trained_on(splits) -> None:
    trained = {row.numpy().tobytes() for row in splits.train.inputs["text"]}
    assert not trained & {row.numpy().tobytes() for row in splits.test.inputs["text"]}
    digits = [
        {part.numpy().tobytes() for image in split.inputs["image"] for part in image.split(8, 2)}
        for split in (splits.train, splits.test)
    ]
    assert not digits[0] & digits[1]
