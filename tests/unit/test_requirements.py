"""Whatever the package imports, setup.cfg asks for; a fresh installation lacks nothing."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

#: What brings a module of another name, where it may be missing here.
BROUGHT_BY = {
    "dp_accounting": "dp-accounting",
    "rouge_score": "rouge-score",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "open_clip": "open-clip-torch",
}


def modules_of(text: str) -> Iterator[str]:
    """The first name of everything that a source imports, inside functions too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def asked_for(text: str) -> set[str]:
    """Every distribution that a setup.cfg names, extras too, those of tests and docs apart."""
    read = configparser.ConfigParser()
    read.read_string(text)
    extras = read["options.extras_require"]
    lists = [read["options"]["install_requires"]]
    lists += [extras[name] for name in extras if name not in ("test", "docs")]
    lines = [line.strip() for block in lists for line in block.splitlines()]
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in lines if line and line[0] != "#"}


def imported() -> dict[str, Path]:
    """Every module of another's that the package imports, and a file that does so."""
    known = {*sys.stdlib_module_names, "mpsl_dist"}
    files = sorted((ROOT / "mpsl_dist").rglob("*.py"))
    found = {name: file for file in files for name in modules_of(file.read_text("utf-8"))}
    return {name: file for name, file in found.items() if name not in known}


def missing(setup: str, modules: dict[str, Path]) -> list[str]:
    """A line for every module that no distribution of this setup.cfg brings."""
    here, asked = importlib.metadata.packages_distributions(), asked_for(setup)
    return [
        f"{file}: {name}"
        for name, file in modules.items()
        if not {normal(BROUGHT_BY.get(name, name)), *map(normal, here.get(name, ()))} & asked
    ]


def test_setup_cfg_asks_for_whatever_is_imported() -> None:
    setup, modules = (ROOT / "setup.cfg").read_text("utf-8"), imported()
    assert {"torch", "yaml", "transformers"} <= modules.keys()
    assert missing(setup, modules) == []
    for line in ("pyyaml>=6.0", "scipy>=1.10", "peft>=0.18"):
        assert len(missing(setup.replace(f"    {line}\n", ""), modules)) == 1, line
