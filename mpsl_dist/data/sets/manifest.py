"""``manifest``: the user's own data, listed in one csv or jsonl file.

Columns, in any order and any case; each may be left out:

``image``, ``audio``, ``video``
    Files, relative to the manifest's folder or absolute. A clip stands for its
    picture where there is no ``image``, and for its sound where there is no ``audio``; ``none`` as
    ``audio`` says that a clip has no sound.
``text``
    The text itself.
``label``
    The class, a text as it is written. Without this column the task is retrieval: rows with the
    same files describe the same thing.
``split``
    ``train`` or ``test``; rows with ``val``, ``valid``, ``validation`` or ``dev`` are not used.
    Without this column a fifth of the rows is for testing, see :func:`a_fifth`.
``client``
    Who owns the row: a natural federation instead of a drawn one.

``none`` as ``audio`` says that the row's ``video`` has no sound, which is no fault then. An empty
cell (csv) or a null (jsonl) means that the sample lacks this part, which is no fault; a
cell that names a file which is not there is one, see ``data.on_error``.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpsl_dist.data.dataset import Splits
from mpsl_dist.data.decode import audio, media
from mpsl_dist.data.decode.samples import OnError, Sample, View
from mpsl_dist.data.sets.index import Samples
from mpsl_dist.data.sets.manifest_table import UNUSED, Rows, read
from mpsl_dist.data.sets.tables import MAX_MISSING, Files, Table, build
from mpsl_dist.errors import DataError

SPLITS = ("train", "test")
#: Frames of a spectrogram where the data does not say: at least, and at most.
FRAMES = (32, 1024)
#: Sounds whose length is looked at, spread evenly over the rows.
_LOOKED_AT = 256
_SOURCE = "correct the manifest or the files"


def load(
    root: str | Path | None,
    *,
    text_length: int = 77,
    image_size: int = 224,
    audio_frames: int | None = None,
    modalities: Sequence[str] | None = None,
    on_error: OnError = "raise",
    max_missing: float = MAX_MISSING,
    cache: str | Path | None = None,
    needs: Sequence[str] = ("train", "test"),
) -> Splits:
    """Read the data that a manifest lists.

    Parameters
    ----------
    root : str or Path
        The csv or jsonl file, or a folder that holds ``manifest.csv`` or ``manifest.jsonl``.
    text_length : int
        Byte-pair tokens of a text.
    image_size : int
        Side of the square picture, in pixels. Pictures are squashed to it; where the manifest has a
        ``video`` column, cut out instead (at random in training).
    audio_frames : int, optional
        Frames of 10 ms; by default as many as the longest sound has, of up to 256 that are looked
        at, and at most 1,024.
    modalities : sequence of str, optional
        Of ``image``, ``audio`` and ``text``, in the order of fusion; by default all that any row
        has. Clips have ``audio`` if any of them has a sound track.
    on_error, max_missing, cache
        As in :func:`mpsl_dist.data.sets.image_text.load_coco_qa`.
    needs : sequence of str
        The splits that will be used. Rows of the other are passed over, and without a ``split``
        column all rows are of the one that is needed.

    Returns
    -------
    Splits
        The datasets' ``clients`` name every sample's owner where the manifest does.

    Raises
    ------
    DataError
        With every mistake of the manifest at once (the first ten in full).
    """
    path = _find(root)
    rows = read(path)
    notes = list(rows.notes)
    parts = _needed(path, rows, needs, notes)
    labels = _classes({rows.label[row] for part in parts for row in part} - {None})
    notes += _likely_the_same(labels)
    tables = [_table(rows, part, labels) for part in parts]
    used, columns = [table.samples for table in tables], rows.columns
    del rows, parts  # of many rows: the tables have all that is needed
    chosen = tuple(modalities or _modalities(used, notes))
    _require_modalities(path, chosen, columns)
    if audio_frames is None and "audio" in chosen:
        audio_frames = _frames_of(used, notes)
    view = View(
        modalities=chosen,
        image_size=image_size,
        crop="video" in columns,
        audio_frames=audio_frames or FRAMES[1],
        text_length=text_length,
    )
    files = Files(on_error, max_missing, cache)
    made = {"source": _SOURCE, "notes": notes, "needs": needs}
    return build(str(path), *tables, labels, view, files, **made)


def _find(root: str | Path | None) -> Path:
    if root is None:
        raise DataError("data.root: name the manifest, a csv or jsonl file")
    path = Path(root).absolute()
    if not path.is_dir():
        return path
    found = [path / name for name in ("manifest.csv", "manifest.jsonl")]
    existing = [candidate for candidate in found if candidate.exists()]
    if len(existing) != 1:
        raise DataError(f"{path}: expected one of manifest.csv and manifest.jsonl in it")
    return existing[0]


def _needed(path: Path, rows: Rows, needs: Sequence[str], notes: list[str]) -> list[Sequence[int]]:
    """Return which rows are for training and which for testing, none of what is not needed."""
    every = range(len(rows.samples))
    whole = "split" not in rows.columns and len(needs) == 1
    found = (every, every) if whole else _split(path, rows, notes)
    return [part if split in needs else () for split, part in zip(SPLITS, found, strict=True)]


def _split(path: Path, rows: Rows, notes: list[str]) -> tuple[Sequence[int], Sequence[int]]:
    """Return which rows are for training and which for testing."""
    everything = range(len(rows.samples))
    if "split" in rows.columns:
        train = [row for row in everything if rows.split[row] not in {"test", *UNUSED}]
        return train, [row for row in everything if rows.split[row] == "test"]
    testing = a_fifth(
        _numbers(map(_shown, rows.samples)), _numbers(rows.label), _numbers(rows.client)
    )
    if not testing.any():
        raise DataError(
            f"{path}: {len(testing)} rows are too few to put a fifth aside for testing, or each is "
            "the only one of its class or client; add a column split"
        )
    of = [what for what in ("label", "client") if what in rows.columns]
    drawn = f" of every {' and '.join(of)}" if of else ""
    notes.append(
        f"no column split: every fifth row{drawn} is for testing, {testing.sum():,} of "
        f"{len(testing):,}; rows of one picture, clip or sound stay together"
    )
    return np.flatnonzero(~testing).tolist(), np.flatnonzero(testing).tolist()


def _shown(sample: Sample) -> str:
    """Return what a row is about, which must not be in both splits."""
    return sample.image or sample.video or sample.audio or f"text {sample.text}"


def _numbers(values: Iterable[str | None]) -> NDArray[np.int64]:
    """Return a number for every value, equal values having the same: (rows,)."""
    known: dict[str | None, int] = {}
    return np.array(array("q", (known.setdefault(value, len(known)) for value in values)))


def a_fifth(
    things: NDArray[np.int64], labels: NDArray[np.int64], clients: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Choose a fifth of the rows for testing, a fifth of every client and class among them.

    The things are laid in a line, client by client and within a client class by class; whoever
    walks along it owes a fifth of the rows passed, and pays with the first thing that is no larger
    than that. The only thing of a class or of a client stays in training.

    Parameters
    ----------
    things, labels, clients : array
        (rows,) int64, numbers from 0: rows of the same thing stay together.

    Returns
    -------
    array
        (rows,) bool: whether a row is for testing.
    """
    sizes = np.bincount(things)
    members = np.argsort(things, kind="stable")
    ends = np.cumsum(sizes)
    first = members[ends - sizes]
    left = {"label": np.bincount(labels), "client": np.bincount(clients)}
    chosen, owed = np.zeros(len(sizes), dtype=bool), 0
    for thing in np.lexsort((labels[first], clients[first])):
        size = sizes[thing]
        owed += size  # fifths of a row
        if owed < 5 * size:
            continue
        own = members[ends[thing] - size : ends[thing]]
        lost = {"label": np.bincount(labels[own]), "client": np.bincount(clients[own])}
        if any((left[of][: len(n)] <= n)[n > 0].any() for of, n in lost.items()):
            owed = 5 * size
            continue
        for of, n in lost.items():
            left[of][: len(n)] -= n
        chosen[thing], owed = True, owed - 5 * size
    return chosen[things]


def _classes(labels: Iterable[str]) -> list[str]:
    """Return the labels in the order of their numbers: by value where all are whole numbers."""
    found = sorted(labels)
    if all(re.fullmatch(r"-?\d{1,18}", label) for label in found):
        found.sort(key=int)
    return found


def _likely_the_same(labels: Sequence[str]) -> list[str]:
    """Return a word on labels that differ only in how they are written."""
    alike: dict[str, list[str]] = {}
    for label in labels:
        plain = " ".join(unicodedata.normalize("NFKC", label).casefold().split())
        plain = {"true": "1", "false": "0"}.get(plain, plain)
        with contextlib.suppress(ValueError):
            plain = repr(float(plain)) if len(plain) < 16 else plain
        alike.setdefault(plain, []).append(label)
    return [
        f"the labels {', '.join(map(repr, same))} are {len(same)} classes; write them alike if "
        "they are one"
        for same in alike.values()
        if len(same) > 1
    ]


def _table(rows: Rows, part: Sequence[int], classes: Sequence[str]) -> Table:
    samples = rows.samples.take(part)
    if "label" in rows.columns:
        number = {name: position for position, name in enumerate(classes)}
        labels = array("q", (number[rows.label[row]] for row in part))
    else:
        # Rows with the same files describe the same thing.
        labels = array("q", _numbers("\n".join(sample.files) for sample in samples))
    owners = [rows.client[row] or "" for row in part] if "client" in rows.columns else None
    return Table(samples, labels, owners)


def _modalities(splits: Sequence[Samples], notes: list[str]) -> list[str]:
    """Return the modalities that any row has, in the order image, audio, text."""
    found = {
        name
        for samples in splits
        for name in ("image", "audio", "video", "text")
        if any(part is not None for part in samples.column(name))
    }
    if "video" in found:
        found.add("image")
    if "audio" not in found:
        clips = dict.fromkeys(
            sample.video
            for samples in splits
            for sample in samples
            if sample.video is not None and not sample.silent
        )
        if any(_has_sound(clip) for clip in clips):
            found.add("audio")
        elif clips:
            notes.append(f"no audio: none of the {len(clips):,} clips has a sound track")
    return [name for name in ("image", "audio", "text") if name in found]


def _require_modalities(path: Path, chosen: Sequence[str], columns: frozenset[str]) -> None:
    """Refuse modalities that no column has: they would be zeros everywhere."""
    sources = {"image": {"image", "video"}, "audio": {"audio", "video"}, "text": {"text"}}
    for name in chosen:
        if name not in sources:
            raise DataError(f"data.modalities: unknown '{name}'; valid: {', '.join(sources)}")
        if not sources[name] & columns:
            needed = " or ".join(sorted(sources[name]))
            raise DataError(f"data.modalities: {name} needs a column {needed} in {path}")


def _has_sound(clip: str) -> bool:
    try:
        media.read_waveform(clip, 0.0, 1_600)
    except DataError:
        return False
    return True


def _sounds(splits: Sequence[Samples]) -> Iterator[str]:
    for samples in splits:
        for sample in samples:
            source = sample.audio or (None if sample.silent else sample.video)
            if source is not None:
                yield source


def _frames_of(splits: Sequence[Samples], notes: list[str]) -> int:
    """Return the frames of the longest sound, of some that are spread evenly over the rows."""
    every = -(-sum(1 for _ in _sounds(splits)) // _LOOKED_AT) or 1
    lengths = []
    for path in islice(_sounds(splits), 0, None, every):
        try:
            length = media.length(path)
            lengths.append(len(media.read_waveform(path)) if length is None else length)
        except DataError:
            continue  # told of where files are checked and read
    longest = max(lengths, default=audio.samples_for(FRAMES[1]))
    frames = 1 + -(-(longest - audio.FRAME) // audio.HOP)
    frames = min(max(frames, FRAMES[0]), FRAMES[1])
    cut = "" if longest <= audio.samples_for(FRAMES[1]) else "; more is cut off"
    notes.append(
        f"data.audio_frames: {frames:,}, as the longest of {len(lengths)} sounds that were looked "
        f"at lasts {longest / audio.RATE:.2f} s{cut}"
    )
    return frames
