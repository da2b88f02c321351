"""What a name in a configuration stands for: an entry of ours, or of a user's own package.

Datasets, tokenizers, heads and methods are looked up by name in three places, in this order:

1. our own table (:mod:`mpsl_dist.data.catalog`, ``actors.assembly``, ``models.heads``,
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
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from mpsl_dist import typed
from mpsl_dist.errors import ConfigError, UserError

Kind = Literal["datasets", "tokenizers", "heads", "methods"]
Entry = TypeVar("Entry")


def find(
    kind: Kind,
    name: str,
    own: Mapping[str, Entry],
    modules: Sequence[str],
    key: str,
    unknown: type[UserError] = ConfigError,
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
    unknown : type
        The error if nothing has this name.

    Raises
    ------
    UserError
        The given ``unknown``, if nothing has this name.
    ConfigError
        If a module cannot be imported, or one takes a name of ours.
    """
    added = _of_modules(kind, own, modules)  # first: a broken one is named, whatever is chosen
    if name in own:
        return own[name]
    if name in added:
        return _checked(added[name], own, f"plugins: {kind}: '{name}'")
    points = {point.name: point for point in _entry_points(kind)}
    if name in points:
        return _checked(_load(points[name]), own, f"entry point {points[name].group}: '{name}'")
    raise unknown(f"{key}: unknown {kind[:-1]} '{name}'; {hint(name, {*own, *added, *points})}")


def names(kind: Kind, own: Iterable[str], modules: Sequence[str]) -> list[str]:
    """Return every name that :func:`find` knows, our own first.

    Raises
    ------
    ConfigError
        As :func:`find`.
    """
    ours = dict.fromkeys(own)
    added = sorted(_of_modules(kind, ours, modules))
    return list(dict.fromkeys([*ours, *added, *sorted(p.name for p in _entry_points(kind))]))


def refuse_taken(kind: Kind, name: str, own: Mapping[str, Any], key: str) -> None:
    """Refuse a name of ours that an installed package declares too, by a ConfigError.

    Ours would be taken without a word.
    """
    taken = [point for point in _entry_points(kind) if point.name == name and name in own]
    if taken:
        raise ConfigError(
            f"{key}: '{name}' is ours, and an entry point {taken[0].group} ({taken[0].value}) has "
            "the same name; rename that one"
        )


def resolve(target: Any, key: str = "plugins") -> Any:
    """Return the object that ``"package.module:attribute"`` names; anything else as it is.

    Tables name their functions this way, as entry points do, so that looking one up imports
    nothing that is not used. ``key`` of the configuration begins an error's message.

    Raises
    ------
    ConfigError
        If there is no such module or attribute.
    """
    if not isinstance(target, str):
        return target
    module, colon, attribute = target.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"{key}: '{target}' is no place; write package.module:name")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ConfigError(f"{key}: {target} cannot be had: {_reason(error)}") from error


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
        With every unknown key, every key that is missing and every value of a wrong type; or with
        what the dataclass itself refuses by a ValueError in its ``__post_init__``.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key}: expected keys and values, found {values!r}")
    if cls is None:
        if values:
            raise ConfigError("\n".join(f"{key}.{name}: no such option here" for name in values))
        return None
    errors: list[str] = []
    try:
        built = typed.build(cls, values, f"{key}.", errors)
    except (TypeError, NameError) as error:  # no dataclass, or a field of a type that YAML has not
        raise ConfigError(f"{key}: {cls!r} cannot hold options: {_reason(error)}") from error
    if built is not None:
        errors += typed.not_finite(built, key)
    if errors:
        raise ConfigError("\n".join(errors))
    return built


def hint(name: str, known: Collection[str]) -> str:
    """Return what to say of an unknown name: the known one that was meant, or all of them."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(sorted(known))}"


def _checked(entry: Any, own: Mapping[str, Any], whose: str) -> Any:
    """Return the entry if it is of the kind that our own table holds."""
    wanted = type(next(iter(own.values())))
    if not isinstance(entry, wanted):
        raise ConfigError(f"{whose} must be a {wanted.__name__}, found {entry!r}")
    return entry


def _of_modules(kind: Kind, own: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    added: dict[str, Any] = {}
    errors = []
    for module in modules:
        try:
            entries = getattr(importlib.import_module(module), kind, {})
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and module.startswith(str(error.name))
            advice = "; every host must have it, installed or on PYTHONPATH" if missing else ""
            errors.append(f"plugins: {module} cannot be imported: {_reason(error)}{advice}")
            continue
        if not isinstance(entries, Mapping):
            errors.append(f"plugins: {module}: {kind} must be a mapping, found {entries!r}")
            continue
        taken = sorted(entries.keys() & {*own, *added})
        if taken:
            errors.append(f"plugins: {module}: {kind} has names in use: {', '.join(taken)}")
        added |= entries
    if errors:
        raise ConfigError("\n".join(errors))
    return added


def _entry_points(kind: Kind) -> importlib.metadata.EntryPoints:
    return importlib.metadata.entry_points(group=f"mpsl_dist.{kind}")


def _load(point: importlib.metadata.EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:
        raise ConfigError(f"entry point {point.group}: {point.value}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
