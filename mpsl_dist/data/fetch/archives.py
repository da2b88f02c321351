"""Unpacking archives from the internet: nothing leaves the folder, nothing fills the disk."""

from __future__ import annotations

import shutil
import stat
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from mpsl_dist.errors import DataError

_BLOCK = 1 << 20


class _Member(NamedTuple):
    """One regular file of an archive."""

    name: str
    size: int
    content: IO[bytes]


def unpack(archive: Path, into: Path) -> int:
    """Unpack a zip, tar, tar.gz or rar archive, and archives directly inside it.

    Links, devices, absolute names and names with ``..`` are refused, as is an archive that promises
    more bytes than the disk has left; a file never grows beyond what its entry promises.

    Returns
    -------
    int
        Files written.

    Raises
    ------
    DataError
        If the archive is damaged or hostile; files written before that was noticed stay.
    """
    into.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".rar":
        return _unrar(archive, into)
    try:
        inner = []
        count = 0
        for member in _members(archive, shutil.disk_usage(into).free):
            target = _inside(archive, into, member.name)
            if target.name.startswith("._"):
                continue  # what macOS adds beside every file
            _write(archive, member, target)
            count += 1
            if target.name.endswith((".tar", ".tar.gz", ".tgz")):
                inner.append(target)
    except (OSError, zipfile.BadZipFile, tarfile.TarError, EOFError, RuntimeError) as error:
        raise DataError(f"{archive}: cannot be unpacked: {error}") from error
    for path in inner:
        count += unpack(path, path.parent) - 1
        path.unlink()
    return count


def _members(archive: Path, free: int) -> Iterator[_Member]:
    """Yield the regular files; refuse everything that is neither a file nor a folder."""
    left = free
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                if info.is_dir():
                    continue
                if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
                    raise DataError(f"{archive}: '{info.filename}' is no regular file")
                left = _take(archive, left, info.file_size)
                with opened.open(info) as content:
                    yield _Member(info.filename, info.file_size, content)
        return
    # As a stream: the entries of a large tar.gz are unpacked while they are read.
    with tarfile.open(archive, "r|*") as opened:
        for entry in opened:
            if entry.isdir():
                continue
            content = opened.extractfile(entry) if entry.isreg() else None
            if content is None:
                raise DataError(f"{archive}: '{entry.name}' is no regular file")
            left = _take(archive, left, entry.size)
            yield _Member(entry.name, entry.size, content)


def _take(archive: Path, left: int, size: int) -> int:
    if size > left:
        raise DataError(f"{archive}: unpacked it is larger than what the disk has left")
    return left - size


def _inside(archive: Path, into: Path, name: str) -> Path:
    """Return the path of an entry, which must lie in the folder even if links lead out of it."""
    target = into / name
    parts = Path(name).parts
    resolved = target.resolve()
    if ".." in parts or Path(name).is_absolute() or not resolved.is_relative_to(into.resolve()):
        raise DataError(f"{archive}: the entry '{name}' leads out of the folder")
    return target


def _write(archive: Path, member: _Member, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    left = member.size
    with target.open("wb") as file:
        while block := member.content.read(min(_BLOCK, left + 1)):
            left -= len(block)
            if left < 0:
                raise DataError(f"{archive}: '{member.name}' is larger than it says")
            file.write(block)
    if left:
        raise DataError(f"{archive}: '{member.name}' is shorter than it says")


def _unrar(archive: Path, into: Path) -> int:
    """Unpack with a program, aside; then move what is a regular file inside."""
    programs = {
        "unrar": ["x", "-idq", "-o+", "-p-", str(archive), "."],
        "bsdtar": ["-xf", str(archive)],
        "7z": ["x", "-y", "-bso0", "-p-", str(archive)],
    }
    program = next((name for name in programs if shutil.which(name)), None)
    if program is None:
        raise DataError(
            f"{archive}: install one of {', '.join(programs)} to unpack it, or unpack it yourself "
            f"into {into}"
        )
    aside = into / f".{archive.stem}.unpacking"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        line = [program, *programs[program]]
        done = subprocess.run(line, cwd=aside, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DataError(f"{archive}: {program} failed: {done.stderr.strip()[-500:]}")
        count = 0
        for path in sorted(aside.rglob("*")):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise DataError(f"{archive}: '{path.relative_to(aside)}' is no regular file")
            if path.is_file():
                target = _inside(archive, into, str(path.relative_to(aside)))
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
                count += 1
        return count
    finally:
        shutil.rmtree(aside, ignore_errors=True)
