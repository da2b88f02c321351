"""Downloads of the datasets whose licence allows it: resumed, verified, safely unpacked.

A download continues where it stopped, if the server still has the same file. It counts only when
its length and its checksum are right. Where no checksum is published, the first download's SHA-256
is written to ``downloads.json`` under ``data.root``, and later ones must agree with it: that
notices a change, not a forgery of the first download.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import logging
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpsl_dist.data import catalog
from mpsl_dist.data.catalog import Archive
from mpsl_dist.data.fetch import archives
from mpsl_dist.errors import DataError

_BLOCK = 1 << 20
#: Called as bytes come: the file's name, how many are there, and of how many (None: not known).
Tell = Callable[[str, int, int | None], None]
_log = logging.getLogger(__name__)


class _Wrong(Exception):
    """What came is not what was asked for; the next attempt starts anew."""


def download(
    name: str, root: str | Path, tell: Tell | None = None, plugins: Sequence[str] = ()
) -> list[str]:
    """Download a dataset into ``data.root``; what is there already is not fetched again.

    Parameters
    ----------
    name : str
        One of ours (:data:`mpsl_dist.data.catalog.DATASETS`), or of a plugin.
    root : str or Path
        Folder of the datasets.
    tell : callable, optional
        Called with the progress, see :data:`Tell`.
    plugins : sequence of str
        Modules that may define further datasets.

    Returns
    -------
    list of str
        What was done, one line for each archive.

    Raises
    ------
    DataError
        If the dataset has no official place, must be fetched by hand (with instructions), or a
        download fails for good.
    """
    try:
        facts = catalog.find(name, plugins)
    except DataError:
        facts = None
    if facts is None or not (facts.place or facts.archives):
        official = [key for key, row in catalog.DATASETS.items() if row.place]
        raise DataError(f"data.name: {name} is not downloaded; there are: {', '.join(official)}")
    if not facts.archives:
        raise DataError(f"{name}: {facts.by_hand}; official place: {facts.place}")
    return [get(archive, Path(root), tell=tell) for archive in facts.archives]


def get(
    archive: Archive,
    root: Path,
    *,
    attempts: int = 8,
    wait: float = 1.0,
    timeout: float = 60.0,
    tell: Tell | None = None,
) -> str:
    """Download and unpack one archive.

    Parameters
    ----------
    attempts : int
        Tries without any progress until it fails for good.
    wait : float
        Seconds before the second attempt, doubled for each further one.
    timeout : float
        Seconds without a byte until a connection counts as lost.
    tell : callable, optional
        Called with the progress, see :data:`Tell`.

    Returns
    -------
    str
        What was done.
    """
    with _locked(root) as record:
        known = record.setdefault(archive.url, {})
        if known.get("unpacked"):
            return f"{archive.name}: there already"
        file = root / ".downloads" / archive.name
        if not file.exists():
            _fetch(archive, file, attempts, wait, timeout, tell)
        _verify(archive, file, known)
        if archive.extract:
            count = archives.unpack(file, root / archive.into)
            file.unlink()
            done = f"{archive.name}: {count} files into {root / archive.into}"
        else:
            (root / archive.into).mkdir(parents=True, exist_ok=True)
            file.replace(root / archive.into / archive.name)
            done = f"{archive.name}: into {root / archive.into}"
        known["unpacked"] = True
        return done


@contextmanager
def _locked(root: Path) -> Iterator[dict[str, Any]]:
    """Keep other processes out, and the record of what was downloaded on disk."""
    folder = root / ".downloads"
    folder.mkdir(parents=True, exist_ok=True)
    path = root / "downloads.json"
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{root}: another download is under way there") from error
        try:
            record = json.loads(path.read_text()) if path.exists() else {}
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: not valid json; remove it to start anew") from error
        try:
            yield record
        finally:
            aside = path.with_suffix(".part")
            aside.write_text(json.dumps(record, indent=2, sort_keys=True))
            aside.replace(path)


def _fetch(
    archive: Archive, file: Path, attempts: int, wait: float, timeout: float, tell: Tell | None
) -> None:
    """Bring the whole file, in as many attempts as make progress."""
    part = file.with_name(f"{file.name}.part")
    if not archive.url.startswith(("http://", "https://")):
        raise DataError(f"{archive.url}: only http and https")
    fruitless = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _attempt(archive, part, timeout, tell)
            part.replace(file)
            return
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 416, 429):
                raise DataError(f"{archive.url}: {reason}") from error
            if error.code == 416:
                part.unlink(missing_ok=True)
        except _Wrong as error:
            reason = str(error)
            part.unlink(missing_ok=True)
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        now = part.stat().st_size if part.exists() else 0
        fruitless = 0 if now > before else fruitless + 1
        if fruitless >= attempts:
            raise DataError(f"{archive.url}: gave up after {attempts} attempts: {reason}")
        _log.warning("%s: %s; continuing at %d bytes", archive.url, reason, now)
        time.sleep(wait * 2 ** min(fruitless, 6))


def _attempt(archive: Archive, part: Path, timeout: float, tell: Tell | None) -> None:
    """Ask for the rest of the file and write what comes; returns when it is whole."""
    tag_file = part.with_name(f"{part.name}.tag")
    have = part.stat().st_size if part.exists() else 0
    tag = tag_file.read_text() if have and tag_file.exists() else ""
    request = urllib.request.Request(archive.url, headers={"User-Agent": "mpsl_dist"})
    if have and tag:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", tag)
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        resumed = answer.status == 206
        if resumed and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise _Wrong("the server sent another part than was asked for")
        start = have if resumed else 0
        length = answer.headers.get("Content-Length")
        tag_file.write_text(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
        if length is not None and int(length) > shutil.disk_usage(part.parent).free:
            raise DataError(f"{archive.url}: {int(length)} bytes are more than the disk has left")
        with part.open("ab" if resumed else "wb") as file:
            total = None if length is None else start + int(length)
            while block := answer.read(_BLOCK):
                file.write(block)
                if tell is not None:
                    tell(archive.name, file.tell(), total)
            end = file.tell()
    if length is not None and end - start < int(length):
        raise OSError(f"the connection ended {int(length) - end + start} bytes early")
    tag_file.unlink(missing_ok=True)


def _verify(archive: Archive, file: Path, known: dict[str, Any]) -> None:
    """Compare with the published checksum, else with that of the first download."""
    expected = archive.checksum or known.get("checksum")
    kind, _, value = (expected or "sha256:").partition(":")
    digest = hashlib.new(kind, usedforsecurity=False)
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    found = digest.hexdigest()
    if value and found != value:
        file.unlink()
        raise DataError(
            f"{archive.url}: its {kind} is {found}, expected {value}; the file was removed, "
            "try again, and if it happens again do not use it"
        )
    if not expected:
        _log.warning("%s: no published checksum; noted %s:%s", archive.url, kind, found)
    known["checksum"] = f"{kind}:{found}"
