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

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mpsl_dist.data import catalog
from mpsl_dist.data.dataset import Splits
from mpsl_dist.data.decode.samples import OnError, Sample, View
from mpsl_dist.data.sets import listing
from mpsl_dist.data.sets.tables import Table, build
from mpsl_dist.errors import DataError

SENTIMENTS = ("negative", "neutral", "positive")


def load_coco_qa(
    root: str | Path | None,
    *,
    text_length: int = 77,
    image_size: int = 224,
    on_error: OnError = "raise",
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
        samples = [Sample(image=path(image), text=question) for question, image, _ in split]
        tables.append(Table(samples, [number[answer] for *_, answer in split]))
    view = View(("image", "text"), image_size=image_size, text_length=text_length)
    return build("coco-qa", *tables, classes, view, on_error=on_error, cache=cache, source=source)


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
    cache: str | Path | None = None,
) -> Splits:
    """Read B-T4SA: a tweet's picture and text, its sentiment negative, neutral or positive.

    Parameters as in :func:`load_coco_qa`; ``root`` holds ``b-t4sa/``.
    """
    source = catalog.source("t4sa")
    home = listing.folder(root, "t4sa", "b-t4sa", source)
    listed = [_read_list(home / f"b-t4sa_{split}.txt", source) for split in ("train", "test")]
    wanted = {tweet for split in listed for _, tweet, _ in split}
    texts = {
        row["id"]: row["text"]
        for row in listing.rows(home / "raw_tweets_text.csv", ("id", "text"), source)
        if row["id"] in wanted
    }
    without = sorted(wanted - texts.keys())
    if without:
        raise DataError(
            f"{home / 'raw_tweets_text.csv'}: no text of {len(without)} listed tweets, the first "
            f"{without[0]}; {source}"
        )
    tables = [
        Table(
            [Sample(image=str(home / path), text=texts[tweet]) for path, tweet, _ in split],
            [label for *_, label in split],
        )
        for split in listed
    ]
    view = View(("image", "text"), image_size=image_size, text_length=text_length)
    return build("t4sa", *tables, SENTIMENTS, view, on_error=on_error, cache=cache, source=source)


def _read_list(path: Path, source: str) -> list[tuple[str, str, int]]:
    """Return the (picture's path, tweet's id, label) of every line."""
    found = []
    for number, line in enumerate(listing.lines(path, source), start=1):
        if not line:
            continue
        picture, _, label = line.rpartition(" ")
        tweet = Path(picture).stem.partition("-")[0]
        if not picture or label not in ("0", "1", "2"):
            raise DataError(f"{path}: line {number}: expected a picture and 0, 1 or 2")
        found.append((picture, tweet, int(label)))
    return found
