"""Text as numbers: CLIP's byte-pair tokens, or MiniLM's WordPiece tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mpsl_dist.errors import DataError
from mpsl_dist.wheels import MINILM_WORDS, file_of

#: How a text is cut into tokens.
Tokens = Literal["clip", "wordpiece"]
#: Rows of CLIP's byte-pair vocabulary.
VOCABULARY = 49_408


@cache
def _tokenizer() -> Callable[..., Tensor]:
    # The one file, without its package: that imports every model, 120 MiB and seconds a worker.
    package = importlib.util.find_spec("open_clip")
    assert package and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    file = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert file and file.loader
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return module.tokenize


def prepare() -> None:
    """Read the vocabulary, a quarter of a second and 20 MiB, before it is first used."""
    _tokenizer()


@cache
def _wordpiece() -> Callable[[str], list[int]]:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError(
            "model.text: minilm needs the package tokenizers, which is not installed here; install "
            "it by: pip install tokenizers (docs/weights.md)"
        ) from error
    words = Tokenizer.from_file(str(file_of("minilm", MINILM_WORDS, "model.text")))
    words.no_padding()
    words.no_truncation()
    # One by one: a batch's threads would not survive the fork of a loader process.
    return lambda text: words.encode(text).ids


def tokenize(texts: Sequence[str], length: int, tokens: Tokens = "clip") -> Tensor:
    """Return texts as numbers.

    Parameters
    ----------
    texts : sequence of str
    length : int
        Tokens per text, start and end included; longer texts are cut, shorter ones padded with 0.
    tokens : "clip" or "wordpiece"
        CLIP's byte-pair vocabulary, which ships inside open_clip, or that of MiniLM.

    Returns
    -------
    Tensor
        (len(texts), length) int64.

    Raises
    ------
    UserError
        If the package of MiniLM's vocabulary, or the one that reads it, is not installed.
    """
    if tokens == "wordpiece":
        rows = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            found = _wordpiece()(text)
            cut = found if len(found) <= length else [*found[: length - 1], found[-1]]
            row[: len(cut)] = torch.tensor(cut)
        return rows
    return _tokenizer()(list(texts), context_length=length)
