"""``digits-qa``: real handwritten digits and questions about them. Embedded, no download.

The pictures are scikit-learn's 1,797 digits (UCI Optical Recognition of Handwritten Digits,
8x8, 17 grey levels). Every fifth picture of a digit is a test picture. The questions are drawn from
templates such that neither the picture nor the question alone suffices for the answer.
"""

from __future__ import annotations

import importlib.util
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsl_dist.data.dataset import Splits, TensorDataset
from mpsl_dist.data.decode.text import Tokens, tokenize
from mpsl_dist.data.decode.view import View

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLASSES = (*NUMBERS, "yes", "no")
#: Questions asked about each picture.
PER_PICTURE = 4
_SEED = 1797


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


#: Question -> its answer for a digit.
QUESTIONS: dict[str, Callable[[int], str]] = {
    "which digit is this?": lambda d: NUMBERS[d],
    "how far from nine?": lambda d: NUMBERS[9 - d],
    "which digit comes next?": lambda d: NUMBERS[(d + 1) % 10],
    "is it even?": lambda d: _yes(d % 2 == 0),
    "is it odd?": lambda d: _yes(d % 2 == 1),
    "is it greater than four?": lambda d: _yes(d > 4),
    "is it less than seven?": lambda d: _yes(d < 7),
    "is it a multiple of three?": lambda d: _yes(d % 3 == 0),
}


def load(
    root: str | Path | None = None, *, text_length: int = 16, tokens: Tokens = "clip"
) -> Splits:
    """Build the dataset; always the same, whatever the experiment's seed.

    Parameters
    ----------
    root : str or Path, optional
        Not used: nothing is read from files.
    text_length : int
        Tokens of a question.
    tokens : "clip" or "wordpiece"
        As of :func:`mpsl_dist.data.decode.text.tokenize`.

    Returns
    -------
    Splits
        ``image`` (1, 8, 8) float32 in [-1, 1], ``text`` (text_length,) int64; 12 classes; baselines
        ``question_only`` and ``image_only``: the test accuracy of the most frequent training
        answer to the question, and to the digit (as if read without error).
    """
    rows_bp = rows()
    images_bchw = torch.from_numpy(rows_bp[:, :-1]).float().reshape(-1, 1, 8, 8) / 8 - 1
    digits = rows_bp[:, -1].astype(int).tolist()
    answers = list(QUESTIONS.values())
    tokens_ql = tokenize(list(QUESTIONS), text_length, tokens)

    generator = torch.Generator().manual_seed(_SEED)
    seen: Counter[int] = Counter()
    asked: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}
    for picture, digit in enumerate(digits):
        is_test = seen[digit] % 5 == 4
        seen[digit] += 1
        for question in torch.randperm(len(QUESTIONS), generator=generator)[:PER_PICTURE].tolist():
            answer = CLASSES.index(answers[question](digit))
            asked[is_test].append((picture, question, answer))

    # White on black, 17 levels as 0..16: the pictures as (x - 0.5) / 0.5 of 0..1.
    view = View(
        ("image", "text"),
        image_size=8,
        text_length=text_length,
        colours=((0.5,), (0.5,)),
        tokens=tokens,
        levels=17,
    )

    def split(is_test: bool) -> TensorDataset:
        picture, question, answer = torch.tensor(asked[is_test]).unbind(1)
        inputs = {"image": images_bchw[picture], "text": tokens_ql[question]}
        return TensorDataset(inputs, answer, view=view)

    shapes = {"image": tuple(images_bchw.shape[1:]), "text": (text_length,)}
    question_of = {split: [row[1] for row in asked[split]] for split in asked}
    digit_of = {split: [digits[row[0]] for row in asked[split]] for split in asked}
    train, test = split(False), split(True)
    baselines = {
        "question_only": majority(question_of[False], train.labels, question_of[True], test.labels),
        "image_only": majority(digit_of[False], train.labels, digit_of[True], test.labels),
    }
    return Splits(train, test, shapes, CLASSES, baselines)


def rows() -> NDArray[np.float64]:
    """Return 64 grey values and the digit of every picture, as scikit-learn has them on file.

    Read from its file, because importing it takes 45 MiB and seconds, of every worker.
    """
    package = importlib.util.find_spec("sklearn")
    assert package and package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0]) / "datasets" / "data"
    return np.loadtxt(folder / "digits.csv.gz", delimiter=",")


def majority(
    train_keys: Sequence[Hashable], train: Tensor, test_keys: Sequence[Hashable], test: Tensor
) -> float:
    """Return the test accuracy of answering each key with its most frequent training label."""
    counts: dict[Hashable, Counter[int]] = defaultdict(Counter)
    for key, label in zip(train_keys, train.tolist(), strict=True):
        counts[key][label] += 1
    best = {key: count.most_common(1)[0][0] for key, count in counts.items()}
    right = sum(best.get(key) == label for key, label in zip(test_keys, test.tolist(), strict=True))
    return right / len(test)
