"""Text as CLIP byte-pair tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from torch import Tensor

#: Rows of CLIP's byte-pair vocabulary.
VOCABULARY = 49_408


@cache
def _tokenizer():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def tokenize(texts: Sequence[str], length: int) -> Tensor:
    """Tokenize with CLIP's byte-pair vocabulary, which ships inside open_clip.

    Parameters
    ----------
    texts : sequence of str
    length : int
        Tokens per text, start and end included; longer texts are cut, shorter ones padded with 0.

    Returns
    -------
    Tensor
        (len(texts), length) int64.
    """
    return _tokenizer()(list(texts), context_length=length)
