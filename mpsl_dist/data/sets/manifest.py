"""``manifest``: the user's own data, listed in one csv or jsonl file.

Columns, in any order and any case; each may be left out:

``image``, ``audio``, ``video``
    Files, relative to the manifest's folder or absolute. A clip stands for its
    picture where there is no ``image``, and for its sound where there is no ``audio``.
``text``
    The text itself.
``label``
    The class, any word or number. Without this column the task is retrieval: rows with the same
    files describe the same thing.
``split``
    ``train`` or ``test``; rows with ``val``, ``valid``, ``validation`` or ``dev`` are not used.
    Without this column every fifth row of a class (in retrieval: every fifth thing) is for testing.
``client``
    Who owns the row: a natural federation instead of a drawn one.

An empty cell (csv) or a null (jsonl) means that the sample lacks this part, which is no fault; a
cell that names a file which is not there is one, see ``data.on_error``.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mpsl_dist.data.dataset import Splits
from mpsl_dist.data.decode import media
from mpsl_dist.data.decode.samples import OnError, Sample, View
from mpsl_dist.data.sets import listing
from mpsl_dist.data.sets.tables import Table, build
from mpsl_dist.errors import DataError

FILES = ("image", "audio", "video")
COLUMNS = (*FILES, "text", "label", "split", "client")
SPLITS = ("train", "test")
_UNUSED = frozenset({"val", "valid", "validation", "dev"})
#: Mistakes listed in one message.
_LISTED = 10

_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """One line of a manifest: its number in the file, and its cells without the empty ones."""

    line: int
    cells: Mapping[str, str]


def load(
    root: str | Path | None,
    *,
    text_length: int = 77,
    image_size: int = 224,
    audio_frames: int = 1024,
    modalities: Sequence[str] | None = None,
    on_error: OnError = "raise",
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
    audio_frames : int
        Frames of 10 ms.
    modalities : sequence of str, optional
        Of ``image``, ``audio`` and ``text``, in the order of fusion; by default all that the
        columns hold; clips count as ``audio`` if the first one has a sound track.
    on_error, cache
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
    rows, columns = read_rows(path)
    _require_sound(path, rows, columns)
    parts = _split(rows, columns) if "split" in columns or len(needs) > 1 else (rows, rows)
    parts = [part if name in needs else [] for name, part in zip(SPLITS, parts, strict=True)]
    labels = sorted({row.cells["label"] for part in parts for row in part if "label" in columns})
    if all(label.lstrip("-").isdigit() for label in labels):
        labels.sort(key=int)
    tables = [_table(path.parent, part, columns, labels) for part in parts]
    chosen = tuple(
        modalities or _modalities((tables[0] if "train" in needs else tables[1]).samples)
    )
    _require_modalities(path, chosen, columns)
    view = View(
        modalities=chosen,
        image_size=image_size,
        crop="video" in columns,
        audio_frames=audio_frames,
        text_length=text_length,
    )
    return build(
        str(path),
        *tables,
        labels,
        view,
        on_error=on_error,
        cache=cache,
        source="correct the manifest or the files",
        needs=needs,
    )


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


def read_rows(path: Path) -> tuple[list[Row], frozenset[str]]:
    """Return the rows of a manifest, and which of :data:`COLUMNS` it has.

    Raises
    ------
    DataError
        If it cannot be parsed, or a column has nearly the name of one of ours.
    """
    content = listing.text(path, "name the manifest with data.root")
    raw = list(_jsonl(path, content) if path.suffix == ".jsonl" else _csv(path, content))
    columns: dict[str, None] = {}
    rows = []
    for line, cells in raw:
        named = {str(name).strip().lower(): value for name, value in cells.items()}
        columns.update(dict.fromkeys(named))
        given = {
            name: str(value).strip()
            for name, value in named.items()
            if name in COLUMNS and value is not None and str(value).strip()
        }
        rows.append(Row(line, given))
    known = frozenset(columns) & frozenset(COLUMNS)
    for name in columns:
        near = difflib.get_close_matches(name, set(COLUMNS) - known, n=1, cutoff=0.75)
        if name not in COLUMNS and near:
            raise DataError(f"{path}: unknown column '{name}'; did you mean '{near[0]}'?")
        if name not in COLUMNS:
            _log.info("%s: the column '%s' is not used", path, name)
    return rows, known


def _csv(path: Path, content: str) -> Iterator[tuple[int, Mapping[str, str | None]]]:
    csv.field_size_limit(10_000_000)
    reader = csv.DictReader(io.StringIO(content, newline=""))
    try:
        for cells in reader:
            if None in cells:
                raise DataError(
                    f"{path}: line {reader.line_num}: more cells than the header has; "
                    "put quotes around texts that hold commas"
                )
            yield reader.line_num, cells
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}") from error


def _jsonl(path: Path, content: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {number}: not valid json: {error}") from error
        if not isinstance(cells, dict):
            raise DataError(f"{path}: line {number}: expected an object of columns")
        yield number, cells


def _require_sound(path: Path, rows: Sequence[Row], columns: frozenset[str]) -> None:
    """Raise one error that lists what is wrong with the rows, before any file is looked for."""
    wrong = []
    parts = (*FILES, "text")
    if not rows:
        wrong.append("no rows")
    if not columns & set(parts):
        wrong.append(f"none of the columns {', '.join(parts)}")
    elif "label" not in columns and not ("text" in columns and columns & set(FILES)):
        wrong.append("without a label column (retrieval) it needs text and image, audio or video")
    for line, cells in rows:
        if not cells.keys() & set(parts):
            wrong.append(f"line {line}: neither {', '.join(FILES)} nor text")
        if "label" in columns and "label" not in cells:
            wrong.append(f"line {line}: no label")
        split = cells.get("split", "").lower()
        if "split" in columns and split not in {"train", "test", *_UNUSED}:
            wrong.append(f"line {line}: split '{split}' is neither train nor test (nor val)")
        if "client" in columns and "client" not in cells and split != "test":
            wrong.append(f"line {line}: no client")
        wrong += [
            f"line {line}: {name}: '{cells[name]}' is no file but an address"
            for name in FILES
            if "://" in cells.get(name, "")
        ]
    if wrong:
        more = [f"… and {len(wrong) - _LISTED} more"] if len(wrong) > _LISTED else []
        raise DataError("\n".join(f"{path}: {what}" for what in [*wrong[:_LISTED], *more]))


def _thing(row: Row) -> tuple[str, ...]:
    """Return what a row is about: rows with the same files describe the same thing."""
    return tuple(row.cells.get(name, "") for name in FILES)


def _split(rows: Sequence[Row], columns: frozenset[str]) -> tuple[list[Row], list[Row]]:
    """Return the rows for training and for testing."""
    train: list[Row] = []
    test: list[Row] = []
    if "split" in columns:
        for row in rows:
            split = row.cells["split"].lower()
            if split not in _UNUSED:
                (test if split == "test" else train).append(row)
        return train, test
    if "label" in columns:
        seen: dict[str, int] = {}
        for row in rows:
            label = row.cells["label"]
            seen[label] = seen.get(label, 0) + 1
            (test if seen[label] % 5 == 0 else train).append(row)
        return train, test
    things: dict[tuple[str, ...], int] = {}
    for row in rows:
        position = things.setdefault(_thing(row), len(things))
        (test if position % 5 == 4 else train).append(row)
    return train, test


def _table(
    folder: Path, rows: Sequence[Row], columns: frozenset[str], classes: Sequence[str]
) -> Table:
    number = {name: position for position, name in enumerate(classes)}
    things: dict[tuple[str, ...], int] = {}
    samples, labels = [], []
    for row in rows:
        cells = row.cells
        paths = {name: str(folder / cells[name]) for name in FILES if name in cells}
        samples.append(Sample(**paths, text=cells.get("text")))
        if "label" in columns:
            labels.append(number[cells["label"]])
        else:
            labels.append(things.setdefault(_thing(row), len(things)))
    owners = [row.cells.get("client", "") for row in rows]
    return Table(samples, labels, owners if "client" in columns else None)


def _modalities(samples: Sequence[Sample]) -> list[str]:
    """Return the modalities that the samples have, in the order image, audio, text."""
    clip = next((sample.video for sample in samples if sample.video is not None), None)
    found = []
    if clip is not None or any(sample.image is not None for sample in samples):
        found.append("image")
    if any(sample.audio is not None for sample in samples) or (clip and _has_sound(clip)):
        found.append("audio")
    if any(sample.text is not None for sample in samples):
        found.append("text")
    return found


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
