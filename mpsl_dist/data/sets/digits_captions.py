"""``digits-captions``: rows of three handwritten digits and what they say, for retrieval. Built in.

The digits are scikit-learn's, those of ``digits-qa``; every fifth picture of a digit is for
testing. Three of them side by side make a picture of 8x24, and five templates its captions. Of the
1,000 numbers of three digits, 200 are met in the test set alone, one picture each: there a caption
belongs to one picture, and no model has seen the two together.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from mpsl_dist.data.dataset import Splits, TensorDataset
from mpsl_dist.data.decode.text import Tokens, tokenize
from mpsl_dist.data.sets.digits_qa import NUMBERS, rows

#: What is said of the digits a, b and c.
CAPTIONS = (
    "{a} then {b} then {c}",
    "the digits {a}, {b} and {c}",
    "{a}, right of it {b}, then {c}",
    "a handwritten {a} before {b} and {c}",
    "first {a}, second {b}, third {c}",
)
#: Pictures of either split.
TRAIN_PICTURES, TEST_PICTURES = 1_600, 200
_SEED = 1797


def load(
    root: str | Path | None = None, *, text_length: int = 16, tokens: Tokens = "clip"
) -> Splits:
    """Build the dataset; always the same, whatever the experiment's seed.

    Parameters as of :func:`mpsl_dist.data.sets.digits_qa.load`.

    Returns
    -------
    Splits
        ``image`` (1, 8, 24) float32 in [-1, 1], ``text`` (text_length,) int64; pairs of a picture
        and a caption, whose label is the picture.
    """
    generator = torch.Generator().manual_seed(_SEED)
    numbers = torch.randperm(10 ** len("abc"), generator=generator)
    unseen, seen = numbers[:TEST_PICTURES], numbers[TEST_PICTURES:]
    often = seen.repeat(-(-TRAIN_PICTURES // len(seen)))[:TRAIN_PICTURES]
    digits = _digits()
    train, test = (
        _pairs(drawn, digits[is_test], text_length, tokens, generator)
        for drawn, is_test in ((often, False), (unseen, True))
    )
    return Splits(train, test, {"image": (1, 8, 24), "text": (text_length,)}, ())


def _digits() -> dict[bool, dict[int, Tensor]]:
    """Return the pictures (n, 8, 8) of every digit, by whether they are for testing."""
    rows_bp = torch.from_numpy(rows()).float()
    held: dict[bool, dict[int, list[Tensor]]] = {False: defaultdict(list), True: defaultdict(list)}
    seen = [0] * len(NUMBERS)
    for row_p in rows_bp:
        digit = int(row_p[-1])
        held[seen[digit] % 5 == 4][digit].append(row_p[:-1].reshape(8, 8) / 8 - 1)
        seen[digit] += 1
    return {
        is_test: {digit: torch.stack(own) for digit, own in by_digit.items()}
        for is_test, by_digit in held.items()
    }


def _pairs(
    numbers: Tensor,
    digits: dict[int, Tensor],
    text_length: int,
    tokens: Tokens,
    generator: torch.Generator,
) -> TensorDataset:
    """Return a picture of every number, each with all captions."""
    pictures, texts = [], []
    for number in numbers.tolist():
        each = [int(figure) for figure in f"{number:03d}"]
        drawn = [torch.randint(len(digits[d]), (), generator=generator).item() for d in each]
        pictures.append(torch.cat([digits[d][n] for d, n in zip(each, drawn, strict=True)], dim=1))
        a, b, c = (NUMBERS[digit] for digit in each)
        texts += [caption.format(a=a, b=b, c=c) for caption in CAPTIONS]
    pairs = torch.arange(len(numbers)).repeat_interleave(len(CAPTIONS))
    images_bchw = torch.stack(pictures)[:, None]
    inputs = {"image": images_bchw[pairs], "text": tokenize(texts, text_length, tokens)}
    return TensorDataset(inputs, pairs, texts=texts)
