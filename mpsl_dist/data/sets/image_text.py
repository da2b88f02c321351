"""``coco-qa`` and ``t4sa``: a picture and a text.

Layout under ``data.root``:

``coco-qa``
    ``coco-qa/{train,test}/{questions,answers,img_ids}.txt``, line by line (``val`` is read where
    there is no ``test``); ``ms-coco/train2014/COCO_train2014_<12 digits>.jpg`` and ``val2014``
    likewise, or ``<id>.jpg``. The test pictures come from ``val2014``.
``t4sa``
    ``b-t4sa/raw_tweets_text.csv`` (id, text); ``b-t4sa/b-t4sa_{train,test}.txt`` with lines
    "picture label"; ``b-t4sa/data/<folder>/<tweet>-<k>.jpg``. The validation list is not used.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mpsl_dist.data import catalog
from mpsl_dist.data.dataset import Splits
from mpsl_dist.data.decode.samples import OnError, Sample, View
from mpsl_dist.data.sets import listing
from mpsl_dist.data.sets.index import Samples, Texts
from mpsl_dist.data.sets.tables import MAX_MISSING, Files, Table, build
from mpsl_dist.errors import DataError

SENTIMENTS = ("negative", "neutral", "positive")


def load_coco_qa(
    root: str | Path | None,
    *,
    text_length: int = 77,
    image_size: int = 224,
    on_error: OnError = "raise",
    max_missing: float = MAX_MISSING,
    cache: str | Path | None = None,
) -> Splits:
    """Read COCO-QA: a picture, a question, one of 430 answers.

    Classes are the distinct answers of training and test together, the most frequent first and
    equally frequent ones in alphabetical order.

    Parameters
    ----------
    root : str or Path
        Folder that holds ``coco-qa/`` and ``ms-coco/``.
    text_length : int
        Byte-pair tokens of a question.
    image_size : int
        Side of the square that every picture is squashed to, in pixels.
    on_error : str
        ``raise`` or ``skip``: what becomes of missing and unreadable files.
    max_missing : float
        The share of a split's samples that may lack files where ``on_error`` is ``skip``; with more
        of them missing it is an error.
    cache : str or Path or None
        Folder that keeps decoded inputs, see :class:`mpsl_dist.data.decode.cache.Cache`; None
        decodes them anew each time.
    """
    source = catalog.source("coco-qa")
    home = listing.folder(root, "coco-qa", "coco-qa", source)
    if not (home / "train").is_dir():
        # Unpacked with a folder of the archive's own.
        home = next((path.parent for path in sorted(home.glob("*/train"))), home)
    pictures = listing.folder(root, "coco-qa", "ms-coco", source)
    test = (
        home / "test" if (home / "test").is_dir() or not (home / "val").is_dir() else home / "val"
    )
    splits = [_read_questions(home / "train", source), _read_questions(test, source)]
    counts = Counter(answer for split in splits for _, _, answer in split)
    classes = sorted(counts, key=lambda answer: (-counts[answer], answer))
    number = {answer: position for position, answer in enumerate(classes)}
    tables = []
    for split, images in zip(splits, ("train2014", "val2014"), strict=True):
        path = coco_paths(pictures / images)
        listed = (Sample(image=path(image), text=question) for question, image, _ in split)
        samples = Samples.of(listed, pictures / images)
        tables.append(Table(samples, [number[answer] for *_, answer in split]))
    view = View(("image", "text"), image_size=image_size, text_length=text_length)
    files = Files(on_error, max_missing, cache)
    return build("coco-qa", *tables, classes, view, files, source=source)


def _read_questions(folder: Path, source: str) -> list[tuple[str, int, str]]:
    """Return the (question, picture's id, answer) of every line."""
    names = ("questions", "img_ids", "answers")
    columns = [listing.text(folder / f"{name}.txt", source).splitlines() for name in names]
    if len({len(column) for column in columns}) != 1:
        sizes = ", ".join(f"{n}.txt {len(c)}" for n, c in zip(names, columns, strict=True))
        raise DataError(f"{folder}: the files differ in their number of lines: {sizes}")
    triples = []
    for line, (question, image, answer) in enumerate(zip(*columns, strict=True), start=1):
        if not image.strip().isdigit():
            raise DataError(f"{folder / 'img_ids.txt'}: line {line}: '{image}' is no number")
        triples.append((question.strip(), int(image), answer.strip()))
    return triples


def coco_paths(folder: Path) -> Callable[[int], str]:
    """Return a function from a picture's id to its file.

    Files have their official names, or ``<id>.jpg`` where none in the folder has an official one.
    """
    bare = folder.is_dir() and not any(folder.glob("COCO_*.jpg"))

    def path(image: int) -> str:
        name = f"{image}.jpg" if bare else f"COCO_{folder.name}_{image:012}.jpg"
        return str(folder / name)

    return path


def load_t4sa(
    root: str | Path | None,
    *,
    text_length: int = 77,
    image_size: int = 224,
    on_error: OnError = "raise",
    max_missing: float = MAX_MISSING,
    cache: str | Path | None = None,
) -> Splits:
    """Read B-T4SA: a tweet's picture and text, its sentiment negative, neutral or positive.

    Parameters as in :func:`load_coco_qa`; ``root`` holds ``b-t4sa/``.
    """
    source = catalog.source("t4sa")
    home = listing.folder(root, "t4sa", "b-t4sa", source)
    listed = [_read_list(home / f"b-t4sa_{split}.txt", source) for split in ("train", "test")]
    texts, row_of = _read_tweets(home / "raw_tweets_text.csv", listed, source)
    tables = []
    for pictures, tweets, labels in listed:
        samples = Samples(home)
        for path, tweet in zip(pictures, tweets, strict=True):
            picture = listing.below(str(home), path)
            samples.append(Sample(image=picture, text=texts[row_of[tweet]]))
        tables.append(Table(samples, labels))
    view = View(("image", "text"), image_size=image_size, text_length=text_length)
    files = Files(on_error, max_missing, cache)
    return build("t4sa", *tables, SENTIMENTS, view, files, source=source)


def _read_tweets(
    path: Path, listed: Sequence[_Listed], source: str
) -> tuple[Texts, Mapping[str, int]]:
    """Return the texts of the listed tweets, and each tweet's row among them."""
    row_of = {tweet: -1 for split in listed for tweet in split.tweets}
    texts = Texts()
    for row in listing.rows(path, ("id", "text"), source):
        if row["id"] in row_of:
            row_of[row["id"]] = len(texts)
            texts.append(row["text"])
    without = sorted(tweet for tweet, row in row_of.items() if row < 0)
    if without:
        raise DataError(
            f"{path}: no text of {len(without)} listed tweets, the first {without[0]}; {source}"
        )
    return texts, row_of


class _Listed(NamedTuple):
    """The pictures' paths, the tweets' ids and the labels of a split."""

    pictures: Texts
    tweets: Texts
    labels: array[int]


def _read_list(path: Path, source: str) -> _Listed:
    """Read the lines "picture label"."""
    found = _Listed(Texts(), Texts(), array("q"))
    with listing.opened(path, source, newline=None) as file:
        for number, line in enumerate((line.strip() for line in file), start=1):
            if not line:
                continue
            picture, _, label = line.rpartition(" ")
            tweet = os.path.splitext(os.path.basename(picture))[0].partition("-")[0]
            if not picture or label not in ("0", "1", "2"):
                raise DataError(f"{path}: line {number}: expected a picture and 0, 1 or 2")
            found.pictures.append(picture)
            found.tweets.append(tweet)
            found.labels.append(int(label))
    return found
