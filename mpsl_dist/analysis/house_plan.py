"""The rooms of the house and what they import of each other, from the code.

A room is a folder of the package; a file beside the folders is a room of its own. Files are parsed,
never imported; an import inside a function counts as one at the top, a name in a string does not.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE, BESIDE = "mpsl_dist", "launch"
#: What nothing else of the package imports: the command line, the scripts beside it, and what the
#: package offers to Python, which its ``__init__`` alone imports, when it is asked for.
_TOPS = ("__main__", "api", BESIDE)
_OFFERS = ("__init__", "api")
#: The room that alone may import ``torch.distributed``.
_DOOR = "runtime"

Edge = tuple[str, str]


@dataclass(frozen=True)
class House:
    """What the files say.

    Attributes
    ----------
    lines : dict of str to int
        Module -> its lines; a folder's name stands for its ``__init__``.
    folders : frozenset of str
        The modules that are folders.
    imports : dict of (str, str) to str
        Module, imported module -> ``path:line`` of the first such import.
    distributed : dict of str to str
        Module that imports ``torch.distributed`` -> ``path:line``.
    """

    lines: dict[str, int]
    folders: frozenset[str]
    imports: dict[Edge, str]
    distributed: dict[str, str]

    def edges(self) -> Counter[Edge]:
        """Return how many imports, file to file, lead from room to room."""
        pairs = Counter((room_of(source), room_of(target)) for source, target in self.imports)
        return Counter({pair: count for pair, count in pairs.items() if pair[0] != pair[1]})


def room_of(module: str) -> str:
    """Return the room of a module: ``data`` of ``mpsl_dist.data.sets.coco``."""
    top, _, rest = module.partition(".")
    return top if top == BESIDE else rest.partition(".")[0] or "__init__"


def read(root: Path) -> House:
    """Parse every file of the package and of ``launch/``.

    Raises
    ------
    SyntaxError
        If a file is no Python; the error names it.
    """
    paths, folders = {}, set()
    for path in sorted([*(root / PACKAGE).rglob("*.py"), *(root / BESIDE).rglob("*.py")]):
        parts = path.relative_to(root).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        folders |= {".".join(parts[:depth]) for depth in range(1, len(parts))}
    house = House({}, frozenset(folders), {}, {})
    for module, path in paths.items():
        text = path.read_text(encoding="utf-8")
        house.lines[module] = len(text.splitlines())
        for name, line in _imported(ast.parse(text, str(path)), module, path.stem == "__init__"):
            where = f"{path.relative_to(root)}:{line}"
            if f"{name}.".startswith("torch.distributed."):
                house.distributed.setdefault(module, where)
            # Scripts name each other without their folder.
            for full in (name, f"{BESIDE}.{name}") if module.startswith(BESIDE) else (name,):
                target = _known(full, paths)
                if target not in (None, module, BESIDE):
                    house.imports.setdefault((module, target), where)
    return house


def _imported(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Yield every imported name, in full, and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".") + ["__init__"] * is_package
                base = ".".join([*above[: -node.level], *filter(None, [node.module])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed", node.lineno  # `import torch` alone may have loaded it


def _known(name: str, modules: Iterable[str]) -> str | None:
    """Return the module that a name is, or lies in; None for one that is not ours."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def circles(edges: Iterable[Edge]) -> list[list[str]]:
    """Return the groups of names that reach each other, each sorted."""
    direct: dict[str, set[str]] = {}
    for source, target in edges:
        direct.setdefault(source, set()).add(target)
    reached = {}
    for name in direct:
        found, todo = set(), [name]
        while todo:
            new = direct.get(todo.pop(), set()) - found
            found |= new
            todo.extend(new)
        reached[name] = found
    groups = {
        tuple(sorted(other for other in found if name in reached.get(other, ())))
        for name, found in reached.items()
        if name in found
    }
    return [list(group) for group in sorted(groups)]


def upward(edges: Mapping[Edge, int]) -> list[Edge]:
    """Return the imports that go up.

    In a circle of rooms the edge with the fewest imports is taken to go up, and the others down.
    Whatever leads to the command line, to ``launch/`` or to the Python API goes up.
    """
    tops = [edge for edge in edges if edge[1] in _TOPS and edge[0] not in _TOPS]
    up = [edge for edge in tops if edge != _OFFERS]
    down = {edge: count for edge, count in edges.items() if edge not in up}
    while found := circles(down):
        inside = [edge for edge in down if edge[0] in found[0] and edge[1] in found[0]]
        least = min(inside, key=lambda edge: (down[edge], edge))
        up.append(least)
        del down[least]
    return sorted(up)


def rows(house: House) -> list[list[str]]:
    """Return the rooms by layer, the ground first: the longest way down decides.

    The ground is every file beside the folders that imports no folder. ``launch/`` stands beside
    the highest row. The package's own ``__init__`` is left out unless something imports it.
    """
    edges = house.edges()
    down = set(edges) - set(upward(edges))
    rooms = {room_of(module) for module in house.lines}
    folders = {room_of(module) for module in house.folders - {PACKAGE}} | {*_TOPS}
    ground = {room for room in rooms - folders if not {b for a, b in down if a == room} & folders}
    if not any(target == "__init__" for _, target in down):
        rooms.discard("__init__")
    depth = {room: 0 for room in rooms & ground}

    def deep(room: str) -> int:
        if room not in depth:
            depth[room] = 1 + max((deep(b) for a, b in down if a == room), default=0)
        return depth[room]

    for room in rooms - {BESIDE}:
        deep(room)
    if BESIDE in rooms:
        depth[BESIDE] = max(depth.values(), default=0)
    layers = [
        [room for room in sorted(rooms) if depth[room] == d] for d in sorted({*depth.values()})
    ]
    return [[*(r for r in row if r != BESIDE), *(r for r in row if r == BESIDE)] for row in layers]


def faults(house: House) -> list[str]:
    """Return what breaks the house's rules, a line each."""
    found = []
    for group in circles(house.imports):
        inside = [
            f"{where} imports {b}"
            for (a, b), where in house.imports.items()
            if a in group and b in group
        ]
        found.append(f"circle of modules: {', '.join(group)} ({'; '.join(inside)})")
    edges = house.edges()
    found += [f"circle of rooms: {', '.join(group)}" for group in circles(edges)]
    up = upward(edges)
    for (source, target), where in house.imports.items():
        if (room_of(source), room_of(target)) in up:
            found.append(f"upward import: {where}: {source} imports {target}")
    for module, where in house.distributed.items():
        if room_of(module) != _DOOR:
            found.append(f"torch.distributed outside {_DOOR}/: {where}")
    return found
