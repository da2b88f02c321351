"""The experiments and sweeps that come with the project: ``configs/``, inside a wheel too."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from mpsl_dist.errors import ConfigError


def folder() -> Path:
    """Return where they lie: inside the installed package, or at the root of a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Return the name of each, ``paper/coco-qa``, those of no folder first."""
    files = [path.relative_to(folder()) for path in folder().rglob("*.yaml")]
    return sorted((file.with_suffix("").as_posix() for file in files), key=_order)


def _order(name: str) -> tuple[bool, str]:
    return "/" in name, name


def find(name: str) -> Path:
    """Return the file of a name; its last word will do where only one has it.

    Raises
    ------
    ConfigError
        If none has this name, or several have it.
    """
    known = names()
    found = [name] if name in known else [k for k in known if k.rpartition("/")[2] == name]
    if len(found) == 1:
        return folder() / f"{found[0]}.yaml"
    if found:
        raise ConfigError(f"{name}: several are called so: {', '.join(found)}")
    near = difflib.get_close_matches(name, [*known, *(k.rpartition("/")[2] for k in known)], n=1)
    advice = f"did you mean '{near[0]}'?" if near else "mpsl_dist configs lists all"
    raise ConfigError(f"{name}: no such file, and no shipped experiment of this name; {advice}")


def path_of(word: str | Path) -> Path:
    """Return the file that a user means: a path, or the name of a shipped one, without its ending.

    Raises
    ------
    ConfigError
        As :func:`find`, for a word that has no ending and is no file.
    """
    path = Path(word)
    known = path.suffix or (path.exists() and not path.is_dir())
    return path if known else find(str(word))


def line_of(path: Path) -> str:
    """Return what a file says of itself: the first sentence of its first comment.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# ").strip())
    sentence, stop, _ = " ".join(comment).partition(". ")
    return sentence + stop.strip()


def copy(name: str, to: Path) -> Path:
    """Copy a shipped file to a new one of the user's.

    A sweep names the experiment that its runs share by its place beside the sweep; its copy names
    it by its shipped name, so that the copy may lie anywhere.

    Raises
    ------
    ConfigError
        If there is no such name, ``to`` exists, or it cannot be written.
    """
    source = find(name)

    def renamed(found: re.Match[str]) -> str:
        place = (source.parent / found[1]).resolve().relative_to(folder().resolve())
        return f"config: {place.with_suffix('').as_posix()}"

    # Its tasks may have experiments of their own, each in a line.
    text = re.sub(r"\bconfig: (\S+\.yaml)\b", renamed, source.read_text("utf-8"))
    try:
        with to.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{to}: {error.strerror or error}; choose another name") from error
    return to
