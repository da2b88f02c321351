"""``flickr8k``, ``flickr30k`` and ``ms-coco``: pictures and their captions, for retrieval.

One sample is one (picture, caption) pair: caption ``k`` of picture ``i`` is sample ``5 i + k``
where every picture has five, and the label of all five is ``i``, counted from 0 in each split.
Captions are independent of each other: the released code lets the five captions of a picture
attend to one another, at test too, which tells the model which belong together.

Layout under ``data.root``, the first that is found:

``flickr30k``
    ``karpathy/dataset_flickr30k.json`` and pictures in ``flickr30k/flickr30k-images/`` (or
    ``flickr30k/images/``, ``flickr30k/``); else ``flickr30k/results_20130124.token`` (or
    ``captions.token``), lines "file#k<tab>caption", every tenth picture by name for testing: not
    the official split.
    A ``captions.txt`` with the columns image and caption is read too.
``flickr8k``
    likewise, with 8k for 30k; or as its own archives unpack: ``flickr8k/Flickr8k.token.txt`` and
    beside it the official split, ``Flickr_8k.trainImages.txt`` and ``Flickr_8k.testImages.txt``
    (all of them maybe in ``Flickr8k_text/``), and pictures in ``flickr8k/Flicker8k_Dataset/``.
``ms-coco``
    ``karpathy/dataset_coco.json`` and pictures in ``ms-coco/{train2014,val2014}/``; else
    ``ms-coco/annotations/captions_{train,val}2014.json``, where ``val2014`` is for testing; without
    a ``val`` file every tenth picture by id.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpsl_dist.data import catalog
from mpsl_dist.data.dataset import Splits
from mpsl_dist.data.decode.samples import OnError, Sample, View
from mpsl_dist.data.sets import listing
from mpsl_dist.data.sets.image_text import coco_paths
from mpsl_dist.data.sets.index import Samples
from mpsl_dist.data.sets.tables import MAX_MISSING, Files, Table, build
from mpsl_dist.errors import DataError

#: The files of captions that are looked for where Karpathy's is not there, the official one first.
_TOKENS = {
    "flickr8k": (
        "Flickr8k.token.txt",
        "Flickr8k_text/Flickr8k.token.txt",
        "captions.token",
        "captions.txt",
    ),
    "flickr30k": ("results_20130124.token", "captions.token", "captions.txt"),
}
#: Where the pictures are looked for: as the archives of either dataset unpack, the first one found.
_FOLDERS = (
    "flickr8k-images",
    "flickr30k-images",
    "images",
    "Images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "",
)

_log = logging.getLogger(__name__)


def load_flickr30k(
    root: str | Path | None,
    *,
    text_length: int = 77,
    image_size: int = 224,
    on_error: OnError = "raise",
    max_missing: float = MAX_MISSING,
    cache: str | Path | None = None,
) -> Splits:
    """Read Flickr30k: 29,000 pictures for training, 1,000 for testing, five captions each.

    Parameters
    ----------
    root : str or Path
        Folder that holds ``flickr30k/`` and ``karpathy/``.
    text_length, image_size, on_error, max_missing, cache
        As in :func:`mpsl_dist.data.sets.image_text.load_coco_qa`.
    """
    return _load_flickr(
        "flickr30k", root, text_length, image_size, Files(on_error, max_missing, cache)
    )


def load_flickr8k(
    root: str | Path | None,
    *,
    text_length: int = 77,
    image_size: int = 224,
    on_error: OnError = "raise",
    max_missing: float = MAX_MISSING,
    cache: str | Path | None = None,
) -> Splits:
    """Read Flickr8k: 6,000 pictures for training, 1,000 for testing, five captions each.

    Parameters as in :func:`load_flickr30k`; ``root`` holds ``flickr8k/`` and ``karpathy/``.
    """
    return _load_flickr(
        "flickr8k", root, text_length, image_size, Files(on_error, max_missing, cache)
    )


def _load_flickr(
    name: str, root: str | Path | None, text_length: int, image_size: int, files: Files
) -> Splits:
    source = catalog.source(name)
    home = listing.folder(root, name, name, source)
    pictures = next(path for path in (home / below for below in _FOLDERS) if path.is_dir())
    karpathy = home.parent / "karpathy" / f"dataset_{name}.json"
    if karpathy.exists():
        captioned = _read_karpathy(karpathy, source)
        train, test = (
            {str(pictures / file): texts for _, file, texts in captioned[split]}
            for split in ("train", "test")
        )
        return _build(name, home, train, test, text_length, image_size, files)
    tokens = [home / file for file in _TOKENS[name]]
    path = next((path for path in tokens if path.exists()), None)
    if path is None:
        raise DataError(f"{karpathy}: no such file, and no {tokens[0]}; {source}")
    read = _read_captioned if path.suffix == ".txt" and "token" not in path.name else _read_tokens
    texts = read(path, source)
    lists = [path.parent / f"Flickr_8k.{split}Images.txt" for split in ("train", "test")]
    if any(one.exists() for one in lists):
        train, test = (_listed(one, texts, pictures, path, source) for one in lists)
    else:
        train, test = _split_tenth({str(pictures / file): texts[file] for file in sorted(texts)})
        _log.warning("%s: no %s; every tenth picture is for testing", path, karpathy.name)
    return _build(name, home, train, test, text_length, image_size, files)


def _listed(
    path: Path, texts: Mapping[str, Sequence[str]], pictures: Path, captions: Path, source: str
) -> dict[str, Sequence[str]]:
    """Return the captions of the pictures that a list names, one a line."""
    found = {}
    for number, file in enumerate(listing.lines(path, source), start=1):
        if file and file not in texts:
            raise DataError(f"{path}: line {number}: {captions.name} has no captions of '{file}'")
        if file:
            found[str(pictures / file)] = texts[file]
    return found


def load_ms_coco(
    root: str | Path | None,
    *,
    text_length: int = 77,
    image_size: int = 224,
    on_error: OnError = "raise",
    max_missing: float = MAX_MISSING,
    cache: str | Path | None = None,
) -> Splits:
    """Read MS-COCO captions: 82,783 pictures for training, 5,000 for testing, five captions each.

    Karpathy's ``restval`` and ``val`` pictures are not used, as in the paper. Parameters as in
    :func:`load_flickr30k`; ``root`` holds ``ms-coco/`` and ``karpathy/``.
    """
    source, files = catalog.source("ms-coco"), Files(on_error, max_missing, cache)
    home = listing.folder(root, "ms-coco", "ms-coco", source)
    karpathy = home.parent / "karpathy" / "dataset_coco.json"
    if karpathy.exists():
        captioned = _read_karpathy(karpathy, source)
        path = {below: coco_paths(home / below) for below in ("train2014", "val2014")}
        train, test = (
            {path[below](_number(karpathy, file)): texts for below, file, texts in captioned[split]}
            for split in ("train", "test")
        )
    else:
        train = _read_captions(home, "train2014", source)
        if (home / "annotations" / "captions_val2014.json").exists():
            test = _read_captions(home, "val2014", source)
        else:
            train, test = _split_tenth(train)
        _log.warning("%s: no such file; not the split of the paper", karpathy)
    return _build("ms-coco", home, train, test, text_length, image_size, files)


def _build(
    name: str,
    home: Path,
    train: Mapping[str, Sequence[str]],
    test: Mapping[str, Sequence[str]],
    text_length: int,
    image_size: int,
    files: Files,
) -> Splits:
    view = View(("image", "text"), image_size=image_size, text_length=text_length)
    tables = [_pairs(home, split) for split in (train, test)]
    return build(name, *tables, (), view, files, source=catalog.source(name))


def _pairs(home: Path, captions: Mapping[str, Sequence[str]]) -> Table:
    """Return the pairs of each picture and its captions; the label is the picture's position."""
    samples, labels = Samples(home), array("q")
    for position, (picture, texts) in enumerate(captions.items()):
        for caption in texts[: catalog.CAPTIONS]:
            samples.append(Sample(image=picture, text=caption))
            labels.append(position)
    return Table(samples, labels)


def _split_tenth(
    captions: Mapping[str, Sequence[str]],
) -> tuple[dict[str, Sequence[str]], dict[str, Sequence[str]]]:
    """Return the pictures for training, and every tenth one for testing."""
    train, test = {}, {}
    for position, (picture, texts) in enumerate(captions.items()):
        (test if position % 10 == 9 else train)[picture] = texts
    return train, test


def _read_karpathy(path: Path, source: str) -> dict[str, list[tuple[str, str, list[str]]]]:
    """Return (folder, file, captions) of the pictures of every split."""
    found: dict[str, list[tuple[str, str, list[str]]]] = {"train": [], "test": []}
    try:
        for image in listing.parsed_json(path, source)["images"]:
            if image.get("filepath", "train2014") not in ("train2014", "val2014"):
                raise DataError(f"{path}: unknown folder '{image['filepath']}'")
            texts = [sentence["raw"].strip() for sentence in image["sentences"]]
            row = (image.get("filepath", ""), image["filename"], texts)
            found.setdefault(image["split"], []).append(row)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not Karpathy's format: {error!r}; {source}") from error
    return found


def _number(karpathy: Path, file: str) -> int:
    """Return the picture's id in a name like COCO_val2014_000000391895.jpg."""
    number = Path(file).stem.rpartition("_")[2]
    if not number.isdigit():
        raise DataError(f"{karpathy}: '{file}' is no name of an MS-COCO picture")
    return int(number)


def _read_tokens(path: Path, source: str) -> dict[str, list[str]]:
    """Read lines "file#k<tab>caption" into each file's captions, in the order of k."""
    numbered: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(listing.lines(path, source), start=1):
        if not line:
            continue
        name, tab, caption = line.partition("\t")
        file, _, k = name.rpartition("#")
        if not (tab and file and k.isdigit()):
            raise DataError(f"{path}: line {number}: expected 'file#k<tab>caption'")
        numbered.setdefault(file, []).append((int(k), caption.strip()))
    return {file: [text for _, text in sorted(texts)] for file, texts in numbered.items()}


def _read_captioned(path: Path, source: str) -> dict[str, list[str]]:
    """Read rows "image,caption" into each file's captions."""
    texts: dict[str, list[str]] = {}
    for row in listing.rows(path, ("image", "caption"), source):
        texts.setdefault(row["image"].strip(), []).append(row["caption"].strip())
    return texts


def _read_captions(home: Path, images: str, source: str) -> dict[str, Sequence[str]]:
    """Read the official captions; pictures, and the captions of each, are ordered by id."""
    path = home / "annotations" / f"captions_{images}.json"
    content = listing.parsed_json(path, source)
    texts: dict[int, list[tuple[int, str]]] = {}
    try:
        for row in content["annotations"]:
            texts.setdefault(row["image_id"], []).append((row["id"], row["caption"].strip()))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not MS-COCO's format: {error!r}; {source}") from error
    name = coco_paths(home / images)
    return {name(image): [text for _, text in sorted(texts[image])] for image in sorted(texts)}
