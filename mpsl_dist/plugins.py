"""What a name in a configuration stands for: an entry of ours, or of a user's own package.

Datasets, tokenizers, heads and methods are looked up by name in three places, in this order:

1. our own table (:mod:`mpsl_dist.data.catalog`, ``models.tokenizers``, ``models.heads``,
   ``config.methods``);
2. the modules that the experiment lists under ``plugins``: each may define a mapping ``datasets``,
   ``tokenizers``, ``heads`` or ``methods`` from names to entries;
3. installed packages that declare an entry point in the group ``mpsl_dist.datasets`` and so on.

``docs/extending.md`` shows one of each.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from mpsl_dist import typed
from mpsl_dist.errors import ConfigError

Kind = Literal["datasets", "tokenizers", "heads", "methods"]
Entry = TypeVar("Entry")


def find(
    kind: Kind, name: str, own: Mapping[str, Entry], modules: Sequence[str], key: str
) -> Entry:
    """Return the entry that a name stands for.

    Parameters
    ----------
    kind : str
        What is looked for.
    own : mapping
        Our own table.
    modules : sequence of str
        The experiment's ``plugins``.
    key : str
        The key of the configuration that holds the name, for the error.

    Raises
    ------
    ConfigError
        If nothing has this name, a module cannot be imported, or one takes a name of ours.
    """
    if name in own:
        return own[name]
    added = _of_modules(kind, own, modules)
    if name in added:
        return added[name]
    points = {point.name: point for point in _entry_points(kind)}
    if name in points:
        return _load(points[name])
    known = sorted({*own, *added, *points})
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(known)}"
    raise ConfigError(f"{key}: unknown {kind[:-1]} '{name}'; {hint}")


def check(modules: Sequence[str]) -> None:
    """Import every plugin, whether anything is looked up in it or not.

    Raises
    ------
    ConfigError
        With every one that cannot be imported.
    """
    problems = []
    for module in modules:
        try:
            _imported(module)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def resolve(target: Any) -> Any:
    """Return the object that ``"package.module:attribute"`` names; anything else as it is.

    Tables name their functions this way, as entry points do, so that looking one up imports
    nothing that is not used.
    """
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def options(cls: type | None, values: Mapping[str, Any], key: str) -> Any:
    """Return an entry's own options, checked as ours are.

    Parameters
    ----------
    cls : type or None
        The frozen dataclass of the options; None takes none.
    values : mapping
        What the configuration says under ``key``.

    Raises
    ------
    ConfigError
        With every unknown key and every value of a wrong type.
    """
    if cls is None:
        if values:
            raise ConfigError("\n".join(f"{key}.{name}: no such option here" for name in values))
        return None
    errors: list[str] = []
    built = typed.build(cls, values, f"{key}.", errors)
    if errors:
        raise ConfigError("\n".join(errors))
    return built


def _of_modules(kind: Kind, own: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    added: dict[str, Any] = {}
    for module in modules:
        entries = getattr(_imported(module), kind, {})
        if not isinstance(entries, Mapping):
            kind_of = type(entries).__name__
            raise ConfigError(f"plugins: {module}: {kind} is a {kind_of}, not a mapping of names")
        taken = sorted(entries.keys() & {*own, *added})
        if taken:
            raise ConfigError(f"plugins: {module}: {kind} has names in use: {', '.join(taken)}")
        added |= entries
    return added


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"plugins: {module} cannot be imported: {reason}") from error


def _entry_points(kind: Kind) -> importlib.metadata.EntryPoints:
    return importlib.metadata.entry_points(group=f"mpsl_dist.{kind}")


def _load(point: importlib.metadata.EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"entry point {point.group}: {point.value}: {reason}") from error
