"""What is worth a word on data that can be trained on; nothing of it is refused."""

from __future__ import annotations

from collections.abc import Sequence

from mpsl_dist.data.dataset import Splits
from mpsl_dist.data.decode.samples import FileDataset
from mpsl_dist.data.decode.text import Tokens, tokenize

#: Texts that are looked at, at most: a second or two of tokenizing.
_COUNTED = 20_000
#: Texts that are tokenized together.
_AT_ONCE = 1_000


def remarks(splits: Splits) -> list[str]:
    """Return what was decided in reading the data, and what of it the model will not see."""
    found = list(splits.notes)
    for name, part in (("train", splits.train), ("test", splits.test)):
        if isinstance(part, FileDataset) and "text" in part.view.modalities:
            length = part.view.text_length
            # Of very many texts some, spread evenly.
            every = max(1, -(-len(part.samples) // _COUNTED))
            texts = [part.samples[row].text or "" for row in range(0, len(part.samples), every)]
            if cut := _longer(texts, length, part.view.tokens):
                of = f"{len(texts):,} {name} texts{' looked at' if every > 1 else ''}"
                found.append(f"data.text_length={length} cuts {cut:,} of {of} at their end")
    return found


def _longer(texts: Sequence[str], length: int, tokens: Tokens) -> int:
    """Return how many texts have more tokens than ``length``."""
    # A text has no more tokens than bytes, but for its start and end.
    long = [text for text in texts if len(text.encode("utf-8", "replace")) + 2 > length]
    batches = (long[i : i + _AT_ONCE] for i in range(0, len(long), _AT_ONCE))
    # With room for one token more, the last place is empty unless a text is longer.
    return sum(int((tokenize(some, length + 1, tokens)[:, -1] != 0).sum()) for some in batches)
