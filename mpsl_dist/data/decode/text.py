"""Text as CLIP byte-pair tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from torch import Tensor

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
