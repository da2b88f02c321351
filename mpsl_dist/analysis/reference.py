"""What every key of the configuration means: its comment in the schema, its type, who reads it."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mpsl_dist import plugins
from mpsl_dist.config import parts, schema
from mpsl_dist.config.methods import METHODS, readers
from mpsl_dist.errors import ConfigError
from mpsl_dist.typed import describe

#: Keys whose names are looked up in a table; a plugin may add to most of them.
_TABLES = {
    "method": "mpsl_dist.config.methods:METHODS",
    "data.name": "mpsl_dist.data.catalog:DATASETS",
    "model.head.kind": "mpsl_dist.models.heads:HEADS",
    "wire.activations": "mpsl_dist.models.codecs:CODECS",
    "wire.gradients": "mpsl_dist.models.codecs:CODECS",
}


@dataclass(frozen=True)
class Key:
    """A key: its path, the type in words, the default as YAML has it, and what it means."""

    path: str
    type: str
    default: str
    meaning: str

    @property
    def names(self) -> list[str]:
        """What the key may name, where that is no part of its type."""
        part = self.path.partition(".")[2]
        if self.path.startswith("weights.") and part in parts.WEIGHT_SOURCES:
            return list(parts.WEIGHT_SOURCES[part])
        return list(plugins.resolve(_TABLES[self.path])) if self.path in _TABLES else []

    @property
    def readers(self) -> str:
        """The methods that read it, in words."""
        found = readers(self.path)
        return "every method" if len(found) == len(METHODS) else ", ".join(found)


@dataclass(frozen=True)
class Section:
    """Keys of one dataclass of the schema; ``paths`` are the places that have it."""

    paths: tuple[str, ...]
    meaning: str
    keys: tuple[Key, ...]

    @property
    def title(self) -> str:
        """Its places; the keys of no section have none."""
        return ", ".join(self.paths)


def read() -> list[Section]:
    """Return all sections, in the schema's order: those of no section first."""
    found: dict[type, Section] = {}
    for path, value in _sections(schema.Experiment()):
        kind = type(value)
        keys = tuple(_keys(path, value, _comments(kind)))
        earlier = found.get(kind)
        paths = (*earlier.paths, path) if earlier else (path,)
        all_keys = (*earlier.keys, *keys) if earlier else keys
        found[kind] = Section(paths, inspect.cleandoc(kind.__doc__ or ""), all_keys)
    return list(found.values())


def _sections(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, value
    for entry in dataclasses.fields(value):
        inner = getattr(value, entry.name)
        if dataclasses.is_dataclass(inner):
            yield from _sections(inner, f"{path}.{entry.name}".lstrip("."))


def _keys(path: str, value: Any, comments: Mapping[str, str]) -> Iterator[Key]:
    hints = typing.get_type_hints(type(value))
    for entry in dataclasses.fields(value):
        default, name = getattr(value, entry.name), f"{path}.{entry.name}".lstrip(".")
        if not dataclasses.is_dataclass(default):
            shown = default if isinstance(default, str) else json.dumps(default)
            yield Key(name, describe(hints[entry.name]), shown, comments.get(entry.name, ""))


def _comments(kind: type) -> dict[str, str]:
    """Return the ``#:`` comment above every field of a section's class, by field."""
    lines = inspect.getsource(kind).splitlines()
    (node,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id: _above(lines, field.lineno - 1)
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def _above(lines: list[str], at: int) -> str:
    first = at
    while lines[first - 1].lstrip().startswith("#:"):
        first -= 1
    return " ".join(line.lstrip().removeprefix("#:").strip() for line in lines[first:at])


def sections() -> str:
    """Return the list of sections, a line each, for a terminal."""
    told = [(section.title or "(no section)", _first(section.meaning)) for section in read()]
    width = max(len(title) for title, _ in told)
    lines = [f"{title:<{width}}  {_plain(meaning)}" for title, meaning in told]
    return "\n".join([*lines, "", "mpsl_dist explain KEY tells of a key, or of a section"])


def explain(word: str) -> str:
    """Return what there is to say of a key, or of a section and its keys, for a terminal.

    Raises
    ------
    ConfigError
        If there is neither, naming what was perhaps meant.
    """
    found = read()
    for section in found:
        if word in section.paths:
            mine = [key for key in section.keys if key.path.rpartition(".")[0] == word]
            width = max(len(key.path) for key in mine)
            lines = [f"{key.path:<{width}}  {key.default}" for key in mine]
            return "\n".join([_wrapped(section.meaning, ""), "", *lines])
    keys = {key.path: key for section in found for key in section.keys}
    if word in keys:
        return _told(keys[word])
    places = [path for section in found for path in section.paths if path]
    raise ConfigError(f"{word}: no such key; {_near(word, [*keys, *places])}")


def _told(key: Key) -> str:
    facts = [f"takes {key.type}; by default {key.default or 'empty'}", f"read by {key.readers}"]
    if key.names:
        facts.insert(1, f"one of {', '.join(key.names)}")
    return "\n".join([key.path, *(_wrapped(text, "  ") for text in (key.meaning, *facts))])


def _near(word: str, known: list[str]) -> str:
    last = {path: path.rpartition(".")[2] for path in known}
    own = word.rpartition(".")[2]
    same = [path for path in known if last[path] == own]
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.7)
    words = difflib.get_close_matches(own, set(last.values()), n=2, cutoff=0.75)
    alike = [path for path in known if last[path] in words]
    meant = list(dict.fromkeys([*same, *close, *alike]))[:5]
    return f"did you mean {' or '.join(meant)}?" if meant else "without a key all are listed"


def page() -> str:
    """Return ``docs/configuration.md``."""
    lines = [
        "# Every key of the configuration",
        "",
        "Written by `mpsl_dist explain --out docs/configuration.md` from the comments of",
        "`mpsl_dist/config/schema.py`; change those. `mpsl_dist explain KEY` tells the same on a",
        "terminal. An experiment's YAML file says what is not a default, `key.path=value` on the",
        "command line wins over the file, and every mistake in either is listed at once.",
    ]
    for section in read():
        title = f"`{'`, `'.join(section.paths)}`" if section.title else "At the top"
        lines += ["", f"## {title}", "", _linked(section.meaning.replace("\n", " ")), ""]
        lines += ["| Key | Default | Takes | Meaning |", "|---|---|---|---|"]
        lines += [_row(key) for key in section.keys]
    return "\n".join(lines) + "\n"


def _row(key: Key) -> str:
    takes = re.sub(r"'([^']*)'", r"`\1`", key.type)
    takes += f": {', '.join(f'`{name}`' for name in key.names)}" if key.names else ""
    only = "" if key.readers == "every method" else f" Read by {key.readers}."
    cells = [f"`{key.path}`", f"`{key.default}`", takes, f"{_linked(key.meaning)}{only}"]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _linked(text: str) -> str:
    """Return a comment as Markdown, with links to the pages that it names."""
    text = re.sub(r"``docs/([\w-]+\.md)``", r"[\1](\1)", text)
    return re.sub(r":\w+:`([^`]*)`", r"`\1`", text).replace("``", "`")


def _plain(text: str) -> str:
    return text.replace("``", "")


def _first(text: str) -> str:
    """Return the first sentence."""
    return " ".join(text.split()).partition(". ")[0].rstrip(".")


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(
        _plain(text), 88, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
